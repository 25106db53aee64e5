"""THINGS-EEG2 in every layout, written by the phantom writers and read by the loader; and every kind of bad input."""

import json
import pickle
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_stimuli
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.things_eeg2.dataset import ALL63, POSTERIOR17, ThingsEeg2Config
from braindecode_vis.datasets.things_eeg2.layouts import read_image_list
from braindecode_vis.parts.phantom.formats import bids_eeg, things_eeg2_format
from braindecode_vis.parts.phantom.formats import things_eeg2_derived as derived
from tests.datasets.reading import demand_change, prepare, refusals
from tests.references import assert_close

CONCEPTS, PROBES = ("ant", "bee", "cow", "dog"), ("moth", "newt", "owl")
CHANNELS = ("O1", "Oz", "O2")
N_TRAIN, N_TEST = 8, 3


def write_images(root):
    training = things_eeg2_format.make_image_table("training", CONCEPTS, 2)
    test = things_eeg2_format.make_image_table("test", PROBES)
    things_eeg2_format.write_image_metadata(root, training, test)
    for number, path in enumerate([*training["path"], *test["path"]]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 2 * number, 0)).save(root / path)
    return training, test


def make_design(n_sessions=2):
    return things_eeg2_format.make_things_eeg2_design(
        4, 2, 3, n_sessions, seed=1, test_repetitions=4, n_recordings=2
    )


