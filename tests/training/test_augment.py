"""Augmentations."""

import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.training import augment
from braindecode_vis.training.augment import (
    BraindecodeAugmentationConfig,
    ChannelDropoutConfig,
    GaussianNoiseConfig,
    SmoothingConfig,
    SubjectMixingConfig,
    TimeShiftConfig,
    TrialMixingConfig,
    mix_trials,
)
from braindecode_vis.training.feed import augment_trials
from braindecode_vis.training.loop import Trainer
from tests.training.toy_task import make_config, make_task

SIGNAL = Signal(("channel", "time"), (6, 100), ("01",), sfreq=100.0)
VOXELS = Signal(("voxel",), (50,), ("01",))


@pytest.fixture
def data():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((40, 6, 100)).astype(np.float32))


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "config",
    [
        ChannelDropoutConfig(),
        TimeShiftConfig(),
        GaussianNoiseConfig(),
        SmoothingConfig(),
    ],
)
def test_the_generator_alone_decides(config, data):
    before = data.clone()
    torch.manual_seed(0)
    one = augment_trials(data, [config], make_generator(), SIGNAL)
    torch.manual_seed(1)
    assert torch.equal(one, augment_trials(data, [config], make_generator(), SIGNAL))
    assert not torch.equal(one, augment_trials(data, [config], make_generator(1), SIGNAL))
    assert torch.equal(data, before)
    assert one.shape == data.shape
    assert one.dtype == data.dtype


def test_channel_dropout_zeroes_whole_channels_at_its_rate():
    data = torch.ones(2000, 10, 3)
    found = ChannelDropoutConfig(probability=0.5, share=0.2).apply(data, make_generator(), SIGNAL)
    lost = found == 0
    assert (lost.all(-1) == lost.any(-1)).all()
    assert abs(float(lost.float().mean()) - 0.1) < 0.01
    voxels = ChannelDropoutConfig(probability=1, share=0.3).apply(
        torch.ones(500, 50), make_generator(), VOXELS
    )
    assert abs(float((voxels == 0).float().mean()) - 0.3) < 0.02


def test_time_shift_moves_and_pads_with_zero(data):
    found = TimeShiftConfig(max_shift=0.03).apply(data, make_generator(), SIGNAL)
    shifts = set()
    for before, after in zip(data, found, strict=True):
        for shift in range(-3, 4):
            expected = torch.zeros_like(before)
            if shift >= 0:
                expected[:, shift:] = before[:, : 100 - shift]
            else:
                expected[:, :shift] = before[:, -shift:]
            if torch.equal(expected, after):
                shifts.add(shift)
                break
        else:
            pytest.fail("not a shift")
    assert shifts == set(range(-3, 4))


def test_noise_has_its_share_of_the_deviation(data):
    noise = GaussianNoiseConfig(probability=1, scale=0.2).apply(5 * data, make_generator(), SIGNAL) - 5 * data
    assert abs(float(noise.std()) - 1.0) < 0.05


def test_smoothing_is_a_moving_average_of_some_channels(data):
    found = SmoothingConfig(probability=0.5).apply(data, make_generator(), SIGNAL)
    samples = data.numpy()
    smooth = np.stack([samples[..., max(0, t - 2) : t + 3].mean(-1) for t in range(100)], axis=-1)
    changed = (found != data).any(-1).numpy()
    np.testing.assert_allclose(found.numpy()[changed], smooth[changed], atol=1e-5)
    assert 0.35 < changed.mean() < 0.65


def test_mixing_gives_partner_and_share(data):
    config = TrialMixingConfig()
    one_subject = torch.zeros(40, dtype=torch.long)
    mixed, partner, weight = mix_trials(data, one_subject, config, make_generator())
    expected = data * weight[:, None, None] + data[partner] * (1 - weight)[:, None, None]
    torch.testing.assert_close(mixed, expected)
    alone = weight == 1
    assert torch.equal(partner[alone], torch.arange(40)[alone])
    assert 8 < int((~alone).sum()) < 32
    late = mix_trials(data, one_subject, None, make_generator())
    assert torch.equal(late[0], data)
    assert (late[2] == 1).all()


def test_trials_are_mixed_within_a_subject_only(monkeypatch):
    """MindEye2 mixes once per subject: x_i <- l x_i + (1 - l) x_p(i), p a permutation of that subject's rows.

    Mixed over the whole batch, 64 of 80 mixed trials of four subjects were sums of two brains' voxels.
    """
    subject = torch.tensor(
        [0, 1, 2, 3] * 40 + [4]
    )  # the last subject has one trial, which nothing is mixed into
    data = torch.eye(161)
    monkeypatch.setattr(augment, "_MIXED", 1.0)
    config = TrialMixingConfig()
    mixed, partner, weight = mix_trials(data, subject, config, make_generator())
    assert torch.equal(subject[partner], subject)
    assert partner.sort().values.tolist() == list(range(161))  # no trial is a partner twice
    assert float(weight[-1]) == 1.0
    assert int((weight < 1).sum()) > 140
    foreign = subject[:, None] != subject[None, :]
    assert not mixed[foreign].any()
    # every trial of a subject can be a partner of every other
    seen = {int(mix_trials(data, subject, config, make_generator(seed))[1][0]) for seed in range(200)}
    assert len(seen) > 35


