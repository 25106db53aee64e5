"""Tables of tests of composition."""

import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.embeddings.compositions import CompositionConfig, pick_tests, read_compositions


def write(tmp_path, *lines):
    path = tmp_path / "tests.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_texts_and_images_of_one_image(tmp_path):
    path = write(
        tmp_path,
        "id,kind,caption,swapped,partner",
        'a,ground,"red, blue","blue, red",b',
        "a,,,,c",
        "b,,x y,y x,",
    )
    tests = read_compositions(path)
    assert [(t.name, t.kind, t.caption, t.swapped, t.partner) for t in tests] == [
        ("a", "ground", "red, blue", "blue, red", "b"), ("a", "", "", "", "c"), ("b", "", "x y", "y x", ""),
    ]  # fmt: skip
    assert [t.pair for t in tests] == ["a | b", "a | c", "x y | y x"]
    assert pick_tests(tests, ["b", "z"], path=path) == tests[2:]
    one = CompositionConfig(file=path).hashed_fields()
    write(tmp_path, "id,caption,swapped", "a,x y,y x")
    assert CompositionConfig(file=path).hashed_fields() != one


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,caption", "a,x"], "they need caption and swapped"),
        (["name,partner", "a,b"], "id"),
        (["id,partner"], "hold no row"),
        (["id,caption,swapped", "a,x,"], "is missing an id, one of caption and swapped, .* in line 2"),
        (["id,caption,swapped,partner", "a,,,"], "in line 2"),
        (["id,partner", "a,b", ",c"], "in line 3"),
        (["id,caption,swapped", "a,x,x"], "compares 'a' with itself in line 2"),
        (["id,partner", "a,a"], "compares 'a' with itself in line 2"),
        (["id,caption,swapped", "a,x, y,y"], "put captions with commas into quotes"),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_compositions(write(tmp_path, *lines))


def test_tests_of_other_images_are_refused(tmp_path):
    path = write(tmp_path, "id,partner", "a,b")
    tests = read_compositions(path)
    with pytest.raises(DataError, match=r"names none of the 1 tested images .*another data set"):
        pick_tests(tests, ["z"], path=path)
    with pytest.raises(DataError, match="compares 'a' with 'b', which is not among the 1 tested"):
        pick_tests(tests, ["a"], path=path)
    with pytest.raises(DataError, match="was not found"):
        read_compositions(tmp_path / "none.csv")
