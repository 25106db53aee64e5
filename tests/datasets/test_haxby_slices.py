"""Haxby slices: the real recording, through the same path as every BIDS data set, and its known decoding accuracy."""

import shutil

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_json, read_responses
from braindecode_vis.datasets.haxby_slices import CATEGORIES, HaxbySlicesConfig
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.sources.bold_source import CleanConfig, WindowConfig
from braindecode_vis.preprocessing.bold import make_betas, write_bold

pytestmark = pytest.mark.shared


def decode(data, labels, runs, c=0.01):
    """Leave-one-run-out accuracy of logistic regression, and the decisions."""
    hits = []
    for run in np.unique(runs):
        test = runs == run
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        hits.append(model.fit(data[~test], labels[~test]).predict(data[test]) == labels[test])
    return float(np.concatenate(hits).mean())


def write(shared, folder, **options):
    write_bold(HaxbySlicesConfig(root=shared / "haxby_slices", **options), folder)
    return read_responses(folder / "responses")


@pytest.fixture
def root(shared):
    return shared / "data"


def test_eight_categories_are_decoded_from_one_slice(root, tmp_path):
    """0.594 is what the README of the recording gives for this protocol."""
    responses = write(root, tmp_path)
    assert responses.data.shape == (96, 530)  # 270 of 800 voxels are empty
    labels, runs = responses.trials["concept"].to_numpy(), responses.trials["run"].to_numpy()
    assert sorted(set(runs)) == [f"{n:02d}" for n in range(1, 13)]
    accuracy = decode(responses.as_matrix(), labels, runs)
    assert accuracy >= 0.593  # 57 of 96
    shuffled = labels.copy()
    rng = np.random.default_rng(0)
    for run in np.unique(runs):
        shuffled[runs == run] = rng.permutation(shuffled[runs == run])
    assert decode(responses.as_matrix(), shuffled, runs) < 0.25  # twice chance
    pair = np.isin(labels, ["face", "house"])
    assert decode(responses.as_matrix()[pair], labels[pair], runs[pair]) == 1.0


def test_window_from_the_first_volumes_does_better(root, tmp_path):
    """A window that inner cross-validation within the training runs picked in every fold."""
    clean = CleanConfig(drift="polynomial", order=2, scaling="zscore")
    responses = write(root, tmp_path, model=WindowConfig(start=2.5, stop=2.5, until="offset", clean=clean))
    labels, runs = responses.trials["concept"].to_numpy(), responses.trials["run"].to_numpy()
    assert decode(responses.as_matrix(), labels, runs, c=1.0) >= 0.75


def test_low_resolution_brain(root, tmp_path):
    accuracies = {}
    for mask in ("brain", "vt"):
        responses = write(root, tmp_path / mask, acq="25mm", mask=mask)
        accuracies[mask] = decode(
            responses.as_matrix(), responses.trials["concept"].to_numpy(), responses.trials["run"].to_numpy()
        )
    assert accuracies == pytest.approx({"brain": 0.302, "vt": 0.219}, abs=0.02)


def test_mask_and_affine_travel(root, tmp_path):
    responses = write(root, tmp_path, acq="25mm")
    assert np.asarray(responses.coords["mask"]).shape == (6, 10, 10)
    assert np.asarray(responses.coords["mask"]).sum() == 129
    assert np.asarray(responses.coords["affine"])[0, 0] == -25


def test_stimuli_are_categories_without_pictures(root):
    stimuli = HaxbySlicesConfig(root=root / "haxby_slices").open_bold().stimuli
    assert sorted(stimuli.ids) == list(CATEGORIES)
    assert stimuli.table["path"].tolist() == [""] * 8
    with pytest.raises(DataError, match="not available"):
        stimuli.read_image("face")


@pytest.mark.parametrize("acq", ["1slice", "25mm"])
def test_check_recomputes_the_declared_facts(root, acq):
    findings = HaxbySlicesConfig(root=root / "haxby_slices", acq=acq).check()
    assert [finding for finding in findings if not finding.ok] == []
    assert {finding.item for finding in findings} == {
        key
        for key in read_manifest("haxby_slices").facts
        if not key.startswith("shape_") or key.endswith(acq)
    }


def test_single_trial_models_are_options(root):
    source = make_betas(HaxbySlicesConfig(root=root / "haxby_slices", model={"kind": "glm"}).open_bold())
    assert source.n_trials == 96
    volumes = {"kind": "window", "start": 2.5, "stop": 2.5, "until": "offset", "keep": "volumes"}
    source = make_betas(HaxbySlicesConfig(root=root / "haxby_slices", model=volumes).open_bold())
    assert source.n_trials == 96 * 9


def test_bad_input(root, tmp_path):
    with pytest.raises(ConfigError, match="25 mm grid only"):
        HaxbySlicesConfig(root=root / "haxby_slices", mask="vt").open_bold()
    copy = tmp_path / "copy"
    shutil.copytree(root / "haxby_slices", copy)
    events = next(copy.rglob("*1slice_run-03_events.tsv"))
    events.write_text(events.read_text().replace("shoe", "sock"))
    with pytest.raises(DataError, match=r"run 03.*sock.*shoe once"):
        HaxbySlicesConfig(root=copy).open_bold()
    next(copy.rglob("*1slice_run-05_bold.nii.gz")).unlink()
    findings = HaxbySlicesConfig(root=copy).check()
    assert "run-05_events.tsv lists the events of a run whose image is missing" in findings[0].message


def test_a_run_without_events_and_image_is_missed(root, tmp_path):
    """Eleven runs whose events fit were read without a word."""
    copy = shutil.copytree(root / "haxby_slices", tmp_path / "copy")
    for path in copy.rglob("*1slice_run-05_*"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"11 of 12 declared runs of session 01 are read, without 05, .*dataset.runs"
    ):
        write_bold(HaxbySlicesConfig(root=copy), tmp_path / "out")
    chosen = HaxbySlicesConfig(root=copy, runs=(1, 2, 3))
    write_bold(chosen, tmp_path / "out")
    responses = read_responses(tmp_path / "out/responses")
    assert responses.trials["run"].unique().tolist() == ["01", "02", "03"]
    (told,) = read_json(tmp_path / "out/responses/meta.json")["coords"]["warnings"]
    assert told.startswith("subject 001: 3 of 12 declared runs of session 01 are read, without 04, ")
    assert all(finding.ok for finding in chosen.check())
