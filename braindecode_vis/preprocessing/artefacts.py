"""Optional removal of artefacts: independent components of the eyes, and autoreject.

Both learn only from the training trials of a session and are then applied to all its trials. Both are linear in the
samples: a matrix for the components, and one interpolation matrix for each set of bad channels.

References
----------
.. [1] Jas et al. (2017), Autoreject, NeuroImage 159, 417-429. doi:10.1016/j.neuroimage.2017.06.030
.. [2] Hyvärinen (1999), FastICA, doi:10.1109/72.761722
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, DataError, require
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.datasets.sources.cleaning_options import AutorejectConfig, IcaConfig
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochPlan, Sensors
from braindecode_vis.datasets.sources.safe_pickle import open_npy
from braindecode_vis.preprocessing.cleaning import CleanedReader, filter_file, make_info, make_interpolation
from braindecode_vis.preprocessing.epochs import Piece, iterate_trials

EYES = ("Fp1", "Fpz", "Fp2", "AF7", "AF8")
_MAX_ITER = 500
_ICA_HIGH_PASS = 1.0  # Hz; slower drifts would take up components


# --- independent components -------------------------------------------------------------------------------


def remove_eye_components(
    session: Sequence[Piece], names: tuple[str, ...], plan: EpochPlan, scratch: Path
) -> list[Piece]:
    """Return the pieces of a session without the components that follow the eyes, and only the channels `names`.

    Parameters
    ----------
    session
        Cleaned pieces that hold all sensors.
    names
        Channels to keep.

    Raises
    ------
    ConfigError
        If no electrode near the eyes was recorded, or the method is not installed.
    DataError
        If the session has no training trial.
    """
    config = plan.cleaning.ica
    assert config is not None
    first = session[0].part
    assert isinstance(first, ContinuousPart)
    eyes = config.eyes or tuple(name for name in EYES if name in first.ch_names and name not in first.bads)
    if not eyes:
        raise ConfigError(
            f"{first.where} has none of {', '.join(EYES)}, with which components of the eyes are found; "
            "choose other channels with "
            "--set dataset.ica.eyes=[...], or leave dataset.ica out."
        )
    samples = _collect_training_samples(session, plan, scratch, config)
    sensors = first.sensors if first.sensors is not None else first.own_sensors
    assert sensors.ch_names == first.ch_names
    mixing, shift, found = fit_eye_projection(samples, sensors, eyes, config, first.where)
    rows = [first.ch_names.index(name) for name in names]
    kept = []
    for piece in session:
        part = piece.part
        assert isinstance(part, ContinuousPart)
        assert isinstance(part.read, CleanedReader)
        reader = replace(part.read, mixing=mixing[rows], shift=shift[rows])
        kept.append(
            replace(
                piece,
                part=replace(part, ch_names=names, read=reader),
                notes={**piece.notes, **found},
            )
        )
    return kept


def fit_eye_projection(
    samples: np.ndarray, sensors: Sensors, eyes: Sequence[str], config: IcaConfig, where: str
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Fit components and return the affine map that removes the components of the eyes.

    Parameters
    ----------
    samples : array of shape (n_channels, n_samples)
        Of training trials, high-passed, in V.
    eyes
        Electrodes whose signal correlates with components of the eyes.

    Returns
    -------
    mixing : array of shape (n_channels, n_channels)
    shift : array of shape (n_channels,)
        ``mixing @ x + shift`` is clean.
    found
        ``eye_components``, the number of removed components, of ``components``; and whether the fit ``converged``.
    """
    import mne

    if config.method == "picard":
        require("picard", "dataset.ica.method picard", otherwise="use fastica")
    # An average reference or an interpolated channel costs a dimension; more components than that would be noise.
    rank = int(np.linalg.matrix_rank(np.cov(samples)))
    n_components = min(config.n_components or rank - 1, rank)
    ica = mne.preprocessing.ICA(
        n_components=n_components, method=config.method, random_state=derive_seed(0, "ica") % 2**31, max_iter=_MAX_ITER,
        verbose="error",
    )  # fmt: skip
    # The rate does not enter the fit: samples are not neighbours in time any more.
    info = make_info(sensors, where, "eeg", 1000.0)
    raw = mne.io.RawArray(samples, info, verbose="error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it converged is kept with the result
        ica.fit(raw, verbose="error")
    sources = ica.get_sources(raw).get_data()
    signals = samples[[sensors.ch_names.index(name) for name in eyes]]
    n = len(sources)
    correlation = np.abs(np.corrcoef(sources, signals)[:n, n:]).max(axis=1)  # (n_components,)
    ica.exclude = np.flatnonzero(correlation >= config.threshold).tolist()
    # An affine map is known by what it makes of zero and of the unit vectors.
    n_channels = len(sensors.ch_names)
    probe = mne.io.RawArray(np.hstack([np.zeros((n_channels, 1)), np.eye(n_channels)]), info, verbose="error")
    image = ica.apply(probe, verbose="error").get_data() if ica.exclude else probe.get_data()
    shift = image[:, 0]
    found = {
        "eye_components": len(ica.exclude), "components": n, "converged": bool(ica.n_iter_ < _MAX_ITER)
    }  # fmt: skip
    return image[:, 1:] - shift[:, None], shift, found


def _collect_training_samples(
    session: Sequence[Piece], plan: EpochPlan, scratch: Path, config: IcaConfig
) -> np.ndarray:
    """Return high-passed samples that lie in a training trial and in no test trial."""
    needs_filter = plan.cleaning.l_freq is None or plan.cleaning.l_freq < _ICA_HIGH_PASS
    marks = [_mark_training_samples(piece, plan) for piece in session]
    total = sum(int(mark.sum()) for mark in marks)
    if not total:
        raise DataError(
            f"{session[0].part.where} has no training trial to fit dataset.ica; leave dataset.ica out."
        )
    step = -(-total // config.max_samples)  # rounded up, so that the bound holds
    collected = []
    for piece, mark in zip(session, marks, strict=True):
        part = piece.part
        assert isinstance(part, ContinuousPart)
        assert isinstance(part.read, CleanedReader)
        picked = np.flatnonzero(mark)[::step]
        path = scratch / "ica.npy"
        data = part.read.data
        if needs_filter:
            edges = np.unique(np.r_[piece.bounds[:, 0], piece.bounds[:, 1]])
            filter_file(
                data.path,
                piece,
                edges[(edges > 0) & (edges < part.n_samples)],
                (),
                _ICA_HIGH_PASS,
                None,
                path,
            )
            data = open_npy(path)
        # Channel by channel, since the file holds one row a channel and is too large to read whole.
        for row in range(len(part.ch_names)):
            whole = data.read_columns(np.array([row]), 0, part.n_samples)[0]
            if row == 0:
                block = np.empty((len(part.ch_names), len(picked)))
            block[row] = whole[picked]
        collected.append(block)
        path.unlink(missing_ok=True)
    return np.concatenate(collected, axis=1)


def _mark_training_samples(piece: Piece, plan: EpochPlan) -> np.ndarray:
    part = piece.part
    assert isinstance(part, ContinuousPart)
    # Epochs overlap in rapid presentation: a sample that a test trial uses, too, must not be learned from.
    marks = {True: np.zeros(part.n_samples, dtype=bool), False: np.zeros(part.n_samples, dtype=bool)}
    first, last = round(plan.tmin * part.sfreq), round(plan.tmax * part.sfreq)
    is_train = piece.trials["split"].to_numpy() == "train"
    for trains, sample in zip(is_train.tolist(), piece.trials["sample"].tolist(), strict=True):
        marks[trains][max(0, sample + first) : sample + last] = True
    return marks[True] & ~marks[False]


# --- autoreject -------------------------------------------------------------------------------------------


@dataclass
class Repair:
    """Replaces bad channels of single trials by interpolation.

    Parameters
    ----------
    labels : boolean array of shape (n_trials, n_channels)
        Channels to replace in each trial.
    make
        Gives the interpolation matrix of a set of channels.
    """

    labels: np.ndarray
    make: Callable[[tuple[int, ...]], np.ndarray]
    matrices: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def __call__(self, start: int, block: np.ndarray) -> np.ndarray:
        """Return the repaired trials, float32 of shape (n, n_channels, n_times)."""
        for row, bad in enumerate(self.labels[start : start + len(block)]):
            if bad.any():
                key = tuple(np.flatnonzero(bad).tolist())
                if key not in self.matrices:
                    self.matrices[key] = self.make(key)[list(key)].astype(np.float32)
                block[row, list(key)] = self.matrices[key] @ block[row]
        return block


def reject_trials(session: Sequence[Piece], plan: EpochPlan) -> tuple[list[Piece], list[np.ndarray]]:
    """Return the pieces of a session with repaired bad channels of single trials, and which trials are bad.

    Returns
    -------
    pieces
        With all trials; `leave_out` takes the bad ones away.
    bad : list of bool arrays of shape (n_trials,)
        Of each piece.

    Raises
    ------
    ConfigError
        If autoreject is not installed.
    DataError
        If there are too few training trials, or too many are bad.
    """
    config = plan.cleaning.autoreject
    assert config is not None
    fitted, info = fit_autoreject(session, plan, config)
    repaired, drops = [], []
    n_all = sum(len(piece.trials) for piece in session)
    for piece in session:
        part = piece.part
        assert isinstance(part, ContinuousPart)
        bad, labels = [], []
        for block in iterate_trials(piece, plan):
            log = fitted.get_reject_log(_make_epochs(block, info))
            bad.append(log.bad_epochs)
            labels.append(log.labels == 2)  # 0 good, 1 bad and kept, 2 bad and interpolated
        drop = np.concatenate(bad) if bad else np.zeros(0, dtype=bool)
        if config.reject == "train":
            drop &= piece.trials["split"].to_numpy() == "train"
        elif config.reject == "none":
            drop[:] = False
        sensors = Sensors(part.ch_names, part.read, _find_places(part))

        def make(bad: tuple[int, ...], sensors: Sensors = sensors, where: str = part.where) -> np.ndarray:
            return make_interpolation(sensors, [sensors.ch_names[row] for row in bad], where, "eeg")

        drops.append(drop)
        repair = Repair(np.concatenate(labels)[~drop], make) if labels else None
        repaired.append(replace(piece, repair=repair))
    n_bad = sum(int(drop.sum()) for drop in drops)
    if n_bad > config.max_rejected * n_all:
        raise DataError(
            f"{session[0].part.where}: autoreject leaves out {n_bad} of {n_all} trials of this session, above "
            f"dataset.autoreject.max_rejected {config.max_rejected:.0%}; look at the electrodes, or raise it."
        )
    return repaired, drops


def leave_out(session: Sequence[Piece], drops: Sequence[np.ndarray]) -> tuple[list[Piece], pd.DataFrame]:
    """Remove the bad trials of a session, and pieces that have no other trials.

    Parameters
    ----------
    session
        Its pieces; a `repair` is of the trials that stay.
    drops : sequence of bool arrays of shape (n_trials,)
        Bad trials of each piece.

    Returns
    -------
    pieces
    rejected : DataFrame
        Trials that were left out, with a `reason` and their `file`.
    """
    kept, rejected = [], [session[0].trials.iloc[:0].assign(reason="", file="")]
    for piece, drop in zip(session, drops, strict=True):
        assert isinstance(piece.part, ContinuousPart)
        name = piece.part.recording.files[0].name
        rejected.append(piece.trials[drop].assign(reason="rejected by autoreject", file=name))
        trials = piece.trials[~drop].reset_index(drop=True)
        kept.append(replace(piece, trials=trials, bounds=piece.bounds[~drop]))
    return [piece for piece in kept if len(piece.trials)], pd.concat(rejected, ignore_index=True)


def fit_autoreject(session: Sequence[Piece], plan: EpochPlan, config: AutorejectConfig) -> tuple[Any, Any]:
    """Learn thresholds from training trials, and return the fitted object and the `mne.Info` of its epochs."""
    autoreject = require("autoreject", "dataset.autoreject", otherwise="leave it out")
    first = session[0].part
    assert isinstance(first, ContinuousPart)
    n_train = sum(int((piece.trials["split"] == "train").sum()) for piece in session)
    if n_train < 2 * config.n_folds:
        raise DataError(
            f"{first.where}: autoreject learns from at least {2 * config.n_folds} training trials of a session, but "
            f"there are {n_train}; leave dataset.autoreject out."
        )
    # Evenly spaced over the session, since electrodes change while it lasts.
    picked = set(np.unique(np.linspace(0, n_train - 1, min(n_train, config.max_trials)).astype(int)).tolist())
    taken, seen = [], 0
    for piece in session:
        is_train = piece.trials["split"].to_numpy() == "train"
        done = 0
        for block in iterate_trials(piece, plan):
            training = np.flatnonzero(is_train[done : done + len(block)])
            wanted = [row for n, row in enumerate(training.tolist()) if seen + n in picked]
            taken.append(block[wanted])
            seen += len(training)
            done += len(block)
    info = make_info(Sensors(first.ch_names, first.read, _find_places(first)), first.where, "eeg", plan.sfreq)
    # Splines need some good electrodes to lean on.
    counts = [n for n in config.n_interpolate if n <= len(first.ch_names) - 3]
    if not counts:
        raise ConfigError(
            f"dataset.autoreject needs four channels or more, and there are {len(first.ch_names)}; leave it out."
        )
    fitted = autoreject.AutoReject(
        n_interpolate=counts, consensus=list(config.consensus), cv=config.n_folds, thresh_method="random_search",
        random_state=derive_seed(0, "autoreject") % 2**31, n_jobs=1, verbose=False,
    )  # fmt: skip
    return fitted.fit(_make_epochs(np.concatenate(taken), info)), info


def _make_epochs(block: np.ndarray, info: Any) -> Any:
    import mne

    return mne.EpochsArray(block.astype(np.float64), info, verbose="error")


def _find_places(part: ContinuousPart) -> np.ndarray | None:
    """Return positions of the stored channels, if the file gives those of all sensors."""
    if part.sensors is None or part.sensors.ch_pos is None:
        return None
    return part.sensors.ch_pos[[part.sensors.ch_names.index(name) for name in part.ch_names]]
