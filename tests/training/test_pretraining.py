import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.training.pretraining import Pretraining, measure_parcels, pretrain
from braindecode_vis.training.pretraining_config import PretrainConfig
from braindecode_vis.training.pretraining_data import Rows, split_rows
from braindecode_vis.training.pretraining_model import count_visible

ENCODER = ParcelsConfig(width=16, depth=1, n_heads=2, mlp_ratio=2, projector_hidden=8, dropout=0.1)
CONFIG = PretrainConfig(
    encoder=ENCODER, decoder_width=16, decoder_depth=1, n_epochs=4, batch_size=16,
    learning_rate=3e-3, held_out=0.2,
)  # fmt: skip


LEARNING = PretrainConfig(
    encoder=ParcelsConfig(width=32, depth=1, n_heads=2, mlp_ratio=2, projector_hidden=32),
    decoder_width=32, decoder_depth=1, n_epochs=12, batch_size=8, learning_rate=5e-3,
    mask_ratio=0.5, held_out=0.2,
)  # fmt: skip


def make_responses(n=60, n_parcels=12, n_times=8, noise=0.3, seed=0, n_test=0):
    """Make trials in which the parcels of a network share one random course, with gains of their own."""
    generator, anatomy = np.random.default_rng(seed), np.random.default_rng(99)
    network = np.arange(n_parcels) // 4
    steps = np.arange(1, n_times + 1) / (n_times + 1)
    courses = np.stack([np.sin(np.pi * steps * (k + 1)) for k in range(2)])
    shared = generator.normal(size=(n, network.max() + 1, 2)) @ courses
    gains = anatomy.uniform(0.6, 1.4, size=n_parcels) * anatomy.choice([-1, 1], size=n_parcels)
    data = 5 + shared[:, network] * gains[:, None] + noise * generator.normal(size=(n, n_parcels, n_times))
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "1", "run": [str(i // 10) for i in range(n)],
            "stimulus_id": [f"image{i // 2}" for i in range(n)], "repetition": [i % 2 for i in range(n)],
            "split": ["test" if i < n_test else "train" for i in range(n)],
        }
    )  # fmt: skip
    return Responses(
        data.astype(np.float32), ("trial", "parcel", "time"), trials, "z",
        {"parcel_networks": [f"network{k}" for k in network]},
    )  # fmt: skip


def run(config, responses, folder, seed=0, guide=None):
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    return pretrain(config, responses, folder=out, checkpoints=folder / "state", seed=seed, guide=guide)


def change(config=CONFIG, **fields):
    return PretrainConfig(**{**config.model_dump(), **fields})


