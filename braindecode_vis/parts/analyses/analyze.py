"""Run the analyses of a configuration, each into an artifact of its own: a table, figures, files and a paragraph.

Owns the `Study` that analyses work on and the files that they leave for the report; computes nothing itself.

A run's `selection` reaches analyses in two halves. Names (regions, networks, channels) look at no response, so they
narrow all trials before an analysis begins. Ranks (reliability, encoding score) are fitted on training trials, so each
cut of an analysis fits them again on its own, and an encoder of the run keeps those that it was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis import pipeline
from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.base.contracts import Analysis, BrainEncoder
from braindecode_vis.base.locks import BeingMade
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.stimuli import Images
from braindecode_vis.config.models import choose_analyses
from braindecode_vis.generation.captions import write_with_encoder
from braindecode_vis.parts.analyses.study import (
    Change,
    ChoosingEncoder,
    Findings,
    Study,
    choose_features,
    fit_picked,
)
from braindecode_vis.pipeline.categories import build_decoder
from braindecode_vis.pipeline.decoding import find_untested
from braindecode_vis.pipeline.preparing import build_encoder, name_pretraining, pick_labelled_trials
from braindecode_vis.pipeline.runs import STAGE_VERSIONS, Run, lend_context, name_workspace
from braindecode_vis.pipeline.scoring import describe_gallery, describe_protocol, find_clip_texts
from braindecode_vis.pipeline.synthetic import hash_settings
from braindecode_vis.pipeline.together import check_worker, order_work
from braindecode_vis.preprocessing.array_file import KeptParts
from braindecode_vis.preprocessing.selection import (
    Selection,
    SelectionConfig,
    average_repetitions,
    fit_selection,
)
from braindecode_vis.scoring.units import make_labels


def analyze(run: Run, kinds: Sequence[str] = ()) -> tuple[list[store.Artifact], dict[str, str]]:
    """Run the named analyses, or those of the configuration; if one is not possible, the others still run.

    Parameters
    ----------
    run
        The run; its earlier stages are computed where they are missing.
    kinds
        Kinds of analyses. One that the configuration sets up is run with these settings, another with its
        defaults.

    Returns
    -------
    artifacts
        Those of the analyses that worked.
    refusals
        Kind of analysis to the sentence that says why it does not fit this run.

    Raises
    ------
    ConfigError
        If no analysis is named anywhere, or a name is unknown.
    """
    chosen = choose_analyses(run.config, kinds)
    study = make_study(run)
    artifacts: list[store.Artifact] = []
    refusals: dict[str, str] = {}
    for number, config in enumerate(chosen):
        try:
            artifacts.append(analyze_one(run, study, config, number))
        # Only what was foreseen: any other exception is an error of the program and is shown.
        except BraindecodeVisError as error:
            refusals[config.kind] = str(error)
    return artifacts, refusals


def analyze_in_run(run: Run) -> None:
    """Make the analyses of a configuration that asks for them with the run; one that does not fit is only reported.

    The report takes up what they found.
    """
    if run.config.run_analyses:
        for kind, text in analyze(run)[1].items():
            run.tell(f"the analysis {kind} does not fit this run: {text}", "analyze:")


def analyze_share(run: Run, kinds: Sequence[str], worker: int, n_workers: int) -> int:
    """Make the fits of analyses that no other process makes, and each analysis of which nothing is missing then.

    Parameters
    ----------
    run
        The run; its folder is shared by all processes, and not held.
    kinds
        As for `analyze`.
    worker, n_workers
        Number of this process, from 0, and of all; each begins with another analysis.

    Returns
    -------
    int
        Analyses that are left to other processes.
    """
    check_worker(worker, n_workers)
    chosen = choose_analyses(run.config, kinds)
    shared = replace(run, passes_by=frozenset({"analyze"}))
    study, n_left = make_study(shared), 0
    for number in order_work(len(chosen), worker, n_workers):
        try:
            analyze_one(shared, study, chosen[number], number)
        except BeingMade:
            n_left += 1
        except BraindecodeVisError as error:  # whoever finishes says so too
            run.tell(f"{chosen[number].kind}: {error}", "analyze:")
    return n_left


def make_study(run: Run) -> Study:
    """Return trials, targets and encoders of a run as analyses ask for them."""
    config, prepared = run.config, pipeline.preprocess(run)
    banks = [] if config.decodes_categories else pipeline.embed(run)
    chosen = ChosenFeatures(run)

    def pick(rows: np.ndarray, part: str) -> Any:
        repeats = config.repeats.train if part == "train" else config.repeats.test
        return chosen.narrow(pick_labelled_trials(prepared, rows, repeats))

    if config.decodes_categories:
        protocol = f"{config.dataset.kind}; {prepared.split.protocol}"
    else:
        protocol = describe_protocol(run, prepared, describe_gallery(run))
    folds = prepared.split.folds if config.decodes_categories else prepared.folds
    imagined = () if config.decodes_categories else prepared.imagined
    # An empty array of rows may be of floats, which cannot index.
    tested = np.concatenate([*(fold.test for fold in folds), *imagined]).astype(int)
    units = make_labels(
        prepared.responses.trials.iloc[tested], config.evaluation.resample,
        averaged=not config.decodes_categories and config.repeats.test == "averaged",
    )  # fmt: skip
    return Study(
        responses=chosen.narrow(prepared.responses),
        stimuli=prepared.stimuli,
        folds=folds,
        imagined=imagined,
        unit=units[0] if units else "trial" if config.decodes_categories else "image",
        label=None if units is None else units[1],
        banks=[bank.embeddings for bank in banks],
        pick=pick,
        build=lambda number: (
            build_decoder(run, number) if config.decodes_categories else build_encoder(run, number)
        ),
        trained=chosen.find_trained,
        choose=chosen.choose,
        pools_volumes=config.decodes_categories and run.encoder.pools_volumes,
        centre=config.retrieval.centre,
        protocol=protocol,
        seed=config.seed,
        n_bootstrap=config.evaluation.n_bootstrap,
        n_permutations=config.evaluation.n_permutations,
        spaces={bank.embeddings.space: bank.embeddings for bank in banks},
        progress=run.listener.progress,
        fit_seconds=_find_fit_seconds(run),
        tell=partial(run.tell, about="analyze:"),
        only_trained="" if config.synthetic is None else config.synthetic.describe(),
        embed_texts=find_clip_texts(run),
        reconstruct=None if config.decodes_categories else partial(_reconstruct_trials, run),
        reconstruct_changed=None if config.decodes_categories else partial(_reconstruct_changed, run),
    )


def _reconstruct_trials(run: Run, number: int, rows: np.ndarray) -> tuple[Images, np.ndarray]:
    """Return the first image that the run's fits make of the mean of the trials of each stimulus, and its name."""
    from braindecode_vis.pipeline.predicting import decode_trials

    pipeline.reconstruct(run)
    trials = average_repetitions(pipeline.preprocess(run).responses.select(np.sort(rows)))
    images = decode_trials(run, number, trials)[0]
    return (images[:, 0] if images.ndim == 5 else images), trials.stimulus_ids


