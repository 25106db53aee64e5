"""The server of the live page: one thread beside the session, on this machine only, protected by a token.

Owns addresses, who may read them, the pace of messages to browsers, and the clock of a calibration block. The
session never waits: a listener's calls append to a list, and the thread of the server does the rest. Every browser has
a place in one bounded log of events; one that fell behind gets the whole state anew, so that no decision is missing in
counts. What is shown is `PageState`'s business.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import io
import ipaddress
import json
import secrets
import socket
import threading
import time
import webbrowser
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np

from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, require
from braindecode_vis.parts.live.page.view import PageState
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Listener, StreamInfo
from braindecode_vis.scoring.uncertainty import wilson_interval

if TYPE_CHECKING:
    from braindecode_vis.base.store import Artifact
    from braindecode_vis.pipeline.runs import ProgressListener

FindImages = Callable[[Sequence[str]], Sequence["Path | np.ndarray | None"]]

TICK = 0.1  # s between two looks at the signal
PAUSE = 0.05  # s between two messages to one browser at least
N_EVENTS = 1000  # that a browser may be behind before it gets the state anew
MAX_BROWSERS = 16
THUMBNAIL_PX = 384
SHARP_BELOW = 128  # px; smaller pictures are sent as they are, and the page enlarges their pixels
MIN_TOKEN = 12  # characters of a token of one's own
MOST_NOTE = 1000  # characters of a note
NO_MESSAGE = "This is not a message of the live page."
MAX_MARK_AGE = 30.0  # s; a mark that is older comes from a clock that jumped
REFUSED = "This page needs its token: use the address that the command `live` printed."
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'{sockets}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY",
    # an isolated page has a clock of 5 instead of 100 µs, which calibration uses
    "cross-origin-opener-policy": "same-origin", "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
}  # fmt: skip
STATIC = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Showing:
    """One image of a calibration block.

    Parameters
    ----------
    stimulus_id
        Of the image.
    duration
        How long it stays on the screen, in s.
    pause
        How long the fixation cross is alone before it, in s.
    """

    stimulus_id: str
    duration: float = 0.5
    pause: float = 0.5


class Calibration(Protocol):
    """A block of images that the page shows; `PageListener` calls it from its own thread."""

    def list_showings(self) -> Sequence[Showing]:
        """Return the images in the order in which they are shown."""
        ...

    def find_images(self, ids: Sequence[str]) -> Sequence[Path | np.ndarray | None]:
        """Return the pictures: files, or uint8 of shape (height, width, 3)."""
        ...

    def mark(self, stimulus_id: str, time: float, uncertainty: float) -> None:
        """An image appeared at `time` s of ``time.perf_counter()``, plus or minus `uncertainty` s."""
        ...

    def finish(self, complete: bool) -> str:
        """The block is over, or was stopped and may go on. Returns a sentence that the page shows."""
        ...


class Recorder(Protocol):
    """A recording that browsers start and stop; called in the thread of the session, as `BidsRecorder`."""

    is_recording: bool
    path: Path | None

    def start(self) -> None:
        """Begin a recording."""
        ...

    def stop(self) -> None:
        """End it."""
        ...

    def note(self, text: str) -> None:
        """Add a note of now."""
        ...


@dataclass(eq=False)
class Work:
    """Something that takes long: what it is, and how much of it is done."""

    what: str
    total: int | None = None
    done: int = 0
    began: float = field(default_factory=time.perf_counter)


class PageProgress:
    """Shows the progress of a run on the live page, and passes it on to another listener."""

    def __init__(self, page: PageListener, listener: ProgressListener) -> None:
        self._page, self._listener = page, listener

    def finished(self, stage: str, artifact: Artifact, seconds: float) -> None:
        """Pass on."""
        self._listener.finished(stage, artifact, seconds)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show the steps of one work."""
        with (
            self._page.show_work(description, total) as work,
            self._listener.progress(description, total) as pass_on,
        ):

            def advance(n: int) -> None:
                work.done += n
                self._page.tell_work()
                pass_on(n)

            yield advance

    @contextmanager
    def watch(self, description: str) -> Iterator[Callable[[int, int, str], None]]:
        """Show the steps of one work that says how it goes."""
        with self._page.show_work(description) as work, self._listener.watch(description) as pass_on:

            def show(done: int, total: int, text: str) -> None:
                if total:
                    work.done, work.total = done, total
                    self._page.tell_work()
                pass_on(done, total, text)

            yield show


