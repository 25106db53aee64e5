"""Architecture and layers: our networks against state dicts and forward passes of the libraries themselves."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.embeddings import openclip, timm_models, torchvision_models
from braindecode_vis.embeddings.layer_readout import read_layers
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.embeddings.torchvision_models import TorchvisionConfig

IMAGE = np.random.default_rng(1).integers(0, 256, size=(90, 70, 3), dtype=np.uint8)
TEXT = {"layers": 1, "width": 32, "heads": 2}
CLIPS = {
    "ViT-B-32": {"embed_dim": 16, "vision_cfg": {"layers": 3, "width": 64, "image_size": 64, "patch_size": 16},
                 "text_cfg": TEXT},
    "RN50": {"embed_dim": 16, "vision_cfg": {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64},
             "text_cfg": TEXT},
    "coca_ViT-B-32": {"embed_dim": 16, "text_cfg": TEXT, "multimodal_cfg": TEXT,
                      "vision_cfg": {"layers": 2, "width": 64, "image_size": 64, "patch_size": 16}},
    "convnext_base": {"embed_dim": 16, "text_cfg": TEXT,
                      "vision_cfg": {"timm_model_name": "test_convnext", "image_size": 64}},
}  # fmt: skip


def make_clip(architecture, seed=3):
    import open_clip

    config = OpenClipConfig(architecture=architecture, weights="random", model_args=CLIPS[architecture])
    description = openclip.read_description(config)
    description.pop("custom_text", None)
    torch.manual_seed(seed)
    model = open_clip.create_model(architecture, **description).eval()
    for module in model.modules():  # untrained batch statistics would hide a missing tensor
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    return model


@pytest.mark.parametrize("architecture", CLIPS)
def test_openclip_agrees_with_the_whole_model_of_the_library(architecture, tmp_path):
    from open_clip import image_transform
    from PIL import Image

    model = make_clip(architecture)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "clip.pt"
    )
    config = OpenClipConfig(
        architecture=architecture, weights=tmp_path / "clip.pt", model_args=CLIPS[architecture]
    )
    inputs = image_transform(64, is_train=False)(Image.fromarray(IMAGE))[None]
    with torch.inference_mode():
        # CoCa brings its vectors to length one unless told otherwise.
        raw = {"normalize": False} if architecture.startswith("coca") else {}
        expected = model.encode_image(inputs, **raw).numpy()
    # Normalisation is done in another order of rounding.
    np.testing.assert_allclose(config.build().encode([IMAGE]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, -1, 0.5])
def test_openclip_layers_are_those_of_its_own_reader(layer):
    config = OpenClipConfig(architecture="ViT-B-32", weights="random", model_args=CLIPS["ViT-B-32"])
    tower, inputs = config.make_tower(), torch.rand(2, 3, 64, 64)
    index = {0: 0, -1: 2, 0.5: 1}[layer]
    with torch.no_grad():
        own = tower.network.forward_intermediates(
            inputs, indices=[index], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
        )
        prefix, patches = own["image_intermediates_prefix"][0], own["image_intermediates"][0]
        tokens = read_layers(tower, inputs, layers=[layer], pooling="tokens")
        torch.testing.assert_close(tokens, torch.cat([prefix, patches], 1))
        mean = read_layers(tower, inputs, layers=[layer], pooling="mean")
        torch.testing.assert_close(mean, patches.mean(1))


def test_openclip_tokens_are_those_that_generators_take():
    """unCLIP takes the normed patches; Versatile Diffusion the projected class token and patches."""
    config = OpenClipConfig(architecture="ViT-B-32", weights="random", model_args=CLIPS["ViT-B-32"])
    tower, inputs = config.make_tower(), torch.rand(2, 3, 64, 64)
    visual = tower.network
    visual.output_tokens = True
    with torch.no_grad():
        pooled, tokens = visual(inputs)
        patches = read_layers(tower, inputs, layers=["output"], pooling="patches")
        projected = read_layers(tower, inputs, layers=["output"], pooling="tokens", project=True)
    torch.testing.assert_close(patches, tokens)
    assert projected.shape == (2, 17, 16)
    torch.testing.assert_close(projected[:, 0], pooled)


def test_several_layers_in_one_pass():
    config = OpenClipConfig(architecture="ViT-B-32", weights="random", model_args=CLIPS["ViT-B-32"])
    tower, inputs = config.make_tower(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        both = read_layers(tower, inputs, layers=[2, 0], pooling="mean")
        for column, layer in enumerate((2, 0)):
            torch.testing.assert_close(
                both[:, column], read_layers(tower, inputs, layers=[layer], pooling="mean")
            )


def test_openclip_is_described_as_it_describes_itself():
    """Its files are read on their own, since to import it takes five seconds."""
    import open_clip
    from open_clip import pretrained

    shipped, runs = openclip._read_shipped(), openclip._open_runs()
    assert sorted(shipped) == sorted(open_clip.list_models())
    assert openclip.read_architectures() == shipped
    assert runs["_PRETRAINED"] == pretrained._PRETRAINED
    for name, description in shipped.items():
        assert description == open_clip.get_model_config(name)
        assert runs["list_pretrained_tags_by_model"](name) == pretrained.list_pretrained_tags_by_model(name)


def test_openclip_traps_are_refused():
    with pytest.raises(ValueError, match=r"has no architecture 'ViT-H14'.*did you mean 'ViT-H-14'"):
        OpenClipConfig(architecture="ViT-H14")
    with pytest.raises(ValueError, match="trained with QuickGELU: set architecture to ViT-L-14-quickgelu"):
        OpenClipConfig(architecture="ViT-L-14", pretrained="openai")
    assert OpenClipConfig(architecture="ViT-L-14-quickgelu", pretrained="openai").make_transform().size == 224
    with pytest.raises(
        ConfigError, match=r"different transforms; set target\.pretrained to one of .*laion2b_s32b_b82k"
    ):
        OpenClipConfig(architecture="ViT-L-14").make_transform()
    assert (
        OpenClipConfig(architecture="ViT-H-14").make_transform().name == "shortest224-bicubic-centre224-clip"
    )
    with pytest.raises(ConfigError, match=r"CLIP-ViT-H-14-laion2B-s32B-b79K"):
        _ = OpenClipConfig(architecture="ViT-H-14", pretrained="laion2b_s32b_b79k").digest


VITS = {"depth": 3, "embed_dim": 32, "num_heads": 2}
TIMMS = {
    "vit_small_patch14_reg4_dinov2": VITS | {"img_size": 28},
    "vit_small_patch16_dinov3": VITS | {"img_size": 32},
    "vit_base_patch16_siglip_224": VITS | {"img_size": 32},
    "vit_intern300m_patch14_448": VITS | {"img_size": 28},
    "test_convnext": {},
    "test_resnet": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2), "img_size": 56},
}  # fmt: skip


@pytest.mark.parametrize("architecture", TIMMS)
def test_timm_layers_are_those_of_its_own_reader(architecture):
    import timm

    torch.manual_seed(0)
    network = timm.create_model(architecture, num_classes=0, **TIMMS[architecture]).eval()
    tower, side = timm_models.describe_tower(network), TIMMS[architecture].get("img_size", 64)
    inputs = torch.rand(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(read_layers(tower, inputs, layers=["output"]), network(inputs))
        if tower.n_prefix or "siglip" in architecture:
            (patches,) = network.forward_intermediates(
                inputs, indices=[1], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
            )
            patches, prefix = patches if isinstance(patches, tuple) else (patches, None)
            torch.testing.assert_close(read_layers(tower, inputs, layers=[1], pooling="patches"), patches)
            if tower.has_class:
                torch.testing.assert_close(
                    read_layers(tower, inputs, layers=[1], pooling="cls"), prefix[:, 0]
                )
        else:
            last = network.forward_intermediates(inputs, intermediates_only=True)[-1]
            mean = read_layers(tower, inputs, layers=[-1], pooling="mean")
            torch.testing.assert_close(mean, last.mean((2, 3)))


def test_attention_pooling_is_the_networks_own_where_it_has_one():
    import timm

    network = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, img_size=32, **VITS).eval()
    tower, inputs = timm_models.describe_tower(network), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        pooled = read_layers(tower, inputs, layers=["output"], pooling="attention")
        torch.testing.assert_close(pooled, network(inputs))


def test_timm_reads_the_authors_own_names(tmp_path):
    """DINOv2's release has a mask token and other names of the register tokens than timm."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28, **VITS).eval()
    state = {k.replace("reg_token", "register_tokens"): v for k, v in network.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 32)
    # There, positions include the class token, and timm adds the two.
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], 1)
    save_file(state, tmp_path / "dinov2.safetensors")
    config = TimmConfig(
        architecture="vit_small_patch14_reg4_dinov2.lvd142m", image_size=28,
        weights=tmp_path / "dinov2.safetensors", model_args=VITS,
    )  # fmt: skip
    inputs = torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(config.make_tower().forward(inputs), network(inputs))


