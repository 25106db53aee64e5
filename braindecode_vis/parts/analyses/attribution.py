"""Which input a network uses: integrated gradients of the similarity to the seen image.

Owns attribution for trained networks, computed by captum: along the path from an empty trial (zero after the network's
own scaling) to the real one, how much each sample adds to the cosine with the image's embedding. The length of the
prediction is held at its final value: an empty trial is predicted near the centre of the comparison, where a cosine has
no value. The attributions of a trial sum to its cosine less the part that the empty trial has already; how exactly is
reported. An attribution explains the network, not the brain.

References
----------
Sundararajan et al. (2017), arXiv:1703.01365.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError, require
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.parts.analyses.measure import (
    check_retrieval,
    compute_interval,
    describe_limits,
    find_best,
)
from braindecode_vis.parts.analyses.patterns import list_columns
from braindecode_vis.parts.analyses.study import Findings, Plot, Study, complete_encoder, show_chosen
from braindecode_vis.report.drawing import draw_bars, draw_curve, mark_stimulus
from braindecode_vis.scoring.retrieval import fit_centre

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class IntegratedGradientsConfig(Analysis):
    """Attribute the similarity to the seen image to channels and samples.

    Parameters
    ----------
    batch_size
        Number of points computed together; it does not change the result.
    """

    packages: ClassVar[tuple[str, ...]] = ("captum",)

    kind: Literal["integrated_gradients"] = "integrated_gradients"
    batch_size: int = Field(default=256, ge=1)

    #: Points on the path; captum's default.
    n_steps: ClassVar[int] = 50
    #: Test trials of each fold that are explained, the first ones.
    max_trials: ClassVar[int] = 200
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_steps", "max_trials"})

    not_hashed: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    def compute(self, study: Study) -> Findings:
        """Explain the test trials of every fold."""
        check_retrieval(study, self.kind)
        parts, clusters, subjects, errors = [], [], [], []
        for number, fold in enumerate(study.folds):
            test = study.pick(fold.test, "test")
            test = test.select(np.arange(min(self.max_trials, test.n_trials)))
            values, error = explain_trials(
                study, number, test, n_steps=self.n_steps, batch_size=self.batch_size
            )
            parts.append(values)
            errors.append(error)
            clusters.append(study.find_clusters(test))
            subjects.append(test.trials["subject"].to_numpy(dtype=object))
        rows = _tabulate(study, np.concatenate(parts), np.concatenate(clusters), np.concatenate(subjects))
        return _report(study, pd.DataFrame(rows), max(errors))


def explain_trials(
    study: Study, number: int, test: Responses, *, n_steps: int = 50, batch_size: int = 256
) -> tuple[np.ndarray, float]:
    """Return the attribution of every value of every trial, and the largest error of their sums.

    Returns
    -------
    values : array of shape (n_trials, ...)
        In units of cosine similarity.
    error
        Largest difference of a trial's sum from the rise of the cosine, which the number of steps leaves.

    Raises
    ------
    ConfigError
        If captum is not installed, or the encoder is no network.
    """
    import torch
    from torch.nn import functional

    gradients = _open_captum()
    encoder, test, keep = show_chosen(study.trained(number), test)
    fit: Any = getattr(encoder, "fitted", None)
    if not hasattr(fit, "model") or not hasattr(fit, "transform"):
        raise ConfigError(
            f"integrated gradients need a network, but the encoder is a {type(encoder).__name__}; use occlusion or "
            "spatial_patterns."
        )
    model = fit.model.eval()
    device = next(model.parameters()).device
    names = test.trials["subject"].astype(str).to_numpy(dtype=object)
    transform = fit.transform.with_subjects_of(test.data, names)
    data = torch.from_numpy(transform.read(test.data, np.arange(test.n_trials), names)).to(device)
    subject = torch.from_numpy(fit.signal.index_subjects(names)).to(device)
    mean, goals = _prepare_goals(study, number, encoder, test)
    mean, goals = mean.to(device), goals.to(device)

    def centre(trials: Any, whose: Any) -> Any:
        predicted = model.encode_brain(trials, whose)
        if not model.learns_space:
            predicted = model.target_scale.undo(predicted)
        return predicted - mean

    def measure(trials: Any, whose: Any, goal: Any, length: Any) -> Any:
        return (centre(trials, whose) * goal).sum(dim=1) / length

    goals = functional.normalize(goals, dim=1)  # (n_trials, n_features): a product with them is a cosine
    with torch.no_grad():
        chunks = [slice(s, s + batch_size) for s in range(0, len(data), batch_size)]
        lengths = torch.cat([centre(data[c], subject[c]).norm(dim=1) for c in chunks]).clamp_min(1e-12)
    values, error = np.empty(tuple(data.shape), np.float32), 0.0
    # Gradients of the input alone are asked for; those of the weights would double time and memory.
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        for row in range(len(data)):  # one trial at a time: captum expands each into all its steps
            part = slice(row, row + 1)
            one = data[part]
            found, delta = gradients(measure).attribute(
                one, torch.zeros_like(one), additional_forward_args=(subject[part], goals[part], lengths[part]),
                n_steps=n_steps, internal_batch_size=batch_size, return_convergence_delta=True,
            )  # fmt: skip
            values[row] = found.detach().cpu().numpy()[0]
            error = max(error, float(delta.abs().max()))
    finally:
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)
    if keep is None:
        return values, error
    whole = np.zeros((len(values), len(keep), *values.shape[2:]), np.float32)
    if (
        values.shape[1] == keep.sum()
    ):  # else the network's own scaling changed the shape, which is named later
        whole[:, keep] = values
        values = whole
    return values, error


def _open_captum() -> Any:
    captum = require(
        "captum.attr", "the analysis integrated_gradients", otherwise="use the analysis occlusion"
    )
    return captum.IntegratedGradients


def _prepare_goals(study: Study, number: int, encoder: Any, test: Responses) -> tuple[Any, Any]:
    """Return the centre of the comparison and the centred embedding of each trial's image, as tensors."""
    import torch

    if study.centre == "zscore":
        raise ConfigError("integrated gradients work with retrieval.centre mean or none, not zscore.")
    bank = study.banks[number]
    known = complete_encoder(encoder)
    trained_on = pd.unique(study.responses.stimulus_ids[study.folds[number].train])
    centre = fit_centre(known.map_targets(bank.select(trained_on)), study.centre)
    goals: Embeddings = centre.apply(known.map_targets(bank.select(list(test.stimulus_ids))))
    return torch.from_numpy(centre.mean), torch.from_numpy(goals.flat())


