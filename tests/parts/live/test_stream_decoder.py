"""A stream decoded by a run: the very trials of the run, chunk by chunk, and one sentence for all that is odd."""

import io
import json
import os
import re
import signal as signals
from dataclasses import replace

import mne
import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.live.evidence import Evidence, NamedDecisions, fit_temperature
from braindecode_vis.parts.live.listeners import JsonLinesListener, TerminalListener
from braindecode_vis.parts.live.opening import open_session
from braindecode_vis.parts.live.recording import BidsRecorder
from braindecode_vis.parts.live.session import LiveSession
from braindecode_vis.parts.live.stream_channels import map_channels, read_pairs
from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Listener, Marker, StreamInfo
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.preprocessing.causal import CausalFilter, make_resampling
from braindecode_vis.preprocessing.epochs import cut_stretch, make_antialias_filter
from braindecode_vis.scoring.retrieval import GallerySearch
from tests.parts.live.scripted import ChunkSource, cut_chunks
from tests.parts.live.small_run import CH_NAMES, EXTRA, RIDGE, SFREQ, draw_recording, make_run

NAMES = (*CH_NAMES, EXTRA)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("plain") / "run", scaling={"method": "robust"})


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    cleaning = {"reference": "average", "l_freq": 1.0, "h_freq": 40.0, "scaling": {"method": "zscore"}}
    return make_run(tmp_path_factory.mktemp("filtered") / "run", mvnn="none", **cleaning)


class Notebook(Listener):
    def __init__(self):
        self.decisions, self.told, self.summary, self.chunks = [], [], None, 0

    def hear(self, chunk):
        self.chunks += 1

    def decide(self, decision):
        self.decisions.append(decision)

    def tell(self, sentence, level="info"):
        self.told.append(sentence)

    def end(self, summary):
        self.summary = summary


def make_stream(seed=1, n=8, start=100.0):
    """The second recording up to its n-th picture: samples, times and markers."""
    signal, onsets, shown = draw_recording(seed)
    signal = signal[:, : onsets[n - 1] + 400] if n < len(onsets) else signal
    times = start + np.arange(signal.shape[1]) / SFREQ
    markers = [Marker(times[at], f"picture{p:02d}") for at, p in zip(onsets[:n], shown[:n], strict=True)]
    return signal, times, markers


_DECODERS = {}


def decode(run, chunks, *, names=NAMES, sfreq=SFREQ, unit="V", listeners=(), **options):
    """Decode with one decoder for all streams that ask for nothing else: `open` begins anew."""
    notebook = Notebook()
    decoder = None if options else _DECODERS.get(run.folder.path)
    if decoder is None:
        decoder = RunStreamDecoder(run, session="02", **options)
        if not options:
            _DECODERS[run.folder.path] = decoder
    source = ChunkSource(StreamInfo("lab", "eeg", tuple(names), sfreq, unit), chunks)
    LiveSession(source, decoder, [notebook, *listeners]).run()
    return notebook


def find_own(run, n=8):
    """What the run has stored of the second recording, and what it predicts of that."""
    responses = preprocess(run).responses
    rows = np.flatnonzero((responses.trials["session"] == "02").to_numpy())[:n]
    own = responses.select(rows)
    return np.asarray(own.data), train(run)[0].encoder.predict(own).vectors


# --- live equals offline ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 20, 10**6])
def test_chunks_of_any_size_give_what_the_run_stored(run, size):
    n = 2 if size == 1 else 8
    data, vectors = find_own(run, n)
    found = decode(run, cut_chunks(*make_stream(n=n), size=size)).decisions
    assert [one.number for one in found] == list(range(n))
    np.testing.assert_allclose([one.epoch for one in found], data, atol=1e-5 * np.abs(data).max())
    np.testing.assert_allclose([one.embedding for one in found], vectors, atol=1e-5 * np.abs(vectors).max())
    for one in found:
        assert one.shown is None or one.top[one.rank - 1 if one.rank <= 5 else 0] in one.top
        assert one.probability.sum() <= 1 + 1e-9


