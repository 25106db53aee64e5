"""MOSAIC: eight fMRI data sets, 93 people, preprocessed alike to 91 282 grayordinates, one model of single trials.

Owns the HDF5 files (one for each person, or all people in one), the lists of training and test responses that keep near
copies of test pictures out of the training, and the table of people who took part in several of the sets. The first
59 412 grayordinates are the cortex; an atlas averages them while they are read. The subcortex is not read.

The authors standardised the responses of each session, or group of sessions, with its training trials. Most are betas
of type D of GLMsingle; where no picture was repeated (`find_beta_type`) they are of type B.

References
----------
Layout and names as in blahner/mosaic-preprocessing@62d58a04 and its package mosaic-dataset 0.0.6. Prince et al. (2022),
doi:10.7554/eLife.77599: GLMsingle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import DataError, is_there, refuse_damage
from braindecode_vis.base.remote import bring, open_hdf5
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.manifests import CheckFinding, check_subset, collect_findings, compare_fact
from braindecode_vis.datasets.sources.betas_source import (
    AtlasSettings,
    BetasPart,
    FmriSource,
    Geometry,
    ZScoring,
)
from braindecode_vis.datasets.sources.pictured_betas import PicturedSettings

if TYPE_CHECKING:
    import pandas as pd

SETS = {
    "NSD": "NaturalScenesDataset", "NOD": "NaturalObjectDataset", "HAD": "HumanActionsDataset",
    "BMD": "BOLDMomentsDataset", "GOD": "GenericObjectDecoding", "BOLD5000": "BOLD5000", "deeprecon": "deeprecon",
    "THINGS": "THINGS",
}  # fmt: skip
"""Folder of each set, by the name that its people have in the files."""
N_GRAYORDINATES = 91282
N_VERTICES = (29696, 29716)
"""Of the left and the right cortex without the medial wall; the grayordinates begin with these."""
N_CORTEX = sum(N_VERTICES)
LISTS = {"train": "train_naturalistic", "naturalistic": "test_naturalistic", "artificial": "test_artificial"}
"""Files of the split by what they list."""

WARNING = (
    "participants_shared.tsv is not there, so someone who is in several sets counts as several subjects, and a split "
    "by subject may train on and test the same person; fetch the part tables."
)

_HINT = "fetch it again"
_ROW, _GAPS = Array(("grayordinate",)), Array(("gap",), optional=True)
LAYOUT = Layout(
    person=File(
        "fMRIPrepv23_2_0/task_fMRI/betas/GLMsinglev1_2/{folder}/{person}.hdf5", "hdf5",
        "a person's file of MOSAIC", _HINT,
        {
            "betas/{response}": _ROW,
            "noiseceilings/{name}": Array(("grayordinate",), optional=True),  # percent
            "nan_indices_all": _GAPS,
        },
    ),
    merged=File(
        "mosaic_version-1_0_0_renamed.hdf5", "hdf5", "the file of all people of MOSAIC", _HINT,
        {"{person}/betas/{response}": _ROW, "{person}/nan_indices_all": _GAPS, "nan_indices_all": _GAPS},
    ),
    matrix=File(
        "mosaic_version-1_0_0_chunks_renamed.hdf5", "hdf5", "the file of all people of MOSAIC", _HINT,
        {
            "{person}/betas": Array(("trial of {person}", "grayordinate"), "float32"),
            "{person}/nan_indices/{response}": _GAPS,  # in the order of the trials
            "nan_indices_all": _GAPS,
        },
    ),
    list=File(
        "testtrain/{list}.json", "other", "a list of the split of MOSAIC",
        "download the lists from mosaic.csail.mit.edu, and name their folder with --set dataset.splits=DIR",
    ),
    shared=File("participant_info/participants_shared.tsv", "tsv", "the table of people in several sets", _HINT),
)  # fmt: skip
_PERSON = re.compile(rf"sub-\d+_({'|'.join(SETS)})(?![A-Za-z0-9])")
_RESPONSE = re.compile(
    r"(?P<person>.+?)_stimulus-(?P<picture>.+)_phase-(?P<phase>[^_]+)_rep-(?P<repetition>\d+)"
)


def name_response(person: str, picture: str, phase: str, repetition: int) -> str:
    """Return the name of a response in the files.

    Examples
    --------
    >>> name_response("sub-01_NSD", "nsd-00012.png", "train", 0)
    'sub-01_NSD_stimulus-nsd-00012_phase-train_rep-0'
    """
    return f"{person}_stimulus-{Path(picture).stem}_phase-{phase}_rep-{repetition}"


def find_beta_type(person: str) -> str:
    """Return ``B`` for people without repeated pictures, for whom noise components cannot be fitted, otherwise ``D``.

    Examples
    --------
    >>> find_beta_type("sub-01_HAD"), find_beta_type("sub-10_NOD"), find_beta_type("sub-09_NOD")
    ('B', 'B', 'D')
    """
    name, _, of = person.partition("_")
    return "B" if of == "HAD" or (of == "NOD" and int(name[4:]) >= 10) else "D"


@dataclass(frozen=True)
class PersonPlace:
    """Where the responses of a person are: a file, its kind in the layout, and the group of the person in it."""

    path: Path
    kind: Literal["person", "merged", "matrix"]
    group: str = ""


class MosaicConfig(AtlasSettings, PicturedSettings):
    """Folder of the files, people to read, and the test pictures.

    Parameters
    ----------
    root
        Folder with the files of people or of all people (``.hdf5``), in any folder below it.
    sets
        Sets to read: ``NSD``, ``NOD``, ``HAD``, ``BMD``, ``GOD``, ``BOLD5000``, ``deeprecon``, ``THINGS``; all by
        default.
    subjects
        People to read, such as ``sub-01_NSD``; all by default. Someone in several sets, according to
        ``participants_shared.tsv``, is one subject with a session for each set.
    test
        ``naturalistic`` tests photographs, ``artificial`` the drawn pictures and patterns of NSD and deeprecon,
        ``both`` all of them.
    splits
        Folder of ``train_naturalistic.json``, ``test_naturalistic.json`` and ``test_artificial.json``; the root or
        its folder ``testtrain`` by default.
    zscore
        ``none`` by default: the authors standardised every grayordinate with training trials.
    images
        Folder of the pictures, of which films are found as their middle frame (``NAME_frame-*.jpg``); ``stimuli`` or
        ``images`` below the root by default, if it holds all of them.
    """

    kind: Literal["mosaic"] = "mosaic"
    sets: tuple[Literal["NSD", "NOD", "HAD", "BMD", "GOD", "BOLD5000", "deeprecon", "THINGS"], ...] | None = (
        None
    )
    subjects: tuple[str, ...] | None = None
    test: Literal["naturalistic", "artificial", "both"] = "naturalistic"
    splits: Path | None = None
    zscore: ZScoring = "none"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "images", "splits"})
    title: ClassVar[str] = "MOSAIC"
    unit: ClassVar[str] = "z over training trials"

    def list_files(self) -> list[Path]:
        """Return the files of all people that are read, the lists of the split, and the table of shared people."""
        found = {place.path for place in self._find_people().values()}
        shared = self._find_shared()
        return [*sorted(found), *self._find_lists().values(), *([] if shared is None else [shared])]

    def open_betas(self) -> FmriSource:
        """Return the responses as lazy parts, one for each person and set."""
        people = self._find_people()
        listed = read_lists(self._find_lists())
        names = {person: read_names(place, person) for person, place in people.items()}
        gaps = np.unique(np.concatenate([read_gaps(place) for place in people.values()]))
        # Not measured in one of the people: left out of all, so that everyone has the same grayordinates.
        usable = np.setdiff1d(np.arange(N_CORTEX), gaps)
        if not len(usable):
            raise DataError(
                f"nan_indices_all of the files below {self.find_root()} names every grayordinate of the cortex, so "
                "nothing is left to read; fetch the files again, or read fewer people with dataset.subjects."
            )
        joined = self._join_people()
        parts, n_left_out = [], 0
        # All sets of one subject follow each other.
        for person in sorted(people, key=lambda name: (joined.get(name, name), name)):
            place, own = people[person], listed.get(person, {})
            kept = [(row, name) for row, name in enumerate(names[person]) if name in own]
            absent = own.keys() - set(names[person])
            if absent or not kept:
                what = f"no response {min(absent)}" if absent else "none of its responses"
                raise DataError(
                    f"{place.path} has {what}, but the lists of the split name {len(own)} of {person}: they are of "
                    "different releases; fetch both again."
                )
            n_left_out += len(names[person]) - len(kept)
            trials = _make_trials(
                person, joined.get(person, person), [(name, *own[name]) for _, name in kept]
            )
            rows = np.array([row for row, _ in kept])
            read = partial(_read_rows, place, [name for _, name in kept], rows, usable)
            parts.append(BetasPart(trials, (place.path,), len(usable), read))
        self._check_sides(listed, people)
        parts, shown = self.number_parts(parts)
        geometry = Geometry(usable, surface="fsLR32k without the medial wall", n_vertices=N_VERTICES)
        notes: dict[str, Any] = {"protocol": self._describe(shown), "responses_in_no_list": n_left_out}
        if shown["session"].nunique() > 1 and self._find_shared() is None:
            notes["warnings"] = [WARNING]
        return self.join_subjects(
            parts, {"everyone": geometry}, shown.assign(path=self._find_frames(shown)), notes
        )

    @collect_findings("files")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, pair responses with the lists, and compare the counts of whole sets with the manifest."""
        import pandas as pd

        source, root, facts = self.open_betas(), self.find_root(), self.manifest.facts
        shown = pd.concat([part.trials for part in source.parts])
        for name, trials in shown.groupby("session"):
            people = int(trials["person"].nunique())
            yield CheckFinding(str(name), True, f"{len(trials)} trials of {people} people")
            for split, own in trials.groupby("split"):
                item = f"n_trials of {name}, {split}"
                # The declared numbers are of all people, and of photographs.
                if item in facts and people == facts["n_people"][name] and self.test == "naturalistic":
                    yield compare_fact(item, len(own), facts[item], root)
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    # --- files ----------------------------------------------------------------------------------------------

    def _find_people(self) -> dict[str, PersonPlace]:
        root = self.find_root()
        there = {
            name: place
            for name, place in find_people(root).items()
            if not self.sets or _find_set(name) in self.sets
        }
        if not there:
            of = f" of {', '.join(self.sets)}" if self.sets else ""
            raise DataError(
                f"no file of responses of MOSAIC{of} (sub-01_NSD.hdf5, or one of all people) is below {root}; fetch "
                "it, or correct the root."
            )
        wanted = check_subset(self.subjects, sorted(there), what="MOSAIC subject", option="dataset.subjects")
        return {name: there[name] for name in wanted}

    def _find_lists(self) -> dict[str, Path]:
        kinds = ("train", *(("naturalistic", "artificial") if self.test == "both" else (self.test,)))
        folder = self.splits.expanduser() if self.splits is not None else self.find_root()
        return {
            kind: _find_flat(folder, "list", list=LISTS[kind])
            or LAYOUT.find(folder, "list", list=LISTS[kind])
            for kind in kinds
        }

    def _check_sides(
        self, listed: Mapping[str, Mapping[str, tuple[str, str]]], people: Iterable[str]
    ) -> None:
        """Raise `DataError` if the lists of one side name no response of the people that are read."""
        kinds = {kind for person in people for _, kind in listed.get(person, {}).values()}
        lists = self._find_lists()
        for side in (["train"], [kind for kind in lists if kind != "train"]):
            if kinds.isdisjoint(side):
                names = " and ".join(str(lists[kind]) for kind in side)
                raise DataError(
                    f"{names} names no response of the people that are read; download the list again, or choose other "
                    "people (dataset.subjects) or test pictures (dataset.test)."
                )

    def _find_shared(self) -> Path | None:
        place = LAYOUT.place(self.find_root(), "shared")
        return place if is_there(place) else _find_flat(self.find_root(), "shared")

    def _join_people(self) -> dict[str, str]:
        """Return the name of the subject for everyone who is in several sets: that in the first column of the table."""
        path = self._find_shared()
        if path is None:
            return {}
        table = LAYOUT.read_table(path, "shared", dtype=str, keep_default_na=False)
        short = {
            **{long: name for name, long in SETS.items()},
            **{name: name for name in SETS},
            "THINGS_fmri": "THINGS",
        }
        joined: dict[str, str] = {}
        for row in table.to_dict("records"):
            # A cell names someone in full, or the number in the set of its column.
            cells = [f"{cell}_{short[key]}" if key in short else cell for key, cell in row.items() if cell]
            people = [cell for cell in cells if _PERSON.fullmatch(cell)]
            joined |= dict.fromkeys(people, next(iter(people), ""))
        if not joined:
            raise DataError(
                f"{path} names nobody as sub-01_NSD, or as sub-01 in a column NSD; fetch it again."
            )
        return joined

    def _find_frames(self, shown: pd.DataFrame) -> list[str]:
        """Return the picture files: the middle frame of a film, if it is there."""
        folder = self.images.expanduser() if self.images is not None else self._find_beside()
        if folder is None or not shown["path"].str.endswith(".mp4").any():
            return shown["path"].tolist()
        frames = {
            re.sub(r"_frame-\w+\.jpg$", ".mp4", path.name): path.name
            for path in folder.glob("**/*_frame-*.jpg")
        }
        return [frames.get(name, name) for name in shown["path"]]

    def _describe(self, shown: pd.DataFrame) -> str:
        counts = shown["split"].value_counts()
        weak = shown.loc[shown["beta_type"] == "B", "person"].unique()
        others = f", B (no repeats) of {len(weak)} people, first {weak[0]}" if len(weak) else ""
        return (
            f"MOSAIC, {shown['subject'].nunique()} people in {shown['session'].nunique()} sets: "
            f"{counts.get('train', 0)} training and {counts.get('test', 0)} test trials ({self.test}) of the authors' "
            f"split without near copies; betas of type D{others}"
        )


