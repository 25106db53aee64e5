"""Time series to responses: a phantom in the layout of fMRIPrep, whose amplitudes are known."""

import gzip
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import read_json, read_responses, read_stimuli
from braindecode_vis.datasets.bids.fmri_dataset import BidsFmriConfig, BoldSettings
from braindecode_vis.datasets.sources.bold_source import (
    CleanConfig,
    GlmByVoxelConfig,
    GlmConfig,
    WindowConfig,
)
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.parts.phantom.formats import bids_fmri as phantom
from braindecode_vis.preprocessing.bold import clean_series, find_geometry, make_betas, write_bold
from braindecode_vis.preprocessing.glm import make_drifts, make_nuisance_basis, make_regressors
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics
from braindecode_vis.preprocessing.voxel_geometry import inverse_transform
from tests.references import assert_close

AFFINE = np.array([[-4.0, 0, 0, 20], [0, 4, 0, -30], [0, 0, 4, -10], [0, 0, 0, 1]])
SHAPE, N, T_R = (6, 5, 4), 90, 2.0
NAMES = ["ant_01", "bee_01", "cat_01", "dog_01"]
MASK = np.zeros(SHAPE, bool)
MASK[1:-1, 1:-1, 1:-1] = True
RUNS = ("01", "02")


def make_events():
    events = pd.DataFrame({"onset": 6.0 + 18.0 * np.arange(8), "duration": 1.0, "trial_type": "picture"})
    events["stimulus_id"] = NAMES * 2
    events["stim_file"] = [f"{name.split('_')[0]}/{name}.jpg" for name in NAMES * 2]
    events.loc[7, ["trial_type", "stimulus_id", "stim_file"]] = ["catch", "none", None]
    return events


def make_volumes(events, motion, rng):
    """One pattern per picture (percent of 1000), a drift, motion, and little noise."""
    patterns = {
        name: np.random.default_rng(n).standard_normal(int(MASK.sum())) for n, name in enumerate(NAMES)
    }
    amplitudes = np.stack([patterns.get(name, np.ones(MASK.sum())) for name in events["stimulus_id"]])
    series = make_regressors(events, T_R * np.arange(N)) @ amplitudes * 10
    series += (
        1000
        + 20 * np.cos(np.pi * (np.arange(N)[:, None] + 0.5) / N)
        + motion[:, :1] * 200
        + rng.standard_normal(series.shape) * 0.1
    )
    volumes = np.zeros((N, *SHAPE), np.float32)
    volumes[:, MASK] = series
    return volumes, amplitudes


def write_tree(root, runs):
    phantom.write_dataset(root, pd.DataFrame({"participant_id": ["sub-01"]}))
    truth = []
    for number, run in enumerate(runs):
        rng = np.random.default_rng(number)
        events, motion = make_events(), np.cumsum(rng.standard_normal((N, 6)) * 0.01, axis=0)
        volumes, amplitudes = make_volumes(events, motion, rng)
        signals = {name: rng.standard_normal(N) for name in ("global_signal", "csf", "white_matter", "dvars")}
        confounds = phantom.make_confounds(motion, t_r=T_R, **signals)
        phantom.write_run(
            root, "01", iter(volumes), events, confounds, MASK, n_volumes=N, affine=AFFINE, t_r=T_R, run=run
        )
        truth.append(amplitudes[:7])
    return root, np.concatenate(truth)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("bids"), RUNS)


def make_config(root, **options):
    defaults = {
        "task": "images", "concept_pattern": r"(\w+)_\d+", "trial_types": ("picture",), "zscore": "none",
        "confounds": {"strategy": ("motion",)},
    }  # fmt: skip
    return BidsFmriConfig(root=root, **(defaults | options))


def find_image(root, run="01"):
    return next(root.rglob(f"*run-{run}_space-*_bold.nii.gz"))


