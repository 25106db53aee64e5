"""Published foundation models of fMRI: the same figures as their public code, their files, atlases and times.

The rows of figures come from the public code with weights of the rule of `fingerprints`; full sizes take seconds and
are slow tests. Rows of small sizes are this code's own, taken when the full sizes agreed.
"""

from math import isqrt

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import RunConfig, dump_config
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.foundation.models.brain_jepa import BrainJEPA, GradientPlaces
from braindecode_vis.parts.foundation.models.brainlm import BrainLM, OldBrainLM
from braindecode_vis.parts.foundation.models.cortex_mae import CortexMAE
from braindecode_vis.parts.foundation.models.foundation_config import FoundationConfig
from braindecode_vis.parts.foundation.models.foundation_fmri import VolumeFront, find_voxels
from braindecode_vis.parts.foundation.models.foundation_fmri_config import (
    NEUROSTORM_AFFINE,
    BrainJepaConfig,
    BrainLMConfig,
    CortexMaeConfig,
    NeuroStormConfig,
)
from braindecode_vis.parts.foundation.models.neurostorm import NeuroSTORM
from braindecode_vis.parts.phantom import SIZES as PHANTOM_SIZES
from braindecode_vis.parts.phantom import PhantomConfig, make_phantom
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.training.network_encoder import NetworkEncoder
from tests.parts.foundation.models.fingerprints import (
    check_fingerprint,
    count,
    fill,
    make_input,
    make_tensor,
)
from tests.test_config_runs import SHIPPED, embed, shrink
from tests.training.toy_task import make_config as make_training
from tests.training.toy_task import make_task

TABLES = ("emb_h", "position_embeddings", "decoder_pos_embed", ".pe")  # fixed, as the models make them
SCHAEFER = [f"17Networks_{side}H_VisCent_{n + 1}" for side in "LR" for n in range(200)]
TIAN = [f"HIP-{n}-{side}" for side in ("rh", "lh") for n in range(25)]
A424 = [f"A424_{n + 1:03d}" for n in range(424)]


def make_gradients(n_parcels=450, n_gradients=30):
    r, j = np.indices((n_parcels, n_gradients))
    return torch.from_numpy(np.sin(0.1 * (r + 1) * (j + 1)).astype(np.float32))


def make_places(n_parcels=424):
    c = np.arange(n_parcels)
    return torch.from_numpy(np.stack([10 * np.cos(c), 10 * np.sin(c), 0.1 * c], 1).astype(np.float32))


def make_volumes(side):
    i, j, k = np.indices((side,) * 3)
    t = np.arange(4)
    values = np.sin(0.1 * (i + 2 * j + 3 * k))[..., None] * np.cos(0.5 * t) + 0.1 * t
    return torch.from_numpy(values.astype(np.float32))[None, None]


def make_frames(n_parcels, n_frames):
    b, r, t = np.indices((2, n_parcels, n_frames))
    return torch.from_numpy(np.sin(0.01 * (r + 1) * t + b).astype(np.float32))


# --- figures of the public code -----------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_brainlm_answers_as_published():
    model = fill(BrainLM(decoder=True), keep=TABLES)
    picture = make_input(1, 424, 200, 0.01)
    tokens = model(picture)
    check_fingerprint(
        tokens, (1, 730, 768), 0.005380, 1.000803, (1.84500, -0.19014, -0.15245, 0.01519, -0.10493)
    )
    pixels = model.reconstruct(tokens)
    check_fingerprint(
        pixels, (1, 729, 768), 0.012752, 0.994397, (1.53105, -1.52454, 1.06449, -1.07118, 1.12952)
    )
    visible = torch.arange(0, 729, 4)
    pixels = model.reconstruct(model.encode(picture, visible), visible)
    check_fingerprint(
        pixels, (1, 729, 768), 0.014114, 1.017418, (-0.55311, 0.91771, -0.30166, -0.37993, 1.45107)
    )


@pytest.mark.slow
@torch.no_grad()
def test_the_older_brainlm_answers_as_published():
    model = fill(OldBrainLM(make_places()), keep=TABLES)
    tokens = model(make_input(1, 424, 200, 0.01))
    check_fingerprint(
        tokens, (1, 4241, 512), 0.001364, 1.000172, (-0.21839, 0.43162, 0.29985, -0.67991, 0.72167)
    )