def _tabulate(
    study: Study, values: np.ndarray, clusters: np.ndarray, subjects: np.ndarray
) -> list[dict[str, Any]]:
    """Return one row per column and one per sample, the attributions summed over all else."""
    n, dims = len(values), study.responses.dims[1:]
    if values.shape[1:] != study.responses.data.shape[1:]:
        raise DataError(
            f"the network's own scaling changes the shape of a trial from {study.responses.data.shape[1:]} to "
            f"{values.shape[1:]}, so attributions cannot be named."
        )
    rows = []
    for axis, dim in enumerate(dims, start=1):
        sums = values.sum(axis=tuple(a for a in range(1, values.ndim) if a != axis), dtype=np.float64)
        names: Any = study.responses.coords.get("times") if dim == "time" else list_columns(study.responses)
        for place in range(sums.shape[1]):
            low, high, resampled = compute_interval(study, sums[:, place], clusters, subjects)
            name = float(names[place]) if dim == "time" else str(names[place])
            rows.append(
                {
                    "part": dim, "name": str(name), "value": float(sums[:, place].mean()), "ci_low": low,
                    "ci_high": high, "chance": 0.0, "n": n, "resampled": resampled,
                }
            )  # fmt: skip
    return rows


def _report(study: Study, table: pd.DataFrame, error: float) -> Findings:
    kinds = list(dict.fromkeys(table["part"]))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            own = table[table["part"] == kind]
            if kind == "time":
                mark_stimulus(axes)
                draw_curve(axes, own["name"].astype(float) * 1000, own)
                axes.set_xlabel("time (ms)")
                axes.set_ylabel("attribution (cosine)")
            else:
                # Not all of 306 channels can be read; the table has them.
                top = own.sort_values("value", ascending=False).head(20)
                draw_bars(axes, top, top["name"].tolist())
                axes.set_xlabel("attribution (cosine)")

    words = []
    for kind in kinds:
        best = find_best(table[table["part"] == kind])
        name = f"{float(best['name']) * 1000:z.0f} ms" if kind == "time" else f"{kind} {best['name']}"
        words.append(f"{name} ({best['value']:.4f}, {describe_limits(best, 4, what='')})")
    found = f"Most of the similarity to the seen image comes from {' and from '.join(words)}."
    how = (
        f"Integrated gradients of the cosine with the seen image's embedding, {int(table['n'].iloc[0])} test trials; "
        f"the sums are exact to {error:.2g}."
    )
    caption = "Attribution summed over all other axes, mean over test trials with 95 % intervals."
    size = (7.4, 5.0 if len(kinds) > 1 or kinds != ["time"] else 3.4)
    return Findings(
        "Integrated gradients", f"{how} {found}", table,
        (Plot("integrated_gradients", caption, found, draw, size),),
    )  # fmt: skip
