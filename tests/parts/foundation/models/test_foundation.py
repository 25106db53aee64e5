"""Published foundation models: figures of the public code, their files, their tuning, and the trials they refuse."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.parts.foundation.models import cbramod, labram
from braindecode_vis.parts.foundation.models.foundation import (
    QueryPooling,
    interpolate_on_sphere,
    make_resampling,
    read_weights,
)
from braindecode_vis.parts.foundation.models.foundation_config import CBraModConfig, LabramConfig
from braindecode_vis.training.network_encoder import NetworkEncoder
from tests.parts.foundation.models.fingerprints import (
    N19,
    check_fingerprint,
    count,
    fill,
    make_input,
    make_state,
    make_units,
)
from tests.training.toy_task import make_config, make_task

ROWS = [labram.CH_NAMES.index(name) + 1 for name in N19]
NAMES = N19[:4]
SMALL = {"depth": 1, "width": 100, "n_heads": 5}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in {**SMALL, "lora_rank": 2}.items():
        monkeypatch.setattr(LabramConfig, name, value)
    monkeypatch.setattr(CBraModConfig, "depth", 1)


def make_signal(names=N19, n_times=200, sfreq=200.0, unit="V"):
    shape = (len(names), n_times)
    return Signal(("channel", "time"), shape, ("01",), ch_names=tuple(names), sfreq=sfreq, unit=unit)


def make_trials(unit="V"):
    """Return the toy task with a second of four named channels, in volts."""
    responses, targets = make_task(n_images=12, n_repetitions=1)
    rng = np.random.default_rng(0)
    rhythm = np.sin(np.arange(200) * rng.uniform(0.05, 0.3, (4, 1)))
    data = 1e-5 * (targets.vectors[:, :4, None] * rhythm + 0.1 * rng.standard_normal((12, 4, 200)))
    coords = {"sfreq": 200.0, "times": np.arange(200) / 200, "ch_names": list(NAMES)}
    return Responses(data.astype(np.float32), responses.dims, responses.trials, unit, coords), targets


# --- fingerprints -----------------------------------------------------------------------------------------


def test_the_rule_of_weights():
    first = [-0.19031830, 0.43059048, 0.49952881, 0.41788932, -0.39127491]
    np.testing.assert_allclose(make_units("cls_token", 5), first, atol=1e-8)


def test_labram_answers_as_the_public_code():
    """The form of fine-tuning: pooled features, tokens of patches, all tokens, the stem alone."""
    network = fill(labram.Labram(ROWS))
    assert count(network) == (5_819_936, 221)
    data = make_input(2, 19, 800, 0.03)
    with torch.no_grad():
        tokens = network(data)
        pooled = network.finish(tokens[:, 1:].mean(dim=1))
        stem = network.patch_embed(data.unflatten(-1, (4, 200)))
    first = [-0.46000, 1.33257, -0.38180, -0.69363, -0.60149]
    check_fingerprint(pooled, (2, 200), 0.005406, 0.994690, first)
    first = [-0.23603, 0.83903, -0.20750, -0.71775, -0.79289]
    check_fingerprint(network.finish(tokens[:, 1:]), (2, 76, 200), 0.006234, 0.999558, first)
    first = [-1.63596, 1.03890, 1.57873, 1.25609, -1.69708]
    check_fingerprint(network.finish(tokens), (2, 77, 200), 0.006184, 0.999574, first)
    first = [0.03314, 0.03120, -0.06701, -0.15612, -0.16849]
    check_fingerprint(stem, (2, 76, 200), 0.304497, 0.669050, first)


def test_labram_answers_as_the_student_of_its_pretraining():
    network = fill(labram.Labram(ROWS, student=True))
    assert count(network) == (7_466_728, 224)
    data, hidden = make_input(2, 19, 800, 0.03), (torch.arange(76) % 2 == 0).expand(2, -1)
    with torch.no_grad():
        tokens, codes = network(data), network.lm_head(network(data, hidden)[:, 1:][hidden])
    first = [-1.27072, 2.43079, 1.62071, -0.20222, -1.12568]
    check_fingerprint(tokens, (2, 77, 200), 0.009806, 1.008869, first)
    first = [-1.06958, -0.75069, -0.45645, 1.41555, 0.03548]
    check_fingerprint(codes, (76, 8192), 0.000221, 1.011800, first)


def test_large_labram_has_its_size():
    with torch.device("meta"):
        assert count(labram.Labram(ROWS, width=400, depth=24, n_heads=16)) == (46_258_720, 425)


def test_cbramod_answers_as_the_public_code():
    """Features, their reconstruction, and that with the patches of every other channel hidden."""
    network = fill(cbramod.CBraMod(reconstructs=True))
    assert count(network) == (4_924_000, 211)
    patches = cbramod.cut_patches(make_input(2, 19, 800, 0.03))
    hidden = torch.zeros(2, 19, 4, dtype=torch.bool)
    hidden[:, ::2] = True
    with torch.no_grad():
        features, half = network.encode(patches), network.encode(patches, hidden)
        reconstructed, filled = network.proj_out(features), network.proj_out(half)
    shape = (2, 19, 4, 200)
    first = [-3.51712, -2.31325, -6.15077, 7.13453, 4.23133]
    check_fingerprint(reconstructed, shape, -0.305271, 3.938739, first)
    first = [0.83960, 1.36694, -2.14163, 5.95272, 2.46967]
    check_fingerprint(features, shape, 0.371637, 3.942642, first)
    first = [0.12509, 1.51316, -3.96270, 5.17674, 1.43861]
    check_fingerprint(filled, shape, -0.204384, 3.937523, first)


# --- files ------------------------------------------------------------------------------------------------


def write_labram(path, **sizes):
    """Write a file as LaBraM's training does: wrapped, with a prefix, an optimiser and its arguments."""
    student = labram.Labram(ROWS, student=True, **{**SMALL, **sizes})
    state = {f"student.{name}": value for name, value in make_state(student).items()}
    state |= {"lm_head.weight": torch.zeros(3, 2), "projection_head.0.weight": torch.zeros(2, 2)}
    state["student.logit_scale"] = torch.tensor(2.0)
    content = {
        "model": state,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 49,
        "scaler": {"scale": 1.0},
        "args": argparse.Namespace(batch_size=64, model="labram"),
    }
    torch.save(content, path)
    return path


