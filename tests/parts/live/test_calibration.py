"""A run brought to a person: what is shown, when it appeared, what is learnt of it, and whether that gained."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import braindecode_vis as bdv
from braindecode_vis import pipeline
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.live import calibration
from braindecode_vis.parts.live.calibration import (
    Adaptation,
    CalibrationBlock,
    PageClock,
    Photodiode,
    RunningStatistics,
    adapt_to_person,
    choose_pictures,
    find_flank,
    make_running,
    plan_block,
    prepare_calibration,
    read_adaptation,
)
from braindecode_vis.parts.live.judge import Judge
from braindecode_vis.parts.live.opening import open_session
from braindecode_vis.parts.live.recording import BidsRecorder
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Listener, Marker, StreamInfo
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.new_trials import read_new
from tests.parts.live.scripted import ChunkSource, cut_chunks

FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100, "evaluation.features": None}
N, C, T = 40, 6, 10
DRAW = np.random.default_rng(7)
PICTURES = (1 / (1 + np.exp(-DRAW.normal(size=(N, 6)) @ DRAW.normal(size=(6, 64)) / 2))).reshape(N, 8, 8)
WEIGHTS = DRAW.normal(size=(64, C * T))
MIXING = np.eye(C) + 2.0 * DRAW.normal(size=(C, C))  # how another head mixes the same sources


def make_trials(shown, noise=1.5, seed=0, mixing=None):
    clean = ((PICTURES - PICTURES.mean(axis=0)).reshape(N, -1)[shown] @ WEIGHTS).reshape(-1, C, T)
    clean = clean if mixing is None else mixing @ clean
    return (clean + noise * np.random.default_rng(seed).normal(size=clean.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shown = np.repeat(np.arange(N), 2)
    data = bdv.from_arrays(
        make_trials(shown), images=PICTURES, shown=shown, split=np.where(shown < 30, "train", "test"),
        ch_names=["O1", "O2", "Oz", "Pz", "P3", "P4"], times=np.arange(T) / 100, unit="V", modality="eeg",
    )  # fmt: skip
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        # Its scores and its page take nine tenths of the time, and nothing here looks at them.
        patch.setattr("braindecode_vis.pipeline.reporting.run_all", pipeline.train)
        patch.setattr(bdv.DecodingRun, "leaks", ())
        bdv.decode(data, out=out, settings=FEW)
    return out


@pytest.fixture
def judge(folder):
    return Judge(folder)


def test_a_block_shows_every_picture_in_each_round(judge):
    ids = [f"p{n}" for n in range(6)]
    shown = plan_block(ids, repetitions=4, soa=1.0, jitter=0.2, duration=0.3, seed=3)
    names = [one.stimulus_id for one in shown]
    assert all(sorted(names[n : n + 6]) == ids for n in range(0, 24, 6))
    assert all(a != b for a, b in pairwise(names))
    pauses = np.array([one.pause for one in shown])
    assert pauses.min() >= 0.5
    assert pauses.max() <= 0.9
    assert [one.stimulus_id for one in plan_block(ids, repetitions=4, duration=0.3, seed=3)] == names
    with pytest.raises(ConfigError, match="overlap"):
        plan_block(ids, soa=0.5, jitter=0.1)
    targets, images = choose_pictures(judge, "run", 8, 0)
    assert len(targets) == len(images) == 8
    assert set(targets.ids) <= {str(n) for n in range(30)}  # training pictures alone
    few = judge.run.folder.path.parent / "few"
    few.mkdir()
    for n in range(2):
        Image.fromarray((PICTURES[n] * 255).astype(np.uint8)).save(few / f"{n}.png")
    with pytest.raises(DataError, match="needs 5 pictures"):
        choose_pictures(judge, few, 5, 0)


def test_the_clock_of_the_page_meets_that_of_the_stream():
    """Samples come 3 to 20 ms after they were taken; the stream counts from another origin."""
    clock, draw = PageClock(), np.random.default_rng(0)
    assert clock.find_source_time(1.0) is None
    for n in range(200):
        taken = 50 + n * 0.02
        delay = 0.003 + draw.exponential(0.005)
        clock.hear(Chunk(np.zeros((1, 1)), np.array([taken - 1000]), arrived=taken + delay))
    assert abs(clock.find_source_time(53.0) - (53 - 1000)) < 0.005


def test_a_photodiode_gives_the_onset_and_the_lag():
    times = np.arange(3000) / 1000
    lit = [0.532, 1.571, 2.523]
    trace = (
        ((times[:, None] >= lit).sum(axis=1) % 2) * 5.0  # bright with one picture, dark with the next
        + np.random.default_rng(0).normal(size=3000) * 0.05
    )
    diode = Photodiode("PD")
    with pytest.raises(DataError, match="no channel 'PD'"):
        diode.open(StreamInfo("x", "eeg", ("O1",), 1000.0))
    diode.open(StreamInfo("x", "eeg", ("O1", "PD"), 1000.0))
    for name, told in zip("abc", (0.5, 1.5, 2.5), strict=True):
        diode.ask(name, told)
    found = []
    for start in range(0, 3000, 37):
        part = slice(start, start + 37)
        found += diode.hear(Chunk(np.stack([trace[part] * 0, trace[part]]), times[part]))
    assert [name for name, _ in found] == ["a", "b", "c"]
    np.testing.assert_allclose([when for _, when in found], lit, atol=1e-3)
    assert "41.5 ms" in diode.describe()
    assert (
        find_flank(times, np.random.default_rng(0).normal(size=3000) * 0.01 + (times > 2.9) * 5, 0.5) is None
    )


def test_pairs_of_a_new_person_are_its_context_in_fmri(tmp_path, monkeypatch):
    """Voxels of others look alike and are not; after a block of pictures the new person is decoded, untrained."""
    draw = np.random.default_rng(3)
    weights = {name: draw.normal(size=(64, 50)) for name in ("1", "2", "3", "new")}
    clean = (PICTURES - PICTURES.mean(axis=0)).reshape(N, -1)

    def scan(name, shown):
        response = clean[shown] @ weights[name]
        return (response + response.std() * draw.normal(size=response.shape)).astype(np.float32)

    data = bdv.from_arrays(
        np.concatenate([scan(name, np.arange(N)) for name in "123"]), images=PICTURES, modality="fmri",
        shown=np.tile(np.arange(N), 3), subject=np.repeat(list("123"), N),
        split=np.tile(np.where(np.arange(N) < 30, "train", "test"), 3),
    )  # fmt: skip
    monkeypatch.setattr("braindecode_vis.pipeline.reporting.run_all", pipeline.train)
    monkeypatch.setattr(bdv.DecodingRun, "leaks", ())
    encoder = {"kind": "in_context", "width": 16, "n_blocks": 1, "simulated_steps": 2, "people_steps": 2}
    bdv.decode(data, encoder=encoder, out=tmp_path / "run", settings=FEW)
    judge = Judge(tmp_path / "run", named="new")
    shown = np.repeat(np.arange(20), 3)
    targets, _ = choose_pictures(judge, "run", 30, 0)
    found = adapt_to_person(judge, scan("new", shown), [str(n) for n in shown], targets)
    assert found.is_used, found.describe()
    assert found.before[1] < 0.6  # whatever it was: voxels of others
    assert found.after[0] > 0.7


def test_a_ridge_learns_how_another_head_mixes(judge):
    shown = np.repeat(np.arange(20), 3)
    block = judge.statistics.apply(make_trials(shown, seed=1, mixing=MIXING), judge.subject, "live")
    targets, _ = choose_pictures(judge, "run", 30, 0)
    before = np.array(judge.encoders[0].fitted.weights)
    found = adapt_to_person(judge, block, [str(n) for n in shown], targets)
    assert found.gain[1] > 0
    assert found.after[0] > found.before[0] + 0.05, found.describe()
    assert found.is_used
    np.testing.assert_array_equal(judge.encoders[0].fitted.weights, before)  # the run's own stays
    # New trials of pictures that were not in the block.
    tested = np.arange(30, N)
    new = judge.statistics.apply(make_trials(tested, seed=2, mixing=MIXING), judge.subject, "live")
    ranks = []
    for encoders in (judge.encoders, found.encoders):
        judge.adopt(encoders=encoders, words="x")
        units = [judge.find_unit(judge.predict(new[[n]])) for n in range(len(new))]
        ranks.append(np.mean([judge.find_rank(unit, str(n)) for unit, n in zip(units, tested, strict=True)]))
    assert ranks[1] < ranks[0]


def test_noise_teaches_nothing_and_is_not_used(judge):
    shown = np.repeat(np.arange(12), 2)
    targets, _ = choose_pictures(judge, "run", 30, 0)
    block = np.random.default_rng(5).normal(size=(24, C, T)).astype(np.float32)
    found = adapt_to_person(judge, block, [str(n) for n in shown], targets)
    assert not found.is_used
    assert "the run is not changed" in found.describe()
    with pytest.raises(DataError, match="too few"):
        adapt_to_person(judge, block[:6], [str(n) for n in shown[:6]], targets)


@pytest.mark.further
def test_ten_pictures_of_noise_look_neither_better_nor_worse(judge):
    """Leaving out one picture and comparing it with the others gave .31 for chance, since their mean was learnt.

    The mean of eight blocks has a standard error below .05; the former estimate was .2 below chance.
    """
    targets, _ = choose_pictures(judge, "run", 30, 0)
    found = []
    for seed in range(8):
        draw = np.random.default_rng(seed)
        shown = np.repeat(draw.permutation(30)[:10], 3)
        block = draw.normal(size=(30, C, T)).astype(np.float32)
        found.append(adapt_to_person(judge, block, [str(n) for n in shown], targets))
    assert abs(np.mean([one.after[0] for one in found]) - 0.5) < 0.12
    assert found[0].left_out == "2 pictures at a time"


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        ((0.1, 0.02, 0.2), "It is used from now on."),
        ((0.1, -0.02, 0.2), "cannot be distinguished from 0"),
        ((-0.5, -0.6, -0.4), "made it worse: the run is not changed"),
    ],
)
def test_what_was_gained_is_told_by_the_interval(gain, words):
    said = Adaptation([], 30, 10, (0.5, 0.4, 0.6), (0.5, 0.4, 0.6), gain, "2 pictures at a time").describe()
    assert words in said
    assert "2 pictures at a time left out" in said


def test_a_block_collects_its_trials_and_keeps_the_decoder(judge, tmp_path):
    targets, images = choose_pictures(judge, "run", 15, 0)
    sent = []
    block = CalibrationBlock(
        judge, targets, images, inject=sent.append, out=tmp_path / "mine", repetitions=3, soa=1.0, seed=1
    )
    block.begin(StreamInfo("x", "eeg", ("O1",), 100.0), {})
    assert len(block.find_images([block.showings[0].stimulus_id])) == 1
    block.mark(block.showings[0].stimulus_id, 1.0, 0.001)  # before the stream
    assert not sent
    block.hear(Chunk(np.zeros((1, 1)), np.array([0.0]), arrived=100.0))
    shown = [one.stimulus_id for one in block.showings]
    trials = judge.statistics.apply(
        make_trials([int(i) for i in shown], seed=1, mixing=MIXING), judge.subject, "live"
    )

    def decide():
        for n, marker in enumerate(list(sent)):
            time.sleep(0.001)
            block.decide(Decision(n, marker.time, marker.value, epoch=trials[n]))
        block.decide(Decision(999, 5.0, shown[0], epoch=trials[0] * np.nan))  # not of the block

    for n, name in enumerate(shown):
        block.mark(name, 101.0 + n, 0.001)
    assert sent[0] == Marker(1.0, shown[0])
    thread = threading.Thread(target=decide)
    thread.start()
    said = block.finish(True)
    thread.join()
    assert "45 trials of 15 pictures" in said
    assert "It is used" in said
    assert "photodiode would measure" in said
    assert judge.describe()["protocol"].count("calibrated on 45 trials of this person") == 1
    other = Judge(judge.run)
    read_adaptation(other, tmp_path / "mine")
    np.testing.assert_array_equal(other.predict(trials[:1]).vectors, judge.predict(trials[:1]).vectors)
    assert "calibrated on 45 trials" in other.describe()["protocol"]
    with pytest.raises(DataError, match="already"):
        CalibrationBlock(judge, targets, images, inject=sent.append, out=tmp_path / "mine")
    with pytest.raises(DataError, match="no calibrated decoder"):
        read_adaptation(other, tmp_path)
    empty = CalibrationBlock(other, targets, images, inject=sent.append)
    assert "too few" in empty.finish(False)


def test_running_statistics_undo_another_mixing_and_know_the_past_alone(judge):
    running = make_running(judge)
    shown = np.random.default_rng(0).integers(0, N, 150)
    trials = make_trials(shown, mixing=1.7 * MIXING)
    first = running.apply(trials[:1], judge.subject, "live")
    np.testing.assert_array_equal(first, judge.statistics.apply(trials[:1], judge.subject, "live"))
    out = np.concatenate([first, running.apply(trials[1:], judge.subject, "live")])
    centred = out[75:] - out[75:].mean(axis=2, keepdims=True)
    covariance = np.einsum("nct,ndt->cd", centred, centred) / (len(centred) * T)
    assert np.linalg.norm(covariance - running.spread) < 0.35 * np.linalg.norm(running.spread)
    again = make_running(judge)
    changed = trials.copy()
    changed[100:] *= 100
    np.testing.assert_array_equal(again.apply(changed, judge.subject, "live")[:100], out[:100])
    assert "past trials alone" in running.used["this session"]


def test_a_run_of_arrays_says_that_it_cuts_no_trials_from_what_was_recorded(folder, tmp_path):
    source = ChunkSource(
        StreamInfo("x", "eeg", ("O1", "O2", "Oz", "Pz", "P3", "P4"), 100.0, "V"),
        cut_chunks(np.random.default_rng(0).normal(size=(C, 100)), np.arange(100) / 100),
    )
    open_session(
        folder, source, listeners=[BidsRecorder.for_run(open_finished(folder), tmp_path / "rec")]
    ).run()
    with pytest.raises(ConfigError, match="which cuts no trials from recordings"):
        read_new(open_finished(folder), tmp_path / "rec", tmp_path / "work")


def test_running_statistics_of_voxels():
    class Plain:
        def apply(self, block, subject, session):
            return block

    draw = np.random.default_rng(0)
    running = RunningStatistics(Plain(), np.zeros(4), np.ones(4))
    out = running.apply((5 + 3 * draw.normal(size=(400, 4))).astype(np.float32), "1", "live")
    assert np.abs(out[200:].mean(axis=0)).max() < 0.4
    assert np.abs(out[200:].std(axis=0) - 1).max() < 0.3


def test_a_session_says_beside_each_decision_what_was_adapted(folder, judge):
    """Markers of a block are taken beside the codes of the experiment, and all channels are the run's."""
    shown = np.arange(30, 36)
    signal = np.random.default_rng(1).normal(size=(C, 400))
    markers = [Marker((50 + 50 * n) / 100, str(i)) for n, i in enumerate(shown)]
    info = StreamInfo("x", "eeg", ("O1", "O2", "Oz", "Pz", "P3", "P4"), 100.0, "V")
    source = ChunkSource(info, cut_chunks(signal, np.arange(400) / 100, markers))
    session = open_session(folder, source, events={"30": "30", "31": "31"})
    prepare_calibration(session, None, running=True)
    assert prepare_calibration(session, "run", n_pictures=8) is not None
    session.decoder.know(["32"])
    heard = []
    listener = Listener()
    listener.decide = heard.append
    session.add(listener)
    summary = session.run()
    assert [d.marker for d in heard] == ["30", "31", "32"]
    assert all(RunningStatistics.WORDS in d.notes[-1] for d in heard)
    assert RunningStatistics.WORDS in summary["protocol"]


