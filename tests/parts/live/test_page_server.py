"""The server of the live page: who may read it, what a late browser gets, and that it holds nobody up."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.live.page import server
from braindecode_vis.parts.live.page.server import PageListener, PageProgress, encode_picture
from braindecode_vis.parts.live.recording import BidsRecorder
from braindecode_vis.parts.live.session import LiveSession
from braindecode_vis.pipeline.runs import SilentListener
from tests.parts.live.scripted import FACTS, IDS, INFO, Block, Script, find_images

connect = pytest.importorskip("websockets.sync.client").connect
InvalidStatus = pytest.importorskip("websockets.exceptions").InvalidStatus
ConnectionClosed = pytest.importorskip("websockets.exceptions").ConnectionClosed


@pytest.fixture(scope="module")
def page():
    page = PageListener(find_images=find_images, calibration=Block())
    page.start()
    page.begin(INFO, FACTS)
    Script().play(page, 5)
    yield page
    page.end({})


def ask(page, path, **headers):
    """Return status, headers and body of a request with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def listen(page, path="live", **more):
    cookie = {"Cookie": f"live-{page.port}={page.token}"}
    return connect(
        f"ws://127.0.0.1:{page.port}/{path}", additional_headers=cookie, proxy=None,
        origin=f"http://127.0.0.1:{page.port}", max_size=None, **more,
    )  # fmt: skip


def hear(ws, kind):
    """Return the first event of a kind."""
    while True:
        for event in json.loads(ws.recv()):
            if event["type"] == kind:
                return event


class Ear:
    """Hears events of one kind, and keeps the others for later."""

    def __init__(self, ws):
        self.ws, self.kept = ws, []

    def hear(self, kind):
        while True:
            for event in self.kept:
                if event["type"] == kind:
                    self.kept.remove(event)
                    return event
            self.kept = [one for one in self.kept if one["type"] != "signal"] + json.loads(self.ws.recv())


def test_only_the_token_opens_the_page(page):
    for path in ("/", "/?token=wrong", "/static/live.js", "/image?id=" + IDS[0], "/reconstruction/0"):
        status, _, body = ask(page, path)
        assert (status, body.decode().strip()) == (403, server.REFUSED)
    status, headers, _ = ask(page, f"/?token={page.token}")
    assert (status, headers["location"]) == (303, "/")  # the token leaves the address bar
    assert "HttpOnly" in headers["set-cookie"]
    cookie = headers["set-cookie"].partition(";")[0]
    status, headers, body = ask(page, "/", Cookie=cookie)
    assert status == 200
    assert b"Live decoding" in body
    assert page.token.encode() not in body
    assert "default-src 'none'" in headers["content-security-policy"]
    assert ask(page, "/static/live.css", Authorization=f"Bearer {page.token}")[0] == 200
    assert ask(page, "/static/..%2fserver.py", Cookie=cookie)[0] == 404


def test_the_address_that_a_browser_is_opened_with_works_once(page, monkeypatch):
    """Whoever lists the processes of the machine reads the address."""
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page.open_browser()
    path = "/?" + opened[0].partition("?")[2]
    assert page.token not in path
    assert [ask(page, path)[0] for _ in range(2)] == [303, 403]


def test_names_that_others_point_here_and_pages_of_others_are_refused(page):
    cookie = f"live-{page.port}={page.token}"
    for headers in (
        {"Host": f"evil.example:{page.port}"},
        {"Host": f"127.0.0.1.evil.example:{page.port}"},
        {"Origin": "http://evil.example"},
        {"Origin": f"http://127.0.0.1:{page.port + 1}"},
        {"Origin": "null"},
    ):
        status, _, body = ask(page, "/", Cookie=cookie, **headers)
        assert status == 403, headers
        assert body.count(b".") >= 1
    assert ask(page, "/", Cookie=cookie, Host=f"localhost:{page.port}")[0] == 200
    address = f"ws://127.0.0.1:{page.port}/live"
    for more in (
        {},
        {"origin": "http://evil.example", "additional_headers": {"Cookie": cookie}},
        {"additional_headers": {"Cookie": cookie}},
    ):
        with pytest.raises(InvalidStatus) as refused:
            connect(address, proxy=None, **more)
        assert refused.value.response.status_code == 403
        assert refused.value.response.body.decode().strip().endswith(".")


