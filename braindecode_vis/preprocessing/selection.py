"""Chooses the trials and features for a brain encoder: repetitions averaged or not, features by name or by score.

Trials are selected, and repetitions of an image averaged, without copying data that do not fit in memory.

For features, this module has the settings of the choice, its fit on training trials, and the fitted choice, which is
kept beside the encoder and applied to all trials of the encoder. The steps have this order: names of regions, networks
or channels; then reliability of the remaining features; then encoding score of the remaining features. Only the trials
passed to `fit_selection` are used, so a fold that passes its training trials cannot leak test trials.

If subjects have different voxels (rows padded with zeros), the choice is made for each subject, with the same number or
threshold. If features are common to all subjects, the scores of the subjects are averaged, so that a difference between
subjects is not counted as signal. With a time axis, a feature's score is its mean over times (a choice of this
package).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Embeddings, Responses, TrialRows, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.preprocessing.reliability import (
    compute_encoding_scores,
    compute_ncsnr,
    compute_split_half,
)
from braindecode_vis.preprocessing.voxel_geometry import (
    find_networks,
    find_rois,
    select_features,
    select_own_features,
)

#: Picked trials of more bytes than this stay in their file, and averages of more than this are taken when asked for.
MAX_COPIED_BYTES = 64 << 20
MAX_AVERAGED_BYTES = 1 << 30
_FILE = "selection"
_ALL = ""  # key of a choice that is common to all subjects


class NamesConfig(Settings):
    """Features chosen by name.

    Parameters
    ----------
    include
        Names to keep; empty keeps all.
    exclude
        Names to leave out, even if they are in `include`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether no names are given."""
        return not self.include and not self.exclude


class BestConfig(Settings):
    """How many of the best features are kept, or above which score; only one of the two."""

    n_best: int | None = Field(default=None, ge=1)
    threshold: float | None = None

    @model_validator(mode="after")
    def _check_one(self) -> BestConfig:
        if (self.n_best is None) == (self.threshold is None):
            raise ValueError("a choice of features needs either n_best or threshold")
        return self


class ReliabilityConfig(BestConfig):
    """Features with similar responses to repetitions of the same image.

    Parameters
    ----------
    measure
        ``ncsnr``: standard deviation of signal over noise (Allen et al. 2022). ``split_half``: correlation of the
        means of two random halves of the repetitions, averaged over 20 of them. Both need images that the training
        trials repeat.
    n_best, threshold
        How many features to keep, or above which value.
    """

    measure: Literal["ncsnr", "split_half"] = "ncsnr"

    removed_settings: ClassVar[Mapping[str, Any]] = {"n_splits": 20}


class EncodingSelectionConfig(BestConfig):
    """Features that image features predict, by ridge regression cross-validated over the training images.

    The best of five penalties by mean score over five folds of images is used.

    Parameters
    ----------
    n_best, threshold
        How many features to keep, or above which correlation.
    """

    removed_settings: ClassVar[Mapping[str, Any]] = {"alphas": [1e1, 1e2, 1e3, 1e4, 1e5], "n_folds": 5}


class SelectionConfig(Settings):
    """Which features the encoder gets; by default all.

    Parameters
    ----------
    rois
        Regions of voxels: names of a set (``nsdgeneral``) or of one of its regions (``streams:ventral``).
    networks
        Networks of parcels, as Schaefer's atlas names them (``Vis``, ``Default``).
    ch_names
        Channels of EEG and MEG.
    reliability, encoding
        Choice by scores on training trials; see these settings.
    """

    rois: NamesConfig = NamesConfig()
    networks: NamesConfig = NamesConfig()
    ch_names: NamesConfig = NamesConfig()
    reliability: ReliabilityConfig | None = None
    encoding: EncodingSelectionConfig | None = None

    @property
    def is_empty(self) -> bool:
        """Whether every feature is kept."""
        named = self.rois.is_empty and self.networks.is_empty and self.ch_names.is_empty
        return named and self.reliability is None and self.encoding is None


@dataclass(frozen=True)
class Selection:
    """A fitted choice of features.

    Parameters
    ----------
    dim
        Name of the axis: ``voxel``, ``parcel`` or ``channel``.
    keep
        Bool array of shape (n_features,) under an empty key, or one for the voxels of each subject.
    steps
        Number of features after each step, for the report.
    """

    dim: str
    keep: Mapping[str, np.ndarray]
    steps: tuple[Mapping[str, Any], ...] = ()

    def apply(self, responses: Responses) -> Responses:
        """Return the chosen features of any trials of the same data set, with their geometry.

        Raises
        ------
        DataError
            If the features differ from those of the fit, or a subject has no choice.
        """
        if responses.dims[1] != self.dim:
            raise DataError(f"features of the axis {self.dim} were chosen, not of {responses.dims[1]}.")
        if _ALL in self.keep:
            return select_features(responses, self.keep[_ALL])
        return select_own_features(responses, self.keep)

    def write(self, folder: Path) -> None:
        """Write ``selection.safetensors`` and ``selection.json`` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"keep_{name}": np.ascontiguousarray(chosen) for name, chosen in self.keep.items()}
        write_tensors(folder / f"{_FILE}.safetensors", arrays)
        record = {"dim": self.dim, "subjects": list(self.keep), "steps": [dict(step) for step in self.steps]}
        write_json(folder / f"{_FILE}.json", record)

    @classmethod
    def read(cls, folder: Path) -> Selection:
        """Return what `write` wrote."""
        record = read_json(folder / f"{_FILE}.json")
        arrays = load_tensors(folder / f"{_FILE}.safetensors")
        keep = {name: arrays[f"keep_{name}"] for name in record["subjects"]}
        return cls(record["dim"], keep, tuple(record["steps"]))


