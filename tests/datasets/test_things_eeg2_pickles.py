"""The restricted reader of pickled dictionaries: whatever NumPy writes, and nothing that could run."""

import pickle
import tracemalloc

import numpy as np
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.sources.safe_pickle import (
    FileArray,
    open_npy,
    read_pickled,
    read_pickled_dict,
    sniff,
)

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
    with pytest.raises(DataError, match="holds a list, but a dictionary"):
        read_pickled_dict(tmp_path / "x.npy")


def _reduce(module, name, *, arguments):
    return b"c" + f"{module}\n{name}\n".encode() + arguments + b"R"


def _doubled(n_levels, *, opener=b"(", closer=b"l"):
    """Return a pickle of lists of which each holds the last one twice: 2 ** n_levels values in 6 bytes a level."""
    levels = b"".join(
        opener + b"h" + bytes([k]) + b"h" + bytes([k]) + closer + b"q" + bytes([k + 1])
        for k in range(n_levels)
    )
    return b"(lq\x00" + levels


_DTYPE = _reduce("numpy", "dtype", arguments=b"(X\x02\x00\x00\x00f4t")
_FROM_BUFFER = "numpy.core.numeric", "_frombuffer"
_MEBIBYTE = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
_BOMBS = {
    "a list of lists of lists": b"\x80\x02}X\x01\x00\x00\x00a" + _doubled(60) + b"s.",
    "a key of nested tuples": b"\x80\x02})q\x00" + b"".join(
        b"h" + bytes([k]) * 1 + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1]) for k in range(60)
    ) + b"Ns.",
    "a set of nested tuples": b"\x80\x04\x8f()q\x00" + b"".join(
        b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1]) for k in range(60)
    ) + b"\x90.",
    "the type of an array": b"\x80\x02" + _reduce("numpy", "dtype", arguments=_doubled(60) + b"\x85") + b".",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "lists in lists": b"\x80\x02" + b"(" * 200_000 + b"l" * 200_000 + b".",
    "an array whose bytes are a number": b"\x80\x02"
    + _reduce(*_FROM_BUFFER, arguments=b"(\x8a\x05\x00\x00\x00\x00\x20" + _DTYPE + b"K\x01\x85U\x01Ct") + b".",
    "an array of many objects": b"\x80\x02"
    + _reduce(
        *_FROM_BUFFER,
        arguments=b"(]" + _DTYPE.replace(b"f4", b"O8") + b"\x8a\x05\x00\x00\x00\x00\x20\x85U\x01Ct",
    ) + b".",
    "a shape without end": b"\x80\x02"
    + _reduce(*_FROM_BUFFER, arguments=b"(C\x00" + _DTYPE + b"K\x00" + b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x86U\x01Ct")
    + b".",
    "a text said to be endless": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"a.",
    "a text encoded again and again": b"\x80\x02(" + _MEBIBYTE + b"q\x000"
    + b"".join(_reduce("_codecs", "encode", arguments=b"h\x00\x85") for _ in range(3000)) + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("content", _BOMBS.values(), ids=_BOMBS)
def test_a_short_file_cannot_ask_for_much(tmp_path, content):
    """200 bytes of references to references once kept the reader busy for ever; memory is bounded by the file too."""
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"x\.npy"):
        read_pickled(path)  # in well under a second; a bomb never ends
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_values_may_be_shared_as_numpy_shares_them(tmp_path):
    """Ten thousand numbers of one type name the same type, and an array may have two names."""
    array = np.arange(50_000.0)
    content = {
        "one": array,
        "two": array,
        "numbers": [np.float32(k) for k in range(10_000)],
        "text": ["Oz"] * 10_000,
    }
    path = tmp_path / "x.npy"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(content, protocol))
        found = read_pickled_dict(path)
        np.testing.assert_array_equal(found["two"], array)
        assert found["numbers"][-1] == 9999
        assert found["text"] == content["text"]


@pytest.mark.parametrize(
    "shape", ["(-1, 4)", "(9223372036854775807, 2)", "(True, 2)", "(0, 9223372036854775807, 9)"]
)
def test_impossible_shapes_of_plain_arrays(tmp_path, shape):
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    (tmp_path / "x.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + b"\0" * 64
    )
    with pytest.raises(DataError, match=r"x\.npy"):
        open_npy(tmp_path / "x.npy")


def test_a_header_of_brackets_and_an_array_of_objects(tmp_path):
    head = b"(" * 5000 + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    with pytest.raises(DataError, match="damaged NumPy header"):
        open_npy(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", CONTENT, allow_pickle=True)
    with pytest.raises(DataError, match="contains Python objects"):
        open_npy(tmp_path / "y.npy")
