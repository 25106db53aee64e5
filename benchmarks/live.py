"""Live decoding in numbers: latency, exactness, losses and what causal filters cost; printed, and written for the docs.

    python benchmarks/live.py --quick                           # fewer decisions, a few minutes
    python benchmarks/live.py --write docs/research/BENCHMARKS.md   # renews its section; most of an hour on one core
    python benchmarks/live.py --only latency million            # some rows; --list names them

Everything is simulated (`braindecode_vis.parts.phantom`). Each part runs in a process of its own, on one core and one
thread, after a warm-up that does not count. Wall time is what a user waits and holds what else the machine does;
processor time beside it does not. Exit code 1 says that a number missed its bar.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # one core
import argparse
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import put_section

WARM = 50  # decisions, and a search twice: what is loaded late is loaded by then
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "0.1 to 40 Hz": {"l_freq": 0.1, "h_freq": 40.0},
    "1 to 30 Hz": {"l_freq": 1.0, "h_freq": 30.0},
    "1 to 30 Hz, notch at 50 Hz": {"l_freq": 1.0, "h_freq": 30.0, "notch": [50.0]},
}


@dataclass(frozen=True)
class Row:
    """One number, what it should be, and how it was had."""

    what: str
    found: str
    bar: str = ""
    holds: bool | None = None
    words: str = ""


@dataclass(frozen=True)
class Size:
    """How much is simulated."""

    decisions: int
    minutes: float
    age_s: float
    million: int
    searches: int
    concepts: int
    test_concepts: int
    repetitions: int
    voxel_mm: float


SIZES = {
    "tiny": Size(8, 0.2, 2.0, 500, 5, 6, 4, 2, 12.0),
    "quick": Size(200, 1.0, 20.0, 100_000, 50, 40, 20, 8, 6.0),
    "full": Size(1000, 10.0, 120.0, 1_000_000, 1000, 150, 50, 20, 1.7),
}


# --- what is measured with ------------------------------------------------------------------------------------


class Watched:
    """A decoder whose decisions are timed, from the chunk that completes an epoch to when they are handed on."""

    def __init__(self, decoder: Any, embeddings: bool = False) -> None:
        self._decoder, self._embeddings = decoder, embeddings
        self.decisions: list[Any] = []
        self.wall: list[float] = []
        self.processor: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def feed(self, chunk: Any) -> Iterator[Any]:
        since = time.perf_counter(), time.process_time()
        for one in self._decoder.feed(chunk):
            wall, processor = time.perf_counter() - since[0], time.process_time() - since[1]
            if not isinstance(one, str):
                self._keep(one)
                if not one.lost and one.image is None:
                    self.wall.append(1000 * wall)
                    self.processor.append(1000 * processor)
            yield one

    def flush(self) -> Iterator[Any]:
        for one in self._decoder.flush():
            if not isinstance(one, str):
                self._keep(one)
            yield one

    def _keep(self, one: Any) -> None:
        # Memory is watched, and must not be the benchmark's own.
        self.decisions.append(one if self._embeddings else replace(one, epoch=None, embedding=None))


def tell_times(values: Sequence[float]) -> str:
    p50, p99, most = np.percentile(values, (50, 99, 100))
    return f"{p50:.1f} / {p99:.1f} / {most:.1f} ms"


def read_resident() -> float:
    """Return the resident memory of this process in MB."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def read_own_memory() -> float:
    """Return the resident memory that is not a file's, in MB: pages of a memory map can be dropped at any time."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 2**10
    return read_resident()


def tell_load() -> str:
    return f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


# --- what is decoded ------------------------------------------------------------------------------------------


def make_eeg(folder: Path, size: Size) -> Path:
    """Return the folder of a phantom of THINGS-EEG2's raw files, made once."""
    from braindecode_vis.parts import phantom
    from braindecode_vis.parts.studies import demo

    root = folder / "eeg"
    if not (root / "phantom_truth").is_dir():
        small = phantom.SIZES["things-eeg2"]["tiny"]
        chosen = replace(
            small, n_subjects=1, n_train_concepts=size.concepts, n_train_exemplars=4, train_repetitions=2,
            n_test_concepts=size.test_concepts, test_repetitions=size.repetitions,
        )  # fmt: skip
        demo.make_phantom("things-eeg2", root, size=chosen, snr=0.5, seed=0)
    return root