def write_raw(root, subject=1, ch_names=CHANNELS, n_sessions=2, change=lambda events: events):
    rng = np.random.default_rng(subject)
    for session in make_design(n_sessions):
        for name, part in (("training", session.training), ("test", session.test)):
            data = rng.standard_normal((len(ch_names), part.n_samples)) * 1e-5
            things_eeg2_format.write_raw(
                root, subject, session.session, name, [data], change(part.events), n_samples=part.n_samples,
                ch_names=ch_names,
            )  # fmt: skip


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A root with two subjects, two raw sessions each."""
    root = tmp_path_factory.mktemp("things") / "root"
    write_images(root)
    (root / "phantom_truth").mkdir()  # simulated, and smaller than the published set
    write_raw(root, 1)
    write_raw(root, 2, CHANNELS[::-1])
    return root


@pytest.fixture
def root(master, tmp_path):
    shutil.copytree(master, tmp_path / "root", copy_function=shutil.copyfile)
    return tmp_path / "root"


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "root")
    (tmp_path / "root/phantom_truth").mkdir()
    return tmp_path / "root"


def make_config(root, **options):
    return ThingsEeg2Config(**{"root": root, "channels": CHANNELS, **options})


def write(config, folder):
    return prepare(config, folder)[0]


def make_epochs(n_images, n_times=250, n_channels=3, n_repetitions=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n_images, n_repetitions, n_channels, n_times))


# --- raw --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1])
def test_the_stimulus_channel_may_stand_anywhere(master, tmp_path, row):
    """Only files with the stimulus channel last were tested: one behind it could be read a row off unnoticed."""
    root = tmp_path / "root"
    shutil.copytree(master, root, copy_function=shutil.copyfile)
    for path in (root / "sub-01").rglob("raw_eeg_*.npy"):
        content = np.load(path, allow_pickle=True).item()
        order = [*range(row), len(CHANNELS), *range(row, len(CHANNELS))]
        for key in ("ch_names", "ch_types"):
            content[key] = [content[key][k] for k in order]
        content["raw_eeg_data"] = content["raw_eeg_data"][order]
        np.save(path, content, allow_pickle=True)
    for reference in ("none", "average"):  # an average is of every channel of the file
        options = {"subjects": ("01",), "mvnn": "none", "channels": ("O2", "Oz"), "reference": reference}
        last, moved = (
            write(make_config(folder, **options), tmp_path / reference / name)
            for folder, name in ((master, "last"), (root, "moved"))
        )
        np.testing.assert_array_equal(moved.data, last.data)
        pd.testing.assert_frame_equal(moved.trials, last.trials)


def test_raw_sessions_become_trials_with_their_labels(master, tmp_path):
    config = make_config(master)
    responses = write(config, tmp_path)
    trials = responses.trials
    n_per_subject = N_TRAIN * 2 + N_TEST * 8  # each session shows half of the training images twice
    assert responses.data.shape == (2 * n_per_subject, 3, 250)
    assert responses.unit == "whitened"
    assert list(responses.coords["ch_names"]) == list(CHANNELS)
    for subject in ("01", "02"):
        mine = trials[trials["subject"] == subject]
        assert len(mine) == n_per_subject
        for design, number in zip(make_design(), ("01", "02"), strict=True):
            for split, part in (("train", design.training), ("test", design.test)):
                rows = mine[(mine["session"] == number) & (mine["split"] == split)]
                events = part.events.query("not is_target")
                np.testing.assert_array_equal(rows["sample"], events["sample"])
                table = things_eeg2_format.make_image_table(
                    "training" if split == "train" else "test", CONCEPTS if split == "train" else PROBES,
                    2 if split == "train" else 1,
                )  # fmt: skip
                expected = table["stimulus_id"].iloc[events["code"] - 1].tolist()
                assert rows["stimulus_id"].tolist() == expected
        counts = mine.groupby("stimulus_id")["repetition"].agg(["size", "max", "nunique"])
        assert (counts["size"] == counts["max"] + 1).all()
        assert (counts["size"] == counts["nunique"]).all()
    stimuli = read_stimuli(tmp_path / "stimuli")
    assert len(stimuli) == N_TRAIN + N_TEST
    assert stimuli.read_image("owl_01b").shape == (4, 4, 3)
    assert stimuli.concepts_of(["owl_01b"])[0] == "owl"
    assert stimuli.table["sha256"].is_unique


def test_channels_are_matched_by_name(master, tmp_path):
    """Subject 02 was written in the opposite order: what is read is called by its name."""
    source = make_config(master, subjects=(2,)).open_epochs()
    content = np.load(master / "sub-02" / "ses-01" / "raw_eeg_training.npy", allow_pickle=True).item()
    part = source.parts[0]
    np.testing.assert_array_equal(part.read(100, 150), content["raw_eeg_data"][[2, 1, 0], 100:150])
    assert part.recording.events["stimulus_id"].isin(source.stimuli.ids).all()


def test_the_full_montage_and_the_posterior_one(images):
    assert len(POSTERIOR17) == 17
    assert POSTERIOR17[0] == "P7"
    write_raw(images, 1, ALL63)
    assert make_config(images, channels="all63").open_epochs().ch_names == ALL63
    assert make_config(images, channels="posterior17").open_epochs().ch_names == POSTERIOR17
    facts = read_manifest("things_eeg2").facts
    assert facts["n_channels"] == len(ALL63)


def test_the_declared_facts_are_those_of_the_full_design():
    facts = read_manifest("things_eeg2").facts
    sessions = things_eeg2_format.make_things_eeg2_design()
    events = {
        part: pd.concat([getattr(s, part).events for s in sessions]).query("not is_target")
        for part in ("training", "test")
    }
    assert [f"{s.session:02d}" for s in sessions] == list(read_manifest("things_eeg2").recordings["*"])
    assert events["training"]["condition"].nunique() == facts["n_train_images"]
    assert (events["training"]["condition"].value_counts() == facts["train_repetitions"]).all()
    assert events["test"]["condition"].nunique() == facts["n_test_images"]
    assert (events["test"]["condition"].value_counts() == facts["test_repetitions"]).all()
    assert facts["sfreq"] == things_eeg2_format.SFREQ


def test_fewer_subjects_and_sessions(master, tmp_path):
    config = make_config(master, subjects=(2,), sessions=(1,))
    trials = write(config, tmp_path).trials
    assert set(trials["subject"]) == {"02"}
    assert set(trials["session"]) == {"01"}


def test_same_files_give_the_same_digest_wherever_they_lie(master, root):
    assert make_config(master).hash_inputs() == make_config(root).hash_inputs()
    path = root / "sub-01" / "ses-01" / "raw_eeg_test.npy"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x01" * 40_000)
    changed = make_config(root).hash_inputs()
    assert [k for k, v in make_config(master).hash_inputs().items() if changed[k] != v] == [
        "sub-01/ses-01/raw_eeg_test.npy"
    ]


def test_what_enters_the_fingerprint():
    fields = ThingsEeg2Config().hashed_fields()
    assert not {"root", "images", "trust_pickle", "max_dropped"} & set(fields)
    assert {"subjects", "channels", "sfreq", "mvnn", "dtype", "window", "baseline"} <= set(fields)


def test_check_names_each_file(master, root):
    assert all(finding.ok for finding in make_config(master).check())
    path = root / "sub-02" / "ses-01" / "raw_eeg_test.npy"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    bad = [finding for finding in make_config(root).check() if not finding.ok]
    assert len(bad) == 1
    assert "subject 02, session 01" in bad[0].message
    assert "truncated" in bad[0].message


# --- published epochs -------------------------------------------------------------------------------------


def write_derived(root, writer, n_times, **options):
    data = {part: make_epochs(n, n_times, seed=n) for part, n in (("training", N_TRAIN), ("test", N_TEST))}
    for part, epochs in data.items():
        writer(
            root,
            1,
            part,
            iter(epochs),
            n_images=len(epochs),
            n_repetitions=4,
            ch_names=CHANNELS[::-1],
            **options,
        )
    return np.concatenate([epochs[:, :, ::-1].reshape(-1, 3, n_times) for epochs in data.values()])


@pytest.fixture(autouse=True)
def _no_large_arrays(monkeypatch):
    """The arrays of these tests are small; the loader must leave them in the file all the same."""
    monkeypatch.setattr("braindecode_vis.datasets.sources.safe_pickle.LARGE_BYTES", 20_000)


def test_official_files(images, tmp_path):
    data = write_derived(images / "preprocessed", derived.write_official, 100)
    responses = write(make_config(images), tmp_path / "out")
    np.testing.assert_array_equal(responses.data, data[..., 20:].astype(np.float32))
    assert responses.coords["sfreq"] == 100
    assert "free of the test set" in responses.coords["warnings"][0]
    assert responses.coords["times"][0] == pytest.approx(0)
    assert responses.unit == "whitened"
    meta = json.loads((tmp_path / "out" / "responses" / "meta.json").read_text())
    assert "training and test trials together" in meta["provenance"]["whitening"]
    assert (responses.trials["session"] == "n/a").all()
    with pytest.raises(ConfigError, match=r"sfreq=100"):
        make_config(images, sfreq=250.0).open_epochs()


def test_small_official_files_are_not_called_cut_short(images, tmp_path, monkeypatch):
    """Files of few images come as arrays, not as places in a file, and were all refused."""
    data = write_derived(images / "preprocessed", derived.write_official, 100)
    monkeypatch.setattr("braindecode_vis.datasets.sources.safe_pickle.LARGE_BYTES", 1 << 30)
    responses = write(make_config(images), tmp_path / "out")
    np.testing.assert_array_equal(responses.data, data[..., 20:].astype(np.float32))


def test_the_defaults_fit_official_files(images, tmp_path):
    """`check` and `preprocess` without options refused them, asking for 250 Hz and 63 channels."""
    for part, n in (("training", N_TRAIN), ("test", N_TEST)):
        epochs = make_epochs(n, 100, n_channels=17, seed=n)
        derived.write_official(
            images, 1, part, iter(epochs), n_images=n, n_repetitions=4, ch_names=POSTERIOR17
        )
    assert all(finding.ok for finding in ThingsEeg2Config(root=images).check())
    responses = write(ThingsEeg2Config(root=images), tmp_path / "out")
    assert responses.coords["ch_names"] == list(POSTERIOR17)


def test_a_flat_channel_of_published_epochs_is_named(images, tmp_path):
    for part, n in (("training", N_TRAIN), ("test", N_TEST)):
        epochs = make_epochs(n, 250)
        epochs[:, :, 1] = 0
        derived.write_250hz(images, 1, part, iter(epochs), n_images=n, n_repetitions=4, ch_names=CHANNELS)
    with pytest.raises(DataError, match=r"subject 01, file .*channel\(s\) Oz are flat"):
        write(make_config(images), tmp_path / "out")


def test_250_hz_pickles(images, tmp_path):
    data = write_derived(images / "Preprocessed_data_250Hz", derived.write_250hz, 250)
    config = make_config(images, dtype="float16")
    responses = write(config, tmp_path / "out")
    np.testing.assert_array_equal(responses.data, data.astype(np.float16))
    assert_close(responses.coords["times"], np.arange(250) / 250)
    assert (
        responses.trials.groupby("stimulus_id")["repetition"]
        .apply(list)
        .map(lambda r: r == [0, 1, 2, 3])
        .all()
    )


def test_ubp_files_are_opened_only_when_trusted(images, tmp_path):
    table = read_image_list(images, images)
    data = []
    for part, split, n in (("training", "train", N_TRAIN), ("test", "test", N_TEST)):
        rows = table[table["split"] == split]
        epochs = make_epochs(n, seed=n)
        order = np.random.default_rng(0).permutation(n)  # the file tells its images by name, in any order
        derived.write_ubp(
            images, 1, part, iter(epochs), images=rows["path"].iloc[order].tolist(), labels=range(n), texts=["x"] * n,
            sessions=np.tile([0, 0, 1, 1], (n, 1)), ch_names=CHANNELS,
        )  # fmt: skip
        data.append((rows["stimulus_id"].iloc[order], epochs.reshape(-1, 3, 250)))
    with pytest.raises(ConfigError, match=r"train.pt .*trust_pickle=true"):
        make_config(images).open_epochs(tmp_path)
    assert all(finding.ok for finding in make_config(images).check())
    broken = images / "Preprocessed_data_250Hz_whiten" / "sub-01" / "test.pt"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    counted, finding = make_config(images, trust_pickle=True).check()[-2:]
    assert counted.message == f"{4 * N_TRAIN} trials"
    assert not finding.ok
    broken.write_bytes(whole)
    responses = write(make_config(images, trust_pickle=True), tmp_path / "out")
    np.testing.assert_array_equal(responses.data, np.concatenate([d for _, d in data]).astype(np.float16))
    assert responses.stimulus_ids[::4].tolist() == [i for names, _ in data for i in names]
    assert responses.trials["session"].tolist()[:4] == ["01", "01", "02", "02"]
    assert not (tmp_path / "out" / "scratch").exists()


def test_neurobridge_arrays(images, tmp_path):
    data = []
    for part, n, shape in (("training", N_TRAIN, (4, 2)), ("test", N_TEST, (3, 1))):
        epochs = make_epochs(n, seed=n)
        derived.write_neurobridge(images, 1, part, iter(epochs), shape=(*shape, 4), ch_names=CHANNELS)
        data.append(epochs.reshape(-1, 3, 250))
    responses = write(make_config(images), tmp_path / "out")
    np.testing.assert_array_equal(responses.data, np.concatenate(data).astype(np.float32))
    info = images / "preprocessed_eeg" / "sub-01" / "info.json"
    content = json.loads(info.read_text())
    refuse = refusals(make_config, root=images)
    for damaged in ({**content, "times": ["."]}, {**content, "ch_names": None}, []):
        info.write_text(json.dumps(damaged))
        refuse(DataError, r"info.json does not give the times and channels")
    info.write_text(json.dumps({**content, "times": [0.0, None, *(n / 250 for n in range(2, 250))]}))
    refuse(DataError, r"the times of .* do not increase from sample to sample")
    info.unlink()
    refuse(DataError, r"needs info.json")


def write_bids(root, column="stim_file", training=True):
    bids_eeg.write_dataset(root, pd.DataFrame({"participant_id": ["sub-01"]}))
    rng = np.random.default_rng(0)
    signals = []
    for session in make_design():
        for run, (name, part) in enumerate((("training", session.training), ("test", session.test)), 1):
            table = things_eeg2_format.make_image_table(
                name, CONCEPTS if run == 1 else PROBES, 2 if run == 1 else 1
            )
            events = part.events.copy()
            shown = ~events["is_target"]
            events["value"] = np.where(shown, events["code"], 60_000)
            events["trial_type"] = np.where(shown, "stimulus", "target")
            for key, source in (("stimulus_id", "stimulus_id"), (column, "path")):
                events[key] = "n/a"
                events.loc[shown, key] = table[source].iloc[events.loc[shown, "code"] - 1].to_numpy()
            signals.append((rng.standard_normal((3, part.n_samples)) * 1e-5).astype(np.float32))
            bids_eeg.write_recording(
                root, "01", [signals[-1]], events[["sample", "value", "stimulus_id", column, "trial_type"]],
                n_samples=part.n_samples, ch_names=CHANNELS[::-1], sfreq=1000.0, session=f"{session.session:02d}",
                task="things", run=f"{run:02d}",
            )  # fmt: skip
    return signals


def test_bids_release(images, tmp_path):
    """The same design and samples, in BIDS and in raw sessions, give the same trials."""
    signals = write_bids(images / "bids")
    (images / "bids/phantom_truth").mkdir()
    responses = write(make_config(images / "bids", images=images, mvnn="none"), tmp_path / "out")
    parts = [part for s in make_design() for part in (s.training, s.test)]
    for (session, name), part, signal in zip(
        [(1, "training"), (1, "test"), (2, "training"), (2, "test")], parts, signals, strict=True
    ):
        things_eeg2_format.write_raw(
            images, 1, session, name, [signal], part.events, n_samples=part.n_samples, ch_names=CHANNELS[::-1]
        )
    raw = write(make_config(images, layout="raw", mvnn="none"), tmp_path / "raw")
    columns = ["subject", "session", "stimulus_id", "repetition", "split", "concept", "sample"]
    pd.testing.assert_frame_equal(responses.trials[columns], raw.trials[columns])
    # BrainVision holds float32 microvolts.
    assert_close(responses.data, raw.data)
    assert set(responses.trials["run"]) == {"01", "02"}
    with pytest.raises(ConfigError, match="layouts bids, raw; choose one"):
        make_config(images).open_epochs()


def test_bids_events_must_name_images(images):
    write_bids(images / "bids")
    config = make_config(images / "bids", images=images, event_column="value")
    with pytest.raises(DataError, match=r"session 01, file .*dataset.event_column=NAME"):
        config.open_epochs()
    with pytest.raises(DataError, match="no column 'picture'"):
        make_config(images / "bids", images=images, event_column="picture").open_epochs()
    next((images / "bids").rglob("*_events.tsv")).unlink()
    with pytest.raises(DataError, match=r"events.tsv in its folder"):
        make_config(images / "bids", images=images).open_epochs()


# --- bad input --------------------------------------------------------------------------------------------


def change_metadata(root, change):
    path = root / "image_metadata.npy"
    content = np.load(path, allow_pickle=True).item()
    change(content)
    np.save(path, content, allow_pickle=True)


def shift_concepts(content):
    content["test_img_concepts"] = content["test_img_concepts"][1:] + content["test_img_concepts"][:1]


def share_a_concept(root):
    """Show a test image of a concept that is trained on."""

    def rename(content):
        content["test_img_concepts"][0], content["test_img_files"][0] = "00001_ant", "ant_09s.jpg"

    change_metadata(root, rename)
    (root / "test_images" / "00001_moth").rename(root / "test_images" / "00001_ant")
    (root / "test_images" / "00001_ant" / "moth_01b.jpg").rename(
        root / "test_images" / "00001_ant" / "ant_09s.jpg"
    )


def cut_short(root, share):
    path = root / "sub-01" / "ses-02" / "raw_eeg_training.npy"
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def lose_an_event(events):
    return events.drop(events.index[events["code"] == 1][:1])


# Sentence -> what is done to a good root, the settings, and settings with which the same files are read.
BAD = {
    r"session 02 of subject 02 is missing \(found 01\)": (
        lambda root: shutil.rmtree(root / "sub-02/ses-02"), {}, {"sessions": (1,)}),
    r"subject 01 saw its training images between 0 and 2 times.*sessions=\[1\]": (
        lambda root: [shutil.rmtree(folder) for folder in root.glob("sub-*/ses-02")], {}, None),
    r"subject 01, session 02 is missing its test file": (
        lambda root: (root / "sub-01/ses-02/raw_eeg_test.npy").unlink(), {}, None),
    "THINGS-EEG2 subject 7 is not there; found 1, 2": (lambda root: None, {"subjects": (7,)}, None),
    r"subject 01, session 01, file .*training.npy is missing the channel\(s\) Pz": (
        lambda root: None, {"channels": ("Oz", "Pz")}, None),
    "none of them twice": (lambda root: None, {"channels": ("Oz", "Oz")}, {"channels": ("Oz",)}),
    r"subject 01, session 02, file .*raw_eeg_training.npy.*truncated": (
        lambda root: cut_short(root, 0.3), {}, None),
    r"session 02, file .*raw_eeg_training.npy.*truncated": (lambda root: cut_short(root, 0.95), {}, None),
    r"subject 01, session 01, file .*does not match its images.*missing or too": (
        lambda root: write_raw(root, change=lose_an_event), {}, {"max_dropped": 0.5}),
    r"first code 2000, where [38] images are listed": (
        lambda root: write_raw(root, change=lambda events: events.assign(code=events["code"].replace(2, 2000))),
        {}, None),
    r"moth_01b.jpg with the concept 'newt' \(3 of 3 such pairs\).*shifted": (
        lambda root: change_metadata(root, shift_concepts), {}, None),
    r"training_images is of another release.*first 00002_bee/bee_01b.jpg": (
        lambda root: (root / "training_images/00002_bee/bee_01b.jpg").rename(
            root / "training_images/00002_bee/bee_09s.jpg"), {}, None),
    "training_images and test_images of THINGS-EEG2 were not found": (
        lambda root: shutil.rmtree(root / "test_images"), {}, None),
    r"1 concept\(s\) in both the training and the test part, first 'ant'": (share_a_concept, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_named(root, sentence):
    damage, settings, accepted = BAD[sentence]
    damage(root)
    error = ConfigError if "twice" in sentence else DataError
    refusals(make_config, root=root)(error, sentence, **settings)
    if accepted is not None:
        assert make_config(root, **accepted).open_epochs().n_trials > 0


def test_without_metadata_the_folders_tell_the_order(master, root):
    (root / "image_metadata.npy").unlink()
    left, right = (read_image_list(folder, folder) for folder in (master, root))
    pd.testing.assert_frame_equal(left, right)


def test_published_epochs_of_other_images_are_refused(images):
    write_derived(images, derived.write_250hz, 250)
    shutil.copyfile(
        images / "sub-01" / "preprocessed_eeg_test.npy", images / "sub-01" / "preprocessed_eeg_training.npy"
    )
    with pytest.raises(
        DataError, match=r"subject 01, file .*holds 3 images, but the image list has 8.*swapped"
    ):
        make_config(images).open_epochs()


def test_unknown_files_are_named(images):
    (images / "sub-01").mkdir()
    refuse = refusals(make_config, root=images)
    refuse(DataError, r"no recording of THINGS-EEG2 was found")
    (images / "sub-01" / "notes.npy").write_bytes(b"anything")  # not ours to judge
    (images / "sub-01" / "train.npy").write_bytes(b"hello, this is text")
    refuse(DataError, "neither a NumPy file, a pickle nor an archive")
    np.save(images / "sub-01" / "train.npy", np.zeros((2, 2)))
    refuse(DataError, r"shape \(2, 2\), which is no known layout")
    (images / "sub-01" / "train.npy").write_bytes(pickle.dumps({"x": 1}))
    refuse(DataError, "a dictionary of x, which is no known layout")
    with pytest.raises(DataError, match="pass it with --root"):
        make_config(None).open_epochs()


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_names_code_is_not_run(images, capsys, protocol):
    (images / "sub-01").mkdir()
    (images / "sub-01" / "train.npy").write_bytes(pickle.dumps({"raw_eeg_data": Harmful()}, protocol))
    with pytest.raises(DataError, match=r"asks to run (builtins|__builtin__).print"):
        make_config(images).open_epochs()
    assert "code ran" not in capsys.readouterr().out


def test_reading_leaves_no_warning_and_no_open_file(master):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = make_config(master).open_epochs().parts[0]
        part.read(0, 10)


def test_cleaning_options_change_raw_trials_and_are_refused_for_epochs(master, images, tmp_path):
    options = {"subjects": (1,), "sessions": (1,), "mvnn": "none"}
    demand_change(
        make_config, {"root": master, **options}, tmp_path,
        {"h_freq": 20.0}, {"reference": "average"}, {"scaling": "robust"},
        {"bads": (CHANNELS[0],), "bad_channels": "drop"},
    )  # fmt: skip
    # The reference is that of all electrodes of the file, whichever are stored.
    one = write(
        make_config(master, **{**options, "channels": CHANNELS[:1]}, reference="average"), tmp_path / "one"
    )
    average = write(make_config(master, **options, reference="average"), tmp_path / "all")
    assert_close(one.data, average.data[:, :1])
    write_derived(images / "preprocessed", derived.write_official, 100)
    with pytest.raises(ConfigError, match=r"dataset.h_freq needs continuous recordings"):
        make_config(images, h_freq=20.0).open_epochs()
    scaled = write(make_config(images, scaling="zscore"), tmp_path / "scaled")
    assert scaled.unit == "z"


def test_check_looks_at_the_samples(root):
    path = root / "sub-01" / "ses-01" / "raw_eeg_training.npy"
    content = np.load(path, allow_pickle=True).item()
    content["raw_eeg_data"][1] = 2e-6
    np.save(path, content)
    bad = [finding for finding in make_config(root).check() if not finding.ok]
    assert len(bad) == 1
    assert f"the channel(s) {CHANNELS[1]} are flat in 4 pieces" in bad[0].message
    np.save(path, {**content, "sfreq": 500.0})
    bad = [finding for finding in make_config(root).check() if not finding.ok]
    assert "500 Hz, where 1000 Hz is published" in bad[0].message
