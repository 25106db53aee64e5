"""The encoder `auto`: inner folds of the training trials choose one of a few encoders, within a time budget.

Owns the list, the folds, the rule and the record of the choice, and nothing of how a candidate learns. All trials of
one image stay in one inner fold (of classes: those of one run, where there are several). Each candidate is fitted in
every inner fold and scored on the trials that were left out: by two-way identification of the seen image among the
images that were left out, or by the share of trials whose class is decoded correctly. The best mean wins; but an
earlier, and so simpler, candidate wins if its mean is lower by at most one standard error of their paired difference.
The winner is fitted again on all training trials.

Time decides only whether a candidate is tried: it is left out if, after its fit in the first inner fold, the rest
would take longer than the remaining budget. This is recorded, and a fit that is repeated from its record
(`Context.earlier`) leaves out the same candidates, so that an audit compares the same things.

References
----------
Hastie, Tibshirani, Friedman (2009), The elements of statistical learning, 7.10: the rule of one standard error, with
the error of the difference here, since all candidates are scored on the same trials.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.base.contracts import NOTHING_LENT, Context, EncoderSettings, FewTrialAdaptation
from braindecode_vis.base.registry import Component
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.encoders.category_decoders import find_first_rows, make_label_folds
from braindecode_vis.preprocessing.splits import Fold, make_inner_folds

if TYPE_CHECKING:
    import pandas as pd

FILE = "auto.json"
CANDIDATES = (
    "ridge", "linear_gaussian", "average", "network", "lda", "logistic", "network_categories",
)  # fmt: skip
#: Small enough for a minute on two cores and a thousand trials; width and rate as in configs/phantom_eeg_average.yaml.
_NETWORK: dict[str, Any] = {
    "kind": "network", "network": {"kind": "eegproject", "width": 256}, "optimiser": {"lr": 3e-4}, "epochs": 20,
    "selection": {"kind": "last", "hold_out": 0},
}  # fmt: skip
_GAUSSIAN: dict[str, Any] = {"kind": "linear_gaussian", "n_components": 32, "n_times": 6, "misfit": 0.25}
#: The lists that a word stands for, the simplest first.
LISTS: dict[str, tuple[dict[str, Any], ...]] = {
    "images": (
        {"kind": "ridge"}, _GAUSSIAN, _NETWORK, {"kind": "average", "members": [{"kind": "ridge"}, _NETWORK]},
    ),
    "classes": ({"kind": "lda"}, {"kind": "logistic"}),
}  # fmt: skip


class AutoConfig(EncoderSettings):
    """The best of a few encoders, chosen in inner folds of the training trials within a limit of time.

    Parameters
    ----------
    candidates
        The encoders in the order in which they are tried, the simplest first: a list, or the word ``images`` (ridge, a
        linear Gaussian model, a small network, and the average of ridge and network) or ``classes`` (lda, logistic).
        The list that a word stands for is kept with the run.
    budget
        Seconds for all inner folds and the last fit. The first candidate is always tried; each other one is fitted in
        the first inner fold, and left out if the rest would take longer than the remaining time. Which are left out
        depends on the machine and is in the report; None tries all candidates on every machine.
    n_inner_folds
        Folds of the training trials; fewer if a fold would have fewer than two images.
    """

    kind: Literal["auto"] = "auto"
    candidates: (
        tuple[Annotated[Any, Component("encoder", only=CANDIDATES)], ...] | Literal["images", "classes"]
    ) = Field(default=LISTS["images"], min_length=1)
    budget: float | None = Field(default=300, gt=0)
    n_inner_folds: int = Field(default=5, ge=2)

    @field_validator("candidates", mode="before")
    @classmethod
    def _read_word(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in LISTS:
            raise ValueError(
                f"{value!r} is not a list of encoders; use images, classes, or a list of encoders"
            )
        return LISTS[value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_candidates(self) -> AutoConfig:
        every = self.list_members()
        for name, what in (("decodes_categories", "name classes"), ("pools_volumes", "pool volumes")):
            if len({bool(getattr(one, name)) for one in every}) > 1:
                raise ValueError(f"candidates: some {what} and others do not, so they cannot be compared")
        for number, one in enumerate(every):
            unmet = [key for key in ("reads_text", "uses_pretraining", "trains_prior") if getattr(one, key)]
            if unmet:
                raise ValueError(
                    f"candidates[{number}] has {unmet[0]}, which auto does not support; train this encoder alone"
                )
        return self

    def list_members(self) -> Sequence[Any]:
        """Return the settings of the candidates."""
        return [roles.complete(EncoderSettings, candidate) for candidate in self.candidates]

    @property
    def decodes_categories(self) -> bool:  # type: ignore[override]
        """Whether the candidates decode classes."""
        return bool(self.list_members()[0].decodes_categories)

    @property
    def pools_volumes(self) -> bool:
        """Whether the candidates combine the decisions of the volumes of a trial."""
        return bool(self.list_members()[0].pools_volumes)

    @property
    def may_know_likelihood(self) -> bool:  # type: ignore[override]
        """Whether every candidate may give the likelihood of images."""
        return all(one.may_know_likelihood for one in self.list_members())

    @property
    def writes_captions(self) -> bool:  # type: ignore[override]
        """Whether every candidate learns to write captions."""
        return all(one.writes_captions for one in self.list_members())

    def build(self, *, seed: int) -> AutoEncoder:
        """Return the unfitted encoder."""
        return AutoEncoder(self, roles.build(_find_role(self), self.candidates[0], seed=seed), seed=seed)

    def read(self, folder: Path) -> AutoEncoder:
        """Return the fitted encoder that was written into `folder`."""
        record = read_json(folder / FILE)
        winner = roles.read(_find_role(self), self.candidates[record["chosen"]], folder)
        return AutoEncoder(self, winner, seed=record["seed"], record=record)


def _find_role(settings: Any) -> type[Any]:
    return roles.find_encoder_role(settings)


class AutoEncoder(roles.Completed):
    """The chosen encoder with the record of the choice; all methods are those of the winner, `component`.

    It stands for a brain encoder or a category decoder. Its files are those of the winner and ``auto.json``.
    """

    #: Labels of whole subjects are not exchanged with a choice for each exchange, which would take too long.
    n_small_fits = 0

    def __init__(
        self, config: AutoConfig, component: Any, *, seed: int = 0, record: dict[str, Any] | None = None
    ) -> None:
        super().__init__(component, _find_role(config))
        self.config, self.seed, self.record, self._context = config, seed, record, NOTHING_LENT

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "component":
            raise AttributeError(name)  # asked by copy and pickle before there is a component
        return getattr(self.component, name)

    def bind(self, context: Context) -> None:
        """Take the context of the pipeline, for the candidates and the winner."""
        self._context = context
        self.component.bind(context)

    def fit(self, responses: Responses, targets: Any) -> AutoEncoder:
        """Choose by inner folds of these trials, and fit the winner on all of them.

        Parameters
        ----------
        responses
            Training trials.
        targets
            One embedding, or one name of a class, per trial.

        Raises
        ------
        DataError
            If fewer than four images were shown, or no candidate can be fitted to these trials.
        """
        for candidate in self.config.candidates:  # loads libraries, which is no time of the first candidate
            roles.build(_find_role(self.config), candidate, seed=self.seed)
        started = time.perf_counter()
        folds = self._make_folds(responses, targets)
        tried = self._try_candidates(folds, responses, targets)
        record = choose_candidate(tried)
        # With the seed of a run that names the winner itself, which gives the same fit.
        winner = self._build(record["chosen"], "winner")
        winner.fit(responses, targets)
        self.component = winner
        self.record = {
            **record, "unit": "trials" if self.config.decodes_categories else "images", "n_folds": len(folds),
            "seed": self.seed, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        return self

    def write(self, folder: Path) -> None:
        """Write the winner, and the record of the choice beside it."""
        if self.record is None:
            raise DataError("no encoder has been chosen yet; run train first.")
        self.component.write(folder)
        write_json(folder / FILE, self.record)

    def map_labels(self, training: Responses, test: Responses, images: Sequence[str]) -> None:
        """Return None: predictions are not linear in the targets, which decide who wins."""

    @property
    def adaptation(self) -> FewTrialAdaptation | None:
        """That of the winner, with the record beside what was adapted."""
        if (own := self.component.adaptation) is None:
            return None

        def keep(adapt: Any) -> Any:
            if adapt is None:
                return None
            return lambda responses, targets: AutoEncoder(
                self.config, adapt(responses, targets), seed=self.seed, record=self.record
            )

        return FewTrialAdaptation(keep(own.adapt), own.is_quick, keep(own.adapt_subject))

    def _build(self, number: int, part: str) -> Any:
        encoder = roles.build(_find_role(self.config), self.config.candidates[number], seed=self.seed)
        encoder.bind(self._context.take_part(part))
        return encoder

    def _make_folds(self, responses: Responses, targets: Any) -> list[Fold]:
        if self.config.decodes_categories:
            labels = np.asarray(targets).astype(str)
            return make_label_folds(
                labels, responses.trials, self.config.n_inner_folds, pool=self.config.pools_volumes
            )
        n_images = len(np.unique(responses.stimulus_ids[~responses.is_synthetic].astype(str)))
        if n_images < 4:
            raise DataError(
                "the encoder auto needs at least four training images for its inner folds, but these "
                f"trials show {n_images}; set encoder.kind to ridge."
            )
        folds = make_inner_folds(
            responses.stimulus_ids, n_folds=min(self.config.n_inner_folds, n_images // 2),
            generator=make_generator(self.seed, "auto", "inner_folds"), always=responses.is_synthetic,
        )  # fmt: skip
        shown = responses.trials.assign(image=responses.stimulus_ids.astype(str))[["subject", "image"]]
        if not any(shown.iloc[fold.test].drop_duplicates()["subject"].duplicated().any() for fold in folds):
            raise DataError(
                "the encoder auto compares images of one subject, and no inner fold leaves out two of the same "
                "subject; give more trials of each subject, or set encoder.kind to ridge."
            )
        return folds

    def _try_candidates(self, folds: list[Fold], responses: Responses, targets: Any) -> list[dict[str, Any]]:
        """Return for each candidate the score of every unit, or the reason why there is none, and the seconds."""
        context, known = self._context, None
        kept = None if context.checkpoints is None else context.checkpoints / FILE
        with suppress(OSError, ValueError):  # none yet, or cut short
            known = None if context.earlier is None else read_json(context.earlier / FILE)["candidates"]
        tried: list[dict[str, Any]] = []
        with suppress(OSError, ValueError):
            tried = [] if kept is None else read_json(kept)
        for number, candidate in enumerate(self.config.list_members()[len(tried) :], start=len(tried)):
            entry: dict[str, Any] = {"kind": str(candidate.kind), "scores": None, "left_out": "", "by": ""}
            if known is not None:
                budget = 0.0 if known[number]["by"] == "budget" else None
            else:
                budget = self.config.budget if number else None
            spent = sum(one["seconds"] for one in tried)
            started = time.perf_counter()
            try:
                entry |= self._score_candidate(number, folds, responses, targets, budget, spent)
            except BraindecodeVisError as error:
                # What a candidate calls a setting of the encoder is one of its own.
                said = re.sub(r"\bencoder\.(?=[a-z])", f"encoder.candidates.{number}.", str(error))
                entry |= {"left_out": said, "by": "data"}
            entry["seconds"] = time.perf_counter() - started
            if known is not None and entry["by"] == "budget":
                entry["left_out"] = known[number]["left_out"]
            tried.append(entry)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, tried)
        return tried

    def _score_candidate(
        self, number: int, folds: list[Fold], responses: Responses, targets: Any, budget: float | None, spent: float
    ) -> dict[str, Any]:  # fmt: skip
        """Return the scores of a candidate in the order of units, or the reason why the budget is too small."""
        import pandas as pd

        if budget is not None and spent >= budget:
            return {"by": "budget", "left_out": f"the budget of {budget:g} s was spent"}
        started, found = time.perf_counter(), []
        for place, fold in enumerate(folds):
            encoder = self._build(number, f"candidate{number + 1}_fold{place + 1}")
            encoder.fit(responses.select(fold.train), _take(targets, fold.train))
            if self.config.decodes_categories:
                found.append(_score_classes(encoder, responses, targets, fold, self.config.pools_volumes))
            else:
                found.append(_score_images(encoder, responses, targets, fold))
            took = time.perf_counter() - started
            # The other folds and the last fit take as long again, one by one.
            if not place and budget is not None and spent + took * (len(folds) + 1) > budget:
                asked = f"{took * (len(folds) + 1):.3g} s of the remaining {max(budget - spent, 0):.3g} s"
                return {"by": "budget", "left_out": f"it would have taken about {asked}"}
        # Images come in another order in each fold, and each image in one.
        values = pd.concat(found) if found else pd.Series(dtype=float)
        return {"scores": values.sort_index().tolist()}


def _take(targets: Any, rows: np.ndarray) -> Any:
    if isinstance(targets, Embeddings):
        return targets.take(rows)
    return np.asarray(targets)[rows]


def _score_images(encoder: Any, responses: Responses, targets: Embeddings, fold: Fold) -> pd.Series:
    """Return the two-way identification of each left-out image (mean over its trials), by its id."""
    import pandas as pd

    from braindecode_vis.scoring.retrieval import compute_k_way_hits, compute_ranks, fit_centre

    subjects = responses.trials["subject"].astype(str).to_numpy()
    hits = []
    for subject in np.unique(subjects[fold.test]):
        rows = fold.test[subjects[fold.test] == subject]
        trained, images = (
            _take(targets, part[np.unique(targets.ids[part].astype(str), return_index=True)[1]])
            for part in (fold.train, rows)
        )
        if len(images) < 2:
            continue  # nothing to mistake it for
        own = subject if encoder.has_subject_galleries else None
        centre = fit_centre(encoder.map_targets(trained, own), "mean")
        found = compute_ranks(
            centre.apply(encoder.predict(responses.select(rows))), centre.apply(encoder.map_targets(images, own)),
            device="cpu",
        )  # fmt: skip
        hits.append(pd.Series(compute_k_way_hits(found, 2), index=found.query_ids.astype(str)))
    # Other folds may leave out several images of one subject where this one does not.
    every = pd.concat(hits) if hits else pd.Series(dtype=float)
    return every.groupby(level=0).mean()


def _score_classes(decoder: Any, responses: Responses, labels: Any, fold: Fold, pools: bool) -> pd.Series:
    """Return 1 for each left-out trial whose class is decoded correctly and 0 for the others, by row."""
    import pandas as pd

    held = responses.select(fold.test)
    named = np.asarray(decoder.classes)[decoder.decision(held).argmax(axis=1)]
    right = pd.Series((named == np.asarray(labels).astype(str)[fold.test]).astype(float), index=fold.test)
    # All volumes of a trial have one decision.
    return right.iloc[find_first_rows(held.trials)] if pools else right


def choose_candidate(tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the winner and the record of each candidate.

    Parameters
    ----------
    tried
        Of each candidate its ``kind``, ``seconds``, and ``scores`` of the same units in the same order; None where
        there are none, and ``left_out`` says why.

    Returns
    -------
    dict
        ``chosen``, the number of the winner; ``n_units``; and ``candidates``: their mean with its 95 % interval over
        units, how far they are ``behind`` the best mean, and the standard error of that difference.

    Raises
    ------
    DataError
        If no candidate has scores.

    Examples
    --------
    >>> weak, good, best = [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    >>> tried = [{"kind": "any", "scores": scores, "left_out": ""} for scores in (weak, good, best)]
    >>> choose_candidate(tried)["chosen"]
    1
    """
    from braindecode_vis.scoring.uncertainty import bootstrap_interval

    known = {number: np.array(one["scores"]) for number, one in enumerate(tried) if one["scores"] is not None}
    if not known:
        raise DataError(
            f"no candidate of the encoder auto can be fitted; {tried[0]['kind']}: {tried[0]['left_out']}"
        )
    n = len(next(iter(known.values())))
    candidates = [{key: value for key, value in one.items() if key != "scores"} for one in tried]
    if n < 2:  # no fold, as where subjects of one class each are too few to leave some out
        return {"chosen": find_winner(candidates), "n_units": n, "candidates": candidates}
    best = max(known, key=lambda number: (known[number].mean(), -number))
    for number, scores in known.items():
        lost, interval = known[best] - scores, bootstrap_interval(scores)
        candidates[number] |= {
            "mean": float(scores.mean()), "ci_low": interval.low, "ci_high": interval.high,
            "behind": float(lost.mean()), "standard_error": float(lost.std(ddof=1) / np.sqrt(n)),
        }  # fmt: skip
    return {"chosen": find_winner(candidates), "n_units": n, "candidates": candidates}


def find_winner(candidates: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of the first candidate that is behind the best by one standard error at the most.

    Without scores, as where no fold could be left out, it is the first that was not left out.
    """
    scored = any("behind" in one for one in candidates)
    return next(
        number
        for number, one in enumerate(candidates)
        if (one["behind"] <= one["standard_error"] if "behind" in one else not scored and not one["left_out"])
    )
