"""Patterns, occlusion, gradients and layers: where the planted signal is, there they point."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.analyses import attribution, patterns
from braindecode_vis.parts.analyses.analysis_figures import make_maps
from braindecode_vis.parts.analyses.attribution import IntegratedGradientsConfig, _tabulate, explain_trials
from braindecode_vis.parts.analyses.layer_time import LayerTimeConfig, embed_subjects
from braindecode_vis.parts.analyses.occlusion import OcclusionConfig
from braindecode_vis.parts.analyses.patterns import SpatialPatternsConfig, _whiten, predict_signal
from braindecode_vis.parts.analyses.study import rank_trials
from braindecode_vis.report.drawing import place_pattern
from braindecode_vis.report.figures import render_plot
from tests.constants import replace_constants
from tests.parts.analyses.planted import TEN_TWENTY, make_epochs_study, make_study
from tests.references import assert_close


def test_a_pattern_shows_the_signal_and_not_the_noise_that_weights_subtract():
    """Channel 0 holds signal plus disturbance, channel 1 the disturbance: weights use both, the pattern does not."""

    def respond(vectors, generator):
        disturbance = 3 * np.random.default_rng(11).standard_normal(len(vectors))
        out = np.zeros((len(vectors), 4))
        out[:, 0] = vectors[:, 0] + disturbance
        out[:, 1] = disturbance
        return out

    study = make_study(
        respond,
        ("trial", "channel"),
        {"ch_names": ["C3", "C4", "O1", "O2"]},
        noise=0.1,
        n_train=200,
        n_test=60,
        n_features=1,
        alpha=0.1,
    )
    weights = np.abs(study.trained(0).fitted.weights[:, 0])
    assert weights[1] > 0.5 * weights[0]
    found = replace_constants(SpatialPatternsConfig, n_resamples=200)().compute(study)
    table = found.table.set_index("column")
    assert table.loc["C3", "value"] == pytest.approx(1.0, abs=0.6)
    assert abs(table.loc["C4", "value"]) < 0.6 * table.loc["C3", "value"]
    assert table.loc["O1", "p_value"] > 0.05
    assert table.loc["O1", "ci_low"] < 0 < table.loc["O1", "ci_high"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warned of a legend without an entry
        assert render_plot(found.plots[0].draw, size=(6, 2))


def test_a_pattern_is_haufes_transform_of_the_weights():
    """For a linear encoder, cov(X, s) of the whitened outputs is cov(X) W cov(s)^-1 on the same trials."""
    study = make_epochs_study(n_times=12, onset=0.0, n_test=40)
    data, signal, _ = predict_signal(study, [None], 1)
    test = study.pick(study.folds[0].test, "test")
    x = test.as_matrix().astype(float)
    x -= x.mean(axis=0)
    fit = study.trained(0).fitted
    w = fit.weights.astype(float) / fit.zscore.std[:, None]
    y = x @ w
    _, _, axes = np.linalg.svd(y, full_matrices=False)
    w1 = w @ axes[0]
    s = x @ w1
    haufe = np.cov(x.T, bias=True) @ w1 / s.std()
    ours = (signal[:, 0] @ data[:, 0]) / len(x)
    assert np.abs(np.corrcoef(haufe, ours)[0, 1]) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(np.abs(ours), np.abs(haufe), atol=2e-3)


def test_components_are_uncorrelated():
    values = np.random.default_rng(0).standard_normal((50, 3)) @ np.array(
        [[1, 0.5, 0], [0, 1, 0], [0, 0, 2.0]]
    )
    values -= values.mean(axis=0)
    white = _whiten(values)
    assert_close(white.T @ white / 50, np.eye(3), scale=1)
    with pytest.raises(DataError, match="fewer than"):
        _whiten(np.outer(np.arange(5.0) - 2, [1, 1]))


def test_a_topographic_map_finds_the_active_channels_after_the_onset():
    import mne

    study = make_epochs_study(onset=0.1, noise=0.7, n_test=40)
    places = mne.channels.make_standard_montage("biosemi64").get_positions()["ch_pos"]
    coords = {**study.responses.coords, "ch_pos": np.stack([places[n] for n in TEN_TWENTY])}
    responses = Responses(study.responses.data, study.responses.dims, study.responses.trials, "V", coords)
    found = replace_constants(SpatialPatternsConfig, n_resamples=200)().compute(
        replace(study, responses=responses)
    )
    best = found.table.loc[found.table["value"].abs().idxmax()]
    assert best["column"] in TEN_TWENTY[12:]
    assert best["start"] >= 0.1 - 1e-9
    early = found.table[found.table["stop"] <= 0.1 + 1e-9]
    assert (early["p_value"] > 0.01).all()
    svg = [render_plot(found.plots[0].draw, size=(6, 2), theme=theme) for theme in ("light", "dark")]
    assert svg[0] != svg[1]


def test_a_pattern_of_voxels_goes_back_into_the_volume(tmp_path):
    mask = np.zeros((3, 4, 5), bool)
    mask[1, 1:3, 1:4] = True

    def respond(vectors, generator):
        out = np.zeros((len(vectors), 6))
        out[:, 2] = vectors[:, 0]
        return out

    coords = {
        "voxel_id": np.flatnonzero(mask),
        "mask": mask,
        "affine": np.diag([2.0, 2, 2, 1]),
        "roi_names": {},
    }
    study = make_study(respond, ("trial", "voxel"), coords, noise=0.2, n_features=1)
    found = replace_constants(SpatialPatternsConfig, n_resamples=100)().compute(study)
    image = place_pattern(study.responses, found.table["value"].to_numpy())
    strongest = np.unravel_index(np.abs(image.get_fdata()).argmax(), mask.shape)
    assert strongest == np.unravel_index(np.flatnonzero(mask)[2], mask.shape)
    assert np.array_equal(image.affine, coords["affine"])
    assert render_plot(found.plots[0].draw, size=(6, 2))
    assert [file.name for file in found.files] == ["pattern.nii.gz", "pattern_significant.nii.gz"]
    for file, threshold in zip(found.files, (1.1, 0.05), strict=True):
        file.write(tmp_path / file.name)
        read = nibabel.load(tmp_path / file.name)
        assert np.array_equal(read.affine, coords["affine"])
        kept = np.where(found.table["p_value"] <= threshold, found.table["value"], 0)
        np.testing.assert_allclose(read.get_fdata()[mask], kept, rtol=1e-6)
        assert (read.get_fdata()[~mask] == 0).all()
    written = (tmp_path / "pattern.nii.gz").read_bytes()
    found.files[0].write(tmp_path / "pattern.nii.gz")
    assert (tmp_path / "pattern.nii.gz").read_bytes() == written
    lost = replace_constants(OcclusionConfig, max_columns=3)().compute(study)
    (loss,) = lost.files
    loss.write(tmp_path / loss.name)
    sizes = [len(block) for block in np.array_split(np.arange(mask.sum()), 3)]
    np.testing.assert_allclose(
        nibabel.load(tmp_path / loss.name).get_fdata()[mask], np.repeat(lost.table["value"], sizes), atol=1e-6
    )


def test_a_map_over_time_has_the_windows_on_its_fourth_axis(tmp_path):
    study = make_epochs_study(n_times=30)
    assert make_maps(study.responses, np.zeros(16), "map", "") == ()  # channels lie in no volume
    mask = np.ones((2, 2, 4), bool)
    coords = {"voxel_id": np.arange(16), "mask": mask, "affine": np.eye(4), "roi_names": {}}
    coords |= {"times": study.responses.coords["times"]}
    voxels = replace(study.responses, dims=("trial", "voxel", "time"), coords=coords)
    found = replace_constants(SpatialPatternsConfig, n_resamples=100)(width=0.1, n_components=2).compute(
        replace(study, responses=voxels, pick=lambda rows, part: voxels.select(rows))
    )
    assert [file.name for file in found.files] == [
        "pattern1.nii.gz", "pattern1_significant.nii.gz", "pattern2.nii.gz", "pattern2_significant.nii.gz",
    ]  # fmt: skip
    found.files[2].write(tmp_path / "map.nii.gz")
    volume = nibabel.load(tmp_path / "map.nii.gz").get_fdata()
    assert volume.shape == (2, 2, 4, 3)
    own = found.table[found.table["component"] == 2]
    np.testing.assert_allclose(volume.reshape(16, 3).T.ravel(), own["value"], rtol=1e-6)


def test_every_brain_has_its_map_where_masks_differ(tmp_path):
    """Drawing parcels of two people once failed: each has a mask of its own, and none was named."""
    masks = {"01": np.ones((2, 2, 2), bool), "02": np.ones((2, 2, 3), bool)}
    coords = {"parcel_names": list("abcd"), "parcel_networks": [""] * 4, "subjects": list(masks)}
    for subject, mask in masks.items():
        coords |= {
            f"voxel_id_sub-{subject}": np.arange(mask.sum()), f"mask_sub-{subject}": mask,
            f"affine_sub-{subject}": np.eye(4) * (2 if subject == "01" else 3),
            f"voxel_parcel_sub-{subject}": np.arange(mask.sum()) % 4 + 1,
        }  # fmt: skip
    study = make_study(
        lambda vectors, generator: vectors @ generator.standard_normal((4, 4)), ("trial", "parcel"), coords,
        subjects=("01", "02"),
    )  # fmt: skip
    found = replace_constants(SpatialPatternsConfig, n_resamples=100)().compute(study)
    assert render_plot(found.plots[0].draw, size=(6, 2))
    assert [file.name for file in found.files[:2]] == ["pattern_sub-01.nii.gz", "pattern_sub-02.nii.gz"]
    for file, shape in zip(found.files[:2], ((2, 2, 2), (2, 2, 3)), strict=True):
        file.write(tmp_path / file.name)
        read = nibabel.load(tmp_path / file.name)
        assert read.shape == shape
        assert read.affine[0, 0] == (2 if "01" in file.name else 3)
        np.testing.assert_allclose(read.get_fdata().ravel()[:4], found.table["value"], rtol=1e-6)


def test_hiding_the_planted_channels_and_times_costs_the_score():
    study = make_epochs_study(onset=0.1, noise=1.5, n_times=30, n_test=40)
    found = OcclusionConfig(width=0.1).compute(study)
    columns = found.table[found.table["part"] == "columns"].set_index("name")
    time = found.table[found.table["part"] == "time"]
    assert columns["value"].nlargest(3).index.isin(TEN_TWENTY[12:]).all()
    assert columns["ci_low"].loc[list(TEN_TWENTY[12:])].max() > 0
    assert columns.drop(list(TEN_TWENTY[12:]))["value"].abs().max() < columns["value"].max() / 2
    assert float(time.loc[time["value"].idxmax(), "name"]) == pytest.approx(0.1)
    assert render_plot(found.plots[0].draw)
    blocks = replace_constants(OcclusionConfig, max_columns=4)(over=("columns",)).compute(study)
    assert blocks.table["name"].tolist()[-1] == "O1 to PO7"


def make_network_study():
    """Return a study whose encoder is a linear network with the parts of a trained one."""
    import torch
    from torch import nn

    study = make_epochs_study(onset=0.1, noise=0.5, n_times=24)
    weights = torch.from_numpy(study.trained(0).fitted.weights)
    mean = torch.from_numpy(study.trained(0).fitted.target_mean)

    class Model(nn.Module):
        learns_space = False

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(weights.shape[0], weights.shape[1])
            self.layer.weight.data, self.layer.bias.data = weights.T.clone(), mean.clone()

        def encode_brain(self, data, subject):
            return self.layer(data.flatten(1))

        class target_scale:
            @staticmethod
            def undo(values):
                return values

    class Transform:
        def with_subjects_of(self, data, names):
            return self

        def read(self, data, rows, names):
            return np.asarray(data[rows], np.float32)

    class Signal:
        @staticmethod
        def index_subjects(names):
            return np.zeros(len(names), np.int64)

    class Fit:
        model, transform, signal = Model(), Transform(), Signal()

    class Encoder:
        fitted = Fit()
        fit = write = read = None  # nothing asks for them here

        def predict(self, responses):
            data = torch.from_numpy(np.asarray(responses.data))
            return Embeddings(
                Fit.model.encode_brain(data, None).detach().numpy(), responses.stimulus_ids, "planted"
            )

    return replace(study, trained=lambda number: Encoder()), Fit.model


def test_gradients_point_at_the_planted_channels_and_sum_to_the_cosine():
    pytest.importorskip("captum")
    study, model = make_network_study()
    found = replace_constants(IntegratedGradientsConfig, n_steps=32)().compute(study)
    columns = found.table[found.table["part"] == "channel"].set_index("name")["value"]
    active = list(TEN_TWENTY[12:])
    assert columns[active].sum() > 4 * columns.drop(active).abs().sum()
    time = found.table[found.table["part"] == "time"]
    early = time["name"].astype(float) < 0.1 - 1e-9
    assert time.loc[~early, "value"].sum() > 4 * abs(time.loc[early, "value"].sum())
    test = study.pick(study.folds[0].test, "test")
    values, error = explain_trials(study, 0, test, n_steps=64)
    assert values.shape == test.data.shape
    assert error < 1e-3
    _, _, retrieval = rank_trials(study, 0, test, study.trained(0))
    np.testing.assert_allclose(values.sum(axis=(1, 2)), retrieval.true_similarities, atol=0.05)
    assert all(p.requires_grad for p in model.parameters())  # as they were
    assert render_plot(found.plots[0].draw)


def test_attributions_are_summed_over_the_other_axis_and_named():
    study = make_epochs_study(n_times=3, n_train=4)
    values = np.zeros((4, len(TEN_TWENTY), 3))
    values[:, TEN_TWENTY.index("Fz")] = 0.0, 1.0, 2.0
    rows = _tabulate(study, values, np.arange(4), np.full(4, "01"))
    assert [(row["part"], row["name"], row["value"]) for row in rows] == [
        *(("channel", name, 3.0 * (name == "Fz")) for name in TEN_TWENTY),
        *(("time", str(study.responses.coords["times"][n]), float(n)) for n in range(3)),
    ]


def test_gradients_need_a_network_and_captum(monkeypatch):
    study = make_epochs_study(n_times=12)
    pytest.importorskip("captum")
    with pytest.raises(ConfigError, match="need a network"):
        IntegratedGradientsConfig().compute(study)
    import sys

    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ConfigError, match="captum, which is not installed"):
        IntegratedGradientsConfig().compute(study)


@pytest.mark.parametrize("measure", ["ridge", "rdm"])
def test_an_early_and_a_late_layer_are_told_apart(measure):
    """Half of the embedding drives the first 100 ms, the other half the next."""
    times = np.arange(20) / 100

    def respond(vectors, generator):
        out = np.zeros((len(vectors), 8, 20))
        early, late = generator.standard_normal((2, 3, 8))
        out[..., :10] = (vectors[:, :3] @ early)[..., None]
        out[..., 10:] = (vectors[:, 3:] @ late)[..., None]
        return out

    coords = {"ch_names": [f"E{n}" for n in range(8)], "times": times}
    study = make_study(respond, ("trial", "channel", "time"), coords, n_features=6, noise=0.5, n_test=20)
    bank = study.banks[0]
    layers = {
        name: Embeddings(bank.vectors[:, part], bank.ids, name)
        for name, part in (("low", slice(0, 3)), ("high", slice(3, 6)))
    }
    config = replace_constants(LayerTimeConfig, alphas=(10.0,), n_resamples=100)(
        layers=(), measure=measure, width=0.05, step=0.05
    )
    found = config.compute(replace(study, spaces=layers))
    peaks = found.table.groupby("layer")["peak"].first()
    assert peaks["low"] < 0.1 < peaks["high"]
    table = found.table.pivot(index="layer", columns="start", values="value").to_numpy()
    high, low = table  # alphabetical
    assert min(low[:2].min() - low[2:].max(), high[2:].min() - high[:2].max()) > 0.2
    assert {"ci_low", "ci_high", "chance", "n", "p_value"} <= set(found.table.columns)
    # Each of eight cells is as good as the best of eight, or worse.
    assert (found.table["p_maximum"] >= found.table["p_value"] - 1e-9).all()
    assert found.table.groupby("layer")["p_maximum"].min().max() < 0.05
    assert "corrected for 8 of them" in found.summary
    assert render_plot(found.plots[0].draw)


def test_layers_can_be_encoded_for_the_analysis(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINDECODE_VIS_CACHE", str(tmp_path))
    study = make_epochs_study(n_train=12, n_test=6, n_times=20)
    config = replace_constants(LayerTimeConfig, with_targets=False, alphas=(10.0,))(
        layers=({"kind": "pixels"}, {"kind": "engineered", "features": ("fft",), "workers": 0}),
        width=0.1,
        step=0.1,
    )
    assert config.compute(study).table["layer"].nunique() == 2


def test_subjects_are_compared_on_common_images():
    trials = pd.DataFrame(
        {
            "subject": ["a", "a", "a", "b", "b", "b"],
            "session": "1",
            "run": "1",
            "stimulus_id": list("xyzzyx"),
            "repetition": 0,
            "split": "test",
        }
    )
    responses = Responses(np.arange(6.0)[:, None], ("trial", "voxel"), trials, "z")
    rows = embed_subjects(responses)
    np.testing.assert_array_equal(rows["b"].vectors.ravel(), [5, 4, 3])
    assert list(rows["a"].ids) == list(rows["b"].ids)


class MidpointGradients:
    """Integrated gradients by the midpoint rule, in place of captum, which few have installed."""

    def __init__(self, measure):
        self.measure = measure

    def attribute(self, data, baseline, *, additional_forward_args, n_steps, internal_batch_size,
                  return_convergence_delta):  # fmt: skip
        import torch

        total = torch.zeros_like(data)
        for step in range(n_steps):
            point = (baseline + (step + 0.5) / n_steps * (data - baseline)).requires_grad_()
            total += torch.autograd.grad(self.measure(point, *additional_forward_args).sum(), point)[0]
        found = total / n_steps * (data - baseline)
        rise = self.measure(data, *additional_forward_args) - self.measure(baseline, *additional_forward_args)
        return found, found.flatten(1).sum(dim=1) - rise


@pytest.mark.parametrize("centre", ["mean", "none"])
def test_attributions_of_a_linear_network_are_the_rise_of_its_cosine(monkeypatch, centre):
    """From no response to the response, at the length of the prediction that is compared."""
    monkeypatch.setattr(attribution, "_open_captum", lambda: MidpointGradients)
    study, model = make_network_study()
    shifted = Embeddings(study.banks[0].vectors + 2, study.banks[0].ids, "planted")
    study = replace(study, banks=[shifted], centre=centre)
    model.layer.bias.data += 2
    test = study.pick(study.folds[0].test, "test")
    values, error = explain_trials(study, 0, test, n_steps=4)
    predicted = study.trained(0).predict(test).vectors.astype(float)
    blank = study.trained(0).predict(replace(test, data=np.zeros_like(test.data))).vectors.astype(float)
    shown = study.responses.stimulus_ids[study.folds[0].train]
    mean = shifted.select(np.unique(shown)).vectors.mean(axis=0) if centre == "mean" else 0
    goals = shifted.select(test.stimulus_ids).vectors - mean
    goals = goals / np.linalg.norm(goals, axis=1, keepdims=True)
    rise = ((predicted - blank) * goals).sum(axis=1) / np.linalg.norm(predicted - mean, axis=1)
    np.testing.assert_allclose(values.sum(axis=(1, 2)), rise, rtol=1e-3, atol=1e-4)  # in single precision
    assert error < 1e-4
    assert all(p.requires_grad for p in model.parameters())  # as they were


@pytest.mark.parametrize("n_components", [1, 2])
def test_maps_of_several_components_say_which_they_are_of(monkeypatch, n_components):
    seen = []
    for name in ("_draw_heads", "_draw_columns"):
        monkeypatch.setattr(patterns, name, lambda figure, panels, *_: seen.extend(panels))
    study = make_epochs_study(n_times=20, n_train=20, n_test=8)
    found = replace_constants(SpatialPatternsConfig, n_resamples=100)(n_components=n_components).compute(
        study
    )
    assert render_plot(found.plots[0].draw)
    windows = ["-100 to 0 ms", "0 to 100 ms"]
    numbered = [f"{k}: {window}" for k in (1, 2) for window in windows]
    assert [panel.title for panel in seen] == (windows if n_components == 1 else numbered)
    for panel, (_, own) in zip(seen, found.table.groupby(["component", "start"], sort=True), strict=True):
        np.testing.assert_array_equal(panel.values, own["value"])


@pytest.mark.parametrize("parts", [("model",), ("transform",), ()])
def test_what_has_no_model_or_no_transform_is_no_network(monkeypatch, parts):
    monkeypatch.setattr(attribution, "_open_captum", lambda: MidpointGradients)
    study, _ = make_network_study()
    encoder = study.trained(0)
    encoder.fitted = SimpleNamespace(**{name: getattr(encoder.fitted, name) for name in parts})
    test = study.pick(study.folds[0].test, "test")
    with pytest.raises(ConfigError, match="integrated gradients need a network"):
        explain_trials(replace(study, trained=lambda number: encoder), 0, test)
