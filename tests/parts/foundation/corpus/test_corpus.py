"""A corpus: built once, grown without redoing, whole after a kill, and read in one order by all processes."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.datasets.corpus import manifest
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
from braindecode_vis.datasets.corpus.reader import open_corpus
from braindecode_vis.datasets.corpus.recordings import Channels, Excluded, SeriesRun
from braindecode_vis.parts.foundation.corpus import growing
from braindecode_vis.parts.foundation.corpus.growing import add_sources, resample_series

NAMES = tuple(f"P{n}" for n in range(6))
CONFIG = CorpusConfig(interval_s=2.0, shard_mb=0.004, min_duration_s=10, dtype="float32")


class ToySources:
    """Roots that hold a file of samples for each run: SUBJECT_RUN_INTERVAL_SITE[_lacks].npy."""

    def __init__(self):
        self.n_read = 0

    def read_channels(self, config, roots):
        return Channels(NAMES, ("Vis", "Vis", "Default", "Default", "", ""))

    def find_runs(self, root, config):
        return [self._open(path, root) for path in sorted(root.glob("*.npy"))], [
            Excluded(path, "it moves too much") for path in sorted(root.glob("*.bad"))
        ]

    def _open(self, path, root):
        subject, run, interval, site, *lacks = path.stem.split("_")
        missing = ("P1", "P4") if lacks else ()

        def read():
            self.n_read += 1
            data = np.load(path).astype(np.float32)
            data[:, [NAMES.index(name) for name in missing]] = np.nan
            return data

        return SeriesRun(
            source=root.name, subject=subject, session="", run=run, task="rest", site=site, files=(path,),
            modality="fmri", channels=NAMES, missing=missing, n_times=len(np.load(path, mmap_mode="r")),
            interval_s=float(interval), motion_mm=0.1, licence="CC0", read=read,
        )  # fmt: skip


def write_run(root: Path, name: str, n_times: int = 40, seed: int | None = None) -> Path:
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(abs(hash((root.name, name))) % 2**32 if seed is None else seed)
    path = root / f"{name}.npy"
    np.save(path, rng.standard_normal((n_times, len(NAMES))))
    return path


@pytest.fixture
def root(tmp_path):
    """Eight people at two sites of different intervals, two runs each."""
    for number, run in itertools.product(range(8), "12"):
        write_run(
            tmp_path / "movies",
            f"{number:02d}_{run}_{'2.0_north' if number < 5 else '0.8_south_lacks'}",
            seed=10 * number + int(run),
            n_times=40 if number < 5 else 100,
        )
    (tmp_path / "movies" / "99.bad").touch()
    return tmp_path / "movies"


def add(tmp_path, *roots, sources=None, config=CONFIG, **options):
    return add_sources(tmp_path / "corpus", roots, config, sources=sources or ToySources(), **options)


def test_every_run_is_stored_as_it_was_read_and_resampled(tmp_path, root):
    done = add(tmp_path, root)
    corpus = open_corpus(tmp_path / "corpus")
    assert (done.n_new, done.n_people, len(done.excluded)) == (16, 8, 1)
    assert done.digest == corpus.digest
    assert corpus.interval_s == 2.0
    assert corpus.networks[2] == "Default"
    assert corpus.runs["shard"].nunique() > 3
    assert corpus.runs["hours"].sum() == pytest.approx(done.hours)
    windows = corpus.windows(40, part="all")
    for row in range(len(windows)):
        stem = windows.run_id[row].rpartition("/")[2]
        want = np.load(root / stem).astype(np.float32)
        want = resample_series(want, 0.8 if "0.8" in stem else 2.0, 2.0)
        want = (want - want.mean(axis=0)) / want.std(axis=0)
        seen = windows.observed([row])[0]
        assert seen.tolist() == [not ("lacks" in stem and name in ("P1", "P4")) for name in NAMES]
        np.testing.assert_allclose(
            windows.read([row])[0], np.where(seen[:, None], want.T, 0), atol=2e-6
        )  # float32


def test_windows_tell_who_where_and_when(tmp_path, root):
    write_run(root, "00_3_2.0_north", n_times=15)
    add(tmp_path, root)
    windows = open_corpus(tmp_path / "corpus").windows(16, step=8, part="all")
    assert windows.n_short == 1
    assert set(windows.site) == {"north", "south"}
    mine = windows.run_id == "movies/00/00_1_2.0_north.npy"
    assert windows.start_s[mine].tolist() == [0, 16, 32, 48]
    assert set(windows.person[mine]) == {"movies/00"}
    with pytest.raises(DataError, match="at least 41 samples, the length of a window; the longest is"):
        open_corpus(tmp_path / "corpus").windows(41)


def test_an_epoch_is_every_window_once_in_an_order_of_its_own(tmp_path, root, monkeypatch):
    monkeypatch.setattr("braindecode_vis.datasets.corpus.reader.POOL_SHARDS", 2)
    add(tmp_path, root)
    windows = open_corpus(tmp_path / "corpus").windows(10)
    orders = [
        list(windows.iterate(7, seed=seed, epoch=epoch)) for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    for order in orders:
        assert sorted(np.concatenate(order)) == list(range(len(windows)))
        assert {len(rows) for rows in order[:-1]} == {7}
    first, again, *others = [np.concatenate(order).tolist() for order in orders]
    assert first == again
    assert first not in others
    shards = [windows._shard[rows] for rows in orders[0]]
    assert len(set(shards[0])) > 1  # mixed
    assert len(set(shards[0]) | set(shards[1])) <= 4  # and of few shards


def test_adding_again_reads_nothing_and_growing_reads_what_is_new(tmp_path, root):
    sources = ToySources()
    first = add(tmp_path, root, sources=sources)
    assert sources.n_read == 16
    again = add(tmp_path, root, sources=sources)
    assert (sources.n_read, again.n_known, again.n_new, again.digest) == (16, 16, 0, first.digest)
    before = open_corpus(tmp_path / "corpus")
    held = before.windows(20, part="held_out")
    was = held.read(np.arange(len(held)))
    write_run(tmp_path / "rest", "00_1_2.0_east")
    write_run(tmp_path / "rest", "01_1_2.0_east")
    grown = add(tmp_path, root, tmp_path / "rest", sources=sources)
    assert (sources.n_read, grown.n_new, grown.n_people) == (18, 2, 2)
    # What is open stays as it was, and is found again.
    before.verify()
    assert np.array_equal(held.read(np.arange(len(held))), was)
    now = open_corpus(tmp_path / "corpus")
    assert now.digest == grown.digest != before.digest
    assert open_corpus(tmp_path / "corpus", before.digest).runs.equals(before.runs)
    assert set(before.runs.query("held_out")["person"]) <= set(now.runs.query("held_out")["person"])
    kept = now.runs[now.runs["source"] == "movies"]
    assert dict(zip(before.runs["run_id"], before.runs["held_out"], strict=True)) == dict(
        zip(kept["run_id"], kept["held_out"], strict=True)
    )


def test_a_kill_loses_the_shard_that_was_being_written_and_nothing_else(tmp_path, root):
    class Killed(BaseException):
        pass

    sources = ToySources()

    def stop(done, total, text):
        if done == 9 and total == 16:
            raise Killed

    with pytest.raises(Killed):
        add(tmp_path, root, sources=sources, progress=stop)
    with pytest.warns(Notice, match="is not complete: "):
        half = open_corpus(tmp_path / "corpus")
    n_whole = len(half.runs)
    assert 0 < n_whole < 9
    # Other roots first, so that shards that were planned are not the same any more.
    write_run(tmp_path / "rest", "00_1_2.0_east")
    add(tmp_path, tmp_path / "rest", root, sources=sources)
    assert sources.n_read == 9 + (17 - n_whole)
    add(tmp_path / "other", tmp_path / "rest", root)
    whole, once = open_corpus(tmp_path / "corpus"), open_corpus(tmp_path / "other" / "corpus")
    assert set(whole.runs["digest"]) == set(once.runs["digest"])
    whole.verify(read=True)
    assert not list((tmp_path / "corpus").rglob(".tmp-*"))


def test_a_shard_that_was_finished_before_the_manifest_told_is_taken_up(tmp_path, root, monkeypatch):
    sources = ToySources()
    add(tmp_path, root, sources=sources)
    folder = tmp_path / "corpus"
    record = manifest.read_manifest(folder)
    manifest.write_manifest(folder, replace(record, shards=record.shards[:-2]))
    again = add(tmp_path, root, sources=sources)
    assert (sources.n_read, again.n_new) == (16, 0)
    assert manifest.read_manifest(folder).shards == record.shards


def test_whole_persons_are_held_out_and_the_same_ones_in_every_corpus(tmp_path, root):
    add(tmp_path, root, config=CONFIG.model_copy(update={"held_out": 0.3}))
    runs = open_corpus(tmp_path / "corpus").runs
    assert runs.groupby("person")["held_out"].nunique().max() == 1
    held = set(runs.query("held_out")["person"])
    assert len(held) == 2  # 0.3 of 8
    add(tmp_path / "other", root, config=CONFIG.model_copy(update={"held_out": 0.3, "scaling": "none"}))
    assert set(open_corpus(tmp_path / "other" / "corpus").runs.query("held_out")["person"]) == held


def test_the_same_recordings_make_one_person(tmp_path, root):
    """A copy of a data set under another name and other labels adds no run, and nobody to train on who is held out."""
    (tmp_path / "copy").mkdir()
    shutil.copy(root / "03_1_2.0_north.npy", tmp_path / "copy" / "77_1_2.0_west.npy")
    write_run(tmp_path / "copy", "77_2_2.0_west")
    heard = []
    add(tmp_path, root, hold_out=["03"])
    done = add(tmp_path, tmp_path / "copy", tell=heard.append)
    runs = open_corpus(tmp_path / "corpus").runs
    assert (done.n_copies, done.n_new, done.n_people) == (1, 1, 0)
    new = runs[runs["source"] == "copy"].iloc[0]
    assert (new["subject"], new["person"], new["held_out"]) == ("77", "movies/03", True)
    assert not heard
    # Under the name of the copy too, or a run on that data set would not know whom its encoder has learnt from.
    (tmp_path / "twin").mkdir()
    shutil.copy(root / "04_1_2.0_north.npy", tmp_path / "twin" / "5_1_2.0_west.npy")
    add(tmp_path, tmp_path / "twin")
    corpus = open_corpus(tmp_path / "corpus")
    assert {"source": "twin", "subject": "5", "person": "movies/04"} in corpus.list_subjects()
    assert {row["person"] for row in corpus.list_subjects(held_out=True)} == {"movies/03"}


@pytest.mark.parametrize(("gain", "noise"), [(1, 0), (1.01, 1e-3), (3, 0.05)])
def test_the_same_samples_in_another_file_are_found_once_they_are_read(tmp_path, root, gain, noise):
    """As where a data set was packed in another format: a person of both is trained on in neither, if held out."""
    same = np.load(root / "03_1_2.0_north.npy")
    same = gain * (same + noise * np.random.default_rng(0).normal(size=same.shape))
    (tmp_path / "copy").mkdir()
    np.save(tmp_path / "copy" / "77_1_2.0_west.npy", np.asfortranarray(same))
    heard = []
    add(tmp_path, root, config=CONFIG.model_copy(update={"held_out": 0.0}))
    add(
        tmp_path,
        tmp_path / "copy",
        config=CONFIG.model_copy(update={"held_out": 0.0}),
        hold_out=["copy/77"],
        tell=heard.append,
    )
    corpus = open_corpus(tmp_path / "corpus")
    assert len(corpus.runs) == 16
    assert set(corpus.runs.query("held_out")["person"]) == {"movies/03"}
    assert len(heard) == 1
    assert "movies/03 was trained on and held out from now on" in heard[0]


def test_a_table_of_people_joins_subjects_and_names_them(tmp_path, root):
    add(tmp_path, root, people={"movies/01": "Ada", "movies/06": "Ada", "elsewhere/1": "Bob"})
    runs = open_corpus(tmp_path / "corpus").runs
    assert set(runs[runs["person"] == "Ada"]["subject"]) == {"01", "06"}
    assert runs[runs["person"] == "Ada"]["held_out"].nunique() == 1
    assert runs["person"].nunique() == 7
    shutil.copytree(root, tmp_path / "copy")
    with pytest.raises(DataError, match="calls copy/01 'Eve', but the same recording is of 'Ada'"):
        add(tmp_path, tmp_path / "copy", people={"copy/01": "Eve"})


def test_a_recording_that_changed_takes_the_place_of_what_was_stored(tmp_path, root):
    add(tmp_path, root)
    before = open_corpus(tmp_path / "corpus")
    good = (root / "02_1_2.0_north.npy").read_bytes()
    write_run(root, "02_1_2.0_north", seed=4321)
    heard = []
    done = add(tmp_path, root, tell=heard.append)
    assert (done.n_changed, done.n_new, done.n_known) == (1, 1, 15)
    assert "1 recordings have changed" in heard[0]
    now = open_corpus(tmp_path / "corpus")
    assert len(now.runs) == 16
    old, new = (c.runs.set_index("run_id")["digest"]["movies/02/02_1_2.0_north.npy"] for c in (before, now))
    assert old != new
    assert add(tmp_path, root).n_known == 16
    # Put back: it passed for known, and what had been wrong stayed.
    (root / "02_1_2.0_north.npy").write_bytes(good)
    assert add(tmp_path, root).n_changed == 1
    last = open_corpus(tmp_path / "corpus")
    assert dict(zip(last.runs["run_id"], last.runs["digest"], strict=True)) == dict(
        zip(before.runs["run_id"], before.runs["digest"], strict=True)
    )
    assert add(tmp_path, root).n_known == 16


def test_a_repetition_time_that_was_corrected_makes_a_run_new(tmp_path, root):
    """It is in a sidecar, so that the files of samples are the same, and the run kept the wrong one."""

    class Corrected(ToySources):
        def _open(self, path, root):
            run = super()._open(path, root)
            return replace(run, interval_s=2.5) if run.subject == "02" else run

    add(tmp_path, root)
    assert add(tmp_path, root, sources=Corrected()).n_changed == 2
    runs = open_corpus(tmp_path / "corpus").runs
    assert len(runs) == 16
    assert set(runs[runs["subject"] == "02"]["n_times"]) == {49}
    assert add(tmp_path, root, sources=Corrected()).n_known == 16


def test_a_run_of_one_sample_at_the_interval_of_the_corpus_is_left_out(tmp_path):
    """Its deviation is 0, so that it was stored as no numbers."""
    write_run(tmp_path / "short", "01_1_0.8_south", n_times=2)
    write_run(tmp_path / "short", "02_1_0.8_south", n_times=100)
    done = add(tmp_path, tmp_path / "short", config=CONFIG.model_copy(update={"min_duration_s": 0.0}))
    assert done.n_new == 1
    assert "does not change at the interval" in done.excluded[0].reason


def test_what_was_opened_in_the_middle_of_an_addition_stays_whole_after_it(tmp_path, root):
    """Its state of the manifest is forgotten at the end, which stopped a pretraining on it."""
    opened = []

    def look(done, total, text):
        if done == 9 and total == 16:
            with pytest.warns(Notice, match="is not complete"):
                opened.append(open_corpus(tmp_path / "corpus"))

    add(tmp_path, root, progress=look)
    opened[0].verify()


def test_a_corpus_that_changed_under_a_training_is_one_sentence(tmp_path, root):
    add(tmp_path, root)
    corpus = open_corpus(tmp_path / "corpus")
    windows = corpus.windows(20)
    path = manifest.find_shard(corpus.folder, corpus.manifest.shards[0].name) / manifest.VALUES
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-4] + b"abcd")
    with pytest.raises(DataError, match=r"has changed: 00000-\w+/values.npy is not as it was written"):
        corpus.verify()
    path.write_bytes(content[:2000])
    again = open_corpus(tmp_path / "corpus").windows(20, part="all")
    with pytest.raises(DataError, match="changed since it was opened"):
        again.read(np.arange(len(again)))
    shutil.rmtree(path.parent)
    with pytest.raises(DataError, match="is missing"):
        corpus.verify()
    assert len(windows)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"interval_s": 1.0}, "made with interval_s 2.0, not 1.0"),
        ({"channels": {"atlas": "schaefer100"}}, "made with channels.atlas 'schaefer400', not 'schaefer100'"),
    ],
)
def test_settings_of_a_corpus_hold_for_all_of_it(tmp_path, root, change, words):
    add(tmp_path, root)
    change = {"channels": {"kind": "fmri", **change["channels"]}} if "channels" in change else change
    config = CorpusConfig.model_validate({**CONFIG.model_dump(), **change})
    with pytest.raises(ConfigError, match=words):
        add(tmp_path, root, config=config)
    add(tmp_path, root, config=CONFIG.model_copy(update={"shard_mb": 1.0, "held_out": 0.5}))


class OtherAtlas(ToySources):
    names, digest = NAMES, "other"

    def read_channels(self, config, roots):
        return Channels(self.names, ("",) * len(self.names), digest=self.digest)


def test_an_atlas_that_changed_is_told_and_one_of_other_names_refused(tmp_path, root):
    heard = []
    add(tmp_path, root)
    other = OtherAtlas()
    add(tmp_path, root, sources=other, tell=heard.append)
    assert "files of the atlas differ" in heard[0]
    other.names = NAMES[:5]
    with pytest.raises(ConfigError, match="has 6 channels, first P0, but its settings now give 5"):
        add(tmp_path, root, sources=other)


class OtherChannels(ToySources):
    def find_runs(self, root, config):
        runs, excluded = super().find_runs(root, config)
        return [replace(run, channels=NAMES[::-1]) for run in runs], excluded


class OtherModality(ToySources):
    def find_runs(self, root, config):
        runs, excluded = super().find_runs(root, config)
        return [replace(run, modality="eeg") for run in runs], excluded


@pytest.mark.parametrize(
    "sources, config, words",
    [
        (OtherChannels(), CONFIG, "but the corpus has 6 with other names"),
        (OtherModality(), CONFIG, "is eeg, but the corpus is of fmri"),
        (
            ToySources(),
            CONFIG.model_copy(update={"missing": "refuse"}),
            "is missing 2 of 6 channels, first P1",
        ),
    ],
)
def test_runs_of_another_kind_are_refused(tmp_path, root, sources, config, words):
    with pytest.raises(DataError, match=words):
        add(tmp_path, root, sources=sources, config=config)


def test_runs_that_lack_too_much_or_are_too_short_are_left_out_and_listed(tmp_path, root):
    write_run(root, "08_1_2.0_north", n_times=4)
    done = add(tmp_path, root, config=CONFIG.model_copy(update={"max_missing": 0.2}))
    reasons = [entry.reason for entry in done.excluded]
    assert done.n_new == 10
    assert sum("is missing 2 of 6 channels" in reason for reason in reasons) == 6
    assert any("lasts 8 s" in reason for reason in reasons)
    listed = manifest.read_manifest(tmp_path / "corpus").sources[0].excluded
    assert len(listed) == 8


def test_a_channel_that_never_changes_is_missing_and_a_value_that_is_no_number_leaves_a_run_out(
    tmp_path, root
):
    for name, value in [("00_1_2.0_north", 7.0), ("01_1_2.0_north", np.nan)]:
        data = np.load(root / f"{name}.npy")
        data[:, 3] = value
        np.save(root / f"{name}.npy", data)
    done = add(tmp_path, root)
    runs = open_corpus(tmp_path / "corpus").runs.set_index("run_id")
    assert runs["missing"]["movies/00/00_1_2.0_north.npy"] == ("P3",)
    assert "movies/01/01_1_2.0_north.npy" not in runs.index
    assert "not numbers in 1 channels, first P3" in done.excluded[-1].reason
    # It is tried again, as its file may have been mended; many of them are no accident.
    write_run(root, "01_1_2.0_north")
    assert add(tmp_path, root).n_new == 1
    for number, path in enumerate(sorted(root.glob("*.npy"))[:3]):
        np.save(path, np.full((40 + number, 6), np.nan))
    with pytest.raises(DataError, match=r"3 of 3 new runs cannot be read; of .*npy: it has values"):
        add(tmp_path, root)


def test_two_recordings_by_one_name_are_refused(tmp_path, root):
    (tmp_path / "b").mkdir()
    write_run(tmp_path / "b" / "movies", "00_1_2.0_north", seed=99)
    with pytest.raises(DataError, match="are different recordings with the same name"):
        add(tmp_path, root, tmp_path / "b" / "movies")


def test_a_manifest_that_was_changed_by_hand_is_refused(tmp_path, root):
    add(tmp_path, root)
    path = tmp_path / "corpus" / manifest.MANIFEST
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "held_out": []}))
    with pytest.raises(DataError, match="was changed by hand"):
        open_corpus(tmp_path / "corpus")
    path.write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        open_corpus(tmp_path / "corpus")
    with pytest.raises(DataError, match="is not a corpus"):
        open_corpus(tmp_path / "nothing")


@pytest.mark.parametrize("old, new", [(0.72, 2.0), (2.0, 0.72), (1.5, 2.0), (0.8, 1.0 / 3)])
def test_resampling_keeps_what_both_rates_can_hold_and_takes_out_the_rest(old, new):
    t = np.arange(300) * old
    low = 0.4 / (2 * max(old, new))  # Hz; well below both Nyquist frequencies
    out = resample_series(np.sin(2 * np.pi * low * t)[:, None], old, new)[:, 0]
    at = np.arange(len(out)) * new
    inner = (at > 12 * max(old, new)) & (at < t[-1] - 12 * max(old, new))
    # 80 dB of the window
    assert np.abs(out - np.sin(2 * np.pi * low * at))[inner].max() < 1e-3
    assert at[-1] <= t[-1] < at[-1] + new
    if new > old:
        high = 1.3 / (2 * new)
        assert np.abs(resample_series(np.sin(2 * np.pi * high * t)[:, None], old, new)[inner]).max() < 1e-2
    assert np.allclose(resample_series(np.ones((300, 1)), old, new), 1)


def test_packing_fills_shards_and_divides_no_run():
    runs = [growing.NewRun(None, str(n), "", n_bytes) for n, n_bytes in enumerate([400, 500, 300, 2000, 100])]
    assert [[run.run_id for run in group] for group in growing.pack(runs, 1e-3)] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]