@pytest.mark.parametrize("trials", ["lss", "lsa"])
def test_glm_finds_the_amplitudes_of_every_trial(tree, tmp_path, trials):
    root, truth = tree
    summary = write_bold(make_config(root, model=GlmConfig(trials=trials)), tmp_path)
    responses, stimuli = read_responses(tmp_path / "responses"), read_stimuli(tmp_path / "stimuli")
    assert summary["n_trials"] == responses.n_trials == 14
    assert responses.unit == "percent signal change"
    assert responses.trials["stimulus_id"].tolist() == (NAMES * 2)[:7] * 2
    assert responses.trials["repetition"].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 1, 3, 3, 3]
    assert responses.trials["run"].tolist() == ["01"] * 7 + ["02"] * 7
    assert stimuli.table["concept"].tolist() == ["ant", "bee", "cat", "dog"]
    np.testing.assert_array_equal(np.asarray(responses.coords["mask"]), MASK)
    if (
        trials == "lsa"
    ):  # noise of a hundredth of a percent, a response that peaks at a seventh: four standard errors
        np.testing.assert_allclose(responses.data, truth, atol=0.15)
    # With one regressor for all others, their differences are left in.
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(responses.data, truth, strict=True)) > 0.9
    assert read_json(tmp_path / "responses" / "meta.json")["provenance"]["model"]["trials"] == trials


def test_a_map_goes_back_into_the_brain(tree, tmp_path):
    write_bold(make_config(tree[0]), tmp_path)
    responses = read_responses(tmp_path / "responses")
    image = inverse_transform(responses.select([0]))
    values = np.asarray(image.dataobj).reshape(*SHAPE, -1)[..., 0]
    np.testing.assert_allclose(values[MASK], responses.data[0], rtol=1e-6)
    np.testing.assert_allclose(image.affine, AFFINE)


def test_confounds_and_catch_trials_are_modelled(tree, tmp_path):
    """Motion moves the signal by up to a percent; left in, it must hurt."""
    root, truth = tree
    errors = {}
    for name, options in {
        "modelled": {}, "columns": {"confounds": {"columns": ("trans_x", "framewise_displacement")}},
        "no motion": {"confounds": {}}, "not a catch": {"ignored_types": ("catch",)},
    }.items():  # fmt: skip
        write_bold(make_config(root, model=GlmConfig(trials="lsa"), **options), tmp_path / name)
        errors[name] = np.abs(read_responses(tmp_path / name / "responses").data - truth).mean()
    assert errors["columns"] < 0.05
    assert errors["modelled"] < 0.5 * errors["no motion"]
    assert errors["modelled"] < 0.5 * errors["not a catch"]


@pytest.fixture(scope="module")
def by_hand(tree):
    """Cleaned and standardised by loops and least squares, run by run."""
    runs = []
    for run in RUNS:
        data = np.asarray(nib.load(find_image(tree[0], run)).dataobj, dtype=float)[MASK].T
        fit = np.polynomial.legendre.legvander(np.linspace(-1, 1, N), 2)
        rest = data - fit @ np.linalg.lstsq(fit, data, rcond=None)[0]
        runs.append(rest / rest.std(axis=0))
    return runs


def make_window(**options):
    return WindowConfig(clean=CleanConfig(drift="polynomial", order=2, scaling="zscore"), **options)


def test_window_averages_volumes(tree, by_hand, tmp_path):
    model = make_window(start=4.0, stop=9.0)
    write_bold(make_config(tree[0], model=model, confounds={}), tmp_path)
    responses = read_responses(tmp_path / "responses")
    assert responses.unit == "z"
    for row, trial in enumerate(responses.trials.itertuples()):
        times = T_R * np.arange(N)
        chosen = (times >= trial.onset + 4) & (times < trial.onset + 9)
        expected = by_hand[RUNS.index(trial.run)][chosen].mean(axis=0)
        np.testing.assert_allclose(responses.data[row], expected, atol=1e-4)  # stored in float32


