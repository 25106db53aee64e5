"""NSD-synthetic on a phantom: core sessions train, synthetic images are tested; a finished run of NSD predicts them."""

import h5py
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.datasets.nsd.dataset import NsdConfig
from braindecode_vis.datasets.nsd.imagery_dataset import NsdImageryConfig
from braindecode_vis.datasets.nsd.synthetic_dataset import NsdSyntheticConfig
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.formats.nsd_further_sessions import (
    count_kinds,
    count_repetitions,
    draw_images,
)
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.new_trials import read_dataset_anew, read_new
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.betas import write_fmri
from tests.datasets.reading import run_to_report
from tests.parts.phantom.tiny import make_tiny

SIZE = SIZES["nsd"]["tiny"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_tiny("nsd", tmp_path_factory.mktemp("nsd"), 1.0, n_imagery=0, imagery_repetitions=0)


def test_repetitions_are_those_of_the_published_session():
    full = SIZES["nsd"]["full"]
    assert count_kinds(full) == (220, 64)
    times, counts = np.unique(count_repetitions(full), return_counts=True)
    assert dict(zip(times.tolist(), counts.tolist(), strict=True)) == {2: 236, 4: 32, 8: 8, 10: 8}
    assert count_repetitions(full).sum() == 744


def test_core_trains_and_synthetic_images_are_tested(root, tmp_path):
    config = NsdSyntheticConfig(root=root)
    summary = write_fmri(config, tmp_path / "out")
    assert "tested out of distribution on 16 synthetic images" in summary["protocol"]
    assert "standardised with the core sessions" in summary["protocol"]
    responses = store.read_responses(tmp_path / "out/responses")
    trials = responses.trials
    tested = trials[trials["split"] == "test"]
    planned = pd.read_csv(root / "phantom_truth/nsdsynthetic_trials.tsv", sep="\t")
    assert tested["stimulus_id"].tolist() == [f"synthetic{n + 1:03d}" for n in planned["synthetic_id"]]
    assert tested.groupby("run")["viewing_task"].first().tolist() == ["fixation", "one_back"] * 4
    assert set(tested["image_class"]) == {
        "Noise",
        "Contrast modulation",
        "Spiral gratings",
        "Chromatic noise",
    }
    # Shared images are neither trained on nor tested.
    assert trials["split"].value_counts()["train"] == SIZE.n_train_images * 3
    assert np.isfinite(responses.data).all()
    # Images that are alike give responses that are alike: the simulated brain has seen them.
    means = pd.DataFrame(responses.data[tested.index]).groupby(tested["stimulus_id"].to_numpy()).mean()
    halves = tested.groupby("stimulus_id").cumcount() % 2
    one, two = (
        pd.DataFrame(responses.data[tested.index[halves == half]])
        .groupby(tested["stimulus_id"].to_numpy()[halves == half])
        .mean()
        .loc[means.index]
        for half in (0, 1)
    )
    similarity = np.corrcoef(one - one.mean(), two - two.mean())[:16, 16:]
    assert np.diag(similarity).mean() > similarity.mean() + 0.2


def test_images_are_the_middle_square_as_it_was_shown(root, tmp_path):
    write_fmri(NsdSyntheticConfig(root=root, image_size=54), tmp_path / "out")
    stimuli = store.read_stimuli(tmp_path / "out/stimuli")
    drawn = draw_images(SIZE, 0, 1)
    height, width = drawn.shape[1:3]
    assert (height, width) == (54, 102)
    for number in (0, 15):
        kept = stimuli.read_image(f"synthetic{number + 1:03d}").astype(int)
        shown = drawn[number][:, (width - height) // 2 :][:, :height].astype(int)
        # Stored as linear intensities of 8 bits, dark ones are coarse.
        assert np.abs(kept - shown).max() <= 16
        assert np.abs(kept - shown).mean() < 2
    with h5py.File(root / "nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_stimuli.hdf5") as file:
        stored, n_grey = file["imgBrick"][0], len(file["imgBrick"])
    np.testing.assert_array_equal(stored, np.ceil((drawn[0] / 255.0) ** 2 * 255).astype(np.uint8))
    np.testing.assert_array_equal(draw_images(SIZE, 0, 1, grey_only=True), drawn[:n_grey])
    linear = stored[:, (width - height) // 2 :][:, :height] / 255
    shown = NsdSyntheticConfig(root=root, core=False, image_size=54).open_betas().read_image(0)
    np.testing.assert_array_equal(shown, (np.sqrt(linear) * 255).astype(np.uint8))


def test_one_task_alone_and_the_check(root):
    source = NsdSyntheticConfig(root=root, tasks=("one_back",), with_images=False).open_betas()
    assert source.parts[-1].trials["viewing_task"].unique().tolist() == ["one_back"]
    findings = {finding.item: finding for finding in NsdSyntheticConfig(root=root).check()}
    assert all(finding.ok for finding in findings.values())
    assert findings["n_stimuli"].message == "16; simulated (the real data set has 284)"
    names = set(NsdSyntheticConfig(root=root).hash_inputs())
    assert {"betas_nsdsynthetic.nii.gz", "nsdsynthetic_colorstimuli_subj01.hdf5"} <= names
    with pytest.raises(ValidationError, match="tasks is empty"):
        NsdSyntheticConfig(tasks=())
    with pytest.raises(ValidationError, match="no betas_assumehrf of the synthetic session"):
        NsdSyntheticConfig(betas="betas_assumehrf")


def test_a_run_of_nsd_predicts_the_synthetic_session(root, tmp_path):
    overrides = ["target={kind: pixels, size: 8}", "encoder={kind: ridge, alphas: [1000]}"]
    config = read_config("nsd_ridge", overrides, root=root)
    train(open_run(config, tmp_path / "run"))
    run = open_finished(tmp_path / "run")
    changes = ["dataset.kind=nsd_synthetic", "dataset.core=false"]
    new = read_new(run, root, tmp_path / "new", overrides=changes)
    assert new.responses.data.shape[1] == NsdConfig(root=root).open_betas().parts[0].n_voxels
    assert len(new.responses.trials) == len(pd.read_csv(root / "phantom_truth/nsdsynthetic_trials.tsv"))
    assert new.stimuli.read_image("synthetic001").shape == (425, 425, 3)
    assert any("nsdsynthetic" in note for note in new.notes)
    # Repetitions of an image are averaged over both tasks of the session.
    assert "task" not in new.responses.trials
    with pytest.raises(ConfigError, match="the run decodes nsd, so it cannot read nsd_imagery"):
        read_dataset_anew(run, NsdImageryConfig(root=root), tmp_path / "other")


def test_the_configuration_runs_from_files_to_a_report(root, tmp_path):
    words, more = (
        "out of distribution on 16 synthetic images",
        ("encoder.alphas=[1000]", "dataset.image_size=32"),
    )
    run_to_report("nsd_synthetic_ridge", root, tmp_path / "run", words, *more)


def test_missing_pieces_are_named(root, tmp_path):
    other = tmp_path / "nsd"
    other.mkdir()
    (other / "nsddata").symlink_to(root / "nsddata")
    with pytest.raises(DataError, match=r"betas_nsdsynthetic\.nii\.gz does not exist"):
        NsdSyntheticConfig(root=other, core=False).open_betas()
    (other / "nsddata_betas").symlink_to(root / "nsddata_betas")
    with pytest.raises(DataError, match=r"nsdsynthetic_stimuli\.hdf5.*dataset\.synthetic_images=DIR"):
        NsdSyntheticConfig(root=other, core=False).open_betas()
    assert NsdSyntheticConfig(root=other, core=False, with_images=False).open_betas().n_trials > 30
