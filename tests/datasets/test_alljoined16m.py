import pickle

import mne
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_json, read_responses, read_stimuli
from braindecode_vis.datasets.alljoined.alljoined16m import Alljoined16mConfig
from braindecode_vis.datasets.alljoined.blocks import (
    FLEX2,
    find_electrodes,
    parse_markers,
    read_labels,
)
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.parts.phantom.formats.alljoined_format import EXTRA, write_block, write_trial_table
from braindecode_vis.preprocessing.meeg import write_meeg
from tests.datasets.reading import demand_change, prepare, refusals

SFREQ = 256
RECORDED = tuple(
    "Afz" if name == "PO9" else name for name in FLEX2
)  # one electrode elsewhere, in their spelling


def make_block(
    root, images, *, subject=1, session=1, block=5, named=None, names=RECORDED, extra=(), **options
):
    """Write one block: a picture every half second, a bump of 20 microvolt on Oz 100 ms after each."""
    generator = np.random.default_rng(1000 * session + block)
    n = int((len(images) / 2 + 4) * SFREQ)
    n -= n % SFREQ
    rows = {name: 4200 + 5 * generator.normal(size=n) for name in (*EXTRA[:3], *names, *EXTRA[3:])}
    onsets = 1.5 + np.arange(len(images)) / 2
    for onset in onsets:
        rows["Oz"][round((onset + 0.1) * SFREQ) :][:26] += 20
    return write_block(
        root, subject, session, block, rows, onsets, images, title=named, extra=extra, **options
    )


def make_subject(root, *, subject=1, sessions=(1,), **options):
    (root / "phantom_truth").mkdir(
        parents=True, exist_ok=True
    )  # simulated, and smaller than the published set
    for session in sessions:
        make_block(root, [16540, 16541, 16540, 16541], subject=subject, session=session, block=1, **options)
        make_block(root, [3, 14, 3, 16539, 14, 0], subject=subject, session=session, block=5, **options)


def make_table(root, rows, subject=1, name="experiment_metadata_categories.parquet", drop=()):
    table = pd.DataFrame(
        rows, columns=["session", "block_id", "partition", "image_path", "dropped", "category_name"]
    )
    table["image_path"] = [f"/srv/eeg/images/{image:05d}.jpg" for image in table["image_path"]]
    return write_trial_table(root, subject, table.drop(columns=list(drop)), name).parent


def config(root, **options):
    return Alljoined16mConfig(root=root, **{"blocks": (1, 5), "layout": "raw", **options})


def test_blocks_become_trials(tmp_path):
    make_subject(tmp_path, sessions=(1, 2))
    source = config(tmp_path).open_epochs()
    assert set(source.ch_names) == (set(FLEX2) - {"PO9"}) | {"AFz"}
    assert source.ch_names[0] == "Cz"
    assert source.notes["montage"] == "other electrodes than published"
    summary = write_meeg(config(tmp_path, mvnn="none"), tmp_path / "out")
    assert summary == {"n_trials": 20, "n_dropped": 0, "n_bytes": summary["n_bytes"]}
    responses = read_responses(tmp_path / "out/responses")
    assert responses.data.shape == (20, 32, 256)
    assert responses.unit == "V"
    trials = responses.trials
    assert trials["stimulus_id"].tolist()[:5] == ["16540", "16541", "16540", "16541", "00003"]
    assert trials["split"].tolist()[3:5] == ["test", "train"]
    assert trials[["session", "run"]].drop_duplicates().to_numpy().tolist() == [
        ["01", "01"],
        ["01", "05"],
        ["02", "01"],
        ["02", "05"],
    ]
    threes = trials[trials["stimulus_id"] == "00003"]
    assert threes["repetition"].tolist() == [0, 1, 2, 3]
    oz = list(responses.coords["ch_names"]).index("Oz")
    times = responses.coords["times"]
    bump = responses.data[:, :, (times > 0.11) & (times < 0.19)].mean(axis=(0, 2))
    assert bump[oz] == pytest.approx(20e-6, rel=0.1)  # in V, against the baseline
    assert np.abs(np.delete(bump, oz)).max() < 4e-6
    stimuli = read_stimuli(tmp_path / "out/stimuli")
    assert stimuli.table["path"].tolist()[:2] == ["00000.jpg", "00003.jpg"]
    assert set(stimuli.table["hashed"]) == {"name"}


def test_whitening_learns_from_training_blocks_of_each_session(tmp_path):
    make_subject(tmp_path, sessions=(1, 2))
    responses, _ = prepare(config(tmp_path), tmp_path / "out")
    assert responses.unit == "whitened"
    assert responses.coords["whitening"].shape == (2, 32, 32)


