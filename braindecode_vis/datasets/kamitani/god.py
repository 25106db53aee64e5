"""Generic Object Decoding (Horikawa and Kamitani 2017): five subjects, ImageNet pictures seen and imagined.

Owns the preprocessed ``Subject1.h5`` ... ``Subject5.h5`` of figshare: which samples are trials, which picture each of
them shows, and the positions of its voxels. Samples are block averages in the authors' own units. The pictures belong
to ImageNet and are not included; imagined objects have no picture.

References
----------
.. [1] Horikawa, T., Kamitani, Y. (2017). Generic decoding of seen and imagined objects using hierarchical
   visual features. Nature Communications 8, 15037. doi:10.1038/ncomms15037
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.kamitani.bdata import (
    BData,
    check_names,
    decode_stimulus_id,
    find_list,
    find_synset,
    make_bdata_geometry,
    read_bdata,
    read_list,
)
from braindecode_vis.datasets.manifests import CheckFinding, check_subset, collect_findings, compare_fact
from braindecode_vis.datasets.sources.betas_source import BetasPart, FmriSource, Geometry
from braindecode_vis.datasets.sources.pictured_betas import PicturedSettings

if TYPE_CHECKING:
    import pandas as pd

Task = Literal["training", "test", "imagery"]
TASKS: dict[int, Task] = {1: "training", 2: "test", 3: "imagery"}
"""Meaning of the numbers of `DataType`."""
_FILE = re.compile(r"^Subject(\d+)\.h5$")


class GodConfig(PicturedSettings):
    """Folder of the files, and the samples that are read.

    Parameters
    ----------
    root
        Folder of ``Subject1.h5`` ... and, if available, of the lists ``stimulus_ImageNet{Training,Test}.tsv``.
    subjects
        Numbers to read; by default all that exist. Several need `pad_subjects`, since these files have no common atlas
        for parcels.
    test
        Test trials: the 50 seen pictures (``perception``), the 50 imagined categories (``imagery``), or both, marked by
        the column `task`. Training trials are the 1200 training pictures.
    rois
        Regions whose union is kept, for example ``("ROI_VC",)``; every voxel by default.
    zscore
        As in `BetasPlan`. Test and imagery runs are other sessions than training runs in the scanner, but the files do
        not mark sessions, so ``session`` means the whole file, and with ``run`` test runs have no training trials.
    """

    kind: Literal["god"] = "god"
    subjects: tuple[int, ...] | None = None
    test: Literal["perception", "imagery", "both"] = "perception"
    rois: tuple[str, ...] = ()

    title: ClassVar[str] = "GOD"

    def list_files(self) -> list[Path]:
        """Return the file of every subject."""
        return list(self._find().values())

    def open_betas(self) -> FmriSource:
        """Return the data set as lazy parts."""
        opened = {f"{number:02d}": read_bdata(path) for number, path in self._find().items()}
        wanted = {"training", *(("test",) if self.test != "imagery" else ())}
        wanted |= {"imagery"} if self.test != "perception" else set()
        parts, geometries, tables = [], {}, []
        for subject, data in opened.items():
            trials = read_trials(data, subject)
            rows = np.flatnonzero(trials["task"].isin(wanted))
            part, geometries[subject] = make_bdata_part(data, trials, rows, self.rois)
            parts.append(part)
            # An imagined category is represented by its picture, which only the test trials show.
            shown = wanted | ({"test"} if "imagery" in wanted else set())
            tables.append(trials[trials["task"].isin(shown)])
        n_train = len({name for t in tables for name in t.loc[t["task"] == "training", "stimulus_id"]})
        notes = {
            "protocol": f"{n_train} training pictures; test: {self.test}",
            "rois_kept": list(self.rois),
            "warnings": [text for data in opened.values() for text in data.warn_of_rois()],
        }
        parts, _ = self.number_parts(parts)
        return self.join_subjects(parts, geometries, make_stimulus_table(tables), notes)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, decode every number, and compare with the lists and the declared counts."""
        root, facts = self.find_root(), self.manifest.facts
        for number, path in self._find().items():
            try:
                trials = read_trials(read_bdata(path), f"{number:02d}")
            except DataError as error:
                yield CheckFinding(path.name, False, str(error))
                continue
            for task, declared in (("training", "n_train"), ("test", "n_test"), ("imagery", "n_imagery")):
                n = int((trials["task"] == task).sum())
                yield compare_fact(f"{path.name} {task}", n, facts[declared], root, what="samples")
            for split, task in (("train", "training"), ("test", "test")):
                if (listed := find_list(root, split)) is not None:
                    names = trials.loc[trials["task"] == task, "stimulus_id"].tolist()
                    where = f"{path.name} against {listed.name}"
                    yield check_names(names, read_list(listed)["stimulus_id"].tolist(), what=where)

    def _find(self) -> dict[int, Path]:
        root = self.find_root()
        folders = [folder for folder in (root, root / "data", root / "fmri") if folder.is_dir()]
        found = {
            int(m[1]): p for folder in folders for p in sorted(folder.iterdir()) if (m := _FILE.match(p.name))
        }
        if not found:
            raise DataError(
                f"{root} holds no Subject1.h5 ... of GOD; fetch them from figshare (7387130), or pass their "
                "folder with --root. Raw BIDS data (ds001246) are for bids_fmri."
            )
        chosen = check_subset(
            self.subjects, sorted(found), what=f"below {root}, GOD subject", option="dataset.subjects"
        )
        return {number: found[number] for number in chosen}