def test_timm_checks_every_tensor(tmp_path):
    import timm

    state = timm.create_model("test_resnet").state_dict()  # with its classifier, which is left
    state.pop("layer1.0.conv1.weight")
    save_file(state, tmp_path / "resnet.safetensors")
    with pytest.raises(DataError, match=r"is missing layer1\.0\.conv1\.weight \(1 missing"):
        TimmConfig(architecture="test_resnet", weights=tmp_path / "resnet.safetensors").make_tower()
    with pytest.raises(
        ValueError, match="timm has no training run 'x' of vit_base_patch14_dinov2; known are lvd142m"
    ):
        TimmConfig(architecture="vit_base_patch14_dinov2.x")


TORCHVISIONS = [
    "vgg19", "inception_v3", "efficientnet_b0", "densenet121", "regnet_y_400mf", "vit_b_16", "swin_t",
    "squeezenet1_1",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("resnet50", "googlenet", "mobilenet_v2", "resnext50_32x4d", "alexnet", "shufflenet_v2_x0_5",
                   "mnasnet0_5", "convnext_tiny", "maxvit_t")),
]  # fmt: skip


@pytest.mark.parametrize("architecture", TORCHVISIONS)
def test_every_torchvision_family_has_blocks_and_an_output(architecture):
    # RegNet draws its weights in a way that a device without memory cannot follow.
    side, device = 299 if "inception" in architecture else 224, "cpu" if "regnet" in architecture else "meta"
    slow_start = {"init_weights": False} if architecture in ("inception_v3", "googlenet") else {}
    with torch.device(device), torch.no_grad():
        network = torchvision_models.build_network(architecture, slow_start)
        tower, inputs = torchvision_models.describe_tower(network, architecture), torch.rand(1, 3, side, side)
        vectors = tower.forward(inputs)
        middle = read_layers(tower, inputs, layers=[0.5], pooling="mean")
    widths = {
        "vgg19": 4096,
        "resnet50": 2048,
        "inception_v3": 2048,
        "densenet121": 1024,
        "vit_b_16": 768,
        "swin_t": 768,
    }
    assert vectors.shape == (1, widths.get(architecture, vectors.shape[1]))
    assert middle.ndim == 2
    assert len(tower.blocks) > 5
    assert TorchvisionConfig(architecture=architecture, weights="random").make_transform().size == side


