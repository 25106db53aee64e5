"""Every network of braindecode by its class name, if braindecode is installed (the extra of that name).

Owns the bridge only: what a class asks for (number of channels, samples, rate, channel positions) is read from the
signal, the rest are its own keyword settings. The subject plays no part in these networks. braindecode and torch are
imported by `build` alone. EEGNet is also in `eegnet`, without that dependency.

References
----------
Schirrmeister et al. (2017), doi:10.1002/hbm.23730; https://braindecode.org.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import ConfigError, DataError, describe_missing, suggest
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal, read_axes

if TYPE_CHECKING:
    from torch import nn

# What the signal and the target decide; not for `settings`.
SIGNAL_ARGUMENTS = ("n_chans", "n_times", "n_outputs", "sfreq", "input_window_seconds", "chs_info")


class BraindecodeConfig(NetworkSettings):
    """A network of `braindecode.models`.

    Parameters
    ----------
    model
        Name of its class, for example ``EEGConformer``.
    settings
        Keyword arguments of the class beside those that the signal decides (n_chans, n_times, n_outputs, sfreq,
        input_window_seconds and chs_info, each passed if the class asks for it). The defaults are braindecode's;
        record its version with a result.
    """

    packages: ClassVar[tuple[str, ...]] = ("braindecode",)

    kind: Literal["braindecode"] = "braindecode"
    model: str = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        ConfigError
            If braindecode is not installed or does not load, has no such class, refuses the settings or this signal,
            or the network does not answer a trial with one vector of `n_outputs`.
        DataError
            If the trials are not channel x time.
        """
        read_axes(signal, f"braindecode's {self.model}")
        model_class = find_model(self.model)
        arguments = self._choose_arguments(model_class, signal, n_outputs)
        try:
            model = model_class(**arguments, **self.settings)
        except Exception as error:  # whatever braindecode raises for sizes that do not fit
            raise ConfigError(
                f"braindecode's {self.model} cannot be built for {signal.shape[0]} channels x {signal.shape[1]} "
                f"samples with encoder.network.settings {self.settings}: {error}"
            ) from error
        return self._wrap(model, signal, n_outputs)

    def _choose_arguments(self, model_class: type, signal: Signal, n_outputs: int) -> dict[str, Any]:
        accepted = inspect.signature(model_class).parameters
        fixed = [name for name in self.settings if name in SIGNAL_ARGUMENTS]
        if fixed:
            raise ConfigError(
                f"encoder.network.settings names {', '.join(fixed)}, which the responses and the target "
                "define; leave it out."
            )
        # A class that takes any keyword cannot be asked which it knows; it complains itself.
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            for name in self.settings:
                if name not in accepted:
                    raise ConfigError(
                        f"braindecode's {self.model} has no setting {name!r}{suggest(name, list(accepted))}."
                    )
        arguments = _describe_signal(signal, n_outputs, with_channels="chs_info" in accepted)
        return {name: value for name, value in arguments.items() if name in accepted}

    def _wrap(self, model: nn.Module, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network, called with the trials and their subjects as all networks here are; zeros are tried."""
        import torch
        from torch import Tensor, nn

        class BraindecodeNetwork(nn.Module):
            """A braindecode network; the class is made here because settings must not load torch."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, data: Tensor, subject: Tensor) -> Tensor:
                """Map trials (batch, n_channels, n_times) to (batch, n_outputs); the subject plays no part."""
                return self.model(data)

        was_training = model.training
        model.eval()  # the trial of zeros must not enter the statistics of batch norms
        try:
            with torch.no_grad():
                answer = model(torch.zeros(2, *signal.shape))
        except Exception as error:  # whatever a network raises for sizes that do not fit
            raise ConfigError(
                f"braindecode's {self.model} was built, but fails on a trial of {signal.shape[0]} channels x "
                f"{signal.shape[1]} samples: {error}"
            ) from error
        model.train(was_training)
        if not isinstance(answer, Tensor) or answer.shape != (2, n_outputs):
            found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ConfigError(
                f"braindecode's {self.model} must return for 2 trials an array of shape (2, {n_outputs}), but gives "
                f"{found}; choose a network that pools over time, or change encoder.network.settings."
            )
        return BraindecodeNetwork()


def find_model(name: str) -> type:
    """Return the class of `braindecode.models` called `name`.

    Raises
    ------
    ConfigError
        If braindecode is not there or does not load, or has no network of that name.
    """
    models = _import_models()
    from torch import nn

    classes = inspect.getmembers(models, inspect.isclass)
    known = [key for key, value in classes if issubclass(value, nn.Module)]
    if name not in known:
        raise ConfigError(
            f"encoder.network.model is {name!r}, but braindecode has no such network{suggest(name, known)}; "
            f"it has {', '.join(known)}."
        )
    return getattr(models, name)


def _import_models() -> ModuleType:
    try:
        import braindecode.models as models
    except ModuleNotFoundError as error:
        if error.name not in ("braindecode", "braindecode.models"):
            raise ConfigError(_explain_load_failure(error)) from error
        raise ConfigError(
            describe_missing(
                "braindecode",
                "encoder.network.kind braindecode",
                otherwise="choose eegnet, which needs no extra",
            )
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(_explain_load_failure(error)) from error
    return models


def _explain_load_failure(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"braindecode is installed, but does not load ({text}); its torchaudio must be built for the installed torch: "
        "for a CPU build of torch, install the CPU build of torchaudio; see torch's installation page."
    )


def _describe_signal(signal: Signal, n_outputs: int, *, with_channels: bool) -> dict[str, Any]:
    """Return the arguments that the signal knows."""
    arguments: dict[str, Any] = {
        "n_chans": signal.size_of("channel"),
        "n_times": signal.size_of("time"),
        "n_outputs": n_outputs,
    }
    if signal.sfreq is not None:
        arguments["sfreq"] = signal.sfreq
        if with_channels and signal.ch_names:
            arguments["chs_info"] = _make_channel_info(signal)
    return arguments


def _make_channel_info(signal: Signal) -> list[Any]:
    """Return MNE's description of the channels, with positions in m where the signal knows them."""
    import mne

    if len(signal.ch_names) != signal.size_of("channel"):
        raise DataError(
            f"the responses name {len(signal.ch_names)} channels but have {signal.size_of('channel')}."
        )
    # The type of the sensors is not told; braindecode's networks look at names and places only.
    info = mne.create_info(list(signal.ch_names), float(signal.sfreq or 1), "eeg")
    if signal.ch_pos is not None:
        for channel, position in zip(info["chs"], signal.ch_pos, strict=True):
            channel["loc"][:3] = position  # m, the first three of MNE's twelve numbers
    return list(info["chs"])
