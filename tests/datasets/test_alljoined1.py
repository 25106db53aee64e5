import json
import pickle
import sys
import warnings

import h5py
import mne
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_json, read_stimuli
from braindecode_vis.datasets.alljoined.alljoined1 import BIOSEMI64, BROKEN, SFREQ, Alljoined1Config
from braindecode_vis.datasets.alljoined.sessions import number_blocks
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.nsd.experiment_design import LAYOUT, read_design
from braindecode_vis.datasets.sources.meeg_source import find_scalp_positions
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.parts.phantom.formats.alljoined_format import write_session
from braindecode_vis.preprocessing.meeg import write_meeg
from tests.datasets.reading import prepare, refusals
from tests.references import assert_close


@pytest.fixture(scope="session")
def design(tmp_path_factory):
    """A small ``nsd_expdesign.mat`` with all 1000 shared images."""
    root = tmp_path_factory.mktemp("nsd")
    made = nsd_format.make_nsd_expdesign(
        2, 4, images_per_subject=1200, n_shared=1000, n_images=3000, n_runs=3
    )
    return LAYOUT.write(root, "design", made)


def make_codes(n_blocks=3, n=8, seed=0):
    """Return codes of blocks of 120 images each, `n` of them per block, and all once more."""
    generator = np.random.default_rng(seed)
    blocks = [120 * block + 1 + generator.permutation(n) for block in range(n_blocks)]
    return np.concatenate([*blocks, *blocks])


def make_info():
    return mne.create_info([*BIOSEMI64], SFREQ, "eeg")


