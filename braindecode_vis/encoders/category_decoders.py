"""Linear category decoders: which class was seen, for data without images.

Owns shrinkage LDA and logistic regression over z-scored features. LDA is a solution in closed form, equal to
scikit-learn's up to rounding and some ten times as fast, which tests of whole subjects need; logistic regression is
scikit-learn's. What is kept is one matrix and one offset, so that a fitted decoder is stored as plain arrays. The
z-score and the penalty are learnt from the trials passed to `fit`. Knows nothing of folds that hold out test trials.
Where the rows are single volumes of a trial (same subject, session, run and onset), they can be decided together: each
volume of a block is a noisy sample of the same state, and learning from all of them and averaging their log
probabilities uses more of the data than averaging the volumes first.

References
----------
Blankertz et al. (2011), doi:10.1016/j.neuroimage.2010.06.048: shrinkage LDA for single-trial evoked responses.
Ledoit, Wolf (2004), doi:10.1016/S0047-259X(03)00096-4: the shrinkage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError, check_columns
from braindecode_vis.base.contracts import CategoryDecoder, EncoderSettings
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.preprocessing.splits import Fold, InnerFoldSettings, make_groups

if TYPE_CHECKING:
    import pandas as pd

_MAX_LDA_FEATURES = 8192  # its covariance takes 0.5 GiB
_EDGE = 1e-6  # s; volumes at the edge of a window are in it whatever their rounding
_FILE = "categories"
_MAX_ITER = 5000  # steps of the solver of logistic regression; not converging by then is an error
_TRIAL = ("subject", "session", "run", "onset")  # what the rows of one trial share


class LdaConfig(EncoderSettings):
    """Linear discriminant analysis with the analytic shrinkage of Ledoit and Wolf; nothing to choose.

    Parameters
    ----------
    pool
        As in `LogisticConfig`.
    """

    kind: Literal["lda"] = "lda"

    decodes_categories: ClassVar[bool] = True

    pool: bool = False

    def build(self, *, seed: int) -> LinearCategoryDecoder:
        """Return the unfitted decoder; nothing in it is random."""
        return LinearCategoryDecoder(self)


class LogisticConfig(EncoderSettings, InnerFoldSettings):
    """Logistic regression with an L2 penalty.

    Parameters
    ----------
    c
        Candidates for the inverse penalty. The one with the lowest log loss in an inner cross-validation over the
        training trials is used; with equal losses, the smallest. One entry is a fixed choice.
    n_inner_folds
        Folds of the inner cross-validation. They keep runs and groups together; or subjects (or groups) if each of them
        has one class. If there are fewer of these than folds, each is left out in turn. With one run and no group, the
        folds are over trials.
    pool
        For rows that are single volumes (``dataset.model.keep: volumes``): each volume is a training sample, and a
        trial gets one decision, from the mean of the log probabilities of its volumes.
    windows
        Candidates for the volumes of a trial that are used, each as (s after its onset, s after its offset), chosen
        together with `c`; with equal losses, the first one. Empty: all volumes. Needs `pool`.
    """

    kind: Literal["logistic"] = "logistic"

    decodes_categories: ClassVar[bool] = True

    c: tuple[Annotated[float, Field(gt=0)], ...] = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
    pool: bool = False
    windows: tuple[tuple[float, float], ...] = ()

    removed_settings: ClassVar[Mapping[str, Any]] = {"max_iter": _MAX_ITER}

    @model_validator(mode="after")
    def _check_windows(self) -> LogisticConfig:
        if self.windows and not self.pool:
            raise ValueError("windows select volumes of a trial and need pool: true")
        return self

    def build(self, *, seed: int) -> LinearCategoryDecoder:
        """Return the unfitted decoder; nothing in it is random."""
        if not self.c:
            raise ConfigError("encoder.c needs at least one value.")
        return LinearCategoryDecoder(self)


@dataclass(frozen=True)
class LinearDecision:
    """Everything that a decision needs.

    Parameters
    ----------
    mean, scale : float64 arrays of shape (n_features,)
        Of the training trials; constant features have scale 1.
    weights : float64 array of shape (n_rows, n_features)
        One row per class, or a single one for two classes.
    offset : float64 array of shape (n_rows,)
    classes
        Names of the classes, sorted.
    choices
        Log loss of each candidate, if there was a choice.
    window
        Volumes that count, if they were chosen: s after the onset and s after the offset of the trial.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    offset: np.ndarray
    classes: tuple[str, ...]
    choices: list[dict[str, float]]
    window: tuple[float, float] | None = None