def read_trials(data: BData, subject: str) -> pd.DataFrame:
    """Return one row per sample of a GOD file, in its order.

    Returns
    -------
    DataFrame
        The columns of every trial table, `concept` (synset), `task` (``training``, ``test``, ``imagery``) and `block`.

    Raises
    ------
    DataError
        If a sample has an unknown type, or its number is not an ImageNet number.
    """
    import pandas as pd

    # Single precision has seven digits, but the numbers of images need thirteen.
    if not data.precise:
        raise DataError(
            f"{data.path} stores its matrix in single precision, in which numbers like 1518878.005958 lose the image; "
            "fetch the published file, which is in double precision."
        )
    kinds = data.read_label("DataType")
    unknown = sorted(set(kinds.tolist()) - set(TASKS))
    if unknown:
        raise DataError(f"{data.path} has samples of DataType {unknown[0]:g}; 1 to 3 are known.")
    tasks = [TASKS[int(kind)] for kind in kinds]
    names = [decode_stimulus_id(float(code)) for code in data.read_label("stimulus_id")]
    for row, (task, name) in enumerate(zip(tasks, names, strict=True)):
        if task != "imagery" and "_" not in name:
            raise DataError(
                f"sample {row} of {data.path} is a {task} sample, but its number names the category {name} and no "
                "image; the file was rounded."
            )
    # For an imagined category, digits after the point do not identify a seen picture.
    imagined = [task == "imagery" for task in tasks]
    concepts = [find_synset(name) for name in names]
    ids = [c if i else n for n, c, i in zip(names, concepts, imagined, strict=True)]
    runs = data.read_label("Run")
    table = pd.DataFrame(
        {
            "subject": subject, "session": "01",
            "run": [f"{task}-{int(run):02d}" for task, run in zip(tasks, runs, strict=True)],
            "stimulus_id": ids, "repetition": 0, "split": np.where(np.array(tasks) == "training", "train", "test"),
            "concept": concepts, "task": tasks,
        }
    )  # fmt: skip
    if "Block" in data.metadata:
        table["block"] = data.read_label("Block").astype(int)
    seen = table.groupby("task")["concept"].agg(set)
    both = sorted(seen.get("training", set()) & seen.get("test", set()))
    if both:
        raise DataError(
            f"{data.path} tests {len(both)} categories that it trains on, first {both[0]}: the published parts share "
            "none, so the numbers or types of its samples are wrong."
        )
    return table


def make_bdata_part(
    data: BData, trials: pd.DataFrame, rows: np.ndarray, rois: tuple[str, ...]
) -> tuple[BetasPart, Geometry]:
    """Return the chosen samples of a file as one lazy part, and the positions of its voxels.

    Parameters
    ----------
    trials
        One row per sample of the file.
    rows
        Samples to keep, ascending.
    rois
        Keys of regions whose union is kept; every voxel if empty.
    """
    geometry, columns = make_bdata_geometry(data, rois)
    kept = trials.iloc[rows].reset_index(drop=True)

    def read(start: int, stop: int) -> np.ndarray:
        return data.read_rows(rows[start:stop], columns)

    return BetasPart(kept, (data.path,), len(columns), read), geometry


def make_stimulus_table(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Return `stimulus_id`, `concept` and `path` of the stimuli of trial tables; imagined objects have no path."""
    import pandas as pd

    joined: Any = pd.concat(tables, ignore_index=True)
    paths = np.where(joined["task"] == "imagery", "", joined["stimulus_id"] + ".JPEG")
    return joined[["stimulus_id", "concept"]].assign(path=paths).drop_duplicates()
