"""Which way decodes a new person best, from 0, 15, 60, 200 and 1000 of its trials.

    python benchmarks/studies/new_subject.py --out FOLDER             # all rows; a row that is done is not made again
    python benchmarks/studies/new_subject.py --out FOLDER --ways ridge in_context --subjects 1 2
    python benchmarks/studies/new_subject.py --out FOLDER --table     # only the tables of what is done

Five simulated people of GOD's phantom, whose higher regions follow a mixture of features that the target does not hold
(drive `mixture`). Each in turn is the new one: the ways learn from all training trials of the other four and from some
trials of the new person, drawn at random and nested, and decode its test trials (60 images, four repetitions
averaged). ``voxels`` are the 740 visual voxels of each person, taken as its own; ``parcels`` are their means over the
phantom's atlas, which correspond between people. A row is one way for one person: it keeps the rank of each image and
its time on one core, and stops after ``--limit`` seconds of processor time. Intervals are of people and images
(crossed); differences are paired with ridge on the same trials.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # one core
import argparse
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis import pipeline
from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, Responses, normalise_rows
from braindecode_vis.base.contracts import BrainEncoder
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.config import read_config
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.scoring.crossed import crossed_interval

NUMBERS = (0, 15, 60, 200, 1000)
SIZE = SIZES["god"]["tiny"].replace(
    n_subjects=5, n_train_concepts=270, n_train_exemplars=4, n_test_concepts=60, test_repetitions=4, voxel_mm=6,
    n_imagery=4, n_parcels=400,
)  # fmt: skip
_NETWORK = {
    "kind": "network", "optimiser": {"lr": 1e-3}, "batch_size": 128, "hide_subject": 0,
    "selection": {"kind": "last", "hold_out": 0},
}  # fmt: skip
#: A common space is learnt again in every inner fold.
_ALIGNED = {"kind": "ridge", "n_inner_folds": 2}
#: How a way takes the new person, and its settings: ``alone``, ``joined`` to the trials of the others, or ``added`` to
#: what was learnt from them.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "ridge": ("alone", {"kind": "ridge"}),
    "pooled": ("joined", {"kind": "ridge"}),
    "in_context": ("added", {"kind": "in_context", "simulated_steps": 20, "people_steps": 20}),
    "hyperalignment": (
        "joined",
        _ALIGNED | {"subject_alignment": {"kind": "hyperalignment", "n_components": 100}},
    ),
    "shared_response": (
        "joined",
        _ALIGNED | {"subject_alignment": {"kind": "shared_response", "n_components": 100}},
    ),
    "shared_space": (
        "added",
        _NETWORK | {"network": {"kind": "shared_space", "shared": 256, "n_blocks": 0}, "epochs": 12},
    ),
    "clusters": (
        "added",
        _NETWORK
        | {
            "network": {
                "kind": "voxel_clusters", "n_clusters": 64, "width": 64, "depth": 1, "n_heads": 4, "code_size": 64,
                "code_width": 32, "code_updates": 120, "new_code_updates": 40,
            },
            "epochs": 3,
        },
    ),
}  # fmt: skip
#: Means of directions around the mean image, from predictions of rows that are there already.
AVERAGES = {
    "ridge + in_context": ("ridge", "in_context"),
    "hyperalignment + in_context": ("hyperalignment", "in_context"),
}


def open_people(out: Path) -> tuple[dict[str, Responses], Embeddings]:
    """Return all trials as voxels and as parcels, and the target."""
    root = out / "phantom"
    make_phantom("god", root, size=SIZE, snr=0.1, seed=0, drive="mixture")
    settings = ["dataset.subjects=[1,2,3,4,5]", "dataset.pad_subjects=true"]
    run = open_run(read_config("god_ridge", settings, root=root), out / "run")
    voxels = pipeline.preprocess(run).responses
    voxels = replace(voxels, data=np.array(voxels.data))
    return {"voxels": voxels, "parcels": average_parcels(root, voxels)}, pipeline.embed(run)[0].embeddings


def average_parcels(root: Path, voxels: Responses) -> Responses:
    """Return means over the parcels of the phantom's atlas that every person has."""
    import nibabel

    atlas: Any = nibabel.load(root / "phantom_truth" / "parcels.nii.gz")
    labels, back = np.asarray(atlas.dataobj).astype(int), np.linalg.inv(atlas.affine)
    names, of_voxel = voxels.trials["subject"].astype(str).to_numpy(dtype=object), {}
    for name in dict.fromkeys(names):
        mask, affine = (np.asarray(voxels.coords[f"{key}_sub-{name}"]) for key in ("mask", "affine"))
        places = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
        ijk = np.rint(places @ back[:3, :3].T + back[:3, 3]).astype(int)
        of_voxel[name] = labels[tuple(ijk.T)]
    shared = sorted(set.intersection(*(set(found[found > 0].tolist()) for found in of_voxel.values())))
    data = np.zeros((voxels.n_trials, len(shared)), np.float32)
    for name, found in of_voxel.items():
        rows = np.flatnonzero(names == name)
        mean = np.equal.outer(found, shared) / np.equal.outer(found, shared).sum(axis=0)
        data[rows] = voxels.data[rows][:, : len(found)] @ mean
    return Responses(data, ("trial", "parcel"), voxels.trials, voxels.unit, {"parcel_names": shared})


