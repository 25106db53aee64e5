"""Tracks: frozen splits on which decoders of anybody are compared.

Owns reading ``data_manifests/tracks/NAME.yaml`` and ``data_manifests/tracks/splits/NAME.json``, the hash of a split,
and its making from a run or from the user's own copy of the data. A split lists ids of pictures, never pictures. Ids
that are not known without the data are not shipped: the track says so, and `make_split` writes the file. Does not know
how entries are read and scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import yaml
from pydantic import Field, ValidationError

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError, check_option, check_unique
from braindecode_vis.base.settings import Settings, describe_validation_error
from braindecode_vis.datasets.laion_fmri import read_split as read_published_split
from braindecode_vis.datasets.manifests import find_package_data

if TYPE_CHECKING:
    from braindecode_vis.pipeline.runs import Run

MetricName = Literal["top1", "top5", "2_way"]
FLOORS = ("ridge", "mean image", "shuffled", "design")


class Floor(Settings):
    """Score of a floor that was measured on a track: value and interval of the headline, and how to repeat it."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    by: str


class Track(Settings):
    """What is asked of everybody on one test set.

    Parameters
    ----------
    name, title
        Name of its file, and one line.
    dataset
        Data set that the package reads.
    configuration, changes
        Shipped configuration that ``run --track`` runs, with changes of its settings.
    subjects
        Subjects of which all must be predicted.
    training
        What may be learnt from.
    queries, gallery, target
        What is predicted, among which pictures it is found, and in which space.
    headline
        Metric that orders the table.
    chance
        Its value without any information, by metric.
    ids
        How the ids of the split are known: ``shipped``, or ``data`` if they are made from the user's own copy.
    sha256
        Hash of the split, where it is known.
    published, published_sha256
        Where the authors publish the ids as a file that ``tracks make --root FILE`` reads, and how its SHA-256 begins.
    make
        What makes the data or the split file.
    floors
        Measured floors by name, among `FLOORS`.
    notes
        What an entrant should know.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str
    dataset: str
    configuration: str
    changes: tuple[str, ...] = ()
    subjects: tuple[str, ...]
    training: str
    queries: str
    gallery: str
    target: str
    headline: MetricName
    chance: dict[MetricName, float]
    ids: Literal["shipped", "data"]
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    published: str = ""
    published_sha256: str = Field(default="", pattern=r"^[0-9a-f]{0,64}$")
    make: str = ""
    floors: dict[Literal["ridge", "mean image", "shuffled", "design"], Floor] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def describe_ids(self) -> str:
        """Return where the ids come from, in a sentence."""
        if self.ids == "shipped":
            return f"The split ships with the package (SHA-256 {self.sha256})."
        checked = f"Its SHA-256 must be {self.sha256}." if self.sha256 else "Its hash is not known yet."
        return f"The ids are not shipped: {self.make or 'make the split from your own copy of the data.'} {checked}"


@dataclass(frozen=True)
class TrackSplit:
    """The frozen ids of a track.

    Parameters
    ----------
    track
        Name of the track.
    queries
        Subject to the ids of the pictures that were shown to it, each once.
    galleries
        Ids of the candidates. A query is ranked in the gallery that holds its id; there are several if folds train each
        other.
    hidden
        Whether queries have names that say nothing, so that no gallery holds them.

    Raises
    ------
    DataError
        If an id repeats, a query has no gallery, or a gallery has fewer than two pictures.
    """

    track: str
    queries: Mapping[str, Sequence[str]]
    galleries: Sequence[Sequence[str]]
    hidden: bool = False

    def __post_init__(self) -> None:
        check_unique(
            [name for ids in self.galleries for name in ids], what="ids of the galleries of the split"
        )
        if not self.queries or not self.galleries or min(len(ids) for ids in self.galleries) < 2:
            raise DataError(
                f"the split of {self.track} needs queries, and galleries of at least two pictures."
            )
        known = {name for ids in self.galleries for name in ids}
        for subject, ids in self.queries.items():
            check_unique(list(ids), what=f"queries of subject {subject}")
            if lost := [name for name in ids if name not in known and not self.hidden]:
                raise DataError(
                    f"the query {lost[0]!r} of subject {subject} is in no gallery of {self.track}."
                )

    @property
    def gallery(self) -> list[str]:
        """All candidates, gallery by gallery."""
        return [name for ids in self.galleries for name in ids]

    @property
    def text(self) -> str:
        """The content of its file, from which the hash is taken."""
        content = {
            "track": self.track,
            "queries": {subject: list(ids) for subject, ids in self.queries.items()},
            "galleries": [list(ids) for ids in self.galleries],
        }
        return json.dumps(content, indent=0, ensure_ascii=True, sort_keys=True) + "\n"

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with store.replace_atomically(path) as temporary:
            temporary.write_text(self.text, encoding="utf-8")
        return path


def list_tracks() -> list[str]:
    """Return the names of the tracks, sorted."""
    return sorted(path.stem for path in (find_package_data("data_manifests") / "tracks").glob("*.yaml"))


@cache
def read_track(name: str) -> Track:
    """Return the track called `name`.

    Raises
    ------
    ConfigError
        If there is none of that name.

    Examples
    --------
    >>> read_track("digits69").headline
    '2_way'
    """
    check_option("the track", name, list_tracks())
    path = find_package_data("data_manifests") / "tracks" / f"{name}.yaml"
    try:
        return Track.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {describe_validation_error(error)}.") from error


def read_split(track: Track, path: Path | None = None) -> TrackSplit:
    """Return the split of a track: the shipped one, or that of a file which must then have the known hash.

    Raises
    ------
    DataError
        If the split is not shipped and no file is given, or the file is damaged or of another track.
    """
    if path is None:
        if track.ids == "data":
            raise DataError(
                f"the split of {track.name} is made from your own copy of the data: run braindecode-vis tracks make "
                f"{track.name} --root DIR, then pass the file with --split."
            )
        path = find_package_data("data_manifests") / "tracks" / "splits" / f"{track.name}.json"
    content = store.read_json(path)
    try:
        split = TrackSplit(
            str(content["track"]),
            {str(key): [str(name) for name in ids] for key, ids in content["queries"].items()},
            [[str(name) for name in ids] for ids in content["galleries"]],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a split of a track; write it with tracks make.") from error
    if split.track != track.name:
        raise DataError(f"{path} is the split of the track {split.track}, not of {track.name}.")
    if track.sha256 and split.sha256 != track.sha256:
        raise DataError(
            f"{path} has the SHA-256 {split.sha256[:16]}..., but the split of {track.name} has {track.sha256[:16]}...; "
            "its ids are others."
        )
    return split


def choose_configuration(name: str, given: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Return the configuration that a track runs, and its changes, those of the caller last.

    Raises
    ------
    ConfigError
        If no shipped configuration reads its data.
    """
    track = read_track(name)
    if not track.configuration:
        raise ConfigError(
            f"no shipped configuration reads the data of the track {name}; enter it with submit and predictions of "
            "your own."
        )
    return track.configuration, [*track.changes, *given]