def read_labels(kind: str, responses: Responses, labels: np.ndarray) -> np.ndarray:
    """Return one class name per trial as str; refuse another number of labels, or a single class.

    Parameters
    ----------
    kind
        Of the decoder, for the message.
    responses, labels
        Training trials and the label of each.
    """
    names = np.asarray(labels).astype(str)
    if names.shape != (responses.n_trials,):
        raise DataError(
            f"the {kind} decoder needs one label per trial: {responses.n_trials} trials "
            f"came with labels of shape {names.shape}."
        )
    classes = np.unique(names)
    if len(classes) < 2:
        raise DataError(f"a category decoder needs two classes, but all trials are {str(classes[0])!r}.")
    return names


class LinearCategoryDecoder(CategoryDecoder):
    """A linear classifier of trials; see the module for what is learnt and kept."""

    def __init__(self, config: LdaConfig | LogisticConfig) -> None:
        self.config = config
        self.fitted: LinearDecision | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `decision`."""
        return self._require_fit().classes

    @property
    def n_small_fits(self) -> int:  # type: ignore[override]
        """Fits of one `fit`, those of inner folds included."""
        if isinstance(self.config, LdaConfig):
            return 1
        n_candidates = len(self.config.c) * max(1, len(self.config.windows))
        return 1 if n_candidates == 1 else 1 + n_candidates * self.config.n_inner_folds

    def fit(self, responses: Responses, labels: np.ndarray) -> LinearCategoryDecoder:
        """Learn from training trials.

        Parameters
        ----------
        responses
            Training trials.
        labels : array of shape (n_trials,)
            Name of the class of each trial.

        Raises
        ------
        DataError
            If labels and trials do not match, or there is one class only.
        ConfigError
            If the solver does not converge.
        """
        labels = read_labels(self.config.kind, responses, labels)
        data = responses.as_matrix().astype(np.float64)
        if isinstance(self.config, LdaConfig):
            self.fitted = _fit_lda(data, labels)
            return self
        config, choices = self.config, []
        windows: list[tuple[float, float] | None] = list(config.windows) or [None]
        c, window = config.c[0], windows[0]
        if len(config.c) * len(windows) > 1:
            choices = _score_candidates(data, labels, responses.trials, config)
        if (
            not choices
        ):  # a fixed choice; or subjects too few to leave some out, so that the strongest penalty is taken
            c = min(config.c)
        else:
            # The strongest penalty wins a tie.
            best = min(range(len(choices)), key=lambda n: (choices[n]["log_loss"], choices[n]["c"]))
            c, window = choices[best]["c"], windows[best // len(config.c)]
        rows = find_window(responses.trials, window)
        fitted = _fit_logistic(data[rows], labels[rows], c, choices)
        self.fitted = replace(fitted, window=window)
        return self

    def decision(self, responses: Responses) -> np.ndarray:
        """Return the probability of each class, float64 of shape (n_trials, n_classes); rows sum to one.

        Where volumes are pooled, all rows of a trial get the probabilities of the trial.
        """
        fit = self._require_fit()
        data = responses.as_matrix()
        if data.shape[1] != len(fit.mean):
            raise DataError(
                f"the {self.config.kind} decoder was fitted on {len(fit.mean)} features, "
                f"but these responses have {data.shape[1]}."
            )
        decided = _decide(fit, data)
        if not self.config.pool:
            return decided
        return pool_rows(decided, responses.trials, find_window(responses.trials, fit.window))

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return the decision as a torch module, and these trials as its input.

        Raises
        ------
        ConfigError
            If volumes are pooled, which needs the table of trials.
        """
        import torch

        from braindecode_vis.encoders.linear_prediction import LinearPrediction

        fit = self._require_fit()
        if self.config.pool:
            raise ConfigError(
                "a decoder that pools the volumes of a trial needs the table of trials, so it cannot be "
                "exported as a program; choose safetensors."
            )
        shape = (len(fit.classes),)
        module = LinearPrediction(
            None, fit.mean, fit.scale, fit.weights.T, fit.offset, shape=shape, classes=True
        )
        return module, {"responses": torch.from_numpy(responses.as_matrix().reshape(responses.data.shape))}

    def write(self, folder: Path) -> None:
        """Write the fitted state as safetensors and JSON."""
        fit = self._require_fit()
        tensors = {name: getattr(fit, name) for name in ("mean", "scale", "weights", "offset")}
        write_tensors(
            folder / f"{_FILE}.safetensors",
            {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        )
        record = {
            "kind": self.config.kind,
            "classes": list(fit.classes),
            "choices": fit.choices,
            "window": fit.window,
        }
        write_json(folder / f"{_FILE}.json", record)

    def read(self, folder: Path) -> LinearCategoryDecoder:
        """Read what `write` wrote.

        Raises
        ------
        DataError
            If the folder holds a decoder of another kind.
        """
        record = read_json(folder / f"{_FILE}.json")
        if record["kind"] != self.config.kind:
            raise DataError(f"{folder} holds a decoder of kind {record['kind']!r}, not {self.config.kind!r}.")
        tensors = load_tensors(folder / f"{_FILE}.safetensors")
        window = None if record.get("window") is None else (record["window"][0], record["window"][1])
        classes = tuple(record["classes"])
        self.fitted = LinearDecision(classes=classes, choices=record["choices"], window=window, **tensors)
        return self

    def _require_fit(self) -> LinearDecision:
        if self.fitted is None:
            raise DataError(f"the {self.config.kind} decoder has not been fitted; run train first.")
        return self.fitted


def _decide(fit: LinearDecision, data: np.ndarray) -> np.ndarray:
    """Return probabilities of shape (n_trials, n_classes)."""
    from scipy.special import expit, softmax

    scores = (data - fit.mean) / fit.scale @ fit.weights.T + fit.offset
    if scores.shape[1] > 1:
        # scikit-learn keeps one row per class, but a single one for two classes.
        return np.asarray(softmax(scores, axis=1))
    second = expit(scores[:, 0])
    return np.stack([1 - second, second], axis=1)


def _fit_lda(data: np.ndarray, labels: np.ndarray) -> LinearDecision:
    # With fewer trials than features, no matrix of features by features is made.
    if _MAX_LDA_FEATURES < data.shape[1] <= len(data):
        raise ConfigError(
            f"lda on {data.shape[1]} features needs a covariance of {data.shape[1] ** 2 * 8 / 2**30:.1f} GiB; "
            f"preprocess to at most {_MAX_LDA_FEATURES} features (fewer channels or a lower sfreq), or set "
            "encoder.kind to logistic."
        )
    # The shrinkage of Ledoit and Wolf pulls toward a multiple of the identity, hence the z-scores before it.
    mean, scale = data.mean(axis=0), _find_scale(data)
    names, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    scaled = (data - mean) / scale
    means = np.stack(
        [scaled[codes == code].mean(axis=0) for code in range(len(names))]
    )  # (n_classes, n_features)
    weights = solve_shrunk(scaled, codes, means)
    offset = np.log(counts / len(codes)) - 0.5 * (means * weights).sum(axis=1)
    if len(names) == 2:  # one row decides between two classes
        weights, offset = weights[1:] - weights[:1], offset[1:] - offset[:1]
    return LinearDecision(mean, scale, weights, offset, tuple(str(name) for name in names), [])


def _find_scale(data: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each feature, 1 where it is constant up to rounding."""
    spread = data.std(axis=0)
    limit = 10 * np.finfo(float).eps * np.maximum(np.abs(data).max(axis=0), np.finfo(float).tiny)
    return np.where(spread > limit, spread, 1.0)


def solve_shrunk(data: np.ndarray, codes: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return the inverse of the shrunk covariance within classes, applied to each class mean, (n_classes, n_features).

    The covariance is the mean over classes, by their sizes, of what Ledoit and Wolf's shrinkage makes of each class
    whose features were scaled to variance 1, as in scikit-learn. It is a diagonal and one product of as many rows as
    there are trials, so that no matrix of features by features is made where trials are fewer, and a fit for each of
    thousands of label sets is cheap.

    Parameters
    ----------
    data : array of shape (n_trials, n_features)
    codes : int array of shape (n_trials,)
        Class of each trial.
    means : array of shape (n_classes, n_features)
    """
    from scipy.linalg import cho_factor, cho_solve, lstsq

    n, n_features = data.shape
    diagonal, rows = np.zeros(n_features), np.empty_like(data)
    for code, mean in enumerate(means):
        own = np.flatnonzero(codes == code)
        centred = data[own] - mean
        scale = _find_scale(data[own])
        shrinkage, level = _find_shrinkage(centred / scale)
        rows[own] = centred * np.sqrt((1 - shrinkage) / n)
        diagonal += len(own) / n * shrinkage * level * scale**2
    # Next to no shrinkage, as a class of two trials has it, divides by rounding errors.
    shrinks = (diagonal > 1e-12 * (rows**2).sum(axis=0)).all() and (diagonal > 0).all()
    if n_features <= n or not shrinks:
        covariance = rows.T @ rows
        covariance[np.diag_indices(n_features)] += diagonal
        try:
            return np.asarray(cho_solve(cho_factor(covariance), means.T).T)
        except np.linalg.LinAlgError:  # features that repeat each other, without shrinkage
            return np.asarray(lstsq(covariance, means.T)[0].T)
    # Woodbury: (D + R'R)^-1 = D^-1 - D^-1 R' (1 + R D^-1 R')^-1 R D^-1
    over = rows / diagonal
    inner = over @ rows.T
    inner[np.diag_indices(n)] += 1
    direct = means / diagonal
    return np.asarray(direct - cho_solve(cho_factor(inner), rows @ direct.T).T @ over)


def _find_shrinkage(data: np.ndarray) -> tuple[float, float]:
    """Return Ledoit and Wolf's shrinkage of centred trials, and the mean variance that it pulls toward."""
    n, n_features = data.shape
    squares = data**2
    level = float(squares.sum()) / (n * n_features)
    if n_features == 1:
        return 0.0, level
    product = data @ data.T if n < n_features else data.T @ data
    size = float((product**2).sum()) / n**2  # squared norm of the covariance
    noise = float((squares.sum(axis=1) ** 2).sum()) / n
    beta = (noise - size) / (n_features * n)
    delta = (size - 2 * level * n_features * level + n_features * level**2) / n_features
    beta = min(beta, delta)
    return (0.0 if beta == 0 else beta / delta), level


def _fit_logistic(
    data: np.ndarray, labels: np.ndarray, c: float, choices: list[dict[str, float]]
) -> LinearDecision:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(data)
    scaled, basis = scaler.transform(data), None
    if scaled.shape[1] > 2 * len(scaled):
        # The weights lie in the span of the trials, whose coordinates are far fewer than the features.
        basis, coordinates = np.linalg.qr(scaled.T)  # (n_features, n_trials), (n_trials, n_trials)
        scaled = coordinates.T
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model = LogisticRegression(C=c, max_iter=_MAX_ITER).fit(scaled, labels)
        except ConvergenceWarning as error:
            raise ConfigError(
                f"logistic regression with C = {c:g} did not converge in {_MAX_ITER} steps; lower encoder.c."
            ) from error
    fit = _keep(scaler, model, choices)
    return fit if basis is None else replace(fit, weights=fit.weights @ basis.T)


def _keep(scaler: Any, model: Any, choices: list[dict[str, float]]) -> LinearDecision:
    return LinearDecision(
        mean=np.asarray(scaler.mean_, dtype=np.float64),
        scale=np.asarray(scaler.scale_, dtype=np.float64),
        weights=np.asarray(model.coef_, dtype=np.float64),
        offset=np.asarray(model.intercept_, dtype=np.float64),
        classes=tuple(str(name) for name in model.classes_),
        choices=choices,
    )


def _score_candidates(
    data: np.ndarray, labels: np.ndarray, trials: pd.DataFrame, config: LogisticConfig
) -> list[dict[str, float]]:
    """Return the mean log loss of every candidate over the held-out trials of the inner folds, window by window.

    Empty where no fold can be left out.
    """
    folds = make_label_folds(labels, trials, config.n_inner_folds, pool=config.pool)
    if not folds:
        return []
    rows: list[dict[str, float]] = []
    for window in config.windows or (None,):
        inside = find_window(trials, window)
        named = {} if window is None else {"start": window[0], "stop": window[1]}
        for c in config.c:
            losses = [_score_fold(data, labels, trials, inside, fold, c, config) for fold in folds]
            rows.append({"c": float(c), "log_loss": float(np.concatenate(losses).mean()), **named})
    return rows


def _score_fold(
    data: np.ndarray,
    labels: np.ndarray,
    trials: pd.DataFrame,
    inside: np.ndarray,
    fold: Fold,
    c: float,
    config: LogisticConfig,
) -> np.ndarray:
    """Return the log loss of each held-out trial of one inner fold."""
    train = fold.train[inside[fold.train]]
    fit = _fit_logistic(data[train], labels[train], c, [])
    probabilities, test = _decide(fit, data[fold.test]), fold.test
    if config.pool:
        held = trials.iloc[test]
        first = find_first_rows(held)  # one decision per trial: its rows have the same probabilities
        probabilities, test = pool_rows(probabilities, held, inside[test])[first], test[first]
    own = np.searchsorted(np.array(fit.classes), labels[test])  # classes are sorted
    seen = probabilities[np.arange(len(test)), own]
    return -np.log(np.maximum(seen, np.finfo(float).tiny))


def make_label_folds(
    labels: np.ndarray, trials: pd.DataFrame, n_folds: int, *, pool: bool = False
) -> list[Fold]:
    """Return inner folds in which a class can be learnt from other runs, or other subjects where they have one class.

    Test rows whose class the training part of their fold does not show are left out, and folds that train on one class.

    Parameters
    ----------
    labels : str array of shape (n_rows,)
    trials
        One row per row.
    n_folds
        Folds at the most.
    pool
        Whether rows are volumes of a trial, which stay together.

    Returns
    -------
    folds
        None at all where each subject (or group) shows one class and no class is left when some are left out.
    """
    units, is_owned = _find_inner_units(labels, trials)
    folds = _deal_folds(labels, units, n_folds, spread=has_one_label(labels, units))
    if folds or is_owned:
        return folds
    # One run, or each class in a run of its own: nothing larger than a trial can be left out.
    return _deal_folds(
        labels, number_trials(trials) if pool else np.arange(len(labels)), n_folds, spread=True
    )


def _find_inner_units(labels: np.ndarray, trials: pd.DataFrame) -> tuple[np.ndarray, bool]:
    """Return the number of what each row is left out with, and whether each subject or group shows one class."""
    runs = np.unique(make_groups(trials, "run").astype(str), return_inverse=True)[1]
    joined, owned = [runs], None
    for side in ("subject", "group"):
        if side == "group" and "group" not in trials:
            continue
        codes = np.unique(make_groups(trials, side).astype(str), return_inverse=True)[1]
        is_owned = has_one_label(labels, codes)
        if is_owned or side == "group":
            joined.append(codes)
        if is_owned and owned is None:
            owned = codes
    is_owned = owned is not None and bool(owned.max() > 0)
    units = join_units(joined)
    if units.max() > 0:
        return units, is_owned
    # Runs that all groups share: what would be recognised is the group.
    if owned is not None and is_owned:
        return owned, True
    return (runs if runs.max() > 0 else joined[-1]), False  # one run: its groups, where there are some


def has_one_label(labels: np.ndarray, codes: np.ndarray) -> bool:
    """Say whether all rows of a unit have one label.

    Examples
    --------
    >>> labels = np.array(list("aab"))
    >>> has_one_label(labels, np.array([0, 0, 1])), has_one_label(labels, np.array([0, 1, 1]))
    (True, False)
    """
    first = np.unique(codes, return_index=True, return_inverse=True)
    return bool((labels == labels[first[1]][first[2]]).all())


def join_units(parts: list[np.ndarray]) -> np.ndarray:
    """Return the smallest units that cut no unit of any part, as numbers of shape (n_rows,).

    Examples
    --------
    >>> join_units([np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2])]).tolist()
    [0, 0, 1, 1]
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n_rows, rows = len(parts[0]), np.arange(len(parts[0]))
    starts = n_rows + np.cumsum([0, *(int(codes.max()) + 1 for codes in parts)])
    # Rows and units are the two sides of a graph; what hangs together is one unit.
    ends = np.concatenate([start + codes for start, codes in zip(starts, parts, strict=False)])
    edges = coo_matrix((np.ones(len(ends)), (np.tile(rows, len(parts)), ends)), shape=(starts[-1],) * 2)
    return np.unique(connected_components(edges, directed=False)[1][:n_rows], return_inverse=True)[1]


def _deal_folds(labels: np.ndarray, units: np.ndarray, n_folds: int, *, spread: bool) -> list[Fold]:
    """Deal units over the folds in turn, class by class where `spread` says that each has one."""
    known, first, codes = np.unique(units, return_index=True, return_inverse=True)
    order = np.argsort(labels[first], kind="stable") if spread else np.arange(len(known))
    fold_of = np.empty(len(known), dtype=int)
    fold_of[order] = np.arange(len(known)) % min(n_folds, len(known))
    folds = []
    for number in range(int(fold_of.max()) + 1):
        held = fold_of[codes] == number
        taught = np.unique(labels[~held])
        test = np.flatnonzero(held & np.isin(labels, taught))
        if len(taught) > 1 and len(test):
            folds.append(Fold(np.flatnonzero(~held), test))
    return folds


def number_trials(trials: pd.DataFrame) -> np.ndarray:
    """Return the number of the trial that each row belongs to, from 0 in order of appearance, shape (n_rows,).

    Raises
    ------
    DataError
        If the table does not say when a trial began.
    """
    check_columns(trials.columns, _TRIAL, what="the trial table, whose volumes are to be pooled,")
    return trials.groupby(list(_TRIAL), sort=False).ngroup().to_numpy()


def find_first_rows(trials: pd.DataFrame) -> np.ndarray:
    """Return the first row of each trial, ascending, shape (n_trials,)."""
    return np.unique(number_trials(trials), return_index=True)[1]


def find_window(trials: pd.DataFrame, window: tuple[float, float] | None) -> np.ndarray:
    """Return which rows lie in a window, bool of shape (n_rows,).

    Parameters
    ----------
    trials
        With the columns `time` (s after the onset) and `duration` (s).
    window
        Its beginning, in s after the onset, and its end (excluded), in s after the offset; None takes every row.

    Raises
    ------
    ConfigError
        If some trial has no volume in the window.
    """
    if window is None:
        return np.ones(len(trials), bool)
    check_columns(trials.columns, ("time", "duration"), what="the trial table, whose volumes are chosen,")
    times, ends = trials["time"].to_numpy(float), trials["duration"].to_numpy(float) + window[1]
    inside = (times >= window[0] - _EDGE) & (times < ends - _EDGE)
    number = number_trials(trials)
    empty = int((np.bincount(number, weights=inside) == 0).sum()) if len(number) else 0
    if empty:
        raise ConfigError(
            f"{empty} trials have no volume from {window[0]:g} s after their onset to {window[1]:g} s after their "
            "offset; keep more volumes with dataset.model.start and stop, or change encoder.windows."
        )
    return inside


def pool_rows(probabilities: np.ndarray, trials: pd.DataFrame, inside: np.ndarray) -> np.ndarray:
    """Return for each row the probabilities of its trial: the normalised geometric mean of those of its rows.

    Parameters
    ----------
    probabilities : array of shape (n_rows, n_classes)
    trials
        One row per row.
    inside : bool array of shape (n_rows,)
        Rows that count.

    Raises
    ------
    DataError
        If no row of a trial counts.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"subject": "1", "session": "1", "run": "1", "onset": [0.0, 0.0]})
    >>> pool_rows(np.array([[0.5, 0.5], [0.9, 0.1]]), table, np.array([True, True])).round(2).tolist()
    [[0.75, 0.25], [0.75, 0.25]]
    """
    number = number_trials(trials)
    logs = np.log(np.maximum(probabilities, np.finfo(float).tiny))  # a probability of 0 would veto the others
    total = np.zeros((number.max() + 1, probabilities.shape[1]))
    np.add.at(total, number[inside], logs[inside])
    counts = np.bincount(number[inside], minlength=len(total))
    if not counts.all():
        raise DataError(f"{int((counts == 0).sum())} trials have no row from which they can be decided.")
    mean = total / counts[:, None]
    pooled = np.exp(mean - mean.max(axis=1, keepdims=True))  # the largest is 1: nothing underflows to 0 / 0
    return (pooled / pooled.sum(axis=1, keepdims=True))[number]