def refuse_to_read(*_):
    raise DataError("it is missing.")


@pytest.mark.parametrize("first, n_tested", [(0, 0), (30, 6)])
def test_a_block_of_test_pictures_is_told(folder, tmp_path, monkeypatch, first, n_tested):
    """Mirrored pictures are the same ones to who looks at them."""
    for n in range(first, first + 6):
        picture = (PICTURES[n][:, ::-1] * 255).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"mine {n}.png")
    info = StreamInfo("x", "eeg", ("O1", "O2", "Oz", "Pz", "P3", "P4"), 100.0, "V")
    source = ChunkSource(info, cut_chunks(np.zeros((C, 400)), np.arange(400) / 100, []))
    session, told = open_session(folder, source, events={"30": "30"}), []
    monkeypatch.setattr(session, "tell", told.append)
    prepare_calibration(session, str(tmp_path), n_pictures=6)
    found = [text for text in told if "calibration pictures are test pictures of the run" in text]
    assert [text.split()[0] for text in found] == ([str(n_tested)] if n_tested else [])
    # A block goes on where the test pictures cannot be read.
    monkeypatch.setattr(calibration, "find_copies", refuse_to_read)
    prepare_calibration(session, str(tmp_path), n_pictures=6)
    assert (
        told[-1] == "calibration pictures were not compared with the test pictures of the run: it is missing."
    )


