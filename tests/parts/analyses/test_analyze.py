"""The verb analyze: what it leaves, what the report shows, and what happens to analyses that do not fit."""

import json
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.config import read_config
from braindecode_vis.parts.analyses.analyze import ChosenFeatures, analyze, make_study, read_findings
from braindecode_vis.parts.analyses.page_section import describe_question, find_analyses
from braindecode_vis.pipeline.runs import Run, open_run
from braindecode_vis.preprocessing.selection import SelectionConfig
from tests.parts.analyses.planted import refit_and_rank

QUICK = [
    "dataset.n_train=80",
    "dataset.n_test=20",
    "evaluation.n_bootstrap=200",
    "evaluation.n_permutations=200",
    "analyses=[{kind: confusion}]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(read_config("synthetic_digits", QUICK), tmp_path_factory.mktemp("run"))


def test_an_analysis_that_does_not_fit_does_not_stop_the_others(run):
    artifacts, refusals = analyze(run, ["sliding_window", "hubness"])
    assert [read_findings(artifact)["kind"] for artifact in artifacts] == ["hubness"]
    assert list(refusals) == ["sliding_window"]
    assert "time" in refusals["sliding_window"]


def test_the_configuration_names_analyses_and_the_report_shows_them(run):
    (artifact,), refusals = analyze(run)
    assert not refusals
    found = read_findings(artifact)
    assert {"value", "ci_low", "ci_high", "chance", "n"} <= set(found["table"])
    pd.testing.assert_frame_equal(found["table"], pd.read_parquet(artifact.path / "table.parquet"))
    assert found["title"] in pipeline.report(run).read_text()
    again, _ = analyze(run)
    assert again[0].reused
    assert json.loads((artifact.path / "provenance.json").read_text())["kind"] == "confusion"


def test_unknown_analyses_are_answered_with_the_known_ones(run):
    with pytest.raises(ConfigError, match="did you mean 'hubness'"):
        analyze(run, ["hubnes"])


CHOSEN = [
    *QUICK,
    "dataset.n_voxels=24",
    "target={kind: pca, n_components: 5}",
    "selection.encoding={n_best: 12}",
]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    return open_run(read_config("synthetic_digits", CHOSEN), tmp_path_factory.mktemp("chosen"))


def test_an_uncut_refit_chooses_the_columns_of_the_run(chosen):
    study, retrieved = make_study(chosen), pipeline.retrieve(chosen)
    expected = np.concatenate([fold.retrieval.ranks for fold in retrieved.folds])
    np.testing.assert_array_equal(
        np.concatenate([ranked.ranks for ranked in refit_and_rank(study)]), expected
    )
    kept = pipeline.train(chosen)[0].selection.keep[""]
    np.testing.assert_array_equal(study.choose(0, None).keep[""], kept)
    np.testing.assert_allclose(
        study.trained(0).predict(study.pick(study.folds[0].test, "test")).vectors,
        retrieved.folds[0].predicted.vectors,
    )


def test_columns_that_were_not_chosen_cost_nothing_when_they_are_hidden(chosen):
    (artifact,), refusals = analyze(chosen, ["occlusion"])
    assert not refusals
    table = read_findings(artifact)["table"]
    kept = pipeline.train(chosen)[0].selection.keep[""]
    hidden = table[table["part"] == "columns"] if "part" in table else table
    assert len(hidden) == len(kept)
    assert (hidden["value"].to_numpy()[~kept] == 0).all()
    assert (hidden["value"].to_numpy()[kept] != 0).any()


def test_an_analysis_without_the_encoder_refuses_ranked_columns_with_a_reason(chosen):
    _, refusals = analyze(chosen, ["rsa"])
    assert "uses all features, so a choice" in refusals["rsa"]


def test_an_analysis_of_chosen_columns_belongs_to_their_run_alone(chosen):
    """The report of a run without a choice must not show what was found with one."""
    analyze(chosen, ["hubness"])
    everything = [text for text in CHOSEN if not text.startswith("selection")]
    plain = open_run(read_config("synthetic_digits", everything), chosen.folder.path)
    titles = [len(find_analyses(chosen.folder.path, describe_question(run))[0]) for run in (chosen, plain)]
    assert titles[0] >= 1
    assert titles[1] == 0


def test_category_decoders_refuse_a_choice_they_would_ignore():
    changes = ["selection.encoding={n_best: 5}"]
    with pytest.raises(ConfigError, match="decodes categories from all features"):
        read_config("haxby_slices", changes)


TINY_CLIP = (
    "{kind: openclip, architecture: ViT-B-32, weights: random, workers: 0, model_args: {embed_dim: 8, vision_cfg: "
    "{layers: 2, width: 64, image_size: 32, patch_size: 16}, text_cfg: {layers: 1, width: 32, heads: 2}}}"
)
FIRST_LAYER = TINY_CLIP.replace("random,", "random, layer: 0, pooling: cls,")
LEARNT_BESIDE_TRIALS = {
    "text": [f"target={TINY_CLIP}", "encoder.objectives=[{kind: clip}, {kind: clip_image_text}]"],
    "views": [
        f"target={{kind: views, combine: stacked, encoder: {TINY_CLIP}}}",
        "encoder.view_choice=sample",
    ],
    "fusion": [
        f"target={{kind: layers, members: [{TINY_CLIP}, {FIRST_LAYER}], size: 6}}",
        "encoder.fusion={}",
        "encoder.projector={size: 4, sides: image}",
    ],
    "images": [
        f"target={TINY_CLIP}",
        f"encoder.image_tower={{rank: 2, target: {TINY_CLIP}}}",
    ],
}


@pytest.mark.parametrize("what", list(LEARNT_BESIDE_TRIALS))
def test_a_refit_is_given_what_training_was_given(what, tmp_path):
    """Texts and images used to reach the run's own training only, so no analysis could fit such a network again."""
    config = [
        *QUICK[2:4], "dataset.n_train=48", "dataset.n_test=12", "generator.kind=nearest",
        "encoder={kind: network, network: {kind: residual_mlp, hidden: 8, n_blocks: 1}, epochs: 1, device: cpu}",
        *LEARNT_BESIDE_TRIALS[what],
    ]  # fmt: skip
    run = open_run(read_config("synthetic_digits", config), tmp_path)
    ranked, retrieved = refit_and_rank(make_study(run)), pipeline.retrieve(run)
    expected = np.concatenate([fold.retrieval.ranks for fold in retrieved.folds])
    np.testing.assert_array_equal(np.concatenate([one.ranks for one in ranked]), expected)


def test_ranks_of_a_selection_are_kept_without_its_names():
    """What is chosen by name is taken first; a changed trial may have other ranks."""
    selection = SelectionConfig(
        ch_names={"include": ("Oz",)}, reliability={"n_best": 3}, encoding={"n_best": 2}
    )
    ranks = ChosenFeatures(Mock(spec=Run, config=Mock(selection=selection)))._ranks
    assert (ranks.reliability, ranks.encoding) == (selection.reliability, selection.encoding)
    assert ranks == SelectionConfig(reliability=selection.reliability, encoding=selection.encoding)
