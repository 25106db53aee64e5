"""THINGS-fMRI from images to files, as on figshare and OpenNeuro (ds004192): response tables, volumes and events.

Owns the design, ``betas_csv`` (a pandas HDF table and two CSV files), ``betas_vol`` with its conditions,
``brainmasks`` and the events of the raw runs. Volumes are written first, run by run, including catch trials; the
response table is computed from them, so that both hold the same numbers. The HDF table is written with h5py in the
layout of pandas and PyTables, one block of voxels after the other, so that the full table (8.3 GB) is never in memory
and PyTables is not needed; pandas can read it.

Traps that are kept: rows are voxels, and the first column is `voxel_id`; column names mix text and numbers,
so that they are pickled inside the HDF file; the table leaves catch trials out, the volumes keep them;
`category_nr` of the events is not the THINGS number; a folder name is not always the concept.

References
----------
.. [1] Hebart, M. N. et al. (2023). eLife 12, e82580. https://doi.org/10.7554/eLife.82580
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, check_columns, check_unique
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.drawn.images import make_concepts, match_concepts
from braindecode_vis.datasets.things_fmri.response_tables import LAYOUT, MASKS, TABLES, VOLUMES
from braindecode_vis.parts.phantom.bold_signal import compute_voxel_snr, iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit, list_units
from braindecode_vis.parts.phantom.formats.file_writers import (
    HEADER_BYTES,
    check_block,
    check_count,
    write_csv,
    write_tsv,
    write_volume,
    write_volumes,
)
from braindecode_vis.parts.phantom.formats.pickles import split_pickle
from braindecode_vis.parts.phantom.scanner import (
    count_voxels,
    estimate_volume_bytes,
    iterate_volumes,
    make_scanner,
)
from braindecode_vis.parts.phantom.sizes import (
    PhantomSize,
    check_one_exemplar_a_session,
    count_images_of_concepts,
)

USES = ("n_runs", "n_catch", "voxel_mm")
# Names of the localiser regions in the published table; LOC is lateral occipital, TOS the occipital place area.
_SIDED = {"EBA": "EBA", "FFA": "FFA", "PPA": "PPA", "LO": "LOC", "OPA": "TOS"}
_VOXELS_PER_BLOCK = 1024  # rows of the response table written at once
T_R = 1.5
SOA_S, FIRST_ONSET_S, STIMULUS_S = 4.5, 3.0, 0.5  # three volumes a trial [1]_
# The phantom's concepts are not THINGS concepts; as in the published files, an offset makes the two numberings
# different.
_THINGS_OFFSET = 1000
VOXEL_COLUMNS = (
    "voxel_id", "subject_id", "voxel_x", "voxel_y", "voxel_z", "nc_singletrial", "nc_testset",
    "splithalf_uncorrected", "splithalf_corrected", "prf-eccentricity", "prf-polarangle", "prf-rsquared",
    "prf-size",
)  # fmt: skip


def count_session_trials(size: PhantomSize) -> int:
    """Return the trials of one session, catch trials included."""
    return size.n_train_concepts + 2 * size.n_test_concepts + (size.n_catch or 0)


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if THINGS-fMRI cannot have this size."""
    check_one_exemplar_a_session(size, "THINGS-fMRI")
    if (size.n_runs or 0) > count_session_trials(size):
        raise ConfigError(
            f"n_runs ({size.n_runs}) cannot exceed the {count_session_trials(size)} trials of a session."
        )


