"""BOLD5000 release 2.0 on synthetic betas in its file names."""

import numpy as np
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.bold5000 import LAYOUT, VERSION, Bold5000BetasConfig
from braindecode_vis.parts.phantom.formats.file_writers import write_volume, write_volumes
from braindecode_vis.preprocessing.betas import write_fmri

SHAPE, AFFINE = (4, 3, 2), np.diag([2.0, 2, 2, 1])
NAMES = [
    "rep_concert5.jpg", "n01641577_1229.JPEG", "COCO_train2014_000000113449.jpg", "concert5.jpg", "airport1.jpg",
    "n01641577_1230.JPEG", "rep_concert5.jpg",
]  # fmt: skip


def write_person(root, subject, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random(SHAPE) < 0.5
    betas = rng.standard_normal((7, *SHAPE)).astype(np.float32)
    for session, rows in ((1, slice(0, 4)), (2, slice(4, 7))):
        path = LAYOUT.place(root, "volumes", subject=subject, betas=VERSION, session=session)
        write_volumes(path, betas[rows], shape=SHAPE, n_volumes=len(betas[rows]), affine=AFFINE)
    write_volume(root / f"{subject}_brainmask.nii.gz", mask.astype(np.uint8), AFFINE)
    (root / f"{subject}_imgnames.txt").write_text("\n".join(NAMES) + "\n")
    return betas[:, mask], mask


def write_rois(root, subject):
    rng = np.random.default_rng(1)
    tables = {roi: rng.standard_normal((7, n)) for roi, n in (("LHEarlyVis", 3), ("RHLOC", 2))}
    for roi, table in tables.items():
        LAYOUT.write(root, "rois", {"betas": table}, subject=subject, betas=VERSION, roi=roi)
    return tables


def test_volumes(tmp_path):
    betas, mask = write_person(tmp_path, "CSI1")
    write_fmri(Bold5000BetasConfig(root=tmp_path, zscore="none"), tmp_path / "out")
    responses = store.read_responses(tmp_path / "out/responses")
    np.testing.assert_allclose(responses.data, betas, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(responses.coords["mask"]), mask)
    trials = responses.trials
    assert trials["session"].tolist() == ["01"] * 4 + ["02"] * 3
    assert trials["split"].tolist() == ["test", "train", "train", "test", "train", "train", "test"]
    assert trials["stimulus_id"].tolist()[::3] == ["concert5"] * 3
    assert trials["repetition"].tolist() == [0, 0, 0, 1, 0, 0, 2]
    assert trials["concept"].tolist()[1:3] == ["n01641577", "COCO_train2014_000000113449"]


def test_regions(tmp_path):
    write_person(tmp_path, "CSI1")
    tables = write_rois(tmp_path, "CSI1")
    source = Bold5000BetasConfig(root=tmp_path, form="rois").open_betas()
    np.testing.assert_allclose(source.parts[0].read(2, 5), np.hstack(list(tables.values()))[2:5], rtol=1e-6)
    roi = source.find_geometry("CSI1").rois["roi"]
    assert [roi.names[label] for label in roi.labels] == ["LHEarlyVis"] * 3 + ["RHLOC"] * 2
    one = Bold5000BetasConfig(root=tmp_path, form="rois", rois=("RHLOC",)).open_betas()
    assert one.parts[0].n_voxels == 2
    with pytest.raises(ConfigError, match=r"'RHLOT'.*did you mean 'RHLOC'"):
        Bold5000BetasConfig(root=tmp_path, form="rois", rois=("RHLOT",)).open_betas()
    with pytest.raises(ConfigError, match="tables of regions"):
        Bold5000BetasConfig(root=tmp_path, rois=("RHLOC",)).open_betas()


def test_the_list_decides_where_it_is(tmp_path):
    write_person(tmp_path, "CSI1")
    listed = tmp_path / "repeated_stimuli_113_list.txt"
    listed.write_text("concert5.jpg\nairport1.jpg\n")
    trials = Bold5000BetasConfig(root=tmp_path).open_betas().parts[1].trials
    assert trials["split"].tolist() == ["test", "train", "test"]
    listed.write_text("airport1.jpg\n")
    with pytest.raises(DataError, match="'concert5' more than once"):
        Bold5000BetasConfig(root=tmp_path).open_betas()


def test_several_people_are_padded(tmp_path):
    masks = [write_person(tmp_path, f"CSI{n}", seed=n)[1].sum() for n in (1, 2)]
    with pytest.raises(ConfigError, match="pad_subjects"):
        Bold5000BetasConfig(root=tmp_path).open_betas()
    write_fmri(Bold5000BetasConfig(root=tmp_path, pad_subjects=True), tmp_path / "out")
    responses = store.read_responses(tmp_path / "out/responses")
    assert responses.coords["n_voxels_of"] == {"CSI1": masks[0], "CSI2": masks[1]}
    assert responses.data.shape == (14, max(masks))


def test_subjects_of_two_forms_are_not_joined(tmp_path):
    write_person(tmp_path, "CSI1")
    write_rois(tmp_path, "CSI2")
    with pytest.raises(DataError, match=r"subject 2 below .* layout rois alone"):
        Bold5000BetasConfig(root=tmp_path).open_betas()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no file like CSI1_GLMbetas-TYPED"):
        Bold5000BetasConfig(root=tmp_path).open_betas()
    write_person(tmp_path, "CSI1")
    with pytest.raises(DataError, match="BOLD5000 subject 3 is not there; found 1"):
        Bold5000BetasConfig(root=tmp_path, subjects=(3,)).open_betas()
    with pytest.raises(DataError, match="holds no rois of CSI1"):
        Bold5000BetasConfig(root=tmp_path, form="rois").open_betas()
    (tmp_path / "CSI1_GLMbetas-TYPED-FITHRF-GLMDENOISE-RR_ses-02.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 session\(s\) of CSI1 have 4 betas, but .* lists 7"):
        Bold5000BetasConfig(root=tmp_path).open_betas()
    (tmp_path / "CSI1_imgnames.txt").unlink()
    findings = Bold5000BetasConfig(root=tmp_path).check()
    assert "CSI1_imgnames.txt is not below" in findings[0].message


def test_check_tells_phantoms_from_the_real_data(tmp_path):
    write_person(tmp_path, "CSI1")
    (count,) = [f for f in Bold5000BetasConfig(root=tmp_path).check() if "repeated" in f.item]
    assert (count.ok, count.message) == (False, "1, declared 113")
    (tmp_path / "phantom_truth").mkdir()
    (count,) = [f for f in Bold5000BetasConfig(root=tmp_path).check() if "repeated" in f.item]
    assert (count.ok, count.message) == (True, "1; simulated (the real data set has 113)")
