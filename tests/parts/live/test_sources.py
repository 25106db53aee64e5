"""Sources of streams: times from stamps, a FieldTrip buffer, LSL over loopback, and a class from outside."""

import contextlib
import json
import socket
import struct
import sys
import threading
import time
import uuid

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.live import listeners, replay
from braindecode_vis.parts.live.listeners import OutletListener
from braindecode_vis.parts.live.opening import open_source
from braindecode_vis.parts.live.sources import FieldTripSource, LslSource, SampleClock
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, StreamInfo, StreamSource

# --- times from stamps ------------------------------------------------------------------------------------------------


def follow(jitter_s, *, sfreq=250.0, drop=0.01, drift=1e-4, n_chunks=1500, seed=0):
    """Return lost samples as they were and as they were reported, and errors of times in s, mean lateness taken off."""
    rng, clock = np.random.default_rng(seed), SampleClock(sfreq)
    errors, n_lost, told, due, last = [], 0, 0, 0.0, -1.0
    start = []
    for number in range(n_chunks):
        true = (number * 20 + np.arange(20)) / (sfreq * (1 + drift))
        if rng.random() < drop and number > 40:
            n_lost += 20
            continue
        due = max(due, true[-1] + abs(rng.standard_normal()) * jitter_s)
        stamps = due + true - true[-1]
        start.append(stamps)
        if number == 30:
            clock.learn(np.concatenate(start))
        times, notes = clock.follow(stamps, true[-1])
        told += sum(int(note.split()[0]) for note in notes)
        assert times[0] > last
        assert (np.diff(times) > 0).all()
        last = times[-1]
        errors.append(times[-1] - true[-1])
    return n_lost, told, np.array(errors[200:]) - np.median(errors[200:])


@pytest.mark.parametrize(("jitter_s", "worst"), [(0.0, 1e-4), (0.001, 3e-3), (0.005, 15e-3)])
def test_jitter_is_smoothed_and_lost_chunks_stay_gaps(jitter_s, worst):
    """liblsl's own smoothing counts samples: behind one lost chunk of 80 ms its times are wrong by that for minutes."""
    n_lost, told, errors = follow(jitter_s)
    assert n_lost > 200
    assert abs(told - n_lost) <= 0.02 * n_lost
    assert np.abs(errors).max() < worst
    # A tenth of the raw jitter, for most chunks.
    assert np.median(np.abs(errors)) <= max(0.3 * jitter_s, 1e-4)


def test_a_loss_that_jitter_hides_is_told_a_little_later():
    n_lost, told, _ = follow(0.004, sfreq=1000.0)
    assert abs(told - n_lost) <= 0.1 * n_lost


@pytest.mark.parametrize("jitter_s", [0.01, 0.02])
def test_losses_shorter_than_jitter_are_told_when_the_phase_has_followed(jitter_s):
    n_lost, told, _ = follow(jitter_s, sfreq=1000.0, n_chunks=4000)
    assert abs(told - n_lost) <= 0.2 * n_lost
    assert follow(jitter_s, sfreq=1000.0, drop=0.0, n_chunks=4000)[1] <= 0.1 * n_lost


def test_a_clock_that_is_set_makes_no_jump():
    clock, chunk = SampleClock(100.0), np.arange(10) / 100
    notes = []
    for number, ahead in enumerate([0, 0, 0, 3600, 3600, -50, -50]):
        times, told = clock.follow(5 + number * 0.1 + ahead + chunk, number * 0.1)
        assert np.allclose(times, 5 + number * 0.1 + chunk)
        notes += told
    assert [note.split(";")[0] for note in notes] == [
        "the clock of the sender was set ahead by 3600.000 s", "the clock of the sender was set back by 3650.000 s",
    ]  # fmt: skip
    assert clock.offset == pytest.approx(50)  # what markers of the same sender are moved by


# --- a FieldTrip buffer -----------------------------------------------------------------------------------------------


