"""Tables of attributes of images or concepts."""

import numpy as np
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.embeddings.attribute_table import read_attributes

TABLE = "id,colour,place\na, red ,left\nb,blue,\nc,red,right\n"


def write(folder, text, name="attributes.csv"):
    path = folder / name
    path.write_text(text)
    return path


def test_values_are_sorted_and_an_empty_cell_is_unknown(tmp_path):
    table = read_attributes(write(tmp_path, TABLE))
    assert (table.key, table.names) == ("id", ("colour", "place"))
    assert table.values == {"colour": ("blue", "red"), "place": ("left", "right")}
    np.testing.assert_array_equal(table.codes, [[1, 0], [0, -1], [1, 1]])
    assert table.rows == {"a": 0, "b": 1, "c": 2}
    codes = table.codes_of(["c", "z", "a", "c"], None)
    assert codes.dtype == np.int64
    np.testing.assert_array_equal(codes, [[1, 1], [-1, -1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(table.choose(["place"]).codes, [[0], [-1], [1]])
    with pytest.raises(DataError, match=r"no attribute 'color' .* .did you mean 'colour'"):
        table.find("color")


def test_a_table_of_concepts_is_matched_by_concept(tmp_path):
    table = read_attributes(write(tmp_path, "alive,concept\nyes,dog\nno,car\n"))
    np.testing.assert_array_equal(table.codes_of(["i", "j"], ["car", "dog"]), [[0], [1]])
    with pytest.raises(DataError, match="the images have no concept"):
        table.codes_of(["i"], None)


def test_what_is_missing_is_said_in_one_sentence(tmp_path):
    table = read_attributes(write(tmp_path, TABLE))
    assert table.describe_missing(["a", "b"], None, what="the attributes") == ""
    assert "none for 1 of 2 images, first 'x'" in table.describe_missing(
        ["a", "x"], None, what="the attributes"
    )
    assert "belong to another data set" in table.describe_missing(["x", "y"], None, what="the attributes")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "need one column id"),
        ("image,colour\na,red\n", "need one column id .* and have image, colour"),
        ("id,concept,colour\na,b,red\n", "drop one of the two"),
        ("id\na\n", "hold no attribute beside id"),
        ("id,colour\n", "hold no row"),
        ("id,colour,\na,red,\n", "no name for column 3"),
        ("id,colour,colour\na,red,red\n", "'colour' occurs more than once"),
        ("id,colour\na,red\na,blue\n", "'a' occurs more than once"),
        ("id,colour\na,red, dark\n", "3 fields in line 2"),
        ("id,colour\n,red\n", "are missing the id in line 2"),
        ("id,colour,place\na,red,\nb,blue,\n", "no value of 'place' in any row"),
        ('id,colour\na,"red\n', "no CSV file after line"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_attributes(write(tmp_path, text))


def test_a_missing_file_and_another_encoding_are_said(tmp_path):
    with pytest.raises(DataError, match="give a CSV file with the column id or concept"):
        read_attributes(tmp_path / "none.csv")
    path = tmp_path / "latin.csv"
    path.write_bytes("id,colour\na,weiß\n".encode("latin1"))
    with pytest.raises(DataError, match=r"table of attributes .* not encoded in UTF-8"):
        read_attributes(path)
    path.write_bytes("id,colour\na,weiß\n".encode("utf-16"))
    assert read_attributes(path).values == {"colour": ("weiß",)}