@pytest.mark.slow
def test_a_run_that_was_trained_with_causal_filters_loses_nothing_live(tmp_path):
    """What it has stored is what a stream gives, filters and all, and it says so."""
    cleaning = {"reference": "average", "l_freq": 1.0, "h_freq": 40.0, "notch": [50.0], "causal": True}
    run = make_run(tmp_path / "run", mvnn="none", **cleaning)
    data, vectors = find_own(run, 8)
    found = decode(run, cut_chunks(*make_stream(n=8), size=20))
    assert any("by a causal filter, as in the run" in one for one in found.told)
    np.testing.assert_allclose([one.epoch for one in found.decisions], data, atol=1e-5 * np.abs(data).max())
    np.testing.assert_allclose(
        [one.embedding for one in found.decisions], vectors, atol=1e-5 * np.abs(vectors).max()
    )


@pytest.mark.parametrize("size", [7, 10**6])
def test_causal_filters_are_the_same_chunk_by_chunk_and_near_those_of_the_run(filtered, size):
    signal, times, markers = make_stream()
    found = decode(filtered, cut_chunks(signal, times, markers, size=size))
    mixed = signal[:8] - signal.mean(axis=0)  # the extra electrode belongs to the reference
    filter_ = CausalFilter(SFREQ, l_freq=1.0, h_freq=40.0)
    whole = filter_.push(mixed)
    assert whole.shape[1] == mixed.shape[1] - filter_.delay
    assert f"{1000 * filter_.delay / SFREQ:.0f} ms" in filter_.describe()
    decoder = RunStreamDecoder(filtered, session="02")
    onsets = [round((m.time - times[0]) * SFREQ) for m in markers]
    plan = decoder.stream_plan.plan
    block = np.concatenate([
        cut_stretch(lambda a, b: whole[:, a:b], np.array([at]), (0, whole.shape[1]), SFREQ, plan)[0] for at in onsets
    ])  # fmt: skip
    expected = decoder.judge.statistics.apply(block, "01", "02")
    live = np.array([one.epoch for one in found.decisions])
    np.testing.assert_allclose(live, expected, atol=1e-5 * np.abs(expected).max())
    # The run's own filter has no phase shift; what the high-pass turns is small in what is left.
    zero_phase = find_own(filtered)[0]
    assert np.corrcoef(live.ravel(), zero_phase.ravel())[0, 1] > 0.9
    assert any("high-pass of 1 Hz by a causal filter" in note for note in found.told)


def test_other_rates_are_resampled_like_whole_multiples():
    """The windowed sinc at a whole ratio is the filter that the run decimates with."""
    weights = make_resampling(-80, 80, 1000.0, np.arange(3) / 250)
    taps = make_antialias_filter(4)
    np.testing.assert_allclose(weights[80 - 40 : 80 + 41, 0], taps, atol=2e-4)
    times = np.arange(50) / 250
    weights = make_resampling(-30, 140, 512.0, times)
    wave = np.sin(2 * np.pi * 20 * np.arange(-30, 141) / 512)
    np.testing.assert_allclose(wave @ weights, np.sin(2 * np.pi * 20 * times), atol=2e-3)


def test_a_stream_of_another_rate(run):
    signal, times, markers = make_stream()
    times, markers = times * SFREQ / 640, [replace(m, time=m.time * SFREQ / 640) for m in markers]
    found = decode(run, cut_chunks(signal, times, markers), sfreq=640.0)
    assert not any(one.lost for one in found.decisions)
    assert any("640 Hz is not a multiple of 250 Hz" in note for note in found.told)
    with pytest.raises(DataError, match="has 200 Hz, but the run needs 250 Hz"):
        decode(run, [], sfreq=200.0)


