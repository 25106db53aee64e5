"""vim-1: the phantom in the very kinds of MATLAB files, gaps left out, regions by code, both sizes of the images."""

import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.vim1 import Vim1Config
from braindecode_vis.preprocessing.betas import write_fmri
from tests.datasets.reading import refuse_changes, run_to_report
from tests.parts.phantom.tiny import make_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_tiny("vim-1", tmp_path_factory.mktemp("vim1"), 1.0, n_subjects=2)


@pytest.fixture
def own_root(tmp_path):
    """A root that a test may damage."""
    return make_tiny("vim-1", tmp_path / "vim1", 1.0, n_subjects=2)


def test_responses_are_those_of_the_file_without_gaps(root, tmp_path):
    summary = write_fmri(Vim1Config(root=root, subject=2), tmp_path / "out")
    with h5py.File(root / "EstimatedResponses.mat") as file:
        # As h5py shows what MATLAB wrote: images x voxels, and rows of codes.
        train, test = file["dataTrnS2"][()], file["dataValS2"][()]
        places, codes = file["voxIdxS2"][0].astype(int), file["roiS2"][0].astype(int)
    assert train.shape == (40, len(codes))
    usable = np.isfinite(np.concatenate([train, test])).all(axis=0)
    assert 0 < (~usable).sum() < len(usable) / 10
    responses = store.read_responses(tmp_path / "out/responses")
    np.testing.assert_array_equal(responses.data, np.concatenate([train, test])[:, usable])
    trials = responses.trials
    assert trials["split"].tolist() == ["train"] * 40 + ["test"] * 6
    assert trials["stimulus_id"].iloc[[0, 39, 40]].tolist() == ["trn0001", "trn0040", "val0001"]
    # Places count from 1 in MATLAB's order, ours from 0 in C order.
    x, y, z = np.unravel_index(places[usable] - 1, (64, 64, 18), order="F")
    np.testing.assert_array_equal(responses.coords["voxel_id"], (x * 64 + y) * 18 + z)
    np.testing.assert_array_equal(responses.coords["roi_visual"], codes[usable])
    assert (
        "40 training images (mean of 2 presentations), 6 validation images (mean of 13)"
        in summary["protocol"]
    )


def test_regions_choose_voxels(root):
    with h5py.File(root / "EstimatedResponses.mat") as file:
        codes = file["roiS1"][0].astype(int)
    whole = Vim1Config(root=root).open_betas()
    early = Vim1Config(root=root, rois=("V1", "V3")).open_betas()
    assert set(early.geometry.rois["visual"].labels) == {1, 3}
    assert 0 < early.geometry.n_voxels <= np.isin(codes, [1, 3]).sum() < whole.geometry.n_voxels
    with pytest.raises(ConfigError, match="did you mean 'V4'"):
        Vim1Config(root=root, rois=("hV4",)).open_betas()
    with pytest.raises(ConfigError, match="no voxel of subject 1 is in V3B"):
        Vim1Config(root=root, rois=("V3B",)).open_betas()


def test_images_of_both_sizes_are_upright(root):
    low, full = (
        Vim1Config(root=root, resolution=resolution).open_betas().stimuli for resolution in ("low", "full")
    )
    stored = loadmat(root / "Stimuli.mat")
    assert low.pixels.shape == (46, 16, 16, 3)
    assert full.pixels.shape == (46, 64, 64, 3)
    grey = stored["stimVal"][0]
    assert np.corrcoef(low.read_image("val0001")[..., 0].ravel(), grey.ravel())[0, 1] > 0.999
    for name in ("trn0007", "val0003"):
        shrunk = full.read_image(name)[..., 0].reshape(16, 4, 16, 4).mean(axis=(1, 3))
        assert np.corrcoef(low.read_image(name)[..., 0].ravel(), shrunk.ravel())[0, 1] > 0.98
    with h5py.File(root / "Stimuli_Val_FullRes.mat") as file:
        assert file["stimVal"].shape == (64, 64, 6)
    assert (root / "EstimatedResponses.mat").read_bytes()[:10] == b"MATLAB 7.3"


def test_older_matlab_files_are_read_too(root, own_root):
    """Copies that were saved again as version 5 go round."""
    with h5py.File(root / "EstimatedResponses.mat") as file:
        content = {name: file[name][()].T for name in file}
    savemat(own_root / "EstimatedResponses.mat", content)
    one, two = (Vim1Config(root=folder, rois=("V1",)).open_betas() for folder in (root, own_root))
    np.testing.assert_array_equal(one.parts[0].read(0, 40), two.parts[0].read(0, 40))
    np.testing.assert_array_equal(one.geometry.voxel_ids, two.geometry.voxel_ids)


def test_check_tells_counts(root):
    findings = {finding.item: finding for finding in Vim1Config(root=root).check()}
    assert all(finding.ok for finding in findings.values()), findings
    assert findings["n_train"].message == "40; simulated (the real data set has 1750)"
    assert "without a response left out" in findings["voxels"].message
    assert set(Vim1Config(root=root).hash_inputs()) == {"EstimatedResponses.mat", "Stimuli.mat"}


def test_what_is_missing_is_named(own_root):
    (own_root / "Stimuli_Val_FullRes.mat").unlink()
    full = Vim1Config(root=own_root, resolution="full")
    with pytest.raises(DataError, match=r"Stimuli_Val_FullRes\.mat.*with_images=false"):
        full.open_betas()
    path = own_root / "EstimatedResponses.mat"

    def start_at_zero():
        with h5py.File(path, "a") as file:
            file["voxIdxS1"][0, 0] = 0

    def drop_regions():
        with h5py.File(path, "a") as file:
            del file["roiS1"]

    refuse_changes(
        Vim1Config(root=own_root),
        (DataError, "places from 0", start_at_zero),
        (DataError, "is missing the variable roiS1", drop_regions),
        (DataError, r"cannot be read as a MATLAB file|truncated",
         lambda: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
        (DataError, "fetch it with a CRCNS account", path.unlink),
    )  # fmt: skip


def test_the_configuration_runs_from_files_to_a_report(root, tmp_path):
    words = "6 validation images (mean of 13) as published"
    run_to_report("vim1_ridge", root, tmp_path / "run", words, "encoder.alphas=[100]")