def fit_selection(
    config: SelectionConfig, responses: Responses, targets: Embeddings | None = None, *, seed: int = 0
) -> Selection:
    """Choose features by training trials.

    Parameters
    ----------
    config
        Settings of the choice.
    responses
        Training trials of the fold, and nothing else; repetitions single if `config.reliability` is set.
    targets
        Embeddings of their images, one row per image or per trial; for `config.encoding` only.
    seed
        Of the random halves and the folds.

    Raises
    ------
    ConfigError
        If a name does not exist, targets are missing, or more features are requested than there are.
    DataError
        If a score cannot be computed, or nothing is left.
    """
    if len(responses.dims) < 2 or responses.dims[1] not in ("voxel", "parcel", "channel"):
        raise DataError(f"only voxels, parcels or channels can be chosen, not {responses.dims}.")
    # Padded rows: every subject has voxels of its own, and so a choice of its own.
    counts = count_own_voxels(responses)
    subjects = list(dict.fromkeys(responses.trials["subject"].astype(str)))
    by_subject = {name: _pick_subject(responses, name, counts.get(name)) for name in subjects}
    keep = {
        name: _find_named(config, responses, name if counts else None, counts.get(name))
        for name in (subjects if counts else [_ALL])
    }
    steps = [_describe("names", keep)]
    if (reliable := config.reliability) is not None:
        scores = {}
        for name, own in by_subject.items():
            if reliable.measure == "ncsnr":
                values = compute_ncsnr(own).ncsnr
            else:
                values = compute_split_half(own, seed=seed).correlation
            scores[name] = _mean_over_times(values, own)
        keep, step = _keep_best(scores, keep, reliable, f"reliability ({reliable.measure})")
        steps.append(step)
    if (encoding := config.encoding) is not None:
        if targets is None:
            raise ConfigError("a choice by encoding score needs the embeddings of the training images.")
        # One row per image: `targets` may repeat an image for each of its trials.
        _, first = np.unique(targets.ids.astype(str), return_index=True)
        unique = replace(targets, vectors=targets.vectors[first], ids=targets.ids[first])
        scores = {}
        for name, own in by_subject.items():
            values = compute_encoding_scores(own, unique, seed=seed)
            scores[name] = _mean_over_times(values, own)
        keep, step = _keep_best(scores, keep, encoding, "encoding score")
        steps.append(step)
    return Selection(responses.dims[1], keep, tuple(steps))


# --- names ------------------------------------------------------------------------------------------------