def test_volumes_and_times_keep_what_the_mean_averages(tree, by_hand, tmp_path):
    for keep in ("mean", "volumes", "times"):
        model = make_window(start=4.0, stop=10.0, keep=keep)
        write_bold(make_config(tree[0], model=model, confounds={}), tmp_path / keep)
    mean, volumes, times = (
        read_responses(tmp_path / keep / "responses") for keep in ("mean", "volumes", "times")
    )
    assert volumes.data.shape == (14 * 3, MASK.sum())
    assert volumes.trials["volume"].tolist()[:3] == [5, 6, 7]
    assert volumes.trials["stimulus_id"].tolist()[:4] == ["ant_01"] * 3 + ["bee_01"]
    np.testing.assert_allclose(volumes.data[0], by_hand[0][5], atol=1e-4)
    assert times.dims == ("trial", "voxel", "time")
    assert list(times.coords["times"]) == [4.0, 6.0, 8.0]
    np.testing.assert_allclose(times.data.mean(axis=2), mean.data, atol=1e-5)
    np.testing.assert_allclose(volumes.data.reshape(14, 3, -1).transpose(0, 2, 1), times.data, atol=1e-5)


def test_window_until_the_offset(tree, tmp_path):
    model = make_window(start=4.0, stop=4.0, until="offset", keep="volumes")
    betas = make_betas(make_config(tree[0], model=model, confounds={}).open_bold())
    assert betas.n_trials == 14  # one volume in the second that a picture lasts


