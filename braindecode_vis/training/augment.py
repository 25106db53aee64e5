"""Augmentations of training trials, drawn anew at every step from a generator that the step alone decides.

Each works on a batch of shape (n_trials, n_channels, n_times) or (n_trials, n_features) after scaling, on any device,
and never touches targets, validation or test trials. Trial mixing also says which trials it mixed, for the objectives
that need it; averaging of repetitions happens where batches are planned. Settings import without torch.

References
----------
NeuroBridge (AAAI 2026), smoothing. Scotti et al. (2023), MindEye, arXiv:2305.18274, BiMixCo. Rommel et al. (2022),
doi:10.1088/1741-2552/aca220, a survey of augmentations for EEG.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import ConfigError, require
from braindecode_vis.base.contracts import Augmentation
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    from torch import Generator, Tensor

Probability = Annotated[float, Field(ge=0, le=1)]
_MIXED = 0.5  # share of the trials that are mixed, half of the batch in MindEye


class ChanceAugmentation(Augmentation):
    """An augmentation that changes some trials.

    Parameters
    ----------
    probability
        Probability for each trial.
    """

    probability: Probability = 0.5


class ChannelDropoutConfig(ChanceAugmentation):
    """Set some channels (or voxels, or parcels) of some trials to zero.

    Parameters
    ----------
    share
        Probability of each of its channels to be lost.
    """

    kind: Literal["channel_dropout"] = "channel_dropout"
    share: Probability = 0.1

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the augmented trials."""
        shape = data.shape[:2]
        # Two draws: which channels would go, and which trials lose any.
        lost = _draw(shape, generator) < self.share
        lost &= _draw(shape[:1], generator)[:, None] < self.probability
        return data.masked_fill(lost.reshape(*shape, *[1] * (data.ndim - 2)), 0.0)


class TimeShiftConfig(Augmentation):
    """Shift each trial in time; samples from outside the trial are zero.

    Parameters
    ----------
    max_shift
        Largest shift in s, in both directions.
    """

    kind: Literal["time_shift"] = "time_shift"
    max_shift: float = Field(default=0.02, gt=0)

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the augmented trials."""
        return self.shift(data, generator, signal)[0]

    def shift(self, data: Tensor, generator: Generator, signal: Signal) -> tuple[Tensor, Tensor]:
        """Return the augmented trials, and by how many samples each was moved, shape (n_trials,)."""
        import torch

        reach = round(self.max_shift * _require_sfreq(signal, self.kind))  # in samples
        n_times = data.shape[-1]
        shift = torch.randint(-reach, reach + 1, (len(data), 1), generator=generator, device=data.device)
        source = torch.arange(n_times, device=data.device) - shift  # (n_trials, n_times)
        outside = (source < 0) | (source >= n_times)
        # (n_trials, n_channels, n_times): every channel of a trial moves by the same shift
        index = source.clamp(0, n_times - 1)[:, None].expand(-1, data.shape[1], -1)
        return data.gather(2, index).masked_fill(outside[:, None], 0.0), shift[:, 0]


class GaussianNoiseConfig(ChanceAugmentation):
    """Add white noise.

    Parameters
    ----------
    scale
        Standard deviation of the noise as a share of that of the batch.
    """

    kind: Literal["gaussian_noise"] = "gaussian_noise"
    scale: float = Field(default=0.1, gt=0)

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the augmented trials."""
        import torch

        chosen = _draw(data.shape[:1], generator) < self.probability
        # Drawn for all trials, chosen or not, so that the draws that follow do not depend on the choice.
        noise = torch.randn(data.shape, generator=generator, device=data.device, dtype=data.dtype)
        strength = chosen.to(data.dtype) * self.scale * data.std()
        return data + noise * strength.reshape(-1, *[1] * (data.ndim - 1))


