"""What the live page shows: traces on the clock of the stream, quality of channels, counts that nothing escapes."""

import base64
import dataclasses
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis.parts.live.listeners import describe_summary
from braindecode_vis.parts.live.page.view import (
    N_HISTORY,
    PageState,
    Traces,
    group_channels,
    judge_channels,
    place_on_head,
)
from braindecode_vis.parts.live.session import LiveSession
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, DeviceState, Listener, StreamInfo
from tests.parts.live.scripted import FACTS, IDS, INFO, NAMES, Script


def read(frame):
    """Undo what is done for the browser: minimum and maximum of each row and column."""
    whole = np.frombuffer(base64.b64decode(frame["data"]), "<i2").reshape(len(frame["centre"]), 2, -1)
    values = np.asarray(frame["centre"])[:, None, None] + whole * frame["step"]
    return np.where(whole == -32_768, np.nan, values)


def test_the_link_the_battery_and_impedances_are_shown_as_far_as_the_stream_tells_them():
    state = PageState()
    state.begin(StreamInfo("cap", "eeg", ("Fz", "Oz"), 100.0, "uV"), {})
    rng = np.random.default_rng(0)
    times = np.arange(30_000) / 100 + np.where(
        np.arange(30_000) >= 9000, 0.5, 0.0
    )  # 50 samples, three minutes ago
    times[29_000:] += 0.03
    for start in range(0, 30_000, 50):
        part = slice(start, start + 50)
        samples = rng.normal(size=(2, 50)) * [[10], [20]] + np.arange(50)
        state.hear(Chunk(samples, times[part]), 1.0)
    assert state.view_link() == {"samples": 30_000, "missing": 53, "recent": 3}
    state.judge()
    assert state.amplitude == pytest.approx([17.6, 24.6], rel=0.2)  # with the steps of the ramp; 2 s of noise
    for device in (
        DeviceState(0.83),
        DeviceState(None, {"Oz": 4.5, "EOG": 9.0}),
        DeviceState(0.82, {"Fz": np.nan}),
        DeviceState(np.nan),
    ):
        state.hear(Chunk(samples, times[part], device=device), 2.0)
    assert state.view_link()["battery"] == 0.82
    assert state.view_link()["impedance"] == [None, 4.5]
    json.dumps(state.view_link(), allow_nan=False)


def test_work_is_shown_with_how_long_it_has_taken():
    state = PageState()
    event = state.work("refitting", time.perf_counter() - 12, 3, 10)
    assert event["work"]["what"] == "refitting"
    assert (event["work"]["done"], event["work"]["total"]) == (3, 10)
    assert event["work"]["seconds"] >= 12
    assert state.view()["work"]["seconds"] >= event["work"]["seconds"]  # for a browser that comes later
    assert state.work("", 0.0, 0, None)["work"] is None


def test_traces_are_minimum_and_maximum_of_columns_however_the_samples_come():
    rng = np.random.default_rng(0)
    samples, times = rng.normal(size=(3, 1200)) + 5000, 10 + np.arange(1200) / 600
    together, apart = Traces(3, 600.0, seconds=2), Traces(3, 600.0, seconds=2)
    together.add(samples, times)
    for start in range(0, 1200, 7):
        apart.add(samples[:, start : start + 7], times[start : start + 7])
    np.testing.assert_array_equal(together.columns, apart.columns)
    values = read(together.view(0))
    # every extreme of the last seconds is kept, to the step of 16 bits
    assert np.nanmax(values) == pytest.approx(samples.max(), abs=1e-3)
    assert np.nanmin(values) == pytest.approx(samples.min(), abs=1e-3)


def test_traces_go_on_where_a_browser_stopped_and_gaps_stay_open():
    traces = Traces(1, 100.0, seconds=2)
    traces.add(np.ones((1, 50)), np.arange(50) / 100)
    since = traces.next
    traces.add(np.ones((1, 50)), 1 + np.arange(50) / 100)  # half a second was lost
    frame = traces.view(since)
    assert frame["first"] == since - 1  # the last column may have grown
    missing = np.isnan(read(frame)[0, 0])
    assert missing.sum() == pytest.approx(30, abs=1)
    traces.add(np.ones((1, 50)), np.arange(50) / 100 - 500)  # the clock jumps: the picture goes on
    assert traces.next - since == pytest.approx(90, abs=3)
    traces.add(np.ones((1, 5000)), np.arange(5000) / 100)  # longer than what is kept
    assert not np.isnan(traces.columns).any()


def test_channels_are_judged():
    chunk = Script().make_chunk(500)
    words = dict(zip(NAMES, judge_channels(chunk.samples, microvolts=True), strict=True))
    bad = {"TP9": "missing", "FT10": "flat", "T8": "noisy", "F7": "railed"}
    assert {name: word for name, word in words.items() if word != "good"} == bad
    # without a unit what is flat is told by the others
    assert judge_channels(chunk.samples * 1e-6, microvolts=False) == list(words.values())