def test_windows_without_markers(run):
    signal, times, _ = make_stream()
    found = decode(run, cut_chunks(signal, times), every=0.2, forgetting=0.5).decisions
    steps = np.diff([one.onset for one in found])
    np.testing.assert_allclose(steps, 0.2, atol=1e-6)
    assert [one.n_evidence for one in found] == list(range(1, len(found) + 1))
    assert found[0].onset == pytest.approx(times[0] + 0.1)  # the baseline lies before it


# --- evidence ---------------------------------------------------------------------------------------------


def test_repetitions_add_log_likelihoods(run):
    signal, times, markers = make_stream(n=48)
    found = decode(run, cut_chunks(signal, times, markers), repetitions=True, n_top=6).decisions
    first, second = (one for one in found if one.marker == "picture20")
    assert (first.n_evidence, second.n_evidence) == (1, 2)
    likelihood = [
        dict(zip(one.top, one.probability, strict=True)) for one in (first, second)
    ]  # all six candidates
    joint = {name: likelihood[0][name] * likelihood[1][name] for name in likelihood[0]}
    expected = {name: p / sum(joint.values()) for name, p in joint.items()}
    assert dict(zip(second.posterior_top, second.posterior, strict=True)) == pytest.approx(expected, rel=1e-4)
    ranks = [one.rank for one in found if one.shown]
    assert np.mean(np.array(ranks) == 1) > 0.5  # of six pictures


def test_the_temperature_is_found_again():
    draw = np.random.default_rng(0)
    similarity = draw.uniform(-0.2, 0.6, (4000, 30))
    chances = np.exp(12 * similarity)
    chances /= chances.sum(axis=1, keepdims=True)
    truth = np.array([draw.choice(30, p=row) for row in chances])
    assert fit_temperature(similarity, truth) == pytest.approx(12, rel=0.1)
    assert fit_temperature(-similarity, truth) == 0


def test_an_average_is_fitted_anew_where_that_is_cheap_and_adds_up_directions(tmp_path, monkeypatch):
    """The likelihood of the member that paints images does not speak of what is compared."""
    linear = {"kind": "linear_gaussian", "n_components": 4}
    average = {"kind": "average", "members": [RIDGE, linear], "for_generator": 1}
    run = make_run(tmp_path / "run", average, scaling={"method": "robust"})
    signal, times, markers = make_stream(n=48)
    found = decode(run, cut_chunks(signal, times, markers), repetitions=True)
    assert all(0 < one.probability[0] < 1 for one in found.decisions)
    ranks = [one.rank for one in found.decisions if one.shown]
    assert np.mean(np.array(ranks) == 1) > 0.5  # of six pictures
    with monkeypatch.context() as patched:
        patched.setattr("braindecode_vis.parts.live.evidence.CHEAP_AVERAGE", 0)
        found = decode(run, cut_chunks(signal, times, markers))
        assert not len(found.decisions[0].probability)

    def fail(*_, **__):
        raise DataError("the captions are gone")

    monkeypatch.setattr("braindecode_vis.parts.live.evidence.predict_by_inner_folds", fail)
    found = decode(run, cut_chunks(signal, times, markers))
    assert not len(found.decisions[0].probability)  # a session does not end for want of a scale