def test_electrodes_are_found_by_name_among_other_rows(tmp_path):
    path = make_block(tmp_path, [1], names=tuple(reversed(RECORDED)))
    labels = read_labels(path, "here")
    assert len(labels) == 32 + len(EXTRA) + 1
    assert list(find_electrodes(labels)) == ["AFz" if n == "Afz" else n for n in reversed(RECORDED)]
    picked = config(tmp_path, blocks=(5,), channels=("Oz", "AFz")).open_epochs()
    assert picked.ch_names == ("Oz", "AFz")
    raw = mne.io.read_raw_edf(path, verbose="error")
    expected = raw.get_data(picks=["Oz", "Afz"], start=400, stop=500)
    np.testing.assert_array_equal(picked.parts[0].read(400, 500), expected)
    with pytest.raises(DataError, match=r"is missing the channel\(s\) FCz; it has .*another montage"):
        config(tmp_path, blocks=(5,), channels=("FCz",)).open_epochs()


def test_a_block_of_another_montage_is_named(tmp_path):
    make_block(tmp_path, [16540], block=1)
    make_block(tmp_path, [1], block=5, names=FLEX2)
    with pytest.raises(DataError, match=r"session 01, block 05, file .* is missing the channel\(s\) AFz"):
        config(tmp_path).open_epochs()
    make_block(tmp_path, [16540], block=1, subject=2, names=RECORDED[:31])
    with pytest.raises(DataError, match=r"has 31 electrodes .* where 32 are published"):
        config(tmp_path, subjects=(2,), blocks=(1,)).open_epochs()


def test_subject_8_says_19_and_no_other_does(tmp_path):
    make_block(tmp_path, [1, 2], subject=8, session=3, named="Subject 19, Session 3, Block 5")
    source = config(tmp_path, sessions=(3,), blocks=(5,)).open_epochs()
    assert source.parts[0].recording.subject == "08"
    make_block(tmp_path, [1, 2], subject=7, session=3, named="Subject 19, Session 3, Block 5")
    with pytest.raises(DataError, match=r"subject 07, session 03, .* has subject 19, session 3, block 5"):
        config(tmp_path, sessions=(3,), blocks=(5,)).open_epochs()


def test_what_is_no_picture_is_left_out_and_counted(tmp_path):
    extra = [
        (1.7, "oddball,16742,-1,90"),
        (1.8, "behav,3,-1,91"),
        (1.9, "debug,1,-1,92"),
        (2.1, "phase_start"),
        (2.6, "stim_train,5,1,93"),
        (2.0, "stim_train,12,-1,94"),  # once more at the time of the second picture
    ]
    make_block(tmp_path, [11, 12, 13], extra=extra)
    (tmp_path / "raw_eeg/sub-01/session_02_old").mkdir()
    source = config(tmp_path, blocks=(5,)).open_epochs()
    assert source.notes["markers_left_out"] == {
        "oddball": 1, "behav": 1, "debug": 1, "other": 1, "deleted": 1, "repeated": 1,
    }  # fmt: skip
    assert source.notes["folders_left_out"] == ["sub-01/session_02_old"]
    assert source.parts[0].recording.events["stimulus_id"].tolist() == ["00011", "00012", "00013"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["stim_train,12,-1"], "label,value,deleted,orig_index is expected"),
        (["stim_train,x,-1,4"], "has no picture"),
        (["oddball,1,-1,1"], "1 annotations, none of which is a stim_train"),
    ],
)
def test_a_marker_that_cannot_be_read_is_shown(texts, message):
    with pytest.raises(DataError, match=message):
        parse_markers([1.0] * len(texts), texts, "subject 01")
    prefixed = parse_markers([0.5], ["session_1,block_2,stim_test,16641,-1,1"], "subject 01")
    assert prefixed.events.to_numpy().tolist() == [[0.5, 16641, "test"]]


def test_pictures_on_both_sides_and_shifted_numbers_are_refused(tmp_path):
    make_block(tmp_path, [16540], block=1)
    make_block(tmp_path, [16540], block=5)
    with pytest.raises(
        DataError, match="both trained on and tested, first 16540; the recordings are of different releases"
    ):
        config(tmp_path).open_epochs()
    make_block(tmp_path, [16740], block=6)
    with pytest.raises(DataError, match=r"marks the oddball 16740 as a picture.*shifted"):
        config(tmp_path, blocks=(6,)).open_epochs()


