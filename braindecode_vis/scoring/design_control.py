"""The control `design`: the image of a trial is predicted from its time and duration, without the response.

Owns which variables of the design a trial table holds and the ridge from them to a target. In a block design, or where
each picture has a duration of its own, such a prediction finds pictures without a brain; a decoder that scores no
better has shown nothing about one. Fitted on training trials only, like the encoder that it is compared with.

References
----------
Li et al. (2021), The perils and pitfalls of block design for EEG classification experiments, IEEE TPAMI 43, 316-333.
doi:10.1109/TPAMI.2020.2973153
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

#: Columns that tell the order of presentation; the order of rows need not be that.
ORDER_COLUMNS = ("onset", "sample", "trial", "order")
#: More runs than this are left to their sessions: a column each would be most of the design.
MAX_RUNS = 200
N_PLACES = 10
PENALTY = 10.0  # in trials: as much as ten of them weigh, so that few trials are not learnt by heart


def tabulate_design(trials: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Return what is known of each trial beside its response, and its name in words.

    Parameters
    ----------
    trials
        The trial table of all trials of a run.

    Returns
    -------
    design : float array of shape (n_trials, n_columns)
        Columns that vary; none where the table says nothing of order, duration, run, session or subject.
    variables
        For example ``["run", "place in the run", "time since the last trial"]``.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"subject": "01", "session": "01", "run": ["1", "1", "2", "2"], "onset": [0.0, 2, 0, 3]})
    >>> design, variables = tabulate_design(table)
    >>> variables
    ['run', 'place in the run', 'time since the last trial']
    """
    import pandas as pd

    columns: list[np.ndarray] = []
    variables: list[str] = []

    def add(name: str, *found: np.ndarray) -> None:
        varying = [column.astype(float) for column in found if np.ptp(column.astype(float)) > 0]
        if varying:
            columns.extend(varying)
            variables.append(name)

    def mark(labels: pd.Series) -> list[np.ndarray]:
        values = labels.to_numpy()
        return [(values == label).astype(float) for label in sorted(set(values.tolist()))]

    # Trials without a number of their run are one run of their own.
    subject, session, run = (trials[name].astype(str).fillna("") for name in ("subject", "session", "run"))
    session = subject + "/" + session
    run = session + "/" + run
    add("subject", *mark(subject))
    if subject.nunique() < session.nunique() <= MAX_RUNS:
        add("session", *mark(session))
    if session.nunique() < run.nunique() <= MAX_RUNS:
        add("run", *mark(run))
    order = next((trials[name] for name in ORDER_COLUMNS if _is_known(trials, name)), None)
    if order is not None:
        within = order.groupby(run.to_numpy())
        place = (within.rank(method="first") - 1) / (within.transform("size") - 1).clip(lower=1)
        bins = (place * N_PLACES).astype(int).clip(upper=N_PLACES - 1)
        add("place in the run", *(place.to_numpy() ** power for power in (1, 2, 3)), *mark(bins))
        sorted_rows = pd.DataFrame({"run": run, "order": order}).sort_values(["run", "order"], kind="stable")
        gap = sorted_rows.groupby("run")["order"].diff().reindex(trials.index)
        gap = gap.fillna(gap.median() if gap.notna().any() else 0.0).clip(lower=0)
        add("time since the last trial", gap.to_numpy(), np.log1p(gap.to_numpy()))
    if _is_known(trials, "duration"):
        duration = trials["duration"].to_numpy(float)
        add("duration", duration, np.log1p(np.maximum(duration, 0)))
    return np.stack(columns, axis=1) if columns else np.empty((len(trials), 0)), variables


def _is_known(trials: pd.DataFrame, name: str) -> bool:
    if name not in trials or trials[name].dtype.kind not in "iuf":
        return False
    return bool(np.isfinite(trials[name].to_numpy(float, na_value=np.nan)).all())


def predict_from_design(
    train: np.ndarray, shown: np.ndarray, targets: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Fit a ridge from the design to the targets of training trials and predict those of test trials.

    Parameters
    ----------
    train : array of shape (n_train, n_columns)
        Design of the training trials.
    shown : int array of shape (n_train,)
        Row of `targets` that each of them showed.
    targets : float array of shape (n_stimuli, ...)
        Embeddings of the training images, or a row of an identity matrix for each class.
    test : array of shape (n_test, n_columns)
        Design of the test trials.

    Returns
    -------
    float32 array of shape (n_test, ...)
    """
    mean, spread = train.mean(axis=0), train.std(axis=0)
    spread[spread == 0] = 1.0  # a run that is only tested says nothing
    left, right = (train - mean) / spread, (test - mean) / spread
    flat = np.asarray(targets).reshape(len(targets), -1)
    # Summed over the trials of an image first: the targets of all trials are never in memory together.
    summed = np.zeros((len(flat), train.shape[1]))
    np.add.at(summed, shown, left)
    counts = np.bincount(shown, minlength=len(flat)) / len(shown)
    weights = np.linalg.solve(left.T @ left + PENALTY * np.eye(left.shape[1]), summed.T @ flat)
    predicted = right @ weights + counts @ flat  # (n_test, n_features)
    return predicted.reshape(len(test), *np.shape(targets)[1:]).astype(np.float32)