def test_an_encoder_that_knows_all_training_trials_has_no_probabilities_before_pictures_were_named(
    run, monkeypatch, tmp_path
):
    """Its own trials made it sure of wrong pictures: 84 % on average where a third was right."""
    monkeypatch.setattr("braindecode_vis.parts.live.evidence.CHEAP_FIT", 0)
    monkeypatch.setattr("braindecode_vis.parts.live.evidence.FEWEST_NAMED", 4)
    monkeypatch.setattr("braindecode_vis.parts.live.evidence.EVERY_NAMED", 4)
    signal, times, markers = make_stream(n=48)
    text = io.StringIO()
    found = decode(
        run,
        cut_chunks(signal, times, markers, size=100),
        repetitions=True,
        listeners=[TerminalListener(text)],
    )
    named = [n for n, one in enumerate(found.decisions) if one.shown]
    first = named[3] + 1
    assert all(not len(one.probability) and len(one.similarity) == 5 for one in found.decisions[:first])
    assert all(0 < one.probability[0] < 1 for one in found.decisions[first:])
    assert all(one.posterior_top for one in found.decisions)
    assert any(one.startswith("There are only similarities, no probabilities yet") for one in found.told)
    assert sum(one.startswith("From now on there are probabilities") for one in found.told) == 1
    assert "probabilities fitted on its earlier decisions" in found.summary["protocol"]
    line = next(one for one in text.getvalue().splitlines() if one.startswith("0: "))
    assert "%" not in line
    # Page and terminal say the same of windows, which never name a picture.
    sliding = RunStreamDecoder(run, session="02", every=0.2)
    notes = sliding.open(StreamInfo("lab", "eeg", NAMES, SFREQ, "V"))
    assert sliding.describe()["probabilities"] in notes
    assert "there will be no probabilities" in sliding.describe()["probabilities"]
    # Always right so far is no proof for ever: four of four are not beyond five of six.
    search = GallerySearch(Embeddings(np.eye(3, dtype=np.float32), np.array(["a", "b", "c"]), "toy"))
    count = NamedDecisions(search)
    scales = [count.add(np.eye(3)[0], 0) for _ in range(4)]
    assert scales[:3] == [None] * 3
    assert np.exp(scales[3]) / (np.exp(scales[3]) + 2) == pytest.approx(5 / 6)


def test_old_windows_are_forgotten():
    evidence = Evidence(0.5)
    evidence.add("", np.array([1.0, 0.0]))
    total, n = evidence.add("", np.array([0.0, 1.0]))
    assert (total.tolist(), n) == ([0.5, 1.0], 2)


# --- what goes wrong --------------------------------------------------------------------------------------


def test_a_gap_loses_the_epochs_that_it_cuts_and_no_other(run):
    signal, times, markers = make_stream()
    at = round((markers[3].time - times[0]) * SFREQ) + 50
    kept = np.r_[0:at, at + 22 : len(times)]  # 44 ms
    found = decode(run, cut_chunks(signal[:, kept], times[kept], markers))
    lost = [one for one in found.decisions if one.lost]
    assert [one.marker for one in lost] == [markers[3].value]
    assert lost[0].lost.startswith("gap: the stream has no samples from")
    assert len(found.decisions) == 8
    assert found.summary["lost"] == {"gap": 1}
    whole = decode(run, cut_chunks(signal, times, markers)).decisions
    for one in found.decisions:
        if not one.lost:
            same = next(other for other in whole if other.marker == one.marker)
            np.testing.assert_allclose(one.embedding, same.embedding, rtol=1e-3, atol=1e-2)


def test_a_short_gap_is_bridged_by_a_straight_line_and_said(run, filtered):
    signal, times, markers = make_stream()
    at = round((markers[3].time - times[0]) * SFREQ) + 50
    kept = np.r_[0:at, at + 20 : len(times)]  # 40 ms
    drawn = signal.copy()
    drawn[:, at : at + 20] = np.linspace(signal[:, at - 1], signal[:, at + 20], 22, axis=1)[:, 1:-1]
    for each in (run, filtered):
        found = decode(each, cut_chunks(signal[:, kept], times[kept], markers, size=7))
        same = decode(each, cut_chunks(drawn, times, markers)).decisions
        for one, other in zip(found.decisions, same, strict=True):
            np.testing.assert_allclose(one.epoch, other.epoch, atol=1e-5 * np.abs(other.epoch).max())
        bridged = [one for one in found.decisions if any("bridged: 40 ms" in note for note in one.notes)]
        assert [one.marker for one in bridged] == [markers[3].value]
        assert found.summary["n_bridged"] == 1
        assert sum("are interpolated linearly" in one for one in found.told) == 1


