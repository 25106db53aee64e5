"""THINGS-fMRI: phantom tables and volumes of the same betas, and the real events."""

import re

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_responses, read_stimuli
from braindecode_vis.datasets.things_fmri.dataset import ThingsFmriConfig
from braindecode_vis.datasets.things_fmri.response_tables import (
    ResponseTable,
    find_concept,
    open_response_table,
)
from braindecode_vis.parts.phantom.formats import things_fmri_format as phantom
from braindecode_vis.preprocessing.betas import write_fmri

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SHAPE = (4, 3, 3)


@pytest.fixture(scope="module")
def images():
    return phantom.make_image_table(["ant", "coat_rack", "zebra"], n_exemplars=2, n_test=2)


@pytest.fixture(scope="module")
def design(images):
    return phantom.make_things_fmri_design(images, n_sessions=2, n_runs=2, n_catch=2)


@pytest.fixture
def tree(tmp_path, images, design):
    """Both forms of the same betas: voxel number plus a hundred times the row of the image; catch trials are -1."""
    mask = np.zeros(SHAPE, bool)
    mask[1:3, 1:, :2] = True
    ijk = np.argwhere(mask)[::-1]  # the order of the table is not that of the volume
    stimuli = phantom.make_stimulus_metadata(design, images, 1)
    rois = pd.DataFrame({"V1": [1, 0] * 4, "LO1 (prf)": 0, "lFFA": [0, 1] * 4, "glasser-V1": [1] + [0] * 7})
    rois["glasser-MT"] = [0, 1] + [0] * 6
    voxels = phantom.make_voxel_metadata(1, ijk, rois, nc_singletrial=np.arange(8.0), prf_size=np.ones(8))
    flat = np.ravel_multi_index(tuple(ijk.T), SHAPE)
    rows = design.loc[design["trial_type"] != "catch", "row"].to_numpy()
    betas = (flat[:, None] + 100 * rows).astype(np.float32)
    phantom.write_response_table(
        tmp_path, 1, [betas[:3], betas[3:]], n_voxels=8, stimuli=stimuli, voxels=voxels
    )
    phantom.write_brainmask(tmp_path, 1, mask, AFFINE)
    for (session, run), part in design.groupby(["session", "run"]):
        volumes = (
            np.arange(np.prod(SHAPE)).reshape(SHAPE) + 100.0 * row if row >= 0 else np.full(SHAPE, -1.0)
            for row in part["row"]
        )
        phantom.write_volume_betas(
            tmp_path, 1, session, run, volumes, shape=SHAPE, affine=AFFINE, design=design, images=images
        )
    return tmp_path


@pytest.mark.parametrize("form", ["table", "volume"])
def test_both_forms_give_the_same_responses(tree, images, design, form):
    write_fmri(ThingsFmriConfig(root=tree, form=form, zscore="none", sessions=(1, 2)), tree / "out")
    responses, stimuli = read_responses(tree / "out" / "responses"), read_stimuli(tree / "out" / "stimuli")
    shown = design[design["trial_type"] != "catch"]
    rows = shown["row"].to_numpy()
    assert responses.trials["stimulus_id"].tolist() == images["stimulus_id"].to_numpy()[rows].tolist()
    assert (
        responses.trials["split"].tolist()
        == shown["trial_type"].map({"exp": "train", "test": "test"}).tolist()
    )
    assert responses.trials["session"].tolist() == [f"{n:02d}" for n in shown["session"]]
    assert responses.trials["run"].tolist() == [f"{n:02d}" for n in shown["run"]]
    assert responses.trials.groupby("split")["repetition"].max().to_dict() == {"train": 0, "test": 1}
    ids = np.asarray(responses.coords["voxel_id"])
    np.testing.assert_array_equal(responses.data, ids[None] + 100 * rows[:, None])
    np.testing.assert_array_equal(responses.coords["affine"], AFFINE)
    assert sorted(set(stimuli.table["concept"])) == ["ant", "coat_rack", "zebra"]


def test_noise_ceilings_and_regions_travel(tree):
    write_fmri(ThingsFmriConfig(root=tree, sessions=(1, 2)), tree / "out")
    responses = read_responses(tree / "out" / "responses")
    # The table counts backwards here, the volume forwards.
    np.testing.assert_array_equal(responses.coords["map_nc_singletrial"], np.arange(8.0)[::-1])
    np.testing.assert_array_equal(responses.coords["roi_V1"], [0, 1] * 4)
    np.testing.assert_array_equal(responses.coords["roi_glasser"], [0] * 6 + [2, 1])
    assert responses.coords["roi_names"]["glasser"] == {"1": "V1", "2": "MT"}
    assert not np.any(responses.coords["roi_LO1_prf"])


