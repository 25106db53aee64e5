"""Responses, predictions and scores leave in formats of other tools, and those tools read back the same numbers."""

import base64
import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

import mne
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image

import braindecode_vis as bdv
from braindecode_vis.api import exports
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.pipeline.runs import Run
from tests.references import assert_close

# MNE reads its metadata by a way that pandas has announced to close.
pytestmark = [
    pytest.mark.whole,
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index"),
]

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
    assert_close(epochs.times, data.responses.coords["times"])
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
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    with pytest.raises(bdv.ConfigError, match=r"needs h5netcdf, .* pip install 'braindecode_vis\[export\]'"):
        eeg.export(tmp_path / "x.nc", to="netcdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.csv"]


#: Killed by a signal when all but the file that was asked for has been moved.
HALF_MOVED = """
import os, sys
from pathlib import Path
from braindecode_vis.api.exports import write_new
from braindecode_vis.cli.failures import stop_cleanly

move = Path.rename
def rename(self, target):
    if self.name == "mine.nii":
        os.kill(os.getpid(), int(sys.argv[2]))
    return move(self, target)
Path.rename = rename
with stop_cleanly(), write_new(sys.argv[1], "nifti") as file:
    file.write_text("image")
    file.with_name("mine_trials.tsv").write_text("trials")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_export_killed_between_its_files_can_be_repeated(tmp_path, number):
    """The table of trials stood there without its image for ever, and the same command was refused because of it."""
    path, table = tmp_path / "mine.nii", tmp_path / "mine_trials.tsv"
    command = [sys.executable, "-c", HALF_MOVED, path, str(int(number))]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0
    assert not path.exists()
    assert table.exists() == (number == signal.SIGKILL)
    make_fmri()[0].export(path, to="nifti")
    assert sorted(tmp_path.iterdir()) == [path, table]
    assert len(pd.read_csv(table, sep="\t")) == 12


def test_a_file_that_took_the_place_of_a_killed_one_stays(tmp_path):
    command = [sys.executable, "-c", HALF_MOVED, tmp_path / "mine.nii", str(int(signal.SIGKILL))]
    subprocess.run(command)
    other, table = tmp_path / "other", tmp_path / "mine_trials.tsv"
    other.write_text("somebody else's")
    other.replace(table)
    with pytest.raises(bdv.ConfigError, match=r"mine_trials.tsv exists; choose another path"):
        make_fmri()[0].export(tmp_path / "mine.nii", to="nifti")
    assert table.read_text() == "somebody else's"
    assert list(tmp_path.iterdir()) == [table]


def test_the_verb_writes_and_refuses(run, tmp_path, command_line):
    def export(folder, what, form, name):
        return command_line("export", folder, "--what", what, "--to", form, "--out", tmp_path / name)

    assert export(run.folder, "scores", "csv", "scores.csv").returncode == 0
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(run.scores)
    done = export(run.folder, "scores", "csv", "scores.csv")
    assert done.returncode == 2
    assert "exists; choose another path" in done.stderr
    done = export(run.folder, "responses", "nifti", "x.nii")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    done = export(unfinished, "scores", "csv", "n.csv")
    assert done.returncode == 2
    assert "is unfinished: its stage preprocess is missing" in done.stderr


def read_png(path):
    return np.asarray(Image.open(path))


def test_images_and_gallery_from_the_shell(tmp_path, command_line):
    """PNGs of the seen and decoded images are those of the run, under names that show image and subject."""
    rng = np.random.default_rng(0)
    pictures = {f"a picture/{n}": picture for n, picture in enumerate(rng.random((12, 6, 6)))}
    X = np.stack([picture.ravel() for picture in pictures.values()]).repeat(2, axis=0)
    shown = np.repeat(list(pictures), 2)
    data = bdv.from_arrays(
        X + 0.1 * rng.normal(size=X.shape), images=pictures, shown=shown, subject=["s/1"] * 24
    )
    run = bdv.decode(
        data, encoder=RIDGE, split=3, out=tmp_path / "run", settings={**FAST, "repeats.test": "single"}
    )
    out = tmp_path / "images"
    done = command_line("export", run.folder, "--what", "images", "--out", out)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out / "images.csv")
    assert table["stimulus_id"].tolist() == run.items["stimulus_id"].tolist()
    for kind in ("seen", "decoded"):
        assert table[kind].str.fullmatch(rf"{kind}/a-picture-\d+_sub-s1_rep-[12]\.png").all()
        assert table[kind].is_unique
        for row, name in enumerate(table[kind]):
            np.testing.assert_array_equal(read_png(out / name), run.reconstructions[kind][row])
    assert read_png(out / "gallery.png").shape[2] == 4
    judged = tmp_path / "judged"
    done = command_line("export", run.folder, "--what", "submission", "--to", "basic", "--out", judged)
    assert done.returncode == 0, done.stderr
    (place,) = (judged / "res_decoding").iterdir()
    for kind, name in (("seen", "images"), ("decoded", run.config.name)):
        assert sorted(path.name for path in (place / name).iterdir()) == sorted(
            path.name for path in (out / kind).iterdir()
        )
        for path in (place / name).iterdir():
            np.testing.assert_array_equal(read_png(path), read_png(out / kind / path.name))
    for more, words in (
        (("--what", "images", "--out", out), "exists; choose another path"),
        (
            ("--what", "submission", "--to", "basic", "--fold", 0, "--out", tmp_path / "x"),
            "leave fold and subject out",
        ),
        (("--what", "images", "--to", "csv", "--out", tmp_path / "x"), "images cannot be written as csv"),
        (("--what", "images", "--subject", "s/1", "--out", tmp_path / "x"), "leave fold and subject out"),
        (("--what", "scores", "--out", tmp_path / "x"), "give the format of scores with --to: one of netcdf"),
        (("--what", "pictures", "--out", tmp_path / "x"), "what is 'pictures'"),
    ):
        done = command_line("export", run.folder, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr


# --- encoders ----------------------------------------------------------------------------------------------------


def make_network(kind, **settings):
    return {"kind": "network", "network": {"kind": kind, **settings}, "epochs": 1, "device": "cpu"}


def fit_network(kind, subjects=("a", "b"), **encoder):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 6, 100)).astype(np.float32)
    data = bdv.from_arrays(
        X, images=rng.random((40, 8, 8)), shown=np.arange(40), ch_names=["Fz", "Cz", "Pz", "Oz", "O1", "O2"],
        times=np.arange(100) / 100, subject=np.resize(subjects, 40), title="Mine", modality="eeg",
    )  # fmt: skip
    return bdv.Decoder(encoder={**make_network(kind), **encoder}).fit(data), data


def run_onnx(path, decoder, data):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    subjects = pd.Index(decoder._subjects).get_indexer(data.trials["subject"].astype(str)).astype(np.int64)
    given = {"responses": np.asarray(data.responses.data, np.float32), "subject": subjects}
    return session.run(None, {entry.name: given[entry.name] for entry in session.get_inputs()})[0]


def run_pt2(path, decoder, data):
    import torch

    subjects = pd.Index(decoder._subjects).get_indexer(data.trials["subject"].astype(str)).astype(np.int64)
    inputs = [np.array(data.responses.data, np.float32), subjects]
    n_inputs = len(json.loads(path.with_name(f"{path.name}.json").read_text())["inputs"])
    with torch.inference_mode():
        return torch.export.load(path).module()(*map(torch.from_numpy, inputs[:n_inputs])).numpy()


@pytest.mark.parametrize(
    ("kind", "alignment"),
    [
        ("eegproject", "euclidean"),
        pytest.param("atm_s", "none", marks=pytest.mark.further),
        pytest.param("eegproject", "zscore", marks=pytest.mark.further),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own insides
def test_a_network_runs_the_same_in_onnx_and_torch_export(tmp_path, kind, alignment):
    decoder, data = fit_network(kind, subject_alignment=alignment)
    expected = decoder.predict(data)
    for to, name, call in (("onnx", "m.onnx", run_onnx), ("torch-export", "m.pt2", run_pt2)):
        path = decoder.export(tmp_path / name, to=to, licence="mit")
        found = call(path, decoder, data)
        np.testing.assert_allclose(found.reshape(len(found), -1), expected, rtol=1e-3, atol=1e-4)
        stated = json.loads(path.with_name(f"{path.name}.json").read_text())
        assert 0 <= stated["largest_difference"] < 1e-3
        assert "largest difference was" in path.with_name(f"{path.name}.md").read_text()


@pytest.mark.further
@pytest.mark.parametrize("kind", ["tsconv", "eegnet", "latent_decoder"])
@pytest.mark.filterwarnings("ignore")
def test_other_networks_can_be_exported(tmp_path, kind):
    decoder, data = fit_network(kind)
    path = decoder.export(tmp_path / "m.onnx", to="onnx", X=data)
    found = run_onnx(path, decoder, data)
    np.testing.assert_allclose(found.reshape(len(found), -1), decoder.predict(data), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_network_with_a_layer_for_each_subject_is_refused(tmp_path):
    """Its layers are picked by which subjects are in a batch, which a traced program cannot do."""
    rng = np.random.default_rng(0)
    data = bdv.from_arrays(
        rng.normal(size=(40, 60)).astype(np.float32), images=rng.random((40, 8, 8)), shown=np.arange(40),
        subject=["a", "b"] * 20, dims=("trial", "voxel"),
    )  # fmt: skip
    decoder = bdv.Decoder(encoder=make_network("shared_space")).fit(data)
    with pytest.raises(
        bdv.ConfigError, match=r"the encoder shared_space cannot be exported to onnx .*safetensors"
    ):
        decoder.export(tmp_path / "m.onnx", to="onnx")
    assert list(tmp_path.iterdir()) == []
    assert (decoder.export(tmp_path / "m", to="safetensors") / "network.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_ridge_and_classes_as_programs(run, tmp_path):
    decoder = bdv.Decoder.from_run(run, fold=1)
    np.testing.assert_array_equal(
        decoder.predict(run_test_trials(run, 1)).reshape(-1), run.predictions_of_fold(1).flat().reshape(-1)
    )
    for to, name in (("onnx", "r.onnx"), ("torch-export", "r.pt2")):
        path = run.export("encoder", to, tmp_path / name, fold=1)
        data = make_eeg()
        call = run_onnx if to == "onnx" else run_pt2
        found = call(path, decoder, data)
        np.testing.assert_allclose(found.reshape(len(found), -1), decoder.predict(data), rtol=1e-4, atol=1e-3)
        card = path.with_name(f"{path.name}.md").read_text()
        assert "95 % interval" in card
        assert "| top1 |" in card
        assert "Fold 1 of 3" in card
    labels = np.array(["face", "house"] * 20)  # the columns of a program are named in its table
    X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) + (labels == "face")[:, None]
    for encoder in ("lda", {"kind": "logistic", "c": [1.0]}):
        classes = bdv.Decoder(encoder=encoder).fit(X, labels)
        path = classes.export(tmp_path / f"{encoder if encoder == 'lda' else 'logistic'}.onnx", to="onnx")
        data = bdv.from_arrays(X, labels=labels)
        np.testing.assert_allclose(run_onnx(path, classes, data), classes.predict_proba(X), atol=1e-5)
        assert json.loads(path.with_name(f"{path.name}.json").read_text())["classes"] == ["face", "house"]


def test_a_fold_that_tests_one_picture_is_checked_on_noise(run, tmp_path, monkeypatch):
    """Ten folds of twenty pictures could not be exported, and the message asked for what nobody could give."""
    monkeypatch.setattr("braindecode_vis.api.fold_decoder.FEWEST_CHECKED", 10**6)
    card = run.export("encoder", "onnx", tmp_path / "few.onnx", fold=0).with_name("few.onnx.json").read_text()
    assert json.loads(card)["n_checked"] == 64


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("to", "name"), [pytest.param("onnx", "c.onnx", marks=pytest.mark.further), ("torch-export", "c.pt2")]
)
def test_a_network_of_classes_as_a_program(tmp_path, to, name):
    labels = np.array(["face", "house"] * 20)
    X = np.random.default_rng(0).normal(size=(40, 6, 64)).astype(np.float32)
    encoder = {**make_network("eegproject"), "kind": "network_categories"}
    decoder = bdv.Decoder(encoder=encoder).fit(X, labels)
    path = decoder.export(tmp_path / name, to=to)
    found = (run_onnx if to == "onnx" else run_pt2)(path, decoder, bdv.from_arrays(X, labels=labels))
    np.testing.assert_allclose(found, decoder.predict_proba(X), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("to", "name"), [("onnx", "m.onnx"), ("torch-export", "m.pt2")])
def test_a_network_that_cannot_be_traced_is_one_sentence(tmp_path, monkeypatch, to, name):
    """Networks of other packages do what they like in `forward`; braindecode's need not be installed for this."""
    from braindecode_vis.encoders.atm import TSConv

    decoder, data = fit_network("tsconv")
    forward = TSConv.forward

    def forward_by_value(self, x, *args):
        return forward(self, x * 2 if float(x.sum().item()) > 0 else x, *args)

    monkeypatch.setattr(TSConv, "forward", forward_by_value)
    with pytest.raises(bdv.ConfigError, match="safetensors") as caught:
        decoder.export(tmp_path / name, to=to, X=data)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def run_test_trials(run, number):
    from braindecode_vis.pipeline.learning import pick_test_trials

    return pick_test_trials(run._run, number)