def test_missing_and_damaged_blocks_are_named(tmp_path):
    with pytest.raises(DataError, match="no recording of Alljoined-1"):
        Alljoined16mConfig(root=tmp_path).open_epochs()
    path = make_block(tmp_path, [1, 2, 3])
    refuse = refusals(config, root=tmp_path)
    refuse(DataError, "subject 01, session 01 is missing its block 01", blocks=None)
    refuse(DataError, r"Alljoined-1\.6M subject 4 is not there", subjects=(4,))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    refuse(DataError, r"block 05, file .* is truncated: \d+ of \d+ bytes", blocks=(5,))
    findings = config(tmp_path, blocks=(5,)).check()
    assert not findings[-1].ok
    path.write_bytes(b"<html>")
    refuse(DataError, "is not an EDF file", blocks=(5,))
    path.unlink()
    refuse(DataError, "should hold one EDF file, but holds 0", blocks=(5,))
    make_block(tmp_path, [1, 2, 3], block=6, unit="mV")
    (path.parent).rmdir()
    refuse(DataError, "no scalp potentials in V", blocks=(6,))


def make_flat(root, *, subject=1, seed=0, dump=True, epochs=None, whitened=True, **changes):
    """Write both preprocessed files and their table in the very format of the hub."""
    generator = np.random.default_rng(seed)
    rows = [
        (1, 1, "stim_test", 16540, False, "boat"), (1, 1, "stim_test", 16541, True, "cat"),
        (2, 1, "stim_test", 16540, False, "boat"), (1, 5, "stim_train", 7, False, "aardvark"),
        (1, 5, "oddball", 16740, False, None), (1, 6, "stim_train", 8, False, "aardvark"),
        (2, 5, "stim_train", 7, False, "aardvark"), (2, 5, "stim_train", 16539, True, "zebra"),
    ]  # fmt: skip
    folder = make_table(root, rows, subject)
    made = {}
    for split, count in (("test", 2), ("training", 3)):
        data = generator.normal(size=(epochs or count, 32, 250))
        content = {
            "preprocessed_eeg_data": data, "configs": {"mvnn_dim": "epochs" if whitened else "off", "tmin": -0.2},
            "ch_names": list(RECORDED), "times": np.arange(250) / 250, **changes,
        }  # fmt: skip
        path = folder / f"preprocessed_eeg_{split}_flat.npy"
        if dump:
            path.write_bytes(pickle.dumps(content, protocol=5))
        else:
            np.save(path, content, allow_pickle=True)
        made[split] = data
    return made


@pytest.mark.parametrize("dump", [True, False], ids=["pickle", "npy"])
def test_the_authors_epochs_meet_their_table(tmp_path, dump):
    made = make_flat(tmp_path, dump=dump)
    responses, stimuli = prepare(Alljoined16mConfig(root=tmp_path), tmp_path / "out")
    np.testing.assert_array_equal(responses.data[:3], made["training"].astype(np.float32))
    np.testing.assert_array_equal(responses.data[3:], made["test"].astype(np.float32))
    assert "AFz" in responses.coords["ch_names"]
    assert responses.unit == "whitened"
    assert responses.coords["sfreq"] == 250
    trials = responses.trials
    assert trials["stimulus_id"].tolist() == ["00007", "00008", "00007", "16540", "16540"]
    assert trials["concept"].tolist() == 3 * ["aardvark"] + 2 * ["boat"]
    assert trials["session"].tolist() == ["01", "01", "02", "01", "02"]
    assert trials["run"].tolist() == ["05", "06", "05", "01", "01"]
    assert trials["repetition"].tolist() == [0, 0, 1, 0, 1]
    assert stimuli.table["concept"].tolist() == ["aardvark", "aardvark", "boat"]
    notes = read_json(tmp_path / "out/responses/meta.json")["provenance"]
    assert notes["whitening"].startswith("by its authors")
    assert all(finding.ok for finding in Alljoined16mConfig(root=tmp_path).check())


def test_large_files_stay_on_disk(tmp_path):
    folder = make_table(tmp_path, [(1, 5, "stim_train", i, False, "a") for i in range(40)]
                        + [(1, 1, "stim_test", 16600, False, "b")])  # fmt: skip
    for split, count in (("test", 1), ("training", 40)):
        content = {
            "preprocessed_eeg_data": np.arange(count * 8000.0).reshape(count, 32, 250), "configs": None,
            "ch_names": list(FLEX2), "times": np.arange(250) / 250,
        }  # fmt: skip
        (folder / f"preprocessed_eeg_{split}_flat.npy").write_bytes(pickle.dumps(content, protocol=5))
    source = Alljoined16mConfig(root=tmp_path, channels=("Oz", "Cz")).open_epochs()
    block = source.parts[0].read(30, 32)
    np.testing.assert_array_equal(block[0, 1], 30 * 8000 + np.arange(250))
    np.testing.assert_array_equal(block[1, 0], 31 * 8000 + 250 * FLEX2.index("Oz") + np.arange(250))
    assert source.notes["whitening"] == "not stated in the file"
    assert Alljoined16mConfig(root=tmp_path).hash_inputs().keys() == {
        "sub-01/preprocessed_eeg_training_flat.npy", "sub-01/preprocessed_eeg_test_flat.npy",
        "sub-01/experiment_metadata_categories.parquet",
    }  # fmt: skip


