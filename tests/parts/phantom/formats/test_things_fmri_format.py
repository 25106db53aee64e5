"""THINGS-fMRI phantom: read back with h5py, pandas and nibabel, traps included."""

import pickle

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.phantom.formats import things_fmri_format

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def images():
    return things_fmri_format.make_image_table(["ant", "coat_rack", "zebra"], n_exemplars=2, n_test=2)


@pytest.fixture(scope="module")
def design(images):
    return things_fmri_format.make_things_fmri_design(images, n_sessions=2, n_runs=2, n_catch=2)


@pytest.fixture(scope="module")
def tables(images, design):
    stimuli = things_fmri_format.make_stimulus_metadata(design, images, 1)
    rois = pd.DataFrame({"V1": [1, 0, 0, 1, 0], "LO1 (prf)": 0, "lFFA": [0, 1, 0, 0, 0], "glasser-V1": 1})
    voxels = things_fmri_format.make_voxel_metadata(
        1, np.arange(15).reshape(5, 3), rois, nc_singletrial=np.arange(5) * 1.5, prf_size=np.ones(5)
    )
    return stimuli, voxels


@pytest.fixture(scope="module")
def written(tmp_path_factory, tables):
    root = tmp_path_factory.mktemp("fmri")
    betas = np.random.default_rng(0).standard_normal((5, len(tables[0]))).astype(np.float32)
    blocks = (betas[i : i + 2] for i in range(0, 5, 2))
    path = things_fmri_format.write_response_table(
        root, 1, blocks, n_voxels=5, stimuli=tables[0], voxels=tables[1]
    )
    return path, betas


def test_table_leaves_catch_trials_out(written, design, tables):
    path, betas = written
    assert len(tables[0]) == (design["trial_type"] != "catch").sum() == 10
    with h5py.File(path) as file:
        group = file["ResponseData"]
        np.testing.assert_array_equal(group["block0_values"][()], betas)
        np.testing.assert_array_equal(group["block1_values"][:, 0], np.arange(5))
        assert pickle.loads(group["axis0"][0].tobytes()).tolist() == ["voxel_id", *range(10)]
    stimuli = pd.read_csv(path.with_name("sub-01_StimulusMetadata.csv"))
    assert stimuli["trial_type"].value_counts().to_dict() == {"train": 6, "test": 4}
    voxels = pd.read_csv(path.with_name("sub-01_VoxelMetadata.csv"))
    assert voxels.columns[0] == "voxel_id"
    assert voxels["LO1 (prf)"].sum() == 0
    assert voxels["prf-size"].tolist() == [1.0] * 5
    assert voxels["nc_singletrial"].tolist() == [0, 1.5, 3, 4.5, 6]


def test_pandas_reads_the_table_as_its_own(written):
    pytest.importorskip("tables")
    path, betas = written
    frame = pd.read_hdf(path)
    assert frame.columns[0] == "voxel_id"
    assert frame.columns[1:].tolist() == list(range(10))
    np.testing.assert_array_equal(frame.drop(columns="voxel_id").to_numpy(), betas)
    np.testing.assert_array_equal(frame["voxel_id"], np.arange(5))


@pytest.mark.filterwarnings("ignore::pandas.errors.PerformanceWarning")  # the mixed names of the reference
def test_layout_is_that_of_pandas(written, tmp_path):
    """Everything that pandas writes for such a frame is in our file, under the same names and types."""
    pytest.importorskip("tables")
    path, betas = written
    frame = pd.DataFrame(betas)
    frame.insert(0, "voxel_id", np.arange(5))
    frame.to_hdf(tmp_path / "reference.h5", key="ResponseData")
    with h5py.File(tmp_path / "reference.h5") as reference, h5py.File(path) as ours:
        names = []
        reference.visit(names.append)
        for name in names:
            assert set(reference[name].attrs) <= set(ours[name].attrs), name
            if isinstance(reference[name], h5py.Dataset):
                assert (reference[name].shape, reference[name].dtype) == (
                    ours[name].shape,
                    ours[name].dtype,
                ), name


def test_same_input_gives_same_bytes(written, tables, tmp_path):
    path, betas = written
    again = things_fmri_format.write_response_table(
        tmp_path, 1, iter([betas]), n_voxels=5, stimuli=tables[0], voxels=tables[1]
    )
    assert again.read_bytes() == path.read_bytes()


def test_missing_voxels_leave_no_file(tables, tmp_path):
    with pytest.raises(DataError, match="announced with 5 voxels, but 4 were received"):
        things_fmri_format.write_response_table(
            tmp_path, 1, iter([np.zeros((4, 10))]), n_voxels=5, stimuli=tables[0], voxels=tables[1]
        )
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_events(tmp_path, images, design):
    path = things_fmri_format.write_events(tmp_path, 1, 2, 1, design, images)
    assert path.name == "sub-01_ses-things02_task-things_run-01_events.tsv"
    events = pd.read_csv(path, sep="\t")
    assert list(events.columns) == [
        "onset", "duration", "trial_type", "category_nr", "exemplar_nr", "test_image_nr", "things_category_nr",
        "things_exemplar_nr", "response_time", "file_path",
    ]  # fmt: skip
    assert events["onset"].tolist() == [3 + 4.5 * i for i in range(len(events))]
    catch = events["trial_type"] == "catch"
    assert (events.loc[catch, "category_nr"] == 4).all()
    assert events["things_category_nr"].isna().equals(catch)
    assert (events.loc[~catch, "things_category_nr"] != events.loc[~catch, "category_nr"]).all()
    assert events["test_image_nr"].notna().equals(events["trial_type"] == "test")
    # The folder of a two-word concept holds its first word.
    assert images.query("concept == 'coat_rack'")["file_path"].iloc[0] == "coat/coat_rack_01b.jpg"


def test_volumes_keep_catch_trials(tmp_path, images, design):
    rows = design.query("session == 1 and run == 2")
    betas = np.random.default_rng(0).standard_normal((len(rows), 4, 3, 2)).astype(np.float32)
    path = things_fmri_format.write_volume_betas(
        tmp_path, 1, 1, 2, iter(betas), shape=(4, 3, 2), affine=AFFINE, design=design, images=images
    )
    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.moveaxis(betas, 0, -1))
    conditions = pd.read_csv(str(path).replace("betas.nii.gz", "conditions.tsv"), sep="\t")
    assert len(conditions) == len(rows)
    is_catch = conditions["image_filename"].str.startswith("catch")
    assert is_catch.tolist() == (rows["trial_type"] == "catch").tolist()
    mask = np.random.default_rng(0).random((4, 3, 2)) > 0.5
    loaded = nib.load(things_fmri_format.write_brainmask(tmp_path, 1, mask, AFFINE))
    np.testing.assert_array_equal(loaded.get_fdata(), mask)
