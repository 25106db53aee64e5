"""Low-rank changes of an image network: the start, the gradient, the merge, the files."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.training.image_config import ImageTowerConfig
from braindecode_vis.training.lora import AdaptedTower
from tests.training.test_loop import Killed, kill_after
from tests.training.toy_task import assert_same_weights, get_weights, make_config, make_task

TIMM = TimmConfig(
    architecture="vit_tiny_patch16_224.augreg_in21k", weights="random", image_size=32, workers=0,
    model_args={"depth": 2, "embed_dim": 16, "num_heads": 2}, pooling="cls",
)  # fmt: skip
CLIP = OpenClipConfig(
    architecture="ViT-B-32", weights="random", workers=0,
    model_args={"embed_dim": 8, "vision_cfg": {"layers": 2, "width": 64, "image_size": 32, "patch_size": 16},
                "text_cfg": {"layers": 1, "width": 32, "heads": 2}},
)  # fmt: skip
LAYERS = TIMM.model_copy(update={"layer": (0, 1), "pooling": "mean", "normalise": True})
PIXELS = np.random.default_rng(4).integers(0, 256, size=(24, 32, 32, 3), dtype=np.uint8)
IDS = [f"image{i:03d}" for i in range(24)]


def give_images(ids):
    return [PIXELS[IDS.index(i)] for i in ids]


def make_tower(target, seed=0, **settings):
    torch.manual_seed(seed)
    return AdaptedTower(ImageTowerConfig(target=target, **{"rank": 3, **settings}))


def move(tower, seed=1):
    """Give B values, as if it had learnt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for up in tower.up:
            up.copy_(0.2 * torch.randn(up.shape, generator=generator))


def make_tuned_task(target=TIMM, **settings):
    responses, _ = make_task(n_images=24)
    bank = Embeddings(target.build().encode(list(PIXELS)), IDS, target.build().space)
    targets = bank.select(list(responses.stimulus_ids))
    config = make_config(**{"image_tower": {"target": target, "rank": 3, "lr_scale": 1.0}, **settings})
    encoder = config.build(seed=0)
    encoder.images = give_images
    return responses, targets, config, encoder


@pytest.fixture(autouse=True)
def _keep_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("target", [TIMM, CLIP, LAYERS])
def test_the_start_is_the_frozen_network(target):
    tower = make_tower(target, modules="all" if target is LAYERS else "tower")
    expected = target.build().encode(list(PIXELS))
    found = tower.embed(give_images, IDS)
    assert found.shape == (24, int(np.prod(expected.shape[1:])))
    # Attention takes another route where gradients are off.
    np.testing.assert_allclose(found, expected.reshape(24, -1), rtol=1e-4, atol=1e-5)
    move(tower)
    assert abs(tower.embed(give_images, IDS) - found).max() > 1e-3


@pytest.mark.parametrize("target", [TIMM, CLIP])
def test_only_a_and_b_learn(target):
    tower = make_tower(target)
    names = [name for name, _ in tower.named_parameters()]
    assert names == [f"{side}.{i}" for side in ("down", "up") for i in range(4)]
    tower(torch.from_numpy(PIXELS[:4])).square().sum().backward()
    frozen = tower.frozen.load().network
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert all(up.grad.abs().max() > 0 for up in tower.up)
    assert all(down.grad.abs().max() == 0 for down in tower.down)  # B is zero at the start
    move(tower)
    tower.zero_grad()
    tower(torch.from_numpy(PIXELS[:4])).square().sum().backward()
    assert all(down.grad.abs().max() > 0 for down in tower.down)


