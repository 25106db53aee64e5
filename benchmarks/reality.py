"""One ladder where the decoder does not know the answer: real recordings, and simulated brains with foreign drives.

    python benchmarks/reality.py ROOT --out FOLDER                          # everything that is there
    python benchmarks/reality.py ROOT --out FOLDER --data v4_201025 --only ridge "linear Gaussian"
    python benchmarks/reality.py ROOT --out FOLDER --open --only ridge WINNER   # the other sessions of V4, once

ROOT holds data sets as `fetch` writes them: ``v4_photographs``, ``digits69``, ``haxby_slices``, ``muse_n170``. What is
not there is left out. Phantoms are simulated into FOLDER. A row that has run is read, and not run again.

Choices are made on the V4 sessions 201025 and 210325 alone; `--open` asks the sessions that took no part in any choice,
and is meant for one call. A network trains for as many epochs as its paper or the demo says, or for as many as fit
into the budget of seconds, which is the same for every row, and six times as long for trainings as published;
``reality.json`` says how many. Every statistic is fitted on the training trials of its fold. Differences to ridge are
paired over the pictures (trials, where there are classes), wider by sqrt 2 after folds; p flips signs and is corrected
after Holm over the rows. In two-way identification a picture counts as query and as distractor (pseudo-values of a
jackknife). Seconds are processor time of all trainings of a row; one thread is the measure: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from studies.ladder import NETWORKS, NOISY, Rung, change, make_network, read_published, slug, write_limits

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder, Context
from braindecode_vis.base.registry import validate_component
from braindecode_vis.config import read_config
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.pipeline import embed, preprocess
from braindecode_vis.pipeline.galleries import GallerySource, rank_fold
from braindecode_vis.pipeline.preparing import name_classes, pick_labelled_trials, pick_trials
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.crossed import interval_of_rows, paired_difference
from braindecode_vis.scoring.uncertainty import correct_holm

RIDGE = "ridge"
BUDGET = 12.0  # seconds of processor time that a network may train, all folds of a data set together
LONGER = 6  # times as long for trainings as published, of which the budget would be one or two epochs
Kind = Literal["neurons", "voxels", "series"]


@dataclass(frozen=True)
class Data:
    """A recording: its configuration, the settings that change, and what it is made of.

    `measures` are what the tables show: ``two-way`` or the k of top-k. `drive` names what a phantom follows.
    """

    config: str
    kind: Kind
    measures: tuple[str, ...]
    settings: tuple[str, ...] = ()
    classes: bool = False
    drive: str = ""
    group: str = ""


def describe_v4(session: str, group: str) -> Data:
    settings = (f"dataset.session='{session}'", "split.n_folds=5")
    return Data("v4_photographs_ridge", "neurons", ("two-way", "5"), settings, group=group)


def describe_phantom(drive: str) -> Data:
    return Data("phantom_eeg_network", "series", ("two-way", "5"), drive=drive, group="phantoms")


CHOICE = ("201025", "210325")
#: Small archives with means: two animals and five days that no choice has seen. 210322 shares pictures with 210325.
OPENED = ("190923", "190927", "210224", "210225", "210621")
DRIVES = ("mixture", "gabor", "colours", "random_network", "embedded")
DATA = {
    **{f"v4_{session}": describe_v4(session, "v4") for session in CHOICE},
    "phantom_mixture": describe_phantom("mixture"),
    "digits69": Data("digits69_ridge_5fold", "voxels", ("1",), group="human"),
    "haxby": Data("haxby_slices", "voxels", ("1",), classes=True, group="human"),
    "muse": Data("muse_n170", "series", ("1",), classes=True, group="human"),
    **{f"phantom_{drive}": describe_phantom(drive) for drive in DRIVES},
}
SESSIONS = {f"v4_{session}": describe_v4(session, "opened") for session in OPENED}
SIZE = {
    "n_test_concepts": 100,
    "test_repetitions": 20,
}  # beside 160 training concepts of 5 images, seen twice
SNR, SEED = 0.05, 11


# --- the rows ----------------------------------------------------------------------------------------------


def make_small_network(kind: Kind, classes: bool) -> Rung:
    """Return the network that is cheap for such responses, with CLIP."""
    if kind == "series":
        network = make_network({"kind": "eegproject", "width": 256}, 3e-4, epochs=20)
        averages = [] if classes else [{"kind": "repetition_averaging"}]
        return change(network, augmentations=[*NOISY, *averages], repeats="single")
    plain = NETWORKS["eegproject, width 256" if kind == "neurons" else "residual mlp, width 256"]
    return change(plain, optimiser={"lr": 1e-3}, augmentations=[{"kind": "gaussian_noise"}], repeats="single")


def list_objectives(base: Rung) -> dict[str, Rung]:
    """Return the twelve objectives of papers that need neither words nor attributes; `base` is the first, CLIP."""
    clip = {"kind": "clip"}
    mixed = [*base.encoder["augmentations"], {"kind": "trial_mixing"}]
    mindeye = [{"kind": "bimixco", "weight": 1}, {"kind": "soft_clip", "weight": 1, "phase": [0.33, 1]}]
    teacher = {"decay": 0.98, "queue": 32}

    def use(*objectives: Any, **changes: Any) -> Rung:
        named = [{"kind": one} if isinstance(one, str) else one for one in objectives]
        return change(base, objectives=named, **changes)

    return {
        "network, CLIP": base,
        "SigLIP": use({"kind": "siglip", "weight": 1}),
        "SoftCLIP": use({"kind": "soft_clip", "weight": 1}),
        "BiMixCo, then SoftCLIP": use(*mindeye, augmentations=mixed),
        "CLIP + l1": use(clip, "l1"),
        "CLIP + squared error": use(clip, "mse"),
        "CUA": use("cua"),
        "CLIP + MMD": use(clip, "mmd"),
        "momentum distillation": use("distillation", teacher=teacher),
        "TCL": use("tcl", teacher=teacher),
        "CLIP + MV-DHEL": use(clip, "multiview"),
        "CLIP + within cluster": use(clip, "within_cluster", n_clusters=4),
    }


def list_rows(kind: Kind, classes: bool) -> dict[str, Rung]:
    """Return every row that such responses may have; which fit is seen when they run."""
    single = {"repeats": "single"} if classes or kind == "series" else {}
    ridge = Rung({"kind": "ridge"}, repeats="single" if classes else "averaged")
    linear = Rung({"kind": "linear_gaussian"}, **single)
    drawing = change(linear, n_components=32, n_times=6, misfit=0.25)
    network = make_small_network(kind, classes)

    def average(*members: Rung, weights: list[float] | None = None) -> Rung:
        own = {"kind": "average", "members": [one.encoder for one in members], "weights": weights}
        return Rung(own, **single)

    rows = {
        RIDGE: ridge,
        "linear Gaussian": linear,
        "linear Gaussian of the demo": drawing,
        "average: ridge, linear Gaussian": average(ridge, linear),
        "average: ridge, network": average(ridge, network),
        "average: linear Gaussian, network": average(linear, network),
        "average of the demo": average(drawing, network, weights=[2, 1]),
        **list_objectives(network),
    }
    if classes:
        named = ("eegnet", "tsconv", "eegproject", "atm_s") if kind == "series" else ("residual_mlp",)
        return rows | {
            "LDA": Rung({"kind": "lda"}, **single),
            "logistic regression": Rung({"kind": "logistic"}, **single),
            **{f"prototypes, {name}": make_prototypes(name) for name in named},
        }
    if kind == "series":
        of = {"NICE": "things_eeg2_nice_vitl", "UBP": "things_eeg2_ubp_rn50", "ATM-S": "things_eeg2_atm_vith"}
        return rows | {f"{name} as published": read_published(path) for name, path in of.items()}
    mindeye = read_published("nsd_mindeye1_vitl")
    mindeye.encoder["network"] |= {"hidden": 256}  # theirs has 4096 for 15 724 voxels
    mindeye.encoder["augmentations"] = [{"kind": "trial_mixing"}]  # each picture has one trial here
    return rows | {"MindEye's MLP as published, width 256": mindeye}


def make_prototypes(name: str) -> Rung:
    network = {"kind": name} | ({"hidden": 256, "n_blocks": 1} if name == "residual_mlp" else {})
    encoder = {"kind": "network_categories", "network": network, "optimiser": {"lr": 1e-3}, "device": "cpu"}
    return Rung(encoder, repeats="single")


# --- one row on one recording ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A recording that has been read: folds, and the embedding of every picture for each of them."""

    data: Data
    prepared: Any
    banks: list[Embeddings]
    retrieval: Any


