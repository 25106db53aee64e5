"""Geometry that survives the store, parts that belong together, and volumes read through a mask."""

import gzip

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.sources import fmri_volumes
from braindecode_vis.datasets.sources.betas_source import (
    AtlasConfig,
    BetasPart,
    BetasPlan,
    FmriSource,
    Geometry,
    Parcels,
    Roi,
    count_repetitions,
)
from braindecode_vis.datasets.sources.fmri_volumes import (
    MaskedVolumes,
    check_same_space,
    read_label_table,
    read_volume_header,
)

SHAPE = (6, 5, 4)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def make_mask(seed=0):
    return np.random.default_rng(seed).random(SHAPE) < 0.4


def make_trials(n, subject="01", session="01"):
    return pd.DataFrame(
        {
            "subject": subject, "session": session, "run": "01", "stimulus_id": [f"i{i}" for i in range(n)],
            "repetition": 0, "split": "train", "concept": "x",
        }
    )  # fmt: skip


def make_part(n_voxels=3, **entities):
    trials = make_trials(2, **entities)
    return BetasPart(trials, ("f.nii",), n_voxels, lambda a, b: np.zeros((b - a, n_voxels), np.float32))


STIMULI = StimulusSet(pd.DataFrame({"stimulus_id": ["i0", "i1"], "concept": "x", "path": "", "sha256": ""}))


def test_geometry_survives_its_coordinates_and_selection():
    mask = make_mask()
    n = int(mask.sum())
    labels = np.random.default_rng(1).integers(-1, 3, n)
    geometry = Geometry(
        np.flatnonzero(mask), mask, AFFINE, {"streams": Roi(labels, {1: "early"})},
        parcels=Parcels(np.maximum(labels, 0), ("a", "b"), ("Vis", "")), maps={"nc": np.arange(n)},
    )  # fmt: skip
    again = Geometry.from_coords(geometry.as_coords())
    np.testing.assert_array_equal(again.mask, mask)
    np.testing.assert_array_equal(again.rois["streams"].labels, labels)
    assert again.rois["streams"].names == {1: "early"}
    assert again.parcels.networks == ("Vis", "")
    half = again.select(labels > 0)
    np.testing.assert_array_equal(half.voxel_ids, np.flatnonzero(mask)[labels > 0])
    np.testing.assert_array_equal(np.flatnonzero(half.mask), half.voxel_ids)
    np.testing.assert_array_equal(half.maps["nc"], np.flatnonzero(labels > 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"voxel_ids": np.arange(3)}, "do not name"),
        ({"affine": None}, "with an affine"),
        ({"rois": {"a": Roi(np.zeros(2))}}, "regions a label 2"),
        ({"maps": {"a": np.zeros(2)}}, "map a has 2"),
        ({"parcels": Parcels(np.zeros(2, int), (), ())}, "parcels label 2"),
    ],
)
def test_a_geometry_of_odd_pieces_is_refused(change, words):
    mask = make_mask()
    pieces = {"voxel_ids": np.flatnonzero(mask), "mask": mask, "affine": AFFINE} | change
    with pytest.raises(DataError, match=words):
        Geometry(**pieces)


def test_source_checks_its_parts():
    geometry = Geometry(np.arange(3))

    def make(parts, geometry=geometry, **plan):
        return FmriSource(tuple(parts), STIMULI, BetasPlan(**plan), "arbitrary", geometry)

    assert make([make_part(), make_part(session="02")]).n_trials == 4
    with pytest.raises(DataError, match="no fMRI file"):
        make([])
    with pytest.raises(DataError, match="has 4 voxels, but its geometry 3"):
        make([make_part(4)])
    with pytest.raises(DataError, match="must follow the other files of its session"):
        make([make_part(), make_part(session="02"), make_part()])
    two = [make_part(), make_part(subject="02")]
    with pytest.raises(
        ConfigError, match=r"do not correspond.*\(in_context, .* shared_space and voxel_clusters\)"
    ):
        make(two, {"01": geometry, "02": geometry})
    assert make(two, {"01": geometry, "02": geometry}, atlas=AtlasConfig()).subjects == ("01", "02")
    with pytest.raises(DataError, match="no geometry for subject 02"):
        make(two, {"01": geometry}, atlas=AtlasConfig())


