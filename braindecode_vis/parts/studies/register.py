"""What the part brings: its verbs."""

from typing import Any

from braindecode_vis.parts.studies import score_verbs, verbs

VERBS = {
    "pretrain": verbs.pretrain,
    "train-generator": verbs.train_generator,
    "analyze": verbs.analyze,
    "sweep": verbs.sweep,
    "compare": verbs.compare,
    "board": verbs.board,
    "score": score_verbs.score,
}


def analyze(run: Any) -> None:
    """Answer the analyses that a configuration names, after the run."""
    from braindecode_vis.parts.studies.analyze import analyze_in_run

    analyze_in_run(run)


ANALYZE = analyze