def _reconstruct_changed(
    run: Run, study: Study, number: int, train: Responses, test: Responses, change: Change
) -> Images:
    """Return the images of changed test trials; see `Study.reconstruct_changed`.

    Prior and generator, and what rescales the branches, are those of whole trials: a part of a trial that says nothing
    then gives the mean image, and not noise that was stretched to look like one.
    """
    from braindecode_vis.pipeline.decoding import (
        decode_latents,
        map_for_generator,
        open_branches,
        rescale_branch,
    )
    from braindecode_vis.pipeline.predicting import generate_images

    pipeline.reconstruct(run)
    learning, asked = change(train), change(test)

    def fit(one: Study) -> tuple[BrainEncoder, Responses]:
        encoder: Any = fit_picked(one, number, learning, change)
        trials = asked
        if isinstance(encoder, ChoosingEncoder):
            encoder, trials = encoder.encoder, encoder.choice.apply(trials)
        return roles.complete(BrainEncoder, encoder), trials

    encoder, trials = fit(study)
    learnt = map_for_generator(run, number)[1]
    predicted = encoder.predict(trials) if learnt else encoder.predict_for_generator(trials)
    branches = {}
    for name, branch in open_branches(run).items():
        banks = [bank.embeddings for bank in pipeline.embed(branch)]
        own = replace(study, banks=banks, build=partial(build_encoder, branch))
        reader, chosen = fit(own)
        branches[name] = branch, rescale_branch(run, branch, number, reader.predict_for_generator(chosen))
    low, texts = branches.get("low_level"), branches.get("text")
    images = generate_images(
        run, number, predicted, low=None if low is None else decode_latents(run, low[0], number, low[1]),
        texts=None if texts is None else texts[1],
        written=write_with_encoder(run.config.reconstruction.captions, encoder, trials),
    )[0]  # fmt: skip
    return images[:, 0] if images.ndim == 5 else images


