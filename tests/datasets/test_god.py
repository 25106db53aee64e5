"""GOD: a phantom BData file, and the real lists of 1250 stimulus numbers."""

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import read_responses, read_stimuli
from braindecode_vis.datasets.kamitani.bdata import (
    decode_stimulus_id,
    encode_stimulus_id,
    find_grid,
    read_bdata,
    read_list,
)
from braindecode_vis.datasets.kamitani.god import GodConfig
from braindecode_vis.parts.phantom.formats.kamitani_format import write_bdata
from braindecode_vis.preprocessing.betas import write_fmri

TRAIN = ["n01518878_10042", "n01518878_5958", "n02692877_10393"]
TEST = ["n01621127_19020", "n01443537_22563"]
XYZ = np.array([[3.0, 0, 0], [0, 0, 0], [0, 3, 0], [3, 3, -3], [0, 0, -3]]) + np.array([1.5, -40, 7])
ROIS = {
    "ROI_V1": np.array([1, 1, 0, 0, 0]),
    "ROI_VC": np.array([1, 1, 1, 0, 0]),
    "ROI_FFA": np.array([0, 0, 0, 1, 1]),
}


def make_labels():
    imagined = [float(name[1:9]) for name in TEST]
    return pd.DataFrame(
        {
            "DataType": [1] * 3 + [2] * 4 + [3] * 2,
            "stimulus_id": [*map(encode_stimulus_id, TRAIN + TEST + TEST[::-1]), *imagined],
            "Run": [1, 1, 2, 1, 1, 2, 2, 1, 1],
            "Block": [1, 2, 1, 1, 2, 1, 2, 1, 2],
        }
    )


def write_subject(root, number=1, labels=None, xyz=XYZ, **options):
    labels = make_labels() if labels is None else labels
    data = np.random.default_rng(number).standard_normal((len(labels), 5)) + np.arange(5)
    path = root / f"Subject{number}.h5"
    write_bdata(path, [data], labels, ROIS, voxel_xyz=xyz, **options)
    return path, data


@pytest.mark.parametrize("naming", ["dataSet", "dataset"])
def test_samples_come_back_under_both_spellings(tmp_path, naming):
    _, data = write_subject(tmp_path, naming=naming)
    write_fmri(GodConfig(root=tmp_path, test="both", zscore="none"), tmp_path / "out")
    responses, stimuli = (
        read_responses(tmp_path / "out" / "responses"),
        read_stimuli(tmp_path / "out" / "stimuli"),
    )
    trials = responses.trials
    assert trials["stimulus_id"].tolist() == [*TRAIN, *TEST, *TEST[::-1], "n01621127", "n01443537"]
    assert trials["split"].tolist() == ["train"] * 3 + ["test"] * 6
    assert trials["task"].tolist() == ["training"] * 3 + ["test"] * 4 + ["imagery"] * 2
    assert trials["repetition"].tolist() == [0] * 5 + [0 + 1, 0 + 1, 0, 0]
    assert trials["run"].tolist()[2:5] == ["training-02", "test-01", "test-01"]
    assert stimuli.concepts_of(["n01621127_19020", "n01621127"]).tolist() == ["n01621127"] * 2
    assert stimuli.table.set_index("stimulus_id").loc["n01443537", "path"] == ""
    # Voxels are put into the order of the grid; positions say which is which.
    ids, affine = np.asarray(responses.coords["voxel_id"]), np.asarray(responses.coords["affine"])
    ijk = np.stack(np.unravel_index(ids, np.asarray(responses.coords["mask"]).shape), axis=1)
    positions = ijk @ affine[:3, :3].T + affine[:3, 3]
    order = [int(np.flatnonzero(np.all(np.isclose(XYZ, p), axis=1))[0]) for p in positions]
    np.testing.assert_allclose(responses.data, data[:, order], rtol=1e-6)
    np.testing.assert_array_equal(responses.coords["roi_FFA"], ROIS["ROI_FFA"][order])


@pytest.mark.parametrize("test, n", [("perception", 7), ("imagery", 5), ("both", 9)])
def test_which_samples_test(tmp_path, test, n):
    write_subject(tmp_path)
    assert GodConfig(root=tmp_path, test=test).open_betas().n_trials == n