def test_voxels_are_chosen_by_region_and_noise_ceiling(tree):
    source = ThingsFmriConfig(
        root=tree, rois=("V1", "glasser-MT"), min_noise_ceiling=1.0, zscore="none"
    ).open_betas()
    np.testing.assert_array_equal(source.find_geometry("01").maps["nc_singletrial"], [6, 4, 2, 1])
    ids = source.find_geometry("01").voxel_ids
    np.testing.assert_array_equal(source.parts[0].read(0, 2)[0] % 100, ids)
    assert "nc_singletrial >= 1.0" in source.notes["voxels_chosen_with_test_images"]
    with pytest.raises(ConfigError, match="no region 'V2'"):
        ThingsFmriConfig(root=tree, rois=("V2",)).open_betas()
    with pytest.raises(ConfigError, match="no voxel"):
        ThingsFmriConfig(root=tree, min_noise_ceiling=99.0).open_betas()
    with pytest.raises(ConfigError, match="need the table"):
        ThingsFmriConfig(root=tree, form="volume", rois=("V1",)).open_betas()


def test_one_session_alone(tree, design):
    for form in ("table", "volume"):
        source = ThingsFmriConfig(root=tree, form=form, sessions=(2,)).open_betas()
        assert set(source.parts[0].trials["session"]) == {"02"}
        assert source.n_trials == ((design["session"] == 2) & (design["trial_type"] != "catch")).sum()
        with pytest.raises(DataError, match="subject 01, session 3 is not there; found 1, 2"):
            ThingsFmriConfig(root=tree, form=form, sessions=(3,)).open_betas()