def test_a_gap_is_said_once_by_whoever_noticed_it(run):
    signal, times, _ = make_stream()
    parts = [cut_chunks(signal[:, part], times[part], ()) for part in (slice(0, 500), slice(600, None))]
    first, second = (list(part) for part in parts)
    ours, theirs = (
        "Gap: the stream has no samples from 100.998 to 101.200 s.",
        "100 samples (200 ms) were lost.",
    )
    assert decode(run, [*first, *second]).told.count(ours) == 1
    second[0] = replace(second[0], notes=(theirs,))
    told = decode(run, [*first, *second]).told
    assert (told.count(theirs), told.count(ours)) == (1, 0)


def test_the_clock_goes_back_and_nothing_is_decided_twice(run):
    signal, times, markers = make_stream()
    at = round((markers[4].time - times[0]) * SFREQ) + 50
    moved = times.copy()
    moved[at:] -= 30
    late = [replace(m, time=m.time - 30) if m.time > times[at] else m for m in markers]
    chunks = [
        *cut_chunks(signal[:, :at], times[:at], late[:5]),
        *cut_chunks(signal[:, at:], moved[at:], late[5:]),
    ]
    found = decode(run, chunks)
    assert [one.marker for one in found.decisions if one.lost] == [markers[4].value]
    assert any(one.startswith("Clock jump: the time of the stream went back") for one in found.told)
    assert len(found.decisions) == len({one.number for one in found.decisions}) == 8


def test_a_clock_that_goes_back_with_every_sample_is_told_once_and_counted(run):
    signal, times, markers = make_stream()
    moved = times.copy()
    moved[1000:1050] = times[1000] - 0.01 * np.arange(50)
    found = decode(run, cut_chunks(signal, moved, markers))
    told = [one for one in found.told if "went back" in one]
    assert len(told) == 2
    assert told[0].startswith("Clock jump: the time of the stream went back from")
    assert told[1].startswith("Clock jump: the time of the stream went back 48 times more, last at ")
    assert len(found.decisions) == len({one.number for one in found.decisions}) == 8


def test_markers_that_come_twice_early_late_or_from_another_clock(run):
    signal, times, markers = make_stream()
    chunks = [*cut_chunks(signal, times, (), size=100)]
    first = replace(chunks[0], markers=tuple(markers[:4]))  # seconds before their samples
    odd = (
        markers[4],
        markers[4],
        Marker(times[0] - 50, "picture01"),
        Marker(times[-1] + 99, "x"),
        Marker(np.nan, "y"),
    )
    found = decode(run, [first, *chunks[1:-1], replace(chunks[-1], markers=odd)])
    decided = [one.marker for one in found.decisions if not one.lost]
    assert decided == [m.value for m in markers[:5]]
    assert sorted(one.lost.split(":")[0] for one in found.decisions if one.lost) == [
        "clock",
        "clock",
        "start",
    ]
    assert sum("came twice" in one for one in found.told) == 1


def test_markers_without_an_image_are_said_once_and_others_are_named_by_a_table(run, tmp_path):
    signal, times, markers = make_stream()
    coded = [replace(m, value=str(n)) for n, m in enumerate(markers)]
    found = decode(run, cut_chunks(signal, times, coded))
    assert sum("has no picture in the gallery" in one for one in found.told) == 1
    table = tmp_path / "codes.tsv"
    table.write_text("code\timage\n0\tpicture20\n2\tpicture23\n")
    found = decode(run, cut_chunks(signal, times, coded), events=table)
    assert [(one.marker, one.shown) for one in found.decisions] == [("0", "picture20"), ("2", "picture23")]
    assert "The marker '1' is not among the events, so it is not decoded." in found.told
    table.write_text("0 picture20\n")
    with pytest.raises(DataError, match="line 1 of the table of events"):
        read_pairs(table, "events")


def test_the_end_of_the_stream_names_what_was_not_complete(run):
    signal, times, markers = make_stream()
    stop = round((markers[-1].time - times[0]) * SFREQ) + 100
    found = decode(run, cut_chunks(signal[:, :stop], times[:stop], markers))
    assert found.decisions[-1].lost == "end: the stream ended before the epoch was complete"