def _reads_text(analysis: Any) -> bool:
    return bool(getattr(analysis, "reads_text", False))


def _find_fit_seconds(run: Run) -> float | None:
    """Return how long training took for one fold, by the records of the run; None before it was trained."""
    encoder = store.json_plain(run.config.encoder.hashed_fields())
    for path in sorted((run.folder.path / "stages" / "train").glob(f"*/{store.PROVENANCE}")):
        with suppress(DataError):  # left by a killed process
            record = store.read_provenance(path)
            if record.get("fields", {}).get("encoder") == encoder:
                return float(record["seconds"])
    return None


def analyze_one(run: Run, study: Study, analysis: Any, number: int) -> store.Artifact:
    """Run one analysis with these settings, the `number`-th of those that are asked for."""
    config, prepared = run.config, pipeline.preprocess(run)
    banks = [] if config.decodes_categories else pipeline.embed(run)
    fields = {
        "analysis": analysis.hashed_fields(),
        "encoder": config.encoder.hashed_fields(),
        "repeats": config.repeats.hashed_fields(),
        "centre": config.retrieval.centre,
        **({} if config.selection.is_empty else {"selection": config.selection.hashed_fields()}),
        **({"text": config.text.hashed_fields()} if run.encoder.reads_text or _reads_text(analysis) else {}),
        **({} if config.synthetic is None else {"synthetic": hash_settings(run)}),
        "evaluation": {
            "n_bootstrap": study.n_bootstrap,
            "n_permutations": study.n_permutations,
            **({} if study.label is None else {"resample": study.unit}),
        },
        "seed": config.seed,
    }
    upstream = {"preprocess": prepared.artifact.fingerprint}
    upstream |= {f"embed{n}": bank.artifact.fingerprint for n, bank in enumerate(banks)}
    upstream |= name_pretraining(run)

    if ranks_features(config.selection) and not roles.complete(Analysis, analysis).uses_encoder:
        raise ConfigError(
            f"{analysis.kind} uses all features, so a choice by reliability or encoding score does not "
            "apply; run it without (--set selection.reliability=null --set selection.encoding=null), or choose by "
            "name."
        )
    untested = find_untested(run)
    if untested is not None and roles.complete(Analysis, analysis).needs_pictures:
        raise DataError(
            f"{analysis.kind} needs test trials that show a picture, but fold {untested} tests only "
            "imagery; use the analysis imagery, or also test seen images (dataset.test)."
        )

    if roles.complete(Analysis, analysis).makes_images and not config.decodes_categories:
        # Prior, generator and branches decide these images; without them an older strip would be taken for a new one.
        upstream["reconstruct"] = pipeline.reconstruct(run).artifact.fingerprint

    unit = f"{analysis.kind}{number:02d}"
    name, asked = f"analyze-{unit}", [STAGE_VERSIONS["analyze"], fields, upstream]
    early: Findings | None = None
    if run.shares and not run.has("analyze", fields, upstream, unit):
        # Before the artifact is begun, which others would have to wait for.
        parts = KeptParts(name_workspace(run, name, asked), shared=True)
        early = analysis.compute(replace(study, kept=parts))

    def compute(folder: Path) -> dict[str, Any]:
        from braindecode_vis.report.figures import render_plot

        with lend_context(run, name, asked) as context:
            findings: Findings = (
                analysis.compute(replace(study, kept=KeptParts(context.checkpoints)))
                if early is None
                else early
            )
        findings.table.to_parquet(folder / "table.parquet", index=False)
        findings.table.to_csv(folder / "table.csv", index=False)
        store.write_json(folder / "scores.json", [score.as_row() for score in findings.scores])
        for plot in findings.plots:
            for theme in ("light", "dark"):  # the page takes the one that its reader's system asks for
                svg = render_plot(plot.draw, size=plot.size, theme=theme)
                (folder / f"{plot.name}.{theme}.svg").write_text(svg)
        for file in findings.files:
            file.write(folder / file.name)
        plots = [{"name": p.name, "caption": p.caption, "alt": p.alt} for p in findings.plots]
        return {
            "kind": analysis.kind, "title": findings.title, "summary": findings.summary, "plots": plots,
            "attachments": [{"name": file.name, "caption": file.caption} for file in findings.files],
            "protocol": study.protocol
            if roles.complete(Analysis, analysis).uses_encoder
            else study.protocol_of_refits,
        }  # fmt: skip

    return run.produce("analyze", fields, upstream, compute, unit)


