"""One verb per stage of the pipeline, and ``run`` for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from braindecode_vis.cli.show import (
    AllowDownload,
    Debug,
    Json,
    Out,
    Profile,
    Root,
    Set,
    Source,
    Subject,
    TrustCode,
    Verify,
    finish,
    make_console,
    open_source,
    print_scores,
    training_together,
)  # fmt: skip


def _make_stage(name: str, summary: str) -> Callable[..., None]:
    def verb(
        source: Source,
        root: Root = None,
        out: Out = None,
        subjects: Subject = None,
        overrides: Set = None,
        trust_code: TrustCode = None,
        allow_download: AllowDownload = False,
        verify: Verify = False,
        profile: Profile = False,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        from braindecode_vis import pipeline
        from braindecode_vis.config import check_files
        from braindecode_vis.pipeline.runs import Run, read_scores

        run = open_source(source, root, out, overrides, subjects)
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


def run_command(
    source: Source,
    root: Root = None,
    out: Out = None,
    subjects: Subject = None,
    overrides: Set = None,
    trust_code: TrustCode = None,
    allow_download: AllowDownload = False,
    verify: Verify = False,
    profile: Profile = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every stage, reuse what is already there and say why, and check for leaks, which are exit code 2.

    All processes that torchrun started train together.
    """
    from braindecode_vis import pipeline
    from braindecode_vis.checks import DataError
    from braindecode_vis.config import check_files
    from braindecode_vis.digests import count_verified

    run = open_source(source, root, out, overrides, subjects)
    check_files(run.config)
    with training_together(run):
        ending = pipeline.finish_run(run)
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


_SUMMARIES = {
    "preprocess": "Read a recording and its images into a run folder, and fix the split.",
    "embed": "Encode the images into the target space.",
    "train": "Fit the brain encoder on the training trials of every fold, with all processes that torchrun started.",
    "retrieve": "Predict the embeddings of the test trials and rank the true images in the gallery.",
    "reconstruct": "Turn predicted embeddings into images, with every control beside them.",
    "evaluate": "Score retrieval and reconstructions, with intervals, chance and controls.",
    "report": "Write the self-contained report.html of a run.",
}
VERBS: dict[str, Callable[..., None]] = {
    **{name: _make_stage(name, summary) for name, summary in _SUMMARIES.items()},
    "run": run_command,
}