def _find_set(person: str) -> str:
    return person.partition("_")[2]


def _find_flat(folder: Path, name: str, **labels: str) -> Path | None:
    """Return a file that was put into a folder without the folders of the layout; None if it is not there."""
    path = folder / LAYOUT.place(folder, name, **labels).name
    return path if is_there(path) else None


def find_people(root: Path) -> dict[str, PersonPlace]:
    """Return everyone whose responses are below a folder; of several files, the one that is read fastest.

    Raises
    ------
    DataError
        If a file is damaged.
    """
    found: dict[str, PersonPlace] = {}
    order = ("matrix", "person", "merged")
    for path in sorted(root.glob("**/*.hdf5")):
        with refuse_damage(f"{path} cannot be read as HDF5", hint=_HINT), open_hdf5(path) as file:
            groups = {
                name: file[name]["betas"]
                for name in file
                if _PERSON.fullmatch(name) and "betas" in file[name]
            }
            own = [] if groups or "betas" not in file else [next(iter(file["betas"]), "")]
            places = {
                name: PersonPlace(path, "matrix" if hasattr(betas, "shape") else "merged", f"{name}/")
                for name, betas in groups.items()
            }
        places |= {match[0]: PersonPlace(path, "person") for name in own if (match := _PERSON.match(name))}
        if _PERSON.fullmatch(path.stem) and path.stem not in places:
            held = f"the responses of {next(iter(places))}" if places else "no responses"
            raise DataError(f"{path} is named like the file of a person, but holds {held}; {_HINT}.")
        for name, place in places.items():
            if name not in found or order.index(place.kind) < order.index(found[name].kind):
                found[name] = place
    return found