class PageListener(Listener):
    """A listener that shows a session in browsers.

    Parameters
    ----------
    find_images
        Returns the pictures of candidates, as `StreamDecoder.find_images`; called from another thread than the
        session's, one call at a time. Without it, candidates have names alone.
    host
        Address to listen at; the default is reached from this machine alone.
    port
        0 takes a free one.
    token
        What the address holds; drawn at random by default.
    calibration
        A block of images to be shown at ``/calibrate``.

    Raises
    ------
    ConfigError
        If the token is short, a package lacks, or (in `start`) the port is taken or the host is not of this machine.
    """

    def __init__(
        self,
        *,
        find_images: FindImages | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
            raise ConfigError(
                f"the token of the live page needs {MIN_TOKEN} or more ASCII characters, since anybody "
                "who guesses it sees the session; leave it out to get a random one."
            )
        for package in ("starlette", "uvicorn", "websockets"):
            require(package, "the live page", otherwise="or leave the page out with --no-page")
        self.token = token or secrets.token_urlsafe(24)
        self.host, self.port = host, port
        self.calibration = calibration
        self.state = PageState()
        self.session = secrets.token_hex(4)
        self._find_images = find_images
        self._chunks: deque[tuple[Chunk, float]] = deque(maxlen=512)
        self._inbox: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._events: deque[dict[str, Any]] = deque(maxlen=N_EVENTS)
        self._n_events = 0  # of all time; the log holds the last of them
        self._places: dict[int, int] = {}  # of each browser in the log
        self._frame: dict[str, Any] = {}
        self._thumbnails: OrderedDict[str, tuple[bytes, str] | None] = OrderedDict()
        self._reading = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._news: asyncio.Event | None = None
        self._next_showing = 0
        self._calibrating: Any = None  # the socket of the page that shows the block
        self._learning: asyncio.Task[None] | None = None
        self._verdict: str | None = None  # what a whole calibration block ended with
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._tickets: set[str] = set()  # tokens that open the page once
        self._works: list[Work] = []  # the last one is shown
        self._recorder: Recorder | None = None
        self._ask: Callable[[Callable[[], None]], None] = lambda what: None

    def control(self, recorder: Recorder, ask: Callable[[Callable[[], None]], None]) -> None:
        """Let browsers start and stop a recording, and add notes to it.

        Parameters
        ----------
        recorder
            Of the session.
        ask
            Calls a function in the thread of the session, as `LiveSession.ask`.
        """
        self._recorder, self._ask = recorder, ask

    @contextmanager
    def show_work(self, what: str, total: int | None = None) -> Iterator[Work]:
        """Show what takes long, and for how long it has, until the context ends or the stream begins."""
        work = Work(what, total)
        self._works.append(work)
        self.tell_work()
        try:
            yield work
        finally:
            if work in self._works:
                self._works.remove(work)
                self.tell_work()

    def tell_work(self) -> None:
        """Show how far the work has come."""
        work = self._works[-1] if self._works else Work("")
        self._post("work", work.what, work.began, work.done, work.total)

    # --- what the session calls: nothing here waits -----------------------------------------------------------

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        """Start the server if that was not done before, and show the stream."""
        self.start()
        self._post("begin", info, dict(facts))
        self._works.clear()
        self.tell_work()

    def hear(self, chunk: Chunk) -> None:
        """Show samples; where the server falls behind, the oldest are not drawn."""
        self._chunks.append((chunk, time.perf_counter()))

    def decide(self, decision: Decision) -> None:
        """Show a decision."""
        self._post("decide", decision)

    def tell(self, sentence: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Show a message."""
        self._post("tell", sentence, level, time.time())

    def end(self, summary: Mapping[str, Any]) -> None:
        """Inform every browser, then stop; what a browser shows stays there."""
        self._post("end", dict(summary))
        self.close()

    def _post(self, kind: str, *content: Any) -> None:
        if self._thread is not None and not self._thread.is_alive():
            return  # nobody would ever take it
        self._inbox.append((kind, content))
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            with suppress(RuntimeError):  # the loop was closed between
                loop.call_soon_threadsafe(wake.set)

    # --- the server ----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where a browser finds the page, with the token."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/?token={self.token}"

    def open_browser(self) -> None:
        """Open the page in the browser of this machine, if there is one.

        Other users of the machine see the address among its processes; what it holds opens the page once.
        """
        ticket = secrets.token_urlsafe(24)
        self._tickets.add(ticket)
        webbrowser.open(self.address.replace(self.token, ticket))

    def start(self) -> str:
        """Start the server in a thread, and return the address of the page; a second call only returns it."""
        if self._thread is not None:
            return self.address
        import uvicorn

        wilson_interval(1, 2)  # imports what counting needs, before there is a stream that could wait
        bound = self._bind()
        self.port = bound.getsockname()[1]
        config = uvicorn.Config(
            self.make_app(), log_level="critical", access_log=False, server_header=False, ws_max_size=65_536,
            ws_per_message_deflate=False, timeout_graceful_shutdown=1, limit_concurrency=200,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [bound]}, name="live-page", daemon=True
        )
        self._thread.start()
        end = time.monotonic() + 10
        while not self._server.started and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.005)
        if not self._server.started:
            raise ConfigError(f"the live page could not be started at {self.host}, port {self.port}.")
        return self.address

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
            bound.listen(64)
        except (OSError, OverflowError) as error:
            bound.close()
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {self.port} of {self.host} is used by another program; give another one with "
                    "--port, or leave it out to get a free one."
                ) from error
            raise ConfigError(
                f"the live page cannot listen at {self.host}, port {self.port}: {error}."
            ) from error
        return bound

    def close(self) -> None:
        """Stop the server once every browser has heard the last event, after a second at most; may be called twice."""
        if self._thread is None or self._server is None:
            return
        end = time.monotonic() + 1
        behind = True
        while behind and self._thread.is_alive() and time.monotonic() < end:
            behind = bool(self._inbox) or any(place < self._n_events for place in list(self._places.values()))
            time.sleep(0.01)
        self._server.should_exit = True
        self._thread.join(3)

    def make_app(self) -> Any:
        """Return the ASGI application, guarded by host, origin and token."""
        from starlette.applications import Starlette
        from starlette.routing import Route, WebSocketRoute

        files = {
            file.name: file.read_bytes() for file in resources.files(__package__).joinpath("static").iterdir()
        }

        async def page(request: Any) -> Any:
            from starlette.responses import Response

            name = {"/": "live.html", "/calibrate": "calibrate.html"}.get(
                request.url.path
            ) or request.path_params["name"]
            if name not in files:
                return _say("There is no such page.", 404)
            return Response(
                files[name], media_type=STATIC[Path(name).suffix], headers={"cache-control": "no-store"}
            )

        routes = [
            Route("/", page), Route("/calibrate", page), Route("/static/{name}", page),
            Route("/image", self._answer_image), Route("/reconstruction/{number}", self._answer_reconstruction),
            WebSocketRoute("/live", self._tell_browser), WebSocketRoute("/calibration", self._calibrate),
        ]  # fmt: skip
        answers = {404: "There is no such page.", 405: "This page can be read alone."}
        handlers = {status: partial(_answer_error, sentence) for status, sentence in answers.items()}
        return _Guard(Starlette(routes=routes, lifespan=self._run, exception_handlers=handlers), self)

    @asynccontextmanager
    async def _run(self, app: Any) -> AsyncIterator[None]:
        self._wake, self._news = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        work = asyncio.create_task(self._work())
        yield
        self._loop = None
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    async def _work(self) -> None:
        """Take in what the session left, and wake those who inform browsers."""
        assert self._wake is not None
        judged = 0.0
        while True:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK)
            self._wake.clear()
            decided = False
            while self._inbox:
                kind, content = self._inbox[0]
                try:
                    event = getattr(self.state, kind)(*content)
                except Exception as error:  # whatever it was: the page goes on, and says so
                    event = self.state.tell(
                        f"this page could not show the data: {error!r}.", "error", time.time()
                    )
                if kind == "begin":
                    event["calibration"] = self.calibration is not None
                self._events.append(event)
                self._n_events += 1
                decided = decided or kind == "decide"
                if len(self._inbox) == 1 and decided:  # once for all that came together
                    self._events.append(self.state.count())
                    self._n_events += 1
                self._inbox.popleft()  # only now, so that `close` waits for it
            self._watch_recorder()
            while self._chunks:
                with suppress(
                    ValueError, IndexError, TypeError
                ):  # a chunk of another shape: the decoder refuses it
                    self.state.hear(*self._chunks.popleft())
            now = time.perf_counter()
            if now - judged >= 1:
                judged = now
                self.state.judge()
            news, self._news = self._news, asyncio.Event()
            assert news is not None
            news.set()

    def _watch_recorder(self) -> None:
        """Show whether the session is recorded, once that has changed."""
        if self._recorder is None or not self.state.stream:
            return
        path = self._recorder.path
        found = {"on": self._recorder.is_recording, "where": "" if path is None else str(path)}
        if found != self.state.recording:
            self._events.append(self.state.record(found))
            self._n_events += 1

    # --- browsers ------------------------------------------------------------------------------------------------

    def _frame_signal(self, since: int) -> dict[str, Any]:
        age = time.perf_counter() - self.state.heard if self.state.heard else None
        assert self.state.traces is not None
        state = self.state
        known = {"quality": state.quality, "amplitude": state.amplitude, "link": state.view_link()}
        return {"type": "signal", "age": age, **known, **self.state.traces.view(since)}

    async def _tell_browser(self, ws: Any) -> None:
        """Send one browser what is new, at its pace, until it goes."""
        from starlette.websockets import WebSocketDisconnect

        await ws.accept()
        if len(self._places) >= MAX_BROWSERS:
            sentence = f"{MAX_BROWSERS} browsers already watch this session: close one of them."
            await ws.send_text(json.dumps([{"type": "refused", "sentence": sentence}]))
            await ws.close(4000)
            return
        key = id(ws)
        self._places[key] = -1
        answers: deque[dict[str, Any]] = deque(maxlen=20)
        listening = asyncio.create_task(self._hear_browser(ws, answers))
        columns, traces = 0, None
        try:
            while not listening.done():
                news = self._news
                behind = self._n_events - self._places[key]
                if self._places[key] < 0 or behind > len(self._events):
                    batch = [
                        {
                            **self.state.view(),
                            "session": self.session,
                            "calibration": self.calibration is not None,
                        }
                    ]
                    traces = None
                else:
                    batch = list(self._events)[len(self._events) - behind :]
                place = self._n_events
                if self.state.traces is not traces:
                    columns, traces = 0, self.state.traces
                while answers:
                    batch.append(answers.popleft())
                if traces is not None:
                    batch.append(self._frame_signal(columns))
                    columns = traces.next
                if batch:
                    await ws.send_text(json.dumps(batch, allow_nan=False))
                self._places[key] = place
                await asyncio.sleep(PAUSE)
                if news is not None and self._n_events == place:
                    await news.wait()  # which comes every tick
        except (WebSocketDisconnect, RuntimeError, OSError):
            pass  # it was closed: no error
        finally:
            del self._places[key]
            listening.cancel()

    async def _hear_browser(self, ws: Any, answers: deque[dict[str, Any]]) -> None:
        """Do what a browser asks for, and answer it, until it goes.

        `_Guard` let this socket through, so it comes from a page of this server and has the token.
        """
        with suppress(Exception):
            while (message := await ws.receive())["type"] != "websocket.disconnect":
                wrong = self._obey(message.get("text") or "")
                answers.append({"type": "answer", "sentence": wrong})

    def _obey(self, text: str) -> str:
        """Start or stop the recording, or add a note; returns what is wrong with the request, else an empty text."""
        try:
            asked = json.loads(text)
            kind = asked["type"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return NO_MESSAGE
        recorder = self._recorder
        if recorder is None:
            return "This session has no recording: start it with --record DIR."
        if not self.state.stream or self.state.summary is not None:
            return "There is nothing to record: the session has not begun, or is over."
        if kind == "record":
            if not isinstance(asked.get("on"), bool):
                return NO_MESSAGE
            self._ask(recorder.start if asked["on"] else recorder.stop)
            return ""
        if kind != "note":
            return NO_MESSAGE
        note = asked.get("text")
        if not isinstance(note, str) or not note.strip():
            return "The note is empty: write what happened, then add it."
        if len(note) > MOST_NOTE:
            return f"The note has {len(note):,} characters, but at most {MOST_NOTE:,} fit; shorten it."
        if not recorder.is_recording:
            return "Nothing is recorded now: start the recording, then add the note."
        words = note.strip().encode("utf-8", "replace").decode()  # half of a character cannot be written
        self._ask(lambda: recorder.note(words))
        return ""

    async def _answer_image(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response

        name = request.query_params.get("id", "")
        which = (
            self.calibration.find_images
            if request.query_params.get("of") == "calibration" and self.calibration
            else self._find_images
        )
        large = which is not self._find_images
        found = await run_in_threadpool(self._find_thumbnail, name, which, large)
        if found is None:
            return _say("There is no picture of this image.", 404)
        return Response(found[0], media_type=found[1], headers={"cache-control": "private, max-age=3600"})

    def _find_thumbnail(self, name: str, find: FindImages | None, large: bool) -> tuple[bytes, str] | None:
        """Return a picture as a file, and its type; the last ones are kept."""
        if find is None or not name:
            return None
        key = f"{large} {name}"
        with self._reading:
            if key not in self._thumbnails:
                try:
                    (image,) = find([name])
                    self._thumbnails[key] = (
                        None if image is None else encode_picture(image, 2048 if large else THUMBNAIL_PX)
                    )
                except (BraindecodeVisError, OSError, ValueError, KeyError, IndexError):
                    self._thumbnails[key] = None  # a picture that cannot be read stops no session
                while len(self._thumbnails) > 512:
                    self._thumbnails.popitem(last=False)
            self._thumbnails.move_to_end(key)
            return self._thumbnails[key]

    async def _answer_reconstruction(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response

        number = request.path_params["number"]
        # Of thousands of digits, Python makes no number.
        image = self.state.images.get(int(number)) if number.isdecimal() and len(number) < 10 else None
        if image is None:
            return _say("This reconstruction is no longer available.", 404)
        content, kind = await run_in_threadpool(encode_picture, image, 768)
        return Response(content, media_type=kind, headers={"cache-control": "private, max-age=3600"})

    # --- calibration ---------------------------------------------------------------------------------------------

    async def _calibrate(self, ws: Any) -> None:
        """Lead one browser through the block: clock, onsets, end."""
        from starlette.websockets import WebSocketDisconnect

        await ws.accept()
        block = self.calibration
        if block is None or self._calibrating is not None:
            why = (
                "another window shows this block; close that window first"
                if block
                else "this session has no calibration block: start it with --calibrate"
            )
            await ws.send_text(json.dumps({"type": "refused", "sentence": f"{why[0].upper()}{why[1:]}."}))
            await ws.close(4001)
            return
        self._calibrating = ws
        showings = list(block.list_showings())
        try:
            plan = {
                "type": "plan",
                "showings": [asdict(one) for one in showings],
                "next": self._next_showing,
                "verdict": self._verdict,
                "learning": self._learning is not None,
            }
            await ws.send_text(json.dumps(plan))
            while True:
                text = await ws.receive_text()
                now = time.perf_counter()
                message = json.loads(text)
                answer: dict[str, Any] = {}
                if message["type"] == "ping":
                    answer = {
                        "type": "pong",
                        "sent": message["sent"],
                        "server": now,
                        "ready": bool(self.state.stream),
                    }
                elif message["type"] == "onset" and self._verdict is None and self._learning is None:
                    index, at, apart = message["index"], float(message["time"]), float(message["uncertainty"])
                    if (
                        index == self._next_showing < len(showings)
                        and abs(now - at) < MAX_MARK_AGE
                        and 0 <= apart < 1
                    ):
                        block.mark(showings[index].stimulus_id, at, apart)
                        self._next_showing += 1
                        answer = {"type": "marked", "index": index}
                    else:
                        answer = {"type": "repeat", "next": self._next_showing}
                elif message["type"] == "finish" and self._verdict is None and self._learning is None:
                    # Takes minutes with a network: the page goes on to be heard meanwhile, and may come anew.
                    self._learning = asyncio.create_task(
                        self._learn(block, self._next_showing == len(showings))
                    )
                if answer:
                    await ws.send_text(json.dumps(answer))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError):
            await ws.close(4002, "This is not a message of a calibration page.")
        except (WebSocketDisconnect, RuntimeError, OSError):
            if self._verdict is None and self._next_showing:
                self.tell(
                    f"the calibration page was closed after {self._next_showing} of {len(showings)} "
                    "images; open it again to continue.",
                    "warning",
                )
        except BraindecodeVisError as error:
            self.tell(str(error), "error")
            with suppress(RuntimeError, OSError):
                await ws.send_text(json.dumps({"type": "refused", "sentence": str(error)}))
                await ws.close(4003)
        finally:
            self._calibrating = None

    async def _learn(self, block: Calibration, complete: bool) -> None:
        """Finish a block, and inform the page that shows it."""
        from starlette.concurrency import run_in_threadpool

        try:
            with self.show_work("adapting the encoder to the block"):
                sentence = await run_in_threadpool(block.finish, complete)
        except Exception as error:
            sentence = f"Nothing was learnt: {error!r}."
            self.tell(sentence, "error")
        self._verdict, self._learning = sentence if complete else None, None
        if self._calibrating is not None:
            with suppress(Exception):  # it has just gone
                answer = {"type": "finished", "sentence": sentence, "complete": complete}
                await self._calibrating.send_text(json.dumps(answer))


class _Guard:
    """Lets requests through that name this machine, come from its own pages and have the token."""

    def __init__(self, app: Any, page: PageListener) -> None:
        self.app, self.page = app, page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        answer = self._refuse(scope, headers)
        if answer is not None and scope["type"] == "websocket":
            from starlette.websockets import WebSocket

            await WebSocket(scope, receive, send).send_denial_response(answer)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                # some browsers do not count a websocket of the same host to 'self'
                policy = POLICY.format(sockets=f" ws://{headers.get('host')}")
                extra = {**HEADERS, "content-security-policy": policy}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in extra.items()),
                ]
            await send(message)

        await (answer or self.app)(scope, receive, send_with_headers)

    def _refuse(self, scope: Any, headers: Any) -> Any:
        """Return the answer to a request that goes no further, else None."""
        from starlette.requests import HTTPConnection
        from starlette.responses import RedirectResponse

        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_here(host):
            return _say(
                "This page can be opened only with the address of its own machine, not with another name.",
                403,
            )
        if origin is not None and not _is_of(origin, host):
            return _say("Pages from other addresses may not read this page.", 403)
        if scope["type"] == "websocket" and origin is None and "cookie" in headers:
            return _say("A websocket request needs an origin.", 403)  # every browser does
        asked = HTTPConnection(scope)
        cookie = f"live-{self.page.port}"  # cookies are shared by all ports of a host
        given = asked.query_params.get("token", "")
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if given in self.page._tickets or (given and self._matches(given)):
            self.page._tickets.discard(given)
            if scope["type"] == "websocket" or headers.get("accept", "").startswith("application/json"):
                return None
            answer = RedirectResponse(scope["path"], 303)  # the token leaves the address bar
            answer.set_cookie(cookie, self.page.token, httponly=True, samesite="lax")
            return answer
        if not (self._matches(asked.cookies.get(cookie, "")) or self._matches(bearer)):
            return _say(REFUSED, 403)
        return None

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.page.token.encode())

    def _is_here(self, host: str) -> bool:
        """Whether a request names this machine: a page of elsewhere that points its own name here does not."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        own = self.page.host.lower()
        if name in {"localhost", "127.0.0.1", "::1", own} - {""}:
            return True
        if own not in ("0.0.0.0", "::"):
            return False
        here = socket.gethostname().lower()
        if name in (here, f"{here}.local", here.partition(".")[0]):
            return True
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name))  # a number cannot be pointed elsewhere
        return False


def encode_picture(image: Path | np.ndarray, max_px: int) -> tuple[bytes, str]:
    """Return a picture as the bytes of a file for browsers, and its media type.

    Parameters
    ----------
    image
        A file, or uint8 of shape (height, width, 3).
    max_px
        The longer side at most.
    """
    from PIL import Image

    with (
        Image.open(image)
        if isinstance(image, Path)
        else Image.fromarray(np.asarray(image, np.uint8)) as opened
    ):
        picture = opened.convert("RGB")
    small = max(picture.size) < SHARP_BELOW
    if not small:
        picture.thumbnail((max_px, max_px))
    out = io.BytesIO()
    picture.save(out, format="PNG" if small else "JPEG", quality=90)
    return out.getvalue(), "image/png" if small else "image/jpeg"


def _is_of(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:  # it is no address
        return False


def _answer_error(sentence: str, request: Any, error: Any) -> Any:
    return _say(sentence, error.status_code)


def _say(sentence: str, status: int) -> Any:
    from starlette.responses import PlainTextResponse

    return PlainTextResponse(sentence + "\n", status)
