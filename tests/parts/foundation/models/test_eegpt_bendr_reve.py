"""EEGPT, BENDR, REVE and LUNA: figures of the public code, small models, their files and the trials they refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.settings import Settings
from braindecode_vis.datasets.sources.meeg_source import list_scalp_positions
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.parts.foundation.models import bendr, eegpt, luna, reve
from braindecode_vis.parts.foundation.models.foundation_config import (
    BendrConfig,
    EegptConfig,
    LunaConfig,
    ReveConfig,
)
from tests.constants import replace_constants
from tests.parts.foundation.models.fingerprints import (
    N19,
    check_fingerprint,
    count,
    fill,
    make_input,
    make_positions,
    make_state,
)

ROWS = [eegpt.CH_NAMES.index(name) for name in N19]
EEGPT = {"size": 32, "depth": 1, "n_heads": 2}
BENDR = {"size": 32, "hidden": 48, "depth": 1, "n_heads": 2, "feedforward": 20}
REVE = {"width": 64, "depth": 1}
LUNA = {"size": 16, "n_queries": 2, "depth": 1}
SmallEegpt = replace_constants(EegptConfig, **EEGPT)
SmallBendr = replace_constants(BendrConfig, **BENDR)
SmallReve = replace_constants(ReveConfig, depth=1)
# Mean, deviation and first values of small models, from the code that the slow tests compare with the public one.
EXPECTED_EEGPT = (-0.03214, 0.975155, [-1.62292, -0.48624, 0.39223])
EXPECTED_BENDR = (0.144916, 0.958896, [1.5555, 1.18293, -2.64223])
EXPECTED_REVE = (-0.0085, 1.508207, [-1.58384, 1.20524, -3.03644])


def make_signal(names=N19, n_times=512, sfreq=256.0, unit="V", places=True):
    positions = make_positions(len(names)).numpy().astype(float) if places else None
    return Signal(
        ("channel", "time"),
        (len(names), n_times),
        ("01",),
        ch_names=tuple(names),
        ch_pos=positions,
        sfreq=sfreq,
        unit=unit,
    )


def make_eegpt(**settings):
    return eegpt.EEGPT(ROWS, **{**EEGPT, **settings})


# --- fingerprints -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eegpt_answers_as_the_public_code():
    """The encoder sees all or half of patches and channels; the predictor goes on from both."""
    encoder = fill(eegpt.EEGPT(ROWS))
    predictor = fill(eegpt.Predictor(), keep=("freqs",))
    assert (count(encoder), count(predictor)) == ((25_287_168, 102), (25_747_472, 104))
    data, even = make_input(2, 19, 1024, 0.03), torch.arange(0, 16, 2)
    with torch.no_grad():
        whole, half = encoder.encode(data), encoder.encode(data, even, torch.arange(0, 19, 2))
        guessed, filled = predictor(whole), predictor(half, even, 16)
    shape = (2, 16, 4, 512)
    check_fingerprint(whole, shape, 0.004670, 1.007510, [-1.01498, -0.73067, 0.39719, 0.95183, 0.33444])
    check_fingerprint(guessed, shape, 0.043868, 0.953578, [-0.79719, -0.66850, 1.10101, 0.27790, -1.02522])
    first = [-0.78612, -0.74664, 0.40102, 0.95991, 0.21526]
    check_fingerprint(half, (2, 8, 4, 512), 0.003726, 1.006274, first)
    check_fingerprint(filled, shape, 0.030088, 0.965979, [-0.15595, -1.56011, 1.48586, 0.49895, -0.99275])


@pytest.mark.slow
def test_bendr_answers_as_the_public_code():
    """Without a norm, weights of the common size explode: those of the transformer have a quarter of it."""
    network = bendr.Bendr()
    assert count(network.encoder) == (3_972_096, 24)
    # The file of the transformer has a mask (512) and a norm (2 x 1536) more, which nothing here reads.
    assert count(network) == (3_972_096 + 153_168_953 - 512 - 2 * 1536, 24 + 76 - 3)
    usual, small = make_state(network), make_state(network, scale=0.25)
    network.load_state_dict({k: (usual if k.startswith("encoder.") else small)[k] for k in small})
    with torch.no_grad():
        found = network.eval().encoder(make_input(2, 20, 1536, 0.03))
        tokens = network.contextualise(found)
    first = [1.18976, -0.02456, 0.84408, -0.15132, 0.03509]
    check_fingerprint(found, (2, 512, 16), 0.285606, 0.590984, first)
    first = [2.74335, 0.12535, -0.03005, -0.04994, 0.11338]
    check_fingerprint(tokens, (2, 512, 17), 0.009134, 0.343120, first)
    # The start would be 0.39602, -0.13798, ... with the norm applied.
    first = [2.74335, 0.70097, -0.22191, 0.83410, 2.67202]
    check_fingerprint(tokens[:, :, 0], (2, 512), 0.121110, 1.343923, first)


@pytest.mark.slow
def test_reve_answers_as_the_public_code():
    network = fill(reve.Reve(make_positions(19)))
    assert count(network) == (69_189_632, 140)
    with torch.no_grad():
        tokens = network(make_input(2, 19, 800, 0.03))
        pooled = network.pool(tokens)
    first = [-9.46944, -1.83167, -0.37910, 4.44233, 9.45584]
    check_fingerprint(tokens.unflatten(1, (19, 4)), (2, 19, 4, 512), -0.027240, 5.045159, first)
    first = [-3.35422, 0.94402, -1.91417, 1.25587, 4.23341]
    check_fingerprint(pooled, (2, 512), -0.027165, 4.472046, first)


@pytest.mark.slow
def test_large_reve_has_its_size():
    with torch.device("meta"):
        network = reve.Reve(torch.zeros(1, 3), width=1216, n_frequencies=5)
    assert count(network) == (389_978_496, 140)


@pytest.mark.slow
def test_luna_answers_as_the_public_code():
    """Tokens, signals, and the published head of two classes behind the tokens."""
    network = fill(luna.Luna(make_positions(20), decoder=True), keep=("freqs", "temparature"))
    assert count(network) == (6_672_417, 224)
    with torch.no_grad():
        tokens = network.encode(make_input(2, 20, 1280, 0.03))
        signals = network.reconstruct(tokens, torch.arange(20))
        head = torch.nn.Module()
        head.decoder_attn = torch.nn.MultiheadAttention(256, 2, batch_first=True)
        head.decoder_ffn = torch.nn.ModuleDict(
            {"fc1": torch.nn.Linear(256, 1024), "fc2": torch.nn.Linear(1024, 2)}
        )
        head.learned_agg = torch.nn.Parameter(torch.zeros(1, 1, 256))
        part = torch.nn.ModuleDict({"classifier": head})  # for the names of its weights
        fill(part)
        pooled = head.decoder_attn(head.learned_agg.expand(2, -1, -1), tokens, tokens)[0][:, 0]
        classes = head.decoder_ffn["fc2"](torch.nn.functional.gelu(head.decoder_ffn["fc1"](pooled)))
    first = [-1.05997, -0.94514, -1.26336, 0.36538, 0.08581]
    check_fingerprint(tokens, (2, 32, 256), 0.004954, 1.009134, first)
    first = [1.02625, -0.61665, -0.36993, 0.31229, 0.13157]
    check_fingerprint(signals, (2, 20, 1280), -0.030264, 0.668855, first)
    check_fingerprint(classes, (2, 2), 0.658492, 0.148886, [0.50009, 0.80253, 0.51951, 0.81184])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({"size": 96, "n_queries": 6, "depth": 10}, (40_660_337, 254)),
        ({"size": 128, "n_queries": 8, "depth": 24}, (303_769_569, 464)),
    ],
)
def test_larger_luna_have_their_sizes(sizes, expected):
    with torch.device("meta"):
        network = luna.Luna(torch.zeros(2, 3), decoder=True, **sizes)
    assert count(network) == expected


# --- small models -----------------------------------------------------------------------------------------


def test_eegpt_sees_each_patch_by_itself_until_the_predictor():
    """Its encoder knows no time, so that what happens in one patch stays there."""
    network = fill(make_eegpt(context=True), keep=("freqs",))
    data = make_input(2, 19, 300, 0.03)
    other = data.clone()
    other[..., 64:128] += 1
    with torch.no_grad():
        alone, tokens = network.encode(data), network(data)
        moved = (network.encode(other) - alone).abs().amax(dim=(0, 2, 3)) > 1e-6
        mixed = (network(other) - tokens).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [False, True, False, False]
    assert mixed.all()
    check_fingerprint(tokens, (2, 4, 128), *EXPECTED_EEGPT)


def test_bendr_reads_trials_of_any_unit():
    """The scale row alone shows how large a trial was; rows without a channel stay zero."""
    network = bendr.Bendr(range(18), value_range=40.0, **BENDR)
    data = make_input(2, 19, 96, 0.03)
    data[:, 18] = 9
    rows = network.scale(5 * data + 3)
    seen = rows[:, :18]
    assert (seen.amin(dim=(1, 2)) == -1).all()
    assert (seen.amax(dim=(1, 2)) == 1).all()
    torch.testing.assert_close(seen, network.scale(data)[:, :18], atol=1e-5, rtol=0)
    assert (rows[:, 18] == 0).all()
    spread = 5 * (data[0, :18].max() - data[0, :18].min())
    torch.testing.assert_close(rows[0, 19], (2 * (spread / 40 - 0.5)).expand(96))
    assert (network.scale(1e3 * data)[:, 19] == 1).all()
    assert (network.scale(torch.ones(1, 19, 96))[:, :19] == 0).all()  # a flat trial has no range
    network.value_range = None
    assert (network.scale(data)[:, 19] == 0).all()


def test_bendr_contextualises():
    """Figures of a small model, and the published way to write its convolution of places."""
    network = fill(bendr.Bendr(**BENDR), scale=0.5)
    data = make_input(2, 19, 400, 0.03)
    with torch.no_grad():
        tokens = network(data)
        normed = torch.nn.utils.parametrizations.weight_norm(
            torch.nn.Conv1d(32, 32, 25, padding=12, groups=16), dim=2
        )
        own = network.relative_position[0]
        parts = normed.parametrizations.weight
        parts.original0.copy_(own.weight_g), parts.original1.copy_(own.weight_v), normed.bias.copy_(own.bias)
        maps = torch.randn(2, 32, 40)
        torch.testing.assert_close(own(maps), normed(maps))
    check_fingerprint(tokens, (2, 6, 32), *EXPECTED_BENDR)


def test_reve_knows_places_and_times():
    network = fill(reve.Reve(make_positions(4), **REVE))
    data = make_input(2, 4, 599, 0.03)
    with torch.no_grad():
        tokens = network(data)  # patches start at 0, 180 and 360, the rest is left out
        code = network.locate(3)
        pooled = network.pool(tokens)
    assert code.shape == (4, 3, 64)
    assert len(torch.unique(code.flatten(0, 1), dim=0)) == 12
    torch.testing.assert_close(network.locate(2), code[:, :2])
    weights = torch.softmax(tokens @ network.cls_query_token[0, 0] / 8, dim=1)
    torch.testing.assert_close(pooled, (weights[..., None] * tokens).sum(dim=1))
    check_fingerprint(tokens, (2, 12, 64), *EXPECTED_REVE)


def test_luna_knows_places_and_no_scale():
    """Tokens do not change with the unit or offset of a channel, and change with its place."""
    network = fill(luna.Luna(make_positions(4), **LUNA), keep=("freqs", "temparature"))
    data = make_input(2, 4, 100, 0.03)  # two patches; the rest is left out
    other = fill(luna.Luna(make_positions(5)[1:], **LUNA), keep=("freqs", "temparature"))
    with torch.no_grad():
        tokens = network(data)
        scaled = network(data * torch.tensor([1e-6, 1, 2, 30])[:, None] + 5e-7)
        order = torch.tensor([2, 0, 3, 1])
        sorted_places = fill(luna.Luna(make_positions(4)[order], **LUNA), keep=("freqs", "temparature"))
        flat = network(data * torch.tensor([0.0, 1, 1, 1])[:, None])
        assert (network(data) - other(data)).abs().max() > 1e-3
        # The norms of the stem do not know the order of the channels either.
        torch.testing.assert_close(sorted_places(data[:, order]), tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scaled, tokens, atol=1e-3, rtol=1e-3)
    assert flat.isfinite().all()
    assert tokens.shape == (2, 2, 32)


# --- files ------------------------------------------------------------------------------------------------


def write_eegpt(path, **sizes):
    """Write a file as its training does: four parts, an optimiser and what the trainer adds."""
    network = make_eegpt(context=True, **sizes)
    state = {f"encoder.{name}": torch.zeros(1) for name in ("norm.weight", "summary_token")}
    for name, value in make_state(network, keep=("freqs",)).items():
        state[name if name.startswith("predictor.") else f"target_encoder.{name}"] = value
    state |= {
        "reconstructor.mask_token": torch.zeros(1, 1, 32),
        "reconstructor.chan_embed.weight": torch.zeros(2),
    }
    content = {
        "epoch": 199,
        "global_step": 5,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
        "lr_schedulers": [],
    }
    torch.save(content, path)
    return path


def write_bendr(folder, **sizes):
    """Write both of its files, the second with the mask and the norm that nothing reads."""
    state = make_state(bendr.Bendr(**{**BENDR, **sizes}), scale=0.5)
    first, second = folder / "encoder.pt", folder / "contextualizer.pt"
    torch.save({k: v for k, v in state.items() if k.startswith("encoder.")}, first)
    rest = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    rest |= {"mask_replacement": torch.zeros(32), "norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)}
    torch.save(rest, second)
    return {"pretrained": first, "contextualizer": second}


def write_reve(path, **sizes):
    save_file(make_state(reve.Reve(torch.zeros(1, 3), **{**REVE, **sizes})), path)
    return path


@pytest.mark.parametrize("context", [False, True])
def test_a_file_of_eegpt_fills_the_network(tmp_path, context):
    """Its target encoder is taken, in mV without the mean of the channels; values reach it in volts."""
    path = write_eegpt(tmp_path / "eegpt_mcae_58chs_4s_large4E.ckpt")
    network = SmallEegpt(context=context, pretrained=path).build(make_signal(), 6).eval()
    expected = fill(make_eegpt(context=context), keep=("freqs",))
    data = make_input(2, 19, 512, 0.03)
    with torch.no_grad():
        wanted = expected(data - data.mean(dim=1, keepdim=True))
        torch.testing.assert_close(network.encode(data * 1e-3), wanted, atol=1e-5, rtol=1e-4)
        assert network(data, torch.zeros(2, dtype=torch.long)).shape == (2, 6)


def test_files_of_bendr_fill_the_network(tmp_path):
    """The last token is what the projector gets; a change in an early token reaches it by attention alone."""
    files = write_bendr(tmp_path)
    network = SmallBendr(**files).build(make_signal(bendr.CH_NAMES), 6).eval()
    expected = fill(bendr.Bendr(**BENDR), scale=0.5)
    data = make_input(2, 19, 512, 0.03)
    with torch.no_grad():
        tokens = network.encode(data)
        torch.testing.assert_close(tokens, expected(data), atol=1e-5, rtol=1e-4)
        output = network(data, torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(output, network.projector(tokens[:, -1]))
    alone = SmallBendr(context=False, pretrained=files["pretrained"], pooling="mean")
    with torch.no_grad():
        tokens = alone.build(make_signal(bendr.CH_NAMES), 6).eval().encode(data)
        torch.testing.assert_close(tokens, expected.encoder(expected.scale(data)).transpose(1, 2))


def test_a_fitted_bendr_needs_its_files_no_more(tmp_path):
    """Both digests are kept; a second file that changed is refused."""
    files = write_bendr(tmp_path)
    config = SmallBendr(**files)
    content, trained = config.model_dump(mode="json"), config.build(make_signal(), 6)
    files["contextualizer"].unlink()
    again = SmallBendr.model_validate(content)
    assert again.hashed_fields() == config.hashed_fields()
    network = again.build(make_signal(), 6)
    data, subject = torch.zeros(1, 19, 512), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"not found at .*contextualizer\.pt"):
        network(data, subject)
    network.load_state_dict(trained.state_dict())
    network(data, subject)
    with pytest.raises(DataError, match=r"correct encoder\.network\.contextualizer"):
        SmallBendr(**files).hashed_fields()
    write_bendr(tmp_path, depth=2)
    with pytest.raises(ValueError, match="contextualizer_digest is"):
        SmallBendr.model_validate(content)


def test_a_file_of_reve_fills_the_network(tmp_path):
    path, signal = write_reve(tmp_path / "model.safetensors"), make_signal(sfreq=200.0)
    network = SmallReve(width=64, pretrained=path, pooling="attention").build(signal, 6).eval()
    expected = fill(reve.Reve(make_positions(19), **REVE))
    data = make_input(2, 19, 512, 0.03)
    with torch.no_grad():
        tokens = expected(data)
        torch.testing.assert_close(network.encode(data * 1e-4), tokens, atol=1e-4, rtol=1e-4)
        output = network(data * 1e-4, torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(output, network.projector(expected.pool(tokens)), atol=1e-4, rtol=1e-4)
    assert network.backbone.cls_query_token.requires_grad
    mean = SmallReve(width=64, pretrained=path).build(signal, 6)
    assert not mean.backbone.cls_query_token.requires_grad  # several processes wait for each gradient


def write_luna(path, prefix="model.", **sizes):
    """Write the network of the pretraining, decoder and all."""
    network = luna.Luna(torch.zeros(2, 3), decoder=True, **{**LUNA, **sizes})
    state = make_state(network, keep=("freqs", "temparature"))
    save_file({f"{prefix}{name}": value for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_file_of_luna_fills_the_network(tmp_path, prefix):
    """Places come from the names, of pairs too, or from the responses; the decoder is left out."""
    path = write_luna(tmp_path / "LUNA_base.safetensors", prefix)
    signal = make_signal(("FP1-F7", "Cz", "E7", "EOG"))
    config = LunaConfig(**LUNA, pretrained=path, channels={"E7": "Oz", "EOG": None})
    network = config.build(signal, 6).eval()
    known = list_scalp_positions()
    places = torch.tensor(np.array([(known["Fp1"] + known["F7"]) / 2, known["Cz"], known["Oz"]])).float()
    expected = fill(luna.Luna(places, **LUNA), keep=("freqs", "temparature"))
    data = make_input(2, 4, 512, 0.03)
    with torch.no_grad():
        torch.testing.assert_close(network.encode(data * 1e-6), expected(data[:, :3]), atol=1e-4, rtol=1e-4)
        assert network(data, torch.zeros(2, dtype=torch.long)).shape == (2, 6)
    own = LunaConfig(**LUNA, places="responses").build(signal, 6)
    torch.testing.assert_close(own.backbone.places, luna.encode_places(make_positions(4), 16))


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda p: LunaConfig(**LUNA, pretrained=write_luna(p / "f.safetensors", depth=2)), "has 15 tensors .blocks.1"),
        (lambda p: SmallEegpt(pretrained=write_luna(p / "f.safetensors")), "file of LUNA, not that of EEGPT"),
        (lambda p: SmallEegpt(pretrained=write_reve(p / "f.safetensors")), "file of REVE, not that of EEGPT"),
        (lambda p: SmallReve(width=64, pretrained=write_bendr(p)["contextualizer"]), "file of BENDR, not that of REVE"),
        (lambda p: SmallBendr(**dict.fromkeys(write_bendr(p), p / "encoder.pt")), "is missing 17 tensors"),
        (lambda p: SmallBendr(**write_bendr(p, feedforward=21)), "linear1.weight .* has the shape .21, 48."),
        (lambda p: SmallEegpt(context=True, pretrained=write_eegpt(p / "f", depth=2)), "has 24 tensors"),
        (lambda p: SmallEegpt(pretrained=write_eegpt(p / "f", depth=2)), "has 12 tensors .blocks.1"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, build, words):
    with pytest.raises(DataError, match=words):
        build(tmp_path).build(make_signal(), 6)


# --- trials -----------------------------------------------------------------------------------------------


def test_eegpt_takes_the_mean_of_its_channels():
    """Channels that are left out have no part in it, and a mapping puts a channel into a row."""
    signal = make_signal(("Fz", "EOG", "X"))
    config = SmallEegpt(channels={"EOG": None, "X": "OZ"}, scale=1)
    front, backbone = config.make_parts(signal)
    assert [eegpt.CH_NAMES[row] for row in backbone.rows] == ["FZ", "OZ"]
    data = torch.tensor([1.0, 50.0, 4.0])[None, :, None].expand(1, -1, 512)
    assert front(data)[0, :, 0].tolist() == [-1.5, 1.5]
    front, _ = replace_settings(config, reference="own").make_parts(signal)
    assert front(data)[0, :, 0].tolist() == [1, 4]


def replace_settings(config: Settings, **changes):
    return type(config).model_validate({**config.model_dump(exclude={"pretrained_digest"}), **changes})


def test_bendr_sorts_channels_and_names_those_that_it_lacks():
    """P7 is its T5; what is absent is zero, or interpolated and then part of the range."""
    names = ["OZ", *reversed([n for n in N19 if n != "CZ"])]
    front, backbone = SmallBendr().make_parts(make_signal(names))
    rows = front(torch.arange(1.0, 20)[None, :, None].expand(1, -1, 512))[0, :, 0]
    assert rows[0] == 19
    assert rows[12] == names.index("P7") + 1
    assert rows[9] == 0
    assert backbone.used.tolist() == [n for n in range(19) if n != 9]
    _, backbone = SmallBendr(missing="interpolate").make_parts(make_signal(names))
    assert len(backbone.used) == 19
    with pytest.raises(DataError, match="are missing CZ"):
        SmallBendr(missing="refuse").make_parts(make_signal(names))


def write_positions(path, content):
    path.write_text(json.dumps(content))
    return path


def test_reve_reads_places_from_a_table(tmp_path):
    """By name whatever its case, by another name, the middle of a pair; other places, other fingerprints."""
    table = {
        "Fz": [0.0, 0.1, 0.1],
        "biosemi128_A1": [0.0, 0.0, 0.14],
        "F3": [-0.05, 0.08, 0.0],
        "C3": [-0.07, 0, 0],
    }
    path = write_positions(tmp_path / "positions.json", table)
    signal = make_signal(("FZ", "E", "F3-C3", "EOG"), places=False)
    config = SmallReve(width=64, positions=path, channels={"E": "biosemi128_A1", "EOG": None})
    front, backbone = config.make_parts(signal)
    places = [[0.0, 0.1, 0.1], [0.0, 0.0, 0.14], [-0.06, 0.04, 0.0]]
    torch.testing.assert_close(backbone.positions, torch.tensor(places))
    assert front(torch.arange(4.0)[None, :, None].expand(1, -1, 512) * 1e-4).shape == (1, 3, 400)
    before = config.hashed_fields()
    write_positions(path, {**table, "Fz": [0.0, 0.1, 0.11]})
    assert replace_settings(config).hashed_fields() != before


@pytest.mark.parametrize(
    "content, words",
    [
        ({"FZ": [0, 0, 0.1]}, "no row for the channel FP1"),
        ({"FP1": [0, 0, 95.0], "FP2": [0, 0, 90]}, "positions in m, but the largest coordinate is 95"),
        ({"FP1": [0, 0]}, "must give FP1 three finite numbers"),
        ({"FP1": [0, 0, float("nan")]}, "must give FP1 three finite numbers"),
        ([1, 2], "must be a JSON table of names to x, y, z, but is a list"),
        (None, "the table of positions"),
    ],
)
def test_tables_of_places_that_do_not_fit_are_refused(tmp_path, content, words):
    path = tmp_path / "positions.json"
    if content is not None:
        write_positions(path, content)
    with pytest.raises(DataError, match=words):
        SmallReve(width=64, positions=path).build(make_signal(("FP1", "FP2")), 6)


@pytest.mark.parametrize(
    "config, signal, error, words",
    [
        (SmallEegpt(), make_signal(("FP1", "AFZ")), DataError, "EEGPT has no row for the channel AFZ"),
        (SmallEegpt(), make_signal(("FP1",)), DataError, "nothing is left of FP1 alone"),
        (SmallEegpt(), make_signal(n_times=63), DataError, "at least 0.25 s"),
        (SmallEegpt(), make_signal(unit="scaled"), ConfigError, "in units of 1000 µV"),
        (SmallBendr(), make_signal(("AFZ",)), DataError, "finds none of its channels"),
        (SmallBendr(), make_signal(n_times=95), DataError, "at least 0.375 s"),
        (SmallReve(width=64), make_signal(places=False), DataError, "responses have no positions"),
        (LunaConfig(**LUNA), make_signal(("CZ", "Q7")), DataError, "LUNA has no row for the channel Q7"),
        (LunaConfig(**LUNA), make_signal(n_times=39), DataError, "at least 0.15625 s"),
        (LunaConfig(**LUNA, places="responses"), make_signal(places=False), DataError, "network.places to names"),
        (SmallReve(width=64, channels={"FP1": "FP3"}), make_signal(), ConfigError, "another name has no effect"),
        (SmallReve(width=64), make_signal(n_times=254), DataError, "at least 1 s"),
        (SmallReve(width=64), replace(make_signal(), ch_pos=np.full((19, 3), 90.0)), DataError, "coordinate is 90"),
    ],
)  # fmt: skip
def test_trials_that_do_not_fit_are_refused(config, signal, error, words):
    with pytest.raises(error, match=words):
        config.build(signal, 6)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: BendrConfig(scale=2), "scales each trial by itself"),
        (lambda: BendrConfig(context=False, contextualizer="contextualizer.pt"), "there is no transformer"),
        (lambda: BendrConfig(context=False, pooling="cls"), "token that the transformer starts with"),
        (lambda: BendrConfig(pretrained="encoder.pt"), "weights are two files"),
        (lambda: BendrConfig(contextualizer="contextualizer.pt"), "weights are two files"),
        (lambda: BendrConfig(contextualizer_digest="0"), "is not given"),
        (lambda: LunaConfig(scale=2), "standardises each channel of a trial by itself"),
        (lambda: ReveConfig(width=576), "4 frequencies make 512 waves"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