def test_preprocessed_files_that_do_not_fit_are_named(tmp_path):
    make_flat(tmp_path, epochs=9)
    refuse = refusals(Alljoined16mConfig, root=tmp_path)
    refuse(DataError, r"holds 9 epochs, but its table keeps 3 train trials")
    make_flat(tmp_path, times=np.arange(200) / 250)
    refuse(DataError, r"32 channels and 200 times, but holds float64 of shape \(3, 32, 250\)")
    make_flat(tmp_path)
    refuse(ConfigError, "has 250 Hz and published epochs are not resampled", sfreq=125)
    refuse(DataError, r"is missing the channel\(s\) FCz", channels=("FCz",))
    refuse(ConfigError, "hold all sessions of a subject", sessions=(1,))
    folder = tmp_path / "preprocessed_eeg/sub-01"
    make_table(tmp_path, [(1, 1, "stim_test", 16540, False, "dog")], subject=2)
    refuse(DataError, "calls the picture 16540 'dog', where it was 'boat' before")
    (tmp_path / "preprocessed_eeg/sub-02/experiment_metadata_categories.parquet").unlink()
    (folder / "experiment_metadata_categories.parquet").rename(folder / "stim_order.parquet")
    refuse(DataError, "is missing experiment_metadata_categories")
    (folder / "preprocessed_eeg_test_flat.npy").unlink()
    refuse(DataError, "subject 01 is missing its test file")


def test_a_pickle_that_names_code_is_not_opened(tmp_path):
    made = make_flat(tmp_path)
    path = tmp_path / "preprocessed_eeg/sub-01/preprocessed_eeg_test_flat.npy"
    path.write_bytes(pickle.dumps({"preprocessed_eeg_data": made["test"], "configs": mne.Epochs}))
    with pytest.raises(DataError, match="asks to run"):
        Alljoined16mConfig(root=tmp_path).open_epochs()
    assert not Alljoined16mConfig(root=tmp_path).check()[-1].ok


def test_categories_reach_raw_blocks_and_both_layouts_must_be_chosen_from(tmp_path):
    make_flat(tmp_path)
    make_block(tmp_path, [7, 8, 9])
    with pytest.raises(ConfigError, match="in the layouts preprocessed, raw; choose one"):
        Alljoined16mConfig(root=tmp_path).open_epochs()
    events = config(tmp_path, blocks=(5,)).open_epochs().parts[0].recording.events
    assert events["concept"].tolist() == ["aardvark", "aardvark", "00009"]
    table = next(tmp_path.rglob("experiment_metadata_categories.parquet"))
    kept = pd.read_parquet(table)
    kept.rename(columns={"category_name": "category_namd"}).to_parquet(table)
    with pytest.raises(DataError):  # a traceback of pandas, where the name of a column was damaged
        config(tmp_path, blocks=(5,)).open_epochs()
    kept.to_parquet(table)
    # They were no input of raw blocks: a changed table was reused without a word.
    assert "sub-01/experiment_metadata_categories.parquet" in config(tmp_path, blocks=(5,)).hash_inputs()
    (table,) = tmp_path.glob("**/sub-01/experiment_metadata_categories.parquet")
    table.unlink()
    table.symlink_to(".git/annex/objects/aa/bb")  # it was taken for a table that does not exist
    with pytest.raises(DataError, match="datalad get"):
        config(tmp_path, blocks=(5,)).hash_inputs()


def test_declared_facts(tmp_path):
    facts = read_manifest("alljoined16m").facts
    assert len(FLEX2) == len(set(FLEX2)) == facts["n_channels"]
    assert list(find_electrodes(FLEX2)) == list(FLEX2)  # all of them have positions
    (tmp_path / "images").mkdir()
    (tmp_path / "images/00003.jpg").write_bytes(b"picture")
    make_subject(tmp_path)
    stimuli = config(tmp_path).open_epochs().stimuli
    assert stimuli.table.set_index("stimulus_id")["hashed"]["00003"] == "file"
    with pytest.raises(DataError, match=r"folder of images .* does not exist"):
        config(tmp_path, images=tmp_path / "absent").open_epochs()


def test_cleaning_options_change_raw_trials_and_are_refused_for_epochs(tmp_path):
    make_subject(tmp_path / "raw", sessions=(1,))
    changes = ({"h_freq": 30.0}, {"reference": "average"}, {"scaling": "robust"})
    demand_change(config, {"root": tmp_path / "raw", "mvnn": "none"}, tmp_path, *changes)
    make_flat(tmp_path / "flat")
    with pytest.raises(ConfigError, match=r"dataset.h_freq needs continuous recordings"):
        Alljoined16mConfig(root=tmp_path / "flat", h_freq=30.0).open_epochs()