def _find_named(
    config: SelectionConfig, responses: Responses, subject: str | None, n_own: int | None
) -> np.ndarray:
    """Return the features selected by regions, networks and channel names, shape (n_features,)."""
    keep = np.ones(n_own or responses.data.shape[1], bool)
    if not config.rois.is_empty:
        _require(responses, "voxel", "selection.rois")
        keep &= _choose(
            config.rois, keep, lambda names: find_rois(responses, _parse_rois(names), subject=subject)
        )
    if not config.networks.is_empty:
        _require(responses, "parcel", "selection.networks")
        keep &= _choose(config.networks, keep, lambda names: find_networks(responses, names))
    if not config.ch_names.is_empty:
        _require(responses, "channel", "selection.ch_names")
        known = [str(name) for name in responses.coords.get("ch_names", ())]
        for name in (*config.ch_names.include, *config.ch_names.exclude):
            check_option("the channel in selection.ch_names", name, known)
        keep &= _choose(config.ch_names, keep, lambda names: np.isin(known, list(names)))
    if not keep.any():
        of = "" if subject is None else f" of subject {subject}"
        raise DataError(f"with the names in selection, no {responses.dims[1]}{of} is left.")
    return keep


def _choose(
    names: NamesConfig, everything: np.ndarray, find: Callable[[Sequence[str]], np.ndarray]
) -> np.ndarray:
    inside = find(names.include) if names.include else everything
    return inside & ~find(names.exclude) if names.exclude else inside


def _require(responses: Responses, dim: str, what: str) -> None:
    if responses.dims[1] != dim:
        raise ConfigError(f"{what} chooses {dim}s, but these responses have {responses.dims[1]}s.")


def _parse_rois(names: Sequence[str]) -> dict[str, list[str] | None]:
    """Return sets and their regions of ``set`` and ``set:region``; a whole set wins over its regions."""
    wanted: dict[str, list[str] | None] = {}
    for name in names:
        whole, _, region = name.partition(":")
        if not region:
            wanted[whole] = None
        elif (regions := wanted.setdefault(whole, [])) is not None:
            regions.append(region)
    return wanted


# --- the best -------------------------------------------------------------------------------------------


