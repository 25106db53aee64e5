"""What every network promises, whatever it is inside; a new network cannot stay outside this list."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional

import braindecode_vis.encoders as encoders
import braindecode_vis.parts.foundation.models as models
from braindecode_vis.base.settings import Settings
from braindecode_vis.encoders.atm_config import (
    AtmEConfig,
    AtmSConfig,
    EEGNetConfig,
    EEGProjectConfig,
    TSConvConfig,
)
from braindecode_vis.encoders.latent_decoder_config import LatentDecoderConfig
from braindecode_vis.encoders.mindeye_config import ResidualMlpConfig, SharedSpaceConfig
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.encoders.simpleconv_config import SimpleConvImageConfig
from braindecode_vis.parts.foundation.models.foundation_config import (
    BendrConfig,
    CBraModConfig,
    EegptConfig,
    LabramConfig,
    LunaConfig,
    ReveConfig,
)
from braindecode_vis.parts.foundation.models.voxel_clusters_config import VoxelClustersConfig
from tests.constants import replace_constants
from tests.parts.foundation.models.fingerprints import N19

N_OUTPUTS = 16  # 4 maps of 2 x 2 for the network that gives latent images
# `braindecode` needs an extra, models of fMRI the parcels or the grid of their pretraining: they have their own tests.
ELSEWHERE = {"braindecode", "brainlm", "brain_jepa", "cortex_mae", "neurostorm"}
# A constant added to all keys moves all scores of a query alike, which the softmax does not see.
WITHOUT_EFFECT = ("key.bias",)


@dataclass(frozen=True)
class Network:
    """One configuration and the kind of responses that it is for."""

    name: str
    config: Settings
    dims: tuple[str, ...] = ("channel", "time")
    one_channel: bool = True
    unknown_subject: bool = True

    def __str__(self):
        return self.name

    def make_signal(self, n_first=8, n_times=101, n_subjects=3):
        shape = (n_first, n_times)[: len(self.dims)]
        has_channels = self.dims[0] == "channel"
        angle = np.linspace(0, 2, n_first)
        places = 0.1 * np.stack(
            [np.sin(angle), np.cos(angle) * np.sin(3 * angle), np.cos(angle) ** 2 + 0.1], 1
        )
        with_times = self.dims[-1] == "time"
        return Signal(
            self.dims,
            shape,
            tuple(f"{3 * i + 1:02d}" for i in range(n_subjects)),
            ch_names=N19[:n_first] if has_channels else (),
            ch_pos=places if has_channels else None,
            times=np.arange(n_times) / 100 if with_times else None,
            sfreq=100.0 if with_times else None,
            networks=tuple(("Vis", "Default")[i % 2] for i in range(n_first))
            if "parcel" in self.dims
            else (),
        )


SMALL_CONV = {
    "n_virtual_channels": 9, "initial_channels": 9, "hidden": 10, "backbone_outputs": 11, "head_hidden": 13
}  # fmt: skip
Labram = replace_constants(LabramConfig, depth=1, width=100, projector_hidden=9)
CBraMod = replace_constants(CBraModConfig, depth=1, projector_hidden=9)
Eegpt = replace_constants(EegptConfig, size=32, depth=1, n_heads=2, projector_hidden=9)
Bendr = replace_constants(
    BendrConfig, size=32, hidden=32, depth=1, n_heads=2, feedforward=10, projector_hidden=9
)
Reve = replace_constants(ReveConfig, depth=1, projector_hidden=9)
Luna = replace_constants(LunaConfig, projector_hidden=9)
VOXEL_CLUSTERS = VoxelClustersConfig(
    width=16, depth=1, n_heads=4, n_clusters=4, n_tokens=4, code_size=8, code_width=8
)
NETWORKS = [
    Network("eegproject", EEGProjectConfig()),
    Network("eegproject, width", EEGProjectConfig(width=20)),
    Network("eegproject, voxels", EEGProjectConfig(), ("voxel",)),
    Network("eegproject, parcels", EEGProjectConfig(), ("parcel",)),
    Network("eegproject, parcels and times", EEGProjectConfig(), ("parcel", "time")),
    Network("tsconv", TSConvConfig()),
    Network("tsconv, width", TSConvConfig(width=20, initialisation="torch")),
    # The layer norm over one channel is constant: attention needs a second one.
    Network("tsconv, self", TSConvConfig(attention="self"), one_channel=False),
    Network("tsconv, graph", TSConvConfig(attention="graph", initialisation="torch")),
    Network("atm_s", AtmSConfig()),
    Network("atm_s, joint, width", AtmSConfig(joint=True, width=20)),
    Network("atm_e", AtmEConfig()),
    Network("atm_e, joint", AtmEConfig(joint=True)),
    Network("eegnet", EEGNetConfig()),
    Network("latent_decoder", LatentDecoderConfig()),
    Network("latent_decoder, voxels", LatentDecoderConfig(), ("voxel",)),
    Network("simpleconv_image", SimpleConvImageConfig(**SMALL_CONV)),
    Network("residual_mlp", ResidualMlpConfig(hidden=16), ("voxel",)),
    Network("residual_mlp, parcels and times", ResidualMlpConfig(hidden=16), ("parcel", "time")),
    # Voxels of another person have no layer yet: refused until the network is adapted to that person.
    Network("shared_space", SharedSpaceConfig(shared=16, n_blocks=2), ("voxel",), unknown_subject=False),
    Network("voxel_clusters", VOXEL_CLUSTERS, ("voxel",), unknown_subject=False),
    Network("parcels", ParcelsConfig(width=16, depth=2, n_heads=4, projector_hidden=9), ("parcel",)),
    Network("parcels and times", ParcelsConfig(width=16, depth=1, n_heads=4), ("parcel", "time")),
    Network("labram", Labram(scale=1)),
    Network("labram, cls", Labram(scale=1, pooling="cls")),
    Network("cbramod", CBraMod(scale=1, montage="own", pooling="flatten")),
    # The mean of a single channel is itself, which would be taken off.
    Network("eegpt", Eegpt(scale=1, context=True), one_channel=False),
    Network("bendr", Bendr(pooling="mean")),
    Network("bendr, convolutions", Bendr(context=False, pooling="last")),
    Network("reve", Reve(width=64, scale=1, pooling="attention")),
    Network("luna", Luna(size=16, depth=1, places="responses")),
]

every_network = pytest.mark.parametrize("network", NETWORKS, ids=str)


def build(network, signal, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network.config.build(signal, N_OUTPUTS)


def make_batch(network, signal, n=9):
    """Return trials of all subjects in turn, the unknown one among them if the network answers for it."""
    data = torch.randn(n, *signal.shape, generator=torch.Generator().manual_seed(1))
    return data, torch.arange(n) % (len(signal.subjects) + network.unknown_subject)


def outputs_of(network, module, data, subject):
    """Return all outputs, those of a second head included."""
    if getattr(network.config, "heads", "one") == "two":
        return torch.cat(module.forward_heads(data, subject), dim=1)
    return module(data, subject)


def find_network_kinds():
    kinds = set()
    found = [(top, info.name) for top in (encoders, models) for info in pkgutil.iter_modules(top.__path__)]
    for top, name in found:
        module: ModuleType = importlib.import_module(f"{top.__name__}.{name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if not issubclass(cls, Settings) or "kind" not in cls.model_fields or not hasattr(cls, "build"):
                continue
            if list(inspect.signature(cls.build).parameters)[1:3] == ["signal", "n_outputs"]:
                kinds.add(cls.model_fields["kind"].default)
    return kinds


def test_every_network_is_in_the_list():
    assert {n.config.kind for n in NETWORKS} | ELSEWHERE == find_network_kinds()


@every_network
def test_shape_and_determinism_in_eval(network):
    signal = network.make_signal()
    module = build(network, signal).eval()
    data, subject = make_batch(network, signal)
    first, second = module(data, subject), module(data, subject)
    assert first.shape == (9, N_OUTPUTS)
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@every_network
def test_a_trial_is_answered_alike_in_any_batch(network):
    """In evaluation no trial may see its neighbours; sums in another order differ by rounding only."""
    signal = network.make_signal()
    module = build(network, signal).eval()
    data, subject = make_batch(network, signal)
    together = module(data, subject)
    alone = torch.cat([module(data[i : i + 1], subject[i : i + 1]) for i in range(len(data))])
    torch.testing.assert_close(alone, together, atol=2e-5, rtol=1e-4)


@every_network
def test_trials_are_told_apart(network):
    """With the statistics of the batch, since those that a deep stack runs with in evaluation are not learnt yet."""
    signal = network.make_signal()
    module = build(network, signal).train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    data, subject = make_batch(network, signal)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        answers = module(data, torch.zeros_like(subject))
    assert torch.pdist(answers).min() > 1e-3


@every_network
def test_gradient_reaches_every_parameter(network):
    signal = network.make_signal()
    module = build(network, signal).eval()
    answers = outputs_of(network, module, *make_batch(network, signal))
    goal = torch.randn(answers.shape, generator=torch.Generator().manual_seed(2))
    functional.mse_loss(answers, goal).backward()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:  # the universal encoder is fitted before the decoder
            assert name.startswith("universal"), name
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith(WITHOUT_EFFECT), name


@every_network
def test_a_training_step_changes_the_answer_and_stays_finite(network):
    signal = network.make_signal()
    module = build(network, signal).train()
    data, subject = make_batch(network, signal)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)
    before = module.eval()(data, subject).detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        answers = outputs_of(network, module.train(), data, subject)
        functional.mse_loss(answers, torch.randn(answers.shape)).backward()
    optimiser.step()
    after = module.eval()(data, subject)
    assert torch.isfinite(after).all()
    assert not torch.allclose(before, after, atol=1e-6)


@every_network
@pytest.mark.parametrize("n_first, n_times, n_subjects", [(1, 101, 1), (13, 107, 1), (8, 128, 12)])
def test_any_number_of_channels_samples_and_subjects(network, n_first, n_times, n_subjects):
    if n_first == 1 and not network.one_channel:
        pytest.skip("needs two channels")
    signal = network.make_signal(n_first, n_times, n_subjects)
    data, subject = make_batch(network, signal, n=n_subjects + 1)
    answers = build(network, signal).eval()(data, subject)
    assert answers.shape == (n_subjects + 1, N_OUTPUTS)
    assert torch.isfinite(answers).all()


@every_network
def test_bf16_autocast(network):
    """The loop's mixed precision: finite, and near the float32 answer (bf16 has 8 bits of mantissa)."""
    signal = network.make_signal()
    module = build(network, signal).eval()
    data, subject = make_batch(network, signal)
    exact = module(data, subject)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = module(data, subject)
        outputs_of(network, module.train(), data, subject).float().square().mean().backward()
    assert torch.isfinite(answers).all()
    assert (answers.float() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())


@every_network
def test_state_dict_round_trip(network):
    signal = network.make_signal()
    data, subject = make_batch(network, signal)
    module, other = build(network, signal).eval(), build(network, signal, seed=1).eval()
    expected = module(data, subject)
    assert not torch.allclose(other(data, subject), expected, atol=1e-5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(data, subject), expected)


@every_network
def test_the_seed_decides_the_weights(network):
    signal = network.make_signal()
    first, second = build(network, signal).state_dict(), build(network, signal).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_network
def test_local_outputs_belong_to_the_trial(network):
    signal = network.make_signal()
    module = build(network, signal).eval()
    in_parts = network.dims[-1] == "time" or signal.networks
    if not hasattr(module, "forward_tokens") or not in_parts:
        pytest.skip("no local outputs")
    data, subject = make_batch(network, signal)
    tokens = module.forward_tokens(data, subject)
    assert tokens.shape[::2] == (9, N_OUTPUTS)
    assert torch.isfinite(tokens).all()
    alone = module.forward_tokens(data[4:5], subject[4:5])
    torch.testing.assert_close(alone[0], tokens[4], atol=2e-5, rtol=1e-4)
