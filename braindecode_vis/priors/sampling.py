"""Samplers of the diffusion prior as plain functions on the schedulers of diffusers.

A sampler is given a function that predicts and a start of pure noise; it knows no network and no embedding. Steps are
spread over the whole schedule so that the first one sees the noisiest state (``trailing`` spacing).

References
----------
Ho et al. (2020), DDPM, arXiv:2006.11239; Song et al. (2021), DDIM, arXiv:2010.02502; Lu et al. (2022), DPM-Solver++,
arXiv:2211.01095; Ho and Salimans (2022), classifier-free guidance, arXiv:2207.12598.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Sampler = Literal["ddpm", "ddim", "dpm-solver++"]
Prediction = Literal["epsilon", "v_prediction"]
Predict = Callable[["Tensor", "Tensor"], "Tensor"]


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
        ``epsilon``, the noise, or ``v_prediction``, its mixture with the signal.
    """

    n_timesteps: int = 1000
    betas: Literal["linear", "squaredcos_cap_v2"] = "linear"
    prediction: Prediction = "epsilon"

    @property
    def settings(self) -> dict[str, Any]:
        """What all schedulers of diffusers are told."""
        return {
            "num_train_timesteps": self.n_timesteps,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": self.betas,
            "prediction_type": self.prediction,
            "timestep_spacing": "trailing",
        }

    def compute_signal(self) -> Tensor:
        """Return the share of signal variance left at each step, a float tensor of shape (n_timesteps,)."""
        from diffusers import DDPMScheduler

        scheduler: Any = DDPMScheduler(**self.settings, clip_sample=False)
        return scheduler.alphas_cumprod


def guide(network: Callable[..., Tensor], condition: Tensor, scale: float) -> Predict:
    """Return a predicting function under classifier-free guidance: unconditional + scale * (conditional - it).

    Parameters
    ----------
    network
        Called with the noised rows, their steps, the condition and the flags of `networks`.
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
        both = network(
            torch.cat([noised, noised]), torch.cat([steps, steps]), torch.cat([condition, condition]),
            torch.cat([ones, ones * 0]),
        )  # fmt: skip
        with_condition, without = both.chunk(2)
        return without + scale * (with_condition - without)

    return predict


def bound_signal(predict: Predict, schedule: NoiseSchedule, low: Tensor, high: Tensor) -> Predict:
    """Return `predict` with the clean signal that it implies held between `low` and `high`.

    A small error of the predicted noise at the noisiest steps implies a clean signal far from any training row; where
    nothing stops it, the sample leaves the region that the network knows and does not return. DDPM's own pipeline
    clips pixels to their range for the same reason.

    Parameters
    ----------
    predict
        Predicts noise or v, as the schedule says.
    schedule
        The noise schedule.
    low, high : tensors that broadcast against the rows
        Bounds of each value.
    """
    signal = schedule.compute_signal().to(low.device)

    def bounded(noised: Tensor, timestep: Tensor) -> Tensor:
        output = predict(noised, timestep)
        share = signal[timestep.long()]
        a, b = share.sqrt(), (1 - share).sqrt()
        epsilon = schedule.prediction == "epsilon"
        clean = (noised - b * output) / a if epsilon else a * noised - b * output
        noise = (noised - a * clean.clamp(low, high)) / b
        return noise if epsilon else a * noise - b * clean.clamp(low, high)

    return bounded


def sample_ddpm(
    predict: Predict, start: Tensor, schedule: NoiseSchedule, *, n_steps: int, generator: torch.Generator
) -> Tensor:
    """Return samples of shape `start` by ancestral sampling, which adds noise at every step but the last."""
    from diffusers import DDPMScheduler

    return _run(DDPMScheduler(**schedule.settings, clip_sample=False), predict, start, n_steps, generator)


def sample_ddim(
    predict: Predict, start: Tensor, schedule: NoiseSchedule, *, n_steps: int, generator: torch.Generator
) -> Tensor:
    """Return samples of shape `start` along DDIM's path without noise (eta 0)."""
    from diffusers import DDIMScheduler

    return _run(DDIMScheduler(**schedule.settings, clip_sample=False), predict, start, n_steps, generator)


def sample_dpm_solver(
    predict: Predict, start: Tensor, schedule: NoiseSchedule, *, n_steps: int, generator: torch.Generator
) -> Tensor:
    """Return samples of shape `start` by the second-order multistep DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **schedule.settings, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=True
    )
    return _run(scheduler, predict, start, n_steps, generator)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpm-solver++": sample_dpm_solver,
}


def _run(scheduler: Any, predict: Predict, start: Tensor, n_steps: int, generator: torch.Generator) -> Tensor:
    with warnings.catch_warnings():  # DPM-Solver++ of diffusers hands a tensor to NumPy in the old way
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(n_steps, device=start.device)
    rows = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(rows, timestep), timestep)
        rows = scheduler.step(output, timestep, rows, generator=generator).prev_sample
    return rows
