"""Layouts: what is written is what is read in every form, and what does not fit is named in a sentence."""

import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.layout import Array, File, Layout
from tests.datasets.reading import save_images

ARRAYS = {
    "data{subject}": Array(("voxel of {subject}", "image"), "float32"),
    "region{subject}": Array(("voxel of {subject}",), codes={0: "other", 1: "V1"}),
    "note": Array(("image",), optional=True),
}
COUNTS = {"counts": Array(("neuron", "picture"))}
LAYOUT = Layout(
    mat5=File("five.mat", "mat5", "the old file", "fetch it", ARRAYS),
    mat73=File("seven.mat", "mat73", "the new file", "fetch it", ARRAYS),
    hdf5=File("{session}/six.h5", "hdf5", "the file of a session", "fetch it", ARRAYS),
    npy=File("counts_{session}.npy", "npy", "the counts", "fetch them", COUNTS),
    pictures=File("pictures_{session}.zip", "pictures", "the pictures", "fetch them"),
)
CONTENT = {
    # Two subjects need not have as many voxels, but see the same images.
    "data1": np.arange(12, dtype=np.float32).reshape(4, 3),
    "region1": np.array([0, 1, 1, 0]),
    "data2": np.arange(6, dtype=np.float32).reshape(2, 3),
    "region2": np.array([1, 0]),
}


@pytest.mark.parametrize("name", ["mat5", "mat73", "hdf5"])
def test_arrays_come_back_in_the_order_of_the_layout(name, tmp_path):
    path = LAYOUT.write(tmp_path, name, CONTENT, session="a")
    with LAYOUT.open(path, name) as file:
        for key, value in CONTENT.items():
            np.testing.assert_array_equal(file.read(key), value)
        part = file.read("data1", first="image", part={"image": slice(1, 3)})
        np.testing.assert_array_equal(part, CONTENT["data1"].T[1:3])
        assert file.measure("data1") == {"voxel of 1": 4, "image": 3}
        assert "note" not in file
    assert all(finding.ok for finding in LAYOUT.check(tmp_path, [name], session="a"))
    # The same arrays give the same bytes.
    assert path.read_bytes() == LAYOUT.write(tmp_path / "again", name, CONTENT, session="a").read_bytes()


def test_a_file_of_one_array_and_its_labels(tmp_path):
    for session in ("b", "a"):
        LAYOUT.write(tmp_path, "npy", {"counts": np.eye(2)}, session=session)
    assert LAYOUT.list_labels(tmp_path, "npy") == [{"session": "a"}, {"session": "b"}]
    np.testing.assert_array_equal(LAYOUT.read(tmp_path, "npy", "counts", session="b"), np.eye(2))


def test_a_field_of_digits_is_a_number_and_known_labels_narrow_the_list(tmp_path):
    layout = Layout(
        npy=File("sub-{subject}/ses-{session:02d}.npy", "npy", "the counts", "fetch them", COUNTS)
    )
    for subject, session in (("a", 1), ("a", 12), ("b", 3)):
        path = layout.write(tmp_path, "npy", {"counts": np.eye(2)}, subject=subject, session=session)
    path.with_name("ses-pilot.npy").touch()
    assert layout.list_labels(tmp_path, "npy", subject="a") == [{"session": "01"}, {"session": "12"}]
    assert layout.list_labels(tmp_path, "npy", subject="b") == [{"session": "03"}]


def test_arrays_in_groups_are_checked(tmp_path):
    arrays = {"{session}/{run}/betas": Array(("trial of {session}/{run}", "voxel"))}
    layout = Layout(hdf5=File("betas.h5", "hdf5", "the betas", "fetch them", arrays))
    layout.write(tmp_path, "hdf5", {"1/1/betas": np.ones((2, 3)), "1/2/betas": np.ones((4, 3))})
    (found,) = layout.check(tmp_path)
    assert (found.ok, found.message) == (True, "2 x trial of 1/1, 3 x voxel, 4 x trial of 1/2")


def test_pictures_are_in_the_order_of_their_names_in_whatever_folder(tmp_path):
    paths = save_images(tmp_path, np.ones((2, 3, 3, 3), np.uint8) * np.uint8([[[[1]]], [[[2]]]]))
    with zipfile.ZipFile(LAYOUT.write_pictures(tmp_path, "pictures", [], session="a"), "w") as archive:
        for n in (2, 1):
            archive.write(paths[n - 1], f"folder{3 - n}/image{n:04d}.png")
    assert LAYOUT.read_pictures(tmp_path, "pictures", session="a")[:, 0, 0, 0].tolist() == [1, 2]
    assert [f.message for f in LAYOUT.check(tmp_path, ["pictures"], session="a")] == ["2 pictures"]
    Image.new("RGB", (4, 4)).save(paths[1])
    LAYOUT.write_pictures(tmp_path, "pictures", paths, session="a")
    with pytest.raises(DataError, match="not of one size"):
        LAYOUT.read_pictures(tmp_path, "pictures", session="a")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"region1": None, "region2": None}, r"cannot be written without region\{subject\}"),
        ({"data1": np.zeros((4, 2))}, "length .* along image"),
        ({"region1": np.zeros((2, 2))}, "has the shape"),
        ({"other": np.zeros(3)}, "has no array other"),
    ],
)
def test_what_does_not_fit_is_not_written(changes, sentence, tmp_path):
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not None}
    with pytest.raises(DataError, match=sentence):
        LAYOUT.write(tmp_path, "hdf5", content, session="a")
    assert not list(tmp_path.rglob("*.h5"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the old file was not found at .*five.mat; fetch it"),
        ({"data1": np.zeros((4, 3))}, "is missing the variable region1"),
        ({"data1": np.zeros((4, 3)), "region1": np.zeros(5)}, "has the length 5 along voxel of 1"),
        ({"data1": np.zeros((4, 3)), "region1": np.full(4, 7)}, "holds the code 7; 0 to 1 are known"),
        (b"MATLAB 5.0, cut", "cannot be read as a MATLAB file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content, sentence, tmp_path):
    path = tmp_path / "five.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        savemat(path, content)

    def read():
        with LAYOUT.open(LAYOUT.find(tmp_path, "mat5"), "mat5") as file:
            file.measure("data1")
            file.read("region1")

    with pytest.raises(DataError, match=sentence):
        read()
    if "code" not in sentence:
        assert not next(LAYOUT.check(tmp_path, ["mat5"], subject=1)).ok
