"""Imagery without pictures, from the files of GOD through run, audit and analyze."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from braindecode_vis import pipeline
from braindecode_vis.base.checks import DataError
from braindecode_vis.cli import app
from braindecode_vis.config import read_config
from braindecode_vis.parts.analyses.analyze import analyze
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.pipeline.runs import open_run

CONFIG = str(Path(__file__).parents[3] / "configs" / "god_ridge.yaml")
QUICK = ["evaluation.n_bootstrap=200", "evaluation.n_permutations=200", "encoder.alphas=[1000, 100000]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("god")
    size = SIZES["god"]["tiny"].replace(
        n_train_concepts=24, n_test_concepts=10, test_repetitions=6, n_imagery=10, imagery_repetitions=6
    )
    make_phantom("god", folder, size=size, snr=1.0, seed=0)
    return folder


def make_run(root, folder, test):
    options = [f"dataset.root={root}", f"dataset.test={test}", *QUICK]
    return open_run(read_config(CONFIG, options), folder)


@pytest.fixture(scope="module")
def both(root, tmp_path_factory):
    run = make_run(root, tmp_path_factory.mktemp("both"), "both")
    pipeline.run_all(run)
    return run


def test_scores_and_images_are_of_what_was_seen_alone(both):
    prepared = pipeline.preprocess(both)
    assert prepared.responses.trials["task"].value_counts().to_dict() == {
        "imagery": 60, "test": 60, "training": 48,
    }  # fmt: skip
    assert all("_" in name for name in pipeline.embed(both)[0].embeddings.ids)
    made = pipeline.reconstruct(both)
    assert len(made.ids) == len(made.seen) == 10
    assert all("_" in name for name in made.ids)
    assert pipeline.retrieve(both).gallery_protocol == "10 exact test images"
    assert "60 test trials are imagery of 10 stimuli without a picture" in pipeline.report(both).read_text()
    assert not [item for item in audit_run(both.folder.path).findings if item.level == "leak"]


@pytest.mark.parametrize("test", ["both", "imagery"])
def test_what_was_imagined_is_identified_among_the_pictures_of_its_categories(both, root, tmp_path, test):
    folder = both.folder.path if test == "both" else make_run(root, tmp_path / "run", test).folder.path
    options = ["--root", str(root), "--set", f"dataset.test={test}", *(f"--set={text}" for text in QUICK)]
    asked = ["analyze", CONFIG, "--out", str(folder), "--analysis", "imagery", *options]
    answer = CliRunner().invoke(app, [*asked, "--json"])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)["analyses"][0]["rows"]
    two_way = {row["task"]: row for row in rows if row["metric"] == "two_way"}
    assert set(two_way) == ({"imagery", "test"} if test == "both" else {"imagery"})
    assert two_way["imagery"]["value"] > 0.7
    assert two_way["imagery"]["p_value"] < 0.01
    assert two_way["imagery"]["n_stimuli"] == 10
    if test == "both":
        assert two_way["test"]["value"] >= two_way["imagery"]["value"]


def test_images_of_what_was_imagined_hang_on_the_generator(both, root):
    """An analysis that shows the generator's images was taken for done after another generator was chosen."""
    options = [f"dataset.root={root}", "dataset.test=both", *QUICK, "analyses=[{kind: imagery, images: 2}]"]
    run = open_run(read_config(CONFIG, options), both.folder.path)
    (artifact,), refusals = analyze(run)
    assert not refusals
    upstream = json.loads((artifact.path / "provenance.json").read_text())["upstream"]
    assert upstream["reconstruct"] == pipeline.reconstruct(run).artifact.fingerprint


def test_maps_lie_beside_the_table_and_the_report_links_them(both):
    asked = [
        "analyze",
        str(both.folder.path),
        "--analysis",
        "spatial_patterns",
        "--analysis",
        "occlusion",
        "--json",
    ]
    answer = CliRunner().invoke(app, asked)
    assert answer.exit_code == 0, answer.output
    files = [Path(path) for item in json.loads(answer.stdout)["analyses"] for path in item["files"]]
    assert [path.name for path in files] == ["pattern.nii.gz", "pattern_significant.nii.gz", "loss.nii.gz"]
    page = (both.folder.path / "report.html").read_text()
    coords = pipeline.preprocess(both).responses.coords
    for path in files:
        assert f'href="{path.relative_to(both.folder.path).as_posix()}"' in page
        image = nibabel.load(path)
        assert image.shape == np.asarray(coords["mask"]).shape
        np.testing.assert_array_equal(image.affine, coords["affine"])


def test_a_run_that_tests_imagery_alone_says_what_to_do(root, tmp_path):
    run = make_run(root, tmp_path, "imagery")
    with pytest.raises(DataError, match="all 60 test trials of fold 0 imagine something without a picture"):
        pipeline.run_all(run)
    _, refusals = analyze(run, ["hubness"])
    assert "fold 0 tests only imagery" in refusals["hubness"]