def read_names(place: PersonPlace, person: str) -> list[str]:
    """Return the names of all responses of a person, in the order of the file.

    Raises
    ------
    DataError
        If one is of someone else or of an unknown split, or the responses are in another space.
    """
    with LAYOUT.open(place.path, place.kind) as file, refuse_damage(f"{place.path} is truncated or damaged"):
        is_matrix = place.kind == "matrix"
        names = list(file.content[f"{place.group}{'nan_indices' if is_matrix else 'betas'}"])
        lengths = file.measure(f"{place.group}betas" + ("" if is_matrix else f"/{names[0]}"))
        pictures = file.content[f"{person}/presented_stimulus_filename"].asstr()[:] if is_matrix else ()
    where = f"{place.path}: {person}"
    if lengths["grayordinate"] != N_GRAYORDINATES:
        raise DataError(
            f"{where} has {lengths['grayordinate']} values in a response, but MOSAIC has {N_GRAYORDINATES} "
            "grayordinates of fsLR32k; these are voxels or parcels of another space."
        )
    for name in names:
        found = _RESPONSE.fullmatch(name)
        if found is None or found["phase"] not in ("train", "test"):
            raise DataError(
                f"{where} has the response {name}, which is not named PERSON_stimulus-PICTURE_phase-PHASE_rep-N with "
                "the phase train or test; fetch the file again."
            )
        if found["person"] != person:
            raise DataError(
                f"{where} has the response {name} of {found['person']}: people are mixed; use the authors' files, one "
                "for each person, or the one with a group for each."
            )
    if is_matrix:
        shown = [Path(picture).stem for picture in pictures]
        n_trials = lengths[f"trial of {person}"]
        if n_trials != len(names) or shown != [_RESPONSE.fullmatch(name)["picture"] for name in names]:  # type: ignore[index]
            raise DataError(
                f"{where} has {n_trials} rows of betas, {len(shown)} pictures and {len(names)} names, which do not "
                "agree; fetch the file again, or use the files of single people."
            )
    return names


