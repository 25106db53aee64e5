"""One call to a complete data set: every format, its estimate, its truth, and what readers find in its files."""

import json
import pickle

import h5py
import mne
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat

from braindecode_vis.base.registry import find_component
from braindecode_vis.base.store import read_stimuli
from braindecode_vis.datasets.kamitani.bdata import read_list
from braindecode_vis.datasets.manifests import read_manifests
from braindecode_vis.datasets.nsd.dataset import NsdConfig
from braindecode_vis.datasets.nsd.imagery_dataset import NsdImageryConfig
from braindecode_vis.datasets.things_eeg2.dataset import ThingsEeg2Config
from braindecode_vis.parts.phantom import (
    FORMATS,
    SIZE_NAMES,
    SIZES,
    UNLABELLED,
    PhantomConfig,
    compute_evoked,
    estimate_phantom,
    make_phantom,
    make_sensor_system,
    read_truth,
)
from braindecode_vis.parts.phantom.brain import make_person
from braindecode_vis.parts.phantom.drive import compute_drive
from braindecode_vis.parts.phantom.format_plan import TRUTH
from braindecode_vis.parts.phantom.formats.nsd_files import make_subject_scanner
from braindecode_vis.parts.phantom.scanner import GRIDS, make_scanner
from tests.parts.phantom.tiny import embed

CONFIG = PhantomConfig(snr=0.3)


LABELLED = [name for name in FORMATS if name not in UNLABELLED]


def refuse(stimuli):
    raise AssertionError("the images were embedded a second time")


