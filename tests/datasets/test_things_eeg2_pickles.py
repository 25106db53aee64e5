"""The restricted reader of pickled dictionaries: whatever NumPy writes, and nothing that could run."""

import pickle

import numpy as np
import pytest

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.sources.safe_pickle import FileArray, open_npy, read_pickled_dict, sniff

CONTENT = {
    "big": np.random.default_rng(0).standard_normal((64, 4000)),
    "half": np.arange(12, dtype=">f2").reshape(3, 4),
    "text": np.array(["Oz", "Pz10"]),
    "objects": np.array([1, "a", None], dtype=object),
    "scalar": np.float64(2.5),
    "nested": {"list": [1, (2.5, True)], "empty": np.zeros((0, 3))},
    "names": ["Oz", "stim"],
}


def assert_same(found):
    assert list(found) == list(CONTENT)
    assert isinstance(found["big"], FileArray)
    np.testing.assert_array_equal(found["big"].read_rows(0, 64), CONTENT["big"])
    np.testing.assert_array_equal(found["big"].read_rows(5, 9), CONTENT["big"][5:9])
    rows = np.array([7, 3])
    np.testing.assert_array_equal(found["big"].read_columns(rows, 10, 20), CONTENT["big"][rows, 10:20])
    np.testing.assert_array_equal(found["half"], CONTENT["half"])
    assert found["half"].dtype == np.dtype(">f2")
    assert found["text"].tolist() == ["Oz", "Pz10"]
    assert found["objects"].tolist() == [1, "a", None]
    assert found["scalar"] == 2.5
    assert found["nested"]["list"] == [1, (2.5, True)]
    assert found["nested"]["empty"].shape == (0, 3)
    assert found["names"] == ["Oz", "stim"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bare_pickles_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "x.npy"
    path.write_bytes(pickle.dumps(CONTENT, protocol))
    assert sniff(path) == "pickle"
    assert_same(read_pickled_dict(path))


def test_a_dictionary_saved_by_numpy(tmp_path):
    np.save(tmp_path / "x.npy", CONTENT, allow_pickle=True)
    assert sniff(tmp_path / "x.npy") == "npy-pickle"
    assert_same(read_pickled_dict(tmp_path / "x.npy"))


def test_the_names_of_numpy_1(tmp_path):
    content = pickle.dumps(CONTENT, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "x.npy").write_bytes(content)
    assert_same(read_pickled_dict(tmp_path / "x.npy"))


def test_plain_arrays_stay_in_the_file(tmp_path):
    array = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    assert sniff(tmp_path / "x.npy") == "npy"
    np.testing.assert_array_equal(open_npy(tmp_path / "x.npy").read_rows(1, 3), array[1:3])


@pytest.mark.parametrize("n_bytes", [0, 1, 9, 40, 200, 100_000, -1])
def test_every_truncation_is_told(tmp_path, n_bytes):
    whole = pickle.dumps(CONTENT, 4)
    (tmp_path / "x.npy").write_bytes(whole[:n_bytes])
    with pytest.raises(DataError, match=r"x.npy (is truncated|is damaged)"):
        read_pickled_dict(tmp_path / "x.npy")


def test_a_truncated_plain_array(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((100, 10)))
    with (tmp_path / "x.npy").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match="is truncated: it holds 2872 of 8000 bytes"):
        open_npy(tmp_path / "x.npy")


class Harmful:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [eval, exec, print, getattr, np.load])
def test_no_function_is_called(tmp_path, protocol, function):
    path = tmp_path / "x.npy"
    path.write_bytes(pickle.dumps({"a": Harmful(function, ("1+1",))}, protocol))
    with pytest.raises(DataError, match="asks to run"):
        read_pickled_dict(path)


def test_structured_and_strange_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npy"
    for array in (np.zeros(2, dtype=[("a", "f4")]), np.zeros(2, dtype="M8[s]")):
        path.write_bytes(pickle.dumps({"a": array}, 4))
        with pytest.raises(DataError, match=r"x\.npy"):
            read_pickled_dict(path)


def test_only_a_dictionary(tmp_path):
    (tmp_path / "x.npy").write_bytes(pickle.dumps([1, 2], 4))
    with pytest.raises(DataError, match="holds a list, where a dictionary"):
        read_pickled_dict(tmp_path / "x.npy")
