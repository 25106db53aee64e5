"""A server on this machine that stands in for the hosts of published files, and can be told to misbehave."""

import html
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.state.heads.append(self.path)
        if not self.server.state.knows_head:
            self.send_error(405)
            return
        self.answer(body=False)

    def do_GET(self):
        state = self.server.state
        state.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        state.authorizations.append(self.headers.get("Authorization"))
        self.answer(body=True)

    def answer(self, body):
        state = self.server.state
        if self.path in state.redirects:
            self.send_response(302)
            self.send_header("Location", state.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if state.busy:
            self.send_response(state.busy.pop(0))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path not in state.files or self.path in state.refuse:
            self.send_error(state.refuse.get(self.path, state.status))
            return
        content, start, stop = state.files[self.path], 0, None
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, state.tag) or not state.knows_if_range
        if wanted and state.ranges and same:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first) + state.shift, int(last) + 1 if last else None
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{(stop or len(content)) - 1}/{len(content)}")
        else:
            self.send_response(state.ok)
        if tag := state.tags.get(self.path, state.tag):
            self.send_header("ETag", tag)
        for name, value in state.headers.items():
            self.send_header(name, value)
        stop = stop or len(content)
        self.send_header("Content-Length", state.length or str(stop - start))
        self.end_headers()
        if state.breaks:
            stop = min(stop, start + state.breaks.pop(0))
        if body:
            self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@contextmanager
def serve(files: dict[str, bytes] | None = None) -> Iterator[SimpleNamespace]:
    """Serve files by their path and query; the state says what was asked, and how to misbehave."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.state = SimpleNamespace(
        files=dict(files or {}),
        requests=[],
        heads=[],
        authorizations=[],
        redirects={},
        length="",
        breaks=[],
        busy=[],
        ranges=True,
        knows_if_range=True,
        shift=0,
        ok=200,
        knows_head=True,
        tag='"v1"',
        tags={},
        headers={},
        status=404,
        refuse={},
    )
    httpd.state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=partial(httpd.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield httpd.state
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def list_pages(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by their addresses, and for each folder the page on which a web server lists it."""
    pages = {}
    for path in [folder, *folder.rglob("*")]:
        address = "/".join(["", *map(urllib.parse.quote, path.relative_to(folder).parts)])
        if path.is_file():
            pages[address] = path.read_bytes()
            continue
        names = ["../", *(f"{p.name}/" if p.is_dir() else p.name for p in sorted(path.iterdir()))]
        links = (f'<a href="{urllib.parse.quote(name)}">{html.escape(name)}</a>\n' for name in names)
        pages[f"{address}/"] = f'<a href="?C=N">Name</a>\n{"".join(links)}'.encode()
    return pages