def test_torchvision_agrees_with_its_own_extractor(tmp_path):
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    tower = TorchvisionConfig(architecture="resnet18", weights=tmp_path / "resnet18.pth").make_tower()
    reader = create_feature_extractor(network, {"layer2.0": "block", "flatten": "output"})
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = reader(inputs)
        torch.testing.assert_close(tower.forward(inputs), expected["output"])
        for layer in (2, "layer2.0"):
            block = read_layers(tower, inputs, layers=[layer], pooling="mean")
            torch.testing.assert_close(block, expected["block"].mean((2, 3)))
    with pytest.raises(
        ConfigError, match=r"names 'layer2\.9', which this network does not have.*did you mean 'layer2\."
    ):
        read_layers(tower, inputs, layers=["layer2.9"], pooling="mean")


@pytest.mark.parametrize(("layer", "n_places"), [(-1, 49), ("features.1", 224 * 224)])
def test_feature_maps_of_vgg_are_tokens(layer, n_places):
    """Each place of a map is a token; VGG's ReLUs worked in place and changed what was read of the layer before."""
    asked = {"architecture": "vgg11", "weights": "random", "pooling": "patches"}
    config = TorchvisionConfig(**asked, layer=layer, model_args={"init_weights": False})
    tower, image = config.make_tower(), torch.rand(1, 3, 224, 224)
    number = layer if isinstance(layer, int) else int(layer.rpartition(".")[2])
    with torch.no_grad():
        own = tower.network.features[: number % len(tower.network.features) + 1](image)
        tokens = read_layers(tower, image, layers=[layer], pooling="patches")
        first, second = read_layers(tower, image, layers=[0, 1], pooling="mean").unbind(1)
        convolved = tower.network.features[0](image)
    assert tokens.shape == (1, n_places, own.shape[1])
    torch.testing.assert_close(tokens, own.flatten(2).transpose(1, 2))
    torch.testing.assert_close(first, convolved.mean((2, 3)))
    torch.testing.assert_close(second, convolved.relu().mean((2, 3)))


