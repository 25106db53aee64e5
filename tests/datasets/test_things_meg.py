"""THINGS-MEG: a phantom in both layouts, and the real events and channel tables with synthetic signals."""

import gc
import json
import shutil
import warnings
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.bids.meeg_files import RawReader
from braindecode_vis.datasets.things_meg.dataset import ThingsMegConfig
from braindecode_vis.datasets.things_meg.files import read_image_names
from braindecode_vis.parts.phantom.formats import things_meg_format as phantom
from tests.datasets.reading import demand_change, prepare, refusals

SENSORS = ["MLC11-1609", "MLO11-1609", "MRO11-1609", "MZP01-1609"]
KEPT = [name for name in SENSORS if name != "MRO11-1609"]
CONCEPTS = ["ant", "bee", "coat_rack", "dog", "elk", "fox"]
N_SESSIONS, N_RUNS = 2, 2


@pytest.fixture(scope="module")
def images():
    return phantom.make_image_table(CONCEPTS, n_exemplars=N_SESSIONS, n_test_concepts=2)


@pytest.fixture(scope="module")
def design(images):
    return phantom.make_things_meg_design(images, n_sessions=N_SESSIONS, n_runs=N_RUNS, n_catch=2)


def iterate_run(events, n_samples):
    """Weak noise, and at each picture a plateau whose height is the image number (in fT)."""
    data = np.random.default_rng(0).standard_normal((len(SENSORS), n_samples)) * 1e-17
    for row in events.itertuples():
        data[0, row.sample : row.sample + 600] += (row.image_nr % 1000) * 1e-15
    for start in range(0, n_samples, 5000):
        yield data[:, start : start + 5000]


@pytest.fixture(scope="module")
def base(tmp_path_factory, images, design):
    """Subject 1, raw and preprocessed, with the junk of macOS and an empty room."""
    root = tmp_path_factory.mktemp("things-meg") / "ds004212"
    phantom.write_dataset(root, [1], images)
    (root / "phantom_truth").mkdir()  # simulated, and smaller than the published set
    locs = np.random.default_rng(2).standard_normal((4, 12))
    for (session, run), events in design.groupby(["session", "run"]):
        n = phantom.count_run_samples(events)
        phantom.write_raw_run(
            root, 1, session, run, iterate_run(events, n), events, ch_names=SENSORS, locs=locs
        )
    empty = root / "sub-emptyroom" / "ses-20190613" / "meg"
    empty.mkdir(parents=True)
    (empty / "sub-emptyroom_ses-20190613_task-noise_meg.fif").write_bytes(b"")
    attributes = phantom.make_sample_attributes(1, design, images)
    phantom.write_sample_attributes(root, 1, attributes)
    times = np.arange(281) / 200 - 0.1
    epochs = [np.outer([nr % 1000, 1 + nr % 7, 2 + nr % 5], (times >= 0)) for nr in attributes["image_nr"]]
    phantom.write_preprocessed(root, 1, iter(epochs), attributes, ch_names=KEPT, locs=locs[:3])
    return root


@pytest.fixture
def root(base, tmp_path):
    return shutil.copytree(base, tmp_path / "ds004212")


def image_numbers(responses, images):
    return images.set_index("stimulus_id").loc[responses.stimulus_ids, "image_nr"].to_numpy()


@pytest.mark.parametrize("layout", ["raw", "preprocessed"])
def test_every_trial_carries_its_own_image(base, tmp_path, images, layout):
    config = ThingsMegConfig(root=base, layout=layout, mvnn="none", window=(0.1, 0.4))
    responses, stimuli = prepare(config, tmp_path)
    assert responses.data.shape[1:] == (3, 60)
    assert responses.coords["ch_names"] == KEPT
    assert responses.coords["modality"] == "meg"
    assert np.isfinite(responses.coords["ch_pos"]).all()
    assert responses.unit == ("T" if layout == "raw" else "z")
    scale = 1e-15 if layout == "raw" else 1
    np.testing.assert_allclose(
        responses.data[:, 0, 10:50].mean(axis=1) / scale, image_numbers(responses, images), rtol=0.02
    )
    trials = responses.trials
    train, test = (trials[trials["split"] == s] for s in ("train", "test"))
    assert not set(train["concept"]) & set(test["concept"])
    assert len(train) == 4 * N_SESSIONS
    assert test["stimulus_id"].value_counts().tolist() == [N_SESSIONS] * 2
    assert sorted(test["repetition"].unique()) == [0, 1]
    assert set(trials["session"]) == {"01", "02"}
    assert set(trials["run"]) <= {"01", "02"}
    assert stimuli.concepts_of(test["stimulus_id"]).tolist() == test["concept"].tolist()
    notes = json.loads((tmp_path / "responses" / "meta.json").read_text())["provenance"]
    assert notes["layout"] == layout
    assert notes["counts"]["01"]["n_train_concepts"] == 4


