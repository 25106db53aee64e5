"""SIGKILL and SIGTERM at random moments of every stage, and the same command again.

What is left must be what an uninterrupted call leaves, bit for bit but for times; nothing temporary stays; whoever
reads in between gets one sentence.
"""

import hashlib
import os
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from braindecode_vis.pipeline import STAGES
from tests.killing import Nursery, list_leftovers, list_results

pytestmark = pytest.mark.whole

FEW = [
    "dataset.n_train=60",
    "dataset.n_test=12",
    "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
]
NETWORK = "encoder={kind: network, epochs: 6, batch_size: 16, checkpoint_seconds: 0, out_of_fold: 2}"
PRIOR = (
    "prior={kind: diffusion, widths: [16, 8], time_features: 16, timesteps: 20, epochs: 1, min_steps: 60, "
    "warmup_steps: 5, steps: 5}"
)
REFINER = "generator={kind: refiner, steps: 10}"
TOY_GENERATOR = {
    "image_size": 16, "autoencoder_steps": 20, "denoiser_steps": 40, "denoiser_batch": 16, "n_images": 40,
    "device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Parameters
    ----------
    stage
        What is killed in it.
    words
        The command; ``{out}`` stands for the folder that it writes.
    begun
        Pattern of what appears below the folder when the stage begins; empty for the start of the command.
    before
        State of the folder that it begins with; None for none.
    spared
        Start of the names of files that may differ.
    """

    stage: str
    words: tuple[str, ...]
    begun: str = ""
    before: Path | None = None
    spared: str | None = None


def _set(values):
    return [word for value in values for word in ("--set", value)]


class Killer:
    """Kills commands and counts what came of it."""

    def __init__(self, folder, seed, modules=()):
        self.folder, self.nursery = folder, Nursery(folder, modules)
        self.draw = np.random.default_rng(seed)
        self.counts = Counter()
        self.show = lambda text: None
        self.stages = []

    def list_words(self, case, out):
        return [word.replace("{out}", str(out)) for word in case.words]

    def prepare(self, case, name):
        out = self.folder / "killed" / name
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        if case.before is not None:
            shutil.copytree(case.before, out)
        return out, out.parent / "cache"

    def follow(self, case, pid, out):
        """Wait until the stage begins; returns the exit code if the command ends first."""
        while True:
            if not case.begun or any(out.parent.glob(f"{out.name}/{case.begun}")):
                return None
            if (code := self.nursery.poll(pid)) is not None:
                return code
            time.sleep(0.0005)

    def rehearse(self, case, name):
        """Run the command to its end; returns what it leaves, and how long the stage and what follows it take."""
        out, cache = self.prepare(case, name)
        pid = self.nursery.start(self.list_words(case, out), cache)
        started = time.monotonic()
        code = self.follow(case, pid, out)
        if code is None:
            started = time.monotonic()
            code = self.nursery.wait(pid)
        assert code == 0, f"{case.stage}: {self.nursery.said[-2000:]}"
        left = list_leftovers(out)
        assert not left, f"{case.stage} leaves {left}"
        return list_results(out), time.monotonic() - started

    def kill(self, case, name, number, expected, seconds):
        """Kill the command once, look in between, and run it again."""
        for patience in range(8):
            out, cache = self.prepare(case, name)
            pid = self.nursery.start(self.list_words(case, out), cache)
            code = self.follow(case, pid, out)
            if code is None:
                time.sleep(self.draw.uniform(0, seconds) * 0.7**patience)
                os.kill(pid, number)
                code = self.nursery.wait(pid)
            if code != 0:
                break
        else:
            pytest.fail(f"{case.stage} was never caught")
        said = self.nursery.said
        assert code == (-number if number == signal.SIGKILL else 143), f"{case.stage}: {code} {said[-2000:]}"
        if number == signal.SIGTERM:
            assert said.strip().splitlines()[-1].startswith("error: stopped by SIGTERM; "), said
            assert "Traceback" not in said
        if (out / "stages").is_dir() and self.draw.random() < 0.3:
            code = self.nursery.run(["audit", str(out)], cache)
            assert code in (0, 2), self.nursery.said
            assert "Traceback" not in self.nursery.said, self.nursery.said
        code = self.nursery.run(self.list_words(case, out), cache)
        assert code == 0, f"{case.stage} does not go on: {self.nursery.said[-2000:]}"
        found, left = list_results(out), list_leftovers(out, cache)
        differs = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        differs = [key for key in differs if case.spared is None or not key.startswith(case.spared)]
        same = not differs
        self.counts[case.stage, "kills"] += 1
        self.counts[case.stage, "identical"] += same
        self.counts[case.stage, "left"] += bool(left)
        if not same or left:
            self.show(f"{case.stage} {signal.Signals(number).name}: differs {differs[:8]}, left {left[:8]}")

    def kill_in(self, case, name, n_kills, numbers=(signal.SIGKILL, signal.SIGTERM)):
        expected, seconds = self.rehearse(case, name)
        self.stages += [case.stage]
        self.show(f"{case.stage}: {seconds:.2f} s")
        for kill in range(n_kills):
            self.kill(case, name, numbers[kill % len(numbers)], expected, seconds)

    def tell(self):
        lines = ["", f"{'stage':<22}{'kills':>7}{'identical':>11}{'left over':>11}"]
        rows = [
            (stage, *(self.counts[stage, key] for key in ("kills", "identical", "left")))
            for stage in self.stages
        ]
        rows.append(("all", *(sum(row[n] for row in rows) for n in (1, 2, 3))))
        lines += [f"{row[0]:<22}{row[1]:>7}{row[2]:>11}{row[3]:>11}" for row in rows]
        return "\n".join(lines)

    def check(self):
        kills = sum(self.counts[stage, "kills"] for stage in self.stages)
        identical = sum(self.counts[stage, "identical"] for stage in self.stages)
        assert identical == kills, self.tell()
        assert not sum(self.counts[stage, "left"] for stage in self.stages), self.tell()
        return kills


@pytest.fixture
def killer(tmp_path, request):
    made = Killer(tmp_path, seed=18, modules=getattr(request, "param", ()))
    yield made
    made.nursery.close()


def _run_to(killer, name, source, values, root=None):
    """Run every stage; returns the state of the folder before each of them, and the finished folder."""
    out, states = killer.folder / name, {}
    words = ["report", source, *(["--root", str(root)] if root else []), "--out", str(out), *_set(values)]
    assert killer.nursery.run(words, killer.folder / f"{name}-cache") == 0, killer.nursery.said
    for number, verb in enumerate(STAGES):
        states[verb] = shutil.copytree(out, killer.folder / f"{name}-before-{verb}")
        # Predictions out of fold are made by the verb that first reads them.
        gone = [*STAGES[number:], *["out_of_fold"] * (number <= STAGES.index("reconstruct"))]
        for later in gone:
            shutil.rmtree(states[verb] / "stages" / later, ignore_errors=True)
        for path in states[verb].iterdir():
            if (
                path.is_file()
                and path.name != "config.yaml"
                and not (verb == "report" and "scores" in path.name)
            ):
                path.unlink()
    return states, out


def _list_cases(states, source, values, stages, root=None):
    where = [source, *(["--root", str(root)] if root else []), "--out", "{out}", *_set(values)]
    return [Case(label, (verb, *where), begun, states[verb]) for label, verb, begun in stages]


TRAINED = [*FEW, "target={kind: pixels, size: 16}", NETWORK, PRIOR, REFINER]
OF_TRAINED = [
    ("preprocess", "preprocess", "stages/preprocess/.tmp-*"),
    ("train network", "train", "work/train00-*/checkpoint.safetensors"),
    ("retrieve", "retrieve", "stages/retrieve/.tmp-*"),
    ("out of fold", "reconstruct", "work/out_of_fold00-*/out_of_fold0/checkpoint.safetensors"),
    ("prior", "reconstruct", "work/prior00-*"),
    ("generator", "reconstruct", "stages/reconstruct/.tmp-*"),
    ("evaluate", "evaluate", "stages/evaluate/.tmp-*"),
    ("report", "report", ""),
]  # fmt: skip


@pytest.mark.slow  # one kill in every stage is in tests/test_pipeline.py
def test_four_kills(killer):
    states, _ = _run_to(killer, "run", "synthetic_digits", FEW)
    stages = [
        ("preprocess", "preprocess", "stages/preprocess/.tmp-*"),
        ("reconstruct", "reconstruct", "stages/reconstruct/.tmp-*"),
        ("evaluate", "evaluate", "stages/evaluate/.tmp-*"),
        ("report", "report", ""),
    ]
    numbers = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)
    for case, number in zip(_list_cases(states, "synthetic_digits", FEW, stages), numbers, strict=True):
        killer.kill_in(case, "run", 1, (number,))
    assert killer.check() == 4


@pytest.fixture
def slow_server():
    """Serve a file of 4 MB in a third of a second."""
    content = np.random.default_rng(0).bytes(1 << 22)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range", "bytes=0-")
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", '"v1"')
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            for first in range(start, len(content), 1 << 17):
                time.sleep(0.01)
                try:
                    self.wfile.write(content[first : first + (1 << 17)])
                except OSError:  # the reader was killed
                    return

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/a.bin", content
    server.shutdown()
    server.server_close()


MODULES = ("torch._dynamo", "accelerate", "mne", "timm", "diffusers")


@pytest.fixture
def show(killer, capsys):
    """Show stages and differences as they come, and the table of all in the end."""

    def print_now(text):
        with capsys.disabled():
            print(text, flush=True)

    killer.show = print_now
    yield
    print_now(killer.tell())


@pytest.mark.slow
@pytest.mark.parametrize("killer", [MODULES], indirect=True, ids=["all"])
def test_kills_of_a_run_that_trains(killer, show):
    """A network, a prior and a generator are trained, and go on from their checkpoints."""
    states, _ = _run_to(killer, "trained", "synthetic_digits", TRAINED)
    for case in _list_cases(states, "synthetic_digits", TRAINED, OF_TRAINED):
        killer.kill_in(case, "run", 8)
    assert killer.check() == 64


@pytest.mark.slow
@pytest.mark.parametrize("killer", [MODULES], indirect=True, ids=["all"])
def test_kills_from_simulated_recordings_to_exports(killer, show):
    """Raw EEG is preprocessed, its images embedded, and a finished run applied and exported."""
    root = killer.folder / "phantom"
    made = ("phantom", "things-eeg2", "--size", "tiny", "--out", "{out}")
    killer.kill_in(Case("phantom", made, "*"), "phantom", 6)
    assert killer.nursery.run([w.replace("{out}", str(root)) for w in made], killer.folder / "cache") == 0
    values = [
        "encoder={kind: ridge, alphas: [1, 100], n_inner_folds: 3}",
        "generator={kind: nearest}",
        "prior={kind: identity}",
        *FEW[2:],
    ]
    states, finished = _run_to(killer, "eeg", "phantom_eeg_network", values, root)
    stages = [
        ("preprocess EEG", "preprocess", "stages/preprocess/.tmp-*"),
        ("preprocess, a session", "preprocess", "work/preprocess-*/part-*"),
        ("embed", "embed", "stages/embed/.tmp-*"),
        ("train ridge", "train", "stages/train/.tmp-*"),
        ("evaluate EEG", "evaluate", "stages/evaluate/.tmp-*"),
    ]
    for case in _list_cases(states, "phantom_eeg_network", values, stages, root):
        killer.kill_in(case, "run", 6)
    # Of the finished run, whose analysis goes on after its last fit.
    asked = ("analyze", "{out}", "--analysis", "time_generalization", *_set(values[3:]))
    killer.kill_in(Case("analyze", asked, "work/analyze-*/part-*", finished), "analyzed", 3)
    predict = Case("predict", ("predict", str(finished), "--on", str(root), "--out", "{out}"))
    killer.kill_in(predict, "predicted", 6)
    for to, ending in (("csv", "scores.csv"), ("netcdf", "responses.nc")):
        what = ending.partition(".")[0]
        words = ("export", str(finished), "--what", what, "--to", to, "--out", "{out}")
        killer.kill_in(Case(f"export {what}", words), ending, 3)
    assert killer.check() == 51


@pytest.mark.slow
@pytest.mark.parametrize("killer", [MODULES], indirect=True, ids=["all"])
def test_kills_of_single_commands(killer, slow_server, show):
    predicted = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    np.save(killer.folder / "predicted.npy", predicted)
    np.save(killer.folder / "targets.npy", predicted + 1)
    score = ("score", str(killer.folder / "predicted.npy"), "--targets", str(killer.folder / "targets.npy"))
    killer.kill_in(Case("score", (*score, "--out", "{out}")), "scored", 6)
    url, content = slow_server
    fetch = ("fetch", url, "{out}", hashlib.sha256(content).hexdigest(), str(len(content)))
    killer.kill_in(Case("fetch", fetch, "*"), "toy", 6)
    toy = [word for key, value in TOY_GENERATOR.items() for word in ("--set", f"{key}={value}")]
    generator = Case("generator pairs", ("train-generator", "--out", "{out}", *toy), "pairs")
    killer.kill_in(generator, "generator", 1)
    # The pairs take longest; from here on they are there.
    drawn = shutil.copytree(killer.folder / "killed" / "generator", killer.folder / "drawn")
    for path in [path for path in drawn.iterdir() if path.is_file() and path.name != "training.json"]:
        path.unlink()
    killer.kill_in(
        replace(generator, stage="generator networks", begun="log.jsonl", before=drawn), "generator", 5
    )
    assert killer.check() == 18


SHARED = [
    *FEW,
    "dataset.n_train=40",
    "split={kind: kfold, n_folds: 4}",
    NETWORK.replace("epochs: 6", "epochs: 3"),
]


def _list_stages(out):
    """Return the files of the stages; jobs and logs name processes."""
    return {name: digest for name, digest in list_results(out).items() if "stages" in Path(name).parts}


@pytest.mark.slow
@pytest.mark.parametrize("killer", [MODULES], indirect=True, ids=["all"])
def test_kills_of_a_corpus(killer, show):
    people = killer.folder / "people"
    made = ("phantom", "corpus-eeg", "--size", "tiny", "--out", str(people))
    assert killer.nursery.run(made, killer.folder / "cache") == 0, killer.nursery.said
    grown = ("corpus", "{out}", "--set", "channels.kind=meeg", "--set", "shard_mb=0.05")
    corpus = Case(
        "corpus", (*grown, "--add", str(people / "siteA")), "stages/shard/.tmp-*", spared="earlier/"
    )
    killer.kill_in(corpus, "corpus", 6, (signal.SIGKILL,))
    # The present state of the moment of the kill, and that of the end.
    assert len(list(killer.folder.glob("killed/corpus/earlier/*"))) <= 2
    assert killer.check() == 6


@pytest.mark.slow
@pytest.mark.parametrize("killer", [MODULES], indirect=True, ids=["all"])
def test_kills_of_one_of_two_workers(killer, show):
    """The other one goes on, and the same command finishes what was left."""
    where = ["synthetic_digits", *_set(SHARED), "--out"]
    alone, cache = killer.folder / "alone", killer.folder / "cache"
    assert killer.nursery.run(["train", *where, str(alone)], cache) == 0, killer.nursery.said
    expected = _list_stages(alone)
    killer.stages += ["train, workers"]
    for kill in range(6):
        out = killer.folder / f"shared-{kill}"
        shares = [[*where, str(out), "--worker", str(n), "--workers", "2"] for n in range(2)]
        pids = [killer.nursery.start(["train", *words], cache) for words in shares]
        begun = Case("train, workers", (), "work/train*")
        assert killer.follow(begun, pids[kill % 2], out) is None, killer.nursery.said
        time.sleep(killer.draw.uniform(0, 1))
        os.kill(pids[kill % 2], signal.SIGKILL)
        codes = [killer.nursery.wait(pid) for pid in pids]
        assert codes[1 - kill % 2] == 0, killer.nursery.said
        assert killer.nursery.run(["train", *shares[kill % 2]], cache) == 0, killer.nursery.said
        left = list_leftovers(out)
        killer.counts["train, workers", "kills"] += 1
        killer.counts["train, workers", "identical"] += _list_stages(out) == expected
        killer.counts["train, workers", "left"] += bool(left)
    assert killer.check() == 6
