"""Deep Image Reconstruction (Shen, Horikawa, Majima and Kamitani 2019): three subjects, pictures, shapes and letters.

Owns the preprocessed BData files of figshare, one for each subject and experiment, with both forms of their names
(``sub-01_perceptionNaturalImageTest_original_VC.h5``, ``sub-01_ImageNetTest_fmriprep_volume_native.h5``), and the
meaning of their stimulus numbers: ImageNet's code for photographs, a running number for shapes and letters.

References
----------
.. [1] Shen, G., Horikawa, T., Majima, K., Kamitani, Y. (2019). Deep image reconstruction from human brain activity.
   PLOS Computational Biology 15, e1006633. doi:10.1371/journal.pcbi.1006633
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, is_there
from braindecode_vis.datasets.kamitani.bdata import BData, decode_stimulus_id, find_synset, read_bdata
from braindecode_vis.datasets.kamitani.god import make_bdata_part
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings, compare_fact
from braindecode_vis.datasets.sources.betas_source import BetasPart, FmriSource, Geometry
from braindecode_vis.datasets.sources.pictured_betas import PicturedSettings

if TYPE_CHECKING:
    import pandas as pd

Experiment = Literal["training", "natural", "shapes", "letters", "imagery"]
FILE_NAME = "sub-{subject:02d}_{experiment}_{variant}.h5"
EXPERIMENTS: dict[str, Experiment] = {
    "perceptionNaturalImageTraining": "training", "ImageNetTraining": "training",
    "perceptionNaturalImageTest": "natural", "ImageNetTest": "natural",
    "perceptionArtificialImage": "shapes", "ArtificialShapes": "shapes", "ArtificialImage": "shapes",
    "perceptionLetterImage": "letters", "Letters": "letters", "LetterImage": "letters",
    "imagery": "imagery", "Imagery": "imagery",
}  # fmt: skip
"""Experiment of each spelling in the file names; the spelling of the published files comes first."""
_LISTS = {"shapes": "stimulus_ArtificialImage.tsv", "letters": "stimulus_LetterImage.tsv"}
_SUFFIXES = {"training": ".JPEG", "natural": ".JPEG", "shapes": ".tiff", "letters": ".tif"}
_IMAGINED = "imagined_"
_FILE = re.compile(r"^sub-(\d+)_([A-Za-z]+)_(.+)\.h5$")
# Offsets of WordNet have seven or eight digits; shapes and letters have small numbers.
_FIRST_SYNSET = 1_000_000


class DeepreconConfig(PicturedSettings):
    """Folder of the files, and the experiments that are read.

    Parameters
    ----------
    root
        Folder of the ``.h5`` files and, if available, of the lists ``stimulus_{ArtificialImage,LetterImage}.tsv``.
    subjects
        Numbers to read; by default all that exist.
    test
        Experiments whose samples are test trials: the 50 ``natural`` pictures, 40 ``shapes``, 10 ``letters``, or
        ``imagery`` of 10 pictures and 15 shapes. The training trials are the 1200 pictures of the training
        experiment.
    variant
        End of the file names, for example ``original_VC``; needed if there are several.
    rois
        Regions whose union is kept, for example ``("ROI_VC",)``; every voxel by default.
    zscore
        As in `BetasPlan`; a session means all files of a subject.
    """

    kind: Literal["deeprecon"] = "deeprecon"
    subjects: tuple[int, ...] | None = None
    test: tuple[Literal["natural", "shapes", "letters", "imagery"], ...] = ("natural",)
    variant: str | None = None
    rois: tuple[str, ...] = ()

    title: ClassVar[str] = "Deeprecon"

    def list_files(self) -> list[Path]:
        """Return every file that is read, including the lists of names."""
        return [item.path for item in self._find()] + list(self._find_lists().values())

    def open_betas(self) -> FmriSource:
        """Return the data set as lazy parts."""
        held, names = self._find(), {key: _read_names(path) for key, path in self._find_lists().items()}
        parts: list[BetasPart] = []
        geometries: dict[str, Geometry] = {}
        first: dict[str, Path] = {}
        warnings: list[str] = []
        for item in held:
            data = read_bdata(item.path)
            warnings += data.warn_of_rois()
            trials = read_samples(data, item.subject, item.experiment, names)
            part, own = make_bdata_part(data, trials, np.arange(len(trials)), self.rois)
            known = geometries.setdefault(item.subject, own)
            than = first.setdefault(item.subject, item.path)
            same = known.n_voxels == own.n_voxels and np.array_equal(known.voxel_ids, own.voxel_ids)
            if same and known.affine is not None and own.affine is not None:
                same = np.allclose(known.affine, own.affine)
            if not same:
                raise DataError(
                    f"{item.path.name} has {own.n_voxels} voxels that are not the {known.n_voxels} of {than.name}; "
                    "take both from one release, or choose with dataset.variant and dataset.rois."
                )
            parts.append(part)
        parts, shown = self.number_parts(parts)
        notes = {
            "protocol": f"1200 training pictures; test: {', '.join(self.test)}",
            "rois_kept": list(self.rois),
            "warnings": warnings,
        }
        return self.join_subjects(parts, geometries, make_stimulus_table(shown), notes)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file and compare the number of its samples with the declared one."""
        held, names = self._find(), {key: _read_names(path) for key, path in self._find_lists().items()}
        for item in held:
            try:
                trials = read_samples(read_bdata(item.path), item.subject, item.experiment, names)
            except DataError as error:
                yield CheckFinding(item.path.name, False, str(error))
                continue
            what, declared = f"samples of {trials['stimulus_id'].nunique()} stimuli", f"n_{item.experiment}"
            yield compare_fact(
                item.path.name, len(trials), self.manifest.facts[declared], self.find_root(), what=what
            )

    def _find(self) -> list[SubjectFile]:
        root = self.find_root()
        folders = [folder for folder in (root, root / "fmri", root / "data") if folder.is_dir()]
        held = []
        for path in (path for folder in folders for path in sorted(folder.iterdir())):
            match = _FILE.match(path.name)
            if match and match[2] in EXPERIMENTS:
                held.append(SubjectFile(f"{int(match[1]):02d}", EXPERIMENTS[match[2]], match[3], path))
        if not held:
            raise DataError(
                f"{root} holds no file like sub-01_perceptionNaturalImageTest_original_VC.h5; fetch them from figshare "
                "(7033577), or pass their folder with --root. Raw BIDS data (ds001506) are for bids_fmri."
            )
        return _choose(held, self, root)

    def _find_lists(self) -> dict[str, Path]:
        root = self.find_root()
        places = (root, root / "stimuli", root / "data", root.parent / "stimuli")
        found = {key: next((p / n for p in places if is_there(p / n)), None) for key, n in _LISTS.items()}
        return {key: path for key, path in found.items() if path is not None}


