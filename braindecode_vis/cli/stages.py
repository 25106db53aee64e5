"""One verb per stage of the pipeline, and ``run`` for all of them.

A verb opens the run folder and calls the function of the same name in `braindecode_vis.pipeline`, which runs the
earlier stages if needed. Options and progress are in `show`; the verb ``embed`` is in `embed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braindecode_vis.base.parts import ask_part
from braindecode_vis.cli.embed import embed_command
from braindecode_vis.cli.show import (
    Json,
    MaybeRunOptions,
    Profile,
    RunOptions,
    Track,
    Worker,
    Workers,
    finish,
    make_console,
    print_scores,
    refuse_lone_worker,
    takes,
    training_together,
)  # fmt: skip

if TYPE_CHECKING:
    from braindecode_vis.pipeline.runs import Run


def _make_stage(name: str, summary: str) -> Callable[..., None]:
    @takes()
    def verb(
        where: RunOptions,
        profile: Profile = False,
        as_json: Json = False,
    ) -> None:
        from braindecode_vis import pipeline
        from braindecode_vis.config import check_files
        from braindecode_vis.pipeline.runs import read_scores

        run = where.open()
        # Only what is read up to this stage: weights of a generator may still be missing when an encoder is
        # trained.
        check_files(run.config, name)
        stage: Callable[[Run], Any] = getattr(pipeline, name)
        with training_together(run):
            result = stage(run)
            if not as_json and name == "evaluate":
                print_scores(read_scores(run.folder.path))
            finish(run, as_json, f"report: {result}" if name == "report" else "", profile=profile)

    # Its help, which typer takes from the docstring.
    verb.__doc__ = summary
    return verb


@takes()
def train_command(
    where: RunOptions,
    worker: Worker = None,
    n_workers: Workers = None,
    profile: Profile = False,
    as_json: Json = False,
) -> None:
    """Fit the brain encoder on the training trials.

    Fits every fold, with all processes that torchrun started.

    Processes started with --worker and --workers share the folds.
    """
    from braindecode_vis import pipeline
    from braindecode_vis.base.devices import count_launched
    from braindecode_vis.config import check_files

    refuse_lone_worker(worker, n_workers, launched=count_launched() > 1)
    run = where.open(holds=worker is None)
    check_files(run.config, "train")
    if worker is None or n_workers is None:
        with training_together(run):
            pipeline.train(run)
            finish(run, as_json, profile=profile)
        return
    if n_left := pipeline.fit_share(run, worker, n_workers):
        run.tell(
            f"worker {worker} of {n_workers} has finished its share, and {n_left} fits are left for the "
            "other workers; at the end, run train without --worker to make what is still missing",
            "train:",
        )
    finish(run, as_json, profile=profile)


@takes()
def reconstruct_command(
    where: RunOptions,
    worker: Worker = None,
    n_workers: Workers = None,
    profile: Profile = False,
    as_json: Json = False,
) -> None:
    """Turn predicted embeddings into images, with controls.

    All processes that torchrun started share the images, and so do those started with --worker and --workers.
    """
    from braindecode_vis import pipeline
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.base.devices import count_launched, forget_launch, take_local_gpu
    from braindecode_vis.config import check_files

    launched = count_launched() > 1
    refuse_lone_worker(worker, n_workers, launched=launched)
    if launched:
        worker, n_workers = int(os.environ["RANK"]), count_launched()
        take_local_gpu()
    folder = Path(where.source).expanduser() if where.out is None else where.out
    if worker is not None and not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is not a run folder, so there are no images to share; train a run first, for "
            "example with braindecode-vis retrieve, then give its folder."
        )
    run = where.open(holds=worker is None)
    forget_launch()
    check_files(run.config, "reconstruct")
    if worker is None or n_workers is None:
        pipeline.reconstruct(run)
    else:
        pipeline.reconstruct_share(run, worker, n_workers)
    finish(run, as_json, profile=profile)


@takes()
def run_command(
    where: MaybeRunOptions,
    track: Track = None,
    profile: Profile = False,
    as_json: Json = False,
) -> None:
    """Run every stage, and check for leaks.

    Reuses finished stages and says why. If a leak is found, the exit code is 2.

    With --track, runs the configuration of a track and checks that it tests the ids of its split.

    All processes that torchrun started train together.
    """
    from braindecode_vis import pipeline
    from braindecode_vis.base.checks import ConfigError, DataError
    from braindecode_vis.base.digests import count_verified
    from braindecode_vis.config import check_files

    if (where.source is None) == (track is None):
        raise ConfigError(
            "run needs a configuration, a run folder or the name of a data set, or --track NAME instead."
        )
    if track is not None:
        source, changes = ask_part("choose_track")(track, where.overrides or [])
        where = replace(where, source=source, overrides=changes)

    def analyze(run: Run) -> None:
        if run.config.run_analyses:
            ask_part("analyze_in_run")(run)

    run = where.open()
    check_files(run.config)
    with training_together(run):
        if track is not None:  # before anything is fitted
            ask_part("check_track")(run, track)
        ending = pipeline.finish_run(run, analyze)
        if not as_json:
            print_scores(ending.rows)
        finish(run, as_json, f"report: {run.folder.path / 'report.html'}", profile=profile)
        for hint in ending.hints if not as_json else ():
            make_console(stderr=False).print(f"hint: {hint}", markup=False)
        if not as_json:
            make_console(stderr=False).print(count_verified().describe(), markup=False)
        if ending.checked and not as_json:
            make_console(stderr=False).print(
                f"checked for leaks {ending.checked}; braindecode-vis audit {run.folder.path} makes all checks",
                markup=False,
            )
        # Only now, when everything was written: the report says it in red.
        if ending.leaks:
            raise DataError(ending.leaks)


#: In the order of the stages, as the help lists them.
VERBS: dict[str, Callable[..., None]] = {
    "preprocess": _make_stage("preprocess", "Read recordings and images, and fix the split."),
    "embed": embed_command,
    "train": train_command,
    "retrieve": _make_stage("retrieve", "Predict test embeddings and rank the true images."),
    "reconstruct": reconstruct_command,
    "evaluate": _make_stage("evaluate", "Score retrieval and images, with intervals and chance."),
    "report": _make_stage("report", "Write the self-contained report.html of a run."),
    "run": run_command,
}
