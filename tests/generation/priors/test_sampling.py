import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from braindecode_vis.base.seeds import make_torch_generator
from braindecode_vis.generation.priors.diffusion_networks import (
    BrainTokenTransformer,
    MlpUnet,
    TokenTransformer,
    _code_time,
    embed_timesteps,
)
from braindecode_vis.generation.priors.sampling import (
    SAMPLERS,
    NoiseSchedule,
    bound_signal,
    draw_samples,
    draw_times,
    guide_network,
)

NOISY = ("ddpm", "stochastic-ddim")


def predict_gaussian(schedule, mean, std):
    """The best possible prediction where clean rows are Gaussian."""
    signal = schedule.compute_signal()

    def predict(noised, timestep):
        a, b = signal[timestep].sqrt(), (1 - signal[timestep]).sqrt()
        noise = b * (noised - a * mean) / (a**2 * std**2 + b**2)
        if schedule.prediction == "epsilon":
            return noise
        clean = mean + a * std**2 * (noised - a * mean) / (a**2 * std**2 + b**2)
        return clean if schedule.prediction == "sample" else a * noise - b * clean

    return predict


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"stochastic-ddim"}))
def test_a_perfect_predictor_gives_the_data_distribution(name, prediction):
    schedule = NoiseSchedule(1000, "linear", prediction)
    start = torch.randn(4000, 2, generator=make_torch_generator(0, "start"))
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.5])
    drawn = draw_samples(
        predict_gaussian(schedule, mean, std),
        start,
        schedule,
        sampler=name,
        n_steps=250 if name == "ddpm" else 50,
        generator=make_torch_generator(0, "x"),
    )
    # 4000 draws: standard error of a mean 0.024, of a deviation 0.017; few large steps with noise lose spread.
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.09)
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.09)


@pytest.mark.parametrize(
    "n_steps, mean, std", [(20, (1.04, -2.26), (0.39, 1.39)), (50, (1.09, -2.80), (0.39, 1.58))]
)
def test_the_released_sampler_of_mindeye2_goes_too_far(n_steps, mean, std):
    """A perfect predictor's samples pass beyond the data, the farther the more steps: shares of signal and noise are
    those of the step before. That is the public code's, which the test of `joint` holds; DDPM gives -2.01 at 20 steps.
    """
    schedule = NoiseSchedule(100, "squaredcos_cap_v2", "sample")
    predict = predict_gaussian(schedule, torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.5]))
    start = torch.randn(4000, 2, generator=make_torch_generator(0, "start"))
    drawn = draw_samples(
        predict,
        start,
        schedule,
        sampler="stochastic-ddim",
        n_steps=n_steps,
        generator=make_torch_generator(0, "x"),
    )
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.09)  # 4000 draws: standard error at most 0.025
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.09)


def test_only_some_samplers_add_noise_on_the_way_and_seeds_decide():
    schedule, start = NoiseSchedule(), torch.randn(6, 3, generator=make_torch_generator(0))
    predict = predict_gaussian(schedule, torch.zeros(3), torch.ones(3))

    def draw(name, seed):
        generator = make_torch_generator(seed)
        return draw_samples(predict, start, schedule, sampler=name, n_steps=5, generator=generator)

    for name in SAMPLERS:
        assert torch.equal(draw(name, 1), draw(name, 1))
        assert torch.equal(draw(name, 1), draw(name, 2)) == (name not in NOISY)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance_is_the_stated_formula(scale):
    def network(noised, steps, condition, keep):
        return noised + condition * keep[:, None] * steps[:, None]

    rows, condition = torch.ones(3, 2), torch.arange(6.0).reshape(3, 2)
    got = guide_network(network, condition, scale)(rows, torch.tensor(7))
    torch.testing.assert_close(got, rows + scale * 7 * condition)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_bounds_hold_the_implied_signal_and_change_nothing_inside(prediction):
    schedule = NoiseSchedule(1000, "linear", prediction)
    predict = predict_gaussian(schedule, torch.tensor(0.0), torch.tensor(1.0))
    rows, timestep = torch.tensor([[0.1], [30.0]]), torch.tensor(400)
    low, high = torch.tensor(-2.0), torch.tensor(2.0)
    free, held = predict(rows, timestep), bound_signal(predict, schedule, low, high)(rows, timestep)
    torch.testing.assert_close(held[0], free[0])
    a = schedule.compute_signal()[400].sqrt()
    b = (1 - a**2).sqrt()
    clean = {"epsilon": (rows - b * held) / a, "v_prediction": a * rows - b * held, "sample": held}[
        prediction
    ]
    torch.testing.assert_close(clean[1], torch.tensor([2.0]))


def test_leading_steps_with_unit_clip_are_the_default_scheduler_of_diffusers():
    """What ATM samples with: t = 980, 960 ... 0 of 50 steps, x0 = (x - b e) / a held to [-1, 1], then the mean of
    q(x' | x, x0) and noise of its variance. Same starts and same noise give the same samples.
    """
    schedule = NoiseSchedule(spacing="leading")
    start = 3 * torch.randn(40, 4, generator=make_torch_generator(0))
    one = torch.ones(4)

    def predict(rows, timestep):  # a poor network, whose implied signal leaves the range at the noisy steps
        return 0.9 * rows

    bounded = bound_signal(predict, schedule, -one, one)
    drawn = draw_samples(
        bounded, start, schedule, sampler="ddpm", n_steps=50, generator=make_torch_generator(1)
    )
    default = DDPMScheduler()
    default.set_timesteps(50)
    generator, rows = make_torch_generator(1), start
    for timestep in default.timesteps:
        rows = default.step(predict(rows, timestep), timestep, rows, generator=generator).prev_sample
    torch.testing.assert_close(drawn, rows, atol=1e-5, rtol=1e-5)
    assert default.timesteps.tolist() == list(range(980, -1, -20))
    signal, generator, rows = schedule.compute_signal(), make_torch_generator(1), start
    for t in range(980, -1, -20):
        now, before = signal[t], signal[t - 20] if t else torch.tensor(1.0)
        clean = ((rows - (1 - now).sqrt() * 0.9 * rows) / now.sqrt()).clamp(-1, 1)
        alpha = now / before
        mean = (
            before.sqrt() * (1 - alpha) / (1 - now) * clean + alpha.sqrt() * (1 - before) / (1 - now) * rows
        )
        noise = torch.randn(rows.shape, generator=generator) if t else 0.0
        rows = mean + ((1 - alpha) * (1 - before) / (1 - now)).sqrt() * noise
    torch.testing.assert_close(drawn, rows, atol=1e-4, rtol=1e-4)