def test_a_block_goes_on_after_an_early_end_and_its_pictures_are_never_scored(judge, tmp_path):
    """What is learnt starts from the run's own each time; the summary of a session says what was adapted meanwhile."""
    targets, images = choose_pictures(judge, "run", 15, 0)
    sent, own = [], judge.encoders
    block = CalibrationBlock(judge, targets, images, inject=sent.append, out=tmp_path / "mine", repetitions=3)
    block.hear(Chunk(np.zeros((1, 1)), np.array([0.0]), arrived=0.0))
    shown = [one.stimulus_id for one in block.showings]
    trials = judge.statistics.apply(
        make_trials([int(i) for i in shown], seed=1, mixing=MIXING), judge.subject, "live"
    )
    for n, name in enumerate(shown):
        block.mark(name, 1.0 + n, 0.001)
        block.decide(Decision(n, sent[-1].time, name, epoch=trials[n]))
        if n == 3:
            assert "stopped early. Nothing was adapted: 4 trials" in block.finish(False)
            assert judge.encoders == own
        if n == 29:
            block.finish(False)
    assert "45 trials" in block.finish(True)
    assert judge.adaptation.count("calibrated on") == 1
    other = Judge(judge.run, gallery=targets)
    name = str(targets.ids[0])
    assert other.find_shown(name) == name
    read_adaptation(other, tmp_path / "mine")
    assert other.find_shown(name) is None
    running = Judge(judge.run)
    running.adopt(statistics=make_running(running), words="x")
    with pytest.raises(DataError, match="without --adapt running"):
        read_adaptation(running, tmp_path / "mine")


