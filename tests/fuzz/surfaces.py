"""What can be damaged and which command then meets it: files of every loader, run folders, tables, configurations.

A `Surface` names a base (files made once), the files of it that may be damaged, and what is done with them. Every
base lies below one folder; a case works on a copy.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.test_config_runs import PHANTOMS, embed, write_arrays

FEW = ("--set", "evaluation.n_bootstrap=100", "--set", "evaluation.n_permutations=100")
DIGITS = (
    "synthetic_digits", "--set", "dataset.n_train=40", "--set", "dataset.n_test=12", "--set", "dataset.n_voxels=30",
    *FEW,
)  # fmt: skip
#: Of a record, a page or an answer: what two runs of the same do not share.
_CHANGES = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?( UTC)?|\d+\.\d+ s\b")


#: When and where something was made, which is no part of what it is.
_PLACED = ("provenance.json", "stimuli.json")


@dataclass(frozen=True)
class Surface:
    """A place where damage can be met.

    Parameters
    ----------
    name
        Base and verb, for example ``god/read``.
    base
        Folder below the bases.
    act
        Called with the folder of the case, which holds ``in`` (the damaged base), and the damaged file; returns what
        the result is. It ends in `SystemExit` or one of the package's errors if the damage was reported.
    damaged
        Globs below the base of what may be damaged.
    spared
        Globs of what is not read.
    writes
        Whether the command may write into ``in``, as into a run folder.
    """

    name: str
    base: str
    act: Callable[[Path, Path], str]
    damaged: tuple[str, ...] = ("**/*",)
    spared: tuple[str, ...] = ()
    writes: bool = False

    def list_files(self, base: Path) -> list[Path]:
        """Return the files that may be damaged, relative to the base."""
        found = {path for glob in self.damaged for path in base.glob(glob) if path.is_file()}
        found -= {path for glob in self.spared for path in base.glob(glob)}
        return sorted(path.relative_to(base) for path in found)


# --- what a result is -----------------------------------------------------------------------------------------


def call(*words: Any) -> None:
    """Run the command in this process; anything but exit code 0 ends it."""
    from braindecode_vis.cli import main

    sys.argv = ["braindecode-vis", *map(str, words)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def digest(paths: Iterable[Path], folder: Path) -> str:
    """Return one line a file, with a digest of what it says: arrays and tables by value, text without times."""
    return "\n".join(f"{path.relative_to(folder)} {_digest_file(path, folder)}" for path in sorted(paths))


def _digest_file(path: Path, folder: Path) -> str:
    import pandas as pd

    if path.suffix == ".parquet":
        content = pd.read_parquet(path).to_json(orient="split", default_handler=str)
    elif path.suffix in (".json", ".csv", ".txt", ".html", ".yaml"):
        content = path.read_text()
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return hashlib.sha256(strip(content, folder).encode()).hexdigest()[:16]


def strip(text: str, folder: Path) -> str:
    """Return a text without times, and without the folder that the case lies in."""
    return _CHANGES.sub(
        "T", text.replace(str(folder), "CASE").replace(str(folder).replace("/", "\\/"), "CASE")
    )


def digest_stage(run: Path, stage: str) -> str:
    """Return the digest of the newest artifact of a stage, without its record."""
    made = sorted(
        (run / "stages" / stage).glob("*/provenance.json"), key=lambda path: path.stat().st_mtime_ns
    )
    newest = made[-1].parent
    files = [path for path in newest.rglob("*") if path.is_file() and path.name not in _PLACED]
    return digest(files, newest)


def digest_run(run: Path) -> str:
    """Return the digest of what a run says: its scores, its predictions and its images."""
    parts = [digest([run / "scores.json", run / "scores.parquet"], run)]
    for stage in ("retrieve", "reconstruct", "evaluate"):
        parts.append(digest_stage(run, stage))
    return "\n".join(parts)


# --- loaders --------------------------------------------------------------------------------------------------


#: Pictures are opened when they are embedded, so that is how far a loader goes.
_READ = ("--set", "target={kind: pixels}")


def _embed(dataset: str, root: Path, out: Path, more: tuple[str, ...]) -> None:
    call("embed", dataset, *_point(root, more), "--out", out, *_READ)


def _point(root: Path, more: tuple[str, ...]) -> tuple[str, ...]:
    """Return the root as an option, and the settings with their files below it."""
    return ("--root", str(root), *(word.replace("ROOT", str(root)) for word in more))


def _read(dataset: str, *more: str) -> Callable[[Path, Path], str]:
    def act(case: Path, damaged: Path) -> str:
        _embed(dataset, case / "in", case / "out", more)
        return f"{_digest_read(case / 'out')}\n{_read_told(case / 'out')}"

    return act


def _read_told(run: Path) -> str:
    """Return what preprocessing found of damage in the data, which the report says."""
    (meta,) = (run / "stages/preprocess").glob("*/responses/meta.json")
    return json.dumps(json.loads(meta.read_text()).get("provenance", {}).get("damage", []))


def _digest_read(run: Path) -> str:
    return digest_stage(run, "preprocess") + "\n" + digest_stage(run, "embed")


#: What a rerun of undamaged files must be, or it would not notice what is reused blindly.
REUSED = "reused, and the same as computed again"


def _rerun(dataset: str, *more: str) -> Callable[[Path, Path], str]:
    """A finished stage is only reused if it is what these files give."""

    def act(case: Path, damaged: Path) -> str:
        shutil.copytree(case / "in/.run", case / "out")
        _embed(dataset, case / "in", case / "out", more)
        told, made = _digest_read(case / "out"), len(list((case / "out/stages/preprocess").glob("*")))
        _embed(dataset, case / "in", case / "out/fresh", more)
        if told != _digest_read(case / "out/fresh"):
            return "reused what these files do not give"
        return REUSED if made == 1 else "computed again"

    return act


def _check(dataset: str, *more: str) -> Callable[[Path, Path], str]:
    def act(case: Path, damaged: Path) -> str:
        call("check", dataset, *_point(case / "in", more))
        return ""

    return act


#: What a phantom needs besides its folder, which is ROOT here.
_ATLAS = (
    "--set", "dataset.atlas.files=[ROOT/phantom_truth/parcels.dlabel.nii]",
    "--set", "dataset.atlas.labels=ROOT/phantom_truth/parcels.txt",
)  # fmt: skip
_NEEDED = {
    "mosaic": _ATLAS, "mosaic-merged": _ATLAS, "things-eeg2-ubp": ("--set", "dataset.trust_pickle=true"),
}  # fmt: skip


def list_loaders() -> dict[tuple[str, str], tuple[str, ...]]:
    """Return (data set, phantom) with the settings that it needs."""
    from braindecode_vis.datasets.manifests import find_package_data

    found = {}
    for path in sorted(find_package_data("data_manifests").glob("*.yaml")):
        for form in yaml.safe_load(path.read_text()).get("phantoms", []):
            found[path.stem, form] = _NEEDED.get(form, ())
    return found


def _make_phantom(form: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom

        changes = PHANTOMS[form.replace("-", "_")][0] if form in ("things-meg", "nsd-timeseries") else {}
        size = SIZES[form]["tiny"].replace(**changes)
        make_phantom(form, folder, size=size, config=PhantomConfig(snr=0.3), embed=embed)
        for (dataset, of), more in list_loaders().items():
            if of == form and form not in _ONCE:
                _embed(dataset, folder, folder / ".run", more)

    return make


#: Whose reading takes seconds, or whose files several data sets share: they are not read twice.
_ONCE = ("nsd", "alljoined1", "eeg-imagenet", "things-eeg2-ubp")


# --- run folders ----------------------------------------------------------------------------------------------


def _make_digits(folder: Path) -> None:
    call("run", *DIGITS, "--out", folder / "run")
    call("run", *DIGITS, "--set", "encoder.alphas=[3.0]", "--out", folder / "other")


def _make_network(folder: Path) -> None:
    call("run", *DIGITS, "--set", "encoder={kind: network, epochs: 1}", "--out", folder / "run")


def _make_own(folder: Path) -> None:
    write_arrays(folder / "data")
    call(
        "run",
        "arrays_ridge",
        "--root",
        folder / "data",
        "--out",
        folder / "run",
        "--set",
        "split.n_folds=2",
        *FEW,
    )


def _on_run(*words: str, output: bool = False) -> Callable[[Path, Path], str]:
    def act(case: Path, damaged: Path) -> str:
        run = case / "in/run"
        places = {
            "RUN": run,
            "OTHER": case / "in/other",
            "OUT": case / "out",
            "OUT.csv": case / "out/it.csv",
            "DATA": case / "in/data",
        }
        if "OUT.csv" in words:
            (case / "out").mkdir()
        call(*(places.get(word, word) for word in words))
        if output:
            return said(case)
        if (case / "out").exists():
            files = [path for path in (case / "out").rglob("*") if path.is_file()]
            return digest([path for path in files if path.name != "provenance.json"], case)
        # Ranking reads nothing of what comes after it, and leaves that as it is.
        return digest_stage(run, "retrieve") if words[0] == "retrieve" else digest_run(run)

    return act


def said(case: Path) -> str:
    """Return what the command has printed so far."""
    sys.stdout.flush()
    return strip((case / "stdout").read_text(), case)


def _open_in_python(case: Path, damaged: Path) -> str:
    import braindecode_vis as bdv

    run = bdv.open_run(case / "in/run")
    str(run)  # it names files that have changed, and so differs where results do not
    parts = [run.scores.to_json(), run.ranks.to_json(), run.items.to_json()]
    parts += [hashlib.sha256(run.predictions.vectors.tobytes()).hexdigest(), str(list(run.predictions.ids))]
    parts += [
        f"{name} {hashlib.sha256(np.asarray(made).tobytes()).hexdigest()}"
        for name, made in run.reconstructions.items()
    ]
    return strip("\n".join(parts), case)


# --- inputs of score, of predict and of new -------------------------------------------------------------------

_ROWS, _WIDTH = 10, 6


def _make_outputs(folder: Path) -> None:
    """Write the same predictions in every form that `score` reads."""
    import h5py
    import pandas as pd
    import torch
    from PIL import Image
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    targets = rng.standard_normal((_ROWS, _WIDTH)).astype(np.float32)
    made = targets + rng.standard_normal(targets.shape).astype(np.float32)
    ids = [f"p{number}" for number in range(_ROWS)]
    for name, array in (("made", made), ("true", targets)):
        np.save(folder / f"{name}.npy", array)
        np.savez(folder / f"{name}.npz", x=array)
        torch.save(torch.from_numpy(array), folder / f"{name}.pt")
        save_file({"x": array}, folder / f"{name}.safetensors")
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"] = array
        table = pd.DataFrame(array, columns=[f"f{n}" for n in range(_WIDTH)])
        table.to_parquet(folder / f"{name}.parquet")
        table.to_csv(folder / f"{name}.csv", index=False)
        (folder / name).mkdir()
        for entry in ids:
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{entry}.png")
    np.save(folder / "matrix.npy", made @ targets.T)
    labels = np.asarray(["cat", "dog", "key"])[rng.integers(0, 3, _ROWS)].tolist()
    (folder / "labels.txt").write_text("\n".join(labels) + "\n")
    (folder / "guesses.txt").write_text("\n".join([*labels[:6], *labels[:4]]) + "\n")
    np.save(folder / "chances.npy", rng.dirichlet(np.ones(3), _ROWS))
    (folder / "classes.txt").write_text("cat\ndog\nkey\n")
    (folder / "ids.txt").write_text("\n".join(ids) + "\n")
    pd.DataFrame({"stimulus_id": ids, "subject": ["1", "2"] * 5}).to_csv(folder / "ids.csv", index=False)


def _score(*words: str) -> Callable[[Path, Path], str]:
    def act(case: Path, damaged: Path) -> str:
        given = [case / "in" / word[1:] if word.startswith("@") else word for word in words]
        call("score", *given, "--permutations", 50, "--json")
        return said(case)

    return act


_OUTPUTS = {
    **{form: (f"@made.{form}", "--targets", f"@true.{form}") for form in
       ("npy", "npz", "safetensors", "h5", "parquet", "csv")},
    "txt": ("@guesses.txt", "--targets", "@labels.txt"),
    "ids": ("@made.npy", "--targets", "@true.npy", "--ids", "@ids.csv", "--target-ids", "@ids.txt"),
    "matrix": ("@matrix.npy",),
    "classes": ("@chances.npy", "--targets", "@labels.txt", "--target-ids", "@classes.txt", "--kind", "classes"),
    "images": ("@made", "--targets", "@true", "--kind", "images", "--features", "none"),
}  # fmt: skip


def _make_new(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    np.save(folder / "data.npy", rng.normal(size=(12, 40)).astype(np.float32))
    (folder / "images").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"p{number:02d}.png")
    call("new", folder)


def _new(case: Path, damaged: Path) -> str:
    call("new", case / "in")
    call("preprocess", case / "in/decode.yaml", "--root", case / "in", "--out", case / "out")
    return digest_stage(case / "out", "preprocess")


# --- configurations -------------------------------------------------------------------------------------------


def _copy_configs(folder: Path) -> None:
    from braindecode_vis.datasets.manifests import find_package_data

    for path in find_package_data("configs").glob("*.yaml"):
        shutil.copy(path, folder / path.name)


def _read_config(case: Path, damaged: Path) -> str:
    """Read a configuration; data are nowhere, so a good one is refused for that."""
    call("describe", damaged)
    call("preprocess", damaged, "--root", case / "absent", "--out", case / "out")
    return ""


#: What is fitted after a configuration was damaged; small, and without weights from elsewhere.
_RECIPES: dict[str, dict[str, Any]] = {
    "ridge": {"encoder": {"kind": "ridge", "alphas": [1.0, 100.0], "n_features": [10, 20]}},
    "network": {"encoder": {"kind": "network", "epochs": 2, "batch_size": 16, "optimiser": {"lr": 1e-3}}},
}


def _write_recipes(folder: Path) -> None:
    for name, parts in _RECIPES.items():
        content = {
            "name": name, "seed": 0,
            "dataset": {"kind": "synthetic_digits", "n_train": 40, "n_test": 12, "n_voxels": 30},
            "split": {"kind": "published"}, "target": {"kind": "pixels"}, "generator": {"kind": "latents"},
            "evaluation": {"n_bootstrap": 100, "n_permutations": 100}, **parts,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def _run_recipe(case: Path, damaged: Path) -> str:
    call("run", damaged, "--out", case / "out")
    values = [
        row["value"]
        for row in json.loads((case / "out/scores.json").read_text())
        if row["method"] == "decoded"
    ]
    if not np.isfinite(np.asarray(values, dtype=float)).all():
        return "a score is no number"
    return digest([case / "out/scores.json"], case / "out")


# --- all of them ----------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[Path], None]] = {
    **{form: _make_phantom(form) for form in dict.fromkeys(form for _, form in list_loaders())},
    "digits": _make_digits, "network": _make_network, "own": _make_own, "outputs": _make_outputs, "new": _make_new,
    "configs": _copy_configs, "recipes": _write_recipes,
}  # fmt: skip

_TRUTH = ("phantom_truth/**/*", ".run/**/*", ".run")


def _list_surfaces() -> Iterable[Surface]:
    for (dataset, form), more in list_loaders().items():
        name = form if dataset.replace("_", "-") == form else f"{dataset}@{form}"
        yield Surface(f"{name}/read", form, _read(dataset, *more), spared=_TRUTH)
        yield Surface(f"{name}/check", form, _check(dataset, *more), spared=_TRUTH)
        if form not in _ONCE:
            yield Surface(f"{name}/rerun", form, _rerun(dataset, *more), spared=_TRUTH)
    for base in ("digits", "network", "own"):
        runs = {"damaged": ("run/**/*",), "writes": True}
        yield Surface(f"{base}/run", base, _on_run("run", "RUN"), **runs)
        yield Surface(f"{base}/audit", base, _on_run("audit", "RUN", "--json", output=True), **runs)
        yield Surface(f"{base}/python", base, _open_in_python, **runs)
        yield Surface(f"{base}/export", base, _on_run("export", "RUN", "--what", "predictions", "--to", "csv",
                                                      "--out", "OUT.csv"), **runs)  # fmt: skip
    for verb in ("retrieve", "evaluate", "report"):
        yield Surface(f"digits/{verb}", "digits", _on_run(verb, "RUN"), damaged=("run/**/*",), writes=True)
    yield Surface("digits/compare", "digits", _on_run("compare", "OTHER", "RUN", "--json", output=True),
                  damaged=("run/**/*",), writes=True)  # fmt: skip
    analyzing = _on_run(
        "analyze", "RUN", "--analysis", "hubness", "--analysis", "failures", "--json", output=True
    )
    yield Surface("digits/analyze", "digits", analyzing, damaged=("run/**/*",), writes=True)
    predicting = _on_run("predict", "RUN", "--on", "DATA", "--out", "OUT")
    yield Surface("own/predict", "own", predicting, damaged=("data/*",))
    yield Surface("own/predict-damaged-run", "own", predicting, damaged=("run/**/*",), writes=True)
    for form, words in _OUTPUTS.items():
        named = tuple(word[1:] for word in words if word.startswith("@"))
        globs = tuple(glob for name in named for glob in (name, f"{name}/*"))
        yield Surface(f"score/{form}", "outputs", _score(*words), damaged=globs)
    yield Surface("new/run", "new", _new, writes=True)
    yield Surface("configs/read", "configs", _read_config)
    yield Surface("recipes/run", "recipes", _run_recipe)


SURFACES: dict[str, Surface] = {surface.name: surface for surface in _list_surfaces()}