def test_samples_that_are_no_numbers_and_an_electrode_that_came_off(run):
    signal, times, markers = make_stream()
    signal = signal.copy()
    signal[2, round((markers[1].time - times[0]) * SFREQ) + 5] = np.nan
    at = round((markers[6].time - times[0]) * SFREQ)
    signal[4, at - 100 : at + 400] = 0
    found = decode(run, cut_chunks(signal, times, markers), bridge=0)
    assert [one.marker for one in found.decisions if one.lost] == [markers[1].value]
    assert any("The channel Pz has samples that are not numbers" in one for one in found.told)
    assert found.decisions[6].notes == ("flat in this epoch: P8",)


def test_markers_do_not_wait_for_a_channel_that_has_no_numbers_any_more(run):
    """They waited for ever, and their number grew; times that are none went by without a word."""
    signal, times, markers = make_stream(n=40)
    signal[2, round((markers[1].time - times[0]) * SFREQ) + 5 :] = np.nan
    decoder = RunStreamDecoder(run, session="02")
    decoder.open(StreamInfo("lab", "eeg", NAMES, SFREQ, "V"))
    found = [one for chunk in cut_chunks(signal, times, markers, size=100) for one in decoder.feed(chunk)]
    lost = [one for one in found if isinstance(one, Decision) and one.lost]
    assert lost[0].marker == markers[1].value
    assert {one.lost for one in lost} == {"gap: the samples of the epoch are not numbers"}
    assert len(lost) + len(decoder._waiting) == 39
    assert len(lost) > 10
    (chunk,) = cut_chunks(signal[:, :5], np.full(5, np.nan), size=5)
    assert list(decoder.feed(chunk)) == ["Some samples have no time; they are left out."]


@pytest.mark.parametrize(("said", "told"), [("uV", "The stream is in uV"), ("", "treated as another unit")])
def test_microvolts_are_converted_and_that_is_said(run, said, told):
    signal, times, markers = make_stream()
    found = decode(run, cut_chunks(1e6 * signal, times, markers), unit=said)
    assert any(told in one for one in found.told)
    vectors = find_own(run)[1]
    np.testing.assert_allclose(
        [one.embedding for one in found.decisions], vectors, atol=1e-4 * np.abs(vectors).max()
    )


def test_a_unit_that_cannot_be_true_is_refused_after_everyone_heard_the_end(run):
    signal, times, markers = make_stream()
    notebook = Notebook()
    source = ChunkSource(
        StreamInfo("lab", "eeg", NAMES, SFREQ, "V"), cut_chunks(1e6 * signal, times, markers)
    )
    session = LiveSession(source, RunStreamDecoder(run, session="02"), [notebook])
    with pytest.raises(DataError, match="states the unit V, but its samples are about"):
        session.run()
    assert notebook.summary["ended"].startswith("error: ")


def test_channels_by_other_names_in_another_order_missing_or_swapped(run):
    signal, times, markers = make_stream(n=4)
    vectors = find_own(run, 4)[1]
    order = [3, 1, 0, 2, 7, 6, 5, 4, 8]
    names = ["EEG P4-REF", "p3", "T5", "PZ", "eeg O2", "OZ", "O1.", "T6", "Cz"]
    found = decode(run, cut_chunks(signal[order], times, markers), names=names)
    np.testing.assert_allclose(
        [one.embedding for one in found.decisions], vectors, atol=1e-5 * np.abs(vectors).max()
    )
    with pytest.raises(DataError, match=re.escape("is missing the channel(s) O1 of the run")):
        decode(run, [], names=[*NAMES[:5], "x1", *NAMES[6:]])
    with pytest.raises(DataError, match="are both O1 of the run"):
        decode(run, [], names=[*NAMES[:8], "o1"])
    mended = decode(
        run, cut_chunks(np.delete(signal, 5, axis=0), times, markers), names=[n for n in NAMES if n != "O1"],
        interpolate=True,
    )  # fmt: skip
    assert mended.decisions[0].notes == ("interpolated: O1",)
    table = {"x1": "O1"}
    decode(run, cut_chunks(signal, times, markers), names=[*NAMES[:5], "x1", *NAMES[6:]], channels=table)
    with pytest.raises(DataError, match="the table of channels names 'x2'"):
        decode(run, [], channels={"x2": "O1"})
    signal, times, markers = make_stream(n=20)
    swapped = decode(run, cut_chunks(signal[[0, 1, 6, 3, 4, 5, 2, 7, 8]], times, markers))
    assert [one for one in swapped.told if "look swapped" in one] == [
        "The channels Pz and Oz look swapped: each correlates with the other channels as the other one did in the run."
    ]


