"""Responses, predictions and scores leave in formats of other tools, and those tools read back the same numbers."""

import importlib
import json
import sys

import mne
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import braindecode_vis as bdv
from braindecode_vis.cli import main

# MNE reads its metadata by a way that pandas has announced to close.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index")

RIDGE = {"kind": "ridge", "alphas": [1.0]}
N_TRIALS, N_CHANNELS, N_TIMES = 24, 5, 8
FAST = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}


def make_eeg(unit="V"):
    rng = np.random.default_rng(0)
    pictures = rng.random((12, 6, 6))
    shown = np.arange(N_TRIALS) % 12
    X = pictures.reshape(12, -1)[shown] @ rng.normal(size=(36, N_CHANNELS * N_TIMES))
    X = (X + 0.1 * rng.normal(size=X.shape)).astype(np.float32)
    return bdv.from_arrays(
        X.reshape(N_TRIALS, N_CHANNELS, N_TIMES), images=pictures, shown=shown,
        subject=np.where(np.arange(N_TRIALS) < 12, "01", "02"), ch_names=["Fz", "Cz", "Pz", "Oz", "O1"],
        times=np.arange(N_TIMES) / 100 - 0.02, title="Mine", citation="Me (2026)", unit=unit, modality="eeg",
    )  # fmt: skip