def read_findings(artifact: store.Artifact) -> dict[str, Any]:
    """Return what an analysis left: provenance, table, score rows and the paths of further files."""
    import pandas as pd

    record = store.read_provenance(artifact.path / store.PROVENANCE)
    return {
        **asdict(artifact),
        "kind": record["kind"],
        "title": record["title"],
        "summary": record["summary"],
        "table": pd.read_parquet(artifact.path / "table.parquet"),
        "files": [artifact.path / file["name"] for file in record["attachments"]],
        "scores": store.read_json(artifact.path / "scores.json"),
    }


# --- the run's selection, as analyses meet it ----------------------------------------------------------


def ranks_features(config: SelectionConfig) -> bool:
    """Whether features are chosen by what training trials say of them, and not by name alone."""
    return config.reliability is not None or config.encoding is not None


class ChosenFeatures:
    """What a run's `selection` leaves of trials, and which encoder takes what is left.

    Parameters
    ----------
    run
        The run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.selection
        self._single: tuple[int, Responses] | None = None

    @cached_property
    def _named(self) -> Selection | None:
        names = self.config.model_copy(update={"reliability": None, "encoding": None})
        if names.is_empty:
            return None
        responses = pipeline.preprocess(self.run).responses
        # One trial of each subject says which features there are; nothing else of it is looked at.
        first = responses.trials.drop_duplicates("subject").index.to_numpy()
        return fit_selection(names, responses.select(first))

    @property
    def _ranks(self) -> SelectionConfig:
        return SelectionConfig(reliability=self.config.reliability, encoding=self.config.encoding)

    def narrow(self, responses: Responses) -> Responses:
        """Return the features of the names."""
        return responses if self._named is None else self._named.apply(responses)

    def find_trained(self, number: int) -> Any:
        """Return the run's encoder of a fold, which takes narrowed trials, or its category decoder."""
        fold = pipeline.train(self.run)[number]
        if self.run.config.decodes_categories:
            return fold.decoder
        if fold.selection is None or not ranks_features(self.config):
            return fold.encoder
        keep = fold.selection.keep
        if self._named is not None:
            keep = {name: chosen[self._named.keep[name]] for name, chosen in keep.items()}
        return ChoosingEncoder(fold.encoder, Selection(fold.selection.dim, keep, fold.selection.steps))

    def choose(self, number: int, change: Change | None) -> Selection | None:
        """Fit the ranks on the changed single training trials of a fold; None without ranks."""
        if not ranks_features(self.config):
            return None
        if self._single is None or self._single[0] != number:
            prepared = pipeline.preprocess(self.run)
            single = self.narrow(prepared.responses.select(np.sort(prepared.folds[number].train)))
            self._single = (number, single)
        train = self._single[1] if change is None else change(self._single[1])
        targets = None
        if self.config.encoding is not None:
            bank = pipeline.embed(self.run)[number].embeddings
            targets = bank.select(list(pd.unique(train.stimulus_ids)))
        seed = derive_seed(self.run.config.seed, "selection")
        return choose_features(self._ranks, train, targets, seed=seed)