def _keep_best(
    scores: Mapping[str, np.ndarray], keep: Mapping[str, np.ndarray], config: BestConfig, what: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Narrow each choice to its best features; common features are judged by the mean over subjects."""
    if _ALL in keep:
        # Subjects count alike, whatever their number of trials.
        scores = {_ALL: np.mean(list(scores.values()), axis=0)}
    narrowed = {}
    for name, chosen in keep.items():
        values = np.where(chosen, scores[name], -np.inf)  # what an earlier step left out never comes back
        of = f" of subject {name}" if name else ""
        if config.threshold is not None:
            best = values > config.threshold
            if not best.any():
                raise DataError(
                    f"no feature{of} has a {what} above {config.threshold:g}; the best one reaches {values.max():.3g}."
                )
        else:
            assert config.n_best is not None
            if config.n_best > chosen.sum():
                raise ConfigError(
                    f"selection asks for the {config.n_best} features of the best {what}, but only "
                    f"{int(chosen.sum())}{of} are left."
                )
            best = np.zeros(len(values), bool)
            best[np.argsort(-values, kind="stable")[: config.n_best]] = True  # the first one of equal scores
        narrowed[name] = best
    lowest = min(float(scores[name][best].min()) for name, best in narrowed.items())
    return narrowed, {**_describe(what, narrowed), "lowest": lowest}


def _describe(step: str, keep: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {"step": step, "kept": {name or "all": int(chosen.sum()) for name, chosen in keep.items()}}


def _pick_subject(responses: Responses, subject: str, n_own: int | None) -> Responses:
    """Return the trials of one subject as a matrix of its own features (with a time axis, of features times times).

    Parameters
    ----------
    n_own
        Its number of features where rows are padded; None takes all.
    """
    rows = np.flatnonzero(responses.trials["subject"].astype(str).to_numpy() == subject)
    data = responses.data if len(rows) == responses.n_trials else responses.data[rows]
    data = data[:, :n_own].reshape(len(rows), -1)
    trials = responses.trials.iloc[rows].reset_index(drop=True)
    n_times = int(np.prod(responses.data.shape[2:]))
    return Responses.from_checked(data, ("trial", "voxel"), trials, responses.unit, {"n_times": n_times})


def _mean_over_times(scores: np.ndarray, own: Responses) -> np.ndarray:
    return scores.reshape(-1, int(own.coords["n_times"])).mean(axis=1)


# --- picking trials and averaging repetitions --------------------------------------------------------------


def pick_rows(responses: Responses, rows: np.ndarray) -> Responses:
    """Return the given trials, in this order, unchanged.

    Many trials in a file are not copied: neighbouring ones become a slice of the memory map, others become `TrialRows`.

    Parameters
    ----------
    responses
        Trials, possibly memory-mapped.
    rows : int array
        Row numbers.
    """
    rows = np.asarray(rows)
    n_bytes = len(rows) * (responses.data.nbytes // max(1, len(responses.data)))
    if not _lies_in_file(responses.data) or n_bytes <= MAX_COPIED_BYTES:
        return responses.select(rows)
    data: Any
    if isinstance(responses.data, TrialRows):
        data = _take(responses.data, rows)
    elif (np.diff(rows) == 1).all():
        data = responses.data[rows[0] : rows[-1] + 1]
    else:
        data = TrialRows(responses.data, rows)
    trials = responses.trials.iloc[rows].reset_index(drop=True)
    return Responses.from_checked(data, responses.dims, trials, responses.unit, responses.coords)


def average_repetitions(responses: Responses, rows: np.ndarray | None = None) -> Responses:
    """Average the trials of each subject and stimulus, in order of first appearance.

    If the trial table has a column `task`, seen and imagined trials are not averaged together. Trials are read group by
    group, so only the averages are held in memory; if they would need more than 1 GiB, they are `TrialRows`, which are
    averaged when they are read.

    Parameters
    ----------
    responses
        Trials, possibly memory-mapped.
    rows : int array, optional
        The trials that take part; all by default.

    Returns
    -------
    Responses
        One float32 trial per subject and stimulus (and task); `repetition` becomes the number of trials averaged, and
        the column `n_averaged` holds how many repetitions were averaged. Nothing changes if no image is repeated.
    """
    rows = np.arange(responses.n_trials) if rows is None else np.asarray(rows)
    trials = responses.trials.iloc[rows]
    keys = ["subject", "stimulus_id", *(["task"] if "task" in trials else [])]
    groups = trials.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    # Nothing is repeated, so nothing is copied.
    if n_groups == len(groups):
        return pick_rows(responses, rows)
    # Trials of a group lie together in `order`, in the order of the file: starts[g] is where group g begins.
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(n_groups))
    counts = np.diff(np.append(starts, len(groups)))
    averaged = trials.iloc[order[starts]].reset_index(drop=True)
    averaged["repetition"] = counts
    behind = responses.n_averaged[rows][order]
    averaged["n_averaged"] = np.add.reduceat(behind, starts).astype(int)
    source: Any = responses.data
    if isinstance(source, TrialRows) and source.starts is None:  # one step from the file, not two
        source, rows = source.data, source.rows[rows]
    lazy: Any = TrialRows(source, rows[order], starts)
    if lazy.nbytes > MAX_AVERAGED_BYTES and _lies_in_file(responses.data):
        return Responses.from_checked(lazy, responses.dims, averaged, responses.unit, responses.coords)
    return replace(responses, data=np.asarray(lazy), trials=averaged)


def _take(data: TrialRows, numbers: np.ndarray) -> TrialRows:
    """Return some trials of trials that are read on demand, read from the same file."""
    if data.starts is None:
        return TrialRows(data.data, data.rows[numbers])
    ends = np.append(data.starts[1:], len(data.rows))
    parts = [data.rows[data.starts[n] : ends[n]] for n in numbers.tolist()]
    starts = np.cumsum([0, *[len(part) for part in parts[:-1]]])
    return TrialRows(data.data, np.concatenate(parts), starts)


def _lies_in_file(data: np.ndarray | TrialRows) -> bool:
    if isinstance(data, TrialRows):
        return _lies_in_file(data.data)
    return isinstance(data, np.memmap)
