"""THINGS-MEG phantom: read back with MNE and pandas, traps included."""

import mne
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.phantom.formats import things_meg_format

SENSORS = ["MLC11-1609", "MLO11-1609", "MRO11-1609", "MZP01-1609"]


@pytest.fixture(scope="module")
def images():
    return things_meg_format.make_image_table(["zebra", "ant", "coat_rack"], n_exemplars=2, n_test_concepts=2)


@pytest.fixture(scope="module")
def design(images):
    return things_meg_format.make_things_meg_design(images, n_sessions=2, n_runs=2, n_catch=2)


def iterate_blocks(data, n=700):
    for start in range(0, data.shape[1], n):
        yield data[:, start : start + n]


def write_run(root, design, data, **options):
    events = design.query("session == 1 and run == 1")
    return things_meg_format.write_raw_run(
        root, 1, 1, 1, iterate_blocks(data), events, ch_names=SENSORS, **options
    )


@pytest.fixture(scope="module")
def raw_data(design):
    n = things_meg_format.count_run_samples(design.query("session == 1 and run == 1"))
    return (np.random.default_rng(0).standard_normal((4, n)) * 1e-13).astype(np.float32)


def test_the_design_shows_each_exemplar_once_and_each_test_image_in_every_session(images, design):
    counts = design.query("trial_type != 'catch'")["image_nr"].value_counts()
    tests = images.loc[images["is_test"], "image_nr"]
    assert (counts.loc[tests] == 2).all()
    assert (counts.drop(tests) == 1).all()
    assert (design.query("trial_type == 'catch'")["image_nr"] == 999999).all()
    gaps = design.groupby(["session", "run"])["onset"].diff().dropna()
    assert gaps.between(1.3, 1.7).all()


def test_raw_run_reads_back_bit_exact_with_its_traps(tmp_path, design, raw_data):
    locs = np.random.default_rng(1).standard_normal((4, 12))
    path = write_run(tmp_path, design, raw_data, locs=locs)
    raw = mne.io.read_raw_fif(path, verbose="error")
    assert raw.info["sfreq"] == 1200
    assert raw.get_channel_types() == ["mag"] * 4 + ["misc", "stim"]
    assert raw.info["chs"][0]["coil_type"] == 5001
    np.testing.assert_allclose(raw.info["chs"][2]["loc"], locs[2], rtol=1e-6)  # FIF keeps float32
    np.testing.assert_array_equal(raw.get_data(picks=SENSORS).astype(np.float32), raw_data)

    events = pd.read_csv(str(path).replace("_meg.fif", "_events.tsv"), sep="\t")
    assert list(events.columns) == [
        "onset",
        "duration",
        "trial_type",
        "things_category_nr",
        "value",
        "sample",
    ]
    assert events["value"].isna().equals(events["trial_type"] == "catch")
    np.testing.assert_allclose(events["onset"] * 1200, events["sample"])
    found = mne.find_events(raw, stim_channel="UPPT001", verbose="error")
    assert set(found[:-1, 2]) == {64}
    assert found[-1, 2] == 32
    np.testing.assert_array_equal(events["sample"] - found[:-1, 0], 180)  # 150 ms at 1200 Hz
    optical = np.flatnonzero(np.diff(raw.get_data(picks="UADC016-2104")[0]) > 0) + 1
    np.testing.assert_array_equal(optical, events["sample"])

    channels = pd.read_csv(str(path).replace("_meg.fif", "_channels.tsv"), sep="\t")
    assert set(channels["type"][:4]) == {"OTHER"}
    assert (path.parent / f"._{path.name}").read_bytes()[:4] == b"\x00\x05\x16\x07"
    assert not list(path.parent.glob(".tmp*"))


def test_same_input_gives_same_bytes(tmp_path, design, raw_data):
    first = write_run(tmp_path / "a", design, raw_data).read_bytes()
    assert first == write_run(tmp_path / "b", design, raw_data).read_bytes()
    assert abs(len(first) - things_meg_format.estimate_raw_bytes(raw_data.shape[1], 4)) < 20_000


def test_a_stream_of_the_wrong_length_leaves_nothing_behind(tmp_path, design, raw_data):
    with pytest.raises(DataError, match="samples, but"):
        write_run(tmp_path, design, raw_data[:, :-1])
    assert not list(tmp_path.rglob("*.fif"))


def test_preprocessed_epochs_and_attributes(tmp_path, images, design):
    attributes = things_meg_format.make_sample_attributes(1, design, images)
    names = [name for name in SENSORS if name != things_meg_format.DROPPED_SENSOR]
    data = np.random.default_rng(0).standard_normal((len(design), 3, 281)).astype(np.float32)
    path = things_meg_format.write_preprocessed(tmp_path, 1, iter(data), attributes, ch_names=names)
    things_meg_format.write_sample_attributes(tmp_path, 1, attributes)
    epochs = mne.read_epochs(path, verbose="error")
    np.testing.assert_array_equal(epochs.get_data().astype(np.float32), data)
    np.testing.assert_array_equal(epochs.events[:, 2], design["image_nr"])
    assert epochs.info["sfreq"] == 200
    assert epochs.times[[0, -1]].tolist() == [-0.1, 1.3]
    csv = pd.read_csv(tmp_path / "sourcedata" / "sample_attributes_P1.csv")
    assert csv.shape == (len(design), 18)
    assert list(csv.columns[[0, 2, 8]]) == ["trial_type", "category_nr", "image_path"]
    folders = csv.groupby("trial_type")["image_path"].agg(lambda paths: {p.split("/")[0] for p in paths})
    assert folders.to_dict() == {
        "exp": {"images_meg"},
        "test": {"images_test_meg"},
        "catch": {"images_catch_meg"},
    }
    assert csv["test_image_nr"].notna().equals(csv["trial_type"] == "test")
    assert epochs.metadata is None


def test_large_epochs_are_split_and_read_through_the_first_part(tmp_path, design, images):
    n, names = 60, [f"MLC{i:02d}-1609" for i in range(40)]
    attributes = things_meg_format.make_sample_attributes(1, design, images).iloc[np.zeros(n, dtype=int)]
    data = np.random.default_rng(0).standard_normal((n, 40, 281)).astype(np.float32)
    path = things_meg_format.write_preprocessed(
        tmp_path, 2, iter(data), attributes.reset_index(drop=True), ch_names=names, split_size="2MB"
    )
    assert len(list(path.parent.glob("*.fif"))) > 1
    np.testing.assert_array_equal(mne.read_epochs(path, verbose="error").get_data().astype(np.float32), data)


def test_the_image_tables_have_no_header(tmp_path, images):
    things_meg_format.write_dataset(tmp_path, [1, 2], images)
    metadata = tmp_path / "THINGS" / "Metadata"
    paths = np.loadtxt(metadata / "Image-specific" / "image_paths.csv", dtype=str)
    index = np.loadtxt(metadata / "Concept-specific" / "image_concept_index.csv", dtype=int)
    assert len(paths) == len(index) == len(images) == 3 * 2 + 2
    row = images.query("is_test").iloc[-1]
    assert paths[row["image_nr"] - 1] == row["path"]
    assert index[row["image_nr"] - 1] == row["category_nr"]