def measure(way: str, trials: Responses, bank: Embeddings, name: str, row: dict[str, Any]) -> Iterator[None]:
    """Fill a row with predictions and times, number by number; what is measured stays if it is stopped."""
    table = trials.trials
    of_name = (table["subject"].astype(str) == name).to_numpy()
    learns = (table["split"] == "train").to_numpy()
    others = np.flatnonzero(~of_name & learns)
    own = make_generator(0, "new subject", name).permutation(np.flatnonzero(of_name & learns))
    test = average_repetitions(trials, np.flatnonzero(of_name & ~learns))
    row["ids"] = test.stimulus_ids.astype(str).tolist()
    taken, content = WAYS[way]

    def fit(rows: np.ndarray) -> Any:
        settings = validate_component("encoder", dict(content), trusted=True)
        encoder = roles.build(BrainEncoder, settings, seed=0)
        chosen = trials.select(np.sort(rows))
        return encoder.fit(chosen, bank.select(list(chosen.stimulus_ids))) or encoder

    base = None
    if taken == "added":
        start = time.process_time()
        base = fit(others)
        row["base_seconds"] = time.process_time() - start
        yield
    for n in NUMBERS:
        start = time.process_time()
        try:
            if base is None:
                encoder = fit(own[:n] if taken == "alone" else np.r_[others, own[:n]])
            elif n:
                some = trials.select(np.sort(own[:n]))
                ability = base.adaptation
                encoder = (ability.adapt_subject or ability.adapt)(some, bank.select(list(some.stimulus_ids)))
            else:
                encoder = base
            predicted = encoder.predict(test).flat()
        except Exception as error:  # a way that needs trials, or features that correspond
            row["left_out"][str(n)] = f"{type(error).__name__}: {error}"
            continue
        row["seconds"][str(n)] = time.process_time() - start
        row["predicted"][str(n)] = predicted
        yield