def write_cbramod(path):
    torch.save(make_state(cbramod.CBraMod(depth=1, reconstructs=True)), path)
    return path


def test_a_file_of_labram_fills_the_network(tmp_path):
    path = write_labram(tmp_path / "labram-base.pth")
    network = LabramConfig(pretrained=path).build(make_signal(), 6).eval()
    expected = labram.Labram(ROWS, **SMALL)
    state = make_state(expected)
    for name in ("weight", "bias"):  # the file has no fc_norm, which starts at 1 and 0
        state[f"fc_norm.{name}"] = expected.state_dict()[f"fc_norm.{name}"]
    expected.load_state_dict(state)
    data = torch.randn(2, 19, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.encode(data * 1e-4), expected(data), atol=1e-5, rtol=1e-4)


def test_a_file_of_cbramod_fills_the_network(tmp_path):
    config = CBraModConfig(pretrained=write_cbramod(tmp_path / "pretrained_weights.pth"))
    network = config.build(make_signal(cbramod.CH_NAMES), 6).eval()
    expected = fill(cbramod.CBraMod(depth=1, reconstructs=True))
    data = torch.randn(2, 19, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.encode(data * 1e-4), expected(data), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c, p: write_cbramod(p), "is the file of CBraMod, not that of LaBraM"),
        (lambda c, p: torch.save({"model": {"quantize.embedding.weight": torch.ones(1)}}, p), "vqnsp"),
        (lambda c, p: torch.save({"target_encoder": {"module.pos_embed_proj.emb_h": torch.ones(1)}}, p), "JEPA"),
        (lambda c, p: torch.save({"args": make_signal()}, p), "cannot be read as a file of tensors"),
        (lambda c, p: p.write_bytes(b"nonsense"), "cannot be read as a file of tensors"),
        (lambda c, p: torch.save([torch.ones(1)], p), "is missing 32 tensors"),
        (lambda c, p: write_labram(p, depth=2), "has 17 tensors \\(blocks.1.gamma_1, ...\\) that are not in the"),
        (lambda c, p: write_labram(p, width=200), "has the shape .* but that of the network is"),
        (lambda c, p: torch.save({**c, "model": {k: v * torch.nan for k, v in c["model"].items()}}, p), "finite"),
        (lambda c, p: p.unlink(), "was not found at .*; correct encoder.network.pretrained"),
        (lambda c, p: (p.unlink(), p.mkdir()), "should be a file, but"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, change, words):
    path = write_labram(tmp_path / "file.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    change(content, path)
    with pytest.raises(DataError, match=words):
        LabramConfig(pretrained=path).build(make_signal(), 6)


def test_reading_runs_no_code(tmp_path):
    """A Namespace may be in a file; what it holds beside plain values may not."""
    path = tmp_path / "file.pth"
    torch.save({"args": argparse.Namespace(call=print)}, path)
    with pytest.raises(DataError, match="cannot be read"):
        read_weights(path, LabramConfig.layout)


# --- trials -----------------------------------------------------------------------------------------------


def test_channels_meet_their_rows_by_name():
    """Own order is kept, a mapping renames, null leaves out, and T7 is no T3 where the table has both."""
    signal = make_signal(("Fz", "t7", "T3", "EOG", "X"))
    config = LabramConfig(channels={"EOG": None, "X": "OZ"})
    front, backbone = config.make_parts(signal)
    assert [labram.CH_NAMES[row - 1] for row in backbone.rows] == ["FZ", "T7", "T3", "OZ"]
    data = torch.arange(5.0)[None, :, None].expand(1, -1, 200)
    assert torch.equal(front(data)[0, :, 0], torch.tensor([0.0, 1.0, 2.0, 4.0]) / torch.tensor(1e-4))


def test_cbramod_sorts_channels_into_its_order():
    """Names of the newer system stand for those of the pretraining; other channels are left out."""
    own = ("OZ", *reversed([{"T3": "T7", "T5": "P7"}.get(n, n) for n in cbramod.CH_NAMES]))
    front, _ = CBraModConfig(scale=1).make_parts(make_signal(own))
    picked = front(torch.arange(20.0)[None, :, None].expand(1, -1, 200))[0, :, 0]
    assert picked.tolist() == list(range(19, 0, -1))


def test_missing_channels_are_interpolated():
    """A field that varies slowly over the head is found in the places that were left out."""
    signal = make_signal([n for n in labram.CH_NAMES[:77] if n not in ("CZ", "F3")])
    front, _ = CBraModConfig(scale=1, missing="interpolate").make_parts(signal)
    weights = front.mixing
    assert weights.shape == (19, 75)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(19), atol=1e-4, rtol=0)
    nearest = {signal.ch_names[i] for i in weights[cbramod.CH_NAMES.index("CZ")].topk(4).indices}
    assert nearest <= {"C1", "C2", "CPZ", "FCZ", "CP1", "CP2", "FC1", "FC2"}
    rng = np.random.default_rng(0)
    places = rng.standard_normal((60, 3))
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    field = places @ [1.0, 0.5, -0.3] + places[:, 0] * places[:, 1]
    guess = interpolate_on_sphere(places[:50], places[50:]) @ field[:50]
    np.testing.assert_allclose(guess, field[50:], atol=0.05)


