"""The units that intervals resample and nulls exchange: images, trials, groups, runs, sessions or subjects.

Trials of one block, session or subject share drifts and states, so that a bootstrap of single trials or pictures takes
them for more evidence than they are. Drawing whole groups with replacement (the cluster bootstrap) does not.

References
----------
Field and Welsh (2007), Bootstrapping clustered data, doi:10.1111/j.1467-9868.2007.00593.x.
Saravanan, Berman and Sober (2020), hierarchical bootstrap in neuroscience, arXiv:2007.07797.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.preprocessing.splits import Side, make_groups

if TYPE_CHECKING:
    import pandas as pd

Resample = Literal["auto", "image", "trial", "group", "run", "session", "subject"]
#: Columns whose repetitions are averaged into one test item; see `preprocessing.selection.average_repetitions`.
_AVERAGED_OVER = ["subject", "stimulus_id", "task"]


@dataclass(frozen=True)
class Units:
    """What the test items belong to.

    Parameters
    ----------
    unit
        In one word: ``trial``, ``group``, ``run``, ``session`` or ``subject``.
    labels : array of shape (n_items,)
        Items of one label are drawn together.
    """

    unit: str
    labels: np.ndarray

    def select(self, rows: np.ndarray, images: np.ndarray | None = None) -> Units | None:
        """Return those of some items; None if all of them belong to one unit, which cannot be resampled.

        Parameters
        ----------
        rows
            Numbers of the items.
        images : array of shape (n_rows,), optional
            Image of each, if they are of several subjects. A session holds trials of one subject, and the images of one
            subject are those of another, so that a unit which does not hold whole images is no unit of all subjects.
        """
        labels = self.labels[rows]
        if images is not None and self.unit not in ("trial", "subject"):
            pairs = set(zip(images.astype(str).tolist(), labels.astype(str).tolist(), strict=True))
            if len(pairs) > len({image for image, _ in pairs}):
                return None
        return Units(self.unit, labels) if len(set(labels.tolist())) > 1 else None


def find_units(items: pd.DataFrame, trials: pd.DataFrame, resample: Resample) -> tuple[Units | None, str]:
    """Return what the test items belong to; None stands for their pictures (or, of classes, single trials).

    Parameters
    ----------
    items
        One row per test item.
    trials
        The single trials behind them. Where an item is an average over repetitions from several groups, groups that
        share an item are one unit, since they are not independent any more.
    resample
        As in `EvaluationConfig`.

    Returns
    -------
    units
    note
        Why groups are not resampled although there are some; empty otherwise.

    Raises
    ------
    ConfigError
        If the unit that was asked for is not known, or averages leave one of them.
    """
    if resample == "image" or (resample == "auto" and "group" not in trials):
        return None, ""
    if resample in ("trial", "subject"):
        labels = np.arange(len(items)) if resample == "trial" else items["subject"].astype(str).to_numpy()
        return Units(resample, labels.astype(object)), ""
    side: Side = "group" if resample == "auto" else resample
    if side not in ("session", "run") and side not in trials:
        raise ConfigError(
            f"evaluation.resample is {resample}, but the trial table has no column {side}; add it to the table, or set "
            "evaluation.resample to auto."
        )
    groups = make_groups(trials, side).astype(str)
    labels = _label_items(items, trials, side, averaged=len(items) != len(trials))
    if len(items) != len(trials) and len(set(groups.tolist())) > 1 and len(set(labels.tolist())) < 2:
        words = f"test items are averages over several {side}s each; set repeats.test to single to resample {side}s"
        if resample != "auto":
            raise ConfigError(f"evaluation.resample is {resample}, but {words}.")
        return None, f"intervals resample images, not {side}s: {words}."
    return Units(side, labels), ""


def make_labels(
    trials: pd.DataFrame, resample: Resample, *, averaged: bool
) -> tuple[str, Callable[[pd.DataFrame], np.ndarray]] | None:
    """Return the name of the unit, and a function from test items to the unit of each; None if images are resampled.

    For analyses, which test the folds of a run one after the other, and some of their items only.

    Parameters
    ----------
    trials
        All single test trials.
    resample
        As in `EvaluationConfig`.
    averaged
        Whether test items are averages over repetitions.
    """
    if resample == "image" or (resample == "auto" and "group" not in trials):
        return None
    if resample == "trial":
        calls = (
            count()
        )  # items of two folds are never the same trial, and labels sort in the order of the calls

        def number(items: pd.DataFrame) -> np.ndarray:
            call = next(calls)
            return np.array([f"{call:08d}.{row:08d}" for row in range(len(items))], dtype=object)

        return "trial", number
    if resample == "subject":
        return "subject", lambda items: items["subject"].astype(str).to_numpy(dtype=object)
    side: Side = "group" if resample == "auto" else resample
    if side not in ("session", "run") and side not in trials:
        return None
    if len(set(_label_items(trials, trials, side, averaged=averaged).tolist())) < 2:
        return None
    return side, lambda items: _label_items(items, trials, side, averaged=averaged)


def _label_items(items: pd.DataFrame, trials: pd.DataFrame, side: Side, *, averaged: bool) -> np.ndarray:
    """Return the unit of each test item; what an average was taken over is one unit."""
    import pandas as pd

    if not averaged and (side in ("session", "run") or side in items):
        return make_groups(items, side).astype(str).astype(object)
    keys = [name for name in _AVERAGED_OVER if name in trials]
    groups = make_groups(trials, side).astype(str)
    joined = _join_groups(pd.MultiIndex.from_frame(trials[keys].astype(str)), groups)
    return joined.reindex(pd.MultiIndex.from_frame(items[keys].astype(str))).to_numpy(dtype=object)


def _join_groups(keys: pd.MultiIndex, groups: np.ndarray) -> pd.Series:
    """Return the unit of each averaged item: groups that an item is averaged over are joined, within a subject."""
    import pandas as pd
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    codes, names = pd.factorize(keys)
    subjects = keys.get_level_values(0)
    whose = pd.factorize(pd.MultiIndex.from_arrays([subjects, groups]))[0]
    n_items, n_groups = len(names), int(whose.max()) + 1
    # Items and groups are the two sides of a graph; what hangs together is one unit.
    edges = coo_matrix((np.ones(len(codes)), (codes, n_items + whose)), shape=(n_items + n_groups,) * 2)
    component = connected_components(edges, directed=False)[1][:n_items]
    first = pd.Series(groups).groupby(component[codes]).first()  # a unit is called like its first group
    labels = [f"{component[n]}:{first[component[n]]}" for n in range(n_items)]
    return pd.Series(labels, index=pd.MultiIndex.from_tuples(list(names), names=keys.names))


def find_exchangeable(stimuli: np.ndarray, units: Units | None) -> dict[str, int] | None:
    """Return a class for each stimulus, within which a null may exchange stimuli; None if all may be exchanged.

    Items of one stimulus always move together. Where units have one stimulus each, exchanging stimuli exchanges whole
    units. Otherwise only stimuli that are in the very same units are exchanged: what sets one unit off from another
    would else be taken for a decoded stimulus.

    Parameters
    ----------
    stimuli : array of shape (n_items,)
    units
        Of these items.

    Examples
    --------
    >>> find_exchangeable(np.array(list("abcd")), Units("group", np.array([1, 1, 2, 2])))
    {'a': 0, 'b': 0, 'c': 1, 'd': 1}
    >>> find_exchangeable(np.array(list("aabb")), Units("group", np.array([1, 2, 3, 4]))) is None
    True
    """
    import pandas as pd

    if units is None or units.unit in ("trial", "subject"):
        return None
    pairs = pd.DataFrame(
        {"stimulus": stimuli.astype(str), "unit": units.labels.astype(str)}
    ).drop_duplicates()
    if not pairs["unit"].duplicated().any():
        return None
    found = pairs.groupby("stimulus")["unit"].agg(frozenset)
    codes, _ = pd.factorize(found)
    # All different: units are random draws of the stimuli, and no two stimuli could change places.
    if len(set(codes.tolist())) in (1, len(codes)):
        return None
    return dict(zip(found.index.tolist(), codes.tolist(), strict=True))