def open_data(data: Data, root: Path, out: Path) -> Opened:
    """Read, split and embed.

    Classes are indicators, so that every encoder can name them. Each trial is then a picture of its own, since inner
    folds would leave out whole classes otherwise; in a contrast, equal targets are the right answers of each other.
    """
    run = open_run(read_config(data.config, list(data.settings), root=root), out)
    prepared = preprocess(run)
    if data.kind == "neurons":  # a column each, without time, which is what networks call voxels
        plain = replace(prepared.responses, dims=("trial", "voxel"), coords={})
        prepared = replace(prepared, responses=plain)
    if data.classes:
        named = name_classes(prepared)
        trials = named.trials.assign(stimulus_id=[f"trial {number}" for number in range(len(named.trials))])
        prepared = replace(prepared, responses=named.with_trials(trials))
        names, own = np.unique(trials["concept"].to_numpy(dtype=str), return_inverse=True)
        indicators = np.eye(len(names), dtype=np.float32)
        ids = [*names.tolist(), *trials["stimulus_id"]]
        bank = Embeddings(indicators[[*range(len(names)), *own]], ids, "classes")
        banks = [bank] * len(prepared.split.folds)
    else:
        banks = [part.embeddings for part in embed(run)]
    return Opened(data, prepared, banks, run.config.retrieval)