def test_the_time_code_is_cosines_then_sines():
    code = embed_timesteps(torch.tensor([0, 3]), 8)
    np.testing.assert_allclose(code[0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(code[1, [0, 4]], [np.cos(3), np.sin(3)], rtol=1e-6)
    np.testing.assert_allclose(code[1, 5], np.sin(3 / 10), rtol=1e-5)


def test_the_unet_of_the_paper_has_its_widths_and_skips():
    net = MlpUnet(1024, 1024, widths=(1024, 512, 256, 128, 64), time_features=512, dropout=0.1)
    assert [level.block[0].out_features for level in net.down] == [512, 256, 128, 64]
    assert [level.block[0].out_features for level in net.up] == [128, 256, 512, 1024]
    assert [level.condition.in_features for level in [*net.down, *net.up]] == [1024] * 8
    assert net.exit.out_features == 1024
    assert sum(p.numel() for p in net.parameters()) == 9_675_648  # as ATM's class
    # ATM's entry has no dropout, the blocks have it
    assert [level.block[3].p for level in [*net.down, *net.up]] == [0.1] * 8
    assert net.entry[3].p == 0.0


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_sample_without_condition_does_not_see_it_and_others_do(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        net, shape = MlpUnet(6, 6, widths=(16, 8), time_features=8, dropout=0.1), (6,)
    else:
        net = TokenTransformer(5, 6, 5, 6, width=16, depth=2, n_heads=2, time_features=8, dropout=0.1)
        shape = (5, 6)
    net.eval()
    rows, steps, keep = torch.randn(2, *shape), torch.tensor([10, 500]), torch.tensor([1.0, 0.0])
    one, two = (net(rows, steps, torch.randn(2, *shape), keep) for _ in range(2))
    assert one.shape == rows.shape
    assert torch.equal(one[1], two[1])
    assert not torch.allclose(one[0], two[0])
    later = net(rows, steps + 100, torch.randn(2, *shape), keep)
    assert not torch.allclose(later[1], one[1])


def test_times_of_training_follow_their_generator_alone_and_their_two_distributions():
    """One of five even, the rest logit-normal: shares by numerical integration, three standard errors."""
    torch.manual_seed(1)
    first = draw_times(40_000, make_torch_generator(5), bias=0.5)
    torch.manual_seed(2)
    assert torch.equal(first, draw_times(40_000, make_torch_generator(5), bias=0.5))
    logits = 0.5 + np.random.default_rng(0).standard_normal(400_000)
    middle = 1 / (1 + np.exp(-logits))
    for bound in (0.05, 0.3, 0.6, 0.9, 0.97):
        expected = 0.2 * bound + 0.8 * (middle < bound).mean()
        np.testing.assert_allclose((first < 1000 * bound).float().mean(), expected, atol=0.0075)
    assert first.dtype == torch.int64
    assert first.max() == 999
    assert draw_times(4000, make_torch_generator(5), bias=9.0, n_timesteps=10).max() == 9


@pytest.mark.parametrize("n_features", [1, 2, 3, 6, 7])
def test_times_have_a_code_of_as_many_features_as_are_asked_for(n_features):
    """Sines, then cosines, of periods from 2 pi to 2 pi 10 000; an odd number ends in 0."""
    times = torch.tensor([0.0, 1.0, 250.0])
    half = max(1, n_features // 2)
    rates = [10_000 ** -(k / max(1, half - 1)) for k in range(half)]
    wanted = np.zeros((3, max(n_features, 2 * half)))
    for row, time in enumerate(times.tolist()):
        wanted[row, :half] = np.sin(time * np.array(rates))
        wanted[row, half : 2 * half] = np.cos(time * np.array(rates))
    np.testing.assert_allclose(_code_time(times, n_features), wanted[:, :n_features], atol=1e-4)


def test_the_last_norm_of_tokens_takes_their_size_off_however_small_it_is():
    """By their largest value first: the deviation of tokens of 1e-4 is below what a norm adds to it.

    Attention (`_DirectionAttention`) and the layer behind it add nothing here.
    """
    network = BrainTokenTransformer(2, 4, depth=1, n_heads=2, head_width=8)
    torch.nn.init.zeros_(network.attention[0].exit_norm.gain)
    torch.nn.init.zeros_(network.mixing[0].exit.weight)
    tokens = torch.tensor([[[0.5, -1.0, 0.25, 1.0], [0.1, 0.7, -0.2, 0.3]]])
    for size in (1.0, 1e-4):
        found = network(size * tokens - network.places, torch.tensor([5]), tokens, torch.ones(1))
        normed = (tokens - tokens.mean(-1, keepdim=True)) / tokens.std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(
            found, network.exit(normed), atol=2e-3, rtol=1e-3
        )  # 1e-5 beside the variance