def read_gaps(place: PersonPlace) -> np.ndarray:
    """Return the grayordinates that have no value in some response, in any order."""
    with LAYOUT.open(place.path, place.kind) as file:
        name = next(
            (name for name in (f"{place.group}nan_indices_all", "nan_indices_all") if name in file), None
        )
        # Without any gap, the authors' files hold an empty array of float64.
        return np.zeros(0, int) if name is None else file.read(name).astype(int)


def read_lists(paths: Mapping[str, Path]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return, for each person, the responses in the lists: name to picture and kind of list.

    Raises
    ------
    DataError
        If a file is no such list, or a response is in those of both sides.
    """
    listed: dict[str, dict[str, tuple[str, str]]] = {}
    for kind, path in paths.items():
        with refuse_damage(
            f"{path} is no list of pictures with their responses", hint=LAYOUT.files["list"].hint
        ):
            entries = [pair for entry in json.loads(bring(path).read_text()) for pair in entry.items()]
            for head, responses in entries:
                person, _, picture = head.partition("_stimulus-")
                # The lists name files that the authors had before; the HDF5 has the names without the ending. A
                # stem of `Path` would cut names of pictures with a dot.
                own = listed.setdefault(person, {})
                for name in (response.removesuffix(".npz") for response in responses):
                    if name in own and (kind == "train") != (own[name][1] == "train"):
                        raise DataError(
                            f"{path} lists the response {name}, which {paths[own[name][1]].name} lists too: it would "
                            "be trained on and tested; download the lists again."
                        )
                    own[name] = (picture, kind)
    return listed


def _make_trials(person: str, subject: str, responses: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    """Return the trials of a person: name of the response, file of the picture, and kind of list for each."""
    import pandas as pd

    names, pictures, kinds = zip(*responses, strict=True)
    ids = [Path(picture).stem for picture in pictures]
    phases = [_RESPONSE.fullmatch(name)["phase"] for name in names]  # type: ignore[index]
    # A picture has no category here, so each is its own concept.
    return pd.DataFrame(
        {
            "subject": subject, "session": _find_set(person), "run": phases, "stimulus_id": ids, "repetition": 0,
            "split": ["train" if kind == "train" else "test" for kind in kinds], "concept": ids, "path": pictures,
            "person": person, "beta_type": find_beta_type(person), "list": kinds,
        }
    )  # fmt: skip


def _read_rows(
    place: PersonPlace, names: Sequence[str], rows: np.ndarray, usable: np.ndarray, start: int, stop: int
) -> np.ndarray:
    """Return responses, float32 of shape (stop - start, len(usable))."""
    cortex = slice(0, N_CORTEX)
    with LAYOUT.open(place.path, place.kind) as file:
        if place.kind == "matrix":
            part: dict[str, Any] = {f"trial of {place.group[:-1]}": rows[start:stop], "grayordinate": cortex}
            return file.read(f"{place.group}betas", part=part).astype(np.float32)[:, usable]
        block = np.empty((stop - start, len(usable)), np.float32)
        for row, name in enumerate(names[start:stop]):
            block[row] = file.read(f"{place.group}betas/{name}", part={"grayordinate": cortex})[usable]
    return block
