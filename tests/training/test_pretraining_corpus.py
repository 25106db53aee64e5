"""Pretraining on corpora: windows of many persons, objectives beside masking, probes, and going on."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.datasets.corpus import reader
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.training.pretraining import Pretraining, pretrain
from braindecode_vis.training.pretraining_config import PretrainConfig, ProbesConfig
from braindecode_vis.training.pretraining_data import CorpusRows, WindowPartners, read_learnt
from braindecode_vis.training.pretraining_model import (
    PretrainingBatch,
    SelfSupervised,
    contrast,
    draw_ranks,
    make_mask,
)
from tests.training.toy_corpus import ToyCorpus

ENCODER = {
    "width": 16, "depth": 1, "n_heads": 2, "mlp_ratio": 2, "patch_times": 4, "network_embedding": False,
}  # fmt: skip
SETTINGS = {
    "encoder": ENCODER, "corpus": ("one",), "window_times": 16, "decoder_width": 16, "decoder_depth": 1,
    "n_epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "mask_ratio": 0.5,
}  # fmt: skip
ALL = {"masked": 1.0, "jepa": 0.5, "run_contrast": 0.1}


@pytest.fixture
def corpora(monkeypatch):
    """Corpora by the name of their folder."""
    known = {"one": ToyCorpus(missing=3)}
    monkeypatch.setattr(reader, "open_corpus", lambda folder, digest=None: known[str(folder)])
    return known


def run(folder, seed=0, **changes):
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    config = PretrainConfig(**SETTINGS | changes)
    return pretrain(config, None, folder=out, checkpoints=folder / "state", seed=seed)


def read_log(folder):
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


def test_who_was_in_the_corpus_is_written_and_the_network_starts_from_the_encoder(corpora, tmp_path):
    run(tmp_path, n_epochs=1)
    description = json.loads((tmp_path / "out" / "encoder.json").read_text())
    (corpus,) = description["corpora"]
    assert corpus["digest"] == "digest0"
    assert corpus["n_persons"] == 4
    assert corpus["held_out_persons"] == ["p4", "p5"]
    assert corpus["subjects"][0] == {"source": "p", "subject": "0", "person": "p0"}
    signal = Signal(("parcel", "time"), (12, 16), ("01",), networks=corpora["one"].networks, sfreq=0.5)
    network = ParcelsConfig(**ENCODER, pretrained=tmp_path / "out").build(signal, 3)
    assert network(torch.zeros(2, 12, 16), torch.zeros(2, dtype=torch.int64)).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [{"masked": 1.0}, {"masked": 1.0, "jepa": 0.3, "run_contrast": 0.1}])
def test_hidden_parcels_of_new_persons_are_predicted_better_than_by_the_mean(corpora, tmp_path, objectives):
    """Clearly: three objectives together reach .48, .47 and .55 of the mean's error (seeds 0, 1, 2; 540 steps)."""
    corpora["one"] = ToyCorpus(n_persons=12, n_times=96, missing=3, noise=0.2)
    reached = run(
        tmp_path, n_epochs=9, encoder={**ENCODER, "width": 32}, decoder_width=32, learning_rate=5e-3,
        window_times=4, objectives=objectives,
    )  # fmt: skip
    assert reached["held_out"] < 0.75 * reached["mean_baseline"]


@pytest.mark.parametrize("objectives", [{"masked": 1.0}, ALL])
def test_missing_parcels_are_neither_seen_nor_predicted(objectives, tmp_path, corpora, monkeypatch):
    """Whatever is where nothing was recorded, the weights come out the same."""
    run(tmp_path / "a", objectives=objectives)
    read = CorpusRows.read

    def poison(self, rows):
        found = read(self, rows)
        if found.observed is not None:
            found.data[~found.observed] = 1e3
        return found

    monkeypatch.setattr(CorpusRows, "read", poison)
    run(tmp_path / "b", objectives=objectives)
    a, b = ((tmp_path / k / "out" / "encoder.safetensors").read_bytes() for k in "ab")
    assert a == b