def pick(opened: Opened, rows: np.ndarray, repeats: str) -> Responses:
    """Return the trials, with their concepts."""
    if opened.data.classes:
        return pick_trials(opened.prepared.responses, rows, "single")
    return pick_labelled_trials(opened.prepared, rows, repeats)


def score(opened: Opened, rung: Rung, budget: float) -> dict[str, Any]:
    """Return what each query found, in all folds, with seconds and epochs."""
    folds = list(zip(opened.prepared.split.folds, opened.banks, strict=True))
    encoder = fit_into(opened, rung, budget / len(folds))
    seconds, found = 0.0, []
    for fold, bank in folds:
        fitted, own = fit(opened, rung, encoder, fold.train, bank)
        seconds += own
        found += ask(opened, rung, fitted, fold, bank)
    epochs = [one.get("epochs") for one in [encoder, *encoder.get("members", [])]]
    return {
        "seconds": seconds,
        "epochs": next((n for n in epochs if n), None),
        "queries": {key: [value for part in found for value in part[key]] for key in found[0]},
    }


def fit(
    opened: Opened, rung: Rung, encoder: dict[str, Any], train: np.ndarray, bank: Embeddings
) -> tuple[Any, float]:
    """Return the fitted encoder, and the processor time of its training in s."""
    config = validate_component("encoder", encoder)
    responses = pick(opened, train, rung.repeats)
    if config.decodes_categories:
        decoder = config.build(seed=0)
        started = time.process_time()
        decoder.fit(responses, responses.trials["concept"].to_numpy(dtype=object))
        return decoder, time.process_time() - started
    targets = bank.select(list(responses.stimulus_ids))
    built = roles.build(BrainEncoder, config, seed=0)
    built.bind(Context(images=opened.prepared.stimuli))
    started = time.process_time()
    built.fit(responses, targets)
    return built, time.process_time() - started