def split_of_run(run: Run, name: str) -> TrackSplit:
    """Return the ids that a run tests, as the split of a track; they are ordered by id."""
    from braindecode_vis.pipeline.preparing import preprocess

    prepared = preprocess(run)
    trials, queries, galleries = prepared.responses.trials, dict[str, set[str]](), list[list[str]]()
    for fold in prepared.folds:
        tested = trials.iloc[fold.test]
        ids = sorted(set(tested["stimulus_id"].astype(str)))
        # Subjects that are left out one by one are tested with the same pictures.
        if ids not in galleries:
            galleries.append(ids)
        for subject, rows in tested.groupby(tested["subject"].astype(str)):
            queries.setdefault(str(subject), set()).update(rows["stimulus_id"].astype(str))
    return TrackSplit(name, {subject: sorted(ids) for subject, ids in sorted(queries.items())}, galleries)


def check_run(run: Run, name: str, path: Path | None = None) -> TrackSplit:
    """Return the split of a track after checking that a run tests its ids for each subject that it reads.

    Raises
    ------
    DataError
        If it tests other subjects, other pictures or in other galleries.
    """
    track = read_track(name)
    found = split_of_run(run, name)
    if path is None and track.ids == "data":
        complete = set(found.queries) == set(track.subjects)
        if complete and track.sha256 and found.sha256 != track.sha256:
            raise DataError(
                f"the run tests other ids than the track {name}: the SHA-256 of its split is {found.sha256[:16]}..., "
                f"not {track.sha256[:16]}..."
            )
        return found
    split = read_split(track, path)
    for subject, ids in found.queries.items():
        if subject not in split.queries:
            raise DataError(
                f"the run reads subject {subject}, but the track {name} tests {', '.join(split.queries)}; choose with "
                "--subject."
            )
        if other := set(ids) ^ set(split.queries[subject]):
            raise DataError(
                f"the run tests other pictures of subject {subject} than the track {name}: {len(other)} differ, first "
                f"{min(other)!r}; leave out changes of the data set and of the split."
            )
    known = [set(ids) for ids in split.galleries]
    if any(set(ids) not in known for ids in found.galleries):
        raise DataError(
            f"the run ranks the pictures of {name} in other galleries; leave out changes of the split and of the seed."
        )
    return split