def test_both_layouts_have_the_same_trials(base):
    keys = ["stimulus_id", "session", "run", "split"]
    raw = ThingsMegConfig(root=base, layout="raw").open_epochs()
    tables = [
        p.recording.events.assign(session=p.recording.session, run=p.recording.run)[keys] for p in raw.parts
    ]
    epochs = ThingsMegConfig(root=base).open_epochs()
    assert epochs.notes["layout"] == "preprocessed"
    pd.testing.assert_frame_equal(
        pd.concat(tables).sort_values(keys).reset_index(drop=True),
        epochs.parts[0].trials[keys].sort_values(keys).reset_index(drop=True),
        check_dtype=False,
    )


def test_the_large_test_set_asks_for_single_images_of_test_concepts(base):
    small = ThingsMegConfig(root=base).open_epochs().parts[0].trials
    large = ThingsMegConfig(root=base, test_set="large").open_epochs().parts[0].trials
    tested = set(small.loc[small["split"] == "test", "concept"])
    shown = large[large["split"] == "test"]
    assert set(shown["concept"]) == tested
    assert shown["stimulus_id"].value_counts().tolist() == [1] * 2 * N_SESSIONS
    assert not set(shown["stimulus_id"]) & set(small.loc[small["split"] == "test", "stimulus_id"])
    train = [set(t.loc[t["split"] == "train", "stimulus_id"]) for t in (small, large)]
    assert train[0] == train[1]
    every = ThingsMegConfig(root=base, zero_shot=False).open_epochs().parts[0].trials
    assert (every["split"] == "train").sum() == len(CONCEPTS) * N_SESSIONS
    with pytest.raises(ValidationError, match="needs zero_shot true"):
        ThingsMegConfig(root=base, test_set="large", zero_shot=False)


def test_trigger_and_optical_onset_differ_by_150_ms(base, tmp_path, images):
    optical = ThingsMegConfig(root=base, layout="raw").open_epochs().parts[0].recording.events
    config = ThingsMegConfig(root=base, layout="raw", onset="trigger", mvnn="none", window=(0.0, 0.5))
    source = config.open_epochs()
    events = source.parts[0].recording.events
    np.testing.assert_array_equal(optical["sample"] - events["sample"], 180)
    assert set(source.notes["optical_after_trigger_ms"].values()) == {150.0}
    responses, _ = prepare(config, tmp_path)
    rise = np.argmax(responses.data[:, 0] > 0.5e-15 * image_numbers(responses, images)[:, None], axis=1)
    np.testing.assert_allclose(responses.coords["times"][rise], 0.15, atol=0.006)
    messages = [f.message for f in ThingsMegConfig(root=base, layout="raw").check() if "run-01" in f.item]
    assert len(messages) == 2
    assert all("follows the trigger by 150.0 ms (150.0 to 150.0)" in message for message in messages)


def test_check_passes_but_for_the_published_numbers(root):
    (root / "phantom_truth").rmdir()
    findings = ThingsMegConfig(root=root).check()
    assert [f.item for f in findings if not f.ok] == ["subject 01 counts"]
    assert "n_train_concepts 4 (declared 1654)" in findings[-1].message


def test_options_of_raw_recordings_are_refused_for_published_epochs(base):
    for option in ({"onset": "trigger"}, {"mvnn": "epochs"}, {"tmin": -0.05}, {"sessions": (1,)}):
        with pytest.raises(ConfigError, match=f"dataset.{next(iter(option))} applies to raw recordings"):
            ThingsMegConfig(root=base, **option).open_epochs()
    with pytest.raises(ConfigError, match="has 200 Hz"):
        ThingsMegConfig(root=base, sfreq=100).open_epochs()


def test_raw_sessions_are_whitened_one_by_one(base, tmp_path):
    responses, _ = prepare(ThingsMegConfig(root=base, layout="raw"), tmp_path)
    assert responses.unit == "whitened"
    assert responses.coords["whitening_sessions"] == [["01", "01"], ["01", "02"]]