def test_part_checks_its_trials():
    trials = make_trials(2)
    for bad, words in (
        (trials.drop(columns="concept"), "is missing the column"),
        (trials.assign(split="val"), "split 'val'"),
        (trials.assign(session=["01", "02"]), "2 subjects or sessions"),
    ):
        with pytest.raises(DataError, match=words):
            BetasPart(bad, ("f.nii",), 3, lambda a, b: None)


def test_repetitions_are_counted_over_sessions():
    first, second = count_repetitions([make_trials(3), make_trials(2, session="02")])
    assert first["repetition"].tolist() == [0, 0, 0]
    assert second["repetition"].tolist() == [1, 1]


# --- volumes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
@pytest.mark.parametrize("end", ["nii.gz", "nii"])
@pytest.mark.parametrize("gunzip", ["fastest", "zlib"])
def test_masked_volumes_equal_nibabel(tmp_path, monkeypatch, dtype, end, gunzip):
    if gunzip == "zlib":
        monkeypatch.setattr(fmri_volumes, "find_gunzip", lambda: ("zlib", gzip.GzipFile))
    data = (np.random.default_rng(0).random((*SHAPE, 9)) * 200).astype(dtype)
    path = tmp_path / f"betas.{end}"
    nib.save(nib.Nifti1Image(data, AFFINE), path)
    mask = make_mask()
    expected = nib.load(path).get_fdata()[mask].T.astype(np.float32)
    header = read_volume_header(path)
    volumes = MaskedVolumes(header, mask)
    np.testing.assert_array_equal(volumes(0, 9), expected)
    np.testing.assert_array_equal(volumes(2, 4), expected[2:4])
    np.testing.assert_array_equal(volumes(7, 9), expected[7:])
    np.testing.assert_array_equal(
        MaskedVolumes(header, mask, divide_by=300)(0, 9), expected / np.float32(300)
    )


def test_scaling_of_the_header_is_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(SHAPE), AFFINE)
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "a.nii")
    values, affine = fmri_volumes.read_volume(tmp_path / "a.nii")
    np.testing.assert_allclose(values, nib.load(tmp_path / "a.nii").get_fdata(), rtol=1e-6)
    np.testing.assert_array_equal(affine, AFFINE)


def test_what_is_wrong_with_a_volume_is_said(tmp_path):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((*SHAPE, 9)), AFFINE), path)
    header = read_volume_header(path)
    with pytest.raises(DataError, match=r"\(6, 5, 4\), but the mask has \(6, 5, 3\)"):
        check_same_space(header, (6, 5, 3), AFFINE, what="the mask")
    with pytest.raises(DataError, match="differs from that of the mask by up to 1"):
        check_same_space(header, SHAPE, AFFINE + np.eye(4), what="the mask")
    with pytest.raises(DataError, match="holds 9 volumes"):
        fmri_volumes.read_volume(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="truncated or damaged: it ends in volume"):
        MaskedVolumes(header, make_mask())(0, 9)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as NIfTI"):
        read_volume_header(path)
    with pytest.raises(DataError, match="does not exist"):
        read_volume_header(tmp_path / "b.nii")


def test_label_tables_of_three_kinds(tmp_path):
    path = tmp_path / "names.txt"
    for text in (
        "# comment\n0 Unknown 0 0 0 0\n1 V1v 1 2 3 0\n",
        "0\tUnknown\n1\tV1v\t120\t18\t131\t0\n",
        "index\tname\n0\tUnknown\n1\tV1v\n",
    ):
        path.write_text(text)
        assert read_label_table(path) == {0: "Unknown", 1: "V1v"}
    path.write_text("0 Unknown\nV1v 1\n")
    with pytest.raises(DataError, match="line 2 of"):
        read_label_table(path)
    path.write_text("0 Unknown\n" + "\0" * 4096)
    with pytest.raises(DataError, match="line 2 of") as told:  # once with all of the zeros
        read_label_table(path)
    assert len(str(told.value)) < 600