def test_merged_equals_two_maps_side_by_side():
    """Independent reference: each changed linear map adds s B (A x) to its own output."""
    tower = make_tower(TIMM, modules="all", alpha=6.0)
    move(tower)
    encoder = copy.deepcopy(tower.frozen.encoder)
    modules = dict(encoder.load().network.named_modules())
    for name, down, up in zip(tower.shapes, tower.down, tower.up, strict=True):
        module = modules[name.removesuffix(".weight")]
        module.register_forward_hook(
            lambda _, inputs, output, down=down, up=up: output + 2.0 * (inputs[0] @ down.T) @ up.T
        )
    with torch.no_grad():
        side_by_side = encoder.forward(encoder.transform.normalise(torch.from_numpy(PIXELS[:5])))
    found = tower.embed(give_images, IDS[:5])
    np.testing.assert_allclose(found, side_by_side, rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(tower.frozen.encoder)
    merged.load().network.load_state_dict(tower.merge(), strict=False)
    np.testing.assert_allclose(merged.encode(list(PIXELS[:5])), found, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    grads = []
    for together in (64, 3):
        tower = make_tower(CLIP, images_together=together)
        move(tower)
        tower(torch.from_numpy(PIXELS[:8])).pow(3).sum().backward()
        grads.append([p.grad.clone() for p in tower.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_blocks_that_change():
    assert {n.split(".")[1] for n in make_tower(TIMM, layers=(-1,)).shapes} == {"1"}
    first = TIMM.model_copy(update={"layer": 0, "pooling": "mean"})
    assert {n.split(".")[1] for n in make_tower(first).shapes} == {"0"}  # the second is never run
    assert set(make_tower(CLIP).shapes) == {
        f"transformer.resblocks.{i}.attn.{w}" for i in (0, 1) for w in ("in_proj_weight", "out_proj.weight")
    }
    with pytest.raises(ConfigError, match="names 7, but"):
        make_tower(TIMM, layers=(7,))
    resnet = TimmConfig(architecture="test_resnet.r160_in1k", weights="random")
    with pytest.raises(ConfigError, match="no linear weight of attention"):
        make_tower(resnet)


def test_every_linear_map_of_the_tower_changes_query_key_and_value_apart():
    """LoRA-CLIP: q, k, v, out, fc1, fc2 of each block and the output projection, each with an A and a B of its own.

    For ViT-B/32 at rank 32 this counts 5 349 376 numbers, those of peft on the separate matrices of transformers.
    """
    tower = make_tower(CLIP, modules="tower", start="gaussian")
    width, out, rank = 64, 8, 3
    block = 4 * (width + width) + 2 * (width + 4 * width)
    assert sum(p.numel() for p in tower.parameters()) == rank * (2 * block + width + out)
    wide = make_tower(CLIP, modules="tower", start="gaussian", rank=64)
    assert float(torch.cat([d.detach().flatten() for d in wide.down]).std()) == pytest.approx(
        1 / 64, rel=0.05
    )
    move(tower)
    merged, frozen = tower.merge(), dict(tower.frozen.load().network.named_parameters())
    name = "transformer.resblocks.0.attn.in_proj_weight"
    change = (merged[name] - frozen[name]).detach()
    start = list(tower.shapes).index(name)
    for number in range(3):
        own = tower.up[start + number] @ tower.down[start + number]
        torch.testing.assert_close(change[width * number : width * (number + 1)], own.detach())
        assert int(torch.linalg.matrix_rank(own)) == rank
    last = (merged["proj"] - frozen["proj"]).detach()
    torch.testing.assert_close(last, (tower.up[-1] @ tower.down[-1]).T.detach())
    with pytest.raises(ConfigError, match="modules is tower, whose last map comes after"):
        make_tower(LAYERS, modules="tower")


def test_training_moves_the_network_and_keeps_only_its_changes(tmp_path):
    responses, targets, config, encoder = make_tuned_task(objectives=[{"kind": "clip"}, {"kind": "mse"}])
    frozen = {k: v.clone() for k, v in AdaptedTower(config.image_tower).frozen.load().state_dict().items()}
    encoder.fit(responses, targets)
    after = AdaptedTower(config.image_tower).frozen.load().state_dict()
    assert all(torch.equal(frozen[k], after[k]) for k in frozen)
    mapped, predicted = encoder.map_targets(targets), encoder.predict(responses)
    assert mapped.space == predicted.space == encoder.comparison_space != targets.space
    assert mapped.vectors.shape == targets.vectors.shape
    assert abs(mapped.vectors - targets.vectors).max() > 1e-3
    assert encoder.predict_for_generator(responses).space == targets.space
    encoder.write(tmp_path)
    names = [n for n in get_weights(encoder) if n.startswith("tower")]
    assert len(names) == 8
    assert (tmp_path / "network.safetensors").stat().st_size < 60_000
    read = config.read(tmp_path)
    with pytest.raises(DataError, match="its attribute images"):
        read.map_targets(targets)
    table = pd.DataFrame({"stimulus_id": IDS, "concept": "c", "path": "memory", "sha256": IDS})
    read.images = StimulusSet(table, pixels=PIXELS)
    np.testing.assert_array_equal(read.map_targets(targets).vectors, mapped.vectors)
    np.testing.assert_array_equal(read.predict(responses).vectors, predicted.vectors)
    assert read.comparison_space == encoder.comparison_space


def test_a_tuned_network_follows_the_brain_where_a_still_one_cannot():
    losses = []
    for lr_scale in (1e-12, 1.0):
        tower = {"target": TIMM, "rank": 8, "lr_scale": lr_scale}
        responses, targets, _, encoder = make_tuned_task(
            epochs=12, normalise_targets="zscore", image_tower=tower
        )
        losses.append(encoder.fit(responses, targets).fitted.history[-1]["loss"])
    assert losses[1] < 0.9 * losses[0]


def test_a_still_network_trains_as_frozen_embeddings_do():
    """A vanishing learning rate of the network gives the training of plain targets."""
    settings = {"selection": {"kind": "last", "hold_out": 0.25}, "normalise_targets": "zscore"}
    tower = {"target": TIMM, "rank": 3, "lr_scale": 1e-12}
    responses, targets, _, encoder = make_tuned_task(**settings, image_tower=tower)
    encoder.fit(responses, targets)
    plain = make_config(**settings).build(seed=0).fit(responses, targets)
    for name, value in get_weights(plain).items():
        np.testing.assert_allclose(get_weights(encoder)[name], value, rtol=1e-2, atol=1e-3, err_msg=name)
    key = "validation_loss"
    assert encoder.fitted.history[-1][key] == pytest.approx(plain.fitted.history[-1][key], rel=1e-3)


def test_a_killed_run_continues_and_layers_are_fused(tmp_path):
    target = TIMM.model_copy(update={"layer": (0, 1), "pooling": "mean"})
    responses, targets, config, whole = make_tuned_task(
        target, fusion={}, normalise_targets="l2", ema=0.9, checkpoint_seconds=0.0, max_device_bytes=0,
        objectives=[{"kind": "clip"}, {"kind": "distillation"}], teacher={"queue": 5},
        selection={"kind": "early_stopping", "hold_out": 0.2},
    )  # fmt: skip
    whole.fit(responses, targets)
    encoder = config.build(seed=0)
    encoder.images, encoder.workspace = give_images, tmp_path
    kill_after(encoder, 4)
    with pytest.raises(Killed):
        encoder.fit(responses, targets)
    again = config.build(seed=0)
    again.images, again.workspace = give_images, tmp_path
    assert_same_weights(whole, again.fit(responses, targets))
    assert again.map_targets(targets).vectors.shape == (48, 16)


def test_what_cannot_be_tuned_is_refused():
    responses, targets, config, encoder = make_tuned_task(epochs=1)
    for kind in ("pixels", "views"):
        with pytest.raises(ValidationError, match=f"the target '{kind}' has no network that can be tuned"):
            make_config(image_tower={"target": {"kind": kind}})
    with pytest.raises(ConfigError, match="only the network that computes the targets can be tuned"):
        encoder.fit(responses, replace(targets, space="pixels/28x28x1"))
    blind = config.build(seed=0)
    with pytest.raises(ConfigError, match="give the encoder its images"):
        blind.fit(responses, targets)
    with pytest.raises(ValidationError, match="view_choice and image_tower cannot be combined"):
        make_config(image_tower={"target": TIMM}, view_choice="mean")