def test_zscore_uses_training_trials_only(tree, tmp_path):
    """Test trials change nothing of the others."""
    options = {"model": make_window(), "zscore": "session", "min_test_repetitions": 4, "confounds": {}}
    write_bold(make_config(tree[0], **options), tmp_path)
    responses = read_responses(tmp_path / "responses")
    train = (responses.trials["split"] == "train").to_numpy()
    assert responses.trials.loc[train, "stimulus_id"].unique().tolist() == ["dog_01"]
    np.testing.assert_allclose(responses.data[train].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(responses.data[train].std(axis=0), 1, atol=1e-4)
    assert np.abs(responses.data[~train].mean(axis=0)).max() > 0.1


def test_masks_found_in_the_images(tree):
    found = find_geometry(make_config(tree[0], mask="varying").open_bold())
    np.testing.assert_array_equal(found.mask, MASK)


def test_a_voxel_must_vary_in_every_run(tree, tmp_path):
    """Another voxel is silent in each run, the first and the last: neither may stay in the mask."""
    shutil.copytree(tree[0], tmp_path / "bids")
    expected = MASK.copy()
    for run, voxel in zip(RUNS, ((1, 1, 1), (2, 2, 2)), strict=True):
        path = find_image(tmp_path / "bids", run)
        image = nib.load(path)
        data = np.asarray(image.dataobj).copy()
        data[voxel] = 5.0
        nib.Nifti1Image(data, image.affine, image.header).to_filename(path)
        expected[voxel] = False
    found = find_geometry(make_config(tmp_path / "bids", mask="varying").open_bold())
    np.testing.assert_array_equal(found.mask, expected)
    np.testing.assert_allclose(found.affine, AFFINE)


def test_epi_mask_is_nilearns(tmp_path):
    ball = np.linalg.norm(np.indices((16, 16, 16)).T - 7.5, axis=-1).T < 5.5
    rng = np.random.default_rng(0)
    volumes = (ball * 1000 + rng.standard_normal((N, 16, 16, 16)) * 10 + 20).astype(np.float32)
    confounds = pd.DataFrame(index=range(N), columns=[])
    phantom.write_run(
        tmp_path,
        "01",
        iter(volumes),
        make_events(),
        confounds.assign(csf=0.0),
        ball,
        n_volumes=N,
        affine=AFFINE,
        t_r=T_R,
    )
    config = make_config(tmp_path, mask="epi", confounds={})
    overlap = find_geometry(config.open_bold()).mask & ball
    assert overlap.sum() > 0.6 * ball.sum()


def test_mask_file_of_another_grid_is_refused(tree, tmp_path):
    moved = AFFINE.copy()
    moved[0, 3] += 1
    for affine, mask, message in ((moved, MASK, "1.00 mm away"), (AFFINE, MASK[:-1], "of shape")):
        path = tmp_path / "mask.nii.gz"
        nib.Nifti1Image(mask.astype(np.uint8), affine).to_filename(path)
        with pytest.raises(DataError, match=message):
            make_config(tree[0], mask=path).open_bold()


def test_constant_voxels_are_bounded(tree, tmp_path, monkeypatch):
    path = tmp_path / "mask.nii.gz"
    wide = MASK.copy()
    wide[0, 0, 0] = True
    nib.Nifti1Image(wide.astype(np.uint8), AFFINE).to_filename(path)
    config = make_config(tree[0], mask=path, model=make_window())
    monkeypatch.setattr(BoldSettings, "max_constant", 0.01)
    with pytest.raises(DataError, match="1 of the 25 voxels of the mask never change, above the bound of 1%"):
        write_bold(config, tmp_path / "a")
    monkeypatch.setattr(BoldSettings, "max_constant", 0.05)
    write_bold(config, tmp_path / "b")
    responses = read_responses(tmp_path / "b" / "responses")
    assert not responses.data[:, 0].any()
    meta = read_json(tmp_path / "b" / "responses" / "meta.json")
    assert set(meta["provenance"]["constant_voxels_by_run"].values()) == {1}


def test_cleaned_series_are_residuals_in_percent_in_deviations_or_as_they_are():
    """Against least squares; a voxel that the nuisance explains but for rounding has no deviation to be divided by."""
    rng = np.random.default_rng(0)
    drift = make_drifts(2.0 * np.arange(60), drift="polynomial", order=2)
    series = 500 + 3 * rng.standard_normal((60, 40)) + 10 * drift[:, 1:2]
    series[:, 0], series[:, 1] = 500, 500 + 5 * drift[:, 2]
    rest = series - drift @ np.linalg.lstsq(drift, series, rcond=None)[0]
    expected = {"none": rest, "zscore": rest / rest.std(axis=0), "percent": 100 * rest / series.mean(axis=0)}
    for scaling, values in expected.items():
        found = clean_series(series, make_nuisance_basis(drift), CleanConfig(scaling=scaling), where="run 01")
        np.testing.assert_array_equal(found[:, 0], 0)
        assert_close(found[:, 1], 0, scale=1)
        np.testing.assert_allclose(found[:, 2:], values[:, 2:], atol=1e-8)


def test_percent_of_standardised_images_is_refused():
    rng = np.random.default_rng(0)
    basis = make_nuisance_basis(make_drifts(np.arange(50.0), drift="none"))
    with pytest.raises(DataError, match="were standardised before"):
        clean_series(rng.standard_normal((50, 10)), basis, CleanConfig(), where="run 01")


def test_damaged_image_is_named(tree, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(tree[0], root)
    path = find_image(root)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"run-01.*truncated or damaged"):
        write_bold(make_config(root), tmp_path / "out")


def test_not_finite_voxels_are_named(tree, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(tree[0], root)
    path = find_image(root, "02")
    content = bytearray(gzip.decompress(path.read_bytes()))
    values = np.frombuffer(content, "<f4", offset=352)
    values[np.flatnonzero(MASK.ravel(order="F"))[[0, 5]]] = np.nan
    path.write_bytes(gzip.compress(bytes(content), 1))
    with pytest.raises(DataError, match=r"run 02.*2 voxels of the mask are not finite"):
        write_bold(make_config(root), tmp_path / "out")


def test_windows_beyond_the_run_are_refused(tree, tmp_path):
    with pytest.raises(DataError, match="have no volume in their window"):
        make_betas(make_config(tree[0], model=make_window(start=100.0, stop=104.0)).open_bold())
    with pytest.raises(DataError, match="extend beyond the run"):
        make_betas(make_config(tree[0], model=make_window(start=50.0, stop=90.0, keep="times")).open_bold())
    with pytest.raises(ValidationError, match="equal length"):
        make_window(until="offset", keep="times")
    with pytest.raises(ValidationError, match="the window ends at 3"):
        make_window(start=4.0, stop=3.0)


@pytest.mark.parametrize("keep", ["mean", "times"])
def test_one_late_trial_is_left_out_not_the_whole_set(tree, keep, tmp_path):
    """A run that was stopped a moment early refused the data set; a single trial is now reported and left out."""
    model = make_window(start=4.0, stop=8.0, keep=keep)
    source = make_config(tree[0], model=model).open_bold()
    run = source.runs[0]
    for onset in (run.frame_times[-1] - 0.1, run.frame_times[-1] + 20.0):
        late = run.trials.assign(onset=[*run.trials["onset"].iloc[:-1], onset])
        cut = replace(source, runs=(replace(run, trials=late), *source.runs[1:]))
        made, whole = make_betas(cut), make_betas(source)
        assert made.n_trials == whole.n_trials - 1
        assert made.notes["late_trials_left_out"] == {run.image.name: 1}
        assert f"1 of {whole.n_trials} trials left out, whose window reaches beyond" in made.notes["protocol"]
        np.testing.assert_array_equal(
            made.parts[0].read(0, len(late) - 1), whole.parts[0].read(0, len(late))[:-1]
        )
        strict = replace(cut, model=model.model_copy(update={"max_dropped": 0.0}))
        with pytest.raises(DataError, match=r"1 of .* more than dataset\.model\.max_dropped \(0\)"):
            make_betas(strict)
    with pytest.raises(DataError, match="start after the end of the run"):
        replace(cut, model=GlmConfig())
    many = replace(run, trials=run.trials.assign(onset=run.trials["onset"] * 1000))
    with pytest.raises(DataError, match="not in seconds"):
        replace(source, runs=(many, *source.runs[1:]))
    assert model.hashed_fields() == model.model_copy(update={"max_dropped": 0.5}).hashed_fields()


def test_too_many_confounds_are_refused(tree, tmp_path):
    config = make_config(tree[0], model=GlmConfig(clean=CleanConfig(drift="cosine", cutoff=4.5)))
    with pytest.raises(DataError, match="are too many for 90 volumes"):
        write_bold(config, tmp_path)


def test_fingerprint_ignores_numbers_that_are_not_used():
    one, two = CleanConfig(drift="cosine", order=1), CleanConfig(drift="cosine", order=2)
    assert one.hashed_fields() == two.hashed_fields()
    three = CleanConfig(drift="polynomial", order=2)
    assert three.hashed_fields() == {"drift": "polynomial", "order": 2, "scaling": "percent"}


PARCELS = (
    "7Networks_LH_Vis_1",
    "7Networks_RH_Vis_1",
    "7Networks_LH_Cont_PFCl_1",
    "7Networks_RH_Default_Temp_2",
)


def write_atlas(folder):
    """Parcels in the manner of Schaefer's, one for each step of the first axis inside the mask."""
    labels = np.zeros(SHAPE, np.int16)
    for number in range(1, 5):
        labels[number] = number
    nib.Nifti1Image(labels, AFFINE).to_filename(folder / "atlas.nii.gz")
    (folder / "atlas.txt").write_text(
        "".join(f"{i}\t{n}\t0\t0\t0\t0\n" for i, n in enumerate(PARCELS, start=1))
    )
    return labels, {"files": (folder / "atlas.nii.gz",), "labels": folder / "atlas.txt"}


def test_whole_cortex_in_parcels_around_the_onset(tree, by_hand, tmp_path):
    """What a network over parcels and time reads: dims, names, networks and seconds, and the averages by hand."""
    labels, atlas = write_atlas(tmp_path)
    model = make_window(start=-2.0, stop=8.0, keep="times")
    write_bold(make_config(tree[0], model=model, confounds={}, atlas=atlas), tmp_path / "out")
    responses = read_responses(tmp_path / "out" / "responses")
    assert responses.dims == ("trial", "parcel", "time")
    assert responses.data.shape == (14, 4, 5)
    assert list(responses.coords["times"]) == [-2.0, 0.0, 2.0, 4.0, 6.0]
    assert responses.coords["parcel_names"] == list(PARCELS)
    assert responses.coords["parcel_networks"] == ["Vis", "Vis", "Cont", "Default"]
    signal = describe_signal(responses)
    assert (signal.dims, signal.networks) == (("parcel", "time"), ("Vis", "Vis", "Cont", "Default"))
    inside = labels[MASK]
    for row, trial in enumerate(responses.trials.itertuples()):
        first = int(trial.onset / T_R) - 1
        for parcel in range(1, 5):
            expected = by_hand[RUNS.index(trial.run)][first : first + 5, inside == parcel].mean(axis=1)
            np.testing.assert_allclose(responses.data[row, parcel - 1], expected, atol=1e-4)


def test_windows_before_the_run_are_refused(tree):
    with pytest.raises(DataError, match=r"at 6 s, whose window opens at -4 s; the run lasts from 0"):
        make_betas(make_config(tree[0], model=make_window(start=-10.0, keep="times")).open_bold())


def test_autoregressive_noise_is_an_option(tree, tmp_path):
    root, truth = tree
    write_bold(make_config(root, model=GlmConfig(trials="lsa", noise_model="ar1")), tmp_path)
    responses = read_responses(tmp_path / "responses")
    np.testing.assert_allclose(responses.data, truth, atol=0.15)  # as without


# --- a model for each voxel ---------------------------------------------------------------------------------

BY_VOXEL = GlmByVoxelConfig(denoise=False)  # every voxel of the phantom is active


def open_parts(root, model, tested=(), change=None):
    """Responses of each run; `tested` runs are declared as test, and `change` alters their trials."""
    source = make_config(root, model=model).open_bold()
    runs = [
        replace(run, trials=run.trials.assign(split="test" if number in tested else "train"))
        for number, run in enumerate(source.runs)
    ]
    if change is not None:
        runs = [replace(run, trials=change(run.trials)) for run in runs]
    betas = make_betas(replace(source, runs=tuple(runs)))
    return betas, [part.read(0, len(part.trials)) for part in betas.parts]


def test_a_model_for_each_voxel_finds_the_amplitudes(tree, tmp_path):
    root, truth = tree
    config = make_config(root, model=BY_VOXEL)
    write_bold(config, tmp_path / "a")
    responses = read_responses(tmp_path / "a" / "responses")
    assert responses.unit == "percent signal change"
    assert not list((tmp_path / "a").glob("tmp*"))
    # The phantom has another response function than those of the library.
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(responses.data, truth, strict=True)) > 0.9
    notes = read_json(tmp_path / "a" / "responses" / "meta.json")["provenance"]
    assert "all runs of a person, test trials included" in notes["estimates"]
    assert "warnings" not in responses.coords
    # New scans of the same person get the model of the run.
    learnt = LearntStatistics.read(tmp_path / "a" / "responses")
    write_bold(config, tmp_path / "b", learnt=learnt)
    np.testing.assert_array_equal(read_responses(tmp_path / "b" / "responses").data, responses.data)
    assert learnt.used["subject 01"] == "estimated with the model that the run chose for each voxel"


def test_a_killed_call_keeps_what_it_chose(tree, tmp_path, monkeypatch):
    config, kept = make_config(tree[0], model=BY_VOXEL), tmp_path / "kept"
    write_bold(config, tmp_path / "a")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("braindecode_vis.preprocessing.bold.estimate_by_choices", stop)
        with pytest.raises(KeyboardInterrupt):
            write_bold(config, tmp_path / "b", parts=kept)
    monkeypatch.setattr("braindecode_vis.preprocessing.bold.choose_by_voxel", stop)
    write_bold(config, tmp_path / "b", parts=kept)
    data = [read_responses(tmp_path / name / "responses").data for name in "ab"]
    np.testing.assert_array_equal(*data)


def test_per_split_keeps_test_runs_out_of_the_model(tmp_path):
    """Test volumes are replaced by noise; estimates of training trials keep every bit."""
    root, _ = write_tree(tmp_path / "bids", ("01", "02", "03"))
    before = {
        split: open_parts(root, replace_model(per_split=split), tested=[2])[1] for split in (False, True)
    }
    path = find_image(root, "03")
    image = nib.load(path)
    noise = np.random.default_rng(0).normal(1000, 30, image.shape).astype(np.float32)
    nib.Nifti1Image(noise, image.affine, image.header).to_filename(path)
    after = {
        split: open_parts(root, replace_model(per_split=split), tested=[2])[1] for split in (False, True)
    }
    for run in (0, 1):
        np.testing.assert_array_equal(after[True][run], before[True][run])
    assert np.abs(after[False][0] - before[False][0]).max() > 0
    betas, _ = open_parts(root, replace_model(per_split=True), tested=[2])
    assert "in runs without test trials" in betas.notes["estimates"]


def replace_model(**options):
    return BY_VOXEL.model_copy(update=options)


def rename(trials):
    """Give each run pictures of its own."""
    return trials.assign(
        stimulus_id=[f"{name}-{run}" for name, run in zip(trials["stimulus_id"], trials["run"], strict=True)]
    )


def test_without_repeats_only_the_response_function_is_chosen(tree):
    betas, values = open_parts(tree[0], GlmByVoxelConfig(), change=rename)
    (sentence,) = betas.notes["warnings"]
    assert "Subject 01: no picture recurs in another run" in sentence
    plain = open_parts(tree[0], GlmByVoxelConfig(denoise=False, ridge=False))[1]
    np.testing.assert_array_equal(values, plain)


@pytest.mark.parametrize(
    "model, tested, change, sentence",
    [
        ({"per_split": True}, (), None, r"declares no test trial, so every run is a training run"),
        (
            {"per_split": True},
            (0, 1),
            None,
            r"subject 01 has test trials in all 2 runs, so dataset\.model\.per_split",
        ),
        (
            {},
            (),
            lambda t: t.assign(onset=[*t["onset"][:-1], N * T_R - 0.5]),
            r"run 01, .*trial 6 of the run leaves no",
        ),
        (
            {},
            (),
            lambda t: t.assign(onset=t["onset"].iloc[0]),
            r"run 01, .*cannot be distinguished in one model",
        ),
    ],
)
def test_designs_without_a_model_are_refused(tree, model, tested, change, sentence):
    with pytest.raises(DataError, match=sentence):
        open_parts(tree[0], replace_model(**model), tested, change)


def test_standardised_images_have_no_percentage(tree, tmp_path):
    root = tmp_path / "bids"
    shutil.copytree(tree[0], root)
    for run in RUNS:
        path = find_image(root, run)
        image = nib.load(path)
        data = np.asarray(image.dataobj)
        data = np.where(MASK[..., None], data - data.mean(axis=-1, keepdims=True), 0).astype(np.float32)
        nib.Nifti1Image(data, image.affine, image.header).to_filename(path)
    with pytest.raises(DataError, match=r"were standardised before.*dataset\.model\.kind to glm"):
        open_parts(root, BY_VOXEL)
