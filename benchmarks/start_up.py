"""Processor time of the commands that compute nothing: a run of which all is there, lists, and mistyped words.

Processor time, user and system, of whole processes, since wall time says more of the machine; the fastest of several
calls, after one that leaves compiled modules and libraries in the cache of the disk. Beside it, what importing numpy
and pydantic takes, which no command that reads a configuration does without.

Processor seconds on one busy core, before and after settings came to load no tables and manifests to be read one by one
(``import numpy, pydantic``: 0.12 before, 0.14 after, so that the machine was slower then):

=================================== ====== =====
command                             before after
=================================== ====== =====
run digits69_ridge, all reused        1.45  1.28
datasets                              1.11  0.40
run, name mistyped                    0.96  0.57
run, setting mistyped                 0.96  0.50
=================================== ====== =====

Of the 1.28 s, pandas and pyarrow are 0.4: the check for leaks, the hints and the scores read tables.

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        subprocess.run([*COMMAND, "run", NAME, "--out", out], capture_output=True, check=True, cwd=folder)
        commands = {
            "run, all reused": [*COMMAND, "run", NAME, "--out", out],
            "datasets": [*COMMAND, "datasets"],
            f"describe {NAME}": [*COMMAND, "describe", NAME],
            f"check {NAME}": [*COMMAND, "check", NAME],
            "run, name mistyped": [*COMMAND, "run", "synthetic_digist"],
            "run, setting mistyped": [*COMMAND, "run", NAME, "--out", out, "--set", "encoder.alfas=1"],
            "verb mistyped": [*COMMAND, "rnu"],
            "--help": [*COMMAND, "--help"],
        }
        reference = measure([sys.executable, "-c", "import numpy, pydantic"], folder, options.repeats)
        print(f"{'import numpy, pydantic':24s} {reference:5.2f} s of processor time")
        for name, command in commands.items():
            seconds = measure(command, folder, options.repeats)
            print(f"{name:24s} {seconds:5.2f} s   {seconds / reference:4.1f} times that")


if __name__ == "__main__":
    main()
