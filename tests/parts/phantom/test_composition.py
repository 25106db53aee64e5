"""Composed scenes: pairs that show the same parts bound otherwise."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.datasets.drawn.images import (
    COLOURS,
    N_MAX_COMPOSED,
    make_attributes,
    make_captions,
    make_compositions,
    make_things_like_split,
    render_scene,
)
from braindecode_vis.datasets.drawn.scene_pairs import FIRST_COMPOSED, KINDS, describe_composition
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.build import estimate_phantom

ALL = [describe_composition(FIRST_COMPOSED + i, 3, COLOURS) for i in range(N_MAX_COMPOSED)]


def test_no_scene_is_in_two_pairs_and_swapping_twice_changes_nothing():
    assert len({scene.concept for scene in ALL}) == len(ALL)
    for one, other in zip(ALL[::2], ALL[1::2], strict=True):
        assert one.swap() == other
        assert other.swap() == one
    assert Counter(scene.kind for scene in ALL) == dict.fromkeys(KINDS, len(ALL) // len(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_captions_of_a_pair_have_the_same_words_but_for_articles(kind):
    one = next(scene for scene in ALL if scene.kind == kind)
    words = [sorted(w for w in s.caption.split() if w not in ("a", "an")) for s in (one, one.swap())]
    assert words[0] == words[1]
    assert one.caption != one.swap().caption


def test_the_two_scenes_of_a_pair_exchange_the_colours_of_object_and_ground():
    number = FIRST_COMPOSED  # the first pair is of the kind `ground`
    scene = describe_composition(number, 0, COLOURS)
    images = [render_scene(number + i, 0, size=64, seed=0).astype(float) / 255 for i in (0, 1)]
    for image, ground in zip(images, (scene.other_colour, scene.colour), strict=True):
        corners = np.concatenate([image[:6, :6].reshape(-1, 3), image[:6, -6:].reshape(-1, 3)]).mean(axis=0)
        nearest = min(
            COLOURS, key=lambda name: float(np.linalg.norm(corners - 0.85 * np.array(COLOURS[name])))
        )
        assert nearest == ground
    again = render_scene(number, 1, size=64, seed=0).astype(float) / 255
    assert np.abs(again - images[0]).max() > 0.2  # another exemplar has another pose


def test_two_objects_that_exchange_colours_keep_their_outline():
    number = next(FIRST_COMPOSED + 2 * p for p in range(8) if ALL[2 * p].kind == "objects")
    one, other = (render_scene(number + i, 0, size=64, seed=3).astype(float) for i in (0, 1))
    differs = np.abs(one - other).max(axis=-1) > 30
    # In the left half and in the right half, nowhere at the rim.
    assert differs[:, :32].any()
    assert differs[:, 32:].any()
    assert not differs[:4].any()


def test_a_split_with_pairs_keeps_partners_together_and_the_plain_concepts_as_they_were():
    table = make_things_like_split(20, 12, 2, 1, seed=0, n_pairs=3)
    composed = table[table["concept_index"] >= FIRST_COMPOSED]
    assert composed.groupby("split")["concept"].nunique().to_dict() == {"test": 6, "train": 10}
    pairs = composed.assign(pair=composed["concept_index"] // 2)
    assert (pairs.groupby("pair")["split"].nunique() == 1).all()
    assert (pairs.groupby("pair")["concept"].nunique() == 2).all()
    plain = make_things_like_split(10, 6, 2, 1, seed=0)
    rest = table[table["concept_index"] < FIRST_COMPOSED]
    assert set(rest["stimulus_id"]) == set(plain["stimulus_id"])

    listed = make_compositions(table, seed=0).set_index("id")
    assert len(listed) == len(composed)
    for name, row in listed.iterrows():
        assert listed.loc[row["partner"], "partner"] == name
        assert listed.loc[row["partner"], "caption"] == row["swapped"]
    captions = make_captions(table, seed=0).groupby("id")["caption"].agg(list)
    assert captions.loc[listed.index].tolist() == [[caption] for caption in listed["caption"]]


def test_impossible_pairs_are_refused_in_one_sentence():
    with pytest.raises(ConfigError, match="room for 0 to 2 pairs"):
        make_things_like_split(8, 5, seed=0, n_pairs=3)
    tiny = SIZES["bids-eeg"]["tiny"]
    with pytest.raises(ConfigError, match="fewer pairs or more test concepts"):
        estimate_phantom("bids-eeg", tiny.replace(n_pairs=2))
    with pytest.raises(ConfigError, match="no such number"):
        estimate_phantom("vim-1", SIZES["vim-1"]["tiny"].replace(n_pairs=1))
    with pytest.raises(ConfigError, match="concept_index"):
        render_scene(FIRST_COMPOSED + N_MAX_COMPOSED, 0, size=32, seed=0)


def test_attributes_of_composed_scenes_are_told_as_far_as_one_object_has_them():
    table = make_things_like_split(0, 8, 1, 1, seed=0, n_pairs=4)
    attributes = make_attributes(table, seed=0).set_index("id")
    kinds = make_compositions(table, seed=0).set_index("id")["kind"]
    assert set(attributes.loc[kinds == "objects", "background"]) == {"grey ground"}
    assert (attributes["accent"] != "").tolist() == (kinds.loc[attributes.index] == "pattern").tolist()
    assert set(attributes["place"]) == {""}