@pytest.mark.parametrize("config", [TimeShiftConfig(), SmoothingConfig()])
def test_augmentations_of_time_refuse_voxels(config):
    with pytest.raises(ConfigError, match="needs a time axis"):
        config.apply(torch.zeros(3, 50), make_generator(), VOXELS)


def test_braindecode_augmentations_or_how_to_get_them(data):
    config = BraindecodeAugmentationConfig(name="FTSurrogate", probability=1)
    try:
        import braindecode.augmentation  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"braindecode_vis\[braindecode\]"):
            config.apply(data, make_generator(), SIGNAL)
        return
    one = config.apply(data, make_generator(), SIGNAL)
    assert torch.equal(one, config.apply(data, make_generator(), SIGNAL))
    assert not torch.equal(one, data)


def catch_batches(monkeypatch, responses, targets, **settings):
    """Return the assembled and augmented batches of a training, each with its feed and plan."""
    batches, make_batch = [], Trainer._make_batch

    def spy(self, plan, blocks):
        made = make_batch(self, plan, blocks)
        batches.append((self.feed, plan, made[0]))
        return made

    monkeypatch.setattr(Trainer, "_make_batch", spy)
    make_config(hide_subject=0.0, **settings).build(seed=0).fit(responses, targets)
    return batches


@pytest.mark.parametrize("averaged", [False, True])
def test_subject_mixing_adds_what_another_subject_saw_and_keeps_image_and_subject(monkeypatch, averaged):
    responses, targets = make_task(n_images=8, subjects=("01", "02", "03"))
    kinds = [{"kind": "subject_mixing"}, *([{"kind": "repetition_averaging"}] if averaged else [])]
    for feed, plan, batch in catch_batches(monkeypatch, responses, targets, augmentations=kinds, epochs=2):
        k = plan.draw.trials.shape[1] // 2
        units = feed.train
        for row, unit in enumerate(plan.units):
            trials, weights = plan.draw.trials[row], plan.draw.weights[row]
            assert weights.sum() == pytest.approx(1)
            assert 0.5 <= weights[:k].sum() <= 1
            used = trials[weights > 0]
            assert {feed.stimuli[t] for t in used} == {units.stimuli[unit]}
            own = trials[:k][weights[:k] > 0]
            other = trials[k:][weights[k:] > 0]
            assert {feed.subjects[t] for t in own} == {units.subjects[unit]}
            assert len({feed.subjects[t] for t in other}) == 1
            assert units.subjects[unit] not in {feed.subjects[t] for t in other}
            assert int(batch.subject[row]) == units.subjects[unit]
            mixed = (feed.data.resident[trials].numpy() * weights[:, None, None]).sum(axis=0)
            np.testing.assert_allclose(batch.data[row], mixed, rtol=1e-5, atol=1e-6)


def test_shares_of_subject_mixing_are_the_larger_part_of_a_beta():
    shares = SubjectMixingConfig(beta=0.5).draw_shares(20_000, np.random.default_rng(0))
    # the arcsine law folded at one half: P(share < s) = 2 (2 / pi arcsin(sqrt(s))) - 1
    for s in (0.6, 0.8, 0.95):
        expected = 4 / np.pi * np.arcsin(np.sqrt(s)) - 1
        assert float((shares < s).mean()) == pytest.approx(expected, abs=0.015)
    half = SubjectMixingConfig(probability=0.3).draw_shares(20_000, np.random.default_rng(0))
    assert float((half == 1).mean()) == pytest.approx(0.7, abs=0.015)


def test_subject_mixing_needs_an_image_that_two_subjects_saw():
    responses, targets = make_task(n_images=8)
    with pytest.raises(ConfigError, match="no training image was seen by two"):
        make_config(augmentations=[{"kind": "subject_mixing"}]).build(seed=0).fit(responses, targets)


def test_smoothing_once_shows_every_epoch_the_same_training_trials(monkeypatch):
    responses, targets = make_task(n_images=20)
    batches = catch_batches(
        monkeypatch, responses, targets, epochs=3, augmentations=[{"kind": "smoothing", "once": True}],
        selection={"kind": "last", "hold_out": 0.2}, input_scaling={"kind": "none"},
    )  # fmt: skip
    seen = {}
    for _, plan, batch in batches:
        for row, trial in enumerate(plan.draw.trials[:, 0]):
            assert torch.equal(batch.data[row], seen.setdefault(int(trial), batch.data[row]))
    rows = np.array(sorted(seen))
    assert 0 < len(rows) < 40
    held = np.setdiff1d(np.arange(40), rows)
    data = batches[0][0].data.resident.numpy()
    np.testing.assert_array_equal(data[held], responses.data[held])
    assert 0 < (data[rows] != responses.data[rows]).any(axis=-1).mean() < 0.6
    config = SmoothingConfig(once=True)
    block = np.random.default_rng(0).standard_normal((300, 6, 100)).astype(np.float32)
    found = config.smooth_once(block, np.arange(300), SIGNAL, seed=5)
    changed = (found != block).any(-1)
    assert changed.mean() == pytest.approx(0.3, abs=0.04)
    smooth = SmoothingConfig(probability=1).apply(torch.from_numpy(block), make_generator(), SIGNAL).numpy()
    np.testing.assert_allclose(found[changed], smooth[changed])
    np.testing.assert_array_equal(
        config.smooth_once(block[7:9], np.array([7, 8]), SIGNAL, seed=5), found[7:9]
    )
    np.testing.assert_array_equal(config.apply(torch.from_numpy(block), make_generator(), SIGNAL), block)
