"""The neighbours prior moves directions toward nearby images and never meets a tested one."""

from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Prior
from braindecode_vis.base.store import write_embeddings
from braindecode_vis.generation.priors.image_source import leave_out, read_images
from braindecode_vis.generation.priors.neighbours import NeighboursPriorConfig
from braindecode_vis.scoring.metrics.embedding import compute_mmd


def make_rows(n, *, seed, shape=(6,), name="i", space="toy"):
    """Images on a plane of six dimensions, off the origin."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(0).normal(size=(2, 6))
    vectors = 5 + rng.normal(size=(n, 2)) @ plane
    return Embeddings(vectors.astype(np.float32).reshape(n, *shape), [f"{name}{k}" for k in range(n)], space)


def predict(images, *, shrinkage=0.2, noise=0.6):
    """Predictions that are short and leave the plane."""
    rng = np.random.default_rng(9)
    flat = images.flat()
    vectors = 5 + shrinkage * (flat - 5 + noise * rng.normal(size=flat.shape))
    return Embeddings(vectors.astype(np.float32).reshape(images.vectors.shape), images.ids, images.space)


def slow_sample(predicted, training, images, k, pull):
    """One row at a time, as the words of the docstring have it."""
    mean = training.mean(axis=0)
    length = np.sqrt(np.mean([np.sum((row - mean) ** 2) for row in training]))
    made = []
    for row in predicted:
        own = (row - mean) / np.linalg.norm(row - mean)
        cosines = [own @ (image - mean) / np.linalg.norm(image - mean) for image in images]
        near = np.mean([images[i] for i in np.argsort(cosines)[::-1][:k]], axis=0) - mean
        moved = (1 - pull) * own + pull * near / np.linalg.norm(near)
        made.append(mean + length * moved / np.linalg.norm(moved))
    return np.array(made)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_rows_are_those_of_a_slow_reference(monkeypatch, shape, pull):
    monkeypatch.setattr(
        "braindecode_vis.generation.priors.image_source.ROWS_AT_ONCE", 7
    )  # neighbours come from several parts
    training, known = make_rows(12, seed=1, shape=shape), make_rows(40, seed=2, shape=shape, name="k")
    predicted = predict(make_rows(5, seed=3, shape=shape, name="t"))
    prior = NeighboursPriorConfig(n_neighbours=4, pull=pull).build().fit(None, training, images=known)
    assert isinstance(prior, Prior)
    drawn = prior.sample(predicted, n_draws=2, seed=0)
    expected = slow_sample(predicted.flat(), training.flat(), known.flat(), 4, pull)
    np.testing.assert_allclose(drawn.flat(), np.repeat(expected, 2, axis=0), rtol=1e-4)
    assert drawn.vectors.shape == (10, *shape)
    assert drawn.ids[:3].tolist() == ["t0", "t0", "t1"]


def test_predictions_come_nearer_to_images():
    training, seen = make_rows(300, seed=1), make_rows(200, seed=2, name="t")
    predicted = predict(seen)
    drawn = NeighboursPriorConfig().build().fit(None, training).sample(predicted, n_draws=1, seed=0)
    assert compute_mmd(drawn, seen) < 0.2 * compute_mmd(predicted, seen)
    before, after = (((e.flat() - seen.flat()) ** 2).sum(axis=1).mean() for e in (predicted, drawn))
    assert after < before


def test_a_repeated_training_image_counts_once_and_the_prior_survives_disk(tmp_path):
    training = make_rows(30, seed=1)
    repeated = training.select([*training.ids[:1]] * 1)
    doubled = Embeddings(
        np.concatenate([training.vectors, repeated.vectors]), [*training.ids, training.ids[0]], "toy"
    )
    predicted = predict(make_rows(4, seed=3, name="t"))
    config = NeighboursPriorConfig(n_neighbours=3)
    prior, other = config.build().fit(None, training), config.build().fit(None, doubled)
    prior.write(tmp_path)
    wanted = prior.sample(predicted, n_draws=1, seed=0).vectors
    for same in (other, config.read(tmp_path)):
        np.testing.assert_array_equal(same.sample(predicted, n_draws=1, seed=5).vectors, wanted)
    assert prior.describe() == {"n_images": 30}


def test_what_cannot_be_is_refused():
    training = make_rows(10, seed=1)
    with pytest.raises(DataError, match="has not been fitted"):
        NeighboursPriorConfig().build().sample(training, n_draws=1, seed=0)
    with pytest.raises(ConfigError, match="n_neighbours is 16, more than the 10 images"):
        NeighboursPriorConfig().build().fit(None, training)
    with pytest.raises(DataError, match="'toy' cannot be compared with those of space 'other'"):
        NeighboursPriorConfig(n_neighbours=2).build().fit(
            None, training, images=make_rows(10, seed=1, space="other")
        )


# --- where images come from ---------------------------------------------------------------------------------


def test_tested_images_are_left_out_by_name_and_by_look(monkeypatch):
    monkeypatch.setattr("braindecode_vis.generation.priors.image_source.ROWS_AT_ONCE", 3)
    known, tested = make_rows(8, seed=1, name="k"), make_rows(2, seed=2, name="t")
    vectors = np.array(known.vectors)
    vectors[5] = tested.vectors[1] * (1 + 1e-5)  # the same picture under another name, rounded differently
    vectors[6] = tested.vectors[0] * 1.01
    ids = [*known.ids[:7], "t0"]
    kept = leave_out(Embeddings(vectors, ids, "toy"), tested)
    assert kept.ids.tolist() == ["k0", "k1", "k2", "k3", "k4", "k6"]
    assert leave_out(kept, tested) is kept


def test_a_folder_is_named_by_what_is_in_it(tmp_path):
    images = make_rows(5, seed=1)
    for name in ("a", "b"):
        write_embeddings(tmp_path / name, images)
    write_embeddings(tmp_path / "c", make_rows(5, seed=2))
    a, b, c = (NeighboursPriorConfig(images=tmp_path / name).hashed_fields() for name in "abc")
    assert a == b != c
    assert NeighboursPriorConfig().find_folder() is None
    assert NeighboursPriorConfig(images="generator").hashed_fields()["images"] == "generator"
    np.testing.assert_array_equal(read_images(tmp_path / "a", images).vectors, images.vectors)
    with pytest.raises(ConfigError, match=r"embeddings are of the space 'toy', but the run predicts 'other'"):
        read_images(tmp_path / "a", make_rows(5, seed=1, space="other"))
    (tmp_path / "a" / "ids.json").unlink()
    with pytest.raises(ConfigError, match=r"which has no ids.json; give a folder of embeddings"):
        NeighboursPriorConfig(images=tmp_path / "a").find_folder()


def test_images_are_those_of_the_training_of_a_folder_or_of_the_generator(tmp_path):
    """What a generator or a folder brings along may hold tested images, which are left out."""
    training, tested, others = (
        make_rows(4, seed=1, name="k"),
        make_rows(2, seed=2, name="t"),
        make_rows(5, seed=3),
    )
    brought = Embeddings(
        np.concatenate([others.vectors, tested.vectors]), [*others.ids, *tested.ids], training.space
    )
    write_embeddings(tmp_path / "images", brought)
    generator = SimpleNamespace(read_known_images=lambda: brought)
    assert NeighboursPriorConfig().find_images(training, None, tested) is training
    for source, asked in (("generator", generator), (tmp_path / "images", None)):
        found = NeighboursPriorConfig(images=source).find_images(training, asked, tested)
        assert found.ids.tolist() == others.ids.tolist()
        np.testing.assert_array_equal(found.vectors, others.vectors)
