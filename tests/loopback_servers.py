"""Servers on this machine that stand in for object storage and for a web server with a list of its files."""

import html
import logging
import os
import re
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace


class Bucket:
    """A bucket of moto's server, filled over the same interface that is read from."""

    def __init__(self, url: str, name: str) -> None:
        import boto3

        self.url, self.name = url, name
        key = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=url, **key)
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, content: bytes, *, public: bool = True) -> None:
        grant = {"ACL": "public-read"} if public else {}
        self.client.put_object(Bucket=self.name, Key=key, Body=content, **grant)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def fill(self, folder: Path, prefix: str) -> str:
        """Copy a folder there and return its address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{self.name}/{prefix}"


@contextmanager
def serve_s3():
    """Yield the address of a server of S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    before = os.environ.copy()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    os.environ.clear()
    os.environ.update(before)  # it sets credentials
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


class _Pages(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        state = self.server.state
        state.requests.append((self.command, self.path, self.headers.get("Range")))
        path = state.folder / urllib.parse.unquote(self.path).strip("/")
        if self.path in state.refuse:
            return self.send(state.refuse[self.path], b"", body)
        if path.is_dir() and self.path.endswith("/"):
            names = [f"{p.name}/" if p.is_dir() else p.name for p in sorted(path.iterdir())]
            links = "".join(
                f'<a href="{urllib.parse.quote(n)}">{html.escape(n)}</a>\n' for n in ["../", *names]
            )
            return self.send(200, f'<a href="?C=N">Name</a>\n{links}'.encode(), body, kind="text/html")
        if not path.is_file() or self.path.endswith("/"):
            return self.send(404, b"", body)
        content, tag = path.read_bytes(), f'"{path.stat().st_mtime_ns:x}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and state.ranges:
            first, last = int(wanted[1]), int(wanted[2])
            more = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "ETag": tag}
            return self.send(206, content[first : last + 1], body, more)
        return self.send(200, content, body, {"ETag": tag} if state.tags else {})

    def send(self, status, content, body, more=None, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serve_pages(folder: Path):
    """Yield a web server that lists the files of a folder; its state can be changed."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    httpd.daemon_threads = True
    httpd.state = SimpleNamespace(folder=folder, requests=[], refuse={}, ranges=True, tags=True)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.state.url = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield httpd.state
    finally:
        httpd.shutdown()
        httpd.server_close()
