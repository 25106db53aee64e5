"""Detects problems in the samples of a stream: another unit, another gain, two swapped channels.

Compares the first epochs with the training trials of the run. Only the unit is changed, and this is reported.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.live.stream_channels import find_swapped
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics

#: A ratio of amplitudes within this many decades of a power of a thousand is another unit; else it is a gain.
UNIT_DECADES = 1.2
#: Epochs after which the channels are compared with those of the run.
EPOCHS_LOOKED_AT = 20
_TRIALS = 64


def estimate_covariance(
    learnt: LearntStatistics, responses: Responses, rows: np.ndarray, group: tuple[str, str]
) -> np.ndarray | None:
    """Return how the channels of a run varied together in its training trials, in the unit of its recordings.

    Parameters
    ----------
    learnt
        What its preprocessing has learnt: with whitening, the mean covariance of the noise is taken back from it.
    responses, rows
        Its trials, and which of them are training trials.
    group
        Subject and session whose scaling is undone.

    Returns
    -------
    array of shape (n_channels, n_channels), or None if a channel is constant
    """
    if learnt.whitening:
        matrices = [np.asarray(m, dtype=np.float64) for m in learnt.whitening.values()]
        return np.asarray(np.mean([np.linalg.inv(m @ m) for m in matrices], axis=0))
    picked = np.sort(np.random.default_rng(0).permutation(rows)[:_TRIALS])
    block = np.asarray(responses.data[picked], dtype=np.float64)
    if learnt.scaling:
        scaler = learnt.for_session(*group).scaling[group]
        block = block * scaler.scale[:, None] + scaler.centre[:, None]
    block = block - block.mean(axis=2, keepdims=True)
    covariance = np.einsum("nct,ndt->cd", block, block) / (len(block) * block.shape[2])
    return covariance if (np.diag(covariance) > 0).all() else None


class SignalWatch:
    """Looks at the first epochs of a stream.

    Parameters
    ----------
    own : array of shape (n_channels, n_channels) or None
        From `estimate_covariance`; None looks at nothing.
    ch_names
        Of its rows.
    stream
        Name of the stream, for messages.
    unit
        What was said of its unit; empty if nothing was, so that the unit may be found by amplitude.
    looks_for_swaps
        Whether channels are compared one by one.

    Attributes
    ----------
    gain : float
        What the samples are multiplied by, 1 unless another unit was found.
    """

    def __init__(
        self,
        own: np.ndarray | None,
        ch_names: tuple[str, ...],
        stream: str,
        unit: str,
        *,
        looks_for_swaps: bool = True,
    ) -> None:
        self._own, self._names, self._stream, self._unit = own, ch_names, stream, unit
        self._swaps, self._n, self.gain = looks_for_swaps, 0, 1.0
        self._sum = np.zeros((len(ch_names),) * 2)

    def look(self, raw: np.ndarray) -> Iterator[str]:
        """Look at an epoch of shape (n_channels, n_times), in the unit of the stream, and yield what is to be reported.

        Raises
        ------
        DataError
            If the unit that was stated cannot be true.
        """
        if self._own is None or self._n >= EPOCHS_LOOKED_AT:
            return
        self._n += 1
        centred = raw.astype(np.float64) - raw.mean(axis=1, keepdims=True, dtype=np.float64)
        self._sum += centred @ centred.T / centred.shape[1]
        if self._n == 1:
            yield from self._compare_amplitude()
        if self._n == EPOCHS_LOOKED_AT and self._swaps:
            for a, b in find_swapped(self._sum, self._own):
                yield (
                    f"The channels {self._names[a]} and {self._names[b]} look swapped: each correlates "
                    "with the other channels as the other one did in the run."
                )

    def _compare_amplitude(self) -> Iterator[str]:
        assert self._own is not None
        found, own = (float(np.median(np.sqrt(np.diag(c)))) for c in (self._sum, self._own))
        decades = float(np.log10(max(found, 1e-300) / own))
        steps = 3 * round(decades / 3)
        if not found:
            yield "All channels are flat: check the amplifier."
        elif steps and abs(decades - steps) < UNIT_DECADES:
            if self._unit:
                raise DataError(
                    f"the stream {self._stream} states the unit {self._unit}, but its samples are about "
                    f"10^{steps} times those of the run; give the true unit with --unit (V, mV or uV)."
                )
            self.gain = 10.0**-steps
            yield (
                f"The samples are about 10^{steps} times those of the run: they were treated as another unit and "
                f"multiplied by {self.gain:g}; give the true unit with --unit."
            )
        elif abs(decades) > UNIT_DECADES:
            yield (
                f"The samples vary {10**decades:.3g} times as much as those of the run: check the gain "
                "of the amplifier and the electrodes."
            )