class SmoothingConfig(ChanceAugmentation):
    """Replace some channels of each trial by their moving average over time.

    NeuroBridge smooths each channel with probability .3 and a box of 5 samples, which is cut at the edges of the trial.

    Parameters
    ----------
    probability
        Probability for each channel of each trial.
    kernel
        Width in samples, odd.
    once
        Whether the channels of a training trial are chosen once for all epochs, as in the scripts of NeuroBridge and
        SAMGA; otherwise they are chosen again in each epoch.
    """

    kind: Literal["smoothing"] = "smoothing"
    probability: Probability = 0.3
    kernel: int = Field(default=5, ge=3)
    once: bool = False

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"once"})

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the augmented trials, or with `once` the trials as they are: `smooth_once` has smoothed them."""
        if self.once:
            return data
        smooth = self._smooth(data, signal)
        chosen = _draw(data.shape[:2], generator) < self.probability
        return smooth.where(chosen[..., None], data)

    def smooth_once(self, block: np.ndarray, rows: np.ndarray, signal: Signal, seed: int) -> np.ndarray:
        """Return trials of shape (n_trials, n_channels, n_times), smoothed as the seed and their row numbers decide."""
        import torch

        smooth = self._smooth(torch.from_numpy(block), signal).numpy()
        # A generator for each trial: it must not matter with which others it is read.
        draws = [make_generator(seed, "smoothing", int(row)).random(block.shape[1]) for row in rows]
        chosen = np.stack(draws) < self.probability  # (n_trials, n_channels)
        return np.where(chosen[..., None], smooth, block)

    def _smooth(self, data: Tensor, signal: Signal) -> Tensor:
        from torch.nn import functional

        _require_time(signal, self.kind)
        if self.kernel % 2 == 0 or self.kernel > 2 * data.shape[-1]:
            raise ConfigError(f"the kernel of smoothing must be odd and fit the trial, but is {self.kernel}.")
        # An even kernel would shift the trial by half a sample.
        half = self.kernel // 2
        return functional.avg_pool1d(data, self.kernel, 1, padding=half, count_include_pad=False)


class BraindecodeAugmentationConfig(ChanceAugmentation):
    """One of braindecode's augmentations, which needs the extra ``braindecode``.

    Parameters
    ----------
    name
        A class of `braindecode.augmentation`, such as ``FTSurrogate`` or ``BandstopFilter``.
    parameters
        Its further arguments; ``sfreq`` is added if the class has this argument.
    """

    packages: ClassVar[tuple[str, ...]] = ("braindecode",)

    kind: Literal["braindecode"] = "braindecode"
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the augmented trials."""
        import inspect

        import torch

        _require_time(signal, f"braindecode {self.name}")
        augmentation = require("braindecode.augmentation", f"the augmentation {self.name}")
        kind: Any = getattr(augmentation, self.name, None)
        # Nothing else that lies in that module is called because a file names it.
        if not (isinstance(kind, type) and issubclass(kind, augmentation.Transform)):
            raise ConfigError(
                f"braindecode.augmentation has no {self.name}; see its documentation for names."
            )
        options = dict(self.parameters)
        if "sfreq" in inspect.signature(kind).parameters and "sfreq" not in options:
            options["sfreq"] = _require_sfreq(signal, self.name)
        # braindecode draws from NumPy; its seed comes from our generator, which the step decides.
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator, device=data.device))
        state = np.random.RandomState(seed)
        return kind(probability=self.probability, random_state=state, **options)(data)


class TrialMixingConfig(Augmentation):
    """Mix each chosen trial with another one of its subject (BiMixCo); needs an objective for mixed trials.

    Trials are mixed in the phase of that objective and not after it: the update that changes the loss ends the mixing.
    Partners are trials of the same subject in the batch, since voxels of two brains have no sum (MindEye2 mixes before
    subjects are joined in a batch).

    Half of the trials are mixed, and the share of the trial itself is drawn from Beta(0.15, 0.15), as in MindEye.
    """

    kind: Literal["trial_mixing"] = "trial_mixing"

    removed_settings: ClassVar[Mapping[str, Any]] = {"beta": 0.15, "probability": 0.5}

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the trials as they are: `mix_trials` mixes them at the end and says which."""
        return data


class RepetitionAveragingConfig(Augmentation):
    """Average a random subset of the repetitions of an image at every step; needs single trials (`repeats.train`).

    An epoch then uses every image of every subject once, instead of every trial.

    Parameters
    ----------
    max_repetitions
        Largest number of repetitions in the average; the number is uniform from one to this. None takes all. 1 takes
        one repetition of each image at a time, as in MindEye.
    """

    kind: Literal["repetition_averaging"] = "repetition_averaging"
    max_repetitions: int | None = Field(default=None, ge=1)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"max_repetitions"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"min_repetitions": 1}

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the trials as they are: averages are drawn where batches are planned."""
        return data


