"""Two processes that share a batch do what one process does with all of it."""

import json
from pathlib import Path

import accelerate  # noqa: F401 - so that no forked process has to import it
import numpy as np
import pytest
from safetensors.numpy import load_file

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.devices import gather_rows
from braindecode_vis.datasets.corpus import reader
from braindecode_vis.training import loop
from braindecode_vis.training.model import gather_outputs
from braindecode_vis.training.objectives.objective import NEED_FIELDS, Outputs
from braindecode_vis.training.pretraining import pretrain
from braindecode_vis.training.pretraining_config import PretrainConfig
from tests.processes import run_together
from tests.training import test_category_network, test_pretraining, test_pretraining_corpus
from tests.training.toy_corpus import ToyCorpus
from tests.training.toy_task import get_weights, make_config, make_task

SETTINGS = {
    "objectives": [
        {"kind": "clip"}, {"kind": "mse"}, {"kind": "soft_clip"}, {"kind": "distillation"},
        {"kind": "multiview", "views": ["brain_views", "image"]}, {"kind": "hydra"},
    ],
    "projector": {"size": 5}, "network": {"kind": "eegproject", "dropout": 0}, "batch_size": 8, "epochs": 2,
    "teacher": {"queue": 10}, "ema": 0.9, "hide_subject": 0,
    "optimiser": {"kind": "adam", "lr": 1e-3, "weight_decay": 0}, "selection": {"kind": "last", "hold_out": 0.2},
}  # fmt: skip


def contrast(rank):
    """Return loss and gradient of one contrast: rows of this process, candidates of both."""
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    brain, image, weight = torch.randn(6, 3), torch.randn(6, 3), torch.randn(3, 3, requires_grad=True)
    mine = slice(3 * rank, 3 * rank + 3)
    logits = gather_rows(brain[mine] @ weight) @ gather_rows(image[mine]).T
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    loss.backward()
    dist.all_reduce(weight.grad)
    return loss.detach(), weight.grad / 2  # what DistributedDataParallel does


def gather(rank, n_ranks=2):
    """Return gathered outputs of descriptions of images, of which a process has its share."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = slice(6 // n_ranks * rank, 6 // n_ranks * (rank + 1))

    def make(*shape, dim=0):
        return torch.randn(*shape, generator=generator).movedim(dim, 0)[rows].movedim(0, dim)

    swapped = make(6, 2, 4)
    return gather_outputs(
        Outputs(
            make(6, 3), make(6, 3), torch.arange(6)[rows], torch.arange(6)[rows], seed=7,
            words=torch.arange(12).view(6, 2)[rows], attributes=torch.arange(6).view(6, 1)[rows],
            sentences=make(6, 4), swapped=swapped, swapped_known=swapped[..., 0] > 0,
            token_views=make(2, 6, 5, 3, dim=1), token_offsets=make(2, 6, dim=1),
            teacher_tokens=make(2, 6, 5, 3, dim=1),
        )
    )  # fmt: skip


class CountedRows:
    """Trials of which it is noted which rows were read."""

    def __init__(self, data):
        self.data, self.shape, self.dtype, self.nbytes, self.ndim = (
            data,
            data.shape,
            data.dtype,
            data.nbytes,
            3,
        )
        self.read = []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, rows):
        self.read += np.arange(len(self.data))[rows].ravel().tolist()
        return self.data[rows]


def train(settings, **task):
    """Return history and weights of a small training, and how many rows of trials it read."""
    responses, targets = make_task(**task)
    counted = CountedRows(responses.data)
    object.__setattr__(responses, "data", counted)
    encoder = make_config(**settings).build(seed=0).fit(responses, targets)
    return encoder.fitted.history, get_weights(encoder), len(counted.read)


def describe(folder):
    """Return the settings with captions, two for each image, which a decoder learns to write."""
    bank = folder / "captions.csv"
    bank.write_text(
        "\n".join(["id,caption", *(f"image{n:03d},thing {n % 4 + k}" for n in range(20) for k in (0, 1))])
    )
    captioning = {"kind": "captioning", "width": 8, "n_queries": 1, "dropout": 0}
    return SETTINGS | {"objectives": [*SETTINGS["objectives"], captioning], "captions": bank}


TASK = {"n_images": 20, "n_repetitions": 3}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Return what two processes found: of a contrast, and of a training."""
    folder = tmp_path_factory.mktemp("processes")
    settings = describe(folder)
    return run_together(lambda rank: (contrast(rank), train(settings, **TASK), gather(rank)), folder)


def test_descriptions_of_two_processes_are_those_of_one(together):
    import torch

    whole = gather(0, n_ranks=1)
    for _, _, found in together:
        assert found.seed == 7
        for need in ("words", "attributes", "sentences", "swapped", "token_views", "teacher_tokens"):
            for name in NEED_FIELDS[need]:
                torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=0, atol=0)


