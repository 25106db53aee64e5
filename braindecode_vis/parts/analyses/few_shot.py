"""Accuracy for a new subject against minutes (and trials) of its data, for several ways to use other subjects.

Owns the few-shot curves. Each subject of the test stands for a new one in turn: some of its training trials are drawn,
and its test trials are decoded by an encoder that saw these alone, or these beside all training trials of the others.
The test trials and their images are those of the run's split; nothing is chosen by them.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207 (fine-tuning on the first hour of a new subject); Ferrante et al.
(2024), arXiv:2309.00627 (alignment of subjects for decoding); Yu et al. (2026), arXiv:2604.08537 (in context).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, TypeAdapter, model_validator

from braindecode_vis.base.arrays import Responses, Score, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Analysis, BrainEncoder, find_class
from braindecode_vis.base.locks import BeingMade
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.roles import build
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.analyses.measure import (
    FoldValues,
    Measured,
    Meter,
    RetrievalMetric,
    add_holm,
    average_draws,
    check_retrieval,
    describe_result,
    find_best,
    measure_once,
    pick_limits,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study
from braindecode_vis.preprocessing.common_space import COMMON_SPACES, SubjectAlignment, name_alignment
from braindecode_vis.report.drawing import mark_chance
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.training.pretraining_config import ON_GUIDED_TRIALS, ON_TRAINING_TRIALS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal[
    "scratch", "anatomical", "procrustes", "hyperalignment", "shared_response", "functional_pca", "fine_tuned",
    "in_context",
]  # fmt: skip


class FewShotConfig(Analysis):
    """Decode a new subject from few of its training trials.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    methods
        ``scratch``: the encoder is trained on the new subject's trials alone. ``anatomical``: on those of all subjects
        together, in features that correspond between subjects (parcels, sensors); with 0 trials this is zero-shot.
        ``procrustes``, ``hyperalignment``, ``shared_response``, ``functional_pca``: from those of all subjects in a
        common space (see `SubjectAlignment`). ``fine_tuned``: an encoder of the others, with the settings of the run,
        is trained further on the new subject's trials: only weights of its own if the network has any for each subject
        (the layer of MindEye2's shared_space, the codes of voxel_clusters), else all weights. ``in_context``: the
        encoder `in_context` of the others reads the new subject's trials as its context (BrainCoDec); nothing is
        trained on them. Methods that an encoder or the data do not allow are left out and named.
    numbers
        Numbers of trials of the new subject; empty takes 0, a sixteenth, a quarter and all. Numbers that some subject
        does not have are left out; 0 is only for ``anatomical`` and ``in_context``, in features that correspond.
    trial_seconds
        Seconds of recording per trial. None takes them from the column `onset` of the trial table, including breaks
        within a run; without this column there are no minutes.
    """

    kind: Literal["few_shot"] = "few_shot"
    metric: RetrievalMetric = "two_way"
    methods: tuple[Method, ...] = Field(
        default=("scratch", "anatomical", "procrustes", "hyperalignment", "fine_tuned"), min_length=1
    )
    numbers: tuple[int, ...] = ()
    trial_seconds: float | None = Field(default=None, gt=0)

    #: Dimensions of the common spaces; one that the run itself sets up keeps its own settings.
    n_components: ClassVar[int] = 100
    #: Random choices of these trials per number.
    n_draws: ClassVar[int] = 3
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_components", "n_draws"})

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if any(n < 0 for n in self.numbers):
            raise ValueError(f"numbers are counts of trials, but one is {min(self.numbers)}")
        return self

    def compute(self, study: Study) -> Findings:
        """Draw trials, fit and rank."""
        check_retrieval(study, self.kind)
        if study.choose(0, None) is not None:
            raise ConfigError(
                "few_shot fits on parts of the training trials, but selection.reliability and "
                "selection.encoding use all of them; run it without (--set selection.reliability=null --set "
                "selection.encoding=null)."
            )
        newcomers = list(_list_newcomers(study))
        _check_pretraining(study, newcomers)
        most = min(len(one.own) for one in newcomers)
        numbers = sorted({n for n in self.numbers if n <= most} or {0, most // 16, most // 4, most})
        if self.numbers and min(self.numbers) > most:
            raise ConfigError(
                f"few_shot.numbers are {', '.join(map(str, self.numbers))}, but one subject has {most} training trials "
                "of images that are not tested; choose smaller ones."
            )
        conditions = [
            (method, n)
            for method in dict.fromkeys(self.methods)
            for n in numbers
            if n or method in ("anatomical", "in_context")
        ]
        if not conditions:
            raise ConfigError(
                "few_shot.numbers has only 0, which needs the method anatomical or in_context; add one of them, "
                "or other numbers."
            )
        seconds = self.trial_seconds or find_trial_seconds(study.responses.trials)
        meter, measured = Meter(study, self.metric), dict[tuple[str, int], Measured]()
        left_out = {f"{n} trials": f"one subject has {most}." for n in sorted(self.numbers) if n > most}
        bases: dict[tuple[str, int, str], Any] = {}
        with study.progress("few-shot", len(conditions)) as advance:
            for method, n in conditions:
                try:
                    measured[method, n] = self._measure(study, meter, newcomers, method, n, bases)
                except BeingMade:
                    raise
                except (ConfigError, DataError) as error:
                    left_out.setdefault(f"{method} with {n} trials", str(error))
                advance(1)
        if not measured:
            raise DataError(
                f"no method for a new subject works with this run: {next(iter(left_out.values()))}"
            )
        rows = [
            {
                "method": method, "trials": n, "minutes": n * seconds / 60,
                "protocol": self._name_protocol(study, method, n), "n_draws": self._count_draws(n, newcomers),
                **found.as_row(study), **_compare(study, measured.get(("scratch", n)), found),
            }
            for (method, n), found in measured.items()
        ]  # fmt: skip
        return self._report(study, add_holm(pd.DataFrame(rows), "trials"), newcomers, left_out)

    def _count_draws(self, n: int, newcomers: Sequence[Newcomer]) -> int:
        # All trials can be drawn in one way only, and none too.
        return 1 if n == 0 or all(len(one.own) == n for one in newcomers) else self.n_draws

    def _measure(
        self,
        study: Study,
        meter: Meter,
        newcomers: Sequence[Newcomer],
        method: str,
        n: int,
        bases: dict[tuple[str, int, str], Any],
    ) -> Measured:
        draws, n_elsewhere = [], 0
        for draw in range(self._count_draws(n, newcomers)):
            parts: list[FoldValues] = []
            for one in newcomers:

                def fit(one: Newcomer = one, draw: int = draw) -> Any:
                    generator = make_generator(study.seed, "few_shot", draw, one.fold, one.subject)
                    # The first of one order, so that more trials include the fewer.
                    own = np.sort(generator.permutation(one.own)[:n])
                    return self._fit(study, method, one, own, bases)

                name = f"few_shot {method}, {n}, {draw}, fold {one.fold}, {one.subject}"
                found = measure_once(study, meter, name, one.fold, [study.pick(one.test, "test")], fit)
                if found is None:
                    n_elsewhere += 1
                else:
                    parts += found
            if not n_elsewhere:
                draws.append(meter.join(parts))
        if n_elsewhere:
            raise BeingMade(f"{n_elsewhere} fits of few_shot are being made by other processes")
        return average_draws(draws)

    def _fit(
        self,
        study: Study,
        method: str,
        one: Newcomer,
        own: np.ndarray,
        bases: dict[tuple[str, int, str], Any],
    ) -> Any:
        """Return an encoder for one new subject, of whom `own` are the trials that it gives."""
        if method == "anatomical" and count_own_voxels(study.responses):
            raise DataError(
                "every subject has different voxels, so features do not correspond between subjects; "
                "average over the regions of an atlas (dataset.atlas)."
            )
        encoder = study.build(one.fold)
        bank = study.banks[one.fold]
        if method in ("fine_tuned", "in_context"):
            key = (method, one.fold, one.subject)
            if key not in bases:
                if method == "in_context":
                    usual = build(
                        BrainEncoder, validate_component("encoder", {"kind": method}), seed=study.seed
                    )
                    # That of the run keeps its own settings.
                    encoder = encoder if isinstance(encoder, type(usual)) else usual
                others = study.pick(one.others, "train")
                encoder.fit(others, bank.select(list(others.stimulus_ids)))
                bases[key] = encoder
            if not len(own):
                return bases[key]
            trials = study.pick(own, "train")
            return adapt(bases[key], trials, bank.select(list(trials.stimulus_ids)))
        alignment: Any = "none"
        if method in COMMON_SPACES:
            alignment = {"kind": method, "n_components": self.n_components}
        set_alignment(encoder, alignment)
        rows = own if method == "scratch" else np.sort(np.concatenate([one.others, own]).astype(int))
        trials = study.pick(rows, "train")
        encoder.fit(trials, bank.select(list(trials.stimulus_ids)))
        return encoder

    def _name_protocol(self, study: Study, method: str, n: int) -> str:
        if method == "scratch":
            words = f"{n} training trials of the subject alone"
        elif n == 0:
            words = "zero-shot: no trial of the subject, features in common with the others"
        elif method == "anatomical":
            words = f"few-shot: training trials of the others and {n} of the subject, features in common"
        elif method == "in_context":
            words = f"few-shot: in-context decoding learnt on the others, {n} training trials of the subject as context"
        elif method == "fine_tuned":
            words = f"few-shot: encoder of the others, fine-tuned on {n} training trials of the subject"
        else:
            words = f"few-shot: {method} of all by training images, {n} training trials of the subject"
        return f"{study.protocol_of_refits}; {words}"

    def _report(
        self, study: Study, table: pd.DataFrame, newcomers: Sequence[Newcomer], left_out: dict[str, str]
    ) -> Findings:
        subjects = sorted({one.subject for one in newcomers})
        has_minutes = bool(table["minutes"].notna().all())
        least, most = table.loc[table["trials"] > 0, "trials"].min(), table["trials"].max()
        sentences = [
            f"Each of {len(subjects)} subjects was treated as a new one: an encoder was trained on some "
            "of its training trials, drawn at random, alone or together with those of the others, and "
            "decoded its test trials."
        ]
        for n in dict.fromkeys([0, least, most]):
            part = table[table["trials"] == n]
            if len(part):
                best = find_best(part)
                time = f", {best['minutes']:.3g} minutes" if has_minutes and n else ""
                sentences.append(
                    f"With {n:.0f} trials of it{time}, {best['method']} was best: "
                    f"{describe_result(best, self.metric, 'p_holm')}."
                )
        sentences += [f"Left out: {what}: {why}" for what, why in left_out.items()]
        sentences.append(
            "The best of several methods is chosen on the test trials (p by Holm over them); to use a "
            "method elsewhere, choose it on other data."
        )
        found = " ".join(sentences)
        x = "minutes" if has_minutes else "trials"

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            mark_chance(axes, float(table["chance"].iloc[0]))
            colours = ["C0", "C1", "C3", "C4", "C5", "C6", "C7", "C8"]
            for number, (method, rows) in enumerate(table.groupby("method", sort=False)):
                colour = colours[number]
                zero = rows[rows["trials"] == 0]
                for value in zero["value"]:
                    axes.axhline(float(value), color=colour, lw=1, ls=":", label=f"{method}, zero-shot")
                rows = rows[rows["trials"] > 0].sort_values("trials")
                if len(rows):
                    value = rows["value"].to_numpy(float)
                    low, high = (np.abs(rows[name].to_numpy(float) - value) for name in ("ci_low", "ci_high"))
                    # Bars side by side and not bands: those of several methods would cover each other.
                    axes.errorbar(
                        rows[x] * 1.02**number, value, yerr=(low, high), color=colour, label=str(method),
                        marker="o", ms=4, lw=1.6, elinewidth=0.8,
                    )  # fmt: skip
            axes.set_xlabel(
                "minutes of data of the new subject" if has_minutes else "training trials of the new subject"
            )
            if (table["trials"] > 0).any():
                axes.set_xscale("log")
                places = sorted(set(table.loc[table["trials"] > 0, x]))
                axes.set_xticks(places, [f"{place:.3g}" for place in places])
                axes.minorticks_off()
            axes.set_ylabel(find_metric(self.metric).label)
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")

        caption = (
            f"{self.metric} of a new subject against the amount of its training data, mean over subjects "
            "and draws, with 95 % intervals. Dotted: no trial of the subject. Dashed: chance."
        )
        scores = tuple(
            Score(
                method="decoded", metric=f"{self.metric}@few_shot_{row['method']}_{row['trials']}",
                value=float(row["value"]), chance=float(row["chance"]), n_queries=int(row["n"]),
                protocol=row["protocol"], subject="all", split="test", seed=study.seed, **pick_limits(row),
            )
            for row in table.to_dict("records")
        )  # fmt: skip
        return Findings(
            "A new subject", found, table, (Plot("few_shot", caption, found, draw, size=(8.0, 3.8)),), scores
        )


@dataclass(frozen=True)
class Newcomer:
    """One subject of one fold that stands for a new one.

    Parameters
    ----------
    fold
        Number of the fold.
    subject
        Its name.
    others, own, test
        Rows of the others' training trials, of its own training trials, and of its test trials.
    """

    fold: int
    subject: str
    others: np.ndarray
    own: np.ndarray
    test: np.ndarray


def _list_newcomers(study: Study) -> Iterator[Newcomer]:
    trials = study.responses.trials
    names, ids = trials["subject"].astype(str).to_numpy(dtype=object), study.responses.stimulus_ids
    learnt = np.unique(np.concatenate([fold.train for fold in study.folds]))
    for number, fold in enumerate(study.folds):
        for subject in dict.fromkeys(names[fold.test].tolist()):
            others, own = fold.train[names[fold.train] != subject], fold.train[names[fold.train] == subject]
            if not len(others):
                raise DataError(
                    f"few_shot needs training trials of other subjects than {subject}; read several "
                    "(dataset.subjects), with a split over all of them (split.kind published or leave_one_subject_out)."
                )
            # Where subjects are left out, their training trials are those that other folds learn from.
            candidates = learnt[names[learnt] == subject] if not _covers(study, number, subject) else own
            own = candidates[~np.isin(ids[candidates], np.unique(ids[fold.test].astype(str)))]
            if not len(own):
                raise DataError(
                    f"subject {subject} has no training trial of an image that its fold does not test."
                )
            yield Newcomer(number, subject, others, own, fold.test[names[fold.test] == subject])


def _check_pretraining(study: Study, newcomers: Sequence[Newcomer]) -> None:
    """Refuse an encoder that the run pretrained on trials of who shall be new to it."""
    seen = sorted({o.subject for o in newcomers if np.isin(o.own, study.folds[o.fold].train).any()})
    if seen and any(words in study.protocol for words in (ON_TRAINING_TRIALS, ON_GUIDED_TRIALS)):
        raise ConfigError(
            f"few_shot treats {', '.join(seen)} as new subjects, but this run pretrains its encoder on "
            "their training trials; use split.kind leave_one_subject_out without own_trials, or a corpus "
            "(pretrain.corpus)."
        )


def _covers(study: Study, number: int, subject: str) -> bool:
    """Say whether the split gives a fold all training trials of a subject, rather than none or a few."""
    names = study.responses.trials["subject"].astype(str).to_numpy(dtype=object)
    counts = [int((names[fold.train] == subject).sum()) for fold in study.folds]
    return 2 * counts[number] >= max(counts)


def set_alignment(encoder: Any, alignment: Any) -> None:
    """Give an unfitted encoder another alignment of subjects, unless it has one of that kind already.

    Of an average, each member gets it.

    Raises
    ------
    ConfigError
        If the encoder has no such setting.
    """
    own = getattr(encoder, "component", encoder)
    if members := getattr(own, "members", ()):
        for member in members:
            set_alignment(member, alignment)
        return
    config = getattr(own, "config", None)
    if config is None or "subject_alignment" not in type(config).model_fields:
        if name_alignment(alignment) == "none":
            return
        raise ConfigError(
            f"the encoder {type(own).__name__} has no setting subject_alignment; ridge and networks have."
        )
    if name_alignment(config.subject_alignment) != name_alignment(alignment):
        chosen = TypeAdapter(SubjectAlignment).validate_python(alignment)
        own.config = config.model_copy(update={"subject_alignment": chosen})


def adapt(encoder: Any, trials: Responses, targets: Any) -> Any:
    """Return an encoder that goes on learning, by the new subject's own weights alone where there are such."""
    ability = encoder.adaptation
    if ability is None:
        raise ConfigError(
            f"{find_class(encoder).__name__} cannot be adapted to a few trials (it has no property "
            "adaptation); ridge and networks can."
        )
    if ability.adapt_subject is not None:
        try:
            return ability.adapt_subject(trials, targets)
        except ConfigError:  # it has no weights of single subjects
            pass
    return ability.adapt(trials, targets)


def find_trial_seconds(trials: pd.DataFrame) -> float:
    """Return the seconds of recording per trial, by the onsets (s) within runs; NaN where the table has none.

    Examples
    --------
    >>> find_trial_seconds(pd.DataFrame({"subject": "01", "session": "01", "run": "01", "onset": [3.0, 5.0, 7.0]}))
    2.0
    """
    if "onset" not in trials:
        return float("nan")
    runs = trials.groupby(["subject", "session", "run"], sort=False)["onset"]
    spans, counts = runs.max() - runs.min(), runs.size() - 1
    several = counts > 0
    return float(spans[several].sum() / counts[several].sum()) if several.any() else float("nan")


def _compare(study: Study, scratch: Measured | None, found: Measured) -> dict[str, Any]:
    """Return the difference to learning from the subject's own trials alone; missing where that was not measured."""
    if scratch is None:
        lacking = dict.fromkeys(("difference", "difference_low", "difference_high", "p_difference"), np.nan)
        return lacking | {"difference_resampled": ""}
    return found.as_difference(study, scratch)
