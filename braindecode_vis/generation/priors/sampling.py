"""Noise schedules, guidance and samplers of diffusion models, as plain functions on the schedulers of diffusers.

Shared by the diffusion prior and by the embedded generator. A sampler is given a function that predicts and a start of
pure noise; it knows no network and not what the rows mean (embeddings or latents of images).

References
----------
Ho et al. (2020), DDPM, arXiv:2006.11239; Song et al. (2021), DDIM, arXiv:2010.02502; Ramesh et al. (2022), DALL-E 2,
arXiv:2204.06125 (the clean embedding predicted); Scotti et al. (2024), MindEye2, arXiv:2403.11207; Nichol and Dhariwal
(2021), cosine schedule, arXiv:2102.09672; Salimans and Ho (2022), velocity, arXiv:2202.00512; Lu et al. (2022),
DPM-Solver++, arXiv:2211.01095; Ho and Salimans (2022), classifier-free guidance, arXiv:2207.12598.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from braindecode_vis.base.checks import check_option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Sampler = Literal["ddpm", "ddim", "dpm-solver++", "stochastic-ddim"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["trailing", "leading"]
Predict = Callable[["Tensor", "Tensor"], "Tensor"]

SAMPLERS: tuple[str, ...] = get_args(Sampler)


@dataclass(frozen=True)
class NoiseSchedule:
    """How noise grows over the steps of the diffusion, and what the network predicts of it.

    Parameters
    ----------
    n_timesteps
        Number of steps in training.
    betas
        ``linear`` (1e-4 to 0.02, the default of DDPM) or ``squaredcos_cap_v2`` (cosine).
    prediction
        ``epsilon``, the noise; ``v_prediction``, its mixture with the signal; or ``sample``, the clean rows (MindEye2).
    spacing
        Which steps are sampled: ``trailing`` begins at the last one, where training saw pure noise; ``leading``, the
        default of diffusers and so of ATM, at the first step of the last of equal pieces (980 of 1000 with 50).
    """

    n_timesteps: int = 1000
    betas: Literal["linear", "squaredcos_cap_v2"] = "linear"
    prediction: Prediction = "epsilon"
    spacing: Spacing = "trailing"

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that all schedulers of diffusers share."""
        return {
            "num_train_timesteps": self.n_timesteps,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": self.betas,
            "prediction_type": self.prediction,
            "timestep_spacing": self.spacing,
        }

    def compute_signal(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the share of signal variance left at each step, a float tensor of shape (n_timesteps,)."""
        return _compute_signal(self, str(device))

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return noised rows ``a x + b e`` and what a network is to predict: e, the velocity ``a e - b x``, or x.

        Parameters
        ----------
        clean, noise : tensors of shape (n, ...)
        timesteps : int64 tensor of shape (n,)
            Steps of the schedule, 0 to n_timesteps - 1.
        """
        a, b = self._weigh(timesteps, clean)
        wanted = {"epsilon": noise, "sample": clean}.get(self.prediction)
        return a * clean + b * noise, a * noise - b * clean if wanted is None else wanted

    def find_clean(self, output: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean rows that an output of the network implies.

        Parameters
        ----------
        output, noised : tensors of shape (n, ...)
            What the network predicts of the noised rows.
        timesteps : int64 tensor of shape (n,) or ()
        """
        if self.prediction == "sample":
            return output
        a, b = self._weigh(timesteps, noised)
        return (noised - b * output) / a if self.prediction == "epsilon" else a * noised - b * output

    def _weigh(self, timesteps: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of signal and noise at steps, in a shape that broadcasts against the rows."""
        signal = self.compute_signal(rows.device)[timesteps.long()]
        share = signal.reshape(-1, *[1] * (rows.ndim - 1)) if signal.ndim else signal
        return share.sqrt(), (1 - share).sqrt()


@lru_cache(maxsize=8)  # a training asks at every step
def _compute_signal(schedule: NoiseSchedule, device: str) -> Tensor:
    import torch
    from diffusers import DDPMScheduler

    # What is made while sampling without gradients could not be used by a training afterwards.
    with torch.inference_mode(False):
        scheduler: Any = DDPMScheduler(**schedule.settings, clip_sample=False)
        return scheduler.alphas_cumprod.to(device)


def draw_times(n: int, generator: torch.Generator, *, bias: float, n_timesteps: int = 1000) -> Tensor:
    """Return steps of a schedule at which a batch learns, int64 of shape (n,).

    Four of five come from a logit-normal distribution (Esser et al. 2024, arXiv:2403.03206) that leaves out the ends,
    where little can be learnt; one of five is drawn evenly, because sampling begins at the very end.

    Parameters
    ----------
    n
        Rows of the batch.
    generator
        On the CPU.
    bias
        Mean before the logistic function: the larger, the more noise, where the condition matters most.
    n_timesteps
        Steps of the schedule.
    """
    import torch

    even = torch.rand(n, generator=generator)
    middle = torch.sigmoid(bias + torch.randn(n, generator=generator))
    share = torch.where(torch.rand(n, generator=generator) < 0.2, even, middle)
    return (share * n_timesteps).long().clamp(max=n_timesteps - 1)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return ``unconditional + scale * (conditional - unconditional)``; 1 is no guidance, 0 no condition."""
    return unconditional + scale * (conditional - unconditional)


def guide_network(network: Callable[..., Tensor], condition: Tensor, scale: float) -> Predict:
    """Return a function that predicts with a network of `diffusion_networks` under classifier-free guidance.

    Parameters
    ----------
    network
        Called with the noised rows, their steps, the condition and the flags that keep it.
    condition : tensor of shape (n, ...)
    scale
        1 is the plain conditional prediction, 0 the unconditional one; papers that write (1 + w) mean scale = 1 + w.
    """
    import torch

    n = len(condition)
    ones = torch.ones(n, device=condition.device)

    def predict(noised: Tensor, timestep: Tensor) -> Tensor:
        steps = timestep.to(condition.device).expand(n)
        if scale in (0.0, 1.0):
            return network(noised, steps, condition, ones * scale)
        # One call of the network on 2 n rows: with the condition, and without.
        both = network(
            torch.cat([noised, noised]), torch.cat([steps, steps]), torch.cat([condition, condition]),
            torch.cat([ones, ones * 0]),
        )  # fmt: skip
        conditional, unconditional = both.chunk(2)
        return guide(conditional, unconditional, scale)

    return predict


def bound_signal(predict: Predict, schedule: NoiseSchedule, low: Tensor, high: Tensor) -> Predict:
    """Return `predict` with the clean signal that it implies held between `low` and `high`.

    A small error of the predicted noise at the noisiest steps implies a clean signal far from any training row; where
    nothing stops it, the sample leaves the region that the network knows and does not return. DDPM's own pipeline
    clips pixels to their range for the same reason.

    Parameters
    ----------
    predict
        Predicts what the schedule says.
    schedule
        The noise schedule.
    low, high : tensors that broadcast against the rows
        Bounds of each value.
    """
    signal = schedule.compute_signal(low.device)

    def bounded(noised: Tensor, timestep: Tensor) -> Tensor:
        clean = schedule.find_clean(predict(noised, timestep), noised, timestep).clamp(low, high)
        if schedule.prediction == "sample":
            return clean
        share = signal[timestep.long()]
        a, b = share.sqrt(), (1 - share).sqrt()
        # The noise that goes with the bounded signal, not the predicted one: together they must give `noised` again.
        noise = (noised - a * clean) / b
        return noise if schedule.prediction == "epsilon" else a * noise - b * clean

    return bounded


def make_scheduler(sampler: str, schedule: NoiseSchedule) -> Any:
    """Return the scheduler of diffusers behind a sampler's name."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    if sampler == "ddpm":
        return DDPMScheduler(**schedule.settings, clip_sample=False)
    if sampler == "ddim":
        return DDIMScheduler(**schedule.settings, clip_sample=False, set_alpha_to_one=True)
    return DPMSolverMultistepScheduler(
        **schedule.settings, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=True
    )


def draw_samples(
    predict: Predict,
    start: Tensor,
    schedule: NoiseSchedule,
    *,
    sampler: str,
    n_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Denoise pure noise into samples of the same shape.

    Parameters
    ----------
    predict
        Gives what the schedule says of noised rows at a step: ``predict(noised, timestep)``.
    start : tensor of shape (n, ...)
        Noise of unit variance.
    schedule
        The one that the network was trained under.
    sampler
        ``ddpm`` adds noise at every step but the last; ``ddim`` (first order) and ``dpm-solver++`` (second order,
        multistep) follow a path without noise. ``stochastic-ddim`` is DDIM with as much noise as DDPM (eta 1) at the
        steps of dalle2-pytorch, by which MindEye2 samples.
    n_steps
        Steps, each of one call of `predict`; of ``stochastic-ddim`` one call less, since its list of steps counts the
        end. 20 of 100 are 19 calls at 94, 89 and so on to 4.
    generator
        Of the noise of ``ddpm`` and ``stochastic-ddim``.

    Raises
    ------
    ConfigError
        If the sampler is unknown.
    """
    check_option("sampler", sampler, SAMPLERS)
    if sampler == "stochastic-ddim":
        return _draw_stochastic(predict, start, schedule, n_steps, generator)
    scheduler = make_scheduler(sampler, schedule)
    with warnings.catch_warnings():  # DPM-Solver++ of diffusers hands a tensor to NumPy in the old way
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(n_steps, device=start.device)
    rows = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(rows, timestep), timestep)
        rows = scheduler.step(output, timestep, rows, generator=generator).prev_sample
    return rows


def _draw_stochastic(
    predict: Predict, start: Tensor, schedule: NoiseSchedule, n_steps: int, generator: torch.Generator | None
) -> Tensor:
    import torch

    signal = schedule.compute_signal(start.device)
    # The share of signal of the step before, and 1 before the first: what dalle2-pytorch takes at a step, although the
    # noise that a prediction implies is that of the step itself. Even a perfect network's samples go too far by it, the
    # farther the more steps: a mean of -2 comes out as -2.26 with 20 of 100 steps, and as -2.80 with 50. MindEye2's
    # numbers were made with it.
    before = torch.cat([signal.new_ones(1), signal[:-1]])
    times = torch.linspace(-1, schedule.n_timesteps, n_steps + 1)[:-1].int().tolist()
    rows = start
    for time, following in pairwise(reversed(times)):
        timestep = torch.tensor(time, device=start.device)
        clean = schedule.find_clean(predict(rows, timestep), rows, timestep)
        if following < 0:
            return clean
        noise = (rows - signal[time].sqrt() * clean) / (1 - signal[time]).sqrt()
        now, then = before[time], before[following]
        added = ((1 - now / then) * (1 - then) / (1 - now)).sqrt()  # deviation of the fresh noise, eta 1
        kept = (1 - then - added**2).clamp(min=0).sqrt()
        fresh = torch.randn(rows.shape, generator=generator).to(rows.device)  # equal on a CPU and a GPU
        rows = then.sqrt() * clean + added * fresh + kept * noise
    raise ValueError(f"{n_steps} step(s) give no call of the network; set two or more steps.")