def count(size: PhantomSize) -> Counts:
    """Return work and space of volumes and tables."""
    n_trials = size.n_sessions * count_session_trials(size)
    n_kept = size.n_sessions * (count_session_trials(size) - (size.n_catch or 0))
    n_voxels = count_voxels(size.voxel_mm)
    volume = estimate_volume_bytes(size.voxel_mm, "float32")
    table = 4.0 * n_voxels * n_kept
    n_bytes = n_trials * (volume + 200) + table + 120 * n_voxels
    seconds = n_trials * (2e-4 + 3.5e-7 * n_voxels + volume * 2.5e-8) + table * 1e-8 + n_voxels * 1e-5
    steps = 1 + size.n_subjects * (n_trials + n_kept)
    seconds_recorded = size.n_subjects * n_trials * SOA_S
    return Counts(size.n_subjects * n_bytes, table, seconds_recorded, 1 + size.n_subjects * seconds, steps)


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images, sorted by concept."""
    n_concepts = size.n_train_concepts + size.n_test_concepts
    names = make_concepts(n_concepts, seed=seed)["concept"].tolist()
    table = make_image_table(names, size.n_train_exemplars, size.n_test_concepts)
    table = match_concepts(table, n_concepts, seed)
    names_on_disk = table["stimulus_id"] + ".jpg"
    return table.assign(
        path="object_images/" + table["concept"] + "/" + names_on_disk, file_name=names_on_disk
    )


@lru_cache(maxsize=4)
def _make_design(job: PhantomJob, subject: int) -> pd.DataFrame:
    assert job.size.n_runs is not None
    assert job.size.n_catch is not None
    seed = derive_seed(job.config.seed, "design", subject)
    return make_things_fmri_design(
        job.table, job.size.n_sessions, job.size.n_runs, seed, n_catch=job.size.n_catch
    )


def plan(job: PhantomJob) -> list[Unit]:
    """Return the masks, one unit per run of volumes, and the response table of each subject."""
    n_trials = count_session_trials(job.size)
    runs = np.arange(n_trials) * job.size.runs // n_trials + 1  # of each trial of a session
    counts = np.bincount(runs).tolist()

    def write_masks(progress: Progress) -> list[Path]:
        scanner = job.scanner
        numbers = [person.index + 1 for person in job.subjects]
        return [write_brainmask(job.root, number, scanner.mask, scanner.affine) for number in numbers]

    units = [Unit("the brain masks", 1, write_masks)]
    labels: dict[str, Any] = {"session": range(1, job.size.n_sessions + 1), "run": range(1, len(counts))}
    n_kept = job.size.n_sessions * (n_trials - (job.size.n_catch or 0))
    name = "subject {person.name}, session {session:02d}, run {run:02d}"
    return [
        *units,
        *list_units(job, name, lambda _, run: counts[run], _write_run, **labels),
        *list_units(job, "subject {person.name}, response table", n_kept, _write_table, reads_others=True),
    ]


def _write_run(job: PhantomJob, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    design = _make_design(job, person.index)
    rows = design[(design["session"] == session) & (design["run"] == run)]
    blocks = progress.watch(
        iterate_betas(person, job.scanner, rows["row"].to_numpy(), rows.index.to_numpy()), len
    )
    number = person.index + 1
    path = write_volume_betas(
        job.root,
        number,
        session,
        run,
        iterate_volumes(job.scanner, blocks),
        shape=job.scanner.mask.shape,
        affine=job.scanner.affine,
        design=design,
        images=job.table,
    )
    events = write_events(job.root, number, session, run, design, job.table, job.config.seed)
    return [path, place_run(job.root, "conditions", number, session, run), events]


def _write_table(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    design, scanner, number = _make_design(job, person.index), job.scanner, person.index + 1
    stimuli = make_stimulus_metadata(design, job.table, number)
    # Noise ceilings in percent as published, from the planted ratio of variances instead of an estimate [1]_.
    power = compute_voxel_snr(person, scanner) ** 2
    # A test image is shown once per session; halves of the sessions are correlated.
    half = job.size.n_sessions / 2
    split = power / (power + 1 / half)
    # One 0/1 column per region, with separate left and right columns for functional localisers.
    left = scanner.positions[:, 0] < 0
    flags = {name: scanner.regions == name for name in ("V1", "V2", "V3", "hV4")}
    for region, name in _SIDED.items():
        flags[f"l{name}"] = (scanner.regions == region) & left
        flags[f"r{name}"] = (scanner.regions == region) & ~left
    voxels = make_voxel_metadata(
        number,
        np.argwhere(scanner.mask),
        pd.DataFrame({**flags, "IT": scanner.regions == "IT"}),
        nc_singletrial=100 * power / (power + 1),
        nc_testset=100 * power / (power + 1 / job.size.n_sessions),
        splithalf_uncorrected=split,
        splithalf_corrected=2 * split / (1 + split),
    )
    spool_path = job.scratch / f"things-fmri-{person.name}.npy"
    shape = (len(stimuli), scanner.n_voxels)
    try:
        spool = np.lib.format.open_memmap(spool_path, "w+", np.float32, shape)
        for row, values in enumerate(_read_trials(job, person, design)):
            spool[row] = values
            progress.add(1)
        # The table has a row per voxel, so the trials are transposed, one block of voxels at a time.
        starts = range(0, scanner.n_voxels, _VOXELS_PER_BLOCK)
        write_response_table(
            job.root,
            number,
            (np.ascontiguousarray(spool[:, start : start + _VOXELS_PER_BLOCK].T) for start in starts),
            n_voxels=scanner.n_voxels,
            stimuli=stimuli,
            voxels=voxels,
        )
        del spool
    finally:
        spool_path.unlink(missing_ok=True)
    return [
        LAYOUT.place(job.root / TABLES, name, subject=person.name)
        for name in ("responses", "stimuli", "voxels")
    ]


def _read_trials(job: PhantomJob, person: Person, design: pd.DataFrame) -> Iterator[np.ndarray]:
    """Yield the voxels of every trial except catch trials, from the finished volumes."""
    scanner = job.scanner
    n_bytes = 4 * scanner.mask.size
    for (session, run), rows in design.groupby(["session", "run"]):
        with gzip.open(place_run(job.root, "betas", person.index + 1, session, run)) as file:
            file.read(HEADER_BYTES)
            for kind in rows["trial_type"]:
                volume = np.frombuffer(file.read(n_bytes), "<f4").reshape(scanner.mask.shape, order="F")
                if kind != "catch":
                    yield volume[scanner.mask]


def make_image_table(concepts: Sequence[str], n_exemplars: int = 12, n_test: int = 100) -> pd.DataFrame:
    """Return one row per image: `concept`, `category_nr`, `exemplar_nr`, `stimulus_id`, `file_path`, `is_test`.

    `n_test` concepts at equal distances have one more image, shown in every session.
    """
    check_unique(concepts, what="concept names")
    if not 0 <= n_test <= len(concepts):
        raise ConfigError(f"{n_test} test images do not fit into {len(concepts)} concepts.")
    # At equal distances in the alphabet, since concepts are sorted.
    tested = set(np.arange(n_test) * len(concepts) // max(n_test, 1))
    rows = [
        {"concept": concept, "category_nr": category + 1, "exemplar_nr": e, "is_test": e > n_exemplars}
        for category, concept in enumerate(sorted(concepts))
        for e in range(1, n_exemplars + 1 + (category in tested))
    ]
    table = pd.DataFrame(rows)
    letter = np.where(table["exemplar_nr"] == 1, "b", "s")
    table["stimulus_id"] = table["concept"] + "_" + table["exemplar_nr"].map("{:02d}".format) + letter
    # Folders of two-word concepts have only the first word: read the concept from the file name.
    table["file_path"] = table["concept"].str.split("_").str[0] + "/" + table["stimulus_id"] + ".jpg"
    return table


def make_things_fmri_design(
    images: pd.DataFrame, n_sessions: int = 12, n_runs: int = 10, seed: int = 0, *, n_catch: int = 100
) -> pd.DataFrame:
    """Return every trial of one subject: session k has exemplar k of each concept, every test image, and catch trials.

    Returns
    -------
    DataFrame
        `session`, `run`, `trial` (from 1), `trial_type` (``exp``, ``test``, ``catch``), `onset`, `duration`,
        `row` (of `images`, -1 for catch) and `catch_nr`.
    """
    sessions = []
    for table, _ in draw_sessions(images, n_sessions, n_runs, seed, "things-fmri", n_catch=n_catch):
        table.insert(2, "trial", table.groupby("run").cumcount() + 1)
        sessions.append(table)
    design = pd.concat(sessions, ignore_index=True)
    design["onset"] = FIRST_ONSET_S + SOA_S * (design["trial"] - 1)
    design["duration"] = STIMULUS_S
    return design


def draw_sessions(
    images: pd.DataFrame, n_sessions: int, n_runs: int, seed: int, name: str, *, n_catch: int
) -> Iterator[tuple[pd.DataFrame, np.random.Generator]]:
    """Yield the trials of each session in random order, and its generator, for further random numbers.

    The trials have `session`, `run`, `trial_type`, `row` and `catch_nr`; `name` makes the orders of two data sets
    different.
    """
    tests = np.flatnonzero(images["is_test"])
    for session in range(1, n_sessions + 1):
        rng = make_generator(seed, name, session)
        single = np.flatnonzero((images["exemplar_nr"] == session) & ~images["is_test"])
        rows = np.concatenate([single, tests, np.full(n_catch, -1)])
        catch = np.concatenate([np.zeros(len(rows) - n_catch, dtype=int), np.arange(1, n_catch + 1)])
        kinds = np.repeat(["exp", "test", "catch"], [len(single), len(tests), n_catch])
        order = rng.permutation(len(rows))
        table = pd.DataFrame({"trial_type": kinds[order], "row": rows[order], "catch_nr": catch[order]})
        table.insert(0, "session", session)
        table.insert(1, "run", np.arange(len(rows)) * n_runs // len(rows) + 1)
        yield table, rng


def write_events(
    root: Path,
    subject: int,
    session: int,
    run: int,
    design: pd.DataFrame,
    images: pd.DataFrame,
    seed: int = 0,
) -> Path:
    """Write ``sub-XX_ses-thingsNN_task-things_run-NN_events.tsv`` of one run.

    Parameters
    ----------
    design : DataFrame
        From `make_things_fmri_design`; the rows of the run are selected here.
    """
    rows = design[(design["session"] == session) & (design["run"] == run)]
    shown = images.iloc[rows["row"].to_numpy()].set_index(rows.index)
    catch = rows["trial_type"] == "catch"
    test = rows["trial_type"] == "test"
    rng = make_generator(seed, "things-fmri", "answers", subject, session, run)
    test_numbers = pd.Series(
        np.arange(1, images["is_test"].sum() + 1), index=np.flatnonzero(images["is_test"])
    )
    table = rows[["onset", "duration", "trial_type"]].copy()
    # A separate running number: catch trials are the category after the last one.
    table["category_nr"] = np.where(catch, images["category_nr"].max() + 1, shown["category_nr"])
    table["exemplar_nr"] = np.where(catch, rows["catch_nr"], shown["exemplar_nr"])
    table["test_image_nr"] = rows["row"].map(test_numbers).where(test)
    table["things_category_nr"] = (shown["category_nr"].astype(float) + _THINGS_OFFSET).where(~catch)
    table["things_exemplar_nr"] = shown["exemplar_nr"].astype(float).where(~catch)
    table["response_time"] = pd.Series(rng.uniform(0.5, 1.2, len(rows)).round(3), index=rows.index).where(
        catch
    )
    table["file_path"] = shown["file_path"].where(~catch, rows["catch_nr"].map("catch{:03d}.jpg".format))
    path = place_run(root, "conditions", subject, session, run)
    # The raw runs have the names of the volumes, in BIDS folders.
    folder = root / path.parent.relative_to(root / VOLUMES) / "func"
    return write_tsv(folder / path.name.replace("conditions.tsv", "events.tsv"), table)


def place_run(root: Path, name: str, subject: int, session: Any, run: Any) -> Path:
    """Return the path of the ``betas`` or the ``conditions`` of a run."""
    return LAYOUT.place(
        root / VOLUMES, name, subject=f"{subject:02d}", session=f"{session:02d}", run=f"{run:02d}"
    )


def make_stimulus_metadata(design: pd.DataFrame, images: pd.DataFrame, subject: int) -> pd.DataFrame:
    """Return ``sub-XX_StimulusMetadata.csv``: the trials of the response table, without the catch trials."""
    rows = design[design["trial_type"] != "catch"].reset_index(drop=True)
    shown = images.iloc[rows["row"].to_numpy()].reset_index(drop=True)
    return pd.DataFrame(
        {
            "trial_type": np.where(rows["trial_type"] == "test", "test", "train"),
            "session": rows["session"],
            "run": rows["run"],
            "subject_id": f"{subject:02d}",
            "trial_id": np.arange(len(rows)),
            "stimulus": shown["stimulus_id"] + ".jpg",
            "concept": shown["concept"],
        }
    )


def make_voxel_metadata(
    subject: int, voxel_ijk: np.ndarray, rois: pd.DataFrame, **values: np.ndarray
) -> pd.DataFrame:
    """Return ``sub-XX_VoxelMetadata.csv``.

    Parameters
    ----------
    voxel_ijk : int array of shape (n_voxels, 3)
        Voxel indices, in the order of the response table.
    rois : DataFrame of n_voxels rows
        One 0/1 column per region, for example `V1`, ..., `hV4`, ``LO1 (prf)``, `lFFA`, `rPPA`, ``glasser-V1``.
    **values
        Further columns of `VOXEL_COLUMNS`, for example ``nc_singletrial`` (percent), with ``-`` written as
        ``_``. Columns that are not given are 0.
    """
    check_block(voxel_ijk, (len(rois), 3), what="voxel indices")
    table = pd.DataFrame({"voxel_id": np.arange(len(rois)), "subject_id": f"{subject:02d}"})
    for axis, name in enumerate(VOXEL_COLUMNS[2:5]):
        table[name] = voxel_ijk[:, axis]
    for name in VOXEL_COLUMNS[5:]:
        table[name] = values.get(name.replace("-", "_"), 0.0)
    return pd.concat([table, rois.reset_index(drop=True).astype(int)], axis=1)


def write_response_table(
    root: Path,
    subject: int,
    blocks: Iterable[np.ndarray],
    *,
    n_voxels: int,
    stimuli: pd.DataFrame,
    voxels: pd.DataFrame,
) -> Path:
    """Write ``betas_csv/sub-XX_{ResponseData.h5,StimulusMetadata.csv,VoxelMetadata.csv}``.

    Parameters
    ----------
    blocks : iterable of arrays of shape (n, n_trials)
        Betas of n voxels in all trials, one voxel after the other.
    stimuli, voxels : DataFrame
        From `make_stimulus_metadata` (one row per trial) and `make_voxel_metadata` (one row per voxel).
    """
    import h5py

    check_columns(voxels.columns, ("voxel_id",), what="the voxel table")
    check_count(len(voxels), n_voxels, what="The voxel table", unit="rows")
    path, stimuli_path, voxels_path = (
        LAYOUT.place(root / TABLES, name, subject=f"{subject:02d}")
        for name in ("responses", "stimuli", "voxels")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        values = _lay_out_frame(file, voxels["voxel_id"].to_numpy(np.int64), len(stimuli))
        start = 0
        for block in blocks:
            array = check_block(block, (None, len(stimuli)), what=f"the betas of {path.name}")
            if start + len(array) <= n_voxels:
                values[start : start + len(array)] = array
            start += len(array)
        check_count(start, n_voxels, what=path.name, unit="voxels")
    write_csv(stimuli_path, stimuli)
    write_csv(voxels_path, voxels)
    return path


def _lay_out_frame(file: Any, voxel_ids: np.ndarray, n_trials: int) -> Any:
    """Write a pandas "fixed" frame except for the values of its float block, and return that block, still empty."""
    group = file.create_group("ResponseData")
    _describe(file, CLASS="GROUP", PYTABLES_FORMAT_VERSION="2.1", TITLE="", VERSION="1.0")
    _describe(group, CLASS="GROUP", TITLE="", VERSION="1.0", pandas_type="frame", encoding="UTF-8")
    _describe(group, errors="strict", axis0_variety="regular", axis1_variety="regular")
    _describe(group, block0_items_variety="regular", block1_items_variety="regular", pandas_version="0.15.2")
    group.attrs["ndim"], group.attrs["nblocks"] = np.int64(2), np.int64(2)
    trials = list(range(n_trials))
    _write_labels(group, "axis0", ["voxel_id", *trials])
    _write_labels(group, "block0_items", trials)
    _write_array(group, "axis1", np.arange(len(voxel_ids)), kind="integer", name="N.")
    names = _write_array(group, "block1_items", np.array([b"voxel_id"]), kind="string", name="N.")
    _describe(names, nan_rep="nan")
    _write_array(group, "block1_values", voxel_ids[:, None])
    # One row of chunks per block of voxels, so that each chunk is written only once.
    values = group.create_dataset("block0_values", (len(voxel_ids), n_trials), "<f4")
    _describe(values, CLASS="ARRAY", FLAVOR="numpy", TITLE="", VERSION="2.4")
    values.attrs["transposed"] = np.uint8(1)
    return values


def _write_array(group: Any, key: str, array: np.ndarray, **text: str) -> Any:
    dataset = group.create_dataset(key, data=array)
    _describe(dataset, CLASS="ARRAY", FLAVOR="numpy", TITLE="", VERSION="2.4", **text)
    dataset.attrs["transposed"] = np.uint8(1)
    return dataset


def _write_labels(group: Any, key: str, labels: Sequence[Any]) -> None:
    """Write mixed column names as in PyTables: a pickled object array in a ragged dataset."""
    import h5py

    # np.array would turn the mixed names into text.
    boxed = np.empty(len(labels), dtype=object)
    boxed[:] = labels
    content = b"".join(split_pickle(boxed, container="pickle", protocol=4))
    dataset = group.create_dataset(key, (1,), h5py.vlen_dtype(np.uint8), maxshape=(None,), chunks=(1,))
    dataset[0] = np.frombuffer(content, np.uint8)
    _describe(
        dataset, CLASS="VLARRAY", PSEUDOATOM="object", TITLE="", VERSION="1.4", kind="object", name="N."
    )
    dataset.attrs["transposed"] = np.uint8(1)


def _describe(node: Any, **attributes: str) -> None:
    """Set text attributes of fixed length in UTF-8, which PyTables returns as text."""
    import h5py

    for key, value in attributes.items():
        if value:
            node.attrs.create(key, value, dtype=h5py.string_dtype("utf-8", len(value)))
        else:
            node.attrs[key] = h5py.Empty(h5py.string_dtype("utf-8", 1))


def write_volume_betas(
    root: Path,
    subject: int,
    session: int,
    run: int,
    betas: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    design: pd.DataFrame,
    images: pd.DataFrame,
) -> Path:
    """Write ``betas_vol/sub-XX/ses-thingsNN/*_betas.nii.gz`` and ``*_conditions.tsv`` of one run.

    Parameters
    ----------
    betas : iterable of arrays of shape `shape`
        One per trial of the run, including catch trials.
    """
    rows = design[(design["session"] == session) & (design["run"] == run)]
    path = place_run(root, "betas", subject, session, run)
    write_volumes(path, betas, shape=shape, n_volumes=len(rows), affine=affine, dtype=np.float32, t_r=1.0)
    files = images["file_path"].str.split("/").str[-1].to_numpy()[rows["row"].to_numpy()]
    catch = rows["catch_nr"].map("catch{:03d}.jpg".format).to_numpy()
    names = np.where(rows["trial_type"] == "catch", catch, files)
    write_tsv(place_run(root, "conditions", subject, session, run), pd.DataFrame({"image_filename": names}))
    return path


def write_brainmask(root: Path, subject: int, mask: np.ndarray, affine: np.ndarray) -> Path:
    """Write ``brainmasks/sub-XX_space-T1w_brainmask.nii.gz``."""
    return write_volume(LAYOUT.place(root / MASKS, "mask", subject=f"{subject:02d}"), mask, affine)


FORMAT = Format(
    name="things-fmri",
    description="THINGS-fMRI: response tables (HDF5), volumes of single-trial betas, events",
    modality="fmri",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images_of_concepts,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan,
)