def test_safetensors_folder_is_read_as_its_card_says(run, tmp_path):
    from huggingface_hub import ModelCard
    from safetensors.numpy import load_file

    from braindecode_vis.base.registry import validate_component

    folder = run.export("encoder", "safetensors", tmp_path / "m", fold=0)
    settings = json.loads((folder / "config.json").read_text())["encoder"]
    encoder = validate_component("encoder", settings).read(folder)
    trials = run_test_trials(run, 0)
    np.testing.assert_array_equal(encoder.predict(trials).vectors, run.predictions_of_fold(0).vectors)
    assert load_file(folder / "ridge.safetensors")["weights"].shape[0] == N_CHANNELS * N_TIMES
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "braindecode_vis"
    assert {result.metric_type for result in card.data.eval_results} <= set(run.scores["metric"])
    for word in ("Mine", "Me (2026)", "## Protocol", "No licence was stated", "ridge"):
        assert word in card.text


@pytest.fixture(scope="module")
def fitted(run):
    return bdv.Decoder.from_run(run, fold=0)


def test_a_decoder_of_a_folder(run, tmp_path):
    """A path was a bare AttributeError once."""
    X = make_eeg().responses.data
    ours, same = bdv.Decoder.from_run(str(run.folder), fold=1), bdv.Decoder.from_run(run, fold=1)
    np.testing.assert_array_equal(ours.predict(X), same.predict(X))
    empty, unfinished = tmp_path / "empty", tmp_path / "unfinished"
    for folder in (empty, unfinished):
        folder.mkdir()
    (unfinished / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    for given, words in (
        (tmp_path / "missing", "missing is not a run folder: it holds no config.yaml"),
        (empty, "empty is not a run folder: it holds no config.yaml"),
        (unfinished, "unfinished is unfinished: its stage preprocess is missing"),
        (3, "takes a run of decode or open_run, or the folder of one, not int"),
    ):
        with pytest.raises(bdv.DataError, match=words):
            bdv.Decoder.from_run(given)


def test_to_and_from_a_folder(fitted, run, tmp_path):
    trials = run_test_trials(run, 0)
    folder = fitted.push_to_hub(tmp_path / "shared", licence="mit")
    again = bdv.Decoder.from_pretrained(folder)
    np.testing.assert_array_equal(again.predict(trials), fitted.predict(trials))
    gallery = make_eeg().stimuli.pixels
    pd.testing.assert_frame_equal(
        again.retrieve(trials, gallery=gallery), fitted.retrieve(trials, gallery=gallery)
    )
    # The pictures stay at home: neither their pixels nor embeddings that are pixels.
    assert not (tmp_path / "shared" / "stimuli").exists()
    assert np.load(tmp_path / "shared" / "bank" / "vectors.npy").shape[0] == 0
    with pytest.raises(bdv.DataError, match="shared without its training pictures"):
        again.reconstruct(trials)
    with pytest.raises(bdv.DataError, match="pass gallery=pictures"):
        again.retrieve(trials)
    whole = bdv.Decoder.from_pretrained(fitted.push_to_hub(tmp_path / "whole", include_pictures=True))
    np.testing.assert_array_equal(whole.reconstruct(trials), fitted.reconstruct(trials))
    with pytest.raises(bdv.ConfigError, match="exists; choose another path"):
        fitted.push_to_hub(tmp_path / "shared")
    assert "license: mit" in (tmp_path / "shared" / "README.md").read_text()


def test_nothing_leaves_or_comes_without_consent(fitted, tmp_path):
    with pytest.raises(bdv.ConfigError, match="pass upload=True"):
        fitted.push_to_hub("me/mine")
    with pytest.raises(bdv.ConfigError, match="pass download=True"):
        bdv.Decoder.from_pretrained("me/mine")
    with pytest.raises(bdv.ConfigError, match="is a path"):
        fitted.push_to_hub(tmp_path / "x", upload=True)
    with pytest.raises(bdv.DataError, match="holds no decoder"):
        bdv.Decoder.from_pretrained(tmp_path / "x")


def test_an_encoder_needs_a_fold_and_a_finished_run(run, tmp_path, command_line):
    with pytest.raises(bdv.ConfigError, match="3 folds with an encoder each; choose one of 0 to 2"):
        run.export("encoder", "safetensors", tmp_path / "m")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    (unfinished / "stages").mkdir()
    (unfinished / "stages" / "preprocess").symlink_to(run.folder / "stages" / "preprocess")
    (unfinished / "stages" / "embed").symlink_to(run.folder / "stages" / "embed")
    fold = ("--what", "encoder", "--fold", 0)
    done = command_line("export", unfinished, *fold, "--to", "onnx", "--out", tmp_path / "x.onnx")
    assert done.returncode == 2
    assert "is unfinished: its stage train fold00 is missing" in done.stderr
    asked = ("--what", "submission", "--to", "challenge", "--fold", 0, "--out", tmp_path / "s")
    done = command_line("export", unfinished, *asked)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "its stage train fold00 is missing" in done.stderr
    done = command_line("export", run.folder, *asked)  # its trials have another rate
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the challenge's trials have 120 Hz from -0.2 to 0.8 s" in done.stderr
    assert not list(tmp_path.glob("s*"))
    done = command_line("export", run.folder, *fold, "--to", "safetensors", "--out", tmp_path / "e")
    assert done.returncode == 0
    assert (tmp_path / "e" / "README.md").is_file()


# --- the hub -----------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as one upload and one download ask for."""

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        repo = self.server.repo
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            if asked["organization"] != "me":
                return self.answer(403, {"error": "not yours"})
            self.server.private = asked["visibility"]
            return self.answer(200, {"url": f"https://huggingface.co/{repo}", "id": repo})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == f"/api/models/{repo}/preupload/main":
            names = [file["path"] for file in json.loads(content)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer(200, {"files": files})
        if self.path == f"/api/models/{repo}/commit/main":
            for line in content.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer(
                200, {"commitUrl": f"https://huggingface.co/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        repo, files = self.server.repo, self.server.files
        if re.fullmatch(rf"/api/models/{repo}/revision/\w+", self.path):
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})
        if self.path.startswith(f"/api/models/{repo}/tree/{COMMIT}"):
            listed = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(files[name]),
                    "oid": hashlib.sha1(files[name]).hexdigest(),
                }
                for name in files
            ]
            return self.answer(200, listed)
        found = re.fullmatch(rf"/{repo}/resolve/\w+/(.+)", self.path)
        if found and found[1] in files:
            content = files[found[1]]
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repo, server.files, server.tokens, server.private = "me/mine", {}, set(), None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # All other tests are kept off the network; this one stays on the loopback.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_to_and_from_a_stand_in_of_the_hub(fitted, run, hub, tmp_path):
    address = fitted.push_to_hub("me/mine", upload=True, licence="cc-by-4.0", token="hf_test")
    assert address.endswith(COMMIT)
    assert hub.private == "private"
    assert hub.tokens == {"Bearer hf_test"}
    assert {"decoder.json", "README.md", "encoder/ridge.safetensors"} <= set(hub.files)
    assert not [name for name in hub.files if "stimuli" in name or name.endswith((".pkl", ".bin", ".py"))]
    hub.files["evil.py"] = b"raise SystemExit"
    options = {"download": True, "token": "hf_test", "cache": tmp_path / "cache"}
    again = bdv.Decoder.from_pretrained("me/mine", **options)
    trials = run_test_trials(run, 0)
    np.testing.assert_array_equal(again.predict(trials), fitted.predict(trials))
    assert not list((tmp_path / "cache").rglob("evil.py"))
    with pytest.raises(bdv.DataError, match=r"download me/other failed \("):
        bdv.Decoder.from_pretrained("me/other", **options)
    with pytest.raises(bdv.DataError, match=r"upload to you/mine failed \("):
        fitted.push_to_hub("you/mine", upload=True, token="hf_test")