def test_meg_is_not_interpolated_and_options_must_make_sense(run):
    from braindecode_vis.datasets.sources.cleaning_options import Cleaning

    with pytest.raises(DataError, match="has no positions of its coils"):
        map_channels(["MEG1"], ["MEG1", "MEG2"], Cleaning(), stream="lab", modality="meg", interpolate=True)
    for options, words in (
        ({"every": 0.0}, "every is 0.0"), ({"forgetting": 2.0}, "forgetting is 2.0"), ({"unit": "mm"}, "the unit 'mm'"),
        ({"every": 1.0, "repetitions": True}, "windows need no markers"), ({"bridge": -1}, "bridge is -1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            RunStreamDecoder(run, **options)
    with pytest.raises(
        DataError, match=r"run braindecode-vis reconstruct .* first, or leave out --reconstruct"
    ):
        RunStreamDecoder(run, reconstruct=True)


# --- the session ------------------------------------------------------------------------------------------


class Broken(Listener):
    def decide(self, decision):
        raise RuntimeError("no paper")


def test_a_listener_that_fails_is_dropped_and_the_others_hear_everything(run, tmp_path):
    out = io.StringIO()
    lines = tmp_path / "decisions.jsonl"
    found = decode(
        run, cut_chunks(*make_stream()), listeners=[Broken(), TerminalListener(out), JsonLinesListener(lines)]
    )
    assert "Broken failed and gets no further messages (RuntimeError: no paper)." in found.told
    assert len(found.decisions) == 8
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] != "tell"] == ["begin", *["decision"] * 8, "end"]
    assert events[0]["facts"]["gallery_size"] == 6
    assert "8 decisions, 0 lost" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    with pytest.raises(ConfigError, match="already exists"):
        JsonLinesListener(lines)
    # A command that finds no stream leaves no file that the next one would refuse.
    unheard = JsonLinesListener(tmp_path / "unheard.jsonl")
    unheard.tell("there is no stream", "error")
    unheard.end({})
    assert not (tmp_path / "unheard.jsonl").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        JsonLinesListener(tmp_path / "nowhere" / "decisions.jsonl")


class Scripted:
    """A decoder without a brain."""

    def __init__(self):
        self.n = 0

    def open(self, info):
        return []

    def describe(self):
        return {"gallery_size": 10}

    def feed(self, chunk):
        for marker in chunk.markers:
            self.n += 1
            yield Decision(
                self.n - 1,
                marker.time,
                marker.value,
                "a",
                top=("a",),
                rank=1 + self.n % 2,
                latency={"wait": 2.0},
            )

    def flush(self):
        return []