def test_a_trial_that_the_list_lacks_is_told(tree):
    """A column of responses was then taken for the numbers of voxels, and ended in a traceback of pandas."""
    path = next(tree.rglob("*StimulusMetadata.csv"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(DataError, match=r"of which the 8 of VoxelMetadata.csv name 0; take both tables"):
        ThingsFmriConfig(root=tree, form="table").open_betas()
    twice = ResponseTable(path, "block0_values", 1, np.array([0.5, 0.25, 0.5]), None)
    with pytest.raises(
        DataError, match=r"voxel 0\.5 twice, .* than StimulusMetadata\.csv has trials; take all"
    ):
        twice.find_rows(np.arange(3))


@pytest.mark.parametrize("chunks", [None, (4, 3)])
def test_reading_is_the_same_from_contiguous_and_chunked_files(tree, chunks, monkeypatch):
    """pandas compresses if asked to; then the matrix is no plain part of the file. Small caches change nothing."""
    from braindecode_vis.datasets.things_fmri import response_tables

    expected = ThingsFmriConfig(root=tree).open_betas().parts[0]
    n = len(expected.trials)
    expected = expected.read(0, n)
    path = next(tree.rglob("*ResponseData.h5"))
    if chunks:
        with h5py.File(path, "a") as file:
            values = file["ResponseData/block0_values"][()]
            del file["ResponseData/block0_values"]
            file["ResponseData"].create_dataset(
                "block0_values", data=values, chunks=chunks, compression="gzip"
            )
    assert (open_response_table(path, n_trials=10).contiguous is None) == bool(chunks)
    monkeypatch.setattr(response_tables, "_CACHE_BYTES", 64)
    part = ThingsFmriConfig(root=tree).open_betas().parts[0]
    pieces = [part.read(start, min(start + 2, n)) for start in range(0, n, 2)]
    np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_a_frame_whose_voxel_ids_are_floats_too(tree, images, design):
    """Then pandas keeps one block, and the first of its columns is the voxel id."""
    path = next(tree.rglob("*ResponseData.h5"))
    expected = ThingsFmriConfig(root=tree).open_betas().parts[1].read(0, 3)
    with h5py.File(path, "a") as file:
        group = file["ResponseData"]
        values = np.concatenate([group["block1_values"][()], group["block0_values"][()]], axis=1)
        del group["block0_values"], group["block1_values"]
        group["block0_values"] = values.astype(float)
    np.testing.assert_array_equal(ThingsFmriConfig(root=tree).open_betas().parts[1].read(0, 3), expected)


def test_without_a_brain_mask_positions_travel_as_maps(tree):
    mask = next(tree.glob("brainmasks/*"))
    mask.unlink()
    mask.mkdir()  # it stood for no mask
    with pytest.raises(DataError, match=r"brainmask\.nii\.gz should be a file, but .* is a folder"):
        ThingsFmriConfig(root=tree).open_betas()
    mask.rmdir()
    geometry = ThingsFmriConfig(root=tree).open_betas().find_geometry("01")
    assert geometry.mask is None
    assert geometry.maps["voxel_x"].tolist() == [2, 2, 2, 2, 1, 1, 1, 1]
    with pytest.raises(DataError, match="have no voxels"):
        ThingsFmriConfig(root=tree, form="volume").open_betas()


def test_bad_input_is_named(tree, tmp_path_factory):
    with pytest.raises(DataError, match="holds no betas_vol"):
        ThingsFmriConfig(root=tmp_path_factory.mktemp("empty")).open_betas()
    with pytest.raises(DataError, match="table of subject 02 is not there; found 01"):
        ThingsFmriConfig(root=tree, subjects=(2,)).open_betas()
    path = next(tree.rglob("*StimulusMetadata.csv"))
    table = pd.read_csv(path)
    for change, message in (
        (table.iloc[:-3], "but StimulusMetadata.csv lists 7 trials"),
        (table.assign(concept=np.roll(table["concept"], 1)), "columns are shifted"),
        (table.assign(trial_type="catch"), "trials of the type 'catch'"),
        (table.drop(columns="run"), "is missing the column"),
    ):
        change.to_csv(path, index=False)
        with pytest.raises(DataError, match=message):
            ThingsFmriConfig(root=tree).open_betas()
    table.to_csv(path, index=False)
    path = next(tree.rglob("*VoxelMetadata.csv"))
    voxels = pd.read_csv(path)
    for change, message in (
        (voxels.iloc[:-1], "has 8 voxels, of which the 7"),
        (voxels.assign(voxel_x=voxels["voxel_x"] + 1), "are outside sub-01_space-T1w_brainmask"),
        (voxels.assign(voxel_x=0.5), "not voxel indices"),
        (voxels.assign(V1=7), "'V1'.* should flag a region"),
        (voxels.assign(nc_testset="0.0s31"), "a cell in the column 'nc_testset' that is not a number"),
    ):
        change.to_csv(path, index=False)
        with pytest.raises(DataError, match=message):
            ThingsFmriConfig(root=tree).open_betas()


def test_a_subject_of_the_other_form_is_not_left_out_in_silence(tree):
    (tree / "betas_vol/sub-02").mkdir(parents=True)
    with pytest.raises(DataError, match=r"subject 02 below .* layout volume alone.*dataset.form=volume"):
        ThingsFmriConfig(root=tree).open_betas()
    ThingsFmriConfig(root=tree, subjects=(1,)).open_betas()


def test_volumes_and_conditions_must_agree(tree):
    path = next(tree.rglob("*run-02_conditions.tsv"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match=r"holds \d betas, but its conditions list \d trials"):
        ThingsFmriConfig(root=tree, form="volume").open_betas()
    path.write_text("\n".join(lines) + "\n")
    mask = next(tree.glob("brainmasks/*"))
    nib.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE * 1.1).to_filename(mask)
    with pytest.raises(DataError, match="affine"):
        ThingsFmriConfig(root=tree, form="volume").open_betas()


def test_check_compares_with_the_declared_counts(tree):
    findings = ThingsFmriConfig(root=tree).check()
    assert [finding.ok for finding in findings] == [False, False, False, True]
    assert findings[0].message.startswith("2 of 12 declared sessions are read, without 03, ")
    assert findings[1].message == "6 trials, declared 8640"


@pytest.mark.shared
def test_real_events_obey_the_rules_of_names(shared):
    """The concept is in the file name, and test images are those numbered above twelve."""
    files = sorted((shared / "data/bids_metadata/ds004192").rglob("*task-things_run*_events.tsv"))
    events = pd.concat([pd.read_csv(file, sep="\t") for file in files])
    assert len(files) == 20
    assert events["trial_type"].value_counts().to_dict() == {"exp": 1440, "test": 200, "catch": 200}
    names = events["file_path"].str.split("/").str[-1].str.removesuffix(".jpg")
    assert names.str.startswith("catch").to_numpy().tolist() == (events["trial_type"] == "catch").tolist()
    shown = events["trial_type"] != "catch"
    number = names[shown].map(lambda name: int(re.search(r"_(\d+)[a-z]*$", name)[1]))
    assert ((number > 12) == (events.loc[shown, "trial_type"] == "test")).all()
    table = pd.read_csv(shared / "data/things/things_concepts.tsv", sep="\t")
    rows = events.loc[shown, "things_category_nr"].astype(int) - 1
    assert names[shown].map(find_concept).tolist() == table["uniqueID"].to_numpy()[rows].tolist()