def measure(root):
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tiny phantom of every format, made when it is first asked for; with the steps that were reported."""
    roots = {}

    def make(name):
        if name not in roots:
            root = tmp_path_factory.mktemp("phantoms") / name
            steps = []
            truth = make_phantom(
                name, root, size=SIZES[name]["tiny"], config=CONFIG, embed=embed, advance=steps.append
            )
            roots[name] = (root, truth, steps)
        return roots[name]

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_estimate_holds(made, name):
    root, _, steps = made(name)
    estimate = estimate_phantom(name, SIZES[name]["tiny"])
    assert estimate.n_bytes == pytest.approx(measure(root), rel=0.3)
    assert sum(steps) == estimate.n_steps
    assert estimate.n_images == len(pd.read_csv(root / TRUTH / "stimuli.tsv", sep="\t"))
    assert min(estimate.seconds, estimate.recording_s) > 0


@pytest.mark.parametrize("name", LABELLED)
def test_truth_lies_beside_the_data(made, name):
    root, truth, _ = made(name)
    assert read_truth(root) == truth
    stimuli = truth.read_stimuli()
    assert truth.chance == 1 / truth.n_test == 1 / (stimuli["split"] == "test").sum()
    assert np.mean([person["ideal_top1"]["1"] for person in truth.subjects]) >= truth.chance
    assert truth.networks["default"] == CONFIG.networks.default
    onsets = [stage["onset_s"] for stage in truth.subjects[0]["stages"]]
    assert truth.subjects[0]["onset_s"] == min(onsets)
    kind = "betas" if (root / TRUTH / "voxels.tsv").is_file() else "evoked"
    responses = np.load(root / TRUTH / f"sub-01_{kind}.npy")
    assert responses.dtype == np.float32
    assert len(responses) == (stimuli["truth_row"] >= 0).sum()
    assert np.isfinite(responses).all()
    for path in stimuli["path"]:
        assert (root / path).is_file()
    assert not list(root.rglob(".tmp-*"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("step", SIZE_NAMES)
def test_every_preset_is_possible(name, step):
    estimate = estimate_phantom(name, SIZES[name][step])
    assert estimate.n_bytes > 0


def test_full_sizes_are_those_of_the_public_sets():
    full = {name: estimate_phantom(name, SIZES[name]["full"]) for name in FORMATS}
    assert full["things-eeg2"].n_trials == 10 * (16540 * 4 + 200 * 80)
    assert full["nsd"].n_images == 73000
    assert full["nsd"].n_trials == 8 * 30000
    assert full["god"].n_trials == 5 * (1200 + 1750)
    assert full["things-fmri"].n_trials == 3 * (620 * 12 + 100 * 12)  # besides the images of test concepts


def test_truth_can_be_computed_again_from_the_kept_drive(made):
    root, truth, _ = made("things-eeg2")
    stimuli = truth.read_stimuli()
    drive = compute_drive(stimuli, root, truth.folder, embed=refuse, n_semantic=32)
    person = make_person(truth.config, 0, drive)
    rows = np.flatnonzero(stimuli["split"] == "test")
    evoked = compute_evoked(person, make_sensor_system("eeg63"), rows, sfreq=200.0, tmin=-0.1, tmax=1.0)
    kept = np.load(truth.folder / "sub-01_evoked.npy")[stimuli["truth_row"].to_numpy()[rows]]
    np.testing.assert_allclose(kept, evoked, atol=1e-5 * np.abs(kept).max())  # products of other sizes round


# What a format needs beside its defaults. Its reader is the data set that names the format first.
OPTIONS = {
    "things-eeg2-official": {"sfreq": 100.0, "channels": "posterior17"},
    "things-eeg2-ubp": {"trust_pickle": True},
}
LOADERS = {
    form: (find_component("dataset", kind), OPTIONS.get(form, {}))
    for kind, manifest in reversed(read_manifests().items())
    for form in manifest.phantoms
}


# Files of torch are opened by processes of their own, which import it.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.further if name == "things-eeg2-ubp" else ()) for name in LABELLED],
)
def test_the_real_loader_reads_it(made, name, tmp_path):
    """The split of a loader may leave images out, but it knows no image that was not drawn."""
    root, truth, _ = made(name)
    loader, options = LOADERS[name]
    config = loader(root=root, **options)
    if hasattr(config, "write"):
        config.write(tmp_path, seed=0)
        stimuli = read_stimuli(tmp_path / "stimuli")
    else:
        opening = next(name for name in ("open_epochs", "open_bold", "open_betas") if hasattr(config, name))
        source = config.open_epochs(tmp_path) if opening == "open_epochs" else getattr(config, opening)()
        stimuli = source.stimuli
    # A newcomer's `check` finds nothing wrong with it: sizes of a phantom are told and not judged.
    assert [finding for finding in config.check() if not finding.ok] == []
    drawn = truth.read_stimuli()
    assert 0 < len(stimuli) <= len(drawn)
    if stimuli.root is not None:  # pictures in files, and every one is found
        assert set(stimuli.table["sha256"]) <= set(drawn["sha256"])
    if name.startswith("things-eeg2"):
        assert source.n_trials == truth.size.n_trials
        assert set(stimuli.ids) == set(drawn["stimulus_id"])


# --- readers that know nothing of us ------------------------------------------------------------------------


def load_dict(path):
    return np.load(path, allow_pickle=True).item()


def test_things_eeg2_reads_back(made):
    root, _, _ = made("things-eeg2")
    metadata = load_dict(root / "image_metadata.npy")
    assert len(metadata["train_img_files"]) == 12
    seen = []
    for session in (1, 2):
        raw = load_dict(root / "sub-01" / f"ses-{session:02d}" / "raw_eeg_training.npy")
        assert raw["raw_eeg_data"].shape[0] == 64
        assert 3e-6 < raw["raw_eeg_data"][:-1].std() < 1e-3
        codes = raw["raw_eeg_data"][-1][raw["raw_eeg_data"][-1] > 0]
        seen.append(codes[codes != 99999].astype(int))
    assert np.bincount(np.concatenate(seen))[1:].tolist() == [2] * 12
    assert not set(seen[0]) & set(seen[1])


def test_things_eeg2_goes_through_the_real_loader(made):
    root, truth, _ = made("things-eeg2")
    source = ThingsEeg2Config(root=root).open_epochs()
    assert all(finding.ok for finding in ThingsEeg2Config(root=root).check())
    assert source.n_trials == truth.size.n_trials
    assert set(source.stimuli.ids) == set(truth.read_stimuli()["stimulus_id"])
    part = source.parts[0]
    assert part.read(0, 100).shape == (63, 100)


@pytest.mark.parametrize("name, sfreq, shape", [
    ("things-eeg2-official", 100.0, (17, 100)),
    ("things-eeg2-250hz", 250.0, (63, 250)),
])  # fmt: skip
def test_derived_things_eeg2_reads_back(made, name, sfreq, shape):
    root, truth, _ = made(name)
    path = root / "sub-01" / "preprocessed_eeg_training.npy"
    if name.endswith("official"):
        content = load_dict(path)
    else:
        with path.open("rb") as file:
            content = pickle.load(file)
    data = content["preprocessed_eeg_data"]
    assert data.shape == (truth.size.n_train_images, 2, *shape)
    # Whitened: deviations of one but for shrinkage, which is strong for few samples of many channels.
    flat = data - data.mean(axis=-1, keepdims=True)
    assert 0.5 < flat.std() < 1
    config = ThingsEeg2Config(root=root, sfreq=sfreq, channels="posterior17" if shape[0] == 17 else "all63")
    assert config.open_epochs().n_trials == truth.size.n_trials


def test_things_meg_reads_back(made):
    root, truth, _ = made("things-meg")
    path = root / "derivatives" / "preprocessed" / "preprocessed_P1-epo.fif"
    epochs = mne.read_epochs(path, verbose="error")
    attributes = pd.read_csv(root / "sourcedata" / "sample_attributes_P1.csv")
    assert epochs.events[:, 2].tolist() == attributes["image_nr"].tolist()
    assert len(epochs.times) == 281
    data = epochs.get_data()
    assert data.shape[1] == 271
    baseline = data[..., epochs.times < 1e-9]
    np.testing.assert_allclose(baseline.std(axis=-1), 1, atol=1e-3)
    numbers, counts = np.unique(epochs.events[:, 2], return_counts=True)
    assert (counts[numbers != 999999] == 12).sum() == truth.n_test
    raw = mne.io.read_raw_fif(next(root.rglob("*_meg.fif")), verbose="error")
    assert raw.info["sfreq"] == 1200
    assert raw.info["dev_head_t"]["trans"][2, 3] == pytest.approx(0.0577)
    # The epochs of a session with raw runs are cut from them.
    events = pd.read_csv(next(root.rglob("sub-*_events.tsv")), sep="\t")
    first = raw.copy().pick("mag").load_data(verbose="error").filter(None, 40.0, verbose="error")
    start = round((events["onset"][0] - 0.1) * 1200)
    mine = first.get_data(picks=[epochs.ch_names[5]])[0][start : start + 281 * 6 : 6]
    assert np.corrcoef(mine, data[0, 5])[0, 1] > 0.98


def test_nsd_reads_back(made):
    root, truth, _ = made("nsd")
    design = loadmat(root / "nsddata/experiments/nsd/nsd_expdesign.mat")
    stimuli = truth.read_stimuli().sort_values("nsd_id")
    shared = stimuli.loc[stimuli["split"] == "test", "nsd_id"].to_numpy() + 1
    assert design["sharedix"][0].tolist() == shared.tolist()
    with h5py.File(root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        brick = file["imgBrick"][()]
    assert len(brick) == len(stimuli)
    assert brick.std(axis=(1, 2, 3)).min() > 5
    folder = root / "nsddata_betas/ppdata/subj01/func1pt8mm"
    betas = nib.load(folder / "betas_fithrf_GLMdenoise_RR" / "betas_session01.nii.gz")
    responses = pd.read_csv(root / "nsddata/ppdata/subj01/behav/responses.tsv", sep="\t")
    assert betas.shape[3] == (responses["SESSION"] == 1).sum()
    assert betas.get_data_dtype() == np.int16
    # Averaged over its showings, an image looks like its noiseless response.
    machine = make_subject_scanner(8, 1)
    assert betas.shape[:3] == machine.mask.shape == (18, 23, 19)
    np.testing.assert_allclose(betas.affine @ [8.5, 11, 9, 1], [0, 0, 0, 1], atol=1e-5)
    volumes = [
        np.asarray(nib.load(path).dataobj)[machine.mask].T
        for path in sorted(folder.glob("betas_fithrf*/betas_s*"))
    ]
    measured = np.concatenate(volumes) / 300
    kept = np.load(truth.folder / "sub-01_betas.npy")
    rows = stimuli.set_index("nsd_id").loc[responses["73KID"] - 1, "truth_row"].to_numpy()
    visual = machine.regions != ""
    assert np.corrcoef(measured[:, visual].ravel(), kept[rows][:, visual].ravel())[0, 1] > 0.3
    brain = np.asarray(nib.load(root / "nsddata/ppdata/subj01/func1pt8mm/brainmask.nii.gz").dataobj) > 0
    assert brain[machine.mask].all()
    assert NsdConfig(root=root, mask="brain").open_betas().geometry.n_voxels == brain.sum() > machine.n_voxels
    roi = nib.load(root / "nsddata/ppdata/subj01/func1pt8mm/roi/prf-visualrois.nii.gz")
    assert set(np.unique(np.asarray(roi.dataobj))) == {-1, 0, 1, 2, 3, 4, 5, 6, 7}
    imagery = nib.load(folder / "nsdimagerybetas_fithrf_GLMdenoise_RR" / "betas_nsdimagery.nii.gz")
    trials = pd.read_csv(truth.folder / "nsdimagery_trials.tsv", sep="\t")
    assert imagery.shape[3] == len(trials) == 6 * 32
    assert trials.drop_duplicates("run")["exp"].tolist()[::3] == ["visA", "attA", "imgA_1", "imgA_2"]
    pictures = root / "nsddata_stimuli" / "stimuli" / "nsdimagery"
    source = NsdImageryConfig(root=root, imagery_images=pictures).open_betas()
    assert len(source.parts[-1].trials) == 6 * 24  # attended pictures are left out


def test_things_fmri_reads_back(made):
    root, _, _ = made("things-fmri")
    folder = root / "betas_csv"
    stimuli = pd.read_csv(folder / "sub-01_StimulusMetadata.csv")
    voxels = pd.read_csv(folder / "sub-01_VoxelMetadata.csv")
    with h5py.File(folder / "sub-01_ResponseData.h5") as file:
        table = file["ResponseData/block0_values"][()]
    assert table.shape == (len(voxels), len(stimuli))
    assert set(stimuli.loc[stimuli["trial_type"] == "test", "stimulus"].value_counts()) == {4}
    run = sorted((root / "betas_vol").rglob("*_betas.nii.gz"))[0]
    conditions = pd.read_csv(str(run).replace("betas.nii.gz", "conditions.tsv"), sep="\t")["image_filename"]
    volume = np.asarray(nib.load(run).dataobj)
    place = tuple(voxels.loc[7, ["voxel_x", "voxel_y", "voxel_z"]].astype(int))
    kept = ~conditions.str.startswith("catch").to_numpy()
    np.testing.assert_array_equal(volume[place][kept], table[7, : kept.sum()])
    assert conditions[kept].tolist() == stimuli["stimulus"].tolist()[: kept.sum()]


def test_god_reads_back(made):
    root, truth, _ = made("god")
    with h5py.File(root / "Subject1.h5") as file:
        matrix, group = file["dataSet"][()], file["metaData"]
        keys = group["key"].asstr()[()].tolist()
        value = dict(zip(keys, group["value"][()], strict=True))
    kinds = matrix[:, value["DataType"] == 1].ravel()
    assert [(kinds == k).sum() for k in (1, 2, 3)] == [12, 16, 8]
    names = read_list(root / "stimulus_ImageNetTest.tsv")["stimulus_id"].tolist()
    stimuli = truth.read_stimuli()
    assert names == stimuli.loc[stimuli["split"] == "test", "stimulus_id"].tolist()
    early = matrix[:, value["ROI_V1"] == 1]
    assert early.shape[1] > 10
    imagined = np.load(truth.folder / "sub-01_betas_imagery.npy")
    assert imagined.std(axis=0).mean() < np.load(truth.folder / "sub-01_betas.npy").std(axis=0).mean()
    with h5py.File(root / "ImageFeatures.h5") as file:
        assert "cnn8" in file["metaData/key"].asstr()[()].tolist()


def test_bids_reads_back(made):
    root, truth, _ = made("bids-eeg")
    header = next(root.rglob("*_eeg.vhdr"))
    raw = mne.io.read_raw_brainvision(header, verbose="error")
    events = pd.read_csv(str(header).replace("_eeg.vhdr", "_events.tsv"), sep="\t")
    assert len(events) == truth.size.n_trials
    assert (raw.info["sfreq"], len(raw.ch_names)) == (512, 64)
    assert all((root / "stimuli" / name).is_file() for name in events["stim_file"])
    root, truth, _ = made("bids-fmri")
    bold = nib.load(next(root.rglob("*_desc-preproc_bold.nii.gz")))
    confounds = pd.read_csv(next(root.rglob("*_timeseries.tsv")), sep="\t")
    assert bold.shape[3] == len(confounds)
    mask = np.asarray(nib.load(next(root.rglob("*brain_mask.nii.gz"))).dataobj) > 0
    series = np.asarray(bold.dataobj)[mask]
    np.testing.assert_allclose(series.mean(axis=0), confounds["global_signal"], rtol=1e-4)
    assert series.min() > 500
    events = pd.read_csv(next(root.rglob("*_events.tsv")), sep="\t")
    assert len(events) == truth.size.n_trials


def test_grids_are_those_of_the_scanner():
    for voxel_mm in (6, 8):
        machine = make_scanner(voxel_mm, 2.0)
        assert GRIDS[voxel_mm] == (machine.mask.shape, machine.n_voxels)


def test_request_is_kept_in_plain_words(made):
    root, _, _ = made("god")
    request = json.loads((root / TRUTH / "finished.json").read_text())["request"]
    assert request["format"] == "god"
    assert request["config"]["snr"] == 0.3