def make_raw(folder, codes, *, subject=1, session=1, seed=0, names=None):
    """Write a raw session as the authors ship it: 64 channels without a reference, and merged triggers on Status."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    n = 400 + 160 * len(codes) + 400
    common = 1e-3 + 2e-5 * np.cumsum(generator.normal(size=n)) / 10  # what a reference takes away
    data = 1e-5 * generator.normal(size=(64, n)) + common
    onsets = 400 + 160 * np.arange(len(codes))
    for onset in onsets:
        data[BIOSEMI64.index("Oz"), onset + 51 : onset + 77] += 64e-6
    path = write_session(folder, subject, session, [data], onsets, codes, n_samples=n)
    if names:
        raw = mne.io.read_raw_fif(path, preload=True, verbose="error").rename_channels(names)
        raw.save(path, overwrite=True, verbose="error")
    return path, data, onsets


def make_epochs(folder, codes, *, subject=1, session=1, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    data = 1e-5 * np.random.default_rng(seed).normal(size=(len(codes), 64, 334))
    events = np.stack([400 + 160 * np.arange(len(codes)), np.zeros_like(codes), codes], axis=1)
    epochs = mne.EpochsArray(data, make_info(), events, tmin=-26 / SFREQ, verbose="error")
    path = folder / f"subj{subject:02d}_session{session}_epo.fif"
    epochs.save(path, overwrite=True, verbose="error")
    return path, data


def make_table(
    folder, ids, *, subject=1, session=1, seed=0, shape=(64, 334), complib="blosc", drop=(), **columns
):
    """Write a session as the authors do: one dictionary per trial, a pandas table, `to_hdf` with blosc."""
    folder.mkdir(parents=True, exist_ok=True)
    data = 1e-5 * np.random.default_rng(seed).normal(size=(len(ids), *shape))
    rows = [
        {
            "subject_id": subject, "session": session, "block": number // 4 + 1, "trial": number + 1,
            "73k_id": int(identity), "coco_id": 3 * number, "eeg": data[number], "curr_time": 0.3 * number, **columns,
        }
        for number, identity in enumerate(ids)
    ]  # fmt: skip
    path = folder / f"subj{subject:02d}_session{session}.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas warns that it pickles
        pd.DataFrame(rows).drop(columns=list(drop)).to_hdf(path, key="df", complib=complib, complevel=9)
    return path, data


def config(root, design, **options):
    return Alljoined1Config(root=root, **{"design": design, "sessions": (1,), **options})


def test_raw_sessions_are_referenced_cut_and_paired_with_images(tmp_path, design):
    codes = make_codes()
    path, data, onsets = make_raw(tmp_path / "raw", codes)
    shared = read_design(design).shared
    responses, stimuli = prepare(config(tmp_path, design), tmp_path / "out")
    assert responses.data.shape == (48, 64, 307)
    assert responses.unit == "V"
    assert responses.trials["stimulus_id"].tolist() == [f"nsd{shared[code - 1]:05d}" for code in codes]
    assert (responses.trials["split"] == "train").all()
    repeated = responses.trials.groupby("stimulus_id")["repetition"].agg(list)
    assert repeated.map(lambda own: own == [0, 1]).all()
    referenced = data[:64] - data[:64].mean(axis=0)
    row = BIOSEMI64.index("Pz")
    epoch = (
        referenced[row, onsets[5] : onsets[5] + 307] - referenced[row, onsets[5] - 26 : onsets[5] + 1].mean()
    )
    # Stored in single precision, in the file and in the store, with what reference and baseline take away.
    assert_close(responses.data[5, row], epoch, scale=10 * np.abs(data[:64]).max())
    bump = responses.data[:, :, 60:70].mean(axis=(0, 2))
    assert bump[BIOSEMI64.index("Oz")] == pytest.approx(63e-6, rel=0.05)
    notes = read_json(tmp_path / "out/responses/meta.json")["provenance"]
    assert notes["processing"] == "reference average, no filter"
    assert stimuli.ids.tolist() == sorted(set(responses.trials["stimulus_id"]))
    assert (stimuli.table["nsd_id"] == stimuli.table["stimulus_id"].str[3:].astype(int) - 1).all()
    part = config(tmp_path, design, reference="none", channels=("Oz", "Fp1")).open_epochs().parts[0]
    np.testing.assert_allclose(part.read(0, 9), data[[BIOSEMI64.index("Oz"), 0], :9], rtol=1e-5)
    assert path.name in config(tmp_path, design).hash_inputs()


def test_epochs_are_taken_as_they_are(tmp_path, design):
    codes = make_codes()
    _, data = make_epochs(tmp_path / "final_eeg/05_125", codes)
    (tmp_path / "test_indices.json").write_text(json.dumps([int(read_design(design).shared[0]) - 1]))
    responses, _ = prepare(config(tmp_path, design), tmp_path / "out")
    np.testing.assert_allclose(responses.data, data[..., 26:], rtol=1e-6)
    np.testing.assert_allclose(responses.coords["times"][[0, -1]], [0, 307 / SFREQ])
    assert responses.trials["run"].tolist() == number_blocks(codes)
    assert responses.trials["run"].unique().tolist() == ["01", "02", "03", "04", "05", "06"]
    held_out = responses.trials["split"] == "test"
    assert (held_out.to_numpy() == (codes == 1)).all()
    assert read_json(tmp_path / "out/responses/meta.json")["provenance"]["split"] == "as published"


@pytest.mark.parametrize("complib", ["blosc", "zlib"])
def test_tables_give_the_same_trials_without_pandas(tmp_path, design, complib):
    shared = read_design(design).shared
    ids = shared[[4, 0, 7, 4, 959]] - 1
    _, data = make_table(tmp_path / "05_125", ids, complib=complib)
    responses, _ = prepare(config(tmp_path, design, window=(-0.05, 0.6)), tmp_path / "out")
    np.testing.assert_array_equal(
        responses.data, data[..., 1:].astype(np.float32)
    )  # -26/512 lies before -0.05
    trials = responses.trials
    assert trials["stimulus_id"].tolist() == [f"nsd{number + 1:05d}" for number in ids]
    assert trials["run"].tolist() == ["01"] * 4 + ["02"]
    assert trials["repetition"].tolist() == [0, 0, 0, 1, 0]
    assert not (tmp_path / "out/scratch").exists()
    assert all(finding.ok for finding in config(tmp_path, design).check())


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_nothing_in_a_table_is_run(tmp_path):
    """Both places where PyTables unpickles: the column of objects, and any attribute."""
    path, _ = make_table(tmp_path, [5, 6, 7], eeg=Bomb())
    with pytest.raises(DataError, match=r"subj01_session1\.h5 asks to run"):
        config(tmp_path, None).open_epochs()
    make_table(tmp_path, [5, 6, 7])
    with h5py.File(path, "a") as file:
        for name in ("FLAVOR", "TITLE"):
            file["df/block0_values"].attrs[name] = np.bytes_(pickle.dumps(Bomb(), protocol=0))
    assert config(tmp_path, None).open_epochs().parts[0].read(1, 3).shape == (2, 64, 334)


def test_without_blosc_the_message_says_what_to_install(tmp_path, monkeypatch):
    make_table(tmp_path, [5, 6, 7])
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ConfigError, match=r"packed with blosc, needs tables, .*\[hdf\]"):
        config(tmp_path, None).open_epochs()
    make_table(tmp_path, [5, 6, 7], complib="zlib")
    assert config(tmp_path, None).open_epochs().n_trials == 3


def test_ids_that_count_from_one_are_seen(tmp_path, design):
    shared = read_design(design).shared
    make_table(tmp_path, shared[:20])
    with pytest.raises(DataError, match="count from 1, but the published ones count from 0"):
        config(tmp_path, design).open_epochs()
    make_table(tmp_path, [1, 2, 3])
    with pytest.raises(DataError, match=r"image\(s\) are not among the shared images"):
        config(tmp_path, design).open_epochs()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject_id": 2}, r"rows of subject and session \(2, 1\)"),
        ({"drop": ["73k_id"]}, r"is missing the column\(s\) 73k_id"),
        ({"drop": ["eeg"]}, "has no column eeg"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path, options, message):
    make_table(tmp_path, [5, 6, 7], **options)
    with pytest.raises(DataError, match=message):
        config(tmp_path, None).open_epochs()


def test_objects_beside_the_arrays_are_told_apart(tmp_path):
    """A column without numbers joins that of the arrays in one Fortran-ordered block, which mixed up their rows."""
    _, data = make_table(tmp_path, [5, 6, 7], coco_id=None)
    np.testing.assert_array_equal(config(tmp_path, None).open_epochs().parts[0].read(0, 3), data)


def test_an_array_of_another_shape_is_named(tmp_path):
    make_table(tmp_path, [5, 6], shape=(64, 300))
    with pytest.raises(
        DataError, match=r"row 0 should hold 64 channels of 334 samples, but holds \(64, 300\)"
    ):
        config(tmp_path, None).open_epochs()


def test_known_gaps_are_left_out_and_others_are_missing(tmp_path, design):
    for subject, session in ((2, 1), (3, 1), (3, 2)):
        make_epochs(tmp_path, make_codes(), subject=subject, session=session)
    source = config(tmp_path, design, sessions=None).open_epochs()
    assert [part.group[0] for part in source.parts] == ["02", "03"]
    assert source.notes["sessions_left_out"] == ["subject 02, session 2", "subject 03, session 1"]
    reading = config(tmp_path, design, sessions=None, broken="read").open_epochs()
    assert len(reading.parts) == 3
    assert reading.notes["sessions_left_out"] == ["subject 02, session 2"]
    trials = pd.concat([part.trials for part in reading.parts[1:]])
    assert trials["repetition"].max() == 3  # counted on over both sessions
    with pytest.raises(DataError, match="subject 01, session 1 of Alljoined1 is missing"):
        config(tmp_path, design, subjects=(1,)).open_epochs()
    with pytest.raises(DataError, match=r"nothing is left to read .*set dataset\.broken to read"):
        config(tmp_path, design, subjects=(3,), sessions=(1,)).open_epochs()


def test_wrong_codes_channels_and_files_are_named(tmp_path, design):
    refuse = refusals(config, root=tmp_path, design=design)
    refuse(DataError, "no recording of Alljoined1 was found")
    path, _, _ = make_raw(tmp_path, make_codes())
    with pytest.raises(DataError, match=r"give its path with --set dataset\.design=FILE"):
        config(tmp_path, None).open_epochs()
    with pytest.raises(DataError, match="design of NSD was not found"):
        config(tmp_path, tmp_path / "absent.mat").open_epochs()
    refuse(DataError, r"is missing the channel\(s\) FT9", channels=("FT9",))
    make_raw(tmp_path, np.r_[make_codes(), 65536])
    refuse(DataError, r"event\(s\) whose code is not an image, first code 65536")
    make_raw(tmp_path, make_codes()[:-3])
    refuse(DataError, "does not match its images")
    make_raw(tmp_path, make_codes(), names={"Oz": "A29"})
    refuse(DataError, r"is missing the channel\(s\) Oz")
    make_epochs(tmp_path, make_codes())
    refuse(ConfigError, "layouts epochs, raw")
    make_epochs(tmp_path, make_codes() + 900)
    refuse(DataError, "epochs whose code is not an image, first code", layout="epochs")
    path.unlink()
    make_epochs(tmp_path, make_codes())
    for options, message in (
        ({"sfreq": 256}, "512 Hz and published epochs are not resampled"),
        ({"mvnn": "epochs"}, "needs the raw"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, design, **options).open_epochs()
    make_epochs(tmp_path / "14_70", make_codes())
    refuse(ConfigError, "session 1 twice")


def test_damaged_files_are_named(tmp_path, design):
    path, _ = make_table(tmp_path, [5, 6, 7])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or cut short"):
        config(tmp_path, design).open_epochs()
    path.write_bytes(b"<html>")
    with pytest.raises(DataError, match="neither raw nor epoched FIF nor HDF5"):
        config(tmp_path, design).open_epochs()
    assert not config(tmp_path, design).check()[0].ok


def test_pictures_of_nsd_come_along_on_request(tmp_path, design):
    shared = read_design(design).shared
    make_table(tmp_path, shared[:3] - 1)
    brick = tmp_path / "nsd_stimuli.hdf5"
    with h5py.File(brick, "w") as file:
        images = file.create_dataset(
            "imgBrick", (int(shared[2]), 425, 425, 3), np.uint8, chunks=(1, 425, 425, 3)
        )
        for number, value in zip(shared[:3], (10, 20, 30), strict=True):
            images[number - 1] = value
    write_meeg(config(tmp_path, design, images=brick, image_size=32), tmp_path / "out")
    stimuli = read_stimuli(tmp_path / "out/stimuli")
    assert stimuli.pixels.shape == (3, 32, 32, 3)
    assert [int(image.mean()) for image in stimuli.iterate_images()] == [10, 20, 30]
    assert stimuli.table["sha256"].nunique() == 3


def test_declared_facts():
    facts = read_manifest("alljoined1").facts
    assert len(BIOSEMI64) == len(set(BIOSEMI64)) == facts["n_channels"]
    assert len(BROKEN) == facts["n_broken_sessions"]
    assert facts["sfreq"] == SFREQ
    assert np.isfinite(find_scalp_positions(BIOSEMI64, "here")).all()


@pytest.mark.shared
def test_the_real_design_names_the_images(shared, tmp_path):
    real = shared / "data/nsd/nsd_expdesign.mat"
    make_epochs(tmp_path, np.array([1, 2, 960]))
    trials = config(tmp_path, real).open_epochs().parts[0].trials
    assert trials["stimulus_id"].tolist()[:2] == ["nsd02951", "nsd02991"]
    make_epochs(tmp_path, np.arange(1, 961))
    assert config(tmp_path, real).open_epochs().parts[0].trials["stimulus_id"].nunique() == 960


def test_bad_electrodes_are_repaired_before_the_average(tmp_path, design):
    codes = make_codes()
    _, data, onsets = make_raw(tmp_path / "raw", codes)
    options = {"channels": ("Oz", "Pz"), "baseline": None}
    plain, _ = prepare(config(tmp_path, design, **options), tmp_path / "plain")
    changes = {"bads": ("Pz",), "bad_channels": "interpolate", "h_freq": 40.0}
    repaired, _ = prepare(config(tmp_path, design, **options, **changes), tmp_path / "out")
    assert not np.allclose(repaired.data[:, 1], plain.data[:, 1], atol=1e-7)
    notes = read_json(tmp_path / "out/responses/meta.json")["provenance"]
    assert notes["processing"] == "reference average, 0 to 40 Hz"
    changes = {"bads": ("Fp1",), "bad_channels": "drop"}
    dropped, _ = prepare(config(tmp_path, design, **options, **changes), tmp_path / "drop")
    good = np.delete(data[:64], BIOSEMI64.index("Fp1"), axis=0)
    row = BIOSEMI64.index("Oz")
    expected = (data[row] - good.mean(axis=0))[onsets[5] : onsets[5] + 307]
    assert_close(dropped.data[5, 0], expected)
    make_epochs(tmp_path / "epochs", codes)
    with pytest.raises(ConfigError, match=r"dataset.notch needs continuous recordings"):
        config(tmp_path / "epochs", design, notch=(50.0,)).open_epochs()
