"""How large the data of a run are: from the data where they are here, otherwise from what their manifest declares.

Reads trial tables and headers, and no samples. `plan` estimates from these sizes what a run takes.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError
from braindecode_vis.config import RunConfig
from braindecode_vis.datasets.manifests import find_manifest
from braindecode_vis.pipeline.runs import SilentListener
from braindecode_vis.preprocessing.noise_ceiling import MAX_IMAGES, count_ceiling_trials

#: Regions of an atlas that is not here, as many as the configurations name (Schaefer's 400).
ASSUMED_REGIONS = 400


@dataclass(frozen=True)
class RunSizes:
    """How large the data of a run are.

    Parameters
    ----------
    origin
        Where that is known from, in words.
    n_stored
        Trials that preprocessing writes.
    shape
        Of one trial: (n_channels, n_times) or (n_voxels,).
    itemsize
        Bytes of a stored number.
    n_images, image_px
        Pictures, and the side of one in pixels.
    n_folds, n_train, n_train_images, n_test
        Folds; trials as the encoder takes them and their pictures, of one fold; test rows of all folds.
    subjects
        Whose trials they are.
    input_bytes
        Of the files that are read; None if nobody knows.
    n_repeated
        Trials that give the noise ceilings of EEG and MEG, which preprocessing computes.
    n_train_trials, n_test_trials
        Single trials behind `n_train` and `n_test`.
    tests_known_concepts
        Whether the concepts of the test pictures are trained on, so that there are mean images of classes.
    """

    origin: str
    n_stored: int
    shape: tuple[int, ...]
    itemsize: int
    n_images: int
    image_px: int
    n_folds: int
    n_train: int
    n_train_images: int
    n_test: int
    subjects: tuple[str, ...]
    input_bytes: int | None = None
    n_repeated: int = 0
    n_train_trials: int = 0
    n_test_trials: int = 0
    tests_known_concepts: bool = False

    @property
    def is_there(self) -> bool:
        """Whether the data were opened."""
        return not self.origin.startswith("published")


def find_sizes(config: RunConfig, *, every_subject: bool = False) -> tuple[RunSizes, Any]:
    """Return how large a run is, and its opened source where the data are there.

    Parameters
    ----------
    config
        Its configuration.
    every_subject
        Whether a run of published sizes has all subjects, where its settings name none. Otherwise it has one, unless
        it leaves out one subject at a time. Data that are here are read as the run reads them.

    Raises
    ------
    ConfigError
        If the data are not there, and their manifest does not say their sizes.
    """
    from braindecode_vis.datasets.nsd.beta_files import MissingSessionsError

    try:
        return _open_sizes(config)
    except BraindecodeVisError as error:
        published = _read_published(config, every_subject)
        if isinstance(error, MissingSessionsError) and error.there:
            with suppress(BraindecodeVisError):
                return _open_others(config, error.there, error.n_asked, published)
        if published is None:
            raise ConfigError(
                f"the data set {config.dataset.kind} cannot be opened ({str(error).rstrip('.')}), and its manifest "
                "does not give number and shape of its trials; give --root with the data, or a phantom of its format."
            ) from error
        return published, None


def _open_sizes(config: RunConfig) -> tuple[RunSizes, Any]:
    kind = roles.find_source(config.dataset)
    with tempfile.TemporaryDirectory() as made:
        if kind == "write":
            from braindecode_vis.pipeline.preparing import read_dataset, write_dataset

            write_dataset(config.dataset, Path(made), seed=config.seed, listener=SilentListener())
            responses, stimuli = read_dataset(Path(made))
            shape, itemsize = responses.data.shape[1:], responses.data.dtype.itemsize
            trials, source, read = responses.trials, None, measure_folder(Path(made))
        else:
            source = open_source(config.dataset, kind, Path(made))
            several, shape = list_trials(source)
            shape = (_count_parcels(config.dataset) or shape[0], *shape[1:])
            trials, itemsize = pd.concat(several, ignore_index=True), np.dtype(source.plan.dtype).itemsize
            stimuli = source.stimuli
            files = {path for part in source.parts for path in part.files}
            read = sum(path.stat().st_size for path in files if path.is_file())
        copied = getattr(source, "read_image", None)  # pictures that become part of the run
        px = _find_picture_size(stimuli) if copied is None else max(copied(0).shape[:2])
        concepts = stimuli.concepts_of(trials["stimulus_id"].to_numpy(dtype=object))
        split = config.split.make(trials, concepts, seed=config.seed, knows_images=stimuli.knows_images)
        n_images = len(stimuli)
    ids = trials[["subject", "stimulus_id"]].astype(str).agg("/".join, axis=1).to_numpy()

    def count(rows: np.ndarray, repeats: str) -> int:
        # Categories are decoded trial by trial.
        return len(set(ids[rows])) if repeats == "averaged" and not config.decodes_categories else len(rows)

    first = split.folds[0].train
    known = all(set(concepts[fold.test]) <= set(concepts[fold.train]) for fold in split.folds)
    return RunSizes(
        "the data on disk", len(trials), tuple(shape), itemsize, n_images, px, len(split.folds),
        count(first, config.repeats.train), len(set(trials["stimulus_id"].iloc[first])),
        sum(count(fold.test, config.repeats.test) for fold in split.folds),
        tuple(dict.fromkeys(trials["subject"].astype(str))), read,
        count_ceiling_trials(trials) if getattr(source, "modality", "") in ("eeg", "meg") else 0,
        len(first), sum(len(fold.test) for fold in split.folds), known,
    ), source  # fmt: skip


def _open_others(
    config: RunConfig, there: tuple[int, ...], n_asked: int, published: RunSizes | None
) -> tuple[RunSizes, Any]:
    """Return the sizes of a run whose other sessions will be fetched, from those that are there."""
    data: Any = config.dataset.model_copy(update={"sessions": there})
    sizes, source = _open_sizes(config.model_copy(update={"dataset": data}))
    numbers: dict[str, Any] = {}
    for name in (
        "n_stored",
        "n_images",
        "n_train",
        "n_train_images",
        "n_test",
        "n_train_trials",
        "n_test_trials",
    ):
        numbers[name] = round(getattr(sizes, name) * n_asked / len(there))
        if published is not None:  # sessions repeat the pictures of others
            numbers[name] = max(getattr(sizes, name), min(numbers[name], getattr(published, name)))
    read = None if sizes.input_bytes is None else round(sizes.input_bytes * n_asked / len(there))
    origin = f"the {len(there)} sessions on disk, of {n_asked}; fetch the others before the run"
    return replace(sizes, origin=origin, input_bytes=read, **numbers), source


def open_source(dataset: Any, kind: str, made: Path) -> Any:
    """Return a recording in parts; those of time series are the responses that preprocessing will compute."""
    if kind == "open_epochs":
        return dataset.open_epochs(made / "scratch")
    if kind == "open_betas":
        return dataset.open_betas()
    from braindecode_vis.preprocessing.bold import make_betas

    return make_betas(dataset.open_bold())


def list_trials(source: Any) -> tuple[list[pd.DataFrame], tuple[int, ...]]:
    """Return the trials of each part, of continuous recordings those that their events give, and the shape of one."""
    if source.modality in ("eeg", "meg"):
        from braindecode_vis.preprocessing.meeg import plan_part

        planned = [plan_part(part, source.plan) for part in source.parts]
        return [part.trials for part in planned], (len(source.ch_names), len(planned[0].times))
    shape: tuple[int, ...] = (max(part.n_voxels for part in source.parts),)
    shape = shape if source.times is None else (*shape, len(source.times))
    return [part.trials for part in source.parts], shape


def _count_parcels(dataset: Any) -> int | None:
    """Return the regions of the atlas that voxels are averaged over; None without one, or where it is not here."""
    atlas = getattr(dataset, "atlas", None)
    if atlas is None:
        return None
    from braindecode_vis.preprocessing.parcellation import read_atlas

    with suppress(BraindecodeVisError, OSError):
        return len(read_atlas(atlas).names)
    named = re.match(r"schaefer(\d+)", atlas.fetch or "")
    return None if named is None else int(named[1])


def _find_picture_size(stimuli: Any) -> int:
    pictured = stimuli.select_pictured()
    if not len(pictured) or not pictured.has_pixels:
        return 256
    with suppress(BraindecodeVisError, OSError):
        return int(max(pictured.read_image(str(pictured.ids[0])).shape[:2]))
    return 256


def _read_published(config: RunConfig, every_subject: bool) -> RunSizes | None:
    """Return the sizes that the manifest declares, as these settings cut and choose them."""
    data: Any = config.dataset
    manifest = find_manifest(data.kind)
    size = manifest.size
    if size is None or getattr(data, "mask", size.mask) != size.mask:
        return None
    asked = getattr(data, "subjects", None)
    # Parcels are the same in all subjects, so that a run which names none reads all of them.
    together = every_subject or config.split.kind == "leave_one_subject_out" or getattr(data, "atlas", None)
    known = manifest.subjects if together and not hasattr(data, "subject") else 1
    subjects = tuple(f"{number:02d}" for number in range(1, known + 1))
    if isinstance(asked, list | tuple) and asked:
        subjects = tuple(map(str, asked))
    n, assumed = len(subjects), ""
    if size.n_channels is not None:
        channels = str(getattr(data, "channels", ""))
        named = re.search(r"(\d+)$", channels)
        n_channels = int(named[1]) if named else size.n_channels
        start, stop = data.window
        shape: tuple[int, ...] = (n_channels, round((stop - start) * (data.sfreq or size.sfreq)))
    else:
        n_features = _count_parcels(data)
        if n_features is None and getattr(data, "atlas", None) is not None:
            # A network of parcels on all voxels would be no run at all.
            n_features, assumed = ASSUMED_REGIONS, f"; {ASSUMED_REGIONS} regions, as the atlas is not here"
        shape = ((size.n_voxels or 0) if n_features is None else n_features,)
    train_trials, test_trials = (
        size.n_train_images * size.train_repetitions, size.n_test_images * size.test_repetitions
    )  # fmt: skip
    averages = not config.decodes_categories
    train = size.n_train_images if averages and config.repeats.train == "averaged" else train_trials
    test = size.n_test_images if averages and config.repeats.test == "averaged" else test_trials
    n_folds = (
        n if config.split.kind == "leave_one_subject_out" else getattr(config.split, "n_folds", None) or 1
    )
    n_taught = max(1, n - 1) if config.split.kind == "leave_one_subject_out" else n
    stored = n * (train_trials + test_trials)
    shared = size.images_are_shared
    return RunSizes(
        f"published facts of {manifest.title} (the data are not here{assumed})", stored, shape,
        np.dtype(getattr(data, "dtype", None) or "float32").itemsize,
        (size.n_train_images * (1 if shared else n)) + size.n_test_images,
        getattr(data, "image_size", None) or size.image_px, n_folds,
        n_taught * train, size.n_train_images * (1 if shared else n), n * test,
        subjects, None if size.gigabytes is None else round(size.gigabytes * 1e9 * n),
        0 if size.n_channels is None else n * sum(
            min(images, MAX_IMAGES) * shown
            for images, shown in (
                (size.n_train_images, size.train_repetitions), (size.n_test_images, size.test_repetitions)
            ) if shown > 1
        ), n_taught * train_trials, n * test_trials,
    )  # fmt: skip


def measure_folder(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