@pytest.mark.parametrize("config", [TimmConfig, TorchvisionConfig])
def test_modules_read_together_keep_their_own_values(config):
    tower = config(architecture="resnet18", weights="random").make_tower()
    image, names = torch.rand(1, 3, 64, 64), ["layer1.0.bn1", "layer1.0.conv2"]
    with torch.no_grad():
        alone = [read_layers(tower, image, layers=[name], pooling="mean") for name in names]
        together = read_layers(tower, image, layers=names, pooling="mean")
    torch.testing.assert_close(together, torch.stack(alone, 1))


@pytest.mark.parametrize(
    ("architecture", "layer", "again"),
    [("vgg11", (0, 1), True), ("vgg11", 0, False), ("vgg11", "features.0", False),
     ("resnet18", (0, 1), False), ("resnet18", ("layer1.0.bn1", "layer1.0.conv2"), True)],
)  # fmt: skip
def test_layers_that_a_relu_had_changed_are_embedded_again(architecture, layer, again):
    """Stored embeddings of several layers in one pass were wrong; those of one layer were right and stay."""
    config = TorchvisionConfig(architecture=architecture, weights="random", pooling="mean", layer=layer)
    assert config.build().space.endswith("/revision=2") == again
    assert config.hashed_fields().get("revision") == (2 if again else None)


def test_densenet_files_with_old_names_are_read(tmp_path):
    import torchvision

    arguments = {"block_config": [2, 1, 1, 1], "num_init_features": 8, "growth_rate": 4}
    network = torchvision.models.DenseNet(**arguments).eval()
    state = {k.replace("norm1.", "norm.1.").replace("conv1.", "conv.1.").replace("norm2.", "norm.2.")
             .replace("conv2.", "conv.2.") if "denselayer" in k else k: v
             for k, v in network.state_dict().items()}  # fmt: skip
    torch.save(state, tmp_path / "densenet.pth")
    other = torchvision.models.DenseNet(**arguments).eval()
    torchvision_models.load_weights(other, tmp_path / "densenet.pth", "densenet121")
    inputs = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(inputs), network(inputs))


@pytest.mark.slow
def test_every_architecture_of_openclip_is_described():
    import open_clip

    for architecture in open_clip.list_models():
        config = OpenClipConfig(architecture=architecture, weights="random")
        with torch.device("meta"):
            tower = openclip.describe_tower(openclip.build_image_tower(config).visual)
        assert len(tower.blocks) > 3, architecture