def test_images_are_found_in_either_folder(base, tmp_path, images):
    for row in images.itertuples():
        name = f"{row.concept}/{row.stimulus_id}.jpg"
        place = f"images_test_meg/{row.stimulus_id}.jpg" if row.is_test else f"images_meg/{name}"
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    stimuli = ThingsMegConfig(root=base, images=tmp_path).open_epochs().stimuli
    assert stimuli.table["path"].str.startswith("images_test_meg/").sum() == 2
    shutil.rmtree(tmp_path / "images_test_meg")
    with pytest.raises(DataError, match="2 of 10 images are not in"):
        ThingsMegConfig(root=base, images=tmp_path).open_epochs()


def test_further_parts_are_opened_through_the_first(base, tmp_path, images, design):
    root = tmp_path / "parts"
    rows = np.r_[0 : len(design), 0:0]
    attributes = phantom.make_sample_attributes(1, design, images).iloc[rows]
    names = [f"MLC{i:02d}-1609" for i in range(80)]
    data = np.random.default_rng(0).standard_normal((len(rows), 80, 281)).astype(np.float32)
    phantom.write_dataset(root, [1], images)
    path = phantom.write_preprocessed(root, 1, iter(data), attributes, ch_names=names, split_size="2MB")
    assert len(list(path.parent.glob("*.fif"))) > 1
    source = ThingsMegConfig(root=root, zero_shot=False).open_epochs()
    shown = np.flatnonzero(attributes["image_nr"].to_numpy() != 999999)
    np.testing.assert_array_equal(source.parts[0].read(1, 4).astype(np.float32), data[shown[1:4]])
    assert source.notes["epochs"]["subject_01"]["sessions"].startswith("unknown")
    next(path.parent.glob("*-epo-1.fif")).unlink()
    with pytest.raises(DataError, match="copy or fetch all of its parts"):
        ThingsMegConfig(root=root, zero_shot=False).open_epochs()


def test_a_shifted_image_list_is_found(root, images):
    """Users shifted the list by one row, and every image got the name of its neighbour."""
    table = root / "THINGS/Metadata/Image-specific/image_paths.csv"
    lines = table.read_text().splitlines()
    (root / "sourcedata/sample_attributes_P1.csv").rename(root / "sourcedata/kept.csv")
    table.write_text("\n".join(["header/header_01b.jpg", *lines[:-1]]))
    refuse = refusals(ThingsMegConfig, root=root)
    refuse(DataError, "shifted by a row or of another release")
    index = root / "THINGS/Metadata/Concept-specific/image_concept_index.csv"
    numbers = index.read_text().splitlines()
    index.write_text("\n".join(["1", *[str(int(n) + 1) for n in numbers[:-1]]]))
    refuse(DataError, r"has concept number .* in its events", layout="raw")
    (root / "sourcedata/kept.csv").rename(root / "sourcedata/sample_attributes_P1.csv")
    refuse(DataError, r"disagree on .* image number")
    table.unlink()
    names = read_image_names(root, None, [pd.read_csv(root / "sourcedata/sample_attributes_P1.csv")])
    assert names["stimulus_id"].to_dict() == images.set_index("image_nr")["stimulus_id"].to_dict()
    # One damaged cell makes the column text: a traceback, though the other cells are numbers.
    told = pd.read_csv(root / "sourcedata/sample_attributes_P1.csv", dtype={"things_image_nr": str})
    assert read_image_names(root, None, [told])["stimulus_id"].to_dict() == names["stimulus_id"].to_dict()
    told.loc[told["trial_type"] != "catch", "things_image_nr"] = "\0\0.0"
    with pytest.raises(DataError, match="a whole number must be there"):
        read_image_names(root, None, [told])
    (root / "sourcedata/sample_attributes_P1.csv").unlink()
    refuse(DataError, "gives the images of the numbers")


def test_a_lost_file_of_epochs_does_not_shrink_the_data_set(root):
    """Raw recordings of fewer sessions stood in for epochs that were gone, and nothing said so."""
    epochs = root / "derivatives/preprocessed/preprocessed_P1-epo.fif"
    second = epochs.with_name("preprocessed_P2-epo.fif")
    epochs.rename(second)
    with pytest.raises(DataError, match=r"subject 1 below .* layout raw alone.*dataset.layout=raw"):
        ThingsMegConfig(root=root).open_epochs()
    second.unlink()
    # As many sessions as are listed: the same trials are read.
    assert ThingsMegConfig(root=root).open_epochs().notes["layout"] == "raw"
    shutil.rmtree(root / f"sub-BIGMEG1/ses-{N_SESSIONS:02d}")
    with pytest.raises(
        DataError, match=r"preprocessed_P1-epo.fif is not below .* sessions that its sample attr"
    ):
        ThingsMegConfig(root=root).open_epochs()
    chosen = tuple(range(1, N_SESSIONS))
    assert len(ThingsMegConfig(root=root, sessions=chosen).open_epochs().parts) == len(chosen) * N_RUNS
    assert ThingsMegConfig(root=root, layout="raw").open_epochs().notes["layout"] == "raw"


