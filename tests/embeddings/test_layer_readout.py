import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.embeddings.layer_readout import (
    Tower,
    find_module,
    pool_tokens,
    read_layers,
    resolve_layer,
)
from braindecode_vis.embeddings.openclip import OpenClipConfig

TOKENS = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))  # class, register, five patches


def test_poolings_by_hand():
    pool = lambda how: pool_tokens(TOKENS, how, n_prefix=2, has_class=True)  # noqa: E731
    torch.testing.assert_close(pool("cls"), TOKENS[:, 0])
    torch.testing.assert_close(pool("mean"), TOKENS[:, 2:].mean(1))
    torch.testing.assert_close(pool("cls+mean"), torch.cat([TOKENS[:, 0], TOKENS[:, 2:].mean(1)], 1))
    torch.testing.assert_close(pool("patches"), TOKENS[:, 2:])
    torch.testing.assert_close(pool("tokens"), TOKENS[:, [0, 2, 3, 4, 5, 6]])
    first, patches = TOKENS[1, 0].numpy(), TOKENS[1, 2:].numpy()
    weights = np.exp(patches @ first / 2)  # the square root of four features
    np.testing.assert_allclose(pool("attention")[1], weights @ patches / weights.sum(), rtol=1e-5)


def test_a_class_token_that_is_not_there_is_not_invented():
    with pytest.raises(ConfigError, match="needs a class token, but this network has none; use mean"):
        pool_tokens(TOKENS, "cls", n_prefix=0, has_class=False)
    pooled = pool_tokens(TOKENS, "attention", n_prefix=0, has_class=False)
    assert pooled.shape == (2, 4)
    torch.testing.assert_close(pool_tokens(TOKENS, "tokens", n_prefix=0, has_class=False), TOKENS)
    network = torch.nn.Sequential(torch.nn.Identity())
    plain = Tower(network, network, list(network))  # a network of which nothing more is said
    torch.testing.assert_close(read_layers(plain, TOKENS, layers=[0], pooling="patches"), TOKENS)


def test_layers_that_do_not_exist_or_do_not_run():
    with pytest.raises(ConfigError, match="the blocks 0 to 9"):
        resolve_layer(10, 10)
    network = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "idle": torch.nn.Linear(3, 3)})
    tower = Tower(network, network["used"], [network["used"], network["idle"]])
    with pytest.raises(ConfigError, match="layer 1 is not used in the network's forward pass"):
        read_layers(tower, torch.rand(1, 3), layers=[1], pooling="mean")


def test_a_name_picks_its_module_and_output_the_last_block():
    """A name stands for the module that is called so, whether or not it is a block; only ``output`` is a place."""
    network = torch.nn.Sequential()
    for name in ("stem", "first", "second", "third", "head"):
        network.add_module(name, torch.nn.Linear(3, 3))
    tower = Tower(network, network, [network.first, network.second, network.third])
    for name in ("stem", "first", "second", "third", "head"):
        assert find_module(tower, name) is getattr(network, name)
    assert find_module(tower, "output") is network.third
    assert [find_module(tower, layer) for layer in (0, 1, -1, -3, 0.0, 0.5, 1.0)] == [
        network.first, network.second, network.third, network.first, network.first, network.second, network.third,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"names 'secnd', which this network does not have.*second"):
        find_module(tower, "secnd")
    with pytest.raises(ConfigError, match="has no list of blocks"):
        find_module(Tower(network, network, []), "output")
    assert find_module(Tower(network, network, []), "stem") is network.stem
    # What is read is what the named module gave.
    inputs = torch.rand(2, 3)
    expected = network.second(network.first(network.stem(inputs)))
    torch.testing.assert_close(read_layers(tower, inputs, layers=["second"], pooling="mean"), expected)


def test_layers_of_several_widths_do_not_stack():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    tower = Tower(network, network, list(network))
    with pytest.raises(ConfigError, match=r"the layers \[0, 1\] have 4, 5 features"):
        read_layers(tower, torch.rand(1, 3), layers=[0, 1], pooling="mean")


def test_the_pass_ends_after_the_last_layer_that_is_needed_and_leaves_no_hook():
    class Fails(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("should not run")

    network = torch.nn.Sequential(torch.nn.Linear(3, 4), Fails())
    tower = Tower(network, network, list(network))
    assert read_layers(tower, torch.rand(1, 3), layers=[0], pooling="mean").shape == (1, 4)
    assert not network[0]._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, "pooling 'own' is the pooled output of the whole network; layer 3 needs mean"),
        ({"layer": 1.5, "pooling": "mean"}, "layer"),
        ({"project": True}, "project applies to tokens"),
        ({"layer": (1, 2), "pooling": "tokens"}, "takes one layer"),
        ({"layer": (), "pooling": "mean"}, "takes one layer"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OpenClipConfig(architecture="ViT-B-32", **settings)


def test_layer_and_depth_are_different_things():
    """1 is the second block, 1.0 the last one: YAML keeps the two apart and so must we."""
    assert resolve_layer(1, 12) == 1
    assert resolve_layer(1.0, 12) == 11
    config = OpenClipConfig(architecture="ViT-B-32", layer=1.0, pooling="mean")
    assert isinstance(config.layer, float)
    assert isinstance(OpenClipConfig.model_validate(config.model_dump(mode="json")).layer, float)