def test_masks_hide_the_same_share_of_what_was_recorded():
    torch.manual_seed(0)
    observed = torch.ones(3, 6, dtype=torch.bool)
    observed[1, :4] = False
    mask = make_mask(draw_ranks(3, 6, 4, "tokens"), 0.75, observed)
    assert (mask.n_visible, mask.first) == (6, 2)
    assert mask.seen.sum(dim=1).tolist() == [6, 2, 6]
    assert mask.hidden.sum(dim=1).tolist() == [18, 6, 18]
    assert mask.present.sum(dim=1).tolist() == [24, 8, 24]
    assert set((mask.order[1, :8] // 4).tolist()) == {4, 5}
    whole = make_mask(draw_ranks(3, 6, 4, "tokens"), 0.75, observed=torch.ones(3, 6, dtype=torch.bool))
    plain = make_mask(draw_ranks(3, 6, 4, "tokens"), 0.75)
    assert whole.seen.all()
    assert whole.hidden.all()
    assert plain.n_visible == whole.n_visible == whole.first


@pytest.mark.parametrize("style", ["parcels", "times"])
def test_whole_parcels_or_times_are_hidden(style):
    mask = make_mask(draw_ranks(5, 6, 4, style), 0.5)
    seen = torch.zeros(5, 24).scatter(1, mask.order[:, :12], 1).view(5, 6, 4)
    whole = seen.sum(dim=2 if style == "parcels" else 1)
    assert set(whole.unique().tolist()) == {0.0, 4.0 if style == "parcels" else 6.0}
    mixed = draw_ranks(200, 6, 4, "mixed").view(200, 6, 4)
    spread = mixed.std(dim=2).mean(dim=1)
    assert 0.2 < (spread < 1e-5).float().mean() < 0.5  # about a third hides whole parcels


def test_jepa_predicts_latents_of_a_teacher_that_follows(corpora, tmp_path):
    encoder = ParcelsConfig(**ENCODER).build_encoder(
        Signal(("parcel", "time"), (12, 16), (), networks=("a",) * 12)
    )
    model = SelfSupervised(encoder, objectives=("jepa",), decoder_width=8, decoder_depth=1).eval()
    data, order = torch.randn(3, 12, 16), make_mask(draw_ranks(3, 12, 4, "tokens"), 0.5)
    wanted = torch.nn.functional.layer_norm(encoder(data)[:, 1:], (16,))
    torch.testing.assert_close(model.make_latents(PretrainingBatch(data)), wanted)
    errors = model(PretrainingBatch(data), order)
    errors["jepa"].sum().backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    before = model.teacher.norm.bias.clone()
    with torch.no_grad():
        encoder.norm.bias += 1
    model.follow(0.75)
    torch.testing.assert_close(model.teacher.norm.bias, before + 0.25)
    run(tmp_path, objectives={"jepa": 1.0}, keep="last")
    last = read_log(tmp_path)[-1]
    assert last["mean_baseline"] is None
    assert set(last["held_out_parts"]) == {"jepa", "jepa_of_mean"}
    state = load_file(tmp_path / "state" / "pretrain.safetensors")
    written = load_file(tmp_path / "out" / "encoder.safetensors")
    assert torch.equal(written["norm.bias"], state["model.teacher.norm.bias"])
    assert not torch.equal(written["norm.bias"], state["model.encoder.norm.bias"])


def test_the_contrast_leaves_out_the_same_person():
    torch.manual_seed(0)
    one, other = torch.randn(4, 5), torch.randn(4, 5)
    person = torch.tensor([0, 0, 1, 2])
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (one, other))
    similarity = a @ b.T / 0.2
    losses = []
    for i in range(4):
        others = [j for j in range(4) if j == i or person[j] != person[i]]
        losses += [similarity[i, others].logsumexp(0) - similarity[i, i]]
        losses += [similarity[others, i].logsumexp(0) - similarity[i, i]]
    torch.testing.assert_close(contrast(one, other, person, 0.2), torch.stack(losses).mean())
    counts = torch.tensor([1.0, 1, 1, 0])
    torch.testing.assert_close(
        contrast(one, other, person, 0.2, counts), contrast(one[:3], other[:3], person[:3], 0.2)
    )


def test_partners_are_of_the_same_person_and_another_run():
    person = np.repeat([0, 1, 2, 3], [6, 4, 3, 1])
    run_of = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 6])
    order = np.random.default_rng(0).permutation(14)
    person, run_of = person[order], run_of[order]
    partners = WindowPartners(np.arange(14), person, run_of)
    met = set()
    for seed in range(50):
        found = partners.draw(np.arange(14), np.random.default_rng(seed))
        assert (person[found] == person).all()
        assert (run_of[found] != run_of)[person < 2].all()
        assert (found != np.arange(14))[person == 2].all()  # one run: another window of it
        met |= {*zip(np.arange(14).tolist(), found.tolist(), strict=True)}
    assert len(met) == 6 * 4 + 4 * 2 + 3 * 2 + 1


