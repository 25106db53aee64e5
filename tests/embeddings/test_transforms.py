"""Our transform against the validation transforms of the libraries, and the pool that prepares images."""

import numpy as np
import pytest
import torch
from PIL import Image

from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.embeddings.torchvision_models import TorchvisionConfig
from braindecode_vis.embeddings.transforms import Transform, crop_or_pad, map_ahead

IMAGES = [np.random.default_rng(i).integers(0, 256, size=s, dtype=np.uint8) for i, s in
          enumerate([(300, 401, 3), (223, 517, 3), (640, 331, 3), (20, 30, 3), (256, 256, 3)])]  # fmt: skip


def run(transform, image):
    return transform.normalise(torch.from_numpy(np.stack([transform.resize_and_crop(image)])))[0]


@pytest.mark.parametrize("image", IMAGES, ids=lambda i: "x".join(map(str, i.shape[:2])))
@pytest.mark.parametrize(
    ("architecture", "tag"),
    [("ViT-B-32-quickgelu", "openai"), ("ViT-B-16-SigLIP", "webli"), ("ViT-H-14-378-quickgelu", "dfn5b")],
)
def test_openclip_transforms(architecture, tag, image):
    from open_clip import image_transform
    from open_clip.pretrained import get_pretrained_cfg

    ours = OpenClipConfig(architecture=architecture, pretrained=tag).make_transform()
    run_ = get_pretrained_cfg(architecture, tag)
    theirs = image_transform(
        ours.size, is_train=False, mean=run_["mean"], std=run_["std"], resize_mode=run_["resize_mode"],
        interpolation=run_["interpolation"],
    )  # fmt: skip
    torch.testing.assert_close(run(ours, image), theirs(Image.fromarray(image)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image", IMAGES, ids=lambda i: "x".join(map(str, i.shape[:2])))
@pytest.mark.parametrize(
    "architecture", ["resnet50.a1_in1k", "vit_base_patch14_dinov2.lvd142m", "swin_tiny_patch4_window7_224"]
)
def test_timm_transforms(architecture, image):
    import timm
    from timm.data import create_transform, resolve_data_config

    ours = TimmConfig(architecture=architecture).make_transform()
    cfg = timm.get_pretrained_cfg(architecture).to_dict()
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=cfg))
    torch.testing.assert_close(run(ours, image), theirs(Image.fromarray(image)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image", IMAGES, ids=lambda i: "x".join(map(str, i.shape[:2])))
@pytest.mark.parametrize("architecture", ["vgg19", "inception_v3", "swin_t"])
def test_torchvision_transforms(architecture, image):
    from torchvision.models import get_model_weights

    theirs = get_model_weights(architecture).DEFAULT.transforms()
    ours = TorchvisionConfig(architecture=architecture).make_transform()
    torch.testing.assert_close(run(ours, image), theirs(Image.fromarray(image)), atol=1e-5, rtol=1e-5)


def test_padding_and_longest_side():
    from open_clip import image_transform

    ours = Transform(size=64, resize="longest", fill=7)
    theirs = image_transform(
        64, is_train=False, resize_mode="longest", fill_color=7, mean=(0, 0, 0), std=(1, 1, 1)
    )
    for image in IMAGES[:3]:
        expected = (theirs(Image.fromarray(image)).permute(1, 2, 0) * 255).round().numpy()
        np.testing.assert_array_equal(ours.resize_and_crop(image), expected)
    assert crop_or_pad(IMAGES[3], 40, 9)[0, 0].tolist() == [9, 9, 9]


def test_a_transform_is_named_by_all_that_it_does():
    base = Transform(size=224)
    variants = [
        Transform(size=225), Transform(size=224, resize_to=256), Transform(size=224, resize="squash"),
        Transform(size=224, interpolation="bilinear"), Transform(size=224, mean=(0.1, 0.2, 0.3)),
        Transform(size=224, resize="longest", fill=3),
    ]  # fmt: skip
    assert len({t.name for t in [base, *variants]}) == len(variants) + 1


def test_results_come_in_order_and_never_too_far_ahead():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = map_ahead(lambda i: -i, items(), workers=3, ahead=5)
    assert next(results) == 0
    assert len(taken) <= 6
    assert [next(results) for _ in range(99)] == [-i for i in range(1, 100)]


def test_an_error_arrives_at_its_item():
    def divide(i):
        return 1 / (i - 2)

    results = map_ahead(divide, range(5), workers=2)
    assert [next(results), next(results)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
