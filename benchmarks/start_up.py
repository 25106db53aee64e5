"""Processor time of the commands that compute nothing: a run of which all is there, lists, and mistyped words.

Processor time, user and system, of whole processes, since wall time says more of the machine; the fastest of several
calls, after one that leaves compiled modules and libraries in the cache of the disk. Beside it, what importing numpy
and pydantic takes, which no command that reads a configuration does without. `table.py` prints the same.

Run with ``python benchmarks/start_up.py``; the run is made first, of digits that are drawn.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "synthetic_digits"
COMMAND = [sys.executable, "-m", "braindecode_vis"]


def measure(command: list[str], folder: str, repeats: int) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for _ in range(repeats + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=False, env=environment, cwd=folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds[1:])


def prepare(folder: str) -> None:
    """Make the run that the first command finds done."""
    command = [*COMMAND, "run", NAME, "--out", str(Path(folder) / "run")]
    subprocess.run(command, capture_output=True, check=True, cwd=folder)


def list_commands(folder: str) -> dict[str, list[str]]:
    """Return what is called, by what is printed; the first line is the reference."""
    out = str(Path(folder) / "run")
    return {
        "import numpy, pydantic": [sys.executable, "-c", "import numpy, pydantic"],
        "run, all reused": [*COMMAND, "run", NAME, "--out", out],
        "datasets": [*COMMAND, "datasets"],
        f"describe {NAME}": [*COMMAND, "describe", NAME],
        f"check {NAME}": [*COMMAND, "check", NAME],
        "run, name mistyped": [*COMMAND, "run", "synthetic_digist"],
        "run, setting mistyped": [*COMMAND, "run", NAME, "--out", out, "--set", "encoder.alfas=1"],
        "verb mistyped": [*COMMAND, "rnu"],
        "--help": [*COMMAND, "--help"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        for name, command in list_commands(folder).items():
            print(f"{name:26s} {measure(command, folder, options.repeats):5.2f} s of processor time")


if __name__ == "__main__":
    main()