def open_ridge(
    folder: Path, size: Size, name: str = "no filter", *, images: bool = False, causal: bool = False
) -> Any:
    """Return a finished run of ridge regression on 17 channels, with or without what makes images."""
    from braindecode_vis.pipeline.finished_run import open_finished

    place = folder / ("images" if images else f"ridge-{list(FILTERS).index(name)}{'-causal' * causal}")
    content = {
        "name": "ridge", "seed": 0,
        "dataset": {"kind": "things_eeg2", "root": str(make_eeg(folder, size)), "channels": "posterior17",
                    "mvnn": "epochs", "dtype": "float32", **FILTERS[name], **({"causal": True} if causal else {})},
        "split": {"kind": "published"}, "repeats": {"train": "averaged", "test": "averaged" if images else "single"},
        "target": {"kind": "efficientnet-lite0"},
        "encoder": {"kind": "ridge", "alphas": [100, 1000, 10000, 100000, 1000000]},
        "prior": {"kind": "neighbours", "images": "generator"}, "generator": {"kind": "latent_diffusion"},
    }  # fmt: skip
    train_once(place, content, images)
    return open_finished(place)


def open_network(folder: Path, size: Size) -> Any:
    """Return a run of ATM-S at its published size, to 1024 values, after one epoch."""
    from braindecode_vis.parts.phantom import read_truth
    from braindecode_vis.pipeline.finished_run import open_finished

    root = make_eeg(folder, size)
    place, vectors = folder / "network", folder / "vectors.npy"
    ids = read_truth(root).read_stimuli()["stimulus_id"].astype(str)
    np.save(vectors, np.random.default_rng(0).standard_normal((len(ids), 1024)).astype(np.float32))
    (folder / "ids.txt").write_text("\n".join(ids) + "\n")
    content = {
        "name": "network", "seed": 0,
        "dataset": {"kind": "things_eeg2", "root": str(root), "channels": "all63", "mvnn": "epochs",
                    "dtype": "float32"},
        "split": {"kind": "published"}, "repeats": {"train": "averaged", "test": "single"},
        "target": {"kind": "imported", "layout": "rows", "files": str(vectors), "ids": str(folder / "ids.txt"),
                   "network": "random"},
        "encoder": {"kind": "network", "network": {"kind": "atm_s"}, "epochs": 1, "batch_size": 64},
        "generator": {"kind": "nearest"},
    }  # fmt: skip
    train_once(place, content)
    return open_finished(place)


def train_once(place: Path, content: Any, images: bool = False) -> None:
    from braindecode_vis import pipeline
    from braindecode_vis.config.source import validate_config
    from braindecode_vis.pipeline.runs import open_run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = (
            validate_config(content, where="benchmarks/live.py") if isinstance(content, dict) else content
        )
        (pipeline.reconstruct if images else pipeline.train)(open_run(config, place))


def decode(
    decoder: Any, source: Any, listeners: Sequence[Any] = (), *, embeddings: bool = False, **options: Any
) -> tuple[Watched, dict[str, Any]]:
    """Run a session, and return what it decided and its summary."""
    from braindecode_vis.parts.live.session import LiveSession

    watched = Watched(decoder, embeddings)
    return watched, LiveSession(source, watched, listeners, **options).run()


# --- one epoch ------------------------------------------------------------------------------------------------


def measure_latency(folder: Path, size: Size) -> list[Row]:
    """End of an epoch to the five best of 16 540 pictures."""
    from braindecode_vis.base.arrays import Embeddings
    from braindecode_vis.parts.live.replay import ReplaySource, open_phantom
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder
    from braindecode_vis.parts.phantom import read_truth
    from braindecode_vis.pipeline.preparing import embed

    run = open_network(folder, size)
    table = read_truth(make_eeg(folder, size)).read_stimuli()
    shown = table["stimulus_id"].astype(str)[table["split"] == "test"].tolist()
    n = 16_540
    vectors = np.random.default_rng(1).standard_normal((n, 1024)).astype(np.float32)
    space = embed(run)[0].embeddings.space
    gallery = Embeddings(vectors, [*shown, *(f"image-{i}" for i in range(n - len(shown)))], space)
    decoder = RunStreamDecoder(run, gallery=gallery)
    source = ReplaySource(open_phantom(make_eeg(folder, size), split="test"))
    watched, summary = decode(decoder, source, decisions=size.decisions + WARM)
    wall, processor = watched.wall[WARM:], watched.processor[WARM:]
    good = np.percentile(processor, 50) < 10 and np.percentile(processor, 99) < 20
    parts = ", ".join(
        f"{name} {row['p50']:.1f}"
        for name, row in summary["latency_ms"].items()
        if name not in ("wait", "delay")
    )
    what = "End of epoch to top-5 of 16 540 x 1024, ATM-S 63 x 250, chunks of 20 samples at 1000 Hz"
    size_of = decoder.judge.own.data.shape[1:]
    return [
        Row(
            f"{what}: processor time, p50 / p99 / longest", tell_times(processor), "10 / 20 ms", bool(good),
            f"{len(processor)} decisions, {' x '.join(map(str, size_of))}, rank of the shown picture included",
        ),
        Row(
            "the same, wall time", tell_times(wall), "10 / 20 ms",
            bool(np.percentile(wall, 50) < 10 and np.percentile(wall, 99) < 20),
            f"medians of parts in ms: {parts}; {tell_load()}",
        ),
    ]  # fmt: skip


