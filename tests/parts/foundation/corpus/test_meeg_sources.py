"""Checks that continuous EEG and MEG come into a corpus by name, repaired, referenced, filtered and at one rate."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
from braindecode_vis.datasets.sources.meeg_source import list_scalp_positions
from braindecode_vis.parts.foundation.corpus import meeg_sources
from braindecode_vis.parts.foundation.corpus.meeg_sources import (
    TEN_TWENTY,
    find_meeg_runs,
    read_meeg_channels,
)
from braindecode_vis.parts.phantom.formats import bids_eeg

DURATION_S = 20.0
# Sizes of a 10 Hz rhythm over the head, in volt: smooth, so that a neighbour tells it.
FIELD = {name: 1e-5 * (1 + 8 * place[1] + 3 * place[0]) for name, place in list_scalp_positions().items()}


def configure(**channels):
    given = {"kind": "meeg", "sfreq": 100.0, "l_freq": 1.0, "h_freq": 40.0, **channels}
    config = CorpusConfig.model_validate({"channels": given})
    if not config.channels.names and config.channels.modality == "eeg":
        config = config.model_copy(
            update={"channels": config.channels.model_copy(update={"names": TEN_TWENTY})}
        )
    return config


def record(root, subject="01", names=TEN_TWENTY, places=None, sfreq=256.0, seconds=DURATION_S, **changes):
    """Write a rhythm of 10 Hz, mains of 50 Hz, a drift and an offset; channel by channel what `changes` replaces."""
    times = np.arange(round(seconds * sfreq)) / sfreq
    rhythm = np.sin(2 * np.pi * 10 * times)
    rest = 2e-5 * np.sin(2 * np.pi * 50 * times) + 5e-5 * np.cos(2 * np.pi * 0.05 * times) + 3e-3
    data = np.stack([FIELD.get(place, 0) * rhythm + rest for place in places or names])
    for name, samples in changes.items():
        data[list(names).index(name)] = samples
    events = pd.DataFrame({name: [] for name in bids_eeg.EVENT_COLUMNS})
    path = bids_eeg.write_recording(
        root, subject, [data], events, n_samples=data.shape[1], ch_names=names, sfreq=sfreq, task="rest"
    )
    for events_file in path.parent.glob("*_events.*"):  # rest has none
        events_file.unlink()
    return path


def mark_bad(path, *names):
    table = path.with_name(path.name.replace("_eeg.vhdr", "_channels.tsv"))
    content = pd.read_csv(table, sep="\t", keep_default_na=False)
    content.loc[content["name"].isin(names), "status"] = "bad"
    content.to_csv(table, sep="\t", index=False)


def measure(values, sfreq=100.0, frequency=10.0):
    """Return the signed size of a sine of each channel, away from the ends."""
    inner = values[200:-200]
    times = np.arange(200, len(values) - 200) / sfreq
    return 2 * np.sin(2 * np.pi * frequency * times) @ inner / len(inner)


def expect(names, others=TEN_TWENTY):
    """Return the sizes after the average over `others` was taken off, µV."""
    mean = np.mean([FIELD[name] for name in others])
    return 1e6 * np.array([FIELD[name] - mean for name in names])


def test_a_recording_becomes_channels_by_name(tmp_path, monkeypatch):
    """Names as EDF files and the older system spell them, a channel that is no electrode, another order and rate."""
    bids_eeg.write_dataset(
        tmp_path, pd.DataFrame({"participant_id": ["sub-01"], "site": ["Leiden"]}), name="Rest"
    )
    old = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
    order = TEN_TWENTY[::-1]
    names = tuple(f"EEG {old.get(name, name).upper()}-REF" for name in order)
    record(
        tmp_path,
        names=(*names, "EKG"),
        places=(*order, "heart"),
        EKG=1e-3 * np.random.default_rng(0).random(5120),
    )
    config = configure()
    channels = read_meeg_channels(config.channels, [tmp_path])
    assert channels.names == TEN_TWENTY
    assert channels.networks[:3] == ("frontal",) * 3
    assert channels.coordinates.shape == (19, 3)
    (run,), excluded = find_meeg_runs(tmp_path, config)
    assert excluded == []
    assert (run.source, run.subject, run.session, run.task, run.site) == ("Rest", "01", "", "rest", "Leiden")
    assert (run.missing, run.interval_s, run.licence) == ((), 0.01, "CC0")
    assert {path.name for path in run.files} >= {"sub-01_task-rest_eeg.eeg", "sub-01_task-rest_channels.tsv"}
    values = run.read()
    assert values.shape == (run.n_times, 19) == (2000, 19)
    assert values.dtype == np.float32
    # A long recording lies on disk meanwhile.
    monkeypatch.setattr(meeg_sources, "_IN_MEMORY", 0)
    np.testing.assert_array_equal(run.read(), values)
    # Filters ripple by a few parts in a thousand.
    np.testing.assert_allclose(measure(values), expect(TEN_TWENTY), atol=0.02)
    assert np.abs(measure(values, frequency=0.05)).max() < 0.05
    assert np.abs(values[200:-200].mean(axis=0)).max() < 0.05


def test_bad_and_absent_sensors_are_interpolated_or_missing(tmp_path):
    """A dead electrode is found without a mark, and none of the bad ones reaches the reference."""
    names = tuple(name for name in TEN_TWENTY if name != "Cz")
    noise = 1e-3 * np.random.default_rng(0).standard_normal(5120)
    path = record(tmp_path, names=names, P3=noise, F4=np.zeros(5120))
    mark_bad(path, "P3")
    (run,), _ = find_meeg_runs(tmp_path, configure(bad_channels="mask"))
    assert set(run.missing) == {"Cz", "P3", "F4"}
    values = run.read()
    there = [name for name in TEN_TWENTY if name not in run.missing]
    known = np.isin(TEN_TWENTY, there)
    assert np.isnan(values[:, ~known]).all()
    np.testing.assert_allclose(measure(values[:, known]), expect(there, there), atol=0.02)
    (run,), _ = find_meeg_runs(tmp_path, configure(absent="interpolate"))
    assert run.missing == ()
    repaired = measure(run.read())
    # The field is smooth, and splines follow it to a few percent of its size.
    np.testing.assert_allclose(repaired, expect(TEN_TWENTY, names), atol=2.0)
    (run,), _ = find_meeg_runs(tmp_path, configure(reference="none", bad_channels="mask"))
    np.testing.assert_allclose(
        measure(run.read()[:, known]), [1e6 * FIELD[name] for name in there], atol=0.05
    )


def test_stretches_between_joins_are_filtered_apart_and_short_ones_are_cut(tmp_path):
    path = record(tmp_path)
    events = pd.DataFrame({"onset": [12.0, 13.0], "duration": 0.0, "trial_type": ["boundary", "boundary"]})
    events.to_csv(path.with_name("sub-01_task-rest_events.tsv"), sep="\t", index=False)
    (run,), _ = find_meeg_runs(tmp_path, configure())
    assert run.n_times == 1200 + 700
    assert run.scrubbed == pytest.approx(0.05)
    assert run.read().shape == (1900, 19)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("E1", "E2", "E3")}, r"none of its sensors \(E1, E2, E3"),
        ({"names": ("Cz", "EEG CZ-REF")}, "are both Cz; choose one"),
        ({"seconds": 2.0}, "less than a filter of"),
        ({"sfreq": 32.0}, "less than half of the 100 Hz"),
    ],
)
def test_recordings_that_cannot_be_used_say_why(tmp_path, changes, words):
    record(tmp_path, **changes)
    with pytest.raises(DataError, match=words):
        find_meeg_runs(tmp_path, configure())
    record(tmp_path, subject="02")
    runs, excluded = find_meeg_runs(tmp_path, configure())
    assert [run.subject for run in runs] == ["02"]
    assert excluded[0].path.name.startswith("sub-01")


def test_an_alias_names_what_no_system_knows(tmp_path):
    record(tmp_path, names=("E1", "E2"), places=("Cz", "Oz"))
    (run,), _ = find_meeg_runs(tmp_path, configure(aliases=[("E1", "Cz"), ("E2", "O1")], reference="none"))
    assert len(run.missing) == 17
    sizes = measure(run.read()[:, [TEN_TWENTY.index("Cz"), TEN_TWENTY.index("O1")]])
    np.testing.assert_allclose(sizes, [1e6 * FIELD["Cz"], 1e6 * FIELD["Oz"]], atol=0.05)


def test_what_is_no_source_or_no_channel_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no recording of EEG"):
        find_meeg_runs(tmp_path / "empty", configure())
    with pytest.raises(ConfigError, match="E1, which are not in the 10-05 system"):
        read_meeg_channels(configure(names=("Cz", "E1")).channels, [])
    with pytest.raises(ConfigError, match="possible only for EEG"):
        find_meeg_runs(tmp_path / "empty", configure(modality="meg", absent="interpolate"))
    with pytest.raises(DataError, match="no MEG recording was found below"):
        read_meeg_channels(configure(modality="meg").channels, [tmp_path / "empty"])


def test_sensors_of_meg_are_those_of_the_first_recording(tmp_path):
    import mne

    info = mne.channels.read_meg_canonical_info("ctf275", verbose="error")
    names = info["ch_names"][::8]
    info = mne.pick_info(info, [info["ch_names"].index(name) for name in names])
    with info._unlock():
        info["sfreq"] = 200.0
    times = np.arange(4000) / 200.0
    size = 1e-13 * np.arange(1, len(names) + 1)
    data = size[:, None] * np.sin(2 * np.pi * 10 * times)
    folder = tmp_path / "sub-01" / "meg"
    folder.mkdir(parents=True)
    raw = mne.io.RawArray(data, info, verbose="error")
    raw.save(folder / "sub-01_task-rest_meg.fif", verbose="error")
    # The published table of THINGS-MEG says this of all sensors, and then no MEG was found.
    table = pd.DataFrame({"name": names, "type": "OTHER", "units": "T", "status": "good"})
    table.loc[0, "status"] = "bad"
    table.to_csv(folder / "sub-01_task-rest_channels.tsv", sep="\t", index=False)
    config = configure(modality="meg", bad_channels="mask")
    channels = read_meeg_channels(config.channels, [tmp_path])
    assert channels.names == tuple(name.split("-")[0] for name in names)
    assert channels.coordinates.shape == (len(names), 3)
    assert "frontal" in channels.networks
    picked = (*channels.names[::-1][:4], channels.names[0])
    (run,), _ = find_meeg_runs(
        tmp_path, configure(modality="meg", bad_channels="mask", names=(*picked, "MZZ99"))
    )
    assert run.missing == (channels.names[0], "MZZ99")
    values = run.read()
    assert np.isnan(values[:, 4:]).all()
    np.testing.assert_allclose(measure(values[:, :4]), 1e15 * size[::-1][:4], rtol=0.01)


@pytest.mark.slow
def test_three_caps_of_a_phantom_become_one_list_of_channels(tmp_path):
    """What each site marks as bad, and what nobody marked, is what was planted; nobody's events are read."""
    from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom

    truth = make_phantom(
        "corpus-eeg", tmp_path / "eeg", size=SIZES["corpus-eeg"]["tiny"], config=PhantomConfig(snr=1.0),
        embed=lambda stimuli: np.random.default_rng(0).standard_normal((len(stimuli), 8)),
    )  # fmt: skip
    people = truth.read_people().fillna({"bads": ""})
    assert people["person"].duplicated().sum() == 1
    config = configure(bad_channels="mask")
    for site, table in people.groupby("site"):
        runs, excluded = find_meeg_runs(truth.root / str(site), config)
        assert excluded == []
        assert {run.subject for run in runs} == set(table["subject"])
        assert {run.task for run in runs} == {"movie", "rest"}
        for run in runs:
            bads = set(table.set_index("subject")["bads"][run.subject].split(","))
            absent = {"Fz", "C3", "C4", "T7", "T8"} if site == "siteB" else set()
            gone = (bads & set(TEN_TWENTY)) | absent
            # At one site an electrode is dead, and no table says so.
            assert len(set(run.missing) ^ gone) <= (site == "siteC")
            values = run.read()
            known = np.array([name not in run.missing for name in TEN_TWENTY])
            assert values.shape == (3000, 19)
            assert np.isfinite(values[:, known]).all()
            assert 1 < values[:, known].std() < 100  # µV, as of an EEG