def test_imagery_alone_lists_the_pictures_of_its_categories(tmp_path):
    """Without them nothing represents a category that was only imagined."""
    write_subject(tmp_path)
    table = GodConfig(root=tmp_path, test="imagery").open_betas().stimuli.table.set_index("stimulus_id")
    assert set(table.index) == {*TRAIN, *TEST, "n01621127", "n01443537"}
    assert (table["path"] == "").sum() == 2


def test_zscore_is_that_of_training_samples(tmp_path):
    _, data = write_subject(tmp_path)
    write_fmri(GodConfig(root=tmp_path), tmp_path / "out")
    responses = read_responses(tmp_path / "out" / "responses")
    np.testing.assert_allclose(responses.data[:3].mean(axis=0), 0, atol=1e-6)
    spread = np.sort(np.abs(responses.data[3:]).max(axis=0))
    expected = np.sort(np.abs((data[3:7] - data[:3].mean(axis=0)) / data[:3].std(axis=0)).max(axis=0))
    np.testing.assert_allclose(spread, expected, rtol=1e-4)


def test_regions_are_chosen_by_name(tmp_path):
    write_subject(tmp_path)
    source = GodConfig(root=tmp_path, rois=("ROI_V1", "ROI_FFA")).open_betas()
    assert source.find_geometry("01").n_voxels == 4
    assert source.parts[0].read(0, 2).shape == (2, 4)
    with pytest.raises(DataError, match=r"has no 'ROI_V5' \(did you mean "):
        GodConfig(root=tmp_path, rois=("ROI_V5",)).open_betas()


def test_a_region_without_voxels_is_named(tmp_path):
    """A block of zeros in the table of regions changed the run, and nothing was said."""
    path, _ = write_subject(tmp_path)
    assert GodConfig(root=tmp_path).open_betas().notes["warnings"] == []
    with h5py.File(path, "a") as file:
        keys = [key.decode() if isinstance(key, bytes) else key for key in file["metaData/key"][:]]
        file["metaData/value"][keys.index("ROI_FFA")] = 0.0
    (warning,) = GodConfig(root=tmp_path).open_betas().notes["warnings"]
    assert warning.startswith("1 region(s) of Subject1.h5 have no voxel, first ROI_FFA")


def test_positions_off_a_grid_travel_as_maps(tmp_path):
    xyz = XYZ + np.random.default_rng(0).uniform(-0.4, 0.4, XYZ.shape)
    write_subject(tmp_path, xyz=xyz)
    geometry = GodConfig(root=tmp_path).open_betas().find_geometry("01")
    assert geometry.mask is None
    np.testing.assert_allclose(np.stack([geometry.maps[f"voxel_{a}"] for a in "xyz"], axis=1), xyz)
    assert find_grid(np.vstack([XYZ, XYZ[:1]])) is None  # two voxels at one place


def test_images_are_found_by_name(tmp_path):
    from PIL import Image

    write_subject(tmp_path)
    for name in TRAIN + TEST:
        path = tmp_path / "images" / name[:9] / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(path)
    stimuli = GodConfig(root=tmp_path, images=tmp_path / "images").open_betas().stimuli
    assert stimuli.read_image("n01621127_19020").shape == (4, 4, 3)
    path.unlink()
    with pytest.raises(DataError, match="1 of 5 images are not below"):
        GodConfig(root=tmp_path, images=tmp_path / "images").open_betas()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no Subject1.h5"):
        GodConfig(root=tmp_path).open_betas()
    write_subject(tmp_path, dtype="<f4")
    with pytest.raises(DataError, match="single precision"):
        GodConfig(root=tmp_path).open_betas()
    labels = make_labels()
    for column, row, value, message in (
        ("DataType", 0, 4, "DataType 4; 1 to 3"),
        ("stimulus_id", 1, 1518878.0, "sample 1 of .* names the category n01518878 and no image"),
        ("stimulus_id", 3, encode_stimulus_id(TRAIN[0]), "tests 1 categories that it trains on"),
        ("stimulus_id", 3, np.nan, "is not of the form"),
    ):
        wrong = labels.astype(float)
        wrong.loc[row, column] = value
        write_subject(tmp_path, labels=wrong)
        with pytest.raises(DataError, match=message):
            GodConfig(root=tmp_path).open_betas()
    path, _ = write_subject(tmp_path)
    with pytest.raises(DataError, match="GOD subject 3 is not there; found 1"):
        GodConfig(root=tmp_path, subjects=(3,)).open_betas()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        GodConfig(root=tmp_path).open_betas()
    assert not GodConfig(root=tmp_path).check()[0].ok
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros(3)
    with pytest.raises(DataError, match="holds features, but a BData file has dataSet or dataset"):
        read_bdata(path)