class Buffer:
    """Stands in for a FieldTrip buffer, written from the description of its protocol, version 1.

    It answers in the byte order of the client, which the version of a request shows.
    """

    def __init__(self, values, sfreq=250.0, kind=9, names=(), resolutions=(), kept=10_000):
        self.types = {1: "u1", 6: "i2", 7: "i4", 9: "f4", 10: "f8"}
        self.values, self.sfreq, self.kind = (
            values,
            sfreq,
            kind,
        )  # values: (n_samples, n_channels), all that will come
        self.names, self.resolutions, self.kept = names, resolutions, kept
        self.n_samples, self.events, self.has_header = 0, [], True
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.links = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                link, _ = self.listening.accept()
            except OSError:
                return
            self.links.append(link)
            threading.Thread(target=self.talk, args=(link,), daemon=True).start()

    def close(self):
        for link in (self.listening, *self.links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    def talk(self, link):
        with contextlib.suppress(OSError), link, link.makefile("rb") as file:
            while head := file.read(8):
                order = "<" if head[:2] == b"\x01\x00" else ">"
                _, command, size = struct.unpack(f"{order}HHI", head)
                code, answer = self.answer(command, file.read(size), order)
                link.sendall(struct.pack(f"{order}HHI", 1, code, len(answer)) + answer)

    def answer(self, command, asked, order):
        if not self.has_header:
            return (0x405 if command == 0x402 else 0x205), b""
        if command == 0x201:
            names = b"".join(name.encode() + b"\0" for name in self.names)
            chunks = struct.pack(f"{order}II", 4, 2) + b"\0\0"  # one that nobody needs to know
            chunks += struct.pack(f"{order}II", 1, len(names)) + names if names else b""
            if len(self.resolutions):
                scale = np.array(self.resolutions, f"{order}f8").tobytes()
                chunks += struct.pack(f"{order}II", 3, len(scale)) + scale
            n_channels = self.values.shape[1]
            fixed = (n_channels, self.n_samples, len(self.events), self.sfreq, self.kind, len(chunks))
            return 0x204, struct.pack(f"{order}IIIfII", *fixed) + chunks
        if command == 0x202:
            first, last = struct.unpack(f"{order}II", asked)
            if last >= self.n_samples or first < self.n_samples - self.kept:
                return 0x205, b""
            data = self.values[first : last + 1].astype(f"{order}{self.types[self.kind]}").tobytes()
            return 0x204, struct.pack(
                f"{order}IIII", self.values.shape[1], last + 1 - first, self.kind, len(data)
            ) + data
        if command == 0x203:
            first, last = struct.unpack(f"{order}II", asked)
            return 0x204, b"".join(self.pack(event, order) for event in self.events[first : last + 1])
        n_samples, n_events, timeout = struct.unpack(f"{order}III", asked)
        end = time.monotonic() + timeout / 1000
        while self.n_samples <= n_samples and len(self.events) <= n_events and time.monotonic() < end:
            time.sleep(0.002)
        return 0x404, struct.pack(f"{order}II", self.n_samples, len(self.events))

    def pack(self, event, order):
        sample, name, value = event
        if isinstance(value, str):
            kind, n, held = 0, len(value), value.encode()
        else:
            kind, n, held = 7, 1, struct.pack(f"{order}i", value)
        fixed = (0, len(name), kind, n, sample, 0, 0, len(name) + len(held))
        return struct.pack(f"{order}IIIIiiiI", *fixed) + name.encode() + held


@pytest.fixture
def make_buffer():
    made = []

    def make(*values, **options):
        made.append(Buffer(*values, **options))
        return made[-1]

    yield make
    for buffer in made:
        buffer.close()


COUNTING = np.stack([np.arange(1000), 1000 + np.arange(1000), np.arange(1000) // 100 % 3], axis=1)


@pytest.mark.parametrize(("order", "kind"), [("<", 9), (">", 6), ("<", 10)])
def test_samples_and_events_of_a_buffer_in_both_byte_orders(make_buffer, order, kind):
    buffer = make_buffer(COUNTING, kind=kind, names=("Fz", "Oz", "TRIG"), resolutions=(0.5, 2.0, 1.0))
    buffer.n_samples, buffer.events = 5, [(2, "old", "before")]
    source = open_source("fieldtrip", f"127.0.0.1:{buffer.port}")
    source._order = order
    info = source.connect()
    assert (info.ch_names, info.sfreq, info.modality, info.unit) == (("Fz", "Oz", "TRIG"), 250.0, "eeg", "uV")
    assert source.read(0.01).samples.shape == (3, 0)  # nothing is new
    buffer.n_samples, buffer.events = 105, [*buffer.events, (40, "image", "cat"), (90, "image", 7)]
    chunk = source.read(1.0)
    assert np.array_equal(chunk.samples, (COUNTING[5:105] * (0.5, 2.0, 1.0)).T)
    assert np.allclose(chunk.times, np.arange(5, 105) / 250)
    assert [(m.time, m.value) for m in chunk.markers] == [(40 / 250, "cat"), (90 / 250, "7")]
    source.close()
    source.close()


def test_markers_of_one_type_or_of_a_trigger_channel(make_buffer):
    buffer = make_buffer(COUNTING, names=("MLC11", "MRO12", "TRIG"))
    chosen = FieldTripSource(f"127.0.0.1:{buffer.port}", markers="image")
    triggered = FieldTripSource(f"127.0.0.1:{buffer.port}", markers="TRIG")
    assert chosen.connect().modality == "meg"
    info = triggered.connect()
    assert (info.ch_names, info.markers) == (("MLC11", "MRO12"), "trigger channel TRIG")
    buffer.n_samples, buffer.events = 350, [(1, "button", "left"), (3, "image", "dog")]
    assert [m.value for m in chosen.read(1.0).markers] == ["dog"]
    assert [(m.time * 250, m.value) for m in triggered.read(1.0).markers] == [(100, "1"), (200, "2")]
    chosen.close()
    triggered.close()


def test_a_buffer_that_ran_over_was_emptied_or_came_back(make_buffer):
    buffer = make_buffer(COUNTING, kept=150)
    source = FieldTripSource(f"127.0.0.1:{buffer.port}")
    assert source.connect().ch_names == ("1", "2", "3")
    buffer.n_samples = 400
    chunk = source.read(1.0)
    n_lost = int(chunk.notes[0].split(": ")[1].split()[0])
    assert n_lost >= 250
    assert chunk.samples[0].tolist() == list(range(n_lost, 400))
    assert chunk.times[0] == n_lost / 250
    buffer.n_samples = 30  # emptied and written again
    chunk = source.read(0.1)
    assert "emptied" in chunk.notes[0]
    assert np.allclose(chunk.times, np.arange(400, 430) / 250)
    for link in buffer.links:
        link.shutdown(socket.SHUT_RDWR)
    assert "connection to the buffer ended" in source.read(0.2).notes[0]
    assert "available again" in source.read(0.2).notes[0]
    buffer.n_samples = 60
    assert np.allclose(source.read(1.0).times, np.arange(430, 460) / 250)
    source.close()


def test_what_is_no_buffer_is_said(make_buffer):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        DataError, match=rf"no FieldTrip buffer answers on 127\.0\.0\.1:{port} \(Connection refused\)"
    ):
        FieldTripSource(f"127.0.0.1:{port}").connect()
    silent = make_buffer(COUNTING)
    silent.has_header = False
    with pytest.raises(DataError, match="nothing writes into it; start the acquisition"):
        FieldTripSource(f"127.0.0.1:{silent.port}", timeout=0.1).connect()
    other = make_buffer(COUNTING)
    other.answer = lambda command, asked, order: (0x204, b"HTTP")
    with pytest.raises(DataError, match="is not a FieldTrip buffer"):
        FieldTripSource(f"127.0.0.1:{other.port}").connect()
    with pytest.raises(ConfigError, match=r"host:port, for example localhost:1972, not 'host:x'"):
        FieldTripSource("host:x")


# --- classes from outside ---------------------------------------------------------------------------------------------

OUTSIDE = """
import numpy as np
from braindecode_vis.parts.live.stream_roles import Chunk, StreamInfo

class Sines:
    def __init__(self, name, hertz=10.0):
        self.name, self.hertz = name, hertz
    def connect(self):
        return StreamInfo(self.name, "eeg", ("Oz",), 100.0)
    def read(self, timeout):
        times = np.arange(10) / 100
        return Chunk(np.sin(2 * np.pi * self.hertz * times)[None], times)
    def close(self):
        pass

class Half:
    def connect(self): ...
"""


def test_a_source_from_outside_the_package(tmp_path, monkeypatch):
    module = f"outside_{uuid.uuid4().hex}"
    (tmp_path / f"{module}.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    source = open_source(f"{module}:Sines", "mine", hertz=20.0)
    assert isinstance(source, StreamSource)
    assert (source.connect().name, source.hertz) == ("mine", 20.0)
    for kind, options, said in (
        (f"{module}:Sines", {"herz": 1}, "has no option 'herz'; it has hertz"),
        (f"{module}:Half", {}, "is missing the method read"),
        (f"{module}:None_", {}, "has no 'None_'"),
        ("no_such_module_here:Sines", {}, "there is no module 'no_such_module_here'"),
        ("lls", {}, "must be one of lsl, fieldtrip, folder, replay, phantom, or package.module:Class"),
        ("lsl", {"speed": 2}, "--source lsl has no option 'speed'"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_source(kind, "mine", **options)
    sys.modules.pop(module)


# --- the Lab Streaming Layer, over loopback ---------------------------------------------------------------------------


@pytest.mark.parametrize(("sfreq", "told"), [(250.0, False), (255.0, False), (240.0, True), (1000.0, True)])
def test_another_rate_than_the_stream_says_is_told_once_after_ten_seconds(sfreq, told):
    source, first = LslSource("EEG"), 5000.0
    source._sfreq = 250.0
    notes: list[str] = []
    for number in range(round(sfreq * 30) // 20):
        stamps = first + (20 * number + np.arange(20)) / sfreq
        source._check_rate(stamps, notes)
        assert stamps[-1] - first > 10 or not notes
    expected = f"{sfreq:.1f} samples per second arrived in the first 10 s, but the stream states 250 Hz."
    assert notes == [expected] * told


@pytest.fixture(scope="module")
def lsl():
    pytest.importorskip("mne_lsl", reason="the extra live is not installed")
    from braindecode_vis.parts.live.sources import load_lsl

    return load_lsl("the tests")


def make_playback(n_samples, sfreq=250.0):
    """Return counting samples with a marker every quarter of a second, one that is wide of the ends of chunks."""
    values = np.stack([np.arange(n_samples), -np.arange(n_samples)]).astype(float)
    step = round(sfreq / 4)
    info = StreamInfo("counting", "eeg", ("Fz", "Oz"), sfreq, "uV", "a few")
    markers = [(at, f"image {at}") for at in range(7, n_samples, step)]
    return replay.Playback(info, ("eeg", "eeg"), lambda: iter([(values, markers)]), n_samples)


def play_beside(playback, name, **options):
    stop = threading.Event()
    told = {}

    def run():
        told.update(replay.play(playback, name, wait=True, stop=stop, **options))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, stop, told


def read_until(source, n_samples, seconds):
    chunks, n, end = [], 0, time.monotonic() + seconds
    while n < n_samples and time.monotonic() < end:
        chunks.append(source.read(0.2))
        n += chunks[-1].samples.shape[1]
    return chunks


@pytest.mark.slow
def test_a_stream_over_loopback_that_pauses_and_comes_back(lsl):
    """Samples come exactly and once, markers with their times; a pause of the sender is a gap, and the rest goes on."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    faults = replay.Faults(pauses=((1.0, 0.6),))
    thread, stop, told = play_beside(make_playback(1500), name, faults=faults, speed=2.0)
    source = open_source("lsl", name)
    info = source.connect()
    assert (info.name, info.ch_names, info.sfreq, info.unit, info.modality) == (
        name,
        ("Fz", "Oz"),
        250.0,
        "uV",
        "eeg",
    )
    assert info.markers == f"stream {name}-markers"
    with pytest.raises(DataError, match=rf"a stream of that name already exists \({name}"):
        replay.play(make_playback(10), name)
    chunks = read_until(source, 10_000, 5.0)
    stop.set()
    thread.join()
    source.close()
    source.close()
    samples = np.concatenate([chunk.samples for chunk in chunks], axis=1)
    times = np.concatenate([chunk.times for chunk in chunks])
    markers = [marker for chunk in chunks for marker in chunk.markers]
    numbers = samples[0].astype(int)
    assert np.array_equal(samples[1], -samples[0])
    assert numbers[0] == 0
    assert (np.diff(numbers) > 0).all()
    # All is there but the pause, and what was sent before the sender was found again.
    gap = int(np.argmax(np.diff(numbers)))
    assert (np.delete(np.diff(numbers), gap) == 1).all()
    assert 150 <= numbers[gap + 1] - numbers[gap] - 1 <= 1000
    assert numbers[-1] == 1499
    # Each sample, behind the gap too, lies where its number says.
    origin = times[0] - numbers[0] / 250
    assert np.abs(times - origin - numbers / 250).max() < 0.002
    assert len(markers) == told["n_markers"] == len(range(7, 1500, 62))
    for marker in markers:
        assert abs(marker.time - origin - int(marker.value.split()[1]) / 250) < 0.002
    notes = " ".join(note for chunk in chunks for note in chunk.notes)
    assert "no samples arrive; looking for the stream" in notes
    assert "the stream is available and connected again" in notes
    assert 1330 <= told["n_samples"] <= 1370  # the pause is one of whole chunks


def make_outlet(lsl, name, source_id, *, sfreq=100.0, channels=("Fz", "Oz", "TRIG"), units=("volts",) * 3):
    described = lsl.StreamInfo(name, "EEG", len(channels), sfreq, "float32", source_id)
    described.set_channel_names(list(channels))
    described.set_channel_types(["eeg", "eeg", "stim"][: len(channels)])
    described.set_channel_units(list(units))
    return lsl.StreamOutlet(described)


@pytest.mark.parametrize("typed", [True, pytest.param(False, marks=pytest.mark.further)])
def test_battery_and_impedances_are_read_where_a_stream_sends_them(lsl, typed):
    """As channels of their own, with types or by their names, or as what was measured before."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    described = lsl.StreamInfo(name, "EEG", 4, 100.0, "float32", name)
    described.set_channel_names(["Fz", "Oz", "Battery", "Impedance Oz"])
    if typed:
        described.set_channel_types(["eeg", "eeg", "battery", "impedance"])
        described.set_channel_units(["microvolts", "microvolts", "percent", "ohm"])
    channels = described.desc.child("channels")
    channels.child("channel").append_child_value("impedance", "7.5")
    outlet = lsl.StreamOutlet(described)
    source = LslSource(name, timeout=5)
    info = source.connect()
    assert info.ch_names == ("Fz", "Oz")
    outlet.push_chunk(np.tile(np.array([1, 2, 80, 4000], np.float32), (20, 1)))
    while not len((chunk := source.read(0.2)).times):
        pass
    source.close()
    assert chunk.samples.shape[0] == 2
    assert chunk.device.battery == pytest.approx(0.8)
    assert chunk.device.impedance == {"Fz": 7.5, "Oz": 4.0 if typed else 4000.0}


def test_two_of_one_name_a_trigger_channel_and_what_is_missing(lsl):
    name = f"test-{uuid.uuid4().hex[:8]}"
    outlets = [
        make_outlet(lsl, name, f"{name}-a", units=("millivolts", "microvolts", "none")),
        make_outlet(lsl, name, f"{name}-b"),
    ]
    with pytest.raises(DataError, match=rf"2 streams have the name '{name}'.*{name}@ID"):
        LslSource(name, timeout=0.3).connect()
    with pytest.raises(
        DataError, match=rf"no trigger channel 'STI'; available streams: .*{name}: EEG.*Fz, Oz, TRIG"
    ):
        LslSource(f"{name}@{name}-a", markers="STI", timeout=0.3).connect()
    with pytest.raises(
        DataError, match=rf"there is no stream '{name}x' on the network; available streams: .*{name}"
    ):
        LslSource(f"{name}x", timeout=0.3).connect()
    source = LslSource(f"{name}@{name}-a", markers="TRIG", timeout=0.3)
    pushed = np.array([[1, 1000, 0], [2, 2000, 5], [3, 3000, 5], [4, 4000, 0], [5, 5000, 6]], np.float32)
    info = source.connect()
    outlets[0].push_chunk(pushed, lsl.local_clock())
    assert (info.ch_names, info.unit, info.markers) == (("Fz", "Oz"), "V", "trigger channel TRIG")
    (chunk,) = [each for each in read_until(source, 5, 2.0) if each.samples.shape[1]]
    assert np.allclose(chunk.samples, (pushed[:, :2] * (1e-3, 1e-6)).T)  # two units, brought to one
    assert [(m.time, m.value) for m in chunk.markers] == [(chunk.times[1], "5"), (chunk.times[4], "6")]
    source.close()
    outlets.append(make_outlet(lsl, f"{name}-irregular", name, sfreq=0.0))
    with pytest.raises(DataError, match="has no fixed rate"):
        LslSource(f"{name}-irregular", timeout=0.3).connect()
    for outlet in outlets:
        outlet._del()


@pytest.mark.slow
def test_two_sessions_on_one_stream_are_told_and_two_outlets_of_one_name_refused(lsl):
    name = f"test-{uuid.uuid4().hex[:8]}"
    outlet = make_outlet(lsl, name, name)
    first, second = LslSource(name, timeout=1.0), LslSource(name, timeout=1.0)
    first.connect()
    second.connect()
    for source, expected in ((first, False), (second, True)):
        notes = [note for chunk in read_until(source, 1, 0.2) for note in chunk.notes]
        assert any("decodes the stream" in note for note in notes) == expected
        source.close()
    with pytest.raises(
        ConfigError, match=r"a stream of that name already exists.*give --outlet another name"
    ):
        OutletListener(name)
    outlet._del()


@pytest.mark.slow
def test_a_client_that_already_searches_gets_the_first_decision_of_an_outlet(lsl, monkeypatch):
    """It finds the stream half a second after it was offered, and LSL sends nothing that was sent before."""
    name, heard, searches = f"test-{uuid.uuid4().hex[:8]}", [], threading.Event()

    def listen():
        searches.set()
        (stream,) = lsl.resolve_streams(timeout=10.0, name=name, minimum=1)
        inlet = lsl.StreamInlet(stream)
        inlet.open_stream(timeout=5.0)
        while len(heard) < 3:
            sample, when = inlet.pull_sample(timeout=5.0)
            heard.append((json.loads(sample[0])["marker"], when))

    client = threading.Thread(target=listen)
    outlet = OutletListener(name)
    client.start()
    searches.wait()
    outlet.begin(StreamInfo(name, "eeg", ("Oz",), 100.0), {})
    decided = lsl.local_clock()
    for n, marker in enumerate("abc"):
        outlet.decide(Decision(n, float(n), marker))
    while client.is_alive():
        outlet.hear(Chunk(np.empty((1, 0)), np.empty(0)))
        client.join(0.05)
    assert [marker for marker, _ in heard] == ["a", "b", "c"]
    assert abs(heard[0][1] - decided) < 0.3  # when it was decided, not when it was sent
    outlet.end({})
    # Without a client nothing is kept for ever.
    monkeypatch.setattr(listeners, "CLIENTS_S", 0.0)
    alone = OutletListener(f"{name}-alone")
    alone.begin(StreamInfo(name, "eeg", ("Oz",), 100.0), {})
    alone.decide(Decision(0, 0.0, "a"))
    assert alone._markers._kept is None


@pytest.mark.parametrize(("drift", "followed"), [(0.97, 0.99), (0.995, 0.995), (1.005, 1.005), (1.03, 1.01)])
def test_the_period_of_a_stream_follows_its_clock_by_a_hundredth_at_most(drift, followed):
    """Clocks of machines differ by far less: what is further off are losses and odd stamps."""
    clock = SampleClock(100.0)
    for chunk in range(600):
        stamps = (10 * chunk + np.arange(10)) * drift / 100
        clock.follow(stamps, float(stamps[-1]))
    assert 100 * clock.period == pytest.approx(followed, rel=1e-3)


@pytest.mark.parametrize(
    "header", [(0, 0, 0, 250.0, 9), (4, 0, 0, 0.0, 9), (4, 0, 0, -1.0, 9), (4, 0, 0, 250.0, 0)]
)
def test_a_header_without_channels_or_rate_or_type_makes_no_signal(monkeypatch, header):
    source = FieldTripSource("127.0.0.1:1972")
    monkeypatch.setattr(source, "_dial", lambda: None)
    monkeypatch.setattr(source, "_get_header", lambda: (header, {}))
    with pytest.raises(DataError, match="is not a signal"):
        source._introduce()
    monkeypatch.setattr(source, "_get_header", lambda: ((4, 0, 0, 250.0, 9), {}))
    assert source._introduce() == ((4, 0, 0, 250.0, 9), {})
