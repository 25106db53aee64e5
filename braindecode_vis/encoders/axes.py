"""What networks of channels x times ask of a signal before they are built: its two axes, and enough samples.

Light (no torch), so that configuration files may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from braindecode_vis.checks import DataError
from braindecode_vis.encoders.signal import Signal


def read_axes(signal: Signal, network: str) -> tuple[int, int]:
    """Return the numbers of channels and of samples.

    Raises
    ------
    DataError
        If the trials are not channels x times.
    """
    n_channels, n_times = signal.size_of("channel"), signal.size_of("time")
    if signal.dims != ("channel", "time"):
        raise DataError(f"{network} reads trials of channel x time, but these are {' x '.join(signal.dims)}.")
    return n_channels, n_times


def count_windows(signal: Signal, network: str, windows_of: Callable[[int], int]) -> int:
    """Return how many windows of time the network's last feature map has.

    Parameters
    ----------
    signal
        Has a time axis.
    network
        Name in the message.
    windows_of
        Number of windows as a function of the number of samples; below 1 where there are too few.

    Raises
    ------
    DataError
        If there is not a single window; the message says how many samples there must be.
    """
    n_times = signal.size_of("time")
    n_windows = windows_of(n_times)
    if n_windows >= 1:
        return n_windows
    needed = next(n for n in count(n_times + 1) if windows_of(n) >= 1)
    rate = f" ({needed / signal.sfreq:.3g} s at {signal.sfreq:g} Hz)" if signal.sfreq else ""
    raise DataError(
        f"{network} needs trials of at least {needed} samples{rate}, but these have {n_times}; preprocess longer "
        "epochs, shorten its kernels and pools, or choose another encoder.network.kind."
    )


def scale_length(length: int, signal: Signal, network: str, published_sfreq: float) -> int:
    """Return a length in samples at `published_sfreq` as the nearest length at the signal's rate, at least 1.

    Raises
    ------
    DataError
        If the signal does not know its rate.
    """
    if signal.sfreq is None:
        raise DataError(
            f"{network} scales its kernels to the sampling rate, but the responses name none; "
            "set encoder.network.scale_to_sfreq to false."
        )
    return max(1, round(length * signal.sfreq / published_sfreq))