def test_a_downloaded_decoder_brings_no_code_and_no_consent(fitted, hub, tmp_path):
    fitted.push_to_hub("me/mine", upload=True, token="hf_test")
    options = {"download": True, "token": "hf_test"}
    record = json.loads(hub.files["decoder.json"])
    record["parameters"]["generator"] = {"kind": "sdxl_turbo", "allow_download": True}
    hub.files["decoder.json"] = json.dumps(record).encode()
    decoder = bdv.Decoder.from_pretrained("me/mine", cache=tmp_path / "one", **options)
    assert decoder.generator["allow_download"] is False
    record["parameters"]["encoder"] = {"kind": "this:Thing"}
    hub.files["decoder.json"] = json.dumps(record).encode()
    with pytest.raises(bdv.ConfigError, match=r"asks for code from outside the package \(this:Thing\)"):
        bdv.Decoder.from_pretrained("me/mine", cache=tmp_path / "two", **options)


def test_predictions_are_joined_fold_by_fold_with_the_ranks_of_their_trials(tmp_path, monkeypatch):
    """Columns that the trials have already are not taken twice, and ranks of other trials are refused."""
    names = [["a", "b"], ["c", "a", "d"]]
    trials = [pd.DataFrame({"stimulus_id": own, "session": str(n)}, index=[7 + k for k in range(len(own))])
              for n, own in enumerate(names)]  # fmt: skip
    ranks = pd.DataFrame({"fold": [0, 0, 1, 1, 1], "stimulus_id": names[0] + names[1], "rank": range(5)})
    ranks.to_parquet(tmp_path / "ranks.parquet")
    spaces = ["toy", "toy"]
    found = lambda run: SimpleNamespace(  # noqa: E731
        artifact=SimpleNamespace(path=tmp_path),
        folds=[SimpleNamespace(predicted=Embeddings(np.full((len(own), 2), n), own, spaces[n]))
               for n, own in enumerate(names)],
    )  # fmt: skip
    monkeypatch.setattr(exports, "retrieve", found)
    monkeypatch.setattr(exports, "check_fold", lambda run, fold: [0, 1] if fold is None else [fold])
    monkeypatch.setattr(exports, "pick_test_trials", lambda run, n: SimpleNamespace(trials=trials[n]))
    run = Mock(spec=Run, config=Mock(decodes_categories=False))
    table, vectors = exports.read_prediction_table(run, None)
    assert table.columns.tolist() == ["stimulus_id", "session", "fold", "rank"]
    assert table["rank"].tolist() == list(range(5))
    assert table["stimulus_id"].tolist() == list(vectors.ids) == [*"abcad"]
    assert table["session"].tolist() == list("00111")
    assert vectors.vectors[:, 0].tolist() == [0, 0, 1, 1, 1]
    assert exports.read_prediction_table(run, 1)[0]["rank"].tolist() == [2, 3, 4]
    spaces[1] = "other"
    with pytest.raises(bdv.ConfigError, match="choose a fold"):
        exports.read_prediction_table(run, None)
    names[1] = ["c", "d", "a"]
    with pytest.raises(bdv.DataError, match="the ranks of fold 1 belong to other trials"):
        exports.read_prediction_table(run, 1)
    run.config.decodes_categories = True
    with pytest.raises(bdv.ConfigError, match="leave out the fold"):
        exports.read_prediction_table(run, 1)