def make_row(
    way: str, kind: str, trials: Responses, bank: Embeddings, name: str, limit: float
) -> dict[str, Any]:
    """Return a row, which ends after `limit` seconds of processor time."""

    class OutOfTime(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise OutOfTime

    row: dict[str, Any] = {"seconds": {}, "predicted": {}, "left_out": {}, "base_seconds": 0.0}
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        for _ in measure(way, trials, bank, name, row):
            pass
    except OutOfTime:
        row["left_out"]["later"] = f"stopped after {limit:g} s"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    print(
        f"{kind}, {way}, person {name}: base {row['base_seconds']:.0f} s, "
        + ", ".join(f"{n}: {seconds:.1f} s" for n, seconds in row["seconds"].items())
        + "".join(f"; {n} left out: {why[:100]}" for n, why in row["left_out"].items()),
        flush=True,
    )
    return row


def keep(path: Path, row: dict[str, Any]) -> None:
    """Write a row: numbers as JSON, predictions beside them."""
    predicted = row.pop("predicted")
    np.savez_compressed(path.with_suffix(".npz"), **{n: p.astype(np.float16) for n, p in predicted.items()})
    path.write_text(json.dumps(row))


def find_shares(predicted: np.ndarray, truth: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return two-way identification of each image among the others, by cosines around the mean training image."""
    similar = normalise_rows(predicted - centre) @ normalise_rows(truth - centre).T
    right = np.diag(similar)[:, None]
    wins = (similar < right) + 0.5 * (similar == right)
    return np.asarray((wins.sum(axis=1) - 0.5) / (len(wins) - 1))


def describe(table: np.ndarray, sign: str = "") -> str:
    """Return a mean over people and images with its interval."""
    found = crossed_interval(table, proportion=not sign)
    if found.low is None or found.high is None:
        return f"{found.value:{sign}.3f}"
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def tabulate(out: Path, bank: Embeddings, centre: np.ndarray, people: list[str]) -> None:
    """Print scores and times for voxels and for parcels, and differences to ridge."""
    for kind in ("voxels", "parcels"):
        rows: dict[str, list[dict[str, np.ndarray]]] = {}
        times: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for way in WAYS:
            paths = [out / f"{kind}_{way}_{name}.json" for name in people]
            if all(path.is_file() for path in paths):
                read = [json.loads(path.read_text()) for path in paths]
                ids = [row["ids"] for row in read]
                rows[way] = [dict(np.load(path.with_suffix(".npz"))) for path in paths]
                times[way] = [(row["base_seconds"], row["seconds"]) for row in read]
        for name, members in AVERAGES.items():
            if all(member in rows for member in members):
                rows[name] = [
                    {
                        n: centre + sum(normalise_rows(part[n].astype(np.float32) - centre) for part in parts)
                        for n in set.intersection(*(set(part) for part in parts))
                    }
                    for parts in zip(*(rows[member] for member in members), strict=True)
                ]

        def score(way: str, n: int, rows: Any = rows, ids: Any = ids) -> np.ndarray | None:
            parts = [part.get(str(n)) for part in rows.get(way, ())]
            if not parts or any(part is None for part in parts):
                return None
            return np.stack(
                [
                    find_shares(part.astype(np.float32), bank.select(names).flat(), centre)
                    for part, names in zip(parts, ids, strict=True)
                ]
            )

        ways = [way for way, parts in rows.items() if any(parts)]
        head = " | ".join(f"{n} trials" for n in NUMBERS) + " |"
        print(
            f"\n{kind}\n\n| way | {head} seconds: others, 60 trials, 1000 |\n|---|{'---|' * (len(NUMBERS) + 1)}"
        )
        for way in ways:
            cells = ["-" if (own := score(way, n)) is None else describe(own) for n in NUMBERS]
            print(f"| {way} | {' | '.join([*cells, describe_time(times.get(way, []))])} |")
        print(f"\n{kind}, less ridge\n\n| way | {head}\n|---|{'---|' * len(NUMBERS)}")
        for way in ways:
            pairs = [(score(way, n), score("ridge", n)) for n in NUMBERS]
            cells = ["-" if a is None or b is None else describe(a - b, "+") for a, b in pairs]
            print(f"| {way} | {' | '.join(cells)} |")


def describe_time(rows: list[tuple[float, dict[str, float]]]) -> str:
    """Return the mean processor time of what is learnt from others, and with 60 and 1000 trials of the new person."""
    if not rows:
        return ""
    parts = [np.mean([base for base, _ in rows])]
    parts += [np.mean([seconds.get(n, np.nan) for _, seconds in rows]) for n in ("60", "1000")]
    return ", ".join("-" if np.isnan(part) else f"{part:.2g}" for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--kinds", nargs="+", choices=["voxels", "parcels"], default=["voxels", "parcels"])
    parser.add_argument("--subjects", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of processor time of a row")
    parser.add_argument("--table", action="store_true", help="make no row")
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    people, bank = open_people(chosen.out)
    table = people["voxels"].trials
    if not chosen.table:
        # One way after the other, since a table needs all people of a way.
        for way, kind, number in product(chosen.ways, chosen.kinds, chosen.subjects):
            path = chosen.out / f"{kind}_{way}_{number:02d}.json"
            if not path.is_file():
                keep(path, make_row(way, kind, people[kind], bank, f"{number:02d}", chosen.limit))
    shown = list(dict.fromkeys(table["stimulus_id"][table["split"] == "train"].astype(str)))
    centre = bank.select(shown).flat().mean(axis=0)
    tabulate(chosen.out, bank, centre, list(dict.fromkeys(table["subject"].astype(str))))


if __name__ == "__main__":
    main()
