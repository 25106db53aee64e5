"""The sentence, one function per stage, in order.

    preprocess -> embed -> train -> retrieve -> reconstruct -> evaluate -> report

Owns the order of the stages, what each of them reads and writes in the run folder, and which settings enter its
fingerprint. Each function asks for what it needs from the stage before, which is reused when nothing it
depends on changed. Knows roles and nouns, never a particular encoder or data set.

`learning` looks at training trials alone, `decoding` opens the test trials, `scoring` judges and `reporting` shows.
"""

from braindecode_vis.pipeline.decoding import find_untested, reconstruct, retrieve
from braindecode_vis.pipeline.learning import (
    build_encoder,
    embed,
    pick_labelled_trials,
    pick_test_trials,
    pick_trials,
    preprocess,
    train,
    write_dataset,
)
from braindecode_vis.pipeline.reporting import (
    collect_run_provenance,
    describe_question,
    read_run_scores,
    report,
    run_all,
)
from braindecode_vis.pipeline.scoring import (
    describe_gallery,
    describe_protocol,
    evaluate,
    find_ceilings,
    find_phantom,
)
from braindecode_vis.pipeline.together import train_together

STAGES = ("preprocess", "embed", "train", "retrieve", "reconstruct", "evaluate", "report")

__all__ = [
    "STAGES",
    "build_encoder",
    "collect_run_provenance",
    "describe_gallery",
    "describe_protocol",
    "describe_question",
    "embed",
    "evaluate",
    "find_ceilings",
    "find_phantom",
    "find_untested",
    "pick_labelled_trials",
    "pick_test_trials",
    "pick_trials",
    "preprocess",
    "read_run_scores",
    "reconstruct",
    "report",
    "retrieve",
    "run_all",
    "train",
    "train_together",
    "write_dataset",
]