def test_images_come_small_and_what_is_unknown_or_broken_is_not_there(page, tmp_path):
    key = {"Authorization": f"Bearer {page.token}"}
    status, headers, body = ask(page, f"/image?id={IDS[3]}", **key)
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert body[:2] == b"\xff\xd8"
    assert ask(page, "/image?id=../../etc/passwd", **key)[0] == 404
    assert ask(page, "/image?id=", **key)[0] == 404
    digit = np.zeros((28, 28, 3), np.uint8)
    assert encode_picture(digit, 384)[1] == "image/png"  # its pixels are enlarged, not blurred


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"/reconstruction/{number}", 404)
        for number in ("77", "9" * 5000, "-1", "1e9", "%D9%A1", "%00", "0x10", "", "1/2")
    ]
    + [(f"/image?id={name}", 404) for name in ("9" * 5000, "%00", "%FF", "a/" * 2000, "../../etc/passwd")]
    + [(f"/image?of={'9' * 5000}&id={IDS[0]}", 200), ("/nothing", 404), ("/static/" + "9" * 5000, 404)]
    + [(f"/?token={'9' * 5000}", 200), ("/calibrate?block=" + "9" * 5000, 200), ("/" + "9" * 50_000, 404)],
)
def test_absurd_addresses_get_one_sentence(page, capfd, path, code):
    """An address of 5000 digits was a traceback on the terminal, and "Internal Server Error" in the browser."""
    status, _, body = ask(page, path, Authorization=f"Bearer {page.token}")
    assert status == code
    if code != 200:
        assert body.decode().strip().startswith(("There is no", "This reconstruction"))
        assert body.count(b"\n") == 1
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("origin", ["http://[", "http://" + "9" * 5000, "://", "9" * 5000])
def test_origins_that_are_no_addresses_are_refused(page, origin):
    status, _, body = ask(page, "/", Authorization=f"Bearer {page.token}", Origin=origin)
    assert (status, body.decode()) == (403, "Pages from other addresses may not read this page.\n")


@pytest.mark.parametrize("text", ["[" * 20_000, '{"type": ' + "9" * 5000 + "}", "9" * 5000])
def test_absurd_messages_get_one_sentence(page, capfd, text):
    with listen(page) as ws:
        ws.send(text)
        while not (answer := hear(ws, "answer"))["sentence"]:
            pass
        assert answer["sentence"] == server.NO_MESSAGE
    late = json.dumps({"type": "onset", "index": 0, "time": 10**400, "uncertainty": 0})
    for message in (text, late):
        with listen(page, "calibration") as ws:
            ws.send(message)
            with pytest.raises(ConnectionClosed, match="not a message of a calibration page"):
                list(ws)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.fixture
def recorded(tmp_path):
    """A page beside a session that decides nothing, and its recording, which waits for the page."""
    script = Script()

    class Endless:
        def connect(self):
            return INFO

        def read(self, timeout):
            time.sleep(0.02)
            return script.make_chunk()

        def close(self):
            pass

    decoder = SimpleNamespace(
        open=lambda info: [], describe=lambda: FACTS, feed=lambda chunk: [], flush=lambda: []
    )
    session = LiveSession(Endless(), decoder)
    recorder = BidsRecorder(tmp_path / "recorded", notify=session.tell, waits=True)
    page = PageListener()
    session.add(recorder)
    session.add(page)
    page.control(recorder, session.ask)
    page.start()
    thread = threading.Thread(target=session.run)
    thread.start()
    while page.state.recording is None:  # the stream is there, and the page knows of the recording
        time.sleep(0.01)
    yield page, recorder
    session.stop()
    thread.join()