def test_resampling_keeps_slow_sines():
    times = np.arange(250) / 250
    wave = np.sin(2 * np.pi * 5 * times) + times
    found = wave @ make_resampling(250, 250.0, 200.0)
    new = np.arange(200) / 200
    np.testing.assert_allclose(found[20:-20], (np.sin(2 * np.pi * 5 * new) + new)[20:-20], atol=5e-3)
    assert make_resampling(250, 200.0, 200.0) is None


@pytest.mark.parametrize("unit, divisor", [("V", 1e-4), ("uV", 100.0), ("mV", 0.1)])
def test_values_come_in_hundreds_of_microvolts(unit, divisor):
    front, _ = LabramConfig().make_parts(make_signal(unit=unit))
    assert front.divisor == pytest.approx(divisor)


@pytest.mark.parametrize(
    "signal, settings, error, words",
    [
        (make_signal(("FP1", "MEG0111")), {}, DataError, "no row for the channel MEG0111"),
        (make_signal(("FP1", "fp1")), {}, DataError, "the channels FP1 and fp1 have the same row"),
        (make_signal(("FP1",)), {"channels": {"FP3": "FPZ"}}, ConfigError, "no such channel .did you mean 'FP1'"),
        (make_signal(("FP1",)), {"channels": {"FP1": None}}, DataError, "finds none of its channels"),
        (replace(make_signal(), ch_names=()), {}, DataError, "the responses have no channel names"),
        (make_signal(n_times=199), {}, DataError, "at least 1 s .200 samples at 200 Hz., but these have 0.995 s"),
        (make_signal(n_times=3400), {}, DataError, "places for 16 patches of 1 s, but these trials have 17"),
        (make_signal(sfreq=None), {}, DataError, "have no sampling rate"),
        (make_signal(unit="scaled"), {}, ConfigError, "set encoder.input_scaling.kind"),
        (Signal(("voxel",), (5,), ("01",)), {}, DataError, "needs a channel axis"),
    ],
)  # fmt: skip
def test_trials_that_do_not_fit_are_refused(signal, settings, error, words):
    with pytest.raises(error, match=words):
        LabramConfig(**settings).build(signal, 6)