def test_the_verb_hands_on_every_option_of_a_block(folder, command_line, monkeypatch, tmp_path):
    """Its options were parsed and went nowhere."""
    info = StreamInfo("x", "eeg", ("O1", "O2", "Oz", "Pz", "P3", "P4"), 100.0, "V")
    source = ChunkSource(info, [])
    monkeypatch.setattr(
        "braindecode_vis.parts.live.opening.open_source", lambda kind, name, **options: source
    )
    words = ["live", folder, "--stream", "x"]
    ran = command_line(*words, "--adapt", "running", "--calibrate", "run", "--pictures", "7", "--json")
    assert ran.returncode == 0, ran.stderr
    assert RunningStatistics.WORDS in ran.stdout
    from braindecode_vis.parts.live.page.server import PageListener

    pages = []
    close = PageListener.close
    monkeypatch.setattr(PageListener, "close", lambda page: (pages.append(page), close(page)))
    command_line(*words, "--calibrate", "run", "--pictures", "7", "--rounds", "2", "--soa", "2")
    assert len(pages[-1].calibration.showings) == 14
    for more, said in (
        (["--no-page", "--calibrated", tmp_path], "holds no calibrated decoder"),
        (["--no-page", "--rounds", "2"], "are for the block of --calibrate"),
        (["--no-page", "--tr", "2"], "are for --source folder"),
    ):
        ran = command_line(*words, *more)
        assert ran.returncode == 2
        assert said in ran.stderr
