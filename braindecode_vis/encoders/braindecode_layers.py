"""The wrapper that gives a braindecode network the interface of the others; see `braindecode_models`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from braindecode_vis.checks import ConfigError
from braindecode_vis.encoders.signal import Signal


class BraindecodeNetwork(nn.Module):
    """A braindecode network that answers each trial with one vector.

    Parameters
    ----------
    model
        Built for this signal.
    name
        Its class name, for messages.
    signal
        Trials of channel x time.
    n_outputs
        Size of the output.

    Raises
    ------
    ConfigError
        If a trial of zeros is not answered by one vector of `n_outputs`.
    """

    def __init__(self, model: nn.Module, name: str, signal: Signal, n_outputs: int) -> None:
        super().__init__()
        self.model = model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                answer = model(torch.zeros(2, *signal.shape))
        except Exception as error:  # whatever a network raises for sizes that do not fit
            raise ConfigError(
                f"braindecode's {name} was built, but fails on a trial of {signal.shape[0]} channels x "
                f"{signal.shape[1]} samples: {error}"
            ) from error
        model.train(was_training)
        if not isinstance(answer, Tensor) or answer.shape != (2, n_outputs):
            found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ConfigError(
                f"braindecode's {name} must answer 2 trials with an array of shape (2, {n_outputs}), but gives "
                f"{found}; choose a network that pools over time, or set it up so in encoder.network.settings."
            )

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map trials (batch, n_channels, n_times) to (batch, n_outputs); the subject plays no part."""
        return self.model(data)