def test_a_browser_starts_and_stops_the_recording_and_adds_notes(recorded):
    page, recorder = recorded
    with listen(page) as ws:
        ear = Ear(ws)
        assert ear.hear("state")["recording"] == {"on": False, "where": ""}

        def say(text):
            ws.send(text if isinstance(text, str) else json.dumps(text))
            return ear.hear("answer")["sentence"]

        assert "Nothing is recorded now" in say({"type": "note", "text": "early"})
        assert say({"type": "record", "on": True}) == ""
        assert ear.hear("recording")["recording"]["on"]
        for bad, words in (
            ({"type": "note", "text": " \n"}, "The note is empty"),
            ({"type": "note"}, "The note is empty"),
            ({"type": "note", "text": "x" * 1001}, "has 1,001 characters, but at most 1,000 fit"),
            ({"type": "format the disk"}, "not a message of the live page"),
            ({"type": "record"}, "not a message of the live page"),
            ("{", "not a message of the live page"),
            ("[]", "not a message of the live page"),
        ):
            assert words in (said := say(bad))
            assert said.count(". ") == 0  # one sentence
        assert say({"type": "note", "text": "blinks\tand moves "}) == ""
        while "blinks and moves" not in ear.hear("message")["message"]["sentence"]:
            pass
        assert say({"type": "note", "text": "half a character: \ud83d"}) == ""
        while "half a character: ?" not in ear.hear("message")["message"]["sentence"]:
            pass
        assert say({"type": "record", "on": False}) == ""
        assert not ear.hear("recording")["recording"]["on"]
    with listen(page) as ws:  # a browser that comes later
        assert hear(ws, "state")["recording"]["where"].endswith("run-01_eeg.vhdr")
    (notes,) = recorder.root.rglob("*_notes.tsv")
    assert notes.read_text().splitlines()[1].endswith("\tblinks and moves")


def test_only_the_page_of_this_server_may_record(recorded):
    """A page of another port of this machine has the cookie, too."""
    page, recorder = recorded
    cookie = {"Cookie": f"live-{page.port}={page.token}"}
    for origin in (None, "null", "http://evil.example", f"http://127.0.0.1:{page.port + 1}"):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{page.port}/live", additional_headers=cookie, proxy=None, origin=origin)
        assert refused.value.response.status_code == 403
    assert not recorder.is_recording


def test_a_session_without_a_recording_says_how_to_get_one(page):
    with listen(page) as ws:
        ws.send(json.dumps({"type": "record", "on": True}))
        assert hear(ws, "answer")["sentence"] == "This session has no recording: start it with --record DIR."


def test_a_browser_sees_what_takes_long_before_the_stream_is_there():
    page, steps = PageListener(), []

    class Quiet(SilentListener):
        @contextmanager
        def progress(self, description, total):
            yield steps.append

    page.start()
    with listen(page) as ws:
        ear = Ear(ws)
        assert ear.hear("state")["work"] is None
        with page.show_work("reading the run"):
            assert ear.hear("work")["work"]["what"] == "reading the run"
            with PageProgress(page, Quiet()).progress("refitting", 4) as advance:
                advance(3)
                while (found := ear.hear("work")["work"])["done"] < 3:
                    pass
                assert (found["what"], found["total"], steps) == ("refitting", 4, [3])
            assert ear.hear("work")["work"]["what"] == "reading the run"
            page.begin(INFO, FACTS)
            while ear.hear("work")["work"]:
                pass
    page.end({})


