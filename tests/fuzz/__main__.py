"""``make fuzz``: many cases in parallel, a summary, and exit code 1 if any property is violated.

python -m tests.fuzz --cases 5000 --jobs 2
python -m tests.fuzz --case god/read:17     # one case again, with everything that was said
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # threads do not survive a fork
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.fuzz.examine import GOOD, Examiner, Verdict, import_everything, make_base  # noqa: E402
from tests.fuzz.surfaces import SURFACES  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED", 0)))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--surface", action="append", help="start of the names of surfaces; repeatable")
    parser.add_argument("--case", action="append", help="a case to make again, as it was printed; repeatable")
    parser.add_argument("--bases", type=Path, help="folder to keep the bases in, for the next call")
    given = parser.parse_args()
    if given.case:
        cases = [(name.rpartition(":")[0], int(name.rpartition(":")[2])) for name in given.case]
    else:
        names = [name for name in SURFACES if not given.surface or name.startswith(tuple(given.surface))]
        cases = [
            (names[n % len(names)], 1_000_000 * given.seed + n // len(names)) for n in range(given.cases)
        ]
    import_everything()
    # In memory where that is possible: every stage waits for the disk, which is no part of what is tested.
    memory = Path("/dev/shm")
    work = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        bases = (given.bases or work / "bases").resolve()
        bases.mkdir(parents=True, exist_ok=True)
        for base in sorted({SURFACES[name].base for name, _ in cases}):
            make_base(bases, base)
        started = time.monotonic()
        verdicts = _share(cases, bases, work, given.jobs, verbose=bool(given.case))
        return _summarise(verdicts, time.monotonic() - started)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _share(
    cases: list[tuple[str, int]], bases: Path, work: Path, jobs: int, *, verbose: bool
) -> list[Verdict]:
    """Return the verdicts of all cases, from as many processes as asked for."""
    children, parent = [], os.getpid()
    for job in range(max(1, min(jobs, len(cases)))):
        if (process := os.fork()) == 0:
            code = 1
            try:
                examiner = Examiner(bases, work / f"job{job}")
                with (work / f"verdicts{job}").open("wb") as file:
                    for name, number in cases[job::jobs]:
                        if os.getppid() != parent:  # which was killed
                            break
                        verdict = examiner.judge(SURFACES[name], number)
                        pickle.dump(verdict, file)
                        if verbose or verdict.kind not in GOOD:
                            _show(verdict)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
    if any(codes):
        raise SystemExit("the fuzzer itself failed")
    verdicts = []
    for job in range(len(children)):
        with (work / f"verdicts{job}").open("rb") as file:
            while file.peek(1):
                verdicts.append(pickle.load(file))
    return verdicts


def _show(verdict: Verdict) -> None:
    text = f"{verdict.kind.upper()}  {verdict.case}  ({verdict.file}: {verdict.damage.kind}, {verdict.damage.what})"
    print(f"{text}\n    " + "\n    ".join(verdict.said.strip().splitlines()[-25:]), flush=True)


def _summarise(verdicts: list[Verdict], seconds: float) -> int:
    kinds = Counter(verdict.kind for verdict in verdicts)
    print(f"{len(verdicts)} cases in {seconds:.0f} s, the longest {max(v.seconds for v in verdicts):.1f} s")
    times: dict[str, list[float]] = {}
    for verdict in verdicts:
        times.setdefault(verdict.case.rpartition(":")[0], []).append(verdict.seconds)
    slowest = sorted(times, key=lambda name: -sum(times[name]))[:6]
    print(f"  seconds a case where most went: {', '.join(f'{n} {mean(times[n]):.1f}' for n in slowest)}")
    print(f"  exit 0, the same result                 {kinds['same']}")
    print(f"  exit 2, one sentence                    {kinds['told']}")
    print(f"  exit 0, the report says what is damaged {kinds['told in the report']}")
    print(f"  exit 0, another valid input was made    {kinds['another input']}")
    print(f"  exit 0 of check, with a block of zeros  {kinds['zeros pass check']}")
    bad = {kind: number for kind, number in kinds.items() if kind not in GOOD}
    print(f"  violations                              {sum(bad.values())}")
    for kind, number in sorted(bad.items()):
        print(f"    {kind}: {number}")
    others = Counter(
        (Path(v.file).suffix or "none", v.damage.kind) for v in verdicts if v.kind == "another input"
    )
    listed = ", ".join(f"{suffix} {kind} {number}" for (suffix, kind), number in others.most_common(12))
    print(f"  other inputs, by format and damage: {listed or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