@dataclass(frozen=True)
class SubjectFile:
    """One file with its subject and experiment."""

    subject: str
    experiment: Experiment
    variant: str
    path: Path


def _choose(held: list[SubjectFile], config: DeepreconConfig, root: Path) -> list[SubjectFile]:
    subjects = sorted({item.subject for item in held})
    wanted = subjects if config.subjects is None else [f"{number:02d}" for number in config.subjects]
    chosen = []
    for subject in wanted:
        # Training first: repetitions and statistics are counted in this order.
        for experiment in ("training", *config.test):
            fits = [h for h in held if (h.subject, h.experiment) == (subject, experiment)]
            named = [h for h in fits if config.variant is None or h.variant == config.variant]
            if not named:
                there = sorted({f"{h.experiment} ({h.variant})" for h in held if h.subject == subject})
                raise DataError(
                    f"{root} has no {experiment} file of subject {subject}"
                    + (f" that ends in {config.variant}" if config.variant else "")
                    + f"; it has {', '.join(there) or 'nothing of this subject'}: fetch it, or correct dataset.test."
                )
            # The same samples with two kinds of preprocessing would count twice.
            if len(named) > 1:
                variants = ", ".join(h.variant for h in named)
                raise ConfigError(
                    f"{root} has the {experiment} experiment of subject {subject} as {variants}; choose one "
                    "with --set dataset.variant=..."
                )
            chosen.append(named[0])
    return chosen