def test_electrodes_lie_where_they_are():
    places = dict(zip(NAMES, place_on_head(NAMES), strict=True))
    assert places["Fz"][1] > places["Cz"][1] > places["Oz"][1]
    assert places["C3"][0] < -0.2 < 0.2 < places["C4"][0]
    assert np.hypot(*places["Cz"]) < 0.2
    assert place_on_head(["EXG1"]) == [None]
    assert list(group_channels(NAMES, None)) == ["frontal", "temporal", "central", "parietal", "occipital"]
    assert group_channels(NAMES, {"back": ["Oz", "gone", 0]}) == {"back": [NAMES.index("Oz"), 0]}


def test_counts_stay_right_and_memory_bounded_over_hundreds_of_decisions():
    state, script = PageState(), Script()
    state.begin(INFO, FACTS)
    ranks = []
    for n in range(400):
        lost = f"{n} of 250 samples of the epoch were lost" if n % 100 == 99 else ""
        decision = script.make_decision(lost=lost, image=np.zeros((8, 8, 3), np.uint8))
        state.decide(decision)
        ranks += [] if lost else [decision.rank]
    state.decide(dataclasses.replace(decision, image=np.ones((8, 8, 3), np.uint8)))  # its image came later
    view = state.view()
    assert len(view["decisions"]) == N_HISTORY
    assert len(state.images) <= 40
    score = view["score"]
    assert (score["decided"], score["lost"], score["scored"]) == (396, 4, 396)
    assert score["top1"] == sum(rank == 1 for rank in ranks)
    assert score["chance"] == 1 / len(IDS)
    assert score["interval"][0] < score["top1"] / 396 < score["interval"][1]
    assert view["lost"] == [{"reason": "399 of 250 samples of the epoch were lost", "n": 4}]
    assert view["latency"]["n"] == 396
    # the epoch is drawn of the last decision alone
    assert sum(bool(row["epoch"]) for row in view["decisions"]) <= 1
    assert len(json.dumps(view, allow_nan=False)) < 300_000


def test_numbers_that_are_not_finite_reach_no_browser():
    state = PageState()
    state.begin(INFO, {**FACTS, "ceiling": np.nan, "who": np.float32(2)})
    decision = Script().make_decision()
    bad = dataclasses.replace(
        decision, probability=np.full(5, np.nan), latency={"wait": np.inf}, epoch=np.full((39, 9), np.nan)
    )
    json.dumps([state.decide(bad), state.view()], allow_nan=False)


def test_volumes_are_drawn_as_means_of_regions():
    state = PageState()
    info = StreamInfo("bold", "fmri", (), 0.5, "", "events")
    state.begin(info, {"regions": {"V1": [0, 1], "V2": [2, 3]}, "gallery_size": 10})
    assert state.stream["channels"] == ["V1", "V2"]
    for n in range(4):
        state.hear(Chunk(np.array([[1.0], [3], [5], [7]]) + n, np.array([2.0 * n])), 1.0)
    np.testing.assert_allclose(read(state.traces.view(0))[:, 0], [[2, 3, 4, 5], [6, 7, 8, 9]], atol=1e-3)
    assert state.judge() == []


class Told(Listener):
    """Keeps what it gets."""

    def __init__(self):
        self.sentences, self.summary = [], {}

    def tell(self, sentence, level="info"):
        self.sentences.append((level, sentence))

    def end(self, summary):
        self.summary = summary


@pytest.mark.parametrize(("constant", "n_warnings"), [(True, 1), (False, 0)])
def test_decisions_that_name_one_picture_are_warned_of(constant, n_warnings):
    """30 of 30 live decisions named one picture, and neither page nor terminal said so."""
    shown = [IDS[n % len(IDS)] for n in range(30)]
    decisions = [
        Decision(n, float(n), name, name, top=(IDS[0] if constant else name, IDS[1]), rank=2)
        for n, name in enumerate(shown)
    ]
    empty = Chunk(np.empty((len(NAMES), 0)), np.empty(0), ended=True)
    source = SimpleNamespace(connect=lambda: INFO, read=lambda wait: empty, close=lambda: None)
    decoder = SimpleNamespace(
        open=lambda info: [], describe=lambda: FACTS, feed=lambda chunk: decisions, flush=lambda: []
    )
    told = Told()
    summary = LiveSession(source, decoder, [told]).run()
    warnings = [sentence for level, sentence in told.sentences if level == "warning"]
    assert len(warnings) == n_warnings
    assert all(f"decisions have {IDS[0]!r} at rank 1" in sentence for sentence in warnings)
    assert ("30 of 30 decisions have" in summary.get("warning", "")) == constant
    assert any("warning: 30 of 30" in line for line in describe_summary(summary)) == constant
