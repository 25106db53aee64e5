"""Preprocessing that was stopped goes on after its last finished session, to the same bits."""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.checks import DataError
from braindecode_vis.config import read_config
from braindecode_vis.datasets.sources.cleaning_options import AutorejectConfig, Cleaning, ScalingConfig
from braindecode_vis.datasets.sources.meeg_source import EpochedPart
from braindecode_vis.pipeline.runs import SilentListener, open_run
from braindecode_vis.preprocessing import artefacts
from braindecode_vis.preprocessing.array_file import ArrayFile, KeptParts
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.bold import write_bold
from braindecode_vis.preprocessing.meeg import write_source
from tests.killing import list_leftovers, list_results
from tests.preprocessing import test_betas, test_bold, test_meeg


class Stopped(Exception):
    """In the place of a kill."""


def list_files(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def count_reads(source, counts):
    """Return the source with parts that count how often they are read, and stop at the read ``counts["stop"]``."""

    def watch(part, number):
        def read(start, stop):
            counts["all"] += 1
            counts[number] = counts.get(number, 0) + 1
            if counts["all"] == counts["stop"]:
                raise Stopped
            return part.read(start, stop)

        return replace(part, read=read)

    return replace(source, parts=tuple(watch(part, n) for n, part in enumerate(source.parts)))


def _note(told, *words):
    told.append(words)


def check(write, source, tmp_path):
    """Stop a call at several places of its reading, let it go on each time, and compare with one that was not."""
    counts = {"all": 0, "stop": -1}
    write(count_reads(source, counts), tmp_path / "whole", None, None)
    n_reads, own = counts["all"], {n: counts[n] for n in range(len(source.parts))}
    expected = list_files(tmp_path / "whole")
    for stop in sorted({2, n_reads // 2, 2 * n_reads // 3, n_reads}):
        parts, told = tmp_path / f"parts{stop}", []
        counts = {"all": 0, "stop": stop}
        with pytest.raises(Stopped):
            write(count_reads(source, counts), tmp_path / f"stopped{stop}", parts, None)
        first = dict(counts)
        counts = {"all": 0, "stop": -1}
        write(count_reads(source, counts), tmp_path / f"again{stop}", parts, partial(_note, told))
        assert list_files(tmp_path / f"again{stop}") == expected
        # Joins of recordings are looked for again, in a few places.
        again = [n for n in own if counts.get(n, 0) < own[n]]
        n_kept = len(again)
        assert all(first[n] == own[n] for n in again)  # read whole before
        kept = [words for done, total, words in told if not total]
        assert kept == ([f"{n_kept} of {len(own)} sessions are kept from an earlier call"] if n_kept else [])
        if stop == n_reads:
            assert n_kept == len(own) - 1
            assert 0 < told[-1][0] <= told[-1][1]  # rejected trials are in the total
    return expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that were open
@pytest.mark.parametrize(
    "plan",
    [
        {"mvnn": "none"},
        {"mvnn": "epochs", "dtype": "float16"},
        {"mvnn": "time"},
        {"mvnn": "none", "dtype": "float16", "cleaning": Cleaning(scaling=ScalingConfig())},
        {"mvnn": "epochs", "cleaning": Cleaning(scaling=ScalingConfig(), l_freq=1.0)},
    ],
)
def test_recordings(tmp_path, plan):
    """A killed preprocess of one subject of THINGS-EEG2 (75 s) or of ten (13 minutes) began with nothing."""
    events = test_meeg.make_events()
    parts = []
    for number, (subject, session) in enumerate((("01", "01"), ("01", "02"), ("02", "01"))):
        signal = test_meeg.make_signal(int(events["sample"].max()) + 2500, seed=number)
        if number == 2:
            signal[:, 1500:3500] = signal[:, 1500:1501]  # ten trials without signal, which the report tells
        parts.append(test_meeg.make_part(signal, events, session, subject))
    source = test_meeg.make_source(*parts, max_dropped=0.5, **plan)

    def write(source, folder, parts, progress):
        from braindecode_vis.preprocessing.signal_damage import DamageWatch

        folder.mkdir()
        write_source(
            source,
            folder,
            scratch=folder / "scratch",
            parts=parts,
            progress=progress,
            watch=DamageWatch(most=0.5),
        )

    check(write, source, tmp_path)
    provenance = json.loads((tmp_path / "whole/responses/meta.json").read_text())["provenance"]
    if not plan.get("cleaning", Cleaning()).changes_samples:
        assert provenance["damage"]


def test_rejected_trials(tmp_path, monkeypatch):
    """Trials and parts that were left out of a kept session are left out again, without fitting anything."""

    class Fitted:
        def get_reject_log(self, block):
            bad = np.abs(block).max(axis=(1, 2)) > np.median(np.abs(block).max(axis=(1, 2)))
            return SimpleNamespace(bad_epochs=bad, labels=np.zeros(block.shape[:2]))

    monkeypatch.setattr(artefacts, "fit_autoreject", lambda *_: (Fitted(), None))
    monkeypatch.setattr(artefacts, "_make_epochs", lambda block, info: block)
    events = test_meeg.make_events()
    length = int(events["sample"].max()) + 2500
    parts = [test_meeg.make_part(test_meeg.make_signal(length, seed=n), events, f"0{n}") for n in range(3)]
    cleaning = Cleaning(autoreject=AutorejectConfig(max_rejected=0.9))
    source = test_meeg.make_source(*parts, mvnn="epochs", cleaning=cleaning)

    def write(source, folder, parts, progress):
        folder.mkdir()
        write_source(source, folder, scratch=folder / "scratch", parts=parts, progress=progress)

    check(write, source, tmp_path)
    provenance = json.loads((tmp_path / "whole/responses/meta.json").read_text())["provenance"]
    assert len(provenance["dropped"]) > 30


def test_copies_of_a_kept_session(tmp_path):
    """A trial that repeats one of a session that is not read again is found all the same."""
    rng, parts = np.random.default_rng(0), []
    events = test_meeg.make_events()
    blocks = [rng.standard_normal((len(events), 4, 50)).astype(np.float32) for _ in range(3)]
    blocks[2][30] = blocks[0][7]
    for number, block in enumerate(blocks):
        trials = events.assign(subject="01", session=f"0{number}", run="01").drop(columns=["onset", "sample"])
        read = lambda start, stop, block=block: block[start:stop]  # noqa: E731
        parts.append(
            EpochedPart(trials, (tmp_path / f"{number}.npy",), test_meeg.CHANNELS, np.arange(50) / 250, read)
        )
    source = replace(test_meeg.make_source(*parts, mvnn="none"), unit="arbitrary")

    def write(source, folder, parts, progress):
        folder.mkdir()
        write_source(source, folder, scratch=folder / "scratch", parts=parts, progress=progress)

    check(write, source, tmp_path)
    damage = json.loads((tmp_path / "whole/responses/meta.json").read_text())["provenance"]["damage"]
    assert "copies of rows" in damage[0]["what"]


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        ({}, "float16"),
        ({}, "float32"),
        ({"zscore": "run"}, "float32"),
        ({"zscore": "none"}, "float16"),
        ({"untrained": "own"}, "float16"),
    ],
)
def test_single_trial_responses(tmp_path, plan, dtype):
    """The session without a training trial waits for the others, whether or not an earlier call has read it."""
    source, _ = test_betas.make_source(["TTT", "tttttt", "tTTttt", "tttt"], dtype=dtype, **plan)
    if plan.get("zscore") != "none":
        own = source.parts[2]
        flat = lambda start, stop: own.read(start, stop) * np.array([0, 1, 1, 1, 1, 1])  # noqa: E731
        source = replace(source, parts=(*source.parts[:2], replace(own, read=flat), *source.parts[3:]))

    def write(source, folder, parts, progress):
        write_fmri_source(source, folder, parts=parts, progress=progress)

    check(write, source, tmp_path)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Two sessions of time series, with a constant voxel in each."""
    root = tmp_path_factory.mktemp("series") / "bids"
    test_bold.phantom.write_dataset(root, test_bold.pd.DataFrame({"participant_id": ["sub-01"]}))
    for number, session in enumerate(("01", "02")):
        rng = np.random.default_rng(number)
        events, motion = test_bold.make_events(), np.zeros((test_bold.N, 6))
        volumes, _ = test_bold.make_volumes(events, motion + rng.standard_normal(motion.shape) * 0.01, rng)
        volumes[:, 2, 2, 1 + number] = 5
        signals = {
            name: rng.standard_normal(test_bold.N)
            for name in ("global_signal", "csf", "white_matter", "dvars")
        }
        confounds = test_bold.phantom.make_confounds(
            rng.standard_normal((test_bold.N, 6)) * 0.01, t_r=test_bold.T_R, **signals
        )
        test_bold.phantom.write_run(
            root, "01", iter(volumes), events, confounds, test_bold.MASK, n_volumes=test_bold.N,
            affine=test_bold.AFFINE, t_r=test_bold.T_R, run="01", session=session,
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_bold.BoldSettings, "max_constant", 0.5)
        yield test_bold.make_config(root)


@pytest.fixture
def stop_after_a_session(monkeypatch):
    """Return what lets a call stop when it has kept its first session, and the next one go on."""
    write = KeptParts.write

    def stop(self, name, **arrays):
        write(self, name, **arrays)
        raise Stopped

    @contextmanager
    def stopping():
        with monkeypatch.context() as patch:
            patch.setattr(KeptParts, "write", stop)
            yield

    return stopping


def test_time_series(series, tmp_path, stop_after_a_session):
    """A run whose model is fitted is not read again, nor are its constant voxels lost."""
    config = series
    write_bold(config, tmp_path / "whole")
    expected = list_files(tmp_path / "whole")
    constant = json.loads((tmp_path / "whole/responses/meta.json").read_text())["provenance"]
    assert len(constant["constant_voxels_by_run"]) == 2
    parts = tmp_path / "parts"
    with stop_after_a_session(), pytest.raises(Stopped):
        write_bold(config, tmp_path / "stopped", parts=parts)
    told = []
    write_bold(config, tmp_path / "again", parts=parts, progress=lambda *words: told.append(words))
    assert told[0] == (0, 0, "1 of 2 sessions are kept from an earlier call")
    assert list_files(tmp_path / "again") == expected


def test_a_run_goes_on_with_the_same_settings_alone(series, tmp_path, stop_after_a_session):
    """Sessions are kept under a digest of settings and inputs, and nothing is kept once the stage is complete."""
    settings = read_config("synthetic_digits", ["split={kind: kfold, n_folds: 2}"])

    def preprocess(folder, dataset):
        listener = Told()
        pipeline.preprocess(open_run(settings.model_copy(update={"dataset": dataset}), folder, listener))
        return listener.said

    assert preprocess(tmp_path / "whole", series) == []
    expected = list_results(tmp_path / "whole" / "stages")
    for name, dataset, kept in (
        ("same", series, ["1 of 2 sessions are kept from an earlier call"]),
        ("other", series.model_copy(update={"zscore": "run"}), []),
    ):
        with stop_after_a_session(), pytest.raises(Stopped):
            preprocess(tmp_path / name, series)
        assert len(list((tmp_path / name / "work").glob("preprocess-*/part-*"))) == 1
        assert preprocess(tmp_path / name, dataset) == kept
        assert not list_leftovers(tmp_path / name)
        assert (list_results(tmp_path / name / "stages") == expected) == (name == "same")


class Told(SilentListener):
    """Keeps all sentences."""

    def __init__(self):
        self.said = []

    @contextmanager
    def watch(self, description):
        yield lambda done, total, text: total or self.said.append(text)


def test_trials_of_another_shape_or_none_at_all_are_written_anew(tmp_path):
    path = tmp_path / "trials.npy"
    with ArrayFile(path, (3, 2), np.dtype(np.float32)) as file:
        file.write(0, np.ones((3, 2)))
    with ArrayFile(path, (3, 2), np.dtype(np.float32), continues=True) as file:
        assert file.is_continued
        np.testing.assert_array_equal(file.read(0, 3), np.ones((3, 2)))
    for shape, dtype in (((2, 2), "<f4"), ((2, 3), "<f4"), ((3, 2), "<i4")):
        with ArrayFile(path, shape, np.dtype(dtype), continues=True) as file:
            assert not file.is_continued
            np.testing.assert_array_equal(file.read(0, shape[0]), np.zeros(shape))


def test_trials_that_waited_and_were_lost_are_read_again(tmp_path):
    """After a power cut their file could be empty, and zeros were standardised in their place."""
    source, _ = test_betas.make_source(["tttttt", "TTT", "tTTttt", "tttt"], dtype="float16")
    counts = {"all": 0, "stop": -1}
    write_fmri_source(count_reads(source, counts), tmp_path / "whole")
    stopping = count_reads(source, {"all": 0, "stop": counts["all"]})
    with pytest.raises(Stopped):
        write_fmri_source(stopping, tmp_path / "stopped", parts=tmp_path / "parts")
    lost = list((tmp_path / "parts").glob("session-*.npy"))
    assert lost
    for path in lost:
        path.write_bytes(b"")
    write_fmri_source(source, tmp_path / "again", parts=tmp_path / "parts")
    whole, again = (np.load(tmp_path / name / "responses/data.npy") for name in ("whole", "again"))
    np.testing.assert_array_equal(again, whole)


def test_a_folder_without_locks_keeps_no_sessions(tmp_path, monkeypatch):
    """Two processes that a file system without locks let in wrote the same kept trials, one into the other's result."""
    asked = []

    def write(dataset, folder, *, parts, **others):
        asked.append(parts)
        raise DataError("far enough")

    monkeypatch.setattr("braindecode_vis.pipeline.preparing.write_dataset", write)
    for locked in (True, False):
        monkeypatch.setattr("braindecode_vis.pipeline.preparing.is_locked", lambda _, locked=locked: locked)
        with pytest.raises(DataError, match="far enough"):
            pipeline.preprocess(open_run(read_config("synthetic_digits"), tmp_path / str(locked)))
    assert [parts is None for parts in asked] == [False, True]
