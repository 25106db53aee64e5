"""Objectives at their defaults beside CLIP: the own term of each falls, and neither silences the other.

Here in a small linear world. What each costs on a simulated recording is a table of docs/research/OBJECTIVES.md, which
``benchmarks/studies/ladder.py`` measures (stage ``defaults``).
"""

import pytest

from braindecode_vis.base.registry import list_kinds
from braindecode_vis.pipeline.hints import describe_objective_values
from tests.training.toy_task import make_config, make_task

#: Need texts of images, which this world has none of; their terms are in the table.
OF_TEXTS = {"clip_image_text", "sentence_contrast", "composition", "captioning"}
#: Their defaults once did nothing, or took everything from the contrast.
QUICK = {"mmd", "multiview", "hydra", "salient"}
#: CLIP spreads the outputs as well, so that nothing is left to this one.
IS_MET = {"uniformity"}
#: A run says that it mixes trials, which costs the others accuracy.
SAYS_MORE = {"bimixco"}
FURTHER = {
    "bimixco": {"augmentations": [{"kind": "trial_mixing"}], "epochs": 12},
    "propagation": {"augmentations": [{"kind": "time_shift"}]},
    # The queue of the default outlasts this training; candidates that become more make the loss rise.
    "distillation": {"teacher": {"queue": 8}},
    "tcl": {"teacher": {"queue": 8}},
}


def mark(kind):
    return pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("kind", [mark(kind) for kind in list_kinds("objective") if kind not in OF_TEXTS])
def test_an_objective_learns_beside_clip_at_its_defaults(kind):
    """Once `mmd` was 0 from the first epoch, `hydra` stayed at 4.07, and `salient` was 12 575 beside a 4."""
    objectives = [{"kind": "clip"}] + ([] if kind == "clip" else [{"kind": kind}])
    config = make_config(**{"objectives": objectives, "epochs": 6, **FURTHER.get(kind, {})})
    encoder = config.build(seed=0).fit(*make_task(n_images=32, n_repetitions=4, per_concept=4))
    history = encoder.fitted.history
    # A phase may end before the last epoch, and an epoch that it ends in holds a part of it.
    last = max(1, int(len(history) * config.objectives[-1].phase[1])) - 1
    first, end = (list(history[epoch]["objectives"].values())[-1] for epoch in (0, last))
    said = describe_objective_values(history, [one.model_dump() for one in config.objectives])
    assert end < first or kind in IS_MET
    assert said == [] or kind in IS_MET | SAYS_MORE