def write_gallery(folder: Path, n: int, kind: str) -> Path:
    """Write embeddings block by block: nested clusters with a spectrum that decays, or random directions."""
    from braindecode_vis.base.store import write_json

    place = folder / f"gallery-{kind}"
    if (place / "ids.json").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    rng, n_features = np.random.default_rng(2), 1024
    vectors = np.lib.format.open_memmap(place / "vectors.npy", "w+", np.float32, (n, n_features))
    spectrum = np.arange(1, n_features + 1, dtype=np.float32) ** -0.5
    tops, middles = (rng.standard_normal((k, n_features)).astype(np.float32) for k in (30, 2000))
    for start in range(0, n, 10_000):
        block = rng.standard_normal((min(10_000, n - start), n_features), dtype=np.float32)
        if kind == "clustered":
            concept = rng.integers(0, 2000, len(block))
            block = (0.5 * tops[concept % 30] + 0.6 * middles[concept] + 0.6 * block) * spectrum
        vectors[start : start + len(block)] = block
    vectors.flush()
    write_json(place / "ids.json", {"ids": [f"image-{i}" for i in range(n)], "space": "simulated"})
    return place


def measure_million(folder: Path, size: Size) -> list[Row]:
    """The five best of a million in clusters, and that they are the best."""
    return search_million(folder, size, "clustered", size.searches)


