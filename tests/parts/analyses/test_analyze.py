"""The verb analyze: what it leaves, what the report shows, and what happens to analyses that do not fit."""

import json
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.parts.analyses.analyze import ChosenFeatures, analyze, make_study, read_findings
from braindecode_vis.parts.analyses.joint import JointRetrievalConfig
from braindecode_vis.parts.analyses.measure import compute_hits
from braindecode_vis.parts.analyses.page_section import describe_question, find_analyses
from braindecode_vis.pipeline.runs import Run, open_run
from braindecode_vis.preprocessing.selection import SelectionConfig
from braindecode_vis.scoring.retrieval import compute_similarity
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


def open_digits(folder, *changes):
    few = [
        "dataset.n_train=80",
        "dataset.n_test=40",
        "target={kind: pca, n_components: 5}",
        "evaluation.n_permutations=200",
    ]
    run = open_run(read_config("synthetic_digits", [*few, *changes]), folder)
    pipeline.retrieve(run)
    return run


def test_two_runs_find_together_what_neither_finds_alone(tmp_path):
    """Two recordings of the same images with their own noise; the joint similarity is the mean of both."""
    names = {"a": 40, "b": 55}
    runs = {
        name: open_digits(tmp_path / name, f"dataset.n_voxels={n}", "dataset.snr=0.15")
        for name, n in names.items()
    }
    run = runs["a"]
    config = JointRetrievalConfig(others=(tmp_path / "b",), metric="two_way")
    table = config.compute(make_study(run)).table.set_index("runs")
    assert table.index.tolist() == ["this run", "b", "this run + b"]
    own = {name: pipeline.retrieve(each).folds[0].retrieval for name, each in runs.items()}
    for name, row in (("a", "this run"), ("b", "b")):
        assert table.loc[row, "value"] == pytest.approx(compute_hits(own[name], "two_way").mean(), abs=1e-6)
    similarity = [
        compute_similarity(
            *(part.select(sorted(part.ids)) for part in (each.parts[0].queries, each.parts[0].gallery))
        )
        for each in (pipeline.retrieve(one).folds[0] for one in runs.values())
    ]
    mean = np.mean(similarity, axis=0)
    wins = (np.diag(mean)[:, None] > mean).sum(axis=1) / (len(mean) - 1)
    together = table.loc["this run + b"]
    assert together["value"] == pytest.approx(wins.mean(), abs=1e-6)
    assert together["value"] > table["value"][:2].max()
    assert together["ci_low"] < together["value"] < together["ci_high"]
    assert together["p_maximum"] < 0.02
    assert together["difference_low"] < together["difference"] < together["difference_high"]
    (other,) = config.hashed_fields()["others"]
    assert other == f"b {pipeline.retrieve(runs['b']).artifact.fingerprint}"
    artifacts, refusals = analyze(run, ["joint_retrieval"])
    assert not artifacts
    assert "names no other run" in refusals["joint_retrieval"]


def test_runs_that_cannot_be_joined_are_refused_in_words(tmp_path):
    run = open_digits(tmp_path / "a")
    others = {
        "folds": ("split={kind: kfold, n_folds: 2}", "different numbers of folds"),
        "seed": ("seed=1", "test no image of one subject in common|in the same fold of each"),
    }
    for name, (change, sentence) in others.items():
        open_digits(tmp_path / name, change)
        with pytest.raises(DataError, match=sentence):
            JointRetrievalConfig(others=(tmp_path / name,)).compute(make_study(run))
    with pytest.raises(DataError, match="two of the other runs"):
        JointRetrievalConfig(others=(tmp_path / "seed", tmp_path / "seed")).compute(make_study(run))
    with pytest.raises(DataError, match="this run and a give the same predictions"):
        JointRetrievalConfig(others=(tmp_path / "a",)).compute(make_study(run))