def measure_difference(found, expected):
    """Return the largest difference of weights, relative to the norm of each tensor."""
    assert found.keys() == expected.keys()
    return max(
        float(np.linalg.norm(found[n] - w) / max(1e-3, np.linalg.norm(w))) for n, w in expected.items()
    )


def test_loss_and_gradient_are_those_of_the_whole_batch(together):
    import torch

    found = together[0][0]
    torch.manual_seed(0)
    brain, image, weight = torch.randn(6, 3), torch.randn(6, 3), torch.randn(3, 3, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(brain @ weight @ image.T, torch.arange(6))
    loss.backward()
    torch.testing.assert_close(found[0], loss.detach())
    torch.testing.assert_close(found[1], weight.grad)


def test_processes_that_read_different_checkpoints_stop(monkeypatch):
    """A folder of its own on each machine: one would train on from where the other begins."""
    import torch

    from braindecode_vis.base import devices
    from braindecode_vis.base.checks import DataError

    monkeypatch.setattr(devices, "gather_rows", lambda mine: torch.cat([mine, mine]))
    devices.check_same_start(3, Path("runs/work"), "cpu")
    monkeypatch.setattr(devices, "gather_rows", lambda mine: torch.cat([mine, mine + 2]))
    with pytest.raises(DataError, match="different checkpoints in runs/work"):
        devices.check_same_start(3, Path("runs/work"), "cpu")


def test_training_together_is_training_alone(together, tmp_path):
    """Every part of an update: views, captions, teacher, queue, averages, projectors, scores of held-out images."""
    (history, weights, _), other = together[0][1], together[1][1]
    for name, value in weights.items():
        np.testing.assert_array_equal(other[1][name], value, err_msg=name)
    alone, expected, _ = train(describe(tmp_path), **TASK)
    for one, two in zip(alone, history, strict=True):
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
        np.testing.assert_allclose(one["validation_loss"], two["validation_loss"], rtol=1e-4)
        for name, value in one["objectives"].items():
            np.testing.assert_allclose(value, two["objectives"][name], rtol=1e-4, err_msg=name)
    for name, value in expected.items():
        found = weights[name]
        if name.endswith("in_proj_bias"):  # a bias of keys moves no attention: its gradient is rounding alone
            value, found = (np.delete(b, np.s_[len(b) // 3 : 2 * len(b) // 3]) for b in (value, found))
        # Sums in another order, and Adam divides by the size of the gradient, however small.
        np.testing.assert_allclose(found, value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("resident", [True, False])
def test_each_process_reads_its_share(tmp_path, resident):
    """Of what stays in memory once, of what does not in every epoch; statistics and held-out trials are read once."""
    settings = {
        "network": {"kind": "eegproject", "width": 4}, "epochs": 2, "batch_size": 8,
        "input_scaling": {"kind": "zscore"}, "selection": {"kind": "last", "hold_out": 0.2},
        "max_device_bytes": 1 << 20 if resident else 0,
    }  # fmt: skip
    both = run_together(lambda rank: train(settings, **TASK)[2], tmp_path)
    alone = train(settings, **TASK)[2]
    n_train = 48  # of 60 trials, 12 are held out
    if resident:
        assert alone == n_train + 60 + 2
        assert both == [n_train + 30 + 2, 30 + 2]  # the first process has learnt the scaling, for both
    else:
        assert alone == n_train + 2 * 60 + 2
        assert both == [n_train + n_train + 2 * 12 + 2, n_train + 2]


def test_two_processes_learn_the_classes_that_one_learns(tmp_path):
    responses, labels = test_category_network.make_trials(n_trials=40)
    network = {"kind": "eegproject", "width": 4, "dropout": 0}
    config = test_category_network.make_config(epochs=3, network=network, batch_size=8)

    def fit(rank=0):
        decoder = config.build(seed=0).fit(responses, labels)
        return get_weights(decoder.encoder), decoder.decision(responses)

    weights, decision = run_together(fit, tmp_path)[0]
    expected, alone = fit()
    assert measure_difference(weights, expected) < 1e-3  # as above
    np.testing.assert_allclose(decision, alone, atol=1e-3)


def test_two_processes_pretrain_what_one_pretrains(tmp_path):
    """Trials hide what matches the image, whose fit the processes share too."""
    encoder = test_pretraining.CONFIG.encoder.model_copy(update={"dropout": 0.0})
    config = test_pretraining.change(encoder=encoder, batch_size=15, guide="target")  # uneven
    responses = test_pretraining.make_responses(n=62)
    ids = np.unique(responses.stimulus_ids.astype(str))
    guide = Embeddings(np.random.default_rng(0).normal(size=(len(ids), 5)), ids.astype(object), "toy")
    alone = test_pretraining.run(config, responses, tmp_path / "alone", guide=guide)
    both = run_together(
        lambda rank: test_pretraining.run(config, responses, tmp_path / "both", guide=guide), tmp_path
    )
    assert both[0] == both[1]
    assert both[0]["held_out"] == pytest.approx(alone["held_out"], rel=1e-4)
    assert both[0]["mean_baseline"] == pytest.approx(alone["mean_baseline"], rel=1e-6)
    found, expected = (
        load_file(tmp_path / name / "out" / "encoder.safetensors") for name in ("both", "alone")
    )
    assert measure_difference(found, expected) < 1e-3  # sums in another order, which Adam makes larger
    lines = [(tmp_path / name / "state" / "log.jsonl").read_text().splitlines() for name in ("both", "alone")]
    for one, other in zip(*lines, strict=True):
        assert json.loads(one)["loss"] == pytest.approx(json.loads(other)["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_pretrain_on_a_corpus_what_one_pretrains(tmp_path, monkeypatch):
    """All objectives, with parcels missing and a last batch that is filled up; only one looks with probes."""
    toy = ToyCorpus(n_persons=5, missing=3)
    monkeypatch.setattr(reader, "open_corpus", lambda folder, digest=None: toy)
    settings = test_pretraining_corpus.SETTINGS | {
        "objectives": test_pretraining_corpus.ALL, "batch_size": 7, "probes": {"every": 1}
    }  # fmt: skip

    def fit(name):
        folder = tmp_path / name
        (folder / "out").mkdir(parents=True, exist_ok=True)
        config = PretrainConfig(**settings)
        return pretrain(config, None, folder=folder / "out", checkpoints=folder / "state", seed=0)

    alone, both = fit("alone"), run_together(lambda rank: fit("both"), tmp_path)
    assert both[0]["held_out"] == both[1]["held_out"] == pytest.approx(alone["held_out"], rel=1e-4)
    assert both[0]["mean_baseline"] == pytest.approx(alone["mean_baseline"], rel=1e-6)
    found, expected = (
        load_file(tmp_path / name / "out" / "encoder.safetensors") for name in ("both", "alone")
    )
    assert measure_difference(found, expected) < 1e-3  # as above
    lines = [
        json.loads((tmp_path / n / "state" / "log.jsonl").read_text().splitlines()[-1])
        for n in ("both", "alone")
    ]
    for part in ("loss_parts", "held_out_parts"):
        assert lines[0][part] == pytest.approx(lines[1][part], rel=1e-3)


SHARDED = {
    "objectives": [{"kind": "clip"}, {"kind": "mse"}], "projector": {"size": 5}, "batch_size": 8, "epochs": 3,
    "network": {"kind": "eegproject", "dropout": 0, "width": 7}, "clip_norm": 0.5,
    "optimiser": {"kind": "adamw", "lr": 1e-3}, "selection": {"kind": "early_stopping", "hold_out": 0.2},
    "checkpoint_seconds": 0,
}  # fmt: skip


@pytest.mark.slow  # an option that few take, of four trainings
def test_a_network_of_which_each_process_keeps_a_part_learns_the_same(tmp_path, monkeypatch):
    """FSDP, as accelerate is set to use it; on CPUs torch does what accelerate does on GPUs alone."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    responses, targets = make_task(**TASK)

    def fit(rank=0, stop_at=None):
        encoder = make_config(**SHARDED).build(seed=0)
        encoder.workspace = tmp_path / "work"
        parts, original = {}, loop.Trainer._report

        def report(trainer):
            own = dict(trainer.learner.named_parameters())
            parts.update(
                {name: (p.to_local() if hasattr(p, "to_local") else p).numel() for name, p in own.items()}
            )
            if trainer.counters.update == stop_at:
                raise InterruptedError
            original(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "_report", report)
            encoder.fit(responses, targets)
        return get_weights(encoder), encoder.fitted.history, parts

    stopped = run_together(lambda rank: fit(rank, stop_at=7), tmp_path)
    assert all("InterruptedError" in text for text in stopped)
    again, other = run_together(fit, tmp_path)
    (tmp_path / "work" / "checkpoint.safetensors").unlink()
    whole, _ = run_together(fit, tmp_path)
    for name, value in whole[0].items():
        np.testing.assert_array_equal(again[0][name], value, err_msg=name)
        np.testing.assert_array_equal(other[0][name], value, err_msg=name)
    sizes = {name: value.size for name, value in whole[0].items()}
    assert sum(whole[2].values()) < 0.6 * sum(sizes[name] for name in whole[2])
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    (tmp_path / "work" / "checkpoint.safetensors").unlink()
    expected, history, _ = fit()
    assert measure_difference(whole[0], expected) < 1e-3  # as above
    for one, two in zip(history, whole[1], strict=True):
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
        np.testing.assert_allclose(one["validation_loss"], two["validation_loss"], rtol=1e-4)