def test_a_montage_that_lacks_channels_is_refused():
    with pytest.raises(DataError, match=r"are missing FP1; .*missing=interpolate"):
        CBraModConfig().build(make_signal([n for n in N19 if n != "FP1"]), 6)
    with pytest.raises(DataError, match="needs at least four channels"):
        CBraModConfig(missing="interpolate").build(make_signal(("FP1", "FP2")), 6)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tuning": "freeze"}, "random weights would stay"),
        ({"pretrained_digest": "0"}, "is not given"),
        ({"tuning": "lora", "pretrained": "x", "layer_decay": 0.5}, "do not learn"),
        ({"tuning": "attentive_probe", "pretrained": "x", "pooling": "cls"}, "learns how tokens are pooled"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LabramConfig(**settings)


# --- tuning -----------------------------------------------------------------------------------------------


def make_encoder(path, epochs=2, **settings):
    network = {"kind": "labram", "pretrained": str(path), **settings}
    return NetworkEncoder(make_config(network=network, epochs=epochs, input_scaling={"kind": "none"}))


def find_moved(encoder):
    """Return the parts of the network whose weights are not those that the same seed starts from."""
    fit = encoder.fitted
    with torch.random.fork_rng(devices=[]):
        start = encoder.config.network.build(fit.signal, 6).state_dict()
    pretrained = {k: v for k, v in start.items() if k.startswith("backbone.") and "fc_norm" not in k}
    now = fit.model.network.state_dict()
    return {k.removeprefix("backbone.") for k, v in pretrained.items() if not torch.equal(v, now[k])}


@pytest.mark.parametrize(
    "settings, share, moves, learning",
    [
        ({"tuning": "full"}, 0.3, True, {"backbone", "projector"}),
        ({"tuning": "freeze"}, 0.3, False, {"projector"}),
        ({"tuning": "linear_probe"}, 0.3, False, {"projector"}),
        ({"tuning": "attentive_probe"}, 0.3, False, {"projector", "query"}),
        ({"tuning": "probe_then_full"}, 0.5, True, {"backbone", "projector"}),
        # Both epochs begin before this share.
        ({"tuning": "probe_then_full"}, 0.9, False, {"backbone", "projector"}),
        ({"tuning": "lora"}, 0.3, False, {"changes", "projector"}),
    ],
    ids=["full", "freeze", "linear_probe", "attentive_probe", "probe_then_full", "probe_only_so_far", "lora"],
)
def test_presets_decide_what_learns(tmp_path, settings, share, moves, learning, monkeypatch):
    monkeypatch.setattr(LabramConfig, "probe_share", share)
    encoder = make_encoder(write_labram(tmp_path / "file.pth"), **settings)
    encoder.fit(*make_trials())
    network = encoder.fitted.model.network
    assert {n.partition(".")[0] for n, p in network.named_parameters() if p.requires_grad} == learning
    moved = find_moved(encoder)
    assert bool(moved) == moves
    if moves:
        assert {"cls_token", "pos_embed", "patch_embed.conv1.weight", "blocks.0.attn.qkv.weight"} <= moved
    if network.changes is not None:
        assert network.changes.names == ["blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"]
        assert all(up.abs().max() > 0 for up in network.changes.up)


def test_a_probe_is_linear_in_the_frozen_features(tmp_path):
    config = make_encoder(write_labram(tmp_path / "f.pth"), tuning="linear_probe").config.network
    network = config.build(make_signal(), 6)
    assert [type(part).__name__ for part in network.projector] == ["LayerNorm", "Linear"]
    assert not network.encode(torch.randn(2, 19, 200)).requires_grad


def test_layers_learn_at_their_own_rates(monkeypatch):
    monkeypatch.setattr(LabramConfig, "depth", 2)
    network = LabramConfig(backbone_lr_scale=0.5, layer_decay=0.1).build(make_signal(), 6)
    groups = network.parameter_groups()
    assert [group["lr_scale"] for group in groups] == pytest.approx([0.5, 0.05, 0.005, 0.0005])
    assert [len(group["params"]) for group in groups] == [2, 17, 17, 15]


def test_a_fitted_network_needs_the_file_no_more(tmp_path):
    """The digest stays in the settings; a training without the file is refused, as is a file that changed."""
    path = write_labram(tmp_path / "file.pth")
    encoder = make_encoder(path, tuning="freeze")
    responses, targets = make_trials()
    encoder.fit(responses, targets)
    (tmp_path / "fit").mkdir()
    encoder.write(tmp_path / "fit")
    content = encoder.config.model_dump(mode="json")
    path.unlink()
    settings = type(encoder.config).model_validate(content)
    assert settings.hashed_fields() == encoder.config.hashed_fields()
    again = settings.read(tmp_path / "fit")
    np.testing.assert_array_equal(again.predict(responses).vectors, encoder.predict(responses).vectors)
    with pytest.raises(ConfigError, match="were not found at"):
        NetworkEncoder(settings).fit(responses, targets)
    write_labram(path, depth=2)
    with pytest.raises(ValueError, match="it is another file, or it changed"):
        type(encoder.config).model_validate(content)


def test_scaled_responses_need_a_scale(tmp_path):
    """The default scaling takes the unit away, which the network needs."""
    network = {"kind": "labram"}
    responses, targets = make_trials()
    with pytest.raises(ConfigError, match="sees 'scaled'"):
        NetworkEncoder(make_config(network=network)).fit(responses, targets)
    NetworkEncoder(make_config(network={**network, "scale": 10}, epochs=1)).fit(responses, targets)


@pytest.mark.slow
def test_a_run_on_simulated_eeg_trains_and_goes_on_without_the_file(tmp_path, command_line):
    """The 63 electrodes of the cap meet their rows, volts their unit, and retrieval needs the file no more."""
    path = write_labram(tmp_path / "file.pth")
    network = f"{{kind: labram, pretrained: {path}, tuning: probe_then_full}}"
    run, data = tmp_path / "run", tmp_path / "data"
    words = (
        "dataset.mvnn=none", "dataset.channels=all63", "dataset.subjects=[1]", f"encoder.network={network}",
        "encoder.input_scaling.kind=none", "encoder.epochs=3", "target.kind=pixels", "generator.kind=nearest",
        "prior.images=training",
    )  # fmt: skip
    changes = [part for word in words for part in ("--set", word)]
    assert command_line("phantom", "things-eeg2", "--size", "tiny", "--out", data).returncode == 0
    done = command_line("train", "phantom_eeg_network", "--root", data, "--out", run, *changes)
    assert done.returncode == 0, done.stderr
    path.unlink()
    done = command_line("retrieve", run)
    assert done.returncode == 0, done.stderr
    done = command_line("train", run, "--out", tmp_path / "other", "--set", "seed=1")
    assert done.returncode == 2
    assert "the pretrained weights were not found at" in done.stderr


@pytest.mark.parametrize(("width", "n_heads"), [(16, 8), (20, 4), (12, 4), (10, 2), (15, 1), (200, 8)])
def test_tokens_are_pooled_by_as_many_heads_as_divide_them(width, n_heads):
    pooling = QueryPooling(width)
    assert pooling.attention.num_heads == n_heads
    tokens = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    assert pooling(tokens).shape == (2, width)