@pytest.mark.parametrize("number", [signals.SIGINT, signals.SIGTERM, signals.SIGHUP])
@pytest.mark.parametrize("phase", ["connect", "read"])
def test_a_signal_ends_the_session_and_everyone_hears_it(number, phase, tmp_path):
    """A closed terminal, too. Before the stream is there nothing is recorded; behind that the recording is whole."""
    info = StreamInfo("lab", "eeg", ("O1", "Oz"), 100.0, "V")

    class Killed(ChunkSource):
        def connect(self):
            if phase == "connect":
                os.kill(os.getpid(), number)
            return info

        def read(self, timeout):
            if phase == "read":
                os.kill(os.getpid(), number)
            return super().read(timeout)

    recorder, heard = BidsRecorder(tmp_path), Notebook()
    chunks = (Chunk(np.ones((2, 10)), (10 * n + np.arange(10)) / 100) for n in range(5))
    session = LiveSession(Killed(info, chunks), Scripted(), [recorder, heard])
    before = signals.signal(number, signals.default_int_handler)  # nohup and background commands ignore some
    try:
        assert session.run()["ended"] in ("Ctrl-C", "SIGTERM", "the terminal was closed")
    finally:
        signals.signal(number, before)
    assert heard.summary is not None
    if phase == "connect":
        assert not list(tmp_path.rglob("*_eeg.*"))
    else:
        assert mne.io.read_raw(recorder.path, verbose="error").n_times == 10


class Paced:
    """A source that gives nothing for a while."""

    def __init__(self, chunks):
        self.chunks = list(chunks)

    def connect(self):
        return StreamInfo("lab", "eeg", ("Oz",), 100.0)

    def read(self, timeout):
        return self.chunks.pop(0) if self.chunks else Chunk(np.empty((1, 0)), np.empty(0), ended=True)

    def close(self):
        pass


def test_a_session_counts_stalls_is_injected_into_and_ends_as_asked(monkeypatch):
    monkeypatch.setattr("braindecode_vis.parts.live.session.STALLED_S", -1.0)
    empty, full = Chunk(np.empty((1, 0)), np.empty(0)), Chunk(np.ones((1, 5)), np.arange(5) / 100)
    notebook = Notebook()
    session = LiveSession(Paced([full, empty, full, full]), Scripted(), [notebook], decisions=2)
    for n in range(3):
        session.inject(Marker(n / 100, "a"))
    summary = session.run()
    assert summary["ended"] == "2 decisions were made"
    assert summary["n_decisions"] == 2
    assert summary["scores"]["top1"] == {"value": 0.5, "chance": 0.1}
    # Decisions of a calibration block are made and told, but end nothing.
    session = LiveSession(Paced([full, full, full]), Scripted(), [notebook], decisions=2)
    session.is_counted = lambda decision: decision.marker != "a"
    for name in "aab":
        session.inject(Marker(0.0, name))
    summary = session.run()
    assert (summary["ended"], summary["n_decisions"]) == ("the stream ended", 3)
    session = LiveSession(Paced([full, empty, full]), Scripted(), [notebook])
    assert session.run()["ended"] == "the stream ended"
    assert any("has sent no samples" in one for one in notebook.told)
    assert any("continues after" in one for one in notebook.told)


class Failing(Paced):
    """A driver of others that falls over, at any of its methods."""

    def __init__(self, at):
        super().__init__([Chunk(np.ones((1, 5)), np.arange(5) / 100)])
        self.at = at

    def connect(self):
        return None if self.at == "nothing" else self._go("connect", super().connect)

    def read(self, timeout):
        return self._go("read", lambda: super(Failing, self).read(timeout))

    def close(self):
        self._go("close", super().close)

    def _go(self, method, call):
        if method == self.at:
            raise OSError("no such\ndevice")
        return call()


@pytest.mark.parametrize("at", ["connect", "read", "close", "nothing"])
def test_a_source_of_others_that_fails_ends_the_session_with_one_sentence(at):
    notebook = Notebook()
    words = "gave NoneType" if at == "nothing" else f"Failing failed at {at} with OSError: no such device."
    with pytest.raises(DataError, match=words):
        LiveSession(Failing(at), Scripted(), [notebook]).run()
    assert words in notebook.summary["ended"]


def test_python_opens_a_session_by_words(run):
    info = StreamInfo("lab", "eeg", NAMES, SFREQ, "V")
    source = ChunkSource(info, cut_chunks(*make_stream()))
    session = open_session(run, source, decisions=3, n_top=2)
    assert session.run()["n_decisions"] == 3
    with pytest.raises(ConfigError, match="duration is 0"):
        open_session(run, source, duration=0)