class SubjectMixingConfig(ChanceAugmentation):
    """Mix each trial with that of another subject who saw the same image (SubjectMix).

    The image stays the target. The share of the trial itself is drawn from Beta(beta, beta), and the larger part is
    its own, which keeps its subject. Both trials of a pair are units of the epoch, so that no mixture is rarer for it.
    Halves of the repetitions, which some objectives compare, are not mixed, and images that one subject saw alone stay
    as they are.

    Parameters
    ----------
    beta
        0.5 in ViktorHug0/Neurobridge_ssl@7898cf6.
    probability
        Probability of each trial to be mixed; 1 in that code.
    """

    kind: Literal["subject_mixing"] = "subject_mixing"
    beta: float = Field(default=0.5, gt=0)
    probability: Probability = 1.0

    def apply(self, data: Tensor, generator: Generator, signal: Signal) -> Tensor:
        """Return the trials as they are: partners are drawn where batches are planned."""
        return data

    def draw_shares(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Return the share of each of `n` trials in its mixture, float32 from 0.5 to 1."""
        share = rng.beta(self.beta, self.beta, size=n)
        share = np.maximum(share, 1 - share)
        return np.where(rng.random(n) < self.probability, share, 1.0).astype(np.float32)


def mix_trials(
    data: Tensor, subject: Tensor, config: TrialMixingConfig | None, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix trials with partners of the same batch and subject.

    Parameters
    ----------
    data : tensor of shape (n_trials, ...)
    subject : integer tensor of shape (n_trials,)
        Whose trials they are.
    config
        None mixes nothing.
    generator
        Draws who is mixed, with whom and how much.

    Returns
    -------
    data : tensor of shape (n_trials, ...)
        ``weight * own + (1 - weight) * partner``.
    partner : integer tensor of shape (n_trials,)
        The trial itself where nothing was mixed.
    weight : tensor of shape (n_trials,)
        Share of the trial itself, 1 where nothing was mixed.
    """
    import torch

    n = len(data)
    own = torch.arange(n, device=data.device)
    one = torch.ones(n, device=data.device, dtype=data.dtype)
    if config is None:
        return data, own, one
    # A permutation, so that no trial is a partner twice or dominates the batch; sorted by subject on both sides, it
    # keeps to each subject's rows.
    drawn = torch.randperm(n, generator=generator, device=data.device)
    partner = torch.empty_like(drawn)
    partner[subject.argsort(stable=True)] = drawn[subject[drawn].argsort(stable=True)]
    chosen = (_draw((n,), generator) < _MIXED) & (partner != own)
    # drawn for all, used where chosen
    weight = torch.where(chosen, _draw_beta(0.15, n, generator).to(data.dtype), one)
    # Of itself where nothing was mixed, which is what the objective reads as a plain target.
    partner = torch.where(chosen, partner, own)
    scale = weight.reshape(-1, *[1] * (data.ndim - 1))
    return data * scale + data[partner] * (1 - scale), partner, weight


def _draw(shape: Any, generator: Generator) -> Tensor:
    import torch

    return torch.rand(shape, generator=generator, device=generator.device)


def _draw_beta(beta: float, n: int, generator: Generator) -> Tensor:
    # Two gammas give a beta; torch's own sampler takes no generator in public, so numpy draws from a seed of ours.
    import torch

    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    values = np.random.default_rng(seed).beta(beta, beta, size=n)
    return torch.from_numpy(values.astype(np.float32)).to(generator.device)


def _require_time(signal: Signal, kind: str) -> None:
    if not signal.dims or signal.dims[-1] != "time":
        raise ConfigError(
            f"the augmentation {kind} needs a time axis, but the responses have {', '.join(signal.dims)}; remove it."
        )


def _require_sfreq(signal: Signal, kind: str) -> float:
    _require_time(signal, kind)
    found = find_sfreq(signal)
    if found is None:
        raise ConfigError(
            f"the augmentation {kind} needs the sampling rate, which the responses do not give."
        )
    return found


def find_sfreq(signal: Signal) -> float | None:
    """Return the sampling rate of trials in Hz; None if they do not have it."""
    if signal.sfreq is not None or signal.times is None or len(signal.times) < 2:
        return signal.sfreq
    return float((len(signal.times) - 1) / (signal.times[-1] - signal.times[0]))