def test_missing_and_damaged_files_are_named(root, tmp_path):
    folder = root / "sub-BIGMEG1/ses-02/meg"
    events = folder / "sub-BIGMEG1_ses-02_task-main_run-01_events.tsv"
    kept = events.read_text()
    raw = ThingsMegConfig(root=root, layout="raw")
    events.write_text(kept.replace("test", "exp"))
    with pytest.raises(DataError, match=r"subject 01.*(per test image|per concept) must be equal"):
        raw.open_epochs()
    table = pd.read_csv(events, sep="\t")
    table.assign(onset=table["onset"] + 60).to_csv(events, sep="\t", index=False)
    with pytest.raises(DataError, match=r"session 02, run 01.*lasts"):
        raw.open_epochs()
    events.unlink()
    with pytest.raises(DataError, match=r"session 02, run 01.*events.tsv in its folder"):
        raw.open_epochs()
    events.write_text(kept)
    (folder / "sub-BIGMEG1_ses-02_task-main_run-01_meg.fif").unlink()
    with pytest.raises(DataError, match=r"session 02 of THINGS-MEG is missing run 01"):
        raw.open_epochs()
    refuse = refusals(ThingsMegConfig, root=root)
    refuse(DataError, "subject 3 is not there; found 1", subjects=(3,))
    with pytest.raises(DataError, match="is a level too low"):
        ThingsMegConfig(root=tmp_path / "ds004212" / "THINGS").open_epochs()
    path = root / "derivatives/preprocessed/preprocessed_P1-epo.fif"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(DataError, r"cannot be read .* cut short")
    path.write_bytes(b"nothing")
    refuse(DataError, "cannot be opened")
    # MNE leaves such a file to the collector, whose warning would come in another test.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_attributes_of_somebody_else_are_refused(root):
    path = root / "sourcedata/sample_attributes_P1.csv"
    kept = path.rename(path.with_suffix(".kept"))
    path.symlink_to(path.name)  # a link to nothing was taken for a table that is not there
    refuse = refusals(ThingsMegConfig, root=root)
    refuse(DataError, r"optional sample_attributes_P1\.csv was not fetched")
    path.unlink()
    kept.rename(path)
    table = pd.read_csv(path)
    columns = ["trial_type", "things_image_nr", "image_path"]
    table[columns] = table[columns].to_numpy()[::-1]
    table[table.columns[::-1]].to_csv(path, index=False)  # columns are taken by name
    refuse(DataError, "the table belongs to another subject or is in another order")
    table.iloc[:-1].to_csv(path, index=False)
    refuse(DataError, r"holds 20 epochs, but the sample attributes list 19")


def test_ctf_folders_go_to_their_reader(base, root, monkeypatch):
    """MNE writes no CTF, so that the reader is stood in for; everything around it is as with the real folders."""
    opened = []

    def read_raw_ctf(path, **options):
        opened.append((path.name, options["preload"]))
        return mne.io.read_raw_fif(base / path.relative_to(root).with_suffix(".fif"), verbose="error")

    monkeypatch.setattr(mne.io, "read_raw_ctf", read_raw_ctf)
    for path in sorted(root.glob("sub-BIGMEG1/ses-*/meg/sub-*_meg.fif")):
        folder = path.with_suffix(".ds")
        path.unlink()
        folder.mkdir()
        (folder / f"{folder.stem}.meg4").write_bytes(b"samples")
    config = ThingsMegConfig(root=root, layout="raw")
    assert len(config.open_epochs().parts) == 4
    assert opened[0] == ("sub-BIGMEG1_ses-01_task-main_run-01_meg.ds", False)
    stem = "sub-BIGMEG1/ses-01/meg/sub-BIGMEG1_ses-01_task-main_run-01"
    digests = config.hash_inputs()
    assert {f"{stem}_meg.ds/{Path(stem).name}_meg.meg4", f"{stem}_events.tsv", "image_paths.csv"} <= set(
        digests
    )


def test_a_stretch_without_signal_is_bridged():
    data = np.tile(np.arange(100.0), (2, 1))
    data[:, 40:50] = 1e6
    raw = mne.io.RawArray(data, mne.create_info(2, 100, "mag"), verbose="error")
    reader = RawReader(raw, np.array([1, 0]), ((40, 50),))
    np.testing.assert_allclose(reader(30, 60), np.tile(np.arange(30.0, 60), (2, 1)))
    np.testing.assert_allclose(reader(44, 46), [[44, 45]] * 2)