def measure_isotropic(folder: Path, size: Size) -> list[Row]:
    """The five best of a million random directions."""
    return search_million(folder, size, "isotropic", max(3, size.searches // 100))


def search_million(folder: Path, size: Size, kind: str, n_searches: int) -> list[Row]:
    from braindecode_vis.base.store import read_embeddings
    from braindecode_vis.scoring.retrieval import GallerySearch

    place = write_gallery(folder, size.million, kind)
    gallery = read_embeddings(place)
    before, began = read_own_memory(), time.process_time()
    search = GallerySearch(gallery, **({} if size.million > 20_000 else {"scanned": 0}))
    built, held = time.process_time() - began, read_own_memory() - before
    rng, spectrum = np.random.default_rng(3), 1.0
    if kind == "clustered":
        spectrum = np.arange(1, gallery.vectors.shape[1] + 1) ** -0.5
    wall, processor, checks = [], [], []
    for number in range(n_searches + 3):
        seen = np.asarray(gallery.vectors[rng.integers(len(gallery))], np.float64)
        noise = rng.standard_normal(len(seen)) * spectrum
        query = seen / np.linalg.norm(seen) + 2.3 * noise / np.linalg.norm(noise)
        since = time.perf_counter(), time.process_time()
        found = search.find(query, 5)
        search.sum_exponentials(query, 50.0)
        if number >= 3:  # the first touch pages and load
            wall.append(1000 * (time.perf_counter() - since[0]))
            processor.append(1000 * (time.process_time() - since[1]))
        elif number:
            checks.append(np.array_equal(found[0], find_slowly(gallery.vectors, query)))
    words = "predictions at cosine 0.4 of their picture; " + (
        "nested clusters, decaying spectrum" if kind == "clustered" else "random directions"
    )
    exact = "the same as by brute force" if all(checks) else "NOT THE SAME as by brute force"
    bar = "150 ms" if kind == "clustered" else ""
    title = f"Top-5 of {size.million:,} x 1024, {kind}".replace(",", " ", 1).replace(",000 x", " 000 x")
    return [
        Row(f"{title}: processor time, p50 / p99 / longest", tell_times(processor), bar,
            all(checks) and (bool(np.percentile(processor, 50) < 150) if bar else None),
            f"{len(processor)} searches; {words}; {exact}"),
        Row("the same, wall time", tell_times(wall), bar, bool(np.percentile(wall, 50) < 150) if bar else None,
            f"index of {held:.0f} MB beside a file of {gallery.vectors.nbytes / 2**20:.0f} MB, made in {built:.0f} s "
            f"of processor time; {tell_load()}"),
    ]  # fmt: skip


def find_slowly(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    unit = query / np.linalg.norm(query)
    cosines = np.concatenate([
        (block.astype(np.float64) @ unit) / np.linalg.norm(block.astype(np.float64), axis=1)
        for block in (vectors[start : start + 20_000] for start in range(0, len(vectors), 20_000))
    ])  # fmt: skip
    return np.argsort(-cosines)[:5]


def measure_image(folder: Path, size: Size) -> list[Row]:
    """A decision to its image by the embedded generator."""
    import torch

    from braindecode_vis.parts.live.replay import ReplaySource, open_phantom
    from braindecode_vis.parts.live.session import LiveSession
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder
    from braindecode_vis.parts.live.stream_roles import Listener

    torch.set_num_threads(2)
    begun: dict[int, float] = {}
    made: list[float] = []

    class Clock(Listener):
        def decide(self, decision: Any) -> None:
            if decision.lost:
                return
            if decision.image is None:
                begun[decision.number] = time.perf_counter()
            else:
                made.append(1000 * (time.perf_counter() - begun[decision.number]))

    n = max(3, size.decisions // 25)
    root = make_eeg(folder, size)
    decoder = RunStreamDecoder(open_ridge(folder, size, images=True), reconstruct=True)
    maker, processor = decoder._reconstructor, []
    make = maker._make

    def make_watched(*given: Any) -> Any:
        since = time.process_time()
        image = make(*given)
        processor.append(1000 * (time.process_time() - since))
        return image

    maker._make = make_watched
    source = ReplaySource(open_phantom(root, split="test", soa=2.0), speed=1.0)
    LiveSession(source, decoder, [Clock()], duration=2.0 * n + 5).run()
    kept, spent = made[2:] or made, processor[2:] or processor
    return [
        Row("Decision to its image, embedded generator, wall time, p50 / p99 / longest", tell_times(kept), "1000 ms",
            bool(np.percentile(kept, 50) < 1000),
            f"{len(kept)} images of a stream in real time, two threads; processor time of both threads "
            f"{tell_times(spent)}; {tell_load()}")
    ]  # fmt: skip


# --- live and offline -------------------------------------------------------------------------------------------


def measure_filters(folder: Path, size: Size) -> list[Row]:
    """The same samples live and offline, and how much accuracy filters that look back only cost."""
    rows = []
    for name in FILTERS:
        rows += compare_filter(folder, size, name)
    return rows


def compare_filter(folder: Path, size: Size, name: str) -> list[Row]:
    from braindecode_vis.parts.live.replay import ReplaySource, open_playback
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder
    from braindecode_vis.pipeline.learning import pick_test_trials
    from braindecode_vis.scoring.uncertainty import bootstrap_interval

    run = open_ridge(folder, size, name)
    test = pick_test_trials(run, 0)
    session = str(test.trials["session"].iloc[0])
    subject = str(test.trials["subject"].iloc[0])
    decoder = RunStreamDecoder(run, session=session, subject=subject)
    playback = open_playback(run.folder.path, split="test")
    watched, _ = decode(decoder, ReplaySource(playback), embeddings=True)
    live = {key: one for key, one in number_shows(watched.decisions) if not one.lost}
    # The run's own test: zero-phase filters over whole recordings, single trials, the same gallery.
    zero = run_predictions(decoder, test)
    keys = [key for key in zero if key in live]
    off = {key: rank_of(decoder, zero[key], key[0]) for key in keys}
    own = {key: live[key].rank for key in keys}
    whole = filter_whole(decoder, playback)
    gap = max(float(np.abs(live[key].embedding - whole[key]).max()) for key in keys if key in whole)
    scale = float(np.mean([np.linalg.norm(live[key].embedding) for key in keys]))
    clusters = np.array([key[0] for key in keys])

    def tell(ranks: Mapping[Any, int], k: int = 5) -> str:
        hits = np.array([ranks[key] <= k for key in keys], float)
        interval = bootstrap_interval(hits, clusters=clusters, n_boot=2000)
        return f"{hits.mean():.3f} [{interval.low:.3f}, {interval.high:.3f}]"

    def cost(ranks: Mapping[Any, int]) -> str:
        hits = np.array([(ranks[key] <= 5) - float(off[key] <= 5) for key in keys], float)
        interval = bootstrap_interval(hits, clusters=clusters, n_boot=2000)
        return f"{hits.mean():+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"

    delay = f"delay {decoder.delay_ms:.0f} ms"
    n = len(decoder.judge.search)
    chance = f"top-5 of {n}, chance {5 / n:.3f}, {len(keys)} single trials"
    rows = [
        Row(f"Live and offline, {name}: largest difference of an embedding", f"{gap:.1e}", "1e-5", gap <= 1e-5,
            f"the same causal filters over the whole recording at once, {len(whole)} trials; mean norm {scale:.2g}"),
        Row(f"Top-5, {name}: zero-phase, as the run", tell(off), "", None, f"{chance}; intervals resample pictures"),
        Row("live, causal filters", tell(own), "", None, f"cost {cost(own)}; {delay}"),
    ]  # fmt: skip
    if not FILTERS[name]:
        return rows
    looking_back = open_ridge(folder, size, name, causal=True)
    trained = RunStreamDecoder(looking_back, session=session, subject=subject)
    again, _ = decode(
        trained, ReplaySource(open_playback(looking_back.folder.path, split="test")), embeddings=True
    )
    causal = {key: one for key, one in number_shows(again.decisions) if not one.lost}
    stored = run_predictions(trained, pick_test_trials(looking_back, 0))
    # Of the session whose statistics are applied; those of the others are another session's.
    of_session = [
        key for key, name in zip(stored, test.trials["session"].astype(str), strict=True) if name == session
    ]
    gap = max(float(np.abs(causal[key].embedding - stored[key]).max()) for key in of_session if key in causal)
    return [
        *rows,
        Row("live, trained with dataset.causal", tell({key: causal[key].rank for key in keys}), "", None,
            f"cost {cost({key: causal[key].rank for key in keys})}"),
        Row("live and its own offline test, largest difference of an embedding", f"{gap:.1e}", "1e-5", gap <= 1e-5,
            f"{len(of_session)} trials of the session whose statistics are applied"),
    ]  # fmt: skip


def measure_bridges(folder: Path, size: Size) -> list[Row]:
    """What gaps cost that are drawn straight: the same trials of the same stream with and without them."""
    from braindecode_vis.parts.live.replay import Faults, ReplaySource, open_playback
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder
    from braindecode_vis.scoring.uncertainty import bootstrap_interval

    run, found, lost = open_ridge(folder, size), {}, 0
    for name, faults in (("whole", None), ("gaps", Faults(drop=0.01, seed=0))):
        source = ReplaySource(open_playback(run.folder.path, split="test"), faults=faults)
        watched, summary = decode(RunStreamDecoder(run), source)
        found[name] = dict(number_shows(watched.decisions))
        lost = summary["n_lost"]
    bridged, whole = {}, {}
    for key, one in found["gaps"].items():
        if not one.lost and key in found["whole"] and not found["whole"][key].lost:
            held = any(note.startswith("bridged:") for note in one.notes)
            (bridged if held else whole)[key] = one
    n = int(summary["scores"]["top1"]["chance"] ** -1 + 0.5)

    def tell(hits: Mapping[Any, float], sign: str = "") -> str:
        values, clusters = np.array(list(hits.values())), np.array([key[0] for key in hits])
        interval = bootstrap_interval(values, clusters=clusters, n_boot=2000)
        return f"{values.mean():{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"

    cost = {key: float(one.rank <= 5) - float(found["whole"][key].rank <= 5) for key, one in bridged.items()}
    return [
        Row("Top-5 of decisions with a bridged gap", tell({key: float(one.rank <= 5) for key, one in bridged.items()}),
            "", None, f"{len(bridged)} of {len(found['gaps'])} decisions, {lost} lost; 1 % of the chunks of 20 ms "
            f"dropped; top-5 of {n}, chance {5 / n:.3f}; against the same trials without gaps {tell(cost, '+')}"),
        Row("Top-5 of decisions without one", tell({key: float(one.rank <= 5) for key, one in whole.items()}), "", None,
            f"{len(whole)} decisions of the same stream; intervals resample pictures"),
    ]  # fmt: skip


def number_shows(decisions: Iterable[Any]) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yield decisions with the id of the picture and how often it was shown before, also where that was lost."""
    count: Counter[str] = Counter()
    for one in sorted(decisions, key=lambda one: one.onset):
        yield (one.marker, count[one.marker]), one
        count[one.marker] += 1


def run_predictions(decoder: Any, test: Any) -> dict[tuple[str, int], np.ndarray]:
    fitted, encoder = decoder.judge.fitted[0], decoder.judge.encoders[0]
    predicted = encoder.predict(test if fitted.selection is None else fitted.selection.apply(test))
    count: Counter[str] = Counter()
    found = {}
    for name, vector in zip(test.stimulus_ids.astype(str), predicted.vectors, strict=True):
        found[str(name), count[name]] = vector
        count[name] += 1
    return found


def rank_of(decoder: Any, vector: np.ndarray, name: str) -> int:
    from braindecode_vis.base.arrays import Embeddings

    query = decoder.judge.centre.apply(Embeddings(vector[None], [name], "x")).vectors[0]
    return 1 + sum(decoder.judge.search.count_above(query, decoder.judge.row_of[name]))


def filter_whole(decoder: Any, playback: Any) -> dict[tuple[str, int], np.ndarray]:
    """Return what the run's own functions make of the whole recording, causally filtered in one piece."""
    from braindecode_vis.preprocessing.causal import CausalFilter
    from braindecode_vis.preprocessing.epochs import cut_stretch

    blocks, markers = [], []
    for samples, found in playback.blocks():
        blocks.append(np.asarray(samples, np.float64))
        markers += found
    mixed = decoder._mixing @ np.concatenate(blocks, axis=1)[decoder._used]
    causal = CausalFilter.of(decoder._plan.cleaning, decoder._sfreq)
    signal = causal.push(mixed)
    n = signal.shape[1]
    inside = [
        (at, name)
        for at, name in markers
        if at + decoder._first >= 0 and at + decoder._last + decoder._half < n
    ]
    onsets = np.array([at for at, _ in inside])
    block = cut_stretch(lambda a, b: signal[:, a:b], onsets, (0, n), decoder._sfreq, decoder._plan)[0]
    block = decoder.judge.statistics.apply(block, decoder.judge.subject, decoder.judge.session)
    count, found_vectors = Counter[str](), {}
    order = {at: row for row, at in enumerate(onsets.tolist())}
    for at, name in markers:
        if at in order:
            found_vectors[name, count[name]] = decoder.judge.predict(block[order[at]][None]).vectors[0]
        count[name] += 1
    return found_vectors


# --- a long session ---------------------------------------------------------------------------------------------


class MemoryByMinute:
    """A listener that notes the resident memory of every minute of the stream."""

    def __init__(self) -> None:
        self.resident: list[float] = []
        self._begin: float | None = None

    def hear(self, chunk: Any) -> None:
        if len(chunk.times):
            self._begin = float(chunk.times[0]) if self._begin is None else self._begin
            while chunk.times[-1] - self._begin > 60 * (len(self.resident) + 1) - 1:
                self.resident.append(read_resident())

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def keep_markers(playback: Any, sent: list[tuple[int, str]]) -> Any:
    def blocks() -> Iterator[Any]:
        for samples, markers in playback.blocks():
            sent.extend(markers)
            yield samples, markers

    return replace(playback, blocks=blocks)


def make_faults(minutes: float) -> Any:
    from braindecode_vis.parts.live.replay import Faults

    return Faults(drop=0.01, jitter_ms=20.0, pauses=((30 * minutes, min(5.0, 10 * minutes)),), seed=0)


def measure_replay(folder: Path, size: Size) -> list[Row]:
    """Ten minutes with faults, as fast as they can be decoded."""
    from braindecode_vis.parts.live.replay import ReplaySource, open_phantom, shorten
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder

    sent: list[tuple[int, str]] = []
    playback = keep_markers(
        shorten(open_phantom(make_eeg(folder, size), split="test"), 60 * size.minutes), sent
    )
    memory = MemoryByMinute()
    source = ReplaySource(playback, faults=make_faults(size.minutes))
    began = time.perf_counter()
    watched, summary = decode(RunStreamDecoder(open_ridge(folder, size)), source, [memory])
    speed = 60 * size.minutes / (time.perf_counter() - began)
    sfreq = playback.info.sfreq
    expected = Counter((value, round(sample / sfreq, 3)) for sample, value in sent)
    return judge_session(
        "in process", f"{speed:.0f} times real time", expected, watched, summary, memory.resident
    )


def judge_session(
    where: str,
    how: str,
    expected: Counter[Any],
    watched: Watched,
    summary: Mapping[str, Any],
    resident: Sequence[float],
) -> list[Row]:
    found = Counter((one.marker, round(one.onset, 3)) for one in watched.decisions)
    missing, doubled = sum((expected - found).values()), sum((found - expected).values())
    lost = ", ".join(f"{n} {kind}" for kind, n in summary["lost"].items()) or "none"
    n_lost = summary["n_lost"]
    growth = resident[-1] - resident[min(1, len(resident) - 1)] if resident else math.nan
    return [
        Row(f"Faults, {where}: markers without a decision / decisions without a marker",
            f"{missing} / {doubled}", "0 / 0", missing == doubled == 0,
            f"{sum(expected.values())} markers, 1 % of the chunks of 20 samples dropped, jitter of 20 ms, one pause "
            f"with a new connection; {sum(found.values()) - n_lost} decided, lost and named: {lost}; {how}"),
        Row("resident memory by minute", ", ".join(f"{value:.0f}" for value in resident) + " MB", "flat",
            bool(growth < 10) if resident else None, f"{growth:+.1f} MB from the second minute to the last"),
    ]  # fmt: skip


def play_phantom(root: str, name: str, seconds: float, faults: Any, sent: Any) -> None:
    """Play in a process of its own, and hand back the markers that were sent."""
    from braindecode_vis.parts.live.replay import open_phantom, play, shorten

    markers: list[tuple[int, str]] = []
    playback = keep_markers(shorten(open_phantom(Path(root), split="test"), seconds), markers)
    play(playback, name, faults=faults, wait=True)
    sent.put(markers)


class AgeSource:
    """A source of LSL, and how old the samples of each chunk are when they are handed over."""

    def __init__(self, source: Any) -> None:
        from mne_lsl.lsl import local_clock

        self._source, self._clock = source, local_clock
        self.ages: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, timeout: float) -> Any:
        chunk = self._source.read(timeout)
        if len(chunk.times):
            now = self._clock()
            self.ages.append((1000 * (now - chunk.times[-1]), 1000 * (now - chunk.times[0])))
        return chunk


def run_loopback(folder: Path, size: Size, seconds: float, faults: Any) -> tuple[Any, ...]:
    from braindecode_vis.parts.live.opening import open_source
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder

    decoder = RunStreamDecoder(open_ridge(folder, size))
    name = f"benchmark-{os.getpid()}"
    context = multiprocessing.get_context("spawn")
    sent = context.Queue()
    player = context.Process(
        target=play_phantom, args=(str(make_eeg(folder, size)), name, seconds, faults, sent)
    )
    player.start()
    memory = MemoryByMinute()
    source = AgeSource(open_source("lsl", name, timeout=60.0))
    try:
        watched, summary = decode(decoder, source, [memory], duration=seconds + 3)
        markers = sent.get(timeout=60)
    finally:
        player.join(20)
        player.terminate()
    return markers, watched, summary, memory.resident, source.ages


def measure_loopback(folder: Path, size: Size) -> list[Row]:
    """The same faults over the Lab Streaming Layer, in real time."""
    markers, watched, summary, resident, _ = run_loopback(
        folder, size, 60 * size.minutes, make_faults(size.minutes)
    )
    # Clocks differ by an unknown start; each picture is compared by how often it was shown.
    expected = Counter(value for _, value in markers)
    for one, decision in enumerate(watched.decisions):
        watched.decisions[one] = replace(decision, onset=0.0)
    keyed = Counter((value, 0.0) for value in expected.elements())
    return judge_session("LSL over loopback", "real time", keyed, watched, summary, resident)


def measure_age(folder: Path, size: Size) -> list[Row]:
    """How old samples are when they are handed over."""
    _, watched, _, _, ages = run_loopback(folder, size, size.age_s, None)
    kept = np.array(ages[len(ages) // 20 :])
    return [
        Row("Age of the newest sample of a chunk over LSL, p50 / p99 / longest", tell_times(kept[:, 0]), "", None,
            f"{len(kept)} reads, 63 channels at 1000 Hz sent 20 samples at a time, in real time; the oldest of a read: "
            f"{tell_times(kept[:, 1])}"),
        Row("Decisions over LSL, from the arrival of the last sample: wall time",
            tell_times(watched.wall or [math.nan]), "", None,
            f"{len(watched.wall)} decisions, ridge of 17 channels; {tell_load()}"),
    ]  # fmt: skip


def write_scan(image: str, events: str, folder: str, speed: float, written: Any) -> None:
    """Write volumes as a scanner does, in a process of its own, and hand back when each was there."""
    from braindecode_vis.parts.live.volumes import write_volumes

    for _ in write_volumes(Path(image), Path(folder), events=Path(events), speed=speed):
        written.put(time.monotonic())


def measure_volumes(folder: Path, size: Size) -> list[Row]:
    """The last volume of a trial, as a file, to the decision."""
    from braindecode_vis.config import read_config
    from braindecode_vis.parts import phantom
    from braindecode_vis.parts.live.opening import open_session
    from braindecode_vis.parts.live.stream_roles import Listener
    from braindecode_vis.parts.studies import demo
    from braindecode_vis.pipeline.finished_run import open_finished

    root, place, scan = folder / "fmri", folder / "fmri-run", Path(tempfile.mkdtemp(dir=folder))
    if not (root / "phantom_truth").is_dir():
        chosen = replace(phantom.SIZES["bids-fmri"]["tiny"], voxel_mm=size.voxel_mm)
        demo.make_phantom("bids-fmri", root, size=chosen, snr=0.5, seed=0)
    configs = Path(__file__).resolve().parents[1] / "configs"
    config = read_config(configs / "bids_fmri_ridge.yaml", [], root=root)
    train_once(place, config)
    run = open_finished(place)
    image, events = next(root.rglob("*_bold.nii.gz")), next(root.rglob("*_events.tsv"))
    context = multiprocessing.get_context("spawn")
    written, times, decided = context.Queue(), [], []

    class Clock(Listener):
        def decide(self, decision: Any) -> None:
            if not decision.lost and decision.number not in dict(decided):
                decided.append((decision.number, time.monotonic()))

    writer = context.Process(target=write_scan, args=(str(image), str(events), str(scan), 2.0, written))
    writer.start()
    options = {"markers": scan / "events.tsv", "wait": 60.0, "idle": 10.0}
    session = open_session(run, str(scan), source="folder", source_options=options, listeners=[Clock()])
    watched = Watched(session.decoder)
    session.decoder = watched
    summary = session.run()
    writer.join(20)
    writer.terminate()
    with suppress(Exception):
        while True:
            times.append(written.get(timeout=1))
    there = np.array(times)
    waits = [1000 * (when - there[there <= when].max()) for _, when in decided if when <= there[-1] + 1.0]
    n_voxels = session.decoder.judge.own.data.shape[1]
    return [
        Row("Last volume of a trial, as a file, to the decision, wall time, p50 / p99 / longest", tell_times(waits),
            "750 ms, half of a repetition time of 1.5 s", bool(max(waits) < 750),
            f"{len(waits)} decisions and {summary['n_lost']} lost of {len(there)} volumes, {n_voxels} voxels of "
            f"{size.voxel_mm:g} mm, ridge, one volume a second as NIfTI; processor time of the decision "
            f"{tell_times(watched.processor)}; "
            f"{tell_load()}"),
    ]  # fmt: skip


# --- the table --------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path, Size], list[Row]]] = {
    "latency": measure_latency,
    "million": measure_million,
    "isotropic": measure_isotropic,
    "image": measure_image,
    "filters": measure_filters,
    "bridges": measure_bridges,
    "volumes": measure_volumes,
    "replay": measure_replay,
    "loopback": measure_loopback,
    "age": measure_age,
}


def run_part(name: str, folder: str, size: Size) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    if name != "image" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return [asdict(row) for row in PARTS[name](Path(folder), size)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer decisions and smaller sizes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of these names")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the section of this page")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keeps phantom, runs and results for the next call"
    )
    given = parser.parse_args()
    if given.list:
        print("\n".join(PARTS))
        return
    wanted = given.only or list(PARTS)
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    level = "quick" if given.quick else "full"
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.work or Path(temporary)).absolute() / level
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows = [Row(**row) for row in pool.submit(run_part, name, str(folder), SIZES[level]).result()]
            # A part that was measured before stands in the page until it is measured again.
            (folder / f"{name}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
            print(f"{name}\n" + "\n".join(map(tell_row, rows)), flush=True)
            failed |= any(row.holds is False for row in rows)
        if given.write:
            kept = {
                name: [Row(**row) for row in json.loads((folder / f"{name}.json").read_text())]
                for name in PARTS
                if (folder / f"{name}.json").is_file()
            }
            given.write.write_text(renew_section(given.write.read_text(), kept, given.quick))
    sys.exit(failed)


def tell_row(row: Row) -> str:
    verdict = "" if row.holds is None else f" ({'holds' if row.holds else 'MISSED'}: {row.bar})"
    return f"  {row.what}: {row.found}{verdict}{f'; {row.words}' if row.words else ''}"


def renew_section(page: str, parts: Mapping[str, Sequence[Row]], quick: bool) -> str:
    """Return the page with the table between its two marks, added at the end where there are none."""
    from measuring import describe_machine

    lines = ["| what | found | bar | how |", "|---" * 4 + "|"]
    for rows in parts.values():
        for row in rows:
            bar = row.bar if row.holds is not False else f"**{row.bar}, missed**"
            lines.append(f"| {row.what} | {row.found} | {bar} | {row.words} |")
    section = (
        f"## Live decoding\n\nWritten by `python benchmarks/live.py{' --quick' if quick else ''} --write`; do "
        f"not edit. Simulated recordings; each part in a process of its own on one core after a warm-up. Processor "
        f"time leaves out what else the machine does, wall time holds it.\n\n{describe_machine()}\n\n"
        + "\n".join(lines)
    )
    return put_section(page, section, "live.py")


if __name__ == "__main__":
    main()