def test_pretraining_beats_predicting_the_mean_and_starts_the_network(tmp_path):
    responses = make_responses(n=200)
    config = LEARNING
    reached = run(config, responses, tmp_path)
    assert reached["mean_baseline"] == pytest.approx(1, abs=0.05)  # patches normalised one by one
    assert reached["held_out"] < 0.9 * reached["mean_baseline"]
    network = config.encoder.model_copy(update={"pretrained": tmp_path / "out"}).build(
        describe_signal(responses), 5
    )
    weights = load_file(tmp_path / "out" / "encoder.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in network.encoder.state_dict().items())
    assert len(network.load_report.loaded) == len(weights)
    np.testing.assert_allclose(network.encoder.mean[:, 0], 5, atol=0.5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert min(line["held_out"] for line in lines) == reached["held_out"]


def test_noise_without_structure_is_not_explained(tmp_path):
    responses = make_responses(n=80)
    responses.data[:] = np.random.default_rng(1).normal(size=responses.data.shape)
    reached = run(change(n_epochs=6), responses, tmp_path)
    assert reached["held_out"] > 0.95 * reached["mean_baseline"]


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    responses = make_responses()
    run(CONFIG, responses, tmp_path / "whole")
    steps, original = [], Pretraining.compute_loss

    def die_in_the_third_epoch(self, rows, step):
        steps.append(step)
        if step == 2 * 3 + 1:
            raise KeyboardInterrupt
        return original(self, rows, step)

    monkeypatch.setattr(Pretraining, "compute_loss", die_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, responses, tmp_path / "parts")
    assert len(steps) == 2 * 3 + 2
    monkeypatch.setattr(Pretraining, "compute_loss", original)
    (tmp_path / "parts" / "state" / ".tmp-1-pretrain.safetensors").write_bytes(b"half")
    with (tmp_path / "parts" / "state" / "log.jsonl").open("a") as log:  # a line that outran the checkpoint
        log.write("{}\n")
    run(CONFIG, responses, tmp_path / "parts")
    for name in ("encoder.safetensors", "log.jsonl", "encoder.json"):
        assert (tmp_path / "parts/out" / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes()
    states = [load_file(tmp_path / part / "state" / "pretrain.safetensors") for part in ("parts", "whole")]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert sorted(p.name for p in (tmp_path / "parts" / "state").iterdir()) == [
        "log.jsonl",
        "pretrain.safetensors",
    ]


def test_the_seed_decides_and_global_randomness_stays(tmp_path):
    responses = make_responses()
    config = change(n_epochs=1)
    state = torch.random.get_rng_state()
    run(config, responses, tmp_path / "a", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(77)
    run(config, responses, tmp_path / "b", seed=3)
    run(config, responses, tmp_path / "c", seed=4)
    a, b, c = ((tmp_path / k / "out" / "encoder.safetensors").read_bytes() for k in "abc")
    assert a == b != c


def test_test_trials_are_never_read(tmp_path):
    clean, poisoned = make_responses(n_test=20), make_responses(n_test=20)
    poisoned.data[:20] = np.nan
    config = change(n_epochs=1)
    run(config, clean, tmp_path / "a")
    run(config, poisoned, tmp_path / "b")
    a, b = ((tmp_path / k / "out" / "encoder.safetensors").read_bytes() for k in "ab")
    assert a == b


def test_labels_do_not_matter_beyond_the_grouping(tmp_path):
    responses = make_responses()
    renamed = make_responses()
    renamed.trials["stimulus_id"] = [f"other{i // 2:03d}" for i in range(60)]
    config = change(n_epochs=1, hold_out_by="run")
    run(config, responses, tmp_path / "a")
    run(config, renamed, tmp_path / "b")
    a, b = ((tmp_path / k / "out" / "encoder.safetensors").read_bytes() for k in "ab")
    assert a == b


@pytest.mark.parametrize("unit", ["stimulus", "run"])
def test_a_group_is_never_on_both_sides(unit):
    responses = make_responses(n_test=10)
    train, held_out = split_rows(responses, change(hold_out_by=unit), 0)
    column = {"stimulus": "stimulus_id", "run": "run"}[unit]
    names = responses.trials[column].to_numpy()
    assert not set(names[train]) & set(names[held_out])
    assert sorted([*train, *held_out]) == list(range(10, 60))


def test_memory_maps_are_read_batch_by_batch(tmp_path):
    responses = make_responses()
    np.save(tmp_path / "data.npy", responses.data)
    mapped = Responses(
        np.load(tmp_path / "data.npy", mmap_mode="r"), responses.dims, responses.trials, "z", responses.coords
    )
    config = change(n_epochs=1)
    run(config, responses, tmp_path / "a")
    run(config, mapped, tmp_path / "b")
    a, b = ((tmp_path / k / "out" / "encoder.safetensors").read_bytes() for k in "ab")
    assert a == b


def test_statistics_equal_numpy():
    data = 1e4 + np.random.default_rng(0).normal(size=(50, 6, 3))
    data[:, 2] = 7.0
    rows = np.arange(5, 45)
    mean, std = measure_parcels(lambda some: Rows(data[some]), rows, 6, 16)
    np.testing.assert_allclose(mean, data[rows].mean(axis=(0, 2)), rtol=1e-6)
    expected = data[rows].std(axis=(0, 2))
    expected[2] = 1
    np.testing.assert_allclose(std, expected, rtol=1e-5)


def test_parcels_without_time_predict_standardised_values(tmp_path):
    responses = make_responses(n=100)
    flat = Responses(responses.data[:, :, 2], ("trial", "parcel"), responses.trials, "z", responses.coords)
    reached = run(change(n_epochs=2), flat, tmp_path)
    assert reached["normalisation"] == "parcel"
    with pytest.raises(DataError, match="normalisation=parcel"):
        run(change(normalisation="patch"), flat, tmp_path / "other")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path):
    responses = make_responses()
    run(change(n_epochs=1), responses, tmp_path)
    kept = (tmp_path / "state" / "pretrain.safetensors").read_bytes()
    original = Pretraining._read

    def spoil(self, rows):
        found = original(self, rows)
        return Rows(found.data * np.nan) if self.model.training and self.epoch == 1 else found

    config = change(n_epochs=2)
    fresh = tmp_path / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "_read", spoil)
        with pytest.raises(DataError, match=r"loss is nan at step 3 .*last good state"):
            run(config, responses, fresh)
    assert len((fresh / "state" / "log.jsonl").read_text().splitlines()) == 1
    assert not list((fresh / "out").iterdir())
    assert (tmp_path / "state" / "pretrain.safetensors").read_bytes() == kept


def test_bad_input_says_what_to_do(tmp_path):
    responses = make_responses()
    with pytest.raises(DataError, match="test split"):
        run(CONFIG, make_responses(n_test=60), tmp_path)
    with pytest.raises(DataError, match="1 group"):
        run(change(hold_out_by="run"), make_responses(n=10), tmp_path)
    with pytest.raises(ConfigError, match="mask_ratio"):
        count_visible(6, 0.95)
    run(change(n_epochs=1), responses, tmp_path)
    with pytest.raises(DataError, match="other settings"):
        run(change(n_epochs=1, learning_rate=2e-3), responses, tmp_path)
    (tmp_path / "state" / "pretrain.safetensors").write_bytes(b"half a file")
    with pytest.raises(DataError, match="damaged"):
        run(change(n_epochs=1), responses, tmp_path)
    with pytest.raises(DataError, match="width = 16"):
        ParcelsConfig(width=32, depth=1, n_heads=2, mlp_ratio=2, pretrained=tmp_path / "out").build(
            describe_signal(responses), 5
        )


def test_another_atlas_is_named(tmp_path):
    responses = make_responses()
    run(change(n_epochs=1), responses, tmp_path)
    coords = {"parcel_networks": ["network2", *responses.coords["parcel_networks"][1:]]}
    other = Responses(responses.data, responses.dims, responses.trials, "z", coords)
    with pytest.raises(DataError, match=r"parcel 0.*atlas"):
        ENCODER.model_copy(update={"pretrained": tmp_path / "out"}).build(describe_signal(other), 5)


@pytest.mark.slow
def test_tuning_from_pretraining_is_no_worse_than_from_scratch(tmp_path):
    """Few labelled trials, many unlabelled ones with the same networks; the labels are the networks' courses."""
    unlabelled = make_responses(n=300, seed=0)
    config = change(LEARNING, n_epochs=25)
    run(config, unlabelled, tmp_path)
    scores = {}
    for name, pretrained in (("scratch", None), ("pretrained", tmp_path / "out")):
        encoder = config.encoder.model_copy(update={"pretrained": pretrained})
        scores[name] = np.mean([tune_and_score(encoder, seed) for seed in range(3)])
    assert scores["scratch"] > 0.3  # it is no straw man
    assert scores["pretrained"] > scores["scratch"] - 0.02


def tune_and_score(encoder, seed):
    """Return the mean correlation of predicted and true courses of new trials, after training on 48."""
    few, new = (
        make_responses(n=48, seed=10 + seed, noise=0.0),
        make_responses(n=200, seed=20 + seed, noise=0.0),
    )
    targets = [
        torch.from_numpy(r.data[:, ::4, ::2] - 5).flatten(1) for r in (few, new)
    ]  # one parcel per network
    noise = np.random.default_rng(seed)
    data = [torch.from_numpy(r.data + noise.normal(size=r.data.shape).astype(np.float32)) for r in (few, new)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = encoder.build(describe_signal(few), targets[0].shape[1])
        optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        nobody = torch.zeros(200, dtype=torch.int64)
        for _ in range(30):
            for rows in torch.randperm(48).split(12):
                loss = (network(data[0][rows], nobody[:12]) - targets[0][rows]).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            predicted = network(data[1], nobody)
    columns = zip(predicted.T.numpy(), targets[1].T.numpy(), strict=True)
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in columns])