@pytest.mark.shared
def test_the_real_tables_with_synthetic_signals(shared, tmp_path):
    """Real events and channel names of one run in each of two sessions; the signal and the image list are synthetic."""
    real = shared / "data/bids_metadata/ds004212"
    root = tmp_path / "ds004212"
    pieces = []
    for session in ("01", "02"):
        stem = f"sub-BIGMEG1_ses-{session}_task-main_run-01"
        source, folder = (base / f"sub-BIGMEG1/ses-{session}/meg" for base in (real, root))
        folder.mkdir(parents=True)
        for kind in ("events.tsv", "channels.tsv"):
            (folder / f"{stem}_{kind}").write_bytes((source / f"{stem}_{kind}").read_bytes())
        channels = pd.read_csv(folder / f"{stem}_channels.tsv", sep="\t")
        sensors = channels.loc[channels["type"] == "OTHER", "name"]
        assert len(sensors) == 272
        assert "MRO11-1609" in set(sensors)
        chosen = ["MRO11-1609", *sensors[:2]]
        events = pd.read_csv(folder / f"{stem}_events.tsv", sep="\t")
        pieces.append(events)
        info = mne.create_info([*chosen, "UPPT001"], 1200.0, ["mag"] * 3 + ["stim"])
        data = np.zeros((4, int(events["sample"].max()) + 3600))
        for sample in events["sample"]:
            data[3, sample - 180 : sample - 120] = 64
        data[:3] = np.random.default_rng(0).standard_normal((3, data.shape[1])) * 1e-13
        mne.io.RawArray(data, info, verbose="error").save(folder / f"{stem}_meg.fif", verbose="error")
    shown = pd.concat(pieces).dropna(subset="value").drop_duplicates("value")
    concepts = pd.read_csv(shared / "data/things/things_concepts.tsv", sep="\t")["uniqueID"]
    # An image list that fits the real numbers: each number has the concept of the nearest shown one below it.
    shown = shown.sort_values("value")
    assert shown["things_category_nr"].is_monotonic_increasing
    numbers = np.arange(1, 26108)
    at = np.clip(np.searchsorted(shown["value"], numbers, side="right") - 1, 0, None)
    category = shown["things_category_nr"].to_numpy(int)[at]
    (root / "image_concept_index.csv").write_text("\n".join(map(str, category)))
    paths = [f"{concepts[c - 1]}/{concepts[c - 1]}_{n}s.jpg" for n, c in zip(numbers, category, strict=True)]
    (root / "image_paths.csv").write_text("\n".join(paths))
    sessions = {"sessions": (1, 2)}
    config = ThingsMegConfig(
        root=root, layout="raw", zero_shot=False, mvnn="none", max_dropped=0.5, **sessions
    )
    source = config.open_epochs()
    assert source.ch_names == tuple(sensors[:2])
    n_test = sum((p.recording.events["split"] == "test").sum() for p in source.parts)
    assert n_test == sum((e["trial_type"] == "test").sum() for e in pieces)
    event = source.parts[0].recording.events.iloc[0]
    assert (event["sample"], event["concept"]) == (3425, concepts[1759])
    runs = [f for f in config.check() if "run-01" in f.item]
    assert all("follows the trigger by 150.0 ms" in f.message for f in runs), runs
    responses, _ = prepare(config, tmp_path / "out")
    assert len(responses.trials) == sum((e["trial_type"] != "catch").sum() for e in pieces)


def test_cleaning_options_change_raw_trials_and_are_refused_for_epochs(base, tmp_path):
    options = {"root": base, "layout": "raw", "sessions": (1,), "mvnn": "none", "window": (0.0, 0.5)}
    changes = ({"h_freq": 30.0}, {"notch": (60.0,)}, {"scaling": "robust"})
    demand_change(ThingsMegConfig, options, tmp_path, *changes)
    with pytest.raises(ConfigError, match=r"dataset.reference applies to EEG, but .* is MEG"):
        ThingsMegConfig(**options, reference="average").open_epochs()
    with pytest.raises(ConfigError, match=r"dataset.l_freq needs continuous recordings"):
        ThingsMegConfig(root=base, l_freq=1.0).open_epochs()
    scaled, _ = prepare(
        ThingsMegConfig(root=base, scaling={"method": "robust", "clamp": 5.0}), tmp_path / "scaled"
    )
    assert np.abs(scaled.data).max() <= 5