def make_fmri():
    rng = np.random.default_rng(1)
    mask = np.zeros((3, 4, 5), np.uint8)
    mask[1, 1:3, :] = 1
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    X = rng.normal(size=(12, int(mask.sum()))).astype(np.float32)
    image = nib.Nifti1Image(mask, affine)
    return (
        bdv.from_arrays(X, labels=list("ab") * 6, mask_img=image, subject=["1"] * 6 + ["2"] * 6),
        X,
        mask,
        affine,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return bdv.decode(make_eeg(), encoder=RIDGE, split=3, out=out, settings=FAST)


def test_xarray_has_every_axis(tmp_path):
    data = make_eeg()
    made = data.to_xarray()
    assert made["responses"].dims == ("trial", "channel", "time")
    assert list(made["channel"].values) == ["Fz", "Cz", "Pz", "Oz", "O1"]
    assert made.attrs["title"] == "Mine"
    cut = made["responses"].sel(channel="Oz", time=slice(0, 0.05)).where(made["subject"] == "02", drop=True)
    rows = (data.trials["subject"] == "02").to_numpy()
    times = data.responses.coords["times"]
    inside = (times >= 0) & (times <= 0.05)
    np.testing.assert_array_equal(cut.values, data.responses.data[rows][:, 3][:, inside])


@pytest.mark.parametrize("to, name", [("netcdf", "x.nc"), ("zarr", "x.zarr")])
def test_grids_are_read_back(tmp_path, to, name):
    data = make_eeg()
    path = data.export(tmp_path / name, to=to)
    with xr.open_dataset(path, engine={"netcdf": "h5netcdf", "zarr": "zarr"}[to]) as found:
        np.testing.assert_array_equal(found["responses"].values, data.responses.data)
        assert list(found["stimulus_id"].values) == data.trials["stimulus_id"].tolist()
        np.testing.assert_allclose(found["time"].values, data.responses.coords["times"])
        assert found["responses"].attrs["units"] == "V"
    assert not list(tmp_path.glob(".tmp*"))


def test_volumes_keep_mask_and_affine_in_netcdf(tmp_path):
    data, _, mask, affine = make_fmri()
    with xr.open_dataset(data.export(tmp_path / "x.nc", to="netcdf"), engine="h5netcdf") as found:
        np.testing.assert_array_equal(found["mask"].values.astype(bool), mask > 0)
        np.testing.assert_array_equal(found["affine"].values, affine)
        np.testing.assert_array_equal(found["voxel"].values, np.flatnonzero(mask))


@pytest.mark.parametrize("unit, scale", [("V", 1.0), ("uV", 1e-6), ("z", 1.0)])
def test_epochs_are_volts(tmp_path, unit, scale):
    data = make_eeg(unit)
    path = data.export(tmp_path / "mine-epo.fif", to="fif")
    epochs = mne.read_epochs(path, verbose="error")
    expected = data.responses.data.astype(float) * scale
    np.testing.assert_allclose(epochs.get_data(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert epochs.metadata["stimulus_id"].tolist() == data.trials["stimulus_id"].tolist()
    np.testing.assert_allclose(epochs.times, data.responses.coords["times"], atol=1e-9)
    assert data.to_epochs().ch_names == ["Fz", "Cz", "Pz", "Oz", "O1"]


def test_nifti_puts_voxels_back(tmp_path):
    data, X, mask, affine = make_fmri()
    image = nib.load(data.export(tmp_path / "mine.nii.gz", to="nifti"))
    assert image.shape == (*mask.shape, 12)
    np.testing.assert_array_equal(image.affine, affine)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[mask > 0].T, X)
    table = pd.read_csv(tmp_path / "mine_trials.tsv", sep="\t")
    assert table["stimulus_id"].tolist() == data.trials["stimulus_id"].tolist()
    assert data.to_nifti("2").shape == (*mask.shape, 6)
    # and in again by the public door
    again = bdv.from_nifti(image, {"concept": table["stimulus_id"]}, mask_img=nib.Nifti1Image(mask, affine))
    np.testing.assert_array_equal(again.responses.data, X)


def check_derivative(folder):
    """Hold a folder against what BIDS asks of every derivative."""
    described = json.loads((folder / "dataset_description.json").read_text())
    assert {"Name", "BIDSVersion", "GeneratedBy"} <= set(described)
    assert described["DatasetType"] == "derivative"
    assert described["GeneratedBy"][0]["Name"] == "braindecode_vis"
    subjects = pd.read_csv(folder / "participants.tsv", sep="\t")["participant_id"].tolist()
    assert subjects == sorted(path.name for path in folder.glob("sub-*"))
    for path in folder.glob("sub-*/*/*"):
        parts = path.name.split("_")
        assert parts[0] == path.parent.parent.name
        assert all(part.count("-") == 1 and part.split("-")[1].isalnum() for part in parts[:-1])
    assert (folder / "README").is_file()
    return described


def test_bids_derivatives_of_eeg_and_fmri(tmp_path):
    described = check_derivative(make_eeg().export(tmp_path / "eeg", to="bids"))
    assert "Mine" in described["Name"]
    assert described["ReferencesAndLinks"] == ["Me (2026)"]
    epochs = mne.read_epochs(
        tmp_path / "eeg/sub-02/eeg/sub-02_task-images_desc-trials_epo.fif", verbose="error"
    )
    assert len(epochs) == 12
    data, X, mask, _ = make_fmri()
    check_derivative(data.export(tmp_path / "fmri", to="bids"))
    image = nib.load(tmp_path / "fmri/sub-2/func/sub-2_task-images_stat-effect_desc-trials_statmap.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj)[mask > 0].T, X[6:])


def test_tables_of_trials(tmp_path):
    data = make_eeg()
    table = pd.read_csv(data.export(tmp_path / "x.csv", to="csv"), dtype={"subject": str})
    assert table["subject"].tolist() == data.trials["subject"].tolist()
    np.testing.assert_allclose(table["Oz_time0.02"], data.responses.data[:, 3, 4], rtol=1e-5)
    pd.testing.assert_frame_equal(
        pd.read_parquet(data.export(tmp_path / "x.parquet", to="parquet"))[["subject", "stimulus_id"]],
        data.trials[["subject", "stimulus_id"]],
        check_dtype=False,
    )


def test_predictions_and_scores_of_a_run(run, tmp_path):
    made = run.to_xarray()
    np.testing.assert_array_equal(made["predictions"].values, run.predictions.vectors)
    assert list(made["stimulus_id"].values) == list(run.predictions.ids)
    np.testing.assert_array_equal(made["rank"].values, run.ranks["rank"])
    assert made.attrs["space"] == run.predictions.space
    one = run.to_xarray("predictions", fold=1)
    np.testing.assert_array_equal(one["predictions"].values, run.predictions_of_fold(1).vectors)
    for to, name in (("netcdf", "p.nc"), ("zarr", "p.zarr")):
        with xr.open_dataset(
            run.export("predictions", to, tmp_path / name), engine={"netcdf": "h5netcdf"}.get(to, to)
        ) as found:
            np.testing.assert_array_equal(found["predictions"].values, run.predictions.vectors)
    table = pd.read_csv(run.export("predictions", "csv", tmp_path / "p.csv"))
    np.testing.assert_allclose(table["feature3"], run.predictions.vectors[:, 3], rtol=1e-5, atol=1e-5)
    scores = pd.read_parquet(run.export("scores", "parquet", tmp_path / "s.parquet"))
    assert scores["value"].tolist() == run.scores["value"].tolist()
    grid = run.to_xarray("scores").set_index(score=["metric", "method", "subject"])
    top1 = run.scores.query("metric == 'top1' and method == 'decoded'")
    expected = top1.set_index("subject")["value"]["all"] if len(top1) > 1 else top1["value"].item()
    subject = "all" if len(top1) > 1 else top1["subject"].item()
    assert float(grid["value"].sel(score=("top1", "decoded", subject))) == expected
    folder = run.export("predictions", "bids", tmp_path / "bids")
    check_derivative(folder)
    rows = pd.read_csv(
        folder / "sub-02/eeg/sub-02_task-images_desc-decoded_trials.tsv", sep="\t", dtype={"stimulus_id": str}
    )
    vectors = np.load(folder / "sub-02/eeg/sub-02_task-images_desc-decoded_embeddings.npy")
    assert len(rows) == len(vectors) > 0
    check_derivative(run.export("scores", "bids", tmp_path / "scores"))
    assert run.to_epochs().get_data().shape == (N_TRIALS, N_CHANNELS, N_TIMES)


def test_decisions_of_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array(["face", "house"] * 12)
    X = rng.normal(size=(24, 6)) + (labels == "face")[:, None]
    run = bdv.decode(
        bdv.from_arrays(X, labels=labels, run=np.arange(24) // 6), out=tmp_path / "run", settings=FAST
    )
    made = run.to_xarray()
    assert list(made["decoded"].values) == run.items["decoded"].tolist()
    table = pd.read_csv(run.export("predictions", "csv", tmp_path / "p.csv"))
    assert table["label"].tolist() == run.items["label"].tolist()


def test_what_cannot_be_exported_is_one_sentence(run, tmp_path, monkeypatch):
    eeg, fmri = make_eeg(), make_fmri()[0]
    with pytest.raises(bdv.DataError, match="only trials of voxels or parcels become NIfTI"):
        eeg.export(tmp_path / "x.nii", to="nifti")
    with pytest.raises(bdv.DataError, match="only trials of channels and times become MNE epochs"):
        fmri.to_epochs()
    with pytest.raises(bdv.ConfigError, match=r"did you mean 'netcdf'"):
        eeg.export(tmp_path / "x.nc", to="netcdf4")
    with pytest.raises(bdv.ConfigError, match="scores cannot be written as fif"):
        run.export("scores", "fif", tmp_path / "x-epo.fif")
    with pytest.raises(bdv.ConfigError, match=r"ends with -epo.fif or _epo.fif"):
        eeg.export(tmp_path / "x.fif", to="fif")
    with pytest.raises(bdv.ConfigError, match="folds 0 to 2, not 3"):
        run.export("predictions", "csv", tmp_path / "x.csv", fold=3)
    with pytest.raises(bdv.ConfigError, match="belong to the whole run"):
        run.export("scores", "csv", tmp_path / "x.csv", fold=0)
    with pytest.raises(bdv.ConfigError, match="subject is '09'"):
        eeg.export(tmp_path / "x.nc", to="netcdf", subject="09")
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(bdv.ConfigError, match="exists; choose another path"):
        eeg.export(tmp_path / "there.csv", to="csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    plain = bdv.from_arrays(np.random.default_rng(0).normal(size=(6, 2, 3)), labels=list("aabbcc"))
    with pytest.raises(bdv.DataError, match="MNE epochs need ch_names, times, sfreq"):
        plain.to_epochs()
    with pytest.raises(bdv.DataError, match="no voxel ids"):
        bdv.from_arrays(
            np.ones((4, 3)) * np.arange(4)[:, None], labels=list("abab"), modality="fmri"
        ).to_nifti()
    real = importlib.import_module

    def lose(name, *args):
        if name == "h5netcdf":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", lose)
    with pytest.raises(bdv.ConfigError, match=r"needs h5netcdf, .* pip install 'braindecode_vis\[export\]'"):
        eeg.export(tmp_path / "x.nc", to="netcdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.csv"]


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["braindecode-vis", *map(str, args)])
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_verb_writes_and_refuses(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scores.csv"
    assert call(monkeypatch, "export", run.folder, "--what", "scores", "--to", "csv", "--out", out) == 0
    assert len(pd.read_csv(out)) == len(run.scores)
    capsys.readouterr()
    assert call(monkeypatch, "export", run.folder, "--what", "scores", "--to", "csv", "--out", out) == 2
    assert "exists; choose another path" in capsys.readouterr().err
    bad = ("export", run.folder, "--what", "responses", "--to", "nifti", "--out", tmp_path / "x.nii")
    assert call(monkeypatch, *bad) == 2
    assert capsys.readouterr().err.count("\n") == 1
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    assert (
        call(
            monkeypatch, "export", unfinished, "--what", "scores", "--to", "csv", "--out", tmp_path / "n.csv"
        )
        == 2
    )
    assert "is unfinished: its stage preprocess is missing" in capsys.readouterr().err