def make_split(name: str, out: Path, root: Path | None = None) -> tuple[Path, TrackSplit, bool | None]:
    """Write the split of a track from the user's own copy of the data.

    Parameters
    ----------
    name
        Name of the track.
    out
        Folder of the file, and of the run that reads the data.
    root
        Folder of the data set, or the file that the authors publish.

    Returns
    -------
    path, split
        The file and its content.
    agrees
        Whether it has the known hash; None if that is not known.
    """
    track = read_track(name)
    split = (
        _read_published(track, root)
        if track.published
        else split_of_run(open_track_run(track, out, root), name)
    )
    path = split.write(out / f"{name}.json")
    return path, split, split.sha256 == track.sha256 if track.sha256 else None


def _read_published(track: Track, path: Path | None) -> TrackSplit:
    """Return the split of a file with ``variants[0].test_ids``, as the package of LAION-fMRI holds it."""
    if path is None or not path.is_file():
        raise DataError(
            f"the ids of {track.name} are published as {track.published}; pass that file with --root FILE."
        )
    digest = store.hash_file(path)
    if not digest.startswith(track.published_sha256):
        raise DataError(
            f"{path} has the SHA-256 {digest[:16]}..., but the published file begins with {track.published_sha256}; "
            "it is another pool or another release."
        )
    ids = sorted(name for name, side in read_published_split(path).items() if side == "test")
    return TrackSplit(track.name, dict.fromkeys(track.subjects, ids), [ids])


def open_track_run(track: Track, out: Path, root: Path | None) -> Run:
    """Return a run of the track's configuration in the folder ``run`` below `out`."""
    from braindecode_vis.config import read_config
    from braindecode_vis.pipeline.runs import open_run

    source, changes = choose_configuration(track.name)
    return open_run(read_config(source, changes, root=root), out / "run")


def tabulate_tracks() -> pd.DataFrame:
    """Return one row per track: name, data, subjects, headline, chance, where the ids are, what runs it."""
    rows = []
    for name in list_tracks():
        track = read_track(name)
        rows.append(
            {
                "track": name,
                "what": track.title,
                "subjects": len(track.subjects),
                "headline": track.headline,
                "chance": track.chance[track.headline],
                "split": "shipped" if track.ids == "shipped" else "from your copy",
                "run --track": track.configuration,
            }
        )
    return pd.DataFrame(rows)


def describe_track(track: Track) -> dict[str, Any]:
    """Return everything of a track in words, in the order of a page."""
    floors = {
        name: f"{found.value:.3f} ({found.by})" if (found := track.floors.get(name)) else "not measured here"
        for name in ("ridge", "design")
    }
    return {
        "Title": track.title,
        "Data set": track.dataset,
        "Configuration": " ".join([track.configuration, *track.changes]),
        "Subjects": ", ".join(track.subjects),
        "Training": track.training,
        "Queries": track.queries,
        "Gallery": track.gallery,
        "Target": track.target,
        "Headline": f"{track.headline}, chance {track.chance[track.headline]:g}",
        **({"Data": track.make} if track.make and track.ids == "shipped" else {}),
        "Split": track.describe_ids(),
        "Floors": "; ".join(f"{name}: {words}" for name, words in floors.items())
        + "; mean image and shuffled: computed for each entry",
        **({"Notes": " ".join(track.notes)} if track.notes else {}),
    }
