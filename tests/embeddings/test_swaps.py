"""Captions in which what goes with what is exchanged."""

import numpy as np
import pytest

from braindecode_vis.embeddings.attribute_table import AttributeTable
from braindecode_vis.embeddings.compositions import find_groups, swap_captions


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red cube on a blue ground", ["a blue cube on a red ground", "a blue ground on a red cube"]),
        ("a white ball with lime dots", ["a lime ball with white dots"]),
        (
            "an orange mug to the left of a pink pear",
            ["a pink mug to the left of an orange pear", "a pink pear to the left of an orange mug"],
        ),
        # Nothing stands on the left of the relation in its own part of the sentence.
        ("a large red star with white, on a meadow", ["a large white star with red, on a meadow"]),
        ("A man behind the dog.", ["The dog behind a man."]),
        ("red and red", []),
        ("un chat rouge et bleu", []),
        ("", []),
    ],
)
def test_words_of_one_group_and_sides_of_relations_change_places(caption, expected):
    assert [swap.texts[0] for swap in swap_captions([caption])] == expected


def test_one_exchange_is_made_in_every_caption_that_has_both_words():
    captions = ["a red cube and a blue ball", "blue ball, red cube", "two things"]
    swaps = swap_captions(captions)
    assert [swap.kind for swap in swaps] == ["words"]
    assert swaps[0].texts == ("a blue cube and a red ball", "red ball, blue cube", "two things")
    assert swap_captions(captions, limit=0) == []
    # What comes out as a caption of the image is none.
    assert swap_captions(["red and blue", "blue and red"]) == []


def test_values_of_attributes_are_groups_and_those_that_share_a_value_one():
    values = {
        "colour": ("ink", "moss"),
        "accent": ("moss", "rust"),
        "shape": ("ice_cream", "star"),
        "one": ("x",),
    }
    table = AttributeTable("id", tuple(values), values, np.zeros((0, 4), np.int64), {})
    groups = find_groups(table)
    assert sorted(groups) == [("ice cream", "star"), ("ink", "moss", "rust")]
    assert [s.texts[0] for s in swap_captions(["an ink ice cream beside a rust star"], groups)] == [
        "a rust ice cream beside an ink star",
        "an ink star beside a rust ice cream",
    ]