def test_a_late_and_a_returning_browser_get_what_they_missed(page):
    with listen(page) as ws:
        state = hear(ws, "state")
        assert [row["number"] for row in state["decisions"]] == [0, 1, 2, 3, 4]
        assert state["score"]["decided"] == 5
        first = hear(ws, "signal")
        script = Script(1)
        script.number = 5
        page.hear(script.make_chunk())
        page.decide(script.make_decision(lost="the stream ended within the epoch"))
        assert hear(ws, "decision")["decision"]["lost"].startswith("the stream ended")
        assert first["next"] > 0
    page.decide(script.make_decision())  # nobody listens
    page.tell("the stream is back", "warning")
    time.sleep(0.2)  # the server has noticed that its browser is gone; nothing depends on it
    with listen(page) as ws:
        state = hear(ws, "state")
        assert [row["number"] for row in state["decisions"]] == list(range(7))
        assert state["messages"][-1]["sentence"] == "the stream is back"
        page.decide("no decision at all")  # a bug elsewhere stops no page
        assert "could not show" in hear(ws, "message")["message"]["sentence"]


def test_a_browser_that_does_not_read_holds_nobody_up_and_misses_no_decision(monkeypatch):
    monkeypatch.setattr(server, "N_EVENTS", 50)
    page, script = PageListener(), Script()
    page.begin(INFO, FACTS)
    chunks = [script.make_chunk() for _ in range(20)]
    decisions = [script.make_decision() for _ in range(600)]
    with listen(page, max_queue=1) as ws:
        hear(ws, "state")
        for n, decision in enumerate(decisions):  # would never end if it waited for the browser
            page.hear(chunks[n % 20])
            page.decide(decision)
        assert len(page._events) <= 50
        assert len(page._chunks) <= 512
        seen, total = set(), 0
        while len(seen) < 200 or total < 600:
            for event in json.loads(ws.recv()):
                rows = event["decisions"] if event["type"] == "state" else [event.get("decision")]
                seen |= {row["number"] for row in rows if row}
                total = max(total, event.get("score", {}).get("decided", 0))
        assert total == 600
        assert set(range(400, 600)) <= seen  # the last ones, all of them
    page.end({"decisions": 600})
    page.end({})  # twice is no error
    assert not page._thread.is_alive()


def test_bad_settings_are_one_sentence():
    with pytest.raises(ConfigError, match="12 or more ASCII characters"):
        PageListener(token="short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is used by another program"):
            PageListener(port=port).start()
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1"):
        PageListener(host="192.0.2.1").start()


def test_calibration_measures_the_clock_and_goes_on_where_a_browser_left():
    block = Block(3)
    page = PageListener(calibration=block)
    page.start()

    def say(ws, **message):
        ws.send(json.dumps(message))
        return json.loads(ws.recv())

    with listen(page, "calibration") as ws:
        plan = json.loads(ws.recv())
        assert [one["stimulus_id"] for one in plan["showings"]] == IDS[:3]
        with listen(page, "calibration") as other:
            assert "Another window shows this block" in json.loads(other.recv())["sentence"]
        before = time.perf_counter()
        pong = say(ws, type="ping", sent=12.5)
        assert pong["sent"] == 12.5
        assert before <= pong["server"] <= time.perf_counter()
        at = time.perf_counter() - 0.02
        assert say(ws, type="onset", index=0, time=at, uncertainty=0.01)["type"] == "marked"
        # out of turn, or by a clock that jumped
        assert say(ws, type="onset", index=2, time=at, uncertainty=0.01) == {"type": "repeat", "next": 1}
        assert say(ws, type="onset", index=1, time=at - 100, uncertainty=0.01) == {
            "type": "repeat",
            "next": 1,
        }
    assert block.marks == [(IDS[0], at, 0.01)]
    time.sleep(0.15)  # a window that is still there would be in the way of the next one
    with listen(page, "calibration") as ws:
        assert json.loads(ws.recv())["next"] == 1
        assert say(ws, type="finish") == {
            "type": "finished",
            "complete": False,
            "sentence": "The encoder was adapted with 1 trials.",
        }
    assert block.ended == [False]
    assert "closed after 1 of 3" in page.state.messages[0]["sentence"]
    page.end({})
