"""Sample latents with the schedulers of diffusers, as plain functions.

Owns the noise schedule that training and sampling share, classifier-free guidance and the loop over steps. Knows
neither the network nor what the latents mean.

References
----------
Nichol, A. and Dhariwal, P. (2021). Improved denoising diffusion probabilistic models (cosine schedule).
arXiv:2102.09672.
Salimans, T. and Ho, J. (2022). Progressive distillation (velocity). arXiv:2202.00512.
Song, J. et al. (2021). Denoising diffusion implicit models. arXiv:2010.02502.
Lu, C. et al. (2022). DPM-Solver++. arXiv:2211.01095.
Ho, J. and Salimans, T. (2022). Classifier-free diffusion guidance. arXiv:2207.12598.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from braindecode_vis.checks import check_option

if TYPE_CHECKING:
    import torch

N_TIMES = 1000
SAMPLERS = ("ddim", "dpm-solver++")
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": N_TIMES,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",  # the first step is the last of the schedule, where training saw pure noise
}

Predict = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def compute_signal_and_noise(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the standard deviations of signal and noise at the given steps, each of the shape of `times`."""
    kept = _compute_kept_variance().to(times.device)[times]
    return kept.sqrt(), (1 - kept).sqrt()


@lru_cache(maxsize=1)
def _compute_kept_variance() -> torch.Tensor:
    """Return the variance of the signal at every step, shape (1000,)."""
    return make_scheduler("ddim").alphas_cumprod


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy latents ``a x + b e`` and the velocity ``a e - b x`` that a network is to predict.

    Parameters
    ----------
    latents, noise : tensors of shape (n, ...)
    times : int64 tensor of shape (n,)
        Steps of the schedule, 0 to 999.
    """
    a, b = (part.view(-1, *[1] * (latents.dim() - 1)) for part in compute_signal_and_noise(times))
    return a * latents + b * noise, a * noise - b * latents


def draw_times(n: int, generator: torch.Generator, *, bias: float) -> torch.Tensor:
    """Return the steps of the schedule at which a batch learns, int64 of shape (n,).

    Four of five come from a logit-normal distribution (Esser et al. 2024, arXiv:2403.03206) that leaves out the ends,
    where little can be learnt; one of five is drawn evenly, because sampling begins at the very end.

    Parameters
    ----------
    bias
        Mean before the logistic function: the larger, the more noise, where the condition matters most.
    """
    import torch

    even = torch.rand(n, generator=generator)
    middle = torch.sigmoid(bias + torch.randn(n, generator=generator))
    share = torch.where(torch.rand(n, generator=generator) < 0.2, even, middle)
    return (share * N_TIMES).long().clamp(max=N_TIMES - 1)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Return ``unconditional + guidance * (conditional - unconditional)``; 1 is no guidance, 0 no condition."""
    return unconditional + guidance * (conditional - unconditional)


def make_scheduler(sampler: str) -> Any:
    """Return the scheduler of diffusers behind a sampler's name.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    check_option("sampler", sampler, SAMPLERS)
    if sampler == "ddim":
        return DDIMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=True)
    return DPMSolverMultistepScheduler(**_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2)


def sample_latents(predict: Predict, noise: torch.Tensor, *, sampler: str, n_steps: int) -> torch.Tensor:
    """Denoise pure noise into latents; nothing is random here.

    Parameters
    ----------
    predict
        Gives the velocity of noisy latents at one step per row: ``predict(latents, times)``.
    noise : tensor of shape (n, ...)
        Where the sampler starts.
    sampler
        ``ddim`` (first order, without fresh noise) or ``dpm-solver++`` (second order).
    n_steps
        Steps, each of one call of `predict`.
    """
    import torch

    scheduler = make_scheduler(sampler)
    with warnings.catch_warnings():  # diffusers converts a tensor in a way that NumPy 2 calls outdated
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(n_steps, device=noise.device)
    latents = noise
    for time in scheduler.timesteps:
        times = torch.full((len(latents),), int(time), dtype=torch.int64, device=latents.device)
        latents = scheduler.step(predict(latents, times), time, latents).prev_sample
    return latents