def fit_into(opened: Opened, rung: Rung, budget: float) -> dict[str, Any]:
    """Return the settings of the encoder, with as many epochs as are asked for or fit into `budget`."""
    asked = max(
        [one["epochs"] for one in [rung.encoder, *rung.encoder.get("members", [])] if "epochs" in one],
        default=0,
    )
    if rung.encoder["kind"] == "network_categories":
        asked = 50  # its default
    if not asked:
        return rung.encoder
    train, bank = opened.prepared.split.folds[0].train, opened.banks[0]
    # The first training of a process loads what later ones find loaded.
    seconds = [fit(opened, rung, set_epochs(rung.encoder, n), train, bank)[1] for n in (1, 2, 6)]
    epoch = max(seconds[2] - seconds[1], 1e-3) / 4
    return set_epochs(rung.encoder, int(np.clip((budget - seconds[1]) // epoch + 2, 1, asked)))


def set_epochs(encoder: dict[str, Any], epochs: int) -> dict[str, Any]:
    if encoder["kind"] == "average":
        return {**encoder, "members": [set_epochs(one, epochs) for one in encoder["members"]]}
    trained = encoder["kind"] in ("network", "network_categories")
    return {**encoder, "epochs": epochs} if trained else encoder


def ask(opened: Opened, rung: Rung, fitted: Any, fold: Any, bank: Embeddings) -> list[dict[str, list[Any]]]:
    """Return the hits of each test query; `two-way` holds pseudo-values that resample queries and distractors."""
    queries = pick(opened, fold.test, "averaged")
    if opened.data.classes:
        queries = queries.with_trials(
            queries.trials.assign(stimulus_id=queries.trials["concept"].astype(str))
        )
    ids = queries.stimulus_ids.astype(str)
    if getattr(fitted, "classes", None) is not None and hasattr(fitted, "decision"):
        decided = fitted.decision(queries)
        own = decided[np.arange(len(ids)), [fitted.classes.index(name) for name in ids]]
        ranks = (decided >= own[:, None]).sum(axis=1)  # ties are lost
        return [name_queries(opened, queries, ranks)]
    named = opened.prepared.responses.trials["concept"] if opened.data.classes else ids
    gallery = sorted(set(map(str, named)))
    settings = opened.retrieval.model_copy(update={"centre": rung.centre, "n_top": len(gallery)})
    train_ids = sorted(set(pick(opened, fold.train, "single").stimulus_ids.astype(str).tolist()))
    source = GallerySource(fitted, bank, train_ids, settings)
    subjects = queries.trials["subject"].to_numpy(dtype=object)
    ranked = rank_fold(source, fitted.predict(queries), subjects, gallery, protocol="reality")
    found = name_queries(opened, queries, ranked.worst_ranks)
    if not opened.data.classes:
        found["two-way"] = count_both_roles(ranked).tolist()
    return [found]


def name_queries(opened: Opened, queries: Responses, ranks: np.ndarray) -> dict[str, list[Any]]:
    ids = queries.stimulus_ids.astype(str)
    if opened.data.classes:  # each trial is a unit of its own
        rows = [f"{run} {number}" for number, run in enumerate(queries.trials["run"].astype(str))]
        ids = np.array(rows)
    return {
        "unit": ids.tolist(),
        **{k: (ranks <= int(k)).astype(float).tolist() for k in ("1", "5")},
    }


def count_both_roles(ranked: Any) -> np.ndarray:
    """Return a pseudo-value for each picture, whose mean is the two-way identification of the gallery.

    The jackknife leaves a picture out as query and as distractor; one query asks for each picture.
    """
    n = ranked.gallery_size
    places = {name: row for row, name in enumerate(ranked.gallery_ids)}
    right = np.zeros((n, n))  # whether query `row` prefers its own picture to `column`
    for query, name in enumerate(ranked.query_ids):
        own = ranked.true_similarities[query]
        compared = np.sign(own - ranked.top_similarities[query])
        right[places[name], ranked.top_indices[query]] = (compared + 1) / 2
    np.fill_diagonal(right, 0)
    total = right.sum()
    values = total / (n - 1) - (total - right.sum(axis=1) - right.sum(axis=0)) / (n - 2)  # (n_pictures,)
    return values[[places[name] for name in ranked.query_ids]]


# --- from rows to tables -----------------------------------------------------------------------------------


def compare(found: dict[str, dict[str, Any]], measure: str, over_folds: bool) -> dict[str, dict[str, Any]]:
    """Return of each row its value and the paired difference to ridge; `p` is corrected over the rows."""
    rows: dict[str, dict[str, Any]] = {}
    compared = {name: own["queries"] for name, own in found.items() if measure in own.get("queries", {})}
    if RIDGE not in compared:
        return {}
    units = compared[RIDGE]["unit"]
    values = {name: np.array(own[measure]) for name, own in compared.items()}
    for name, own in values.items():
        if compared[name]["unit"] != units:
            raise DataError(f"{name} was asked other queries than ridge; delete its file, and run it again.")
        interval = interval_of_rows(own, proportion=measure != "two-way", over_folds=over_folds)
        row = {"value": float(own.mean()), "low": interval.low, "high": interval.high}
        if name != RIDGE:
            gain = paired_difference(own, values[RIDGE], over_folds=over_folds)
            row |= {"difference": gain.mean, "from": gain.interval.low, "to": gain.interval.high}
            row |= {"p": gain.p_value, "words": write_limits(gain.interval, "+")}
        rows[name] = row
    others = [name for name in rows if name != RIDGE]
    if others:
        corrected = correct_holm(np.array([rows[name]["p"] for name in others]))
        for name, p in zip(others, corrected, strict=True):
            rows[name]["holm"] = float(p)
    return rows


def write_tables(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write ``reality.json`` and ``reality.md`` into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "reality.json").write_text(json.dumps(results, indent=1))
    pages = []
    for group in dict.fromkeys(own["group"] for own in results.values()):
        shown = {name: own for name, own in results.items() if own["group"] == group}
        columns = [(name, measure) for name, own in shown.items() for measure in own["measures"]]
        heads = [f"{name}, {name_measure(measure)}" for name, measure in columns]
        lines = [f"| row | {' | '.join(heads)} | s |", f"|---|{'---|' * (len(heads) + 1)}"]
        names = dict.fromkeys(name for own in shown.values() for name in own["seconds"])
        for name in names:
            cells = [write_cell(shown[data]["measures"][measure].get(name)) for data, measure in columns]
            seconds = [own["seconds"].get(name) for own in shown.values()]
            taken = ["–" if one is None else f"{one:.0f}" for one in seconds]
            lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(taken)} |")
        pages.append("\n".join(lines))
        pages += [
            f"- {data}: {name} did not run: {sentence}"
            for data, own in shown.items()
            for name, sentence in own["refused"].items()
        ]
    (path / "reality.md").write_text("\n\n".join(pages) + "\n")


def name_measure(measure: str) -> str:
    return measure if measure == "two-way" else f"top-{measure}"


def write_cell(row: dict[str, Any] | None) -> str:
    """Return a difference in words, bold where Holm's p is below .05; ridge shows its value."""
    if row is None:
        return "–"
    if "difference" not in row:
        return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    words = f"{row['difference']:+.3f} ({row['words']})"
    return f"**{words}**" if row["holm"] < 0.05 else words


# --- the command -------------------------------------------------------------------------------------------


def find_root(name: str, data: Data, root: Path, out: Path, size: str) -> Path | None:
    """Return where the recording lies; a phantom is simulated first."""
    if not data.drive:
        places = {"digits69": "digits69", "haxby": "haxby_slices", "muse": "muse_n170"}
        place = root / places.get(name, "v4_photographs")
        return place if place.exists() else None
    place = out / "phantoms" / data.drive
    sized = SIZES["things-eeg2"][size]
    if size == "demo":
        sized = replace(sized, **SIZE)
    make_phantom("things-eeg2", place, size=sized, snr=SNR, seed=SEED, drive=data.drive)
    return place


def run_data(name: str, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Run the rows of one recording that have not run, and return what its tables show."""
    rows = list_rows(data.kind, data.classes)
    asked = {key: rung for key, rung in rows.items() if key in (options.only or rows)}
    asked = {RIDGE: rows[RIDGE], **asked}
    folder = options.out / ("opened" if options.open else "rows") / name
    folder.mkdir(parents=True, exist_ok=True)
    opened: Opened | None = None
    found = {}
    for row, rung in asked.items():
        path = folder / f"{slug(row)}.json"
        if options.tables and not path.exists():
            continue
        if not path.exists():
            if opened is None:
                root = find_root(name, data, options.root, options.out, options.size)
                if root is None:
                    return {}
                opened = open_data(data, root, options.out / "runs" / name)
            started = time.process_time()
            try:
                result = score(opened, rung, options.seconds * (LONGER if "as published" in row else 1))
            except (ConfigError, DataError) as error:
                result = {"refused": str(error)}
            whole = time.process_time() - started
            result |= {"whole": whole, "n_folds": len(opened.prepared.split.folds)}
            path.write_text(json.dumps(result))
            print(f"{name}, {row}: {result.get('refused', f'{whole:.0f} s')}", flush=True)
        found[row] = json.loads(path.read_text())
    if RIDGE not in found:
        return {}
    over_folds = found[RIDGE]["n_folds"] > 1
    ran = {row: own for row, own in found.items() if "queries" in own}
    return {
        "group": data.group,
        "measures": {measure: compare(ran, measure, over_folds) for measure in data.measures},
        "seconds": {row: own["seconds"] for row, own in ran.items()},
        "epochs": {row: own["epochs"] for row, own in ran.items() if own["epochs"]},
        "n_queries": len(found[RIDGE]["queries"]["unit"]),
        "refused": {row: own["refused"] for row, own in found.items() if "refused" in own},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="+", choices=[*DATA, *SESSIONS])
    parser.add_argument("--only", nargs="+", help="names of rows; ridge always runs")
    parser.add_argument(
        "--seconds", type=float, default=BUDGET, help="that each network may train on a data set"
    )
    parser.add_argument(
        "--open", action="store_true", help="ask the sessions that took no part in choices, once"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing, and write the tables of what ran")
    parser.add_argument("--size", choices=["tiny", "demo"], default="demo", help="of the phantoms")
    options = parser.parse_args(arguments)
    known = SESSIONS if options.open else DATA
    if set(options.data or ()) - set(known):
        parser.error("sessions that took no part in choices need --open, and nothing else goes with it")
    results = {}
    for name in options.data or known:
        found = run_data(name, known[name], options)
        if found:
            results[name] = found
            write_tables(results, options.out / ("opened" if options.open else "."))
        else:
            print(f"{name}: nothing below {options.root}, or nothing ran; left out", flush=True)


if __name__ == "__main__":
    main()
