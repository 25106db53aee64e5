"""BIDS phantoms, EEG and fMRI: read back with MNE, mne-bids, nibabel, nilearn and pandas."""

import json

import mne
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from mne_bids import BIDSPath, read_raw_bids

from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.phantom.formats import bids_eeg, bids_fmri

NAMES = ["Fp1", "Oz", "PO7", "EOG1"]
TYPES = ["eeg", "eeg", "eeg", "eog"]
PEOPLE = pd.DataFrame({"participant_id": ["sub-01", "sub-02"], "age": [30, 40]})
AFFINE = np.array([[-4.0, 0, 0, 60], [0, 4, 0, -80], [0, 0, 4, -50], [0, 0, 0, 1]])


def write_eeg(root, data, **options):
    events = pd.DataFrame(
        {
            "sample": [300, 900, 1500],
            "value": [1, 2, 1],
            "stimulus_id": ["ant_01b", "bee_01b", "ant_01b"],
            "stim_file": ["ant/ant_01b.jpg", "bee/bee_01b.jpg", "ant/ant_01b.jpg"],
            "repetition": [0, 0, 1],
        }
    )
    positions = np.random.default_rng(1).standard_normal((4, 3)) * 0.05
    positions[3] = np.nan
    bids_eeg.write_dataset(root, PEOPLE)
    blocks = (data[:, i : i + 700] for i in range(0, data.shape[1], 700))
    return bids_eeg.write_recording(
        root, "01", blocks, events, n_samples=2000, ch_names=NAMES, sfreq=512.0, ch_pos=positions, ch_types=TYPES,
        session="01", run="01", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def eeg():
    return (np.random.default_rng(0).standard_normal((4, 2000)) * 1e-5).astype(np.float32)


def test_eeg_reads_back(tmp_path, eeg):
    path = write_eeg(tmp_path, eeg)
    microvolts = np.fromfile(path.with_suffix(".eeg"), "<f4").reshape(-1, 4).T
    np.testing.assert_array_equal(microvolts, (eeg.astype(float) * 1e6).astype(np.float32))
    raw = mne.io.read_raw_brainvision(path, verbose="error")
    assert raw.info["sfreq"] == 512
    np.testing.assert_allclose(raw.get_data(), eeg, rtol=1e-6)  # float32 microvolts, then times 1e-6
    stimuli = [note for note in raw.annotations if note["description"].startswith("Stimulus")]
    assert [note["description"] for note in stimuli] == ["Stimulus/S  1", "Stimulus/S  2", "Stimulus/S  1"]
    np.testing.assert_allclose(
        [note["onset"] for note in stimuli], np.array([300, 900, 1500]) / 512, atol=1e-6
    )
    assert path.with_suffix(".eeg").stat().st_size == bids_eeg.estimate_bytes(2000, 4)


def test_eeg_reads_back_through_mne_bids(tmp_path, eeg):
    write_eeg(tmp_path, eeg)
    place = BIDSPath(root=tmp_path, subject="01", session="01", task="images", run="01", datatype="eeg")
    raw = read_raw_bids(place, verbose="error")
    assert raw.get_channel_types() == TYPES
    assert raw.info["line_freq"] == 50
    assert [note["description"].split("/")[0] for note in raw.annotations] == ["stimulus"] * 3
    positions = raw.get_montage().get_positions()["ch_pos"]
    assert np.isfinite(positions["Oz"]).all()
    events = pd.read_csv(place.copy().update(suffix="events", extension=".tsv").fpath, sep="\t")
    assert events["stim_file"].tolist()[1] == "bee/bee_01b.jpg"
    assert events["repetition"].tolist() == [0, 0, 1]
    participants = pd.read_csv(tmp_path / "participants.tsv", sep="\t")
    assert participants["participant_id"].tolist() == ["sub-01", "sub-02"]


def test_eeg_is_deterministic_and_complete_or_absent(tmp_path, eeg):
    first, second = write_eeg(tmp_path / "a", eeg), write_eeg(tmp_path / "b", eeg)
    for file in first.parent.iterdir():
        assert file.read_bytes() == (second.parent / file.name).read_bytes(), file.name
    with pytest.raises(DataError, match="announced with 2000 samples, but 1999 were received"):
        write_eeg(tmp_path / "c", eeg[:, :-1])
    assert not list((tmp_path / "c").rglob("*.vhdr"))


def write_fmri(root, n=100):
    rng = np.random.default_rng(0)
    volumes = rng.standard_normal((n, 6, 5, 4)).astype(np.float32)
    mask = np.zeros((6, 5, 4), dtype=bool)
    mask[1:-1, 1:-1, 1:-1] = True
    motion = np.cumsum(rng.standard_normal((n, 6)) * 0.001, axis=0)
    motion[50:, 0] += 1
    signals = {name: rng.standard_normal(n) for name in ("global_signal", "csf", "white_matter", "dvars")}
    confounds = bids_fmri.make_confounds(motion, t_r=2.0, **signals)
    events = pd.DataFrame({"onset": [4.0, 12.0], "duration": 0.5, "trial_type": "stimulus"})
    events["stimulus_id"], events["stim_file"] = ["ant", "bee"], ["ant.jpg", "bee.jpg"]
    bids_fmri.write_dataset(root, PEOPLE)
    path = bids_fmri.write_run(
        root, "01", iter(volumes), events, confounds, mask, n_volumes=n, affine=AFFINE, t_r=2.0
    )
    return path, volumes, mask, confounds


def test_fmri_reads_back(tmp_path):
    path, volumes, mask, confounds = write_fmri(tmp_path)
    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.moveaxis(volumes, 0, -1))
    np.testing.assert_allclose(image.affine, AFFINE)
    assert image.header.get_zooms()[3] == 2.0
    brain = nib.load(str(path).replace("preproc_bold", "brain_mask"))
    np.testing.assert_array_equal(np.asarray(brain.dataobj), mask)
    table = pd.read_csv(path.parent / "sub-01_task-images_run-01_desc-confounds_timeseries.tsv", sep="\t")
    np.testing.assert_allclose(table, confounds)
    assert table["framewise_displacement"].isna().tolist() == [True] + [False] * 99
    assert table["motion_outlier00"].to_numpy().nonzero()[0].tolist() == [50]
    assert (
        json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())["RepetitionTime"] == 2.0
    )
    again = write_fmri(tmp_path / "b")[0]
    assert again.read_bytes() == path.read_bytes()


def test_nilearn_finds_the_confounds_and_the_runs(tmp_path):
    from nilearn.glm.first_level import first_level_from_bids
    from nilearn.interfaces.fmriprep import load_confounds

    path, _, _, confounds = write_fmri(tmp_path)
    loaded, _ = load_confounds(str(path), strategy=("motion", "wm_csf", "high_pass", "global_signal"))
    assert loaded.shape == (100, 24 + 2 + confounds.columns.str.startswith("cosine").sum() + 1)
    models, runs, events, _ = first_level_from_bids(
        tmp_path, "images", space_label=bids_fmri.SPACE, derivatives_folder="derivatives/fmriprep",
        sub_labels=["01"], slice_time_ref=None, verbose=0,
    )  # fmt: skip
    assert models[0].t_r == 2.0
    assert runs[0] == [str(path)]
    assert events[0][0]["onset"].tolist() == [4.0, 12.0]