def test_an_interrupted_run_equals_an_uninterrupted_one_within_an_epoch(corpora, tmp_path, monkeypatch):
    corpora["two"] = ToyCorpus(n_persons=4, seed=1, prefix="q")
    settings = {
        "corpus": ("one", "two"), "objectives": ALL, "checkpoint_steps": 1,
        "probes": ProbesConfig(every=1), "mask": "mixed", "encoder": {**ENCODER, "dropout": 0.1},
    }  # fmt: skip
    run(tmp_path / "whole", **settings)
    original, steps = Pretraining.compute_loss, []

    def die(self, rows, step):
        steps.append(step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(self, rows, step)

    monkeypatch.setattr(Pretraining, "compute_loss", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", **settings)
    run(tmp_path / "parts", **settings)
    assert steps[6] == 5  # not an epoch back
    for name in ("encoder.safetensors", "log.jsonl", "encoder.json"):
        assert (tmp_path / "parts/out" / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes()
    probes = read_log(tmp_path / "whole")[-1]["probes"]
    assert probes["identity_part"] == "held_out"
    assert probes["identity_persons"] == 4
    assert 0 <= probes["network"] <= 1
    assert probes["network_n"] == 12


def test_going_on_from_an_earlier_encoder_on_another_corpus(corpora, tmp_path):
    corpora["two"] = ToyCorpus(n_persons=5, seed=3, prefix="q", n_times=64)
    run(tmp_path / "first", encoder={**ENCODER, "time_position": "seconds"})
    settings = {"corpus": ("two",), "window_times": 32, "encoder": {**ENCODER, "time_position": "seconds"}}
    warm = run(
        tmp_path / "warm", start_from=tmp_path / "first" / "out", n_epochs=1, learning_rate=1e-9, **settings
    )
    first, second = (load_file(tmp_path / k / "out" / "encoder.safetensors") for k in ("first", "warm"))
    assert warm["epoch"] == 1
    assert all(
        torch.allclose(first[k], v, atol=1e-6) for k, v in second.items() if k not in ("mean", "std")
    )  # the statistics are those of the new corpus
    assert not torch.equal(first["std"], second["std"])
    run(tmp_path / "state", start_from=tmp_path / "first/state/pretrain.safetensors", n_epochs=1, **settings)
    run(tmp_path / "a")
    with pytest.raises(DataError, match="n_patches"):
        run(tmp_path / "b", start_from=tmp_path / "a" / "out", window_times=32)
    corpora["two"].channels = ("other", *corpora["two"].channels[1:])
    with pytest.raises(DataError, match=r"number 0 was parcel0 and is other"):
        run(tmp_path / "c", start_from=tmp_path / "first" / "out", **settings)
    with pytest.raises(DataError, match=r"number 0 was parcel0 and is other"):
        run(tmp_path / "d", start_from=tmp_path / "first/state/pretrain.safetensors", **settings)


def test_intervals_that_differ_are_told_in_seconds(corpora, tmp_path):
    corpora["slow"] = ToyCorpus(n_persons=4, interval_s=3.0, seed=2, prefix="q")
    with pytest.raises(ConfigError, match=r"2 to 3 s apart.*time_position=seconds"):
        run(tmp_path, corpus=("one", "slow"))
    seconds = {**ENCODER, "time_position": "seconds"}
    run(tmp_path, corpus=("one", "slow"), encoder=seconds, n_epochs=1)
    encoder = ParcelsConfig(**seconds).build_encoder(Signal(("parcel", "time"), (12, 16), (), sfreq=0.5))
    data = torch.randn(2, 12, 16)
    told = encoder(data, interval=torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(told[0], encoder(data)[0])  # that of the signal
    assert not torch.allclose(told[1], encoder(data)[1], atol=1e-3)
    assert encoder(data[..., :4]).shape == (2, 13, 16)  # trials of one patch


def test_channels_are_taken_as_parcels_are(corpora, tmp_path):
    corpora["one"].modality = "eeg"
    run(tmp_path, encoder={**ENCODER, "parcel_position": "data"}, n_epochs=1)
    signal = Signal(("channel", "time"), (12, 16), ("01",), ch_names=corpora["one"].channels, sfreq=0.5,
                    ch_pos=corpora["one"].coordinates)  # fmt: skip
    config = ParcelsConfig(**ENCODER, parcel_position="data", pretrained=tmp_path / "out")
    assert config.build(signal, 3)(torch.zeros(2, 12, 16), torch.zeros(2, dtype=torch.int64)).shape == (2, 3)
    with pytest.raises(DataError, match="positions from the data"):
        config.build(Signal(("channel", "time"), (12, 16), ("01",), sfreq=0.5), 3)


def test_bad_input_says_what_to_do(corpora, tmp_path):
    corpora["other"] = ToyCorpus(n_parcels=16, prefix="q")
    with pytest.raises(ConfigError, match=r"different channels \(12 and 16\)"):
        run(tmp_path, corpus=("one", "other"))
    corpora["all"] = ToyCorpus(held_out=0)
    with pytest.raises(DataError, match="--hold-out"):
        run(tmp_path, corpus=("all",))
    corpora["lone"] = ToyCorpus(n_persons=2, held_out=1)
    with pytest.raises(DataError, match="one person"):
        run(tmp_path, corpus=("lone",), objectives=ALL)
    for changes, words in (
        ({"held_out": 0.3}, "held_out"), ({"objectives": {"jepa": 1.0}}, "keep to last"),
        ({"ema": 0.9}, "ema was removed"), ({"objectives": {}}, "at least one"), ({"corpus": ()}, "no corpus"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=words):
            PretrainConfig(**SETTINGS | changes)


def test_nobody_is_held_out_in_one_corpus_and_trained_on_in_another(corpora, tmp_path):
    """Each corpus holds its own persons out; the same one, by name or by samples, taught in the other."""
    corpora["more"] = ToyCorpus(missing=3, held_out=1)  # trains on p4, whom `one` holds out
    with pytest.raises(ConfigError, match=r"one|p holds p4 out.*--hold-out p/4"):
        run(tmp_path, corpus=("one", "more"))
    corpora["renamed"] = ToyCorpus(missing=3, held_out=1, prefix="q")
    corpora["renamed"].runs["digest"] = corpora["one"].runs["digest"]
    with pytest.raises(ConfigError, match=r"--hold-out q/4"):
        run(tmp_path, corpus=("one", "renamed"))


def test_a_contrast_with_one_held_out_person_is_no_measure(corpora, tmp_path):
    """It was 0 after every epoch, so that the first one was taken for the best."""
    corpora["one"] = ToyCorpus(held_out=1)
    with pytest.raises(DataError, match="one is held out"):
        run(tmp_path, objectives={"run_contrast": 1.0, "jepa": 1.0})


def test_the_held_out_contrast_is_between_persons(corpora, tmp_path):
    """Rows in their order are neighbours in time, so that a batch held one person and its contrast was nearly 0."""
    corpora["one"] = ToyCorpus(n_times=96)
    config = PretrainConfig(**SETTINGS | {"objectives": ALL, "window_times": 4})
    material = CorpusRows([corpora["one"]], config, 0)
    batches = list(Pretraining(config, material, tmp_path, 0)._iterate_held_out())
    assert sorted(row for rows, *_ in batches for row in rows) == material.held_out.tolist()
    assert all(len(set(material.person[rows])) == 2 for rows, *_ in batches)


def test_an_encoder_that_is_trained_on_tells_whom_it_learnt_from_before(corpora, tmp_path):
    """Only those of the last corpus were named, so that a subject of an earlier one could be tested unseen."""
    corpora["two"] = ToyCorpus(n_persons=4, seed=3, prefix="q")
    run(tmp_path / "first", n_epochs=1)
    for number, start in enumerate(("first/out", "first/state/pretrain.safetensors")):
        out = tmp_path / f"second{number}"
        run(out, corpus=("two",), start_from=tmp_path / start, n_epochs=1)
    found = read_learnt(tmp_path / "second0" / "out")
    assert [corpus["digest"] for corpus in found] == ["digest3", "digest0"]
    assert found == read_learnt(tmp_path / "second1" / "state" / "pretrain.safetensors")
    corpora["one"].runs["held_out"] = corpora["one"].runs["subject"] == "0"
    corpora["one"].digest = "others"
    with pytest.warns(Notice, match="p0 held out now, but the encoder .* was trained on"):
        run(tmp_path / "third", start_from=tmp_path / "second0/out", n_epochs=1)


def test_a_corpus_that_changes_meanwhile_stops_the_training(corpora, tmp_path, monkeypatch):
    original = Pretraining._judge

    def change(self, n_batches):
        original(self, n_batches)
        corpora["one"].changed, corpora["one"].digest = True, "grown"

    monkeypatch.setattr(Pretraining, "_judge", change)
    with pytest.raises(DataError, match=r"was changed.*start_from=.*pretrain\.safetensors"):
        run(tmp_path)
    monkeypatch.setattr(Pretraining, "_judge", original)
    corpora["one"].changed = False
    with pytest.raises(DataError, match=r"corpus_digests.*digest0.*now.*grown"):
        run(tmp_path)
    corpora["one"].digest = "digest0"  # given back
    run(tmp_path)
    assert [line["epoch"] for line in read_log(tmp_path)] == [1, 2]


def test_settings_count_by_content_and_old_fingerprints_stay(corpora):
    plain = PretrainConfig().hashed_fields()
    assert {"corpus_digests", "objectives", "mask", "probes", "precision"} & set(plain) == set()
    first = PretrainConfig(**SETTINGS).hashed_fields()
    assert first["corpus_digests"] == ["digest0"]
    assert "corpus" not in first
    corpora["moved"] = corpora["one"]
    assert PretrainConfig(**SETTINGS | {"corpus": ("moved",)}).hashed_fields() == first


def test_probes_find_what_is_there_and_nothing_in_noise():
    from braindecode_vis.training.pretraining_probes import probe_identity, probe_network

    generator = np.random.default_rng(0)
    person, run_of = np.repeat(np.arange(8), 20), np.repeat(np.arange(32), 5)
    own = generator.normal(size=(8, 10))[person]
    found = probe_identity(own + generator.normal(size=(160, 10)), person, run_of, 0)
    assert found["identity"] > 0.6
    assert found["identity_chance"] == 1 / 8
    assert found["identity_n"] == 80
    noise = probe_identity(generator.normal(size=(160, 10)), person, run_of, 0)
    assert abs(noise["identity"] - 1 / 8) < 0.12
    # What is a run's own, not a person's, must not help.
    of_run = probe_identity(3 * generator.normal(size=(32, 10))[run_of], person, run_of, 0)
    assert abs(of_run["identity"] - 1 / 8) < 0.25
    networks = np.repeat(["a", "b", "c"], [20, 12, 8])
    centres = {name: generator.normal(size=10) for name in "abc"}
    parcels = np.stack([centres[n] for n in networks]) + generator.normal(size=(40, 10))
    found = probe_network(parcels, networks, 0)
    assert found["network"] > 0.8
    assert found["network_chance"] == 0.5
    assert probe_network(generator.normal(size=(40, 10)), networks, 0)["network"] < 0.65


def test_the_labelled_probe_never_reads_test_trials(tmp_path):
    from braindecode_vis.base.arrays import Embeddings, Responses
    from braindecode_vis.training.pretraining_probes import check_labelled, make_labelled, probe_labelled

    generator = np.random.default_rng(0)
    course = generator.normal(size=(60, 6))
    data = (course[:, np.arange(12) // 2, None] + 0.3 * generator.normal(size=(60, 12, 8))).astype(np.float32)
    data[50:] = np.nan
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "1", "run": "1", "stimulus_id": [f"i{n}" for n in range(60)],
            "repetition": 0, "split": ["train"] * 50 + ["test"] * 10,
        }
    )  # fmt: skip
    responses = Responses.__new__(Responses)
    for name, value in zip(
        ("data", "dims", "trials", "unit", "coords"),
        (data, ("trial", "parcel", "time"), trials, "z", {"sfreq": 0.5}), strict=True,
    ):  # fmt: skip
        object.__setattr__(responses, name, value)
    targets = Embeddings(course, trials["stimulus_id"].to_list(), "toy")
    labelled = make_labelled(responses, targets, 0)
    assert len(labelled.data) == 50
    assert np.isfinite(labelled.data).all()
    assert (~labelled.fits).sum() == 10
    torch.manual_seed(0)
    signal = Signal(("parcel", "time"), (12, 16), (), sfreq=0.5)
    encoder = ParcelsConfig(**ENCODER, time_position="seconds").build_encoder(signal).eval()
    check_labelled(labelled, encoder)
    found = probe_labelled(encoder, labelled, 16)
    assert found["top5_chance"] == 0.5
    assert found["top5"] >= 0.7
    with pytest.raises(DataError, match="time_position=seconds can use both"):
        check_labelled(labelled, ParcelsConfig(**ENCODER).build_encoder(signal))


def test_half_precision_learns_too(corpora, tmp_path):
    run(tmp_path, precision="bf16", objectives=ALL, n_epochs=1)
    assert load_file(tmp_path / "out" / "encoder.safetensors")["norm.bias"].dtype == torch.float32
    with pytest.raises(ConfigError, match=r"pretrain\.precision is fp16"):
        run(tmp_path / "half", precision="fp16")


def test_the_verb_pretrains_without_a_configuration(corpora, tmp_path, command_line):
    settings = {
        "encoder": ENCODER, "window_times": 16, "decoder_width": 8, "mask_ratio": 0.5,
        "pretrain.n_epochs": 1, "probes.every": 1, "seed": 3,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    out = tmp_path / "encoder"
    call = ["pretrain", "--corpus", "one", "--out", str(out), *words]
    done = command_line(*call, "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert first["reached"]["probes"]["network_n"] == 12
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "encoder.json", "encoder.safetensors", "log.jsonl",
    ]  # fmt: skip
    before = (out / "encoder.json").stat().st_mtime_ns
    assert "predicting the mean" in command_line(*call).stdout  # it is there
    assert (out / "encoder.json").stat().st_mtime_ns == before
    for wrong, text in (
        ([*call, "--set", "n_epochs=2"], "other settings"),
        (["pretrain", "--corpus", "one"], "--out FOLDER"), ([*call, "--root", "x"], "--root and --subject"),
        ([*call, "--set", "n_epoch=2"], "unknown key pretrain.n_epoch"), ([*call, "--set", "seed=-1"], "seed is -1"),
        (["pretrain", "--corpus", "one", "--out", str(tmp_path)], "holds other files"),
    ):  # fmt: skip
        done = command_line(*wrong)
        assert done.returncode == 2
        assert text in done.stderr
