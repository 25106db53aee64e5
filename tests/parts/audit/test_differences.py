"""What rounding may change is forgiven between stored and computed values, and nothing else."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from braindecode_vis.base import store
from braindecode_vis.parts.audit.differences import (
    compare_files,
    compare_images,
    compare_tables,
    compare_vectors,
    find_difference,
)


@pytest.mark.parametrize(
    ("stored", "made", "same"),
    [
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
        (1.0, float("nan"), False),
        (None, 1.0, False),
        (0.0, 5e-7, True),
        (0.0, 5e-6, False),
        (1000.5, 1000, True),
        (1002, 1000.0, False),
        (float("inf"), float("inf"), True),
        (True, True, True),
        (True, False, False),
        ("a", "a", True),
        ("1", 1, False),
        ({"a": {"b": [1.0]}}, {"a": {"b": [1.0]}}, True),
        ({"a": [1.0, 2.0]}, {"a": [1.0]}, False),
        ([[1, 2], [3, 4]], [[1, 2], [3, 5]], False),
    ],
)
def test_values_are_the_same_up_to_a_thousandth(stored, made, same):
    assert (find_difference({"x": stored}, {"x": made}) == "") is same


def test_where_lists_and_mappings_differ_is_told():
    assert (
        find_difference({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]})
        == "a[1].b is 2, but 3 is computed"
    )
    assert find_difference({"a": [1, 2, 3]}, {"a": [1]}) == "a has 3 entries, but 1 are computed"
    assert find_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}, skip=["b"]) == ""
    assert find_difference("x" * 80, "y") == f"it is {'x' * 57}..., but y is computed"


@pytest.mark.parametrize(
    ("stored", "made", "off", "row"),
    [
        ([[3.0, 4.0]], [[3.0, 4.5]], 0.5 / np.hypot(3, 4.5), 0),  # one row: by its size
        (
            [[1.0, 0], [1, 0]],
            [[1.0, 0], [1, 0.001]],
            0.1,
            1,
        ),  # rows that are alike: by a hundredth of their size
        ([[0.0, 0], [2, 0]], [[0.0, 0], [2, 0]], 0.0, 0),
        ([[0.0, 1], [2, 0]], [[0.0, 0], [2, 0]], 1.0, 0),
    ],
)
def test_rows_are_compared_in_units_of_their_spread_or_size(stored, made, off, row):
    found = compare_vectors(np.array(made), np.array(stored))
    assert found == (pytest.approx(off, rel=1e-3), row)


def test_tables_are_compared_up_to_rounding():
    made = pd.DataFrame({"a": [1.0, 1000.0, 0.0], "b": [1, 2, 3], "c": ["x", None, "z"]})
    assert compare_tables(made.assign(a=[1.0005, 1000.9, 5e-7]), made) == ""
    assert (
        compare_tables(made.assign(a=[1.0, 1002.0, 0.0]), made) == "a of row 1 is 1002, but 1000 is computed"
    )
    assert compare_tables(made.assign(a=[1.0, 1000.0, 5e-6]), made).startswith("a of row 2")
    assert compare_tables(made.assign(c=["x", "y", "z"]), made).startswith("c of row 1 is y, but")
    assert compare_tables(made.assign(a=9.0), made, skip=["a"]) == ""


@pytest.mark.parametrize(
    ("name", "factor", "same"),
    [
        ("weights.npy", 1 + 5e-4, True),
        ("weights.npy", 1 + 5e-3, False),
        ("weights.safetensors", 1 + 5e-4, True),
        ("weights.safetensors", 1 + 5e-3, False),
        ("vectors.npy", 1 + 5e-4, True),
        ("vectors.npy", 1 + 5e-2, False),
        ("numbers.npy", 2, False),
        ("table.parquet", 1 + 5e-4, True),
        ("table.parquet", 1 + 5e-3, False),
        ("values.json", 1 + 5e-4, True),
        ("values.json", 1 + 5e-3, False),
        ("picture.png", 2, True),  # is judged by its pixels elsewhere
    ],
)
def test_files_of_an_artifact_are_compared_by_their_kind(tmp_path, name, factor, same):
    values = np.random.default_rng(0).normal(size=(6, 4))
    values = (10 * values).astype(int) if name.startswith("numbers") else values
    for folder, array in (("made", values), ("stored", factor * values)):
        path = tmp_path / folder / "fold00" / name
        path.parent.mkdir(parents=True)
        if path.suffix == ".npy":
            np.save(path, array)
        elif path.suffix == ".safetensors":
            save_file({"weights": array}, path)
        elif path.suffix == ".parquet":
            pd.DataFrame({"a": array[:, 0]}).to_parquet(path)
        elif path.suffix == ".json":
            store.write_json(path, {"a": array.tolist(), "words": folder})
        else:
            path.write_bytes(array.tobytes())
    found = compare_files(tmp_path / "stored", tmp_path / "made", 1e-3, skip=["words"])
    assert (found == "") is same, found
    assert same or f"fold00/{name}: " in found
    (tmp_path / "stored" / "fold00" / name).unlink()
    missing = compare_files(tmp_path / "stored", tmp_path / "made", 1e-3)
    assert missing == ("" if name.endswith("png") else f"fold00/{name} is missing")


@pytest.mark.parametrize(
    ("dtype", "row", "value", "same"),
    [
        (np.uint8, 99, 3, True), (np.uint8, 0, 4, False), (np.uint8, 99, 4, False),
        (np.float32, 99, 3, True), (np.float32, 0, 4, False), (np.float32, 50, np.nan, False),
    ],
)  # fmt: skip
def test_large_arrays_are_compared_block_by_block(tmp_path, monkeypatch, dtype, row, value, same):
    """Pictures of a data set were compared by one array of truth values of their size, after both were read."""
    monkeypatch.setattr("braindecode_vis.base.arrays.BLOCK_BYTES", 8 * 10_000)
    made = np.full((100, 10_000), 3, dtype)
    for name in ("stored", "made"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "pixels.npy", made)
    stored = np.load(tmp_path / "stored" / "pixels.npy", mmap_mode="r+")
    stored[row, 7] = value
    del stored
    tracemalloc.start()
    found = compare_files(tmp_path / "stored", tmp_path / "made", 1e-3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == ("" if same else "pixels.npy: it is not what is computed")
    assert peak < 500_000


def test_vectors_are_compared_in_units_of_their_spread():
    rng = np.random.default_rng(0)
    made = rng.standard_normal((50, 20)) + 100  # a mean that all share hides nothing
    stored = made.copy()
    assert compare_vectors(made, stored.astype(np.float32))[0] < 1e-4
    stored[7] += 0.01 * (rng.standard_normal(20))
    off, row = compare_vectors(made, stored)
    assert row == 7
    assert off > 1e-3
    stored[7] = np.nan
    assert compare_vectors(made, stored) == (np.inf, 7)
    assert compare_vectors(made, made[:, :3])[0] == np.inf


def test_few_other_images_of_many_are_a_warning():
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (400, 4, 4, 3), dtype=np.uint8)
    stored, ids = made.copy(), np.arange(400).astype(str)
    assert compare_images("decoded", made, stored, ids) is None
    stored[3] = 255 - stored[3]
    assert compare_images("decoded", made, stored, ids).level == "warning"
    stored[:4] = 255 - stored[:4]
    assert compare_images("decoded", made, stored, ids).level == "leak"
    assert compare_images("decoded", made, stored.astype(float), ids).level == "leak"


@pytest.mark.parametrize(
    ("stored", "made", "words"),
    [
        ({"a": 1.0}, {"a": 1.0005}, ""),
        ({"a": 1.0}, {"a": 1.01}, "a is 1, but 1.01 is computed"),
        ({"a": None}, {"a": float("nan")}, ""),
        ({"a": "x"}, {"a": 1.0}, "a is x, but 1 is computed"),
        ({"a": [1]}, {"a": [1, 2]}, "a has 1 entries, but 2 are computed"),
        ({"b": 1}, {"a": 1}, "a is missing"),
        ({"a": 1, "b": 2}, {"a": 1}, "b should not be there"),
        ([], {"a": 1}, "it is no mapping"),
        ("text", [1], "it has no entries, but 1 are computed"),
    ],
)
def test_the_first_difference_is_told(stored, made, words):
    assert find_difference(stored, made) == words


def test_tables_are_compared_by_column():
    made = pd.DataFrame({"a": [1.0, np.nan], "b": ["x", None], "c": [["1"], ["2"]]})
    assert compare_tables(made.copy(), made) == ""
    assert compare_tables(made.assign(a=[1.0, 2.0]), made) == "a of row 1 is 2, but nan is computed"
    assert compare_tables(made.drop(columns="b"), made) == "its column b is missing"
    assert compare_tables(made[:1], made) == "it has 1 rows, but 2 are computed"
    assert "c of row 0" in compare_tables(made.assign(c=[["3"], ["2"]]), made)


def test_vectors_of_no_trial_are_the_same(tmp_path):
    """The smallest demo keeps no out-of-fold prediction, which an audit with --refit called damaged."""
    for name in ("stored", "made"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "vectors.npy", np.empty((0, 5), np.float32))
    assert compare_files(tmp_path / "stored", tmp_path / "made", 1e-3) == ""


@pytest.mark.parametrize(
    ("dtype", "shape", "is_told"),
    [(np.uint8, (3, 4, 4, 3), False), (np.float32, (3, 4, 4, 3), True), (np.uint8, (2, 4, 4, 3), True),
     (np.uint8, (3, 5, 4, 3), True)],
)  # fmt: skip
def test_images_of_another_type_or_shape_are_not_those_of_the_run(dtype, shape, is_told):
    made = np.full((3, 4, 4, 3), 7, np.uint8)
    found = compare_images("decoded", made, np.full(shape, 7, dtype), np.array(list("abc")))
    assert (found is not None) == is_told
    assert not is_told or "tampered: the images decoded are" in found.message