def _read_names(path: Path) -> dict[str, str]:
    """Return the name of each number (as text) from a list of shapes or letters."""
    import pandas as pd

    table = pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False)
    if table.shape[1] < 2:
        raise DataError(f"{path} has one column; a name and a number are expected, separated by a tab.")
    numbers = [_format_number(number) for number in table[1]]
    return dict(zip(numbers, (re.sub(r"\.[A-Za-z]+$", "", name) for name in table[0]), strict=True))


def _format_number(number: float | str) -> str:
    """Return a number as its shortest text, for example ``"12"`` or ``"12.5"``."""
    try:
        return f"{float(number):.6f}".rstrip("0").rstrip(".")
    except ValueError:
        return str(number)


def read_samples(
    data: BData, subject: str, experiment: Experiment, names: Mapping[str, Mapping[str, str]]
) -> pd.DataFrame:
    """Return one row per sample of a Deeprecon file, in its order.

    Parameters
    ----------
    names
        For ``shapes`` and ``letters``, name of each number. Without it the number is used, as in ``shape_12``.
    """
    import pandas as pd

    codes, label = _read_codes(data)
    if label is not None:
        ids = [re.sub(r"\.[A-Za-z]+$", "", label[code]) for code in codes]
    else:
        if experiment in ("training", "natural") and not data.precise:
            raise DataError(
                f"{data.path} stores its matrix in single precision, in which numbers like 1518878.005958 lose the "
                "image; fetch the published file."
            )
        ids = [_name_code(code, experiment, names) for code in codes]
    concepts = [find_synset(name) if re.match(r"n\d{8}", name) else name for name in ids]
    # An imagined picture is another stimulus than the seen one: it has no pixels.
    if experiment == "imagery":
        ids = [f"{_IMAGINED}{name}" for name in ids]
    runs = data.read_label("Run").astype(int) if "Run" in data.metadata else np.ones(data.n_samples, int)
    table = pd.DataFrame(
        {
            "subject": subject, "session": "01", "run": [f"{experiment}-{run:02d}" for run in runs],
            "stimulus_id": ids, "repetition": 0, "split": "train" if experiment == "training" else "test",
            "concept": concepts, "task": experiment,
        }
    )  # fmt: skip
    if "Block" in data.metadata:
        table["block"] = data.read_label("Block").astype(int)
    return table


def make_stimulus_table(shown: pd.DataFrame) -> pd.DataFrame:
    """Return `stimulus_id`, `concept` and `path` of the stimuli of a trial table.

    Imagined stimuli have no path, but the picture that was imagined is listed with its own name even if no trial shows
    it: the analysis of imagery needs its embedding.
    """
    import pandas as pd

    imagined = shown["task"] == "imagery"
    pictures = shown[~imagined]
    suffix: Any = pictures["task"].map(_SUFFIXES)
    table = pictures[["stimulus_id", "concept"]].assign(path=pictures["stimulus_id"] + suffix)
    own = shown.loc[imagined, ["stimulus_id", "concept"]].assign(path="")
    meant = own.assign(stimulus_id=own["stimulus_id"].str.removeprefix(_IMAGINED))
    natural = meant["stimulus_id"].str.match(r"n\d{8}_")
    meant["path"] = meant["stimulus_id"] + np.where(natural, _SUFFIXES["natural"], _SUFFIXES["shapes"])
    meant = meant[~meant["stimulus_id"].isin(table["stimulus_id"])]
    return pd.concat([table, meant, own], ignore_index=True).drop_duplicates()


def _read_codes(data: BData) -> tuple[list[float], Mapping[float, str] | None]:
    for key in ("stimulus_name", "stimulus_id"):
        if key in data.metadata and key in data.labels:
            codes = data.read_label(key).astype(float).tolist()
            unknown = [code for code in codes if code not in data.labels[key]]
            if unknown:
                raise DataError(f"{data.path} has no name for the {key} {unknown[0]:g}; the file is damaged.")
            return codes, data.labels[key]
    return data.read_label("stimulus_id").astype(float).tolist(), None


def _name_code(code: float, experiment: Experiment, names: Mapping[str, Mapping[str, str]]) -> str:
    if code >= _FIRST_SYNSET:
        return decode_stimulus_id(code)
    number = _format_number(code)
    kind = "letters" if experiment == "letters" else "shapes"
    if number in names.get(kind, {}):
        return names[kind][number]
    return f"{'letter' if kind == 'letters' else 'shape'}_{number}"
