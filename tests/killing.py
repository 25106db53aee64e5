"""Commands that are killed: a process that starts them at once, and the comparison of what they leave.

Run as a program it is the nursery: it has imported everything and forks a child for each command, so that a killed
command costs what it computes and not what Python imports.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

PYTHON_ROOT = Path(__file__).resolve().parents[1]


class Nursery:
    """Starts commands in forked children.

    Parameters
    ----------
    folder
        Gets what the commands say.
    modules
        Further modules that the commands need.
    """

    def __init__(self, folder: Path, modules: tuple[str, ...] = ()) -> None:
        self.folder, self.n_started = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(PYTHON_ROOT), "MPLBACKEND": "Agg"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # Its threads would not live on in the children.
        environment["ARROW_DEFAULT_MEMORY_POOL"] = "system"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, words, cache: Path) -> int:
        """Start a command and return its process id."""
        self.n_started += 1
        log = self.folder / f"{self.n_started}.log"
        return self._ask(words=[str(word) for word in words], log=str(log), cache=str(cache))

    def poll(self, pid: int) -> int | None:
        """Return the exit code, minus the signal that ended it, or None while it runs."""
        return self._ask(poll=pid)

    def wait(self, pid: int, seconds: float = 900) -> int:
        """Return the exit code; a command that hangs is killed and an error."""
        deadline = time.monotonic() + seconds
        while (code := self.poll(pid)) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGUSR1)  # says where it is
                time.sleep(1)
                os.kill(pid, signal.SIGKILL)
                self.wait(pid)
                raise AssertionError(f"a command did not end within {seconds:.0f} s: {self.said[-5000:]}")
            time.sleep(0.002)
        return code

    def run(self, words, cache: Path) -> int:
        """Run a command to its end and return its exit code."""
        return self.wait(self.start(words, cache))

    @property
    def said(self) -> str:
        """What the last command said."""
        return (self.folder / f"{self.n_started}.log").read_text()

    def close(self) -> None:
        """End the nursery."""
        with self.process:  # closes its pipes, of which it reads one to the end
            self.process.stdin.close()


# --- what a command leaves ---------------------------------------------------------------------------------

_TIMES = re.compile(rb"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?: UTC|Z)?")
#: Of a record: when, how long, by which call, and the digests of itself and of a page that tells it.
_VARIABLE = {
    "created",
    "page",
    "seal",
    "seconds",
    "profile",
    "command",
    "started",
    "finished",
    "trials_per_second",
    "mtime_ns",
}


def list_results(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder (or of a single file), without times and how long things took."""
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths if path.is_file()}


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        # A line each, since logs are JSON by the line.
        parts = [content] if path.suffix == ".json" else content.splitlines()
        content = json.dumps([_strip(json.loads(part)) for part in parts]).encode()
    if path.suffix in (".json", ".jsonl", ".html", ".yaml", ".md"):
        content = _TIMES.sub(b"", content)
    return hashlib.sha256(content).hexdigest()


def _strip(value):
    if isinstance(value, dict):
        kept = {key: _strip(item) for key, item in value.items() if key not in _VARIABLE}
        # Sizes and digests of files that hold times.
        timed = (".json", ".jsonl", ".csv", ".html")
        return {key: item for key, item in kept.items() if not key.endswith(timed)}
    return [_strip(item) for item in value] if isinstance(value, list) else value


def list_leftovers(*folders: Path) -> list[Path]:
    """Return temporary files and folders below and beside some folders."""
    names = (".tmp-", "work", "scratch")
    found = []
    for folder in folders:
        beside = [path for path in folder.parent.glob(f".*{folder.name}*") if not path.name.endswith(".lock")]
        below = [path for path in folder.rglob("*") if path.name.startswith(names) or path.suffix == ".part"]
        found += [*beside, *below]
    return found


# --- the nursery -------------------------------------------------------------------------------------------


def fetch_toy(url: str, out: str, digest: str, size: str) -> None:
    """Fetch one file from a server on the loopback interface, as the verb would from a public one."""
    from braindecode_vis.datasets import fetching, transfer
    from braindecode_vis.datasets.manifests import Manifest, ManifestPart, PartFile

    transfer.ALLOW_LOOPBACK = True
    file = PartFile(path="a.bin", at=url, bytes=int(size), checksum=f"sha256:{digest}")
    manifest = Manifest(
        name="toy", title="Toy set", modality="eeg", subjects=1, stimuli="none", summary="", citation="",
        licence="CC0", source={"url": "example.org/toy"},
        parts=(ManifestPart(name="data", what="", host="https", files=(file,), mark="verified"),),
    )  # fmt: skip
    findings = fetching.fetch(fetching.make_plan(manifest, Path(out)))
    assert all(finding.ok for finding in findings), findings


def _serve() -> None:
    import braindecode_vis
    from braindecode_vis.cli import main

    for found in pkgutil.walk_packages(braindecode_vis.__path__, "braindecode_vis."):
        with contextlib.suppress(ImportError):  # of optional libraries
            __import__(found.name)
    for name in ("scipy.linalg", "jinja2", "PIL.JpegImagePlugin", "matplotlib.pyplot", *sys.argv[1:]):
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _be_command(main, **request)
        print(json.dumps(answer), flush=True)


def _be_command(main, words, log, cache) -> None:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ["BRAINDECODE_VIS_CACHE"] = cache
        faulthandler.register(signal.SIGUSR1)
        # A suite that a shell runs in the background ignores Ctrl-C, and so would its commands.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["braindecode-vis", *words]
        if words[0] == "fetch":
            from braindecode_vis.cli.failures import stop_cleanly

            with stop_cleanly() as stops:
                try:
                    fetch_toy(*words[1:])
                    code = 0
                except KeyboardInterrupt:
                    sys.stderr.write(f"error: {stops.describe()}\n")
                    code = stops.exit_code
        else:
            try:
                main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
