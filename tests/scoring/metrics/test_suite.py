"""Every row of the suite equals one image, one pair at a time through the network of torchvision or open_clip."""

import itertools
import sys
import types

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize, resize

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.embeddings.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from braindecode_vis.scoring.metrics import feature_networks, suite
from braindecode_vis.scoring.metrics.feature_networks import NETWORKS, Lpips
from braindecode_vis.scoring.metrics.identification import compute_correlations
from braindecode_vis.scoring.metrics.image import make_image_table
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from tests import references
from tests.references import assert_close

CPU = {"device": "cpu", "pixels": False, "semantic_ways": ()}


def make_images(*shape, seed=0):
    """Return smooth random images, which networks distinguish better than noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (*shape, 6, 6, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 8, axis=-3), 8, axis=-2)


def prepare_one(image, side, mean, std):
    """Return one image as published evaluation code prepares it."""
    plane = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    for size in (256, side):
        plane = resize(plane, [size, size], antialias=True)
    return normalize(plane, mean, std)[None]


def slow_two_way(truth, decoded):
    """Return two-way identification from one correlation at a time."""
    n = len(truth)
    r = np.array([[references.pearson(truth[i], decoded[j]) for i in range(n)] for j in range(n)])
    return np.array([np.mean([r[j, i] < r[j, j] for i in range(n) if i != j]) for j in range(n)])


def slow_distance(truth, decoded):
    return np.array([1 - references.pearson(a, b) for a, b in zip(truth, decoded, strict=True)])


def save_random(network, path):
    """Save random weights and return the network; its normalisations know these images, or all would be equal."""
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in norms:
        module.momentum = None  # a plain average
        module.train()
    if norms:
        inputs = [prepare_one(image, 128, IMAGENET_MEAN, IMAGENET_STD) for image in make_images(6, seed=9)]
        with torch.inference_mode():
            network(torch.cat(inputs))
    torch.save(network.state_dict(), path)
    return network.eval()


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.alexnet()
    network.classifier = torch.nn.Sequential()  # 230 MB that no row reads
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    return save_random(network, path), path


def test_alexnet_rows_equal_one_image_at_a_time(alexnet):
    network, path = alexnet
    truth, decoded = make_images(5), make_images(5, 2, seed=1)
    decoded[:, 0] = truth // 2 + decoded[:, 0] // 2
    config = suite.MetricSuiteConfig(networks=("alexnet",), weights={"alexnet": path}, batch_size=3, **CPU)
    found = suite.compute_suite(truth, decoded, config)
    for name, layer in (("alexnet-2", "features.4"), ("alexnet-5", "features.11")):
        reader = create_feature_extractor(network, [layer])
        with torch.inference_mode():
            seen, *made = (
                [
                    reader(prepare_one(i, 256, IMAGENET_MEAN, IMAGENET_STD))[layer].numpy().ravel()
                    for i in images
                ]
                for images in (truth, decoded[:, 0], decoded[:, 1])
            )
        expected = np.mean([slow_two_way(seen, one) for one in made], axis=0)
        assert_close(found.values[f"two_way_identification@{name}"], expected)
    assert found.not_computed == []


def test_linear_weights_of_lpips_are_those_of_the_installed_package(tmp_path, monkeypatch):
    """Without the package, or without the file in it, there are none."""
    assert (
        feature_networks.find_linear_weights("alexnet") is None
        or feature_networks.find_linear_weights("alexnet").name == "alex.pth"
    )
    monkeypatch.setattr(feature_networks, "find_spec", lambda name: None)
    assert feature_networks.find_linear_weights("vgg16") is None
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "elsewhere"), str(tmp_path)])
    monkeypatch.setattr(feature_networks, "find_spec", lambda name: spec if name == "lpips" else None)
    (tmp_path / "weights" / "v0.1").mkdir(parents=True)
    (tmp_path / "weights" / "v0.1" / "vgg.pth").touch()
    assert feature_networks.find_linear_weights("vgg16") == tmp_path / "weights" / "v0.1" / "vgg.pth"
    assert feature_networks.find_linear_weights("alexnet") is None


@pytest.mark.filterwarnings("ignore:NOTE. The nodes")  # dropout exists in training only
@pytest.mark.parametrize(
    "name, architecture, side",
    [
        ("efficientnet_b1", "efficientnet_b1", 255),
        pytest.param("swav", "resnet50", 224, marks=pytest.mark.slow),
        pytest.param("inception", "inception_v3", 342, marks=pytest.mark.slow),
    ],
)
def test_pooled_rows_equal_one_image_at_a_time(name, architecture, side, tmp_path):
    arguments = {"transform_input": True, "init_weights": False} if name == "inception" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.get_model(architecture, weights=None, **arguments)
    path = tmp_path / "weights.pth"
    save_random(network, path)
    if name == "swav":  # as the published checkpoint is laid out
        state = {f"module.{k}": v for k, v in network.state_dict().items() if not k.startswith("fc.")}
        state |= {"module.prototypes.weight": torch.zeros(3, 2)}
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        torch.save(state, path)
    truth, decoded = make_images(3), make_images(3, seed=1)
    found = suite.compute_suite(
        truth, decoded, suite.MetricSuiteConfig(networks=(name,), weights={name: path}, **CPU)
    )
    reader = create_feature_extractor(network, ["avgpool"])
    with torch.inference_mode():
        seen, made = (
            [
                reader(prepare_one(i, side, IMAGENET_MEAN, IMAGENET_STD))["avgpool"].numpy().ravel()
                for i in images
            ]
            for images in (truth, decoded)
        )
    (space,) = NETWORKS[name].spaces
    if name == "inception":
        assert len(set(slow_distance(seen, made).round(4))) == 3  # far above rounding
        np.testing.assert_array_equal(
            found.values[f"two_way_identification@{space}"], slow_two_way(seen, made)
        )
    else:
        expected = slow_distance(seen, made)
        assert expected.min() > 0.01  # the network tells these images apart
        # Batches change the rounding of single-precision features.
        np.testing.assert_allclose(found.values[f"correlation_distance@{space}"], expected, atol=1e-4)


def test_clip_is_openai_s_quickgelu_tower_at_224_pixels(tmp_path, monkeypatch):
    import open_clip

    description = open_clip.get_model_config("ViT-L-14-quickgelu")
    description["vision_cfg"] |= {"layers": 2, "width": 64, "head_width": 32, "patch_size": 32}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: description)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = open_clip.model._build_vision_tower(
            description["embed_dim"], open_clip.model.CLIPVisionCfg(**description["vision_cfg"]), quick_gelu=True
        ).eval()  # fmt: skip
    path = tmp_path / "clip.pt"
    torch.save(
        {f"visual.{k}": v for k, v in tower.state_dict().items()} | {"logit_scale": torch.ones(())}, path
    )
    truth, decoded = make_images(4), make_images(4, seed=1)
    config = suite.MetricSuiteConfig(networks=("clip",), weights={"clip": path}, **CPU)
    found = suite.compute_suite(truth, decoded, config).values["two_way_identification@clip-vit-l-14"]
    with torch.inference_mode():
        seen, made = (
            [tower(prepare_one(i, 224, CLIP_MEAN, CLIP_STD)).numpy().ravel() for i in images]
            for images in (truth, decoded)
        )
    np.testing.assert_array_equal(found, slow_two_way(seen, made))


@pytest.mark.parametrize("name", ["alexnet", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_lpips_equals_the_formula_place_by_place(name, alexnet, tmp_path):
    rng, channels = (
        np.random.default_rng(0),
        {"alexnet": [64, 192, 384, 256, 256]}.get(name, [64, 128, 256, 512, 512]),
    )
    if name == "alexnet":
        network, trunk = alexnet
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = torchvision.models.vgg16(init_weights=False)
        network.classifier, trunk = torch.nn.Sequential(), tmp_path / "vgg.pth"
        save_random(network, trunk)
    weights = [rng.random(n).astype(np.float32) for n in channels]
    linear = tmp_path / "lin.pth"
    torch.save(
        {f"lin{i}.model.1.weight": torch.from_numpy(w).view(1, -1, 1, 1) for i, w in enumerate(weights)},
        linear,
    )
    images = make_images(3)
    pairs = np.array([[0, 1], [2, 2], [2, 0], [1, 0]])
    found = Lpips(name, trunk, linear).compute_pairs(images, pairs, batch_size=2)

    layers = {"alexnet": ["1", "4", "7", "9", "11"], "vgg16": ["3", "8", "15", "22", "29"]}[name]
    # In-place activations write over what is read before them, so the reference looks after each of them.
    reader = create_feature_extractor(network.features, layers)
    maps = []
    for image in images:
        plane = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        plane = (2 * resize(plane, [256, 256], antialias=True) - 1)[None]
        plane = (plane - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        with torch.inference_mode():
            maps.append([reader(plane)[layer][0].numpy().astype(np.float64) for layer in layers])
    for (a, b), value in zip(pairs, found, strict=True):
        total = 0.0
        for left, right, weight in zip(maps[a], maps[b], weights, strict=True):
            left, right = (m / (np.sqrt((m**2).sum(axis=0)) + 1e-10) for m in (left, right))
            total += np.mean((weight[:, None, None] * (left - right) ** 2).sum(axis=0))
        assert value == pytest.approx(total, rel=1e-4, abs=1e-9)
    assert found[1] == 0
    assert found[2] != found[3]


def test_a_row_without_weights_is_named_and_never_replaced(alexnet, tmp_path):
    config = suite.MetricSuiteConfig(
        networks=("alexnet", "clip", "lpips_alexnet", "lpips_vgg16"),
        weights={"alexnet": alexnet[1], "lpips_vgg16": tmp_path, "lpips_alexnet": tmp_path},
        semantic_ways=(),
        device="cpu",
    )
    found = suite.compute_suite(
        make_images(3), make_images(3, seed=1), config.model_copy(update={"networks": ("clip",)})
    )
    assert set(found.values) == {"pixcorr@425", "ssim@425"}
    (line,) = found.not_computed
    assert line.startswith("clip not computed: needs OpenAI's CLIP ViT-L/14")
    lines = config.build().not_computed
    assert [line.split()[0] for line in lines] == ["clip", "lpips_vgg16"]
    assert "vgg16-397923af.pth as evaluation.suite.weights.vgg16" in lines[1]
    with pytest.raises(ConfigError, match=r"weights\.clip names .* does not exist"):
        suite.MetricSuiteConfig(networks=("clip",), weights={"clip": tmp_path / "no"}).build().available  # noqa: B018


def test_the_fingerprint_holds_digests_and_no_paths(alexnet, tmp_path):
    path = tmp_path / "copy.pth"
    path.write_bytes(alexnet[1].read_bytes())
    make = lambda **more: suite.MetricSuiteConfig(networks=("alexnet",), **more).hashed_fields()  # noqa: E731
    assert make(weights={"alexnet": path}) == make(
        weights={"alexnet": alexnet[1]}, batch_size=3, device="cpu"
    )
    assert make(weights={"alexnet": path}) != make()


def test_wrong_weights_are_refused(alexnet, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    config = suite.MetricSuiteConfig(networks=("alexnet",), weights={"alexnet": path}, **CPU)
    with pytest.raises(DataError, match="does not hold the weights of torchvision's alexnet"):
        suite.compute_suite(make_images(2), make_images(2), config)


def test_every_distinct_image_is_encoded_once():
    truth = make_images(4)[[0, 1, 2, 3, 0]]
    made = {
        "oracle": truth,
        "draws": np.stack([truth, 255 - truth], axis=1),
        "mean": np.repeat(truth[:1] // 2, 5, 0),
    }
    table = make_image_table(truth, made)
    assert len(table.images) == 4 + 4 + 1
    np.testing.assert_array_equal(table.images[table.made["draws"][1]], 255 - truth)
    encoded = []

    def extract(inputs):
        encoded.extend(inputs.mean(dim=(1, 2, 3)).tolist())
        return {"toy": inputs[:, :, ::16, ::16]}

    facts = NETWORKS["alexnet"]
    found = feature_networks.correlate_with_seen(table.images, table.shown, facts, extract, batch_size=2)[
        "toy"
    ]
    assert len(encoded) == len(set(encoded)) == 9
    features = np.stack([extract(facts.prepare(table.images[i : i + 1], "cpu"))["toy"][0] for i in range(9)])
    assert_close(found, compute_correlations(features, features[table.shown]))


def test_seen_features_beyond_memory_lie_in_a_file(monkeypatch):
    images, facts = make_images(5), NETWORKS["alexnet"]
    run = lambda: feature_networks.correlate_with_seen(  # noqa: E731
        images, np.arange(3), facts, lambda x: {"toy": x[:, :, ::8, ::8]}, batch_size=2
    )["toy"]
    expected = run()
    monkeypatch.setattr(feature_networks, "LARGEST_IN_MEMORY", 0)
    monkeypatch.setattr(feature_networks, "FEATURE_CHUNK", 100)
    monkeypatch.setattr(feature_networks, "BLOCK", 1)
    assert_close(run(), expected)


def test_a_blank_reconstruction_wins_against_nobody():
    blank = lambda x: {"toy": torch.zeros(len(x), 7)}  # noqa: E731
    found = feature_networks.correlate_with_seen(make_images(3), np.arange(3), NETWORKS["alexnet"], blank)[
        "toy"
    ]
    np.testing.assert_array_equal(found, np.zeros((3, 3)))


def test_dreamsim_runs_the_package_on_the_given_folder_only(tmp_path, monkeypatch):
    config = suite.MetricSuiteConfig(networks=("dreamsim",), weights={"dreamsim": tmp_path}, **CPU)
    truth, decoded = make_images(3), make_images(3, seed=1)
    with pytest.raises(ConfigError, match=r"is missing dino_vitb16_pretrain\.pth"):
        suite.compute_suite(truth, decoded, config)
    for name in (
        "dino_vitb16_pretrain.pth",
        "open_clip_vitb16_pretrain.pth.tar",
        "clip_vitb16_pretrain.pth.tar",
    ):
        (tmp_path / name).touch()
    (tmp_path / "ensemble_lora").mkdir()
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ConfigError, match="pip install dreamsim"):
        suite.compute_suite(truth, decoded, config)

    def load(pretrained, device, cache_dir, dreamsim_type):
        assert (pretrained, cache_dir, dreamsim_type) == (True, str(tmp_path), "ensemble")
        return types.SimpleNamespace(embed=lambda x: x[:, :, ::32, ::32].flatten(1)), None

    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=load))
    found = suite.compute_suite(truth, decoded, config).values["correlation_distance@dreamsim"]
    ones = [
        [prepare_one(i, 224, (0,) * 3, (1,) * 3)[0, :, ::32, ::32].numpy() for i in x]
        for x in (truth, decoded)
    ]
    np.testing.assert_allclose(found, slow_distance(*ones), atol=1e-6)


def test_pixel_rows_and_rounds():
    truth, decoded = make_images(2), make_images(2, 3, seed=1)
    config = suite.MetricSuiteConfig(
        networks=(), legacy_ssim=True, legacy_resize=True, semantic_ways=(5, 1000), device="cpu"
    )
    found = suite.compute_suite(truth, decoded, config)
    large = references.resize_425(np.concatenate([truth, *np.moveaxis(decoded, 1, 0)]) / 255)
    seen, rounds = large[:2], large[2:].reshape(3, 2, 425, 425, 3)
    for metric, legacy in (("ssim@425", False), ("ssim_legacy@425", True)):
        expected = [np.mean([references.ssim(seen[i], one[i], legacy) for one in rounds]) for i in range(2)]
        np.testing.assert_allclose(found.values[metric], expected, atol=1e-6)
    expected = [np.mean([references.pearson(seen[i], one[i]) for one in rounds]) for i in range(2)]
    np.testing.assert_allclose(found.values["pixcorr@425"], expected, atol=1e-6)
    # Small images only grow, where antialiasing changes nothing; the row says in its name which resize it is of.
    np.testing.assert_allclose(found.values["pixcorr@425-legacy"], expected, atol=1e-6)
    assert "without antialiasing" in find_metric("ssim@425-legacy").metric.meaning
    assert set(found.values["1000_way_top1_semantic_accuracy@efficientnet-lite0"]) <= {0, 1 / 3, 2 / 3, 1}
    several = found.values["5_way_top1_semantic_accuracy@efficientnet-lite0"]
    assert ((several >= 0) & (several <= 1)).all()
    with pytest.raises(DataError, match="two seen images of the suite are the same"):
        suite.compute_suite(truth[[0, 0]], truth, config)
    for wrong in (truth[:1], truth[..., :1], truth.astype(float)):
        with pytest.raises(DataError, match="images"):
            suite.compute_suite(truth, wrong, config)


def test_names_of_rows_do_not_collide():
    spaces = list(itertools.chain.from_iterable(facts.spaces for facts in NETWORKS.values()))
    assert len(spaces) == len(set(spaces))
    assert suite.name_lpips("lpips_vgg16") == "lpips@vgg16"
    with pytest.raises(ValueError, match="names an entry twice"):
        suite.MetricSuiteConfig(networks=("clip", "clip"))