def test_two_subjects_do_not_share_voxels(tmp_path):
    write_subject(tmp_path, 1)
    write_subject(tmp_path, 2)
    assert GodConfig(root=tmp_path, subjects=(2,)).open_betas().subjects == ("02",)
    with pytest.raises(Exception, match="do not correspond"):
        GodConfig(root=tmp_path).open_betas()


def test_single_numbers():
    assert decode_stimulus_id("1621127.01902") == decode_stimulus_id(1621127.01902) == "n01621127_19020"
    for wrong in ("n01621127", "1.2.3", float("inf")):
        with pytest.raises(DataError, match="not of the form"):
            decode_stimulus_id(wrong)


@pytest.mark.shared
def test_all_1250_real_numbers_name_their_pictures(shared, tmp_path):
    folder = shared / "data/god"
    train, test = (read_list(folder / f"stimulus_ImageNet{part}.tsv") for part in ("Training", "Test"))
    assert (len(train), len(test)) == (1200, 50)
    assert (train["concept"].nunique(), test["concept"].nunique()) == (150, 50)
    assert not set(train["concept"]) & set(test["concept"])
    for name in [*train["stimulus_id"], *test["stimulus_id"]]:
        # Through a float64 column, as the recording stores it.
        assert decode_stimulus_id(float(np.float64(encode_stimulus_id(name)))) == name
    listed = pd.read_csv(folder / "imageID_test.csv", header=None, dtype=str)
    assert [decode_stimulus_id(code) + ".JPEG" for code in listed[0]] == listed[1].tolist()
    # The file of a person who saw every picture once passes the check against the same lists.
    names = [*train["stimulus_id"], *np.repeat(test["stimulus_id"].to_numpy(), 35)]
    labels = pd.DataFrame(
        {"DataType": [1] * 1200 + [2] * 1750, "stimulus_id": [encode_stimulus_id(n) for n in names]}
    )
    imagined = pd.DataFrame({"DataType": 3, "stimulus_id": [float(c[1:]) for c in test["concept"]] * 10})
    labels = pd.concat([labels, imagined], ignore_index=True).assign(Run=1, Block=1)
    write_subject(tmp_path, labels=labels)
    for part in ("Training", "Test"):
        (tmp_path / f"stimulus_ImageNet{part}.tsv").write_bytes(
            (folder / f"stimulus_ImageNet{part}.tsv").read_bytes()
        )
    findings = GodConfig(root=tmp_path).check()
    assert len(findings) == 5
    assert all(finding.ok for finding in findings), findings


def test_pictures_that_come_later_are_noticed(tmp_path):
    """A run prepared without pictures was reused for ever, whatever folder of pictures was named afterwards."""
    write_subject(tmp_path)
    bare = GodConfig(root=tmp_path)
    without = bare.hash_inputs()
    assert bare.open_betas().stimuli.root is None
    folder = tmp_path / "images" / "training"
    folder.mkdir(parents=True)
    for number, name in enumerate([*TRAIN, *TEST]):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{name}.png")  # ImageNet's own are .JPEG
        found = bare.open_betas().stimuli.root
        assert (found is None) == (number < len(TRAIN + TEST) - 1)
    assert bare.hash_inputs() == GodConfig(root=tmp_path, images=tmp_path / "images").hash_inputs() != without
    assert bare.open_betas().stimuli.read_image(TEST[1])[0, 0, 0] == 4
