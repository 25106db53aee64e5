"""THINGS-EEG1: the real events of one person with synthetic signals, and a small phantom in both layouts."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.things_eeg1 import ThingsEeg1Config, read_events, read_excluded
from braindecode_vis.parts.phantom.formats import things_eeg1_format
from braindecode_vis.parts.phantom.formats.bids_eeg import write_recording
from tests.datasets.reading import demand_change, prepare, refusals
from tests.references import assert_close

NAMES = ["Oz", "PO7", "O1"]
CONCEPTS = ["camera_lens", "camera1", "coat_rack", "ant", "bee"]


def make_events(n_images=3, n_tests=2, start_ms=2000):
    """As in version 1.1.0: onsets in ms, test trials at the end with object -1, paths with backslashes."""
    rows = []
    for concept in CONCEPTS:
        for number in range(1, n_images + 1):
            rows.append((concept, f"{concept}_{number:02d}s.jpg", 0, -1))
    for repetition in range(2):
        del repetition
        rows += [(c, f"{c}_{n_images + 1:02d}s.jpg", 1, i) for i, c in enumerate(CONCEPTS[:n_tests])]
    onset = start_ms + 100 * np.arange(len(rows))
    onset[n_images * len(CONCEPTS) :] += 5000  # a pause between sequences
    return pd.DataFrame(
        {
            "onset": onset,
            "duration": 50,
            "isteststim": [r[2] for r in rows],
            "object": [r[0] if not r[2] else "-1" for r in rows],
            "objectnumber": [CONCEPTS.index(r[0]) if not r[2] else -1 for r in rows],
            "stim": [f"stimuli\\{r[0]}\\{r[1]}" for r in rows],
            "teststimnumber": [r[3] for r in rows],
            "istarget": [int(i == 1) for i in range(len(rows))],
        }
    )


def make_signal(n_samples, events, names=NAMES, sfreq=1000):
    """Noise, and a step at each onset whose height is the row of the event, so that alignment shows."""
    data = np.random.default_rng(0).standard_normal((len(names), n_samples)) * 1e-7
    for row, onset in enumerate(events["onset"] * sfreq // 1000):
        data[0, int(onset) : int(onset) + sfreq // 20] += (row + 1) * 1e-6
    return data


def write_subject(root, label, events, names=NAMES, n_samples=12000):
    data = make_signal(n_samples, events, names)
    blocks = (data[:, i : i + 5000] for i in range(0, n_samples, 5000))
    return things_eeg1_format.write_subject(root, label, blocks, events, n_samples=n_samples, ch_names=names)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "ds003825"
    events = make_events()
    write_subject(root, "02", events)
    # Later releases: seconds, and a column of samples.
    seconds = events.assign(onset=events["onset"] / 1000, sample=events["onset"])
    path = write_subject(root, "03", events)
    seconds.to_csv(path.with_name(path.name.replace("_eeg.vhdr", "_events.tsv")), sep="\t", index=False)
    # Subject 01 has no test part, lacks its columns, and is advised against.
    first = events[events["isteststim"] == 0].drop(columns=["isteststim", "teststimnumber"])
    write_subject(root, "01", first[first.columns[::-1]])
    things_eeg1_format.write_participants(root, ["01", "02", "03"], {"01": "why"})
    return root


def test_raw_trials_lie_where_the_images_were_shown(root, tmp_path):
    config = ThingsEeg1Config(root=root, mvnn="none", window=(0.0, 0.1), tmax=0.5, zero_shot=False)
    responses, stimuli = prepare(config, tmp_path / "out")
    trials = responses.trials
    assert trials["subject"].unique().tolist() == ["02", "03"]
    assert responses.coords["ch_names"] == NAMES
    step = np.asarray(responses.data)[:, 0, 3:9].mean(axis=1) * 1e6
    wanted = np.tile(np.arange(1, 20), 2)
    # The baseline holds half of the step before it.
    previous = np.where(wanted == 1, 0, wanted - 1) / 2
    previous = np.where(np.isin(wanted, [1, 16]), 0, previous)
    np.testing.assert_allclose(step, wanted - previous, atol=0.3)
    np.testing.assert_array_equal(responses.data[:19], responses.data[19:])  # ms and seconds agree
    assert (trials["split"] == "test").sum() == 8
    assert set(trials.loc[trials["split"] == "test", "concept"]) == {"camera_lens", "camera1"}
    assert trials.loc[trials["split"] == "test", "repetition"].tolist() == [0, 0, 1, 1] * 2
    assert stimuli.root is None
    assert stimuli.concepts_of(["coat_rack_01s"]).tolist() == ["coat_rack"]


def test_zero_shot_leaves_no_image_of_a_test_concept_in_training(root, tmp_path):
    responses, _ = prepare(ThingsEeg1Config(root=root, targets="drop"), tmp_path / "out")
    train, test = (responses.trials.query(f"split == '{s}'") for s in ("train", "test"))
    assert not set(train["concept"]) & set(test["concept"])
    assert len(train) == 2 * 9  # the one target was of a test concept
    notes = json.loads((tmp_path / "out" / "responses" / "meta.json").read_text())["provenance"]
    assert notes["n_zero_shot_dropped"] == 12
    assert "zero-shot" in notes["split"]
    assert "subject 01 (why)" in notes["excluded"]
    assert responses.unit == "whitened"


def test_an_excluded_subject_is_read_when_named_and_learns_no_test_concept(root):
    source = ThingsEeg1Config(root=root, subjects=(1,), mvnn="none").open_epochs()
    events = source.parts[0].recording.events
    assert set(events["concept"]) == {"coat_rack", "ant", "bee"}
    assert set(events["split"]) == {"train"}


def test_a_subject_of_the_derivative_alone_is_not_left_out_in_silence(root):
    """With raw files of some subjects and EEGLAB files of others, the latter were never read, and nothing said so."""
    derived = root / "derivatives/eeglab"
    derived.mkdir(parents=True)
    for label in ("01", "02", "06"):  # excluded, there as raw files too, and excluded by nobody here
        (derived / f"sub-{label}_task-rsvp_continuous.set").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"subject 6 .* eeglab alone, but subject 2 those of raw; .*layout=eeglab"
    ):
        ThingsEeg1Config(root=root).open_epochs()
    with pytest.raises(DataError, match=r"subject 6 .* eeglab alone"):
        ThingsEeg1Config(root=root, subjects=(2, 6)).hash_inputs()
    assert "subject 6" in ThingsEeg1Config(root=root).check()[0].message
    assert len(ThingsEeg1Config(root=root, subjects=(2, 3)).open_epochs().parts) == 2
    assert len(ThingsEeg1Config(root=root, layout="raw").open_epochs().parts) == 2


def test_two_people_with_the_large_cap_are_read_on_the_usual_montage(root):
    wide = ["Fp1", "AFp9h", *NAMES, *[f"X{i}" for i in range(62)]]
    write_subject(root, "49", make_events(), names=wide, n_samples=8000 + 4000)
    source = ThingsEeg1Config(root=root, subjects=(49,)).open_epochs()
    assert source.ch_names == tuple(NAMES)
    for folder in ("sub-01", "sub-02", "sub-03"):
        next((root / folder / "eeg").glob("*.vhdr")).unlink()
    with pytest.raises(DataError, match="67 channels, half of them not connected"):
        ThingsEeg1Config(root=root, subjects=(49,)).open_epochs()


def test_images_are_found_and_an_incomplete_folder_is_named(root, tmp_path):
    shown = {s.replace("\\", "/") for s in make_events()["stim"]}
    for name in shown:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    source = ThingsEeg1Config(root=root, zero_shot=False).open_epochs()
    assert source.stimuli.root == root / "stimuli"
    assert source.stimuli.table["sha256"].str.len().eq(64).all()
    (root / "stimuli/ant/ant_01s.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 17 images are not in .*ant/ant_01s.jpg"):
        ThingsEeg1Config(root=root, zero_shot=False).open_epochs()


def write_eeglab(root, label, events, names):
    """A continuous .set with its samples in a .fdt, at 250 Hz."""
    data = make_signal(3000, events, names, sfreq=250)
    folder = root / "derivatives" / "eeglab"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"sub-{label}_task-rsvp_continuous"
    (data * 1e6).T.astype("<f4").tofile(folder / f"{stem}.fdt")
    chanlocs = np.array([(name,) for name in names], dtype=[("labels", object)])
    eeg = {
        "setname": stem, "nbchan": float(len(names)), "trials": 1.0, "pnts": 3000.0, "srate": 250.0, "xmin": 0.0,
        "xmax": 12.0, "data": f"{stem}.fdt", "datfile": f"{stem}.fdt", "chanlocs": chanlocs, "event": [], "icawinv": [],
        "icasphere": [], "icaweights": [], "epoch": [], "urchanlocs": [], "chaninfo": {"plotrad": []}, "ref": "averef",
    }  # fmt: skip
    savemat(folder / f"{stem}.set", eeg, appendmat=False)


def test_the_derivative_has_other_samples_for_the_same_times(root, tmp_path):
    events = make_events()
    for label in ("02", "03"):
        write_eeglab(root, label, events, [*NAMES, "Cz"])
    options = {"root": root, "mvnn": "none", "zero_shot": False, "window": (0.0, 0.1), "tmax": 0.5}
    derived, _ = prepare(ThingsEeg1Config(layout="eeglab", **options), tmp_path / "a")
    raw, _ = prepare(ThingsEeg1Config(**options), tmp_path / "b")
    assert derived.coords["ch_names"] == NAMES
    # The baseline includes the onset itself, and the step there: one sample of 26, or one of 101.
    np.testing.assert_allclose(
        derived.data[:, 0, 3:9].mean(axis=1), raw.data[:, 0, 3:9].mean(axis=1), atol=8e-7
    )
    assert derived.trials["stimulus_id"].equals(raw.trials["stimulus_id"])


def write_table(path, table):
    table.to_csv(path, sep="\t", index=False)
    return path


def test_bad_tables_are_named(root, tmp_path):
    events = make_events()
    path = root / "sub-02/eeg/sub-02_task-rsvp_events.tsv"
    shifted = events.assign(object=np.roll(events["object"], 1))
    with pytest.raises(DataError, match="shifted against each other"):
        read_events(write_table(path, shifted), "here", frozenset())
    with pytest.raises(DataError, match=r"every 0\.1 s"):
        read_events(write_table(path, events.assign(onset=events["onset"] * 2)), "here", frozenset())
    stim = events["stim"].where(events.index != 1, "nothing")
    with pytest.raises(DataError, match="has no image in line 3"):
        read_events(write_table(path, events.assign(stim=stim)), "here", frozenset())
    with pytest.raises(DataError, match="contradicts itself in line 2"):
        read_events(write_table(path, events.assign(sample=events["onset"] + 7)), "here", frozenset())
    late = events.assign(onset=events["onset"] + 60_000)
    write_table(path, late)
    with pytest.raises(DataError, match=r"subject 02.*lasts 12.0 s, but its last event is at"):
        ThingsEeg1Config(root=root).open_epochs()
    path.unlink()
    with pytest.raises(DataError, match="which lists what was shown and when"):
        ThingsEeg1Config(root=root).open_epochs()
    assert not ThingsEeg1Config(root=root).check()[-1].ok


def test_missing_things_are_named(root, tmp_path):
    refuse = refusals(ThingsEeg1Config, root=root)
    refuse(DataError, "THINGS-EEG1 subject 7 is not there; found 1, 2, 3", subjects=(7,))
    refuse(DataError, "no THINGS-EEG1 recording was found", layout="eeglab")
    refuse(DataError, r"is missing the channel\(s\) Cz", channels=("Oz", "Cz"))
    eeg = next((root / "sub-02/eeg").glob("*.eeg"))
    eeg.write_bytes(eeg.read_bytes()[:20_000])
    refuse(DataError, "cut short")


def test_statistics_do_not_see_the_test_trials(root, tmp_path):
    """Whitening is bit-identical when the signal during the test part is another one."""
    config = ThingsEeg1Config(root=root, subjects=(2,), tmax=0.3, window=(0.0, 0.3))
    before, _ = prepare(config, tmp_path / "a")
    eeg = next((root / "sub-02/eeg").glob("*.eeg"))
    samples = np.fromfile(eeg, "<f4").reshape(-1, 3)
    samples[8000:] *= 100
    samples.tofile(eeg)
    after, _ = prepare(config, tmp_path / "b")
    np.testing.assert_array_equal(before.coords["whitening"], after.coords["whitening"])
    assert not np.array_equal(before.data, after.data)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("False\texclude\nsub-01\t1\n", "participant_id"),
        ("participant_id\texclude\nsub\t1\n", "without a number"),
    ],
)
def test_participants_without_names_are_told(tmp_path, table, words):
    """A table whose first column had another name ended in a KeyError."""
    (tmp_path / "participants.tsv").write_text(table)
    with pytest.raises(DataError, match=words):
        read_excluded(tmp_path)


@pytest.mark.shared
def test_the_real_events_with_synthetic_signals(shared, tmp_path):
    """24,648 real presentations; the signal is synthetic: two channels that rise and fall with the samples."""
    real = shared / "data/bids_metadata/ds003825"
    assert sorted(read_excluded(real)) == [1, 6, 18, 23]
    root = tmp_path / "ds003825"
    n_samples = 3_213_000
    fake = pd.DataFrame({"sample": [0], "stimulus_id": ["x"], "stim_file": ["x"], "value": [1]})
    ramp = np.abs(np.arange(n_samples) % 100_000 - 50_000)  # without jumps, which would look like a join
    blocks = (
        np.stack([ramp[i : i + 10**6], -ramp[i : i + 10**6]]) * 1e-9 for i in range(0, n_samples, 10**6)
    )
    write_recording(
        root, "02", blocks, fake, n_samples=n_samples, ch_names=["Oz", "Pz"], sfreq=1000.0, task="rsvp"
    )
    name = "sub-02/eeg/sub-02_task-rsvp_events.tsv"
    (root / name).write_bytes((real / name).read_bytes())
    (root / "participants.tsv").write_bytes((real / "participants.tsv").read_bytes())
    config = ThingsEeg1Config(root=root)
    source = config.open_epochs()
    part = source.parts[0]
    events = part.recording.events
    assert events["split"].value_counts().to_dict() == {"train": 19848, "test": 2400}
    train, test = (events[events["split"] == s] for s in ("train", "test"))
    assert train["concept"].nunique() == 1654
    assert not set(train["concept"]) & set(test["concept"])
    assert len(source.stimuli) == 19848 + 200
    findings = config.check()
    assert all(finding.ok for finding in findings), [f for f in findings if not f.ok]
    table = pd.read_csv(real / name, sep="\t")
    onset = int(table["onset"].iloc[-1])
    assert events["sample"].iloc[-1] == onset
    expected = np.abs(np.arange(onset, onset + 50) % 100_000 - 50_000) * 1e-9
    assert_close(part.read(onset, onset + 50)[0], expected)
    # Numbers count in another order than the concept list: names agree with it, numbers do not.
    concepts = pd.read_csv(shared / "data/things/things_concepts.tsv", sep="\t")["uniqueID"]
    main = table[table["isteststim"] == 0].drop_duplicates("object")
    assert set(main["object"]) == set(concepts)
    assert (concepts.to_numpy()[main["objectnumber"]] != main["object"]).sum() == 20


def test_the_manifest_knows_the_real_participants(shared):
    import hashlib

    from braindecode_vis.datasets.manifests import read_manifest

    entry = read_manifest("things_eeg1").files[0]
    path = Path(shared) / "data/bids_metadata/ds003825/participants.tsv"
    assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (entry.bytes, entry.sha256)


def test_cleaning_options_change_the_trials(root, tmp_path):
    options = {"root": root, "subjects": (2,), "tmax": 0.3, "window": (0.0, 0.3), "mvnn": "none"}
    changes = ({"h_freq": 30.0}, {"reference": "average"}, {"scaling": "zscore"})
    demand_change(ThingsEeg1Config, options, tmp_path, *changes)
