"""The loop: exact resume, both ways of reading, bad numbers, memory, objectives that need more than pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.training import feed
from braindecode_vis.training.augment import mix_trials
from braindecode_vis.training.loop import CHECKPOINT
from braindecode_vis.training.objectives.contrastive import BimixcoTerm, SoftClipTerm
from braindecode_vis.training.optimisation import read_checkpoint
from tests.training.toy_task import assert_same_weights, get_weights, make_config, make_task

EVERYTHING = {
    "objectives": [
        {"kind": "clip"}, {"kind": "mse"}, {"kind": "distillation"}, {"kind": "tcl"}, {"kind": "salient"},
        {"kind": "within_cluster"}, {"kind": "multiview", "views": ["brain_views", "image"]}, {"kind": "bimixco"},
    ],
    "augmentations": [
        {"kind": "channel_dropout"}, {"kind": "time_shift"}, {"kind": "gaussian_noise"}, {"kind": "smoothing"},
        {"kind": "trial_mixing"}, {"kind": "repetition_averaging"},
    ],
    "ema": 0.9, "batch_size": 8, "clip_norm": 1.0, "n_clusters": 3,
    "teacher": {"queue": 11}, "schedule": {"kind": "one_cycle", "warmup": 0.1},
    "selection": {"kind": "early_stopping", "hold_out": 0.2},
}  # fmt: skip


class Killed(Exception):
    pass


def kill_after(encoder, update):
    def progress(done, total, text):
        if done == update:
            raise Killed

    encoder.progress = progress


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_killed_run_continues_to_the_same_bits(tmp_path, seconds):
    """Killed in the middle of an epoch, with checkpoints after every update or none at all."""
    responses, targets = make_task(n_repetitions=3, subjects=("01", "02"))
    config = make_config(**EVERYTHING, checkpoint_seconds=seconds)
    whole = config.build(seed=0).fit(responses, targets)
    encoder = config.build(seed=0)
    encoder.workspace = tmp_path
    kill_after(encoder, 5)
    with pytest.raises(Killed):
        encoder.fit(responses, targets)
    assert (tmp_path / CHECKPOINT).exists() == (seconds == 0)
    again = config.build(seed=0)
    again.workspace, done = tmp_path, []
    again.progress = lambda n, total, text: done.append(n)
    again.fit(responses, targets)
    assert done[0] == (6 if seconds == 0 else 1)
    assert_same_weights(whole, again)
    for one, two in zip(whole.fitted.history, again.fitted.history, strict=True):
        for key in set(one) - {"seconds", "trials_per_second"}:
            assert one[key] == two[key], key
    lines = [json.loads(line)["epoch"] for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert lines == [0, 1, 2]


def test_mixing_ends_in_the_update_in_which_the_loss_changes(monkeypatch):
    """MindEye: both at epoch int(.33 epochs). Mixing went on to a third, so SoftCLIP saw mixed trials as whole ones."""
    seen = []

    def follow(data, subject, config, generator):
        seen.append(config is not None)
        return mix_trials(data, subject, config, generator)

    terms = []
    monkeypatch.setattr(feed, "mix_trials", follow)
    for term in (BimixcoTerm, SoftClipTerm):
        forward = term.forward
        monkeypatch.setattr(
            term,
            "forward",
            lambda self, outputs, forward=forward: terms.append(type(self)) or forward(self, outputs),
        )
    end = 49 / 150  # 49 of 150 epochs
    make_config(
        objectives=[{"kind": "bimixco", "phase": [0, end]}, {"kind": "soft_clip", "phase": [end, 1]}],
        augmentations=[{"kind": "trial_mixing"}], epochs=150, batch_size=24,
    ).build(seed=0).fit(*make_task(n_images=12))  # fmt: skip
    assert [BimixcoTerm if mixed else SoftClipTerm for mixed in seen] == terms
    assert sum(seen) * 150 == 49 * len(seen)


def test_a_finished_run_is_not_trained_again(tmp_path):
    responses, targets = make_task()
    first = make_config().build(seed=0)
    first.workspace = tmp_path
    first.fit(responses, targets)
    again = make_config().build(seed=0)
    again.workspace = tmp_path
    again.progress = lambda n, total, text: pytest.fail("trained again")
    assert_same_weights(first, again.fit(responses, targets))


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path):
    responses, targets = make_task()
    encoder = make_config().build(seed=0)
    encoder.workspace = tmp_path
    encoder.fit(responses, targets)
    for settings, data, message in (
        (
            {"network": {"kind": "eegproject", "width": 20}},
            targets,
            r"another architecture \(width: 12, now 20",
        ),
        (
            {"optimiser": {"lr": 1e-3}},
            targets,
            r"other settings \(optimiser.lr: 0.003, now 0.001",
        ),
        (
            {},
            Embeddings(targets.vectors, targets.ids, "other"),
            r"another target space \(space: toy, now other",
        ),
    ):
        other = make_config(**settings).build(seed=0)
        other.workspace = tmp_path
        with pytest.raises(DataError, match=message):
            other.fit(responses, data)
    other = make_config().build(seed=1)
    other.workspace = tmp_path
    with pytest.raises(DataError, match="another seed"):
        other.fit(responses, targets)
    (tmp_path / CHECKPOINT).write_bytes(b"cut")
    with pytest.raises(DataError, match=r"is damaged .* delete it"):
        encoder.fit(responses, targets)


@pytest.mark.parametrize("limit", [0, 1500])  # nothing fits, or the targets only
def test_reading_from_disk_gives_the_same_bits(tmp_path, limit):
    responses, targets = make_task(n_repetitions=3, subjects=("01", "02"))
    np.save(tmp_path / "data.npy", responses.data)
    mapped = replace(responses, data=np.load(tmp_path / "data.npy", mmap_mode="r"))
    settings = {
        "augmentations": [{"kind": "repetition_averaging"}, {"kind": "gaussian_noise"}],
        "subject_alignment": "euclidean", "input_scaling": {"kind": "robust", "clamp": 5},
    }  # fmt: skip
    resident = make_config(**settings).build(seed=0).fit(responses, targets)
    streamed = make_config(**settings, max_device_bytes=limit).build(seed=0).fit(mapped, targets)
    assert_same_weights(resident, streamed)


def test_a_lazy_view_is_read_by_ascending_rows_only():
    """The data of a large set are a view over a file: nothing but integer rows may be asked for."""
    responses, targets = make_task()
    asked = []

    class View(np.ndarray):
        def __getitem__(self, rows):
            if isinstance(rows, np.ndarray) and rows.dtype.kind == "i":
                assert (np.diff(rows) > 0).all()
                asked.append(len(rows))
                return np.asarray(super().__getitem__(rows))
            raise AssertionError(f"asked for {rows!r}")

    lazy = replace_data(responses, responses.data.view(View))
    config = make_config(max_device_bytes=0)
    assert_same_weights(config.build(seed=0).fit(lazy, targets), config.build(seed=0).fit(responses, targets))
    assert asked


def replace_data(responses, data):
    return type(responses).from_checked(
        data, responses.dims, responses.trials, responses.unit, responses.coords
    )


def test_the_first_bad_batch_is_saved_and_named(tmp_path):
    responses, targets = make_task(n_images=40)
    encoder = make_config(checkpoint_seconds=0, input_scaling={"kind": "none"}).build(seed=0)
    encoder.workspace = tmp_path
    bad = responses.data.copy()
    bad[7] = 3e38  # finite, but its squares are not
    with pytest.raises(
        DataError, match=r"the loss is nan at update \d+ .*bad_batch.npz.*last good checkpoint"
    ):
        encoder.fit(replace_data(responses, bad), targets)
    with np.load(tmp_path / "bad_batch.npz", allow_pickle=False) as saved:
        assert 7 in saved["trial"]
        assert saved["stimulus_id"][saved["trial"] == 7][0] == responses.stimulus_ids[7]
        np.testing.assert_array_equal(saved["data"], bad[saved["trial"]])
        update = int(saved["update"])
    found = read_checkpoint(tmp_path / CHECKPOINT)
    assert (found is None) == (update == 0)
    if found is not None:
        assert found[1]["counters"]["update"] == update
        assert all(torch.isfinite(t).all() for t in found[0].values())


def test_automatic_batches_are_halved_until_they_fit(monkeypatch, tmp_path):
    from braindecode_vis.encoders.atm import EEGProject

    responses, targets = make_task(n_images=150)
    forward = EEGProject.forward

    def hungry(self, data, subject):
        if len(data) > 10 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, data, subject)

    monkeypatch.setattr(EEGProject, "forward", hungry)
    encoder = make_config(batch_size="auto", epochs=1).build(seed=0)
    encoder.workspace = tmp_path
    encoder.fit(responses, targets)
    assert encoder.fitted.batch_size == 8
    assert encoder.messages == [
        f"out of memory: the training starts again with batches of {n} trials" for n in (16, 8)
    ]
    with pytest.raises(DataError, match="a batch of 16 trials does not fit"):
        make_config(batch_size=16).build(seed=0).fit(responses, targets)


def test_text_views_and_clusters_reach_the_objectives():
    responses, targets = make_task()
    config = make_config(
        objectives=[
            {"kind": "clip_image_text"},
            {"kind": "multiview", "views": ["brain", "image_views"]},
            {"kind": "within_cluster"},
        ],
        normalise_targets="centre",
    )  # fmt: skip
    ids = list(dict.fromkeys(targets.ids))
    rng = np.random.default_rng(0)

    def fit(text_seed, shift, clusters):
        encoder = config.build(seed=0)
        encoder.text_targets = _embed(ids, text_seed)
        encoder.image_views = (_embed(ids, 5), _embed(ids, 6 + shift))
        encoder.clusters = clusters
        return encoder.fit(responses, targets)

    clusters = {i: int(rng.integers(2)) for i in ids}
    first = fit(0, 0, clusters)
    for other in (fit(1, 0, clusters), fit(0, 1, clusters), fit(0, 0, dict.fromkeys(ids, 0))):
        assert any((get_weights(first)[k] != get_weights(other)[k]).any() for k in get_weights(first))
    encoder = config.build(seed=0)
    encoder.text_targets = _embed(ids[1:], 0)
    with pytest.raises(DataError, match="'image000'"):
        encoder.fit(responses, targets)


def _embed(ids, seed):
    return Embeddings(
        np.random.default_rng(seed).standard_normal((len(ids), 6)).astype(np.float32), ids, "text"
    )


def test_objectives_that_the_data_cannot_serve_are_refused():
    responses, targets = make_task(n_repetitions=1)
    views = make_config(objectives=[{"kind": "multiview", "views": ["brain_views", "image"]}])
    with pytest.raises(DataError, match="only one training trial"):
        views.build(seed=0).fit(responses, targets)
    with pytest.raises(DataError, match="one trial per image"):
        make_config(augmentations=[{"kind": "repetition_averaging"}]).build(seed=0).fit(responses, targets)
    responses, targets = make_task()
    views = make_config(objectives=[{"kind": "multiview", "views": ["brain", "image_views"]}])
    with pytest.raises(ConfigError, match="the target has only one vector per image; remove image_views"):
        views.build(seed=0).fit(responses, targets)
    late = replace(responses, coords={"times": np.arange(16) / 100})
    with pytest.raises(DataError, match="pre-stimulus samples"):
        make_config(objectives=[{"kind": "salient"}]).build(seed=0).fit(late, targets)


def test_bf16_trains_and_a_missing_tracker_is_named(tmp_path):
    responses, targets = make_task()
    encoder = make_config(precision="bf16", epochs=6).build(seed=0).fit(responses, targets)
    history = encoder.fitted.history
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(v.dtype == np.float32 for v in get_weights(encoder).values())
    try:
        import wandb  # noqa: F401
    except ImportError:
        other = make_config(log=["jsonl", "wandb"]).build(seed=0)
        other.workspace = tmp_path
        with pytest.raises(
            ConfigError, match=r"wandb, which is not installed: pip install 'braindecode_vis\[tracking"
        ):
            other.fit(responses, targets)


@pytest.mark.parametrize(
    ("last", "found"), [("even", [5, 5, 4, 4]), ("smaller", [5, 5, 5, 3]), ("dropped", [5, 5, 5])]
)
def test_the_last_batch_is_what_was_chosen(monkeypatch, last, found):
    """18 trials in batches of 5: four of almost one size, three full and a rest of three, or without the rest."""
    sizes = []
    load = feed.Feed.load
    monkeypatch.setattr(
        feed.Feed, "load", lambda self, plan: sizes.append(len(plan.units)) or load(self, plan)
    )
    config = make_config(last_batch=last, batch_size=5, epochs=1)
    config.build(seed=0).fit(*make_task(n_images=9))
    assert sizes == found


@pytest.mark.parametrize(
    ("per_image", "found"), [(3, {(3, 3, 3, 3, 3)}), (8, {(3, 3, 3, 3, 3)}), (None, None)]
)
def test_subjects_of_an_image_stand_in_one_batch(monkeypatch, per_image, found):
    """Batches of 16 have five images of three subjects, also where more are asked for than there are."""
    shown = set()
    load = feed.Feed.load

    def look(self, plan):
        counts = np.unique(self.train.stimuli[plan.units], return_counts=True)[1]
        shown.add(tuple(counts.tolist()))
        return load(self, plan)

    monkeypatch.setattr(feed.Feed, "load", look)
    responses, targets = make_task(n_images=30, n_repetitions=1, subjects=("01", "02", "03"))
    config = make_config(trials_per_image=per_image, last_batch="dropped", epochs=2)
    config.build(seed=0).fit(responses, targets)
    assert shown == found if found is not None else len(shown) > 1


@pytest.mark.parametrize(
    ("settings", "task", "sentence"),
    [
        ({"trials_per_image": 9}, {}, "trials_per_image is 9, but batch_size 16 has no room for two images"),
        (
            {"trials_per_image": 2},
            {"n_repetitions": 1},
            "trials_per_image puts 2 trials of an image into a batch, but no training image has two",
        ),
        (
            {"trials_per_image": 9, "batch_size": "auto"},
            {"n_images": 3, "n_repetitions": 9},
            "a batch of 16 trials has no room for two images of 9 trials each",
        ),
    ],
)
def test_trials_of_an_image_that_cannot_stand_together_are_refused(settings, task, sentence):
    with pytest.raises((ValueError, ConfigError), match=sentence):
        make_config(**settings).build(seed=0).fit(*make_task(**task))


@pytest.mark.parametrize(("most", "found"), [(1, {1}), (None, {1, 2, 3, 4}), (3, {1, 2, 3})])
def test_averages_are_of_as_many_repetitions_as_asked(monkeypatch, most, found):
    numbers = set()
    load = feed.Feed.load

    def look(self, plan):
        numbers.update((plan.draw.weights > 0).sum(axis=1).tolist())
        return load(self, plan)

    monkeypatch.setattr(feed.Feed, "load", look)
    config = make_config(augmentations=[{"kind": "repetition_averaging", "max_repetitions": most}])
    config.build(seed=0).fit(*make_task(n_repetitions=4))
    assert numbers == found
