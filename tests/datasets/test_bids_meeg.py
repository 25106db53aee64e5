"""Generic BIDS: a phantom, every reader on real files, and the real tables of two data sets with synthetic signals."""

import json
import shutil

import mne
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.bids.meeg_dataset import BidsMeegConfig
from braindecode_vis.datasets.bids.meeg_files import RawReader, list_channels, open_recording
from braindecode_vis.parts.phantom.formats import bids_eeg
from tests.datasets.reading import demand_change, prepare, refusals

NAMES, TYPES = ["Oz", "PO7", "EOG1"], ["eeg", "eeg", "eog"]
IMAGES = ["ant_01b", "bee_01b", "coat_rack_13s", "dog_02s"]


def make_events(shift=0):
    rows = [(image, repetition) for repetition in range(3) for image in IMAGES]
    return pd.DataFrame(
        {
            "sample": 600 + shift + 500 * np.arange(len(rows)),
            "value": [IMAGES.index(image) + 1 for image, _ in rows],
            "stimulus_id": [image for image, _ in rows],
            "stim_file": [f"pictures/{image[:-4]}/{image}.jpg" for image, _ in rows],
            "part": ["test" if image == "dog_02s" else "train" for image, _ in rows],
        }
    )


def write_phantom(root, subject="01", session="01", shift=0, n_samples=8000, sfreq=500.0):
    """Noise, and 10 microvolt times the code of the image for 0.1 s after each onset."""
    events = make_events(shift)
    data = np.random.default_rng(0).standard_normal((3, n_samples)) * 1e-7
    for row in events.itertuples():
        data[0, row.sample : row.sample + 50] += row.value * 1e-5
    blocks = (data[:, i : i + 3000] for i in range(0, n_samples, 3000))
    position = np.array([[0.0, -0.09, 0.01], [-0.05, -0.07, 0.02], [np.nan] * 3])
    return bids_eeg.write_recording(
        root, subject, blocks, events, n_samples=n_samples, ch_names=NAMES, sfreq=sfreq, ch_pos=position,
        ch_types=TYPES, session=session, run="01",
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("bids") / "data"
    people = pd.DataFrame({"participant_id": ["sub-01", "sub-02"]})
    bids_eeg.write_dataset(root, people)
    for subject, session in (("01", "01"), ("01", "02"), ("02", "01")):
        write_phantom(root, subject, session, shift=int(subject + session) % 7)
    return root


@pytest.fixture
def root(base, tmp_path):
    return shutil.copytree(base, tmp_path / "data")


def find_table(root, kind="events"):
    return root / f"sub-01/ses-01/eeg/sub-01_ses-01_task-images_run-01_{kind}.tsv"


SPLIT = {"column": "part", "test": ("test",)}


def test_the_phantom_is_read_by_its_recipe(base, tmp_path):
    config = BidsMeegConfig(root=base, split=SPLIT, sfreq=250, window=(0.0, 0.1), tmax=0.3)
    responses, stimuli = prepare(config, tmp_path)
    trials = responses.trials
    assert responses.unit == "V"
    assert responses.coords["ch_names"] == ["Oz", "PO7"]
    assert trials[["subject", "session"]].drop_duplicates().to_numpy().tolist() == [
        ["01", "01"],
        ["01", "02"],
        ["02", "01"],
    ]
    codes = np.array([IMAGES.index(i) + 1 for i in trials["stimulus_id"]])
    np.testing.assert_allclose(responses.data[:, 0, 3:20].mean(axis=1) * 1e5, codes, rtol=0.05)
    assert trials.loc[trials["subject"] == "01", "repetition"].max() == 5  # counted over both sessions
    assert trials.groupby("split")["stimulus_id"].nunique().to_dict() == {"test": 1, "train": 3}
    # The concept is the folder of the image.
    assert stimuli.concepts_of(["coat_rack_13s"]).tolist() == ["coat_rack"]
    assert np.isfinite(responses.coords["ch_pos"]).all()
    assert all(finding.ok for finding in config.check())


def test_subjects_sessions_and_labels_are_chosen_by_name(base):
    config = BidsMeegConfig(root=base, subjects=("02", "01"), sessions=("01",), task="images")
    source = config.open_epochs()
    assert [part.recording.subject for part in source.parts] == ["02", "01"]
    assert {s for p in source.parts for s in p.recording.events["split"]} == {"none"}
    assert source.plan.sfreq == 500
    with pytest.raises(DataError, match="subject 09 is not there; found 01, 02"):
        BidsMeegConfig(root=base, subjects=("09",)).open_epochs()
    with pytest.raises(DataError, match="no eeg or meg recording of the task faces"):
        BidsMeegConfig(root=base, task="faces").open_epochs()
    assert (
        len(BidsMeegConfig(root=base, subjects=(1,), runs=(1,)).open_epochs().parts) == 2
    )  # 01 in YAML is 1
    assert BidsMeegConfig(root=base).hash_inputs().keys() >= {
        "sub-01/ses-01/eeg/sub-01_ses-01_task-images_run-01_eeg.eeg",
        "sub-01/ses-01/eeg/sub-01_ses-01_task-images_run-01_events.tsv",
    }


@pytest.mark.parametrize("unit", ["milliseconds", "samples"])
def test_onsets_in_other_units_give_the_same_trials(root, unit):
    one = {"root": root, "subjects": ("01",), "sessions": ("01",)}
    before = BidsMeegConfig(**one).open_epochs().parts[0].recording.events["sample"]
    table = pd.read_csv(find_table(root), sep="\t")
    table["onset"] *= 1000 if unit == "milliseconds" else 500
    table.to_csv(find_table(root), sep="\t", index=False)
    after = BidsMeegConfig(onset_unit=unit, **one).open_epochs().parts[0].recording.events["sample"]
    assert before.equals(after)
    with pytest.raises(DataError, match=r"its onsets were read as seconds; see dataset.onset_unit"):
        BidsMeegConfig(**one).open_epochs()


def test_concepts_come_from_a_column_a_pattern_or_the_folder(base):
    one = {"root": base, "subjects": ("02",)}

    def concepts(**options):
        return (
            BidsMeegConfig(**one, **options).open_epochs().parts[0].recording.events["concept"].tolist()[:4]
        )

    assert concepts() == ["ant", "bee", "coat_rack", "dog"]
    assert concepts(concept_column="value") == ["1", "2", "3", "4"]
    assert concepts(concept_pattern=r"([^/]+)_\d+[a-z]\.jpg$") == ["ant", "bee", "coat_rack", "dog"]
    assert concepts(stimulus_column="stimulus_id") == IMAGES
    with pytest.raises(
        DataError, match="the concept of 3 of 12 images is not known, first 'pictures/coat_rack"
    ):
        concepts(concept_pattern=r"/([a-z]+)_\d+")
    with pytest.raises(ConfigError, match="exclude each other"):
        concepts(concept_column="value", concept_pattern="(x)")
    with pytest.raises(ValidationError, match="needs a group in parentheses"):
        BidsMeegConfig(concept_pattern="x")


def test_events_are_chosen_by_type_and_text_stays_text(root):
    table = pd.read_csv(find_table(root), sep="\t", dtype=str)
    table["stim_file"] = ["021.50", "n/a", *["021.5"] * 10]
    table["trial_type"] = ["seen", "rest", *["seen"] * 9, "imagined"]
    table.to_csv(find_table(root), sep="\t", index=False)
    one = {"root": root, "subjects": ("01",), "sessions": ("01",)}
    source = BidsMeegConfig(**one).open_epochs()
    assert source.parts[0].recording.events["stimulus_id"].unique().tolist() == ["021.50", "021.5"]
    counts = next(iter(source.notes["events_left_out"].values()))
    assert counts["n_without_image"] == 1
    chosen = BidsMeegConfig(trial_types=("seen",), **one).open_epochs()
    assert len(chosen.parts[0].recording.events) == 10
    with pytest.raises(DataError, match=r"has no known image in 1 of 11 events .* above the bound of 1.0%"):
        BidsMeegConfig(trial_types=("seen", "rest"), **one).open_epochs()
    with pytest.raises(DataError, match="no event of the type felt; its trial_type are seen, rest, imagined"):
        BidsMeegConfig(trial_types=("felt",), **one).open_epochs()


def test_a_wrong_recipe_is_named(base):
    one = {"root": base, "subjects": ("02",)}
    refuse = refusals(BidsMeegConfig, **one)
    refuse(DataError, r"no column 'stim_fil' \(did you mean 'stim_file'\?\)", stimulus_column="stim_fil")
    refuse(
        ConfigError,
        "finds no test trial: no part is validation",
        split={"column": "part", "test": ("validation",)},
    )
    first = 600 + 201 % 7
    refuse(
        DataError,
        r"shows 4 image\(s\) both in training and in test",
        split={"column": "sample", "test": tuple(str(first + 500 * i) for i in range(4))},
    )
    with pytest.raises(ValidationError, match="given for both training and test"):
        BidsMeegConfig(split={"column": "part", "test": ("a",), "train": ("a",)})
    refuse(ConfigError, r"dataset.split is none", mvnn="epochs")
    refuse(ConfigError, "of the types eeg, eog", picks=("Oz", "EOG1"))
    refuse(DataError, r"is missing the channel\(s\) Cz", picks=("Cz",))
    refuse(DataError, "no channel for picks 'mag'", picks="mag")
    assert [f.ok for f in BidsMeegConfig(stimulus_column="x", **one).check()] == [True, False, False]


def test_missing_and_damaged_files_are_named(root):
    one = {"root": root, "subjects": ("01",), "sessions": ("01",)}
    (root / "sub-01/ses-01/eeg/._sub-01_ses-01_task-images_run-01_eeg.vhdr").write_bytes(b"\0\5\x16\7")
    table = find_table(root)
    kept = table.read_text()
    lines = kept.splitlines()
    lines[1] = "soon\t" + lines[1].split("\t", 1)[1]
    table.write_text("\n".join(lines))
    refuse = refusals(BidsMeegConfig, **one)
    refuse(DataError, r"has 'soon' in the column onset, line 2", sidecars=False)
    table.unlink()
    refuse(DataError, r"subject 01, session 01.*no .*events.tsv beside it", sidecars=False)
    table.write_text(kept)
    channels = find_table(root, "channels")
    channels.write_text(channels.read_text().replace("Oz\t", "Iz\t"))
    refuse(DataError, r"If only its sidecars are at fault, set dataset.sidecars to false")
    assert BidsMeegConfig(**one, sidecars=False).open_epochs().ch_names == tuple(
        NAMES
    )  # no type but eeg is known
    table.with_name(table.name.replace("_events.tsv", "_eeg.eeg")).unlink()
    refuse(DataError, "cannot be opened", sidecars=False)


def test_images_are_hashed_or_missing_ones_named(root):
    for file in make_events()["stim_file"].unique():
        path = root / "stimuli" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(file.encode())
    stimuli = BidsMeegConfig(root=root).open_epochs().stimuli
    assert stimuli.root == root / "stimuli"
    assert stimuli.table["sha256"].str.len().eq(64).all()
    (root / "stimuli/pictures/ant/ant_01b.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images are not in .*ant_01b.jpg"):
        BidsMeegConfig(root=root).open_epochs()


def test_names_that_repeat_in_folders_need_their_path(root):
    for path in root.rglob("*_events.tsv"):
        table = pd.read_csv(path, sep="\t")
        table["stim_file"] = [f"{'ab'[i % 2]}\\1.png" for i in range(len(table))]
        table.to_csv(path, sep="\t", index=False)
    with pytest.raises(DataError, match=r"'1' has more than one concept .* set dataset.id_from to path"):
        BidsMeegConfig(root=root).open_epochs()
    source = BidsMeegConfig(root=root, id_from="path").open_epochs()
    assert source.stimuli.ids.tolist() == ["a/1", "b/1"]


READERS = {
    "mne/test.edf": (512, 138, 3072),
    "mne/test.bdf": (2048, 72, 2048),
    "mne/test.vhdr": (1000, 26, 7900),
    "mne/test_ctf_comp_raw.fif": (480, 274, 241),
    "eeglab/sub-S1_ses-01_task-Experiment_run-01_eeg.set": (256, 15, 15360),
}


@pytest.mark.shared
@pytest.mark.parametrize("name", READERS)
def test_every_format_opens_and_is_read_in_pieces(shared, name):
    path = shared / "data/readers" / name
    raw = open_recording(path, name)
    sfreq, n_channels, n_samples = READERS[name]
    channels = list_channels(raw, ("eeg", "mag"))
    assert (raw.info["sfreq"], len(channels), raw.n_times) == (sfreq, n_channels, n_samples)
    rows = np.array([raw.ch_names.index(c) for c in channels[:3]])
    piece = RawReader(raw, rows)(100, 140)
    np.testing.assert_array_equal(piece, raw.get_data(picks=rows)[:, 100:140])


@pytest.mark.shared
@pytest.mark.parametrize("ending", ["edf", "bdf", "set"])
def test_real_recordings_run_through_the_whole_path(shared, tmp_path, ending):
    """A real file becomes a BIDS data set of one person with made-up events."""
    source = shared / "data/readers" / next(name for name in READERS if name.endswith(ending))
    root = tmp_path / "data"
    folder = root / "sub-01" / "eeg"
    folder.mkdir(parents=True)
    shutil.copy(source, folder / f"sub-01_task-view_eeg.{ending}")
    raw = mne.io.read_raw(source, verbose="error")
    sfreq, last = raw.info["sfreq"], raw.times[-1]
    onset = np.linspace(0.3, last - 0.3, 6)
    table = pd.DataFrame({"onset": onset, "duration": 0.1, "stim_file": [f"{c}.png" for c in "abcabc"]})
    table.to_csv(folder / "sub-01_task-view_events.tsv", sep="\t", index=False)
    config = BidsMeegConfig(root=root, tmax=0.2, window=(0.0, 0.1), baseline=None, max_dropped=0.99)
    responses, _ = prepare(config, tmp_path / "out")
    assert responses.data.shape[1] == len(list_channels(raw, ("eeg",)))
    n_times = responses.data.shape[2]
    assert abs(n_times - 0.1 * sfreq) <= 1  # the ends fall between samples
    at = round(onset[0] * sfreq)
    expected = raw.get_data(picks="eeg", start=at, stop=at + n_times)
    np.testing.assert_allclose(responses.data[0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.shared
def test_the_real_events_of_things_eeg1_need_only_a_recipe(shared, tmp_path):
    """Real table, synthetic signal: one silent-looking channel of the length that the events ask for."""
    real = shared / "data/bids_metadata/ds003825/sub-02/eeg/sub-02_task-rsvp_events.tsv"
    root = tmp_path / "data"
    fake = pd.DataFrame({"sample": [0], "stimulus_id": ["x"], "stim_file": ["x"], "value": [1]})
    path = bids_eeg.write_recording(
        root, "02", (np.full((1, 10**6), 1e-6) for _ in range(4)), fake, n_samples=4 * 10**6, ch_names=["Oz"],
        sfreq=1000.0, task="rsvp",
    )  # fmt: skip
    path.with_name(real.name).write_bytes(real.read_bytes())
    config = BidsMeegConfig(
        root=root, stimulus_column="stim", onset_unit="milliseconds", sidecars=False,
        split={"column": "isteststim", "test": (1,)},
    )  # fmt: skip
    source = config.open_epochs()
    events = source.parts[0].recording.events
    assert events["split"].value_counts().to_dict() == {"train": 22248, "test": 2400}
    assert events["concept"].nunique() == 1854
    assert (events["sample"].iloc[0], events["stimulus_id"].iloc[0]) == (38306, "volleyball_08s")


@pytest.mark.shared
def test_the_real_tables_of_things_meg_need_no_sidecars(shared, tmp_path):
    """Real events and channel types, which hide every sensor; synthetic signal."""
    real = shared / "data/bids_metadata/ds004212/sub-BIGMEG1/ses-01/meg"
    stem = "sub-BIGMEG1_ses-01_task-main_run-01"
    folder = tmp_path / "data/sub-BIGMEG1/ses-01/meg"
    folder.mkdir(parents=True)
    channels = pd.read_csv(real / f"{stem}_channels.tsv", sep="\t").query("type == 'OTHER'").iloc[:2]
    channels.to_csv(folder / f"{stem}_channels.tsv", sep="\t", index=False)
    (folder / f"{stem}_events.tsv").write_bytes((real / f"{stem}_events.tsv").read_bytes())
    (folder / f"{stem}_meg.json").write_text(json.dumps({"TaskName": "main", "PowerLineFrequency": 60}))
    info = mne.create_info(channels["name"].tolist(), 1200.0, "mag")
    data = np.random.default_rng(0).standard_normal((2, 420_000)) * 1e-13
    mne.io.RawArray(data, info, verbose="error").save(folder / f"{stem}_meg.fif", verbose="error")
    recipe = {
        "root": tmp_path / "data", "stimulus_column": "value", "concept_column": "things_category_nr", "task": "main",
        "split": {"column": "trial_type", "test": ("test",), "train": ("exp",)}, "sfreq": 200,
        "trial_types": ("exp", "test"),
    }  # fmt: skip
    with pytest.raises(DataError, match=r"no channel for picks 'auto': .* set dataset.sidecars to false"):
        BidsMeegConfig(**recipe).open_epochs()
    responses, _ = prepare(BidsMeegConfig(**recipe, sidecars=False), tmp_path / "out")
    assert (responses.unit, responses.coords["modality"]) == ("T", "meg")
    assert set(responses.trials["split"]) == {"train", "test"}
    assert responses.trials["concept"].iloc[0] == "1760.0"


def test_images_that_come_later_change_the_digest(tmp_path):
    """A run that was prepared without images went on without them for ever."""
    from braindecode_vis.datasets.bids.meeg_files import hash_images

    assert hash_images(None, tmp_path) == {}
    (tmp_path / "stimuli").mkdir()
    (tmp_path / "stimuli" / "ant.jpg").write_bytes(b"1")
    first = hash_images(None, tmp_path)
    (tmp_path / "stimuli" / "bee.jpg").write_bytes(b"1")
    assert first != hash_images(None, tmp_path) != {}
    assert hash_images(tmp_path / "stimuli", tmp_path / "elsewhere") == hash_images(None, tmp_path)


def test_electrodes_and_shared_sidecars_are_inputs(root):
    """Electrodes of a session have no task in their name: they changed, and a rerun reused trials of the old ones."""
    config = BidsMeegConfig(root=root, split=SPLIT)
    (electrodes,) = (root / "sub-01/ses-01").rglob("*_electrodes.tsv")
    seen = [config.hash_inputs()]
    electrodes.write_text(electrodes.read_text() + "\n")
    seen.append(config.hash_inputs())
    (electrodes.parent / "sub-01_ses-01_events.json").write_text("{}")
    seen.append(config.hash_inputs())
    electrodes.unlink()
    seen.append(config.hash_inputs())
    assert len({str(sorted(found.items())) for found in seen}) == 4


def test_cleaning_options_change_the_trials(root, tmp_path):
    options = {"root": root, "split": SPLIT, "sfreq": 250, "window": (0.0, 0.1), "tmax": 0.3}
    changes = ({"h_freq": 30.0}, {"reference": "average"}, {"scaling": "zscore"})
    demand_change(BidsMeegConfig, options, tmp_path, *changes)
    with pytest.raises(
        ConfigError, match=r"dataset.scaling is fitted on training trials, but dataset.split is none"
    ):
        BidsMeegConfig(**{**options, "split": "none"}, scaling="robust").open_epochs()


def test_channels_that_a_recording_marks_as_bad_can_be_dropped(root, tmp_path):
    path = find_table(root, "channels")
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    table["status"] = np.where(table["name"] == "PO7", "bad", "good")
    table.to_csv(path, sep="\t", index=False)
    options = {"root": root, "split": SPLIT, "sfreq": 250, "window": (0.0, 0.1), "tmax": 0.3}
    kept = BidsMeegConfig(**options).open_epochs()
    assert kept.ch_names == ("Oz", "PO7")
    assert list(kept.notes["channels_marked_bad_but_kept"].values()) == [["PO7"]]
    dropped, _ = prepare(BidsMeegConfig(**options, bad_channels="drop"), tmp_path / "out")
    assert dropped.coords["ch_names"] == ["Oz"]
    assert len(dropped.trials["session"].unique()) == 2  # from the recordings that did not mark it, too


def test_onsets_may_stand_in_another_column(root):
    one = {"root": root, "subjects": ("01",), "sessions": ("01",)}
    before = BidsMeegConfig(**one).open_epochs().parts[0].recording.events["sample"]
    table = pd.read_csv(find_table(root), sep="\t")
    table.assign(photo=table["onset"], onset=0.0).to_csv(find_table(root), sep="\t", index=False)
    after = BidsMeegConfig(onset_column="photo", **one).open_epochs().parts[0].recording.events["sample"]
    assert before.equals(after)
