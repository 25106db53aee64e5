"""Conditional targets and tables of concepts: heads on training images, and what cannot be learnt."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.embeddings.conditional import fit_ridge

N = 60


@pytest.fixture
def stimuli():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 60, (N, 8, 8, 3), dtype=np.uint8)
    pixels[::2, ..., 0] += 120  # every other image is red
    pixels[: N // 2, :, 4:] += 60  # the first half is lighter on the right
    ids = [f"i{n:02d}" for n in range(N)]
    return StimulusSet.from_pixels(pixels, ids, [f"c{n // 3:02d}" for n in range(N)])


def write_table(folder, stimuli, **changes):
    table = pd.DataFrame(
        {
            "id": stimuli.ids,
            "colour": ["red" if n % 2 == 0 else "grey" for n in range(N)],
            "side": ["right" if n < N // 2 else "none" for n in range(N)],
        }
    ).assign(**changes)
    path = folder / "attributes.csv"
    table.to_csv(path, index=False)
    return path


def make_config(path, **options):
    content = {"kind": "conditional", "attributes": path, "base": {"kind": "pixels", "size": 8}, **options}
    return validate_component("target", content)


def encode_all(stimuli):
    return lambda member: Embeddings(
        np.asarray(member.encode(stimuli.iterate_images())), stimuli.ids, member.space
    )


def test_heads_answer_for_images_they_never_saw_and_are_written_and_read(tmp_path, stimuli):
    config = make_config(write_table(tmp_path, stimuli))
    encoder = config.build()
    training = stimuli.ids[10:50]
    bank = encoder.embed(stimuli, training, encode_all(stimuli))
    assert bank.vectors.shape == (N, 2, 2)
    held = np.r_[0:10, 50:60]
    # Values are in the order of the alphabet: grey, red and none, right.
    assert (bank.vectors[held, 0].argmax(axis=1) == (held % 2 == 0)).all()
    assert (bank.vectors[held, 1].argmax(axis=1) == (held < N // 2)).all()
    encoder.write(tmp_path)
    again = config.read(tmp_path)
    assert again.space == bank.space
    np.testing.assert_allclose(again.encode(stimuli.iterate_images(["i03"])), bank.vectors[3:4], atol=1e-6)
    assert config.read_attributes().names == ("colour", "side")


def test_the_ridge_of_a_head_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    for n_features in (5, 50):  # both Gram matrices
        x, y = generator.standard_normal((30, n_features)), generator.standard_normal((30, 2))
        weights, penalty = fit_ridge(x, y, np.repeat(np.arange(10), 3))
        unit = 30 * x.var(axis=0).mean()
        np.testing.assert_allclose(weights, Ridge(alpha=unit * penalty).fit(x, y).coef_.T, atol=1e-8)


def test_no_test_image_changes_a_head(tmp_path, stimuli):
    training = stimuli.ids[:40]
    spaces = [make_config(write_table(tmp_path, stimuli)).build()]
    spaces[0].embed(stimuli, training, encode_all(stimuli))
    pixels = np.array(stimuli.pixels)
    pixels[40:] = 255 - pixels[40:]
    poisoned = StimulusSet.from_pixels(pixels, list(stimuli.ids), list(stimuli.concepts_of(stimuli.ids)))
    spaces.append(make_config(tmp_path / "attributes.csv").build())
    spaces[1].embed(poisoned, training, encode_all(poisoned))
    np.testing.assert_array_equal(spaces[0].fitted.weights, spaces[1].fitted.weights)


def test_without_a_base_the_values_are_the_target(tmp_path, stimuli):
    config = make_config(write_table(tmp_path, stimuli), base=None, conditions=["side"])
    encoder = config.build()
    bank = encoder.embed(stimuli, stimuli.ids[10:50], None)
    np.testing.assert_array_equal(bank.vectors[[0, 59], 0], [[0, 1], [1, 0]])
    encoder.write(tmp_path)
    assert config.read(tmp_path).space == bank.space
    with pytest.raises(ConfigError, match="knows the images of its table only"):
        encoder.encode(stimuli.iterate_images())
    unknown = make_config(
        write_table(tmp_path, stimuli, side=["", *["right", "none"] * 29, "none"]), base=None
    )
    with pytest.raises(DataError, match=r"'side' of 'i00' is unknown, and without target\.base"):
        unknown.build().embed(stimuli, stimuli.ids[10:50], None)


def test_what_cannot_be_learnt_is_said(tmp_path, stimuli):
    def embed(**changes):
        config = make_config(write_table(tmp_path, stimuli, **changes))
        return config.build().embed(stimuli, stimuli.ids[:30], encode_all(stimuli))

    with pytest.raises(DataError, match=r"'side' has only the value 'right' among 30 training images"):
        embed()
    sides = ["left" if n % 3 else "right" for n in range(N)]
    with pytest.raises(DataError, match="none for 1 of 30 images, first 'i00'; add"):
        embed(id=["x", *stimuli.ids[1:]], side=sides)
    with pytest.raises(DataError, match="belong to another data set"):
        embed(id=[f"x{n}" for n in range(N)], side=sides)
    with pytest.warns(Notice, match=r"1 value\(s\) of the attribute 'side' .* such as 'both'"):
        assert embed(side=["both", *sides[1:]]).vectors.shape == (N, 2, 2)
    # The row of a tested image may be missing: nothing is learnt from it.
    assert len(embed(id=[*stimuli.ids[:-1], "x"], side=sides)) == N
    with pytest.raises(DataError, match=r"no attribute 'color' .*'colour'"):
        make_config(tmp_path / "attributes.csv", conditions=["color"]).check_files()