@pytest.mark.slow
@torch.no_grad()
def test_brain_jepa_answers_as_published():
    model = fill(BrainJEPA(make_gradients()), keep=TABLES)
    series = make_input(1, 450, 160, 0.01)
    tokens = model(series, torch.arange(0, 4500, 9))
    check_fingerprint(
        tokens, (1, 500, 768), 0.002055, 1.004046, (0.39475, -0.27955, 1.32334, -1.03111, 0.56153)
    )
    tokens = model(series, torch.arange(500))
    check_fingerprint(
        tokens, (1, 500, 768), 0.003484, 1.006843, (0.07300, -0.05444, 1.14190, -1.09782, 0.14236)
    )


@torch.no_grad()
def test_places_of_brain_jepa_are_as_published():
    places = GradientPlaces(make_gradients(), 10, 768)
    for name, value in places.predictor_pos_embed_proj.named_parameters():
        value.copy_(make_tensor(f"pos_embed_proj.predictor_pos_embed_proj.{name}", value.shape))
    table = places()[None]
    check_fingerprint(table, (1, 4500, 768), 0.230244, 0.472337, (0, 0, 0, 0, 0))
    assert float(table[0, -1, -1]) == pytest.approx(0.20780, abs=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_cortex_mae_answers_as_published():
    tokens = fill(CortexMAE())(make_frames(400, 16))[:, 1:]
    check_fingerprint(
        tokens, (2, 1600, 768), 0.002567, 1.002794, (1.06146, 1.23969, 0.18540, 0.21044, 0.97010)
    )


@pytest.mark.slow
@torch.no_grad()
def test_neurostorm_answers_as_published():
    maps = fill(NeuroSTORM()).encode(make_volumes(96))
    check_fingerprint(
        maps, (1, 288, 2, 2, 2, 4), -0.045118, 1.819772, (0.25196, -0.15521, 0.38237, -0.39472, 0.24373)
    )


@torch.no_grad()
def run_small(name):
    if name == "brainlm":
        return fill(BrainLM(width=16, depth=2, n_heads=2, hidden=24, n_parcels=40, n_frames=24), keep=TABLES)(
            make_input(1, 40, 24, 0.01)
        )
    if name == "brainlm, series":
        model = OldBrainLM(make_places(9), width=16, depth=2, n_heads=2, hidden=24)
        return fill(model, keep=TABLES)(make_input(1, 9, 40, 0.01))
    if name == "brain_jepa":
        model = BrainJEPA(make_gradients(9, 5), n_frames=48, width=16, depth=2, n_heads=2)
        return fill(model, keep=TABLES)(make_input(1, 9, 32, 0.01))
    if name == "cortex_mae":
        return fill(CortexMAE(n_parcels=9, width=16, depth=2, n_heads=2))(make_frames(9, 12))
    # Sides of 8, 4 and 2 places, so that stages are shifted, covered by a window, and last.
    return fill(NeuroSTORM(side=16, patch=2, width=4, depths=(2, 2, 2)))(make_volumes(16))


SMALL = {
    "brainlm": ((1, 10, 16), -0.001543, 0.992730, (-0.52529, -0.17291, -0.23460, 1.11694, -1.78546)),
    "brainlm, series": ((1, 19, 16), -0.018826, 0.973711, (-0.02874, -1.02056, -0.84028, -0.71315, 1.56296)),
    "brain_jepa": ((1, 18, 16), 0.029046, 0.996661, (-0.60875, 0.46054, -0.24613, -1.22269, 0.29527)),
    "cortex_mae": ((2, 28, 16), 0.040050, 1.003488, (-1.07664, -2.38348, -0.14518, -0.96676, 0.61496)),
    "neurostorm": ((1, 32, 16), -0.072101, 2.171276, (-0.85060, 0.70866, 1.73154, 1.32085, -0.80677)),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_sizes_answer_as_before(name):
    check_fingerprint(run_small(name), *SMALL[name])


# --- sizes and files ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sizes_are_those_of_the_public_files():
    with torch.device("meta"):  # which takes two seconds to wake
        large = BrainLM(**BrainLMConfig.all_sizes["picture_650m"], decoder=True)
        assert count(large) == (658_337_868, 654)
        assert count(BrainLM(decoder=True)) == (112_590_080, 334)
        assert count(NeuroSTORM()) == (5_173_020, 223)
        assert count(BrainJEPA(torch.zeros(450, 30))) == (86_808_960, 151)
        n_values, n_tensors = count(CortexMAE())
    shapes = list_cortex_mae_decoder(512, 4)
    n_values += sum(int(np.prod(shape)) for shape in shapes.values())
    assert (n_values, n_tensors + len(shapes)) == (98_584_066, 273)


def list_cortex_mae_decoder(width, depth):
    """Return names and shapes of the part of the file that decoding leaves out."""
    shapes = {
        "cls_token": (1, 1, width), "mask_token": (1, 1, width), "pos_embed.weight_spatial": (1, 400, width),
        "pos_embed.weight_temporal": (4, 1, width), "proj.weight": (width, 768), "proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,), "head.weight": (2, width), "head.bias": (2,),
    }  # fmt: skip
    for n in range(depth):
        for part, size in (("norm1", ()), ("norm2", ()), ("attn.q", (width,)), ("attn.k", (width,)),
                           ("attn.v", (width,)), ("attn.proj", (width,))):  # fmt: skip
            shapes |= {f"blocks.{n}.{part}.weight": (width, *size), f"blocks.{n}.{part}.bias": (width,)}
        shapes |= {f"blocks.{n}.mlp.fc1.weight": (4 * width, width), f"blocks.{n}.mlp.fc1.bias": (4 * width,)}
        shapes |= {f"blocks.{n}.mlp.fc2.weight": (width, 4 * width), f"blocks.{n}.mlp.fc2.bias": (width,)}
    return {f"decoder.{name}": shape for name, shape in shapes.items()}


def make_permutation(n, goal):
    """Return an order of n rows whose sum of rank times row is `goal`: a reversed start, then swaps of pairs."""
    best = sum(i * i for i in range(n))
    size = max(m for m in range(n) if best - m * (m * m - 1) // 6 >= goal)
    order = [*reversed(range(size)), *range(size, n)]
    left, place = best - size * (size * size - 1) // 6 - goal, size
    while left:
        step = min(isqrt(left), n - 1 - place)  # a swap over a distance of d takes d² off
        while place + step < n and order[place + step] != place + step:
            step -= 1
        order[place], order[place + step] = order[place + step], order[place]
        left -= step * step
        place = next((i for i in range(place + 1, n) if order[i] == i), n)
    return np.array(order)


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory):
    """Write a table in the form of A424_Coordinates.dat whose order has the sum of the real one."""
    y = np.argsort(make_permutation(424, 18_750_276))
    lines = [f"{n + 1}\t{n % 7}\t{y[n]}\t{-n}" for n in range(424)]
    path = tmp_path_factory.mktemp("brainlm") / "A424_Coordinates.dat"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    path = tmp_path_factory.mktemp("jepa") / "gradient_mapping_450.csv"
    np.savetxt(path, make_gradients().numpy(), delimiter=",")
    return path


def make_signal(names, n_times=24, t_r=0.735, **changes):
    times = 1.0 + t_r * np.arange(n_times)
    shape = (len(names), n_times)
    return Signal(
        **{"dims": ("parcel", "time"), "shape": shape, "subjects": ("01",), "times": times, "unit": "robust",
           "parcels": tuple(names)} | changes
    )  # fmt: skip


def make_volume_signal(n_times=5, step=8):
    ids = np.arange(12**3)
    affine = NEUROSTORM_AFFINE @ np.diag([step, step, step, 1])
    return Signal(("voxel", "time"), (len(ids), n_times), ("01",), times=0.8 * np.arange(n_times),
                  voxel_ids=ids, grid=(12, 12, 12), affine=affine)  # fmt: skip


SIZES = {"width": 16, "depth": 2, "n_heads": 2}


@pytest.fixture
def make_config(coordinates, gradients, monkeypatch):
    """Return a maker of settings; sizes are constants of the classes, and stay until the next call."""

    def make(name, *, sizes=None, **settings):
        sizes = {**SIZES, "hidden": 20} | (sizes or {})
        monkeypatch.setattr(FoundationConfig, "projector_hidden", 9)
        monkeypatch.setattr(FoundationConfig, "lora_rank", 2)
        if name.startswith("brainlm"):
            form = "series" if name.endswith("series") else "picture"
            usual = {**sizes, "patch": BrainLMConfig.all_sizes[form]["patch"]}
            monkeypatch.setattr(BrainLMConfig, "all_sizes", {**BrainLMConfig.all_sizes, form: usual})
            return BrainLMConfig(form=form, coordinates=coordinates, **settings)
        if name == "neurostorm":
            monkeypatch.setattr(NeuroStormConfig, "width", 2)
            monkeypatch.setattr(NeuroStormConfig, "depths", (1,))
            return NeuroStormConfig(**settings)
        kind = BrainJepaConfig if name == "brain_jepa" else CortexMaeConfig
        for size in SIZES:
            monkeypatch.setattr(kind, size, sizes[size])
        return kind(**({"gradients": gradients} if name == "brain_jepa" else {}), **settings)

    return make


SIGNALS = {
    "brainlm": make_signal(A424),
    "brainlm, series": make_signal(A424),
    "brain_jepa": make_signal(TIAN + SCHAEFER, n_times=17, t_r=2.205),
    "cortex_mae": make_signal(SCHAEFER, n_times=10, t_r=1.0),
    "neurostorm": make_volume_signal(step=2),
}
EVERY = pytest.mark.parametrize("name", SIGNALS)


def write_public_file(name, backbone, path):
    """Write random weights as the authors' training writes them, and return those of the network."""
    state = {key: torch.randn(value.shape) * 0.1 for key, value in backbone.state_dict().items()}
    optimiser = torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict()
    if name.startswith("brainlm"):
        content = state | {
            "decoder.mask_token": torch.zeros(1, 1, 512),
            "decoder.decoder_norm.bias": torch.ones(512),
        }
    elif name == "brain_jepa":
        inside = {f"module.{key}": value for key, value in state.items()}
        other = {key: value + 1 for key, value in inside.items()}
        content = {"encoder": other, "predictor": {"module.mask_token": torch.zeros(1, 1, 384)}}
        content |= {"target_encoder": inside, "opt": optimiser, "scaler": None, "epoch": 300, "loss": 0.1}
        content |= {"batch_size": 64, "world_size": 4, "lr": 1e-4}
    elif name == "cortex_mae":
        decoder = {key: torch.zeros(shape) for key, shape in list_cortex_mae_decoder(8, 1).items()}
        args = {"model": "mae_vit_base", "model_kwargs": {"pos_embed": "sep"}, "img_size": [400, 1]}
        content = {"model": state | decoder, "optimizer": optimiser, "epoch": 99, "args": args}
    else:
        inside = {f"model.{key}": value for key, value in state.items()}
        inside |= {
            f"model.{key}": torch.zeros(2) for key in ("mask_token", "window_mask_token", "norm_up.weight")
        }
        inside |= {"output_head.head.weight": torch.zeros(2, 2)}
        content = {"epoch": 30, "global_step": 9, "pytorch-lightning_version": "1.9.4", "state_dict": inside}
        content |= {
            "optimizer_states": [optimiser],
            "hyper_parameters": {"model": "neurostorm", "depths": [2, 2]},
        }
    torch.save(content, path)
    return state


@EVERY
def test_a_file_in_the_public_layout_is_read(name, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(NeuroStormConfig, "side", 24)
    signal = SIGNALS[name]
    fresh = make_config(name).build(signal, 6)
    state = write_public_file(name, fresh.backbone, tmp_path / "public.pth")
    network = make_config(name, pretrained=tmp_path / "public.pth").build(signal, 6).eval()
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key
    answers = network(torch.randn(3, *signal.shape), torch.zeros(3, dtype=torch.long))
    assert answers.shape == (3, 6)
    assert answers.isfinite().all()
    assert torch.pdist(answers).min() > 0


# NeuroSTORM has depths by stage
@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "neurostorm"])
@torch.no_grad()
def test_sizes_of_the_settings_are_those_of_the_network(name, make_config):
    signal = SIGNALS[name]

    def build(**sizes):
        return make_config(name, sizes=sizes).build(signal, 6).eval()

    def n_weights(network):
        return sum(value.numel() for value in network.backbone.parameters())

    one, two, three = (n_weights(build(depth=depth)) for depth in (1, 2, 3))
    assert three - two == two - one > 0
    assert n_weights(build(width=32)) > 2 * two
    two_heads, four_heads = build(), build(n_heads=4)
    if name == "brainlm, series":  # a convolution for each head
        assert n_weights(four_heads) > two
        return
    four_heads.load_state_dict(two_heads.state_dict())
    data, nobody = torch.randn(2, *signal.shape), torch.zeros(2, dtype=torch.long)
    assert not torch.allclose(two_heads(data, nobody), four_heads(data, nobody))


@EVERY
def test_every_weight_that_the_trial_needs_learns(name, make_config, monkeypatch):
    monkeypatch.setattr(NeuroStormConfig, "side", 24)
    signal = SIGNALS[name]
    network = make_config(name).build(signal, 6)
    network(torch.randn(2, *signal.shape), torch.zeros(2, dtype=torch.long)).square().mean().backward()
    for key, value in network.named_parameters():
        if not value.requires_grad:
            assert key.endswith(TABLES), key
        elif not key.endswith(("cls_token", "key.bias", "k.bias")):
            assert value.grad is not None, key
            assert value.grad.abs().max() > 0, key
    assert sum(len(group["params"]) for group in network.parameter_groups()) == len(
        [p for p in network.backbone.parameters() if p.requires_grad]
    )


def test_low_rank_changes_and_probes_leave_the_model_alone(make_config, tmp_path):
    signal = SIGNALS["cortex_mae"]
    path = tmp_path / "public.pth"
    write_public_file("cortex_mae", make_config("cortex_mae").build(signal, 6).backbone, path)
    network = make_config("cortex_mae", pretrained=path, tuning="lora").build(signal, 6)
    assert len(network.changes.names) == 8  # four of each block
    assert not any(p.requires_grad for p in network.backbone.parameters())


# --- parcels, times and scales ------------------------------------------------------------------------------


def test_rows_of_brainlm_stand_from_back_to_front(make_config):
    config = make_config("brainlm")
    front, backbone = config.make_parts(SIGNALS["brainlm"])
    assert front.rows.tolist() == make_permutation(424, 18_750_276).tolist()
    data = torch.arange(424.0)[:, None].expand(1, 424, 24) * 5.6430855
    np.testing.assert_allclose(front(data)[0, :, 0], front.rows, atol=1e-4)
    # 24 frames: 12 in the patch that begins with four columns of padding; the next twelve fill no patch.
    assert front(data).shape == (1, 424, 12)
    assert backbone.find_tokens(12).tolist() == [27 * row + 7 for row in range(27)]
    assert [config.count_frames(n) for n in (11, 12, 27, 28, 199, 200, 300)] == [
        0,
        12,
        12,
        28,
        188,
        200,
        200,
    ]


def test_parcels_of_brain_jepa_come_in_either_order(make_config):
    signal = make_signal(SCHAEFER + TIAN, n_times=17, t_r=2.205)
    front, _ = make_config("brain_jepa").make_parts(signal)
    assert front.rows.tolist() == [*range(400, 450), *range(400)]


def test_trials_are_interpolated_to_the_models_repetition_time(make_config):
    signal = make_signal(SCHAEFER, n_times=8, t_r=2.0)
    front, _ = make_config("cortex_mae").make_parts(signal)
    # Frames of 1 s from 0 to 14 s; the last three fill no patch.
    np.testing.assert_allclose(2.0 * torch.arange(8.0) @ front.frames, np.arange(12), atol=1e-5)
    answer = front(torch.randn(2, 400, 8) * 7 + 3)
    np.testing.assert_allclose(answer.mean(dim=1), 0, atol=0.02)  # a little off where 3 was the bound
    assert answer.abs().max() == 3


def test_voxels_find_their_place_in_mni_space():
    """A grid of FSL's 2-mm template: the model's volume is three rows before its first, and begins at its seventh."""
    fsl = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    grid = (91, 109, 91)
    ids = np.array([np.ravel_multi_index(place, grid) for place in ((0, 6, 0), (45, 60, 40))])
    found = find_voxels(ids, grid, fsl, (96, 96, 96), NEUROSTORM_AFFINE)
    assert found[3, 0, 3] == 0
    assert found[48, 54, 43] == 1
    assert (found >= 0).sum() == 2


def test_volumes_are_zscored_and_lie_in_their_least_value(make_config):
    front, _ = make_config("neurostorm").make_parts(make_volume_signal(step=2))
    volume = front(torch.randn(2, 12**3, 5) * 4 + 9)
    assert volume.shape == (2, 1, 96, 96, 96, 4)
    brain = volume[:, 0, :24:2, :24:2, :24:2]
    assert volume[0, 0, 95, 95, 95, 0] == volume[0].min()
    assert brain.std() == pytest.approx(1, abs=0.05)


REFUSED = [
    ("brainlm", make_signal(SCHAEFER), "424 parcels of A424, but the responses have 400"),
    ("brainlm", make_signal((SCHAEFER + TIAN)[:424]), "have 17Networks_LH_VisCent_1 to"),
    ("brainlm", make_signal(A424, n_times=11), "at least 12 frames of 0.735 s, but these have 11"),
    ("brainlm", make_signal(A424, n_times=300), "places for 200 frames"),
    ("brainlm", make_signal(A424, unit="scaled"), "input_scaling.kind to robust"),
    ("brain_jepa", make_signal(TIAN + SCHAEFER), "at least 16 frames of 2.205 s"),
    ("brain_jepa", make_signal([f"X{n}" for n in range(50)] + SCHAEFER, 17, 2.205), "Tian's 50 subcortical"),
    (
        "cortex_mae",
        make_signal([n.replace("17", "7") for n in SCHAEFER], 10, 1.0),
        "400 of Schaefer with 7 networks",
    ),
    ("cortex_mae", make_signal(SCHAEFER, 10, 1.0, parcels=()), "but the responses have none"),
    ("cortex_mae", make_signal(SCHAEFER, 10, 1.0, times=None), "needs the repetition time"),
    (
        "cortex_mae",
        make_signal(SCHAEFER, 1, 1.0, dims=("parcel",), shape=(400,)),
        "keep the volumes of a window",
    ),
    ("neurostorm", make_volume_signal(n_times=3), "reads 4 to 20 frames"),
    ("neurostorm", make_volume_signal(step=40), "not in MNI space"),
]


@pytest.mark.parametrize("name, signal, words", REFUSED)
def test_trials_that_do_not_fit_are_refused(name, signal, words, make_config):
    with pytest.raises((ConfigError, DataError)) as found:
        make_config(name).build(signal, 6)
    assert words in str(found.value)


def test_a_model_that_trusts_the_order_asks_for_the_number_alone(make_config):
    signal = make_signal([f"P{n}" for n in range(400)], 10, 1.0)
    with pytest.raises(DataError, match="none of Schaefer"):
        make_config("cortex_mae").build(signal, 6)
    front, _ = make_config("cortex_mae", parcels="as_given").make_parts(signal)
    assert front.rows.tolist() == list(range(400))


@pytest.mark.parametrize("name, field, text, words", [
    ("brainlm", "coordinates", "1 2 3 4\n" * 424, "other places than those of A424"),
    ("brainlm", "coordinates", "1 2 3\n", "424 rows of 4 finite numbers"),
    ("brain_jepa", "gradients", "1,2,x\n", "450 rows of 30 finite numbers"),
])  # fmt: skip
def test_a_wrong_table_is_refused(name, field, text, words, make_config, tmp_path):
    path = tmp_path / "table"
    path.write_text(text)
    config = make_config(name).model_copy(update={field: path})
    with pytest.raises(DataError, match=words):
        config.build(SIGNALS[name], 6)


@pytest.mark.parametrize("name, key, shape", [
    ("brainlm", "vit.embeddings.position_embeddings", (1, 1 + 29 * 29, 16)),
    ("brain_jepa", "pos_embed_proj.emb_h", (4570, 8)),
    ("cortex_mae", "encoder.pos_embed.weight_spatial", (1, 1000, 16)),
])  # fmt: skip
def test_a_checkpoint_of_another_atlas_is_refused(name, key, shape, make_config, tmp_path):
    path = tmp_path / "public.pth"
    write_public_file(name, make_config(name).build(SIGNALS[name], 6).backbone, path)
    content = torch.load(path, weights_only=True)
    table = {"brain_jepa": "target_encoder", "cortex_mae": "model"}.get(name)
    inside = content[table] if table else content
    inside["module." + key if name == "brain_jepa" else key] = torch.zeros(shape)
    torch.save(content, path)
    with pytest.raises(DataError, match="was trained on another atlas"):
        make_config(name, pretrained=path).build(SIGNALS[name], 6)


@pytest.mark.parametrize("name", ["brainlm", "cortex_mae"])
def test_a_training_starts_from_a_public_file_and_is_read_again(name, make_config, tmp_path):
    """Only `robust` says that values are in BrainLM's unit; the fit brings parcels and their order along."""
    path, signal = tmp_path / "public.pth", SIGNALS[name]
    write_public_file(name, make_config(name).build(signal, 6).backbone, path)
    toy, targets = make_task(n_images=12, n_repetitions=1)
    data = np.random.default_rng(0).standard_normal((12, *signal.shape)).astype(np.float32)
    data += targets.vectors[:, :1, None]
    coords = {"times": signal.times, "parcel_names": list(signal.parcels), "modality": "fmri"}
    responses = Responses(data, ("trial", *signal.dims), toy.trials, "z", coords)
    network = make_config(name, pretrained=path, tuning="freeze").model_dump(mode="json")
    plain = NetworkEncoder(make_training(network=network, epochs=1))
    if name == "brainlm":
        with pytest.raises(ConfigError, match="sees 'scaled'"):
            plain.fit(responses, targets)
    encoder = NetworkEncoder(make_training(network=network, epochs=1, input_scaling={"kind": "robust"}))
    encoder.fit(responses, targets)
    (tmp_path / "fit").mkdir()
    encoder.write(tmp_path / "fit")
    path.unlink()
    again = encoder.config.read(tmp_path / "fit")
    np.testing.assert_array_equal(again.predict(responses).vectors, encoder.predict(responses).vectors)


@pytest.mark.slow
def test_neurostorm_of_full_size_takes_a_step():
    """Its state-space layers keep every state for the gradient; one step lowers the loss of the same trial."""
    signal = make_volume_signal(step=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NeuroStormConfig().build(signal, 6)
        data, target = torch.randn(1, *signal.shape), torch.randn(1, 6)
    optimiser = torch.optim.SGD(network.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        loss = nn.functional.mse_loss(network(data, torch.zeros(1, dtype=torch.long)), target)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.backbone.parameters())
    assert losses[1] < losses[0]


def write_atlas(truth, names):
    """Share the voxels of a phantom's brain among as many regions as there are names, each all over the brain."""
    import nibabel

    image = nibabel.load(truth / "parcels.nii.gz")
    brain = np.argwhere(np.asarray(image.dataobj) > 0)
    labels = np.zeros(image.shape, np.int16)
    labels[tuple(brain.T)] = 1 + np.arange(len(brain)) % len(names)  # so that none falls out of the mask
    nibabel.Nifti1Image(labels, image.affine).to_filename(truth / "model.nii.gz")
    (truth / "model.txt").write_text("".join(f"{n + 1} {name}\n" for n, name in enumerate(names)))
    return {"files": [str(truth / "model.nii.gz")], "labels": str(truth / "model.txt"), "resample": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brainlm", "brainlm, series", "brain_jepa", "cortex_mae"])
def test_a_whole_run_starts_from_a_public_file(name, make_config, tmp_path):
    """Raw files of a phantom in the model's own atlas, the released layout, one epoch, report and audit."""
    parcels = SIGNALS[name].parcels
    size = PHANTOM_SIZES["bold5000"]["tiny"]
    make_phantom("bold5000", tmp_path / "data", size=size, config=PhantomConfig(snr=0.3), embed=embed)
    network = make_config(name, sizes={"depth": 1})
    write_public_file(name, network.build(SIGNALS[name], 6).backbone, tmp_path / "public.pth")
    content = yaml.safe_load(
        dump_config(
            shrink(next(path for path in SHIPPED if path.stem == "bold5000_wave_vith"), tmp_path / "data")
        )
    )
    content["dataset"]["atlas"] = write_atlas(tmp_path / "data" / "phantom_truth", parcels)
    # Seconds that hold a patch; trials near the end of a run have fewer.
    stop = {"brainlm": 12, "brainlm, series": 18, "brain_jepa": 38}.get(name, 10)
    content["dataset"]["model"] |= {"stop": stop, "max_dropped": 0.5}
    scaling = {"brainlm": "robust", "brainlm, series": "robust", "cortex_mae": "zscore"}.get(name, "none")
    content |= {
        "pretrain": None,
        "analyses": [],
        "prior": {"kind": "identity"},
        "generator": {"kind": "nearest"},
    }
    content["encoder"] |= {
        "network": {**network.model_dump(mode="json"), "pretrained": str(tmp_path / "public.pth")},
        "input_scaling": {"kind": scaling},
    }
    run = open_run(RunConfig.model_validate(content), tmp_path / "run")
    rows = pipeline.run_all(run)
    assert all(np.isfinite(row["value"]) for row in rows if row["method"] == "decoded")
    assert pipeline.preprocess(run).responses.coords["parcel_names"] == list(parcels)
    assert audit_run(tmp_path / "run").leaks == ()


def test_a_whole_recording_of_brainlm_lies_in_the_middle_of_its_picture():
    """424 parcels (`N_PARCELS`) and 200 frames in a square of 432: four rows and 116 columns on either side."""
    padded = BrainLM(width=16, depth=1, n_heads=2, hidden=8).pad(torch.ones(1, 424, 200))
    rows, columns = np.nonzero((padded[0] == 1).numpy())
    assert padded.shape == (1, 432, 432)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (4, 428, 116, 316)


def test_places_beside_the_own_grid_hold_no_voxel():
    """One step before the first plane and one behind the last are outside, as is what the mask leaves out."""
    target = np.eye(4)
    target[:3, 3] = -1
    found = find_voxels(np.array([0, 3, 7]), (2, 2, 2), np.eye(4), (4, 4, 4), target)
    own = np.full((4, 4, 4), -1)
    own[1, 1, 1], own[1, 2, 2], own[2, 2, 2] = 0, 1, 2
    np.testing.assert_array_equal(found, own)


def test_every_voxel_is_put_in_its_place_and_the_least_value_around_them():
    voxels = np.array([[[0, -1, 2], [1, -1, -1]]])
    data = torch.tensor([[[1.0, 2.0], [5.0, 3.0], [4.0, 9.0]]])
    found = VolumeFront(voxels, np.eye(2))(data)[0, 0, 0]
    z = (data[0] - data.mean()) / (data.std() + 1e-6)
    wanted = torch.full((2, 3, 2), float(z.min()))
    wanted[0, 0], wanted[1, 0], wanted[0, 2] = z
    torch.testing.assert_close(found, wanted)


def test_the_volume_of_neurostorm_is_that_of_mni_at_two_millimetres():
    np.testing.assert_array_equal(NEUROSTORM_AFFINE @ [48, 57, 39, 1], [0, 0, 0, 1])
    np.testing.assert_array_equal(NEUROSTORM_AFFINE @ [0, 0, 0, 1], [96, -114, -78, 1])
    np.testing.assert_array_equal(NEUROSTORM_AFFINE[:3, :3], np.diag([-2, 2, 2]))


@pytest.mark.parametrize("name", ["brain_jepa", "cortex_mae", "brainlm"])
@pytest.mark.parametrize("setting", ["width", "depth", "n_heads"])
def test_a_transformer_of_no_size_is_refused(make_config, name, setting):
    with pytest.raises(ValidationError, match=setting):
        make_config(name, **{setting: 0})
