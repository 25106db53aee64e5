"""Size of a phantom: counts that all formats share, and presets of each format from tiny to full.

Owns the numbers and the checks that apply to every format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, check_option
from braindecode_vis.datasets.drawn.images import N_MAX_CONCEPTS

SIZE_NAMES = ("tiny", "small", "demo", "full")


@dataclass(frozen=True)
class PhantomSize:
    """Numbers of subjects, images and repetitions.

    A field that is None has no meaning in the format; it is an error to set such a field.

    Parameters
    ----------
    n_subjects
        Simulated subjects.
    n_train_concepts, n_train_exemplars
        Concepts for training, and images of each. In NSD, images that only one subject sees.
    n_test_concepts
        Test images, one of each test concept. In NSD, images that every subject sees.
    n_sessions
        Sessions of each subject.
    train_repetitions, test_repetitions
        Number of times that a subject sees each image, over all sessions.
    image_size
        Height and width of the pictures in pixels.
    n_runs
        Runs of a session; recordings that are joined in a training file of THINGS-EEG2.
    n_catch
        Catch trials of a session, whose picture is not a stimulus (THINGS-MEG and THINGS-fMRI).
    pause_s
        Mean blank between two sequences of images in s (THINGS-EEG2).
    n_raw_sessions
        Sessions of THINGS-MEG whose raw runs are written too; the epochs cover all sessions.
    voxel_mm
        Side of a voxel; 1.8 is the grid of NSD's own files.
    n_imagery, imagery_repetitions
        Test images that are also imagined, and how often each.
    n_synthetic
        Images of a further session with images out of distribution (NSD-synthetic).
    beta_versions, beta_form
        Single-trial models of NSD's betas, and the form of their files (``nii.gz``, ``hdf5``); by default
        ``betas_fithrf_GLMdenoise_RR`` as ``nii.gz``.
    n_parcels
        Parcels of the atlas beside fMRI, from 14; by default up to 28, see `make_parcels`.
    n_pairs
        Pairs of test images, out of `n_test_concepts`, that show the same parts in another combination (a red cube on a
        blue ground, a blue cube on a red ground); the same share of the training concepts are such pairs.
    n_sites, minutes
        Sites of a corpus, and recorded minutes of each subject, over all sessions and runs.
    """

    n_subjects: int
    n_train_concepts: int
    n_train_exemplars: int
    n_test_concepts: int
    n_sessions: int
    train_repetitions: int
    test_repetitions: int
    image_size: int
    n_runs: int | None = None
    n_catch: int | None = None
    pause_s: float | None = None
    n_raw_sessions: int | None = None
    voxel_mm: float | None = None
    n_imagery: int | None = None
    imagery_repetitions: int | None = None
    n_synthetic: int | None = None
    beta_versions: tuple[str, ...] | None = None
    beta_form: str | None = None
    n_parcels: int | None = None
    n_sites: int | None = None
    minutes: float | None = None
    n_pairs: int | None = None

    def replace(self, **changes: Any) -> PhantomSize:
        """Return a copy with other numbers.

        Raises
        ------
        ConfigError
            If there is no such field.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            check_option("field of a phantom size", name, known)
        return dataclasses.replace(self, **changes)

    @property
    def n_train_images(self) -> int:
        """Training images of one subject."""
        return self.n_train_concepts * self.n_train_exemplars

    @property
    def runs(self) -> int:
        """Runs of a session; one if the format does not count them."""
        return self.n_runs or 1

    @property
    def n_trials(self) -> int:
        """Trials of one subject with an image of the two splits."""
        return self.n_train_images * self.train_repetitions + self.n_test_concepts * self.test_repetitions


OPTIONAL = tuple(field.name for field in dataclasses.fields(PhantomSize) if field.default is None)
# Checked by the format; None means its default.
WORDS = ("beta_versions", "beta_form")
# Fields that were added later; a request without them is the same as before.
LATER = ("n_synthetic", *WORDS, "n_parcels", "n_sites", "minutes", "n_pairs")
# None means that the format does not have the number; zero is a value of it.
_MAY_BE_ZERO = ("n_catch", "n_raw_sessions", "n_imagery", "imagery_repetitions", "n_synthetic")

# An atlas has a parcel of each network in each hemisphere.
_LEAST = {"pause_s": 0.3, "image_size": 16, "n_parcels": 14}


def count_images(size: PhantomSize) -> int:
    """Return the number of images of both splits, for formats in which all subjects see the same ones."""
    return size.n_train_images + size.n_test_concepts


def count_images_of_concepts(size: PhantomSize) -> int:
    """Return the number of images if test concepts have training images too, as in THINGS-EEG1, -MEG and -fMRI."""
    return (size.n_train_concepts + size.n_test_concepts) * size.n_train_exemplars + size.n_test_concepts


def estimate_image_bytes(image_size: int) -> float:
    """Return the bytes of one image in a file, as measured on computer-drawn images."""
    # JPEG of quality 95 grows with edges (size) and texture (area).
    return 300 + 43 * image_size + 0.12 * image_size**2


def check_numbers(
    size: PhantomSize, name: str, used: Sequence[str], limits: Mapping[str, tuple[float, float]]
) -> None:
    """Raise `ConfigError` if a number is missing, out of range, or has no meaning in this format.

    Parameters
    ----------
    name
        The format, for the message.
    used
        Optional fields that the format uses.
    limits
        The smallest and the largest value of single fields.
    """
    # Every format with voxels has an atlas.
    known = (*used, "n_parcels") if "voxel_mm" in used else tuple(used)
    for key, value in dataclasses.asdict(size).items():
        if key in OPTIONAL and key not in known:
            if value is not None:
                raise ConfigError(f"{key} is {value}, but a phantom in the format {name} has no such number.")
            continue
        # Fields that were added later may be missing, in some formats also imagery.
        if key in WORDS or (key in (*LATER, "n_imagery", "imagery_repetitions") and value is None):
            continue
        # True is an int in Python, and is refused below.
        whole = isinstance(value, int) or (
            key in ("pause_s", "voxel_mm", "minutes") and isinstance(value, float)
        )
        # Images below 16 pixels show no object; without a pause, sequences would overlap.
        least = 0 if key in _MAY_BE_ZERO else _LEAST.get(key, 1)
        if not whole or isinstance(value, bool) or value < least:
            raise ConfigError(
                f"{key} of a phantom in the format {name} must be at least {least}, not {value}."
            )
    for key, (low, high) in limits.items():
        if not low <= (value := getattr(size, key)) <= high:
            span = f"from {low:g} to {high:g}" if high < np.inf else f"at least {low:g}"
            span = f"{low:g}" if low == high else span
            raise ConfigError(f"{key} of a phantom in the format {name} must be {span}, not {value}.")
    # Concepts are shapes x colours x textures, so their number is limited.
    n_concepts = size.n_train_concepts + size.n_test_concepts
    if n_concepts > N_MAX_CONCEPTS:
        raise ConfigError(
            f"{size.n_train_concepts} training and {size.n_test_concepts} test concepts are {n_concepts} together, "
            f"but there are {N_MAX_CONCEPTS} phantom concepts."
        )
    if size.n_pairs and 2 * size.n_pairs > size.n_test_concepts:
        raise ConfigError(
            f"n_pairs is {size.n_pairs}, but {size.n_test_concepts} test images have room for "
            f"{size.n_test_concepts // 2} pairs; choose fewer pairs or more test concepts."
        )
    # With one image, chance would be 1.
    if size.n_test_concepts < 2:
        raise ConfigError(
            "a phantom needs at least 2 test concepts: retrieval from one image has no meaning."
        )
    if size.n_train_images < 4:
        raise ConfigError(
            f"a phantom needs at least 4 training images, not {size.n_train_concepts} concepts x "
            f"{size.n_train_exemplars}."
        )


def check_one_exemplar_a_session(size: PhantomSize, name: str) -> None:
    """Raise `ConfigError` unless session k shows exemplar k of each concept once, and every test image once."""
    if size.train_repetitions != 1 or not (
        size.n_train_exemplars == size.test_repetitions == size.n_sessions
    ):
        raise ConfigError(
            f"each session of {name} shows one new image of each concept and every test image once, so n_sessions "
            f"({size.n_sessions}), n_train_exemplars ({size.n_train_exemplars}) and test_repetitions "
            f"({size.test_repetitions}) must be equal and train_repetitions ({size.train_repetitions}) 1."
        )


def check_imagery(size: PhantomSize, name: str) -> None:
    """Raise `ConfigError` unless the imagined images are among the test images."""
    n_imagery, times = size.n_imagery or 0, size.imagery_repetitions or 0
    if n_imagery > size.n_test_concepts or (n_imagery == 0) != (times == 0):
        raise ConfigError(
            f"a phantom in the format {name} can have 0 to {size.n_test_concepts} imagined images (its test images), "
            f"each imagined at least once, not {n_imagery} imagined {times} times."
        )


def divide(total: int, parts: int, *, what: str) -> int:
    """Return ``total / parts``, or raise `ConfigError` if that is not a whole number above zero."""
    if total % parts or total < parts:
        raise ConfigError(f"{what}: {total} do not divide into {parts} equal parts.")
    return total // parts


_REPACKED = {
    "tiny": PhantomSize(1, 6, 3, 6, 2, 3, 3, 32, n_runs=2, voxel_mm=8),
    "small": PhantomSize(2, 30, 5, 30, 4, 3, 3, 64, n_runs=4, voxel_mm=6),
    "demo": PhantomSize(2, 150, 4, 60, 6, 3, 3, 112, n_runs=6, voxel_mm=4),
    "full": PhantomSize(8, 1800, 5, 1000, 40, 3, 3, 425, n_runs=12, voxel_mm=2),
}

# The same pictures as `nod` has with these numbers.
_NOD_MEEG = {
    "tiny": PhantomSize(1, 6, 3, 3, 1, 1, 1, 32, n_runs=1),
    "small": PhantomSize(1, 40, 4, 12, 2, 1, 2, 64, n_runs=2),
    "demo": PhantomSize(2, 100, 6, 40, 2, 1, 2, 112, n_runs=4),
    "full": PhantomSize(9, 1000, 4, 120, 4, 1, 4, 375, n_runs=8),
}

_EEG2 = {
    "tiny": PhantomSize(1, 6, 2, 3, 2, 2, 4, 32, n_runs=1, pause_s=0.6),
    "small": PhantomSize(1, 40, 4, 12, 2, 2, 16, 64, n_runs=2, pause_s=0.8),
    "demo": PhantomSize(1, 160, 5, 40, 2, 2, 40, 112, n_runs=1, pause_s=0.5),
    "full": PhantomSize(10, 1654, 10, 200, 4, 4, 80, 500, n_runs=5, pause_s=2.175),
}

_MOSAIC = {
    "tiny": PhantomSize(3, 10, 3, 3, 1, 1, 2, 32, voxel_mm=8),
    "small": PhantomSize(6, 60, 3, 20, 1, 1, 3, 64, voxel_mm=6),
    "demo": PhantomSize(12, 150, 4, 40, 1, 2, 4, 112, voxel_mm=4),
    "full": PhantomSize(12, 1800, 15, 1000, 1, 3, 3, 425, voxel_mm=2),
}

SIZES: dict[str, dict[str, PhantomSize]] = {
    "things-eeg2": _EEG2,
    # Loaders keep arrays on disk from a megabyte on, so the tiny one is a little longer.
    "things-eeg2-official": {**_EEG2, "tiny": PhantomSize(1, 20, 2, 5, 2, 2, 16, 32, n_runs=1, pause_s=0.5)},
    "things-eeg2-250hz": _EEG2,
    "things-eeg2-ubp": _EEG2,
    "things-eeg2-neurobridge": _EEG2,
    "things-meg": {
        "tiny": PhantomSize(1, 2, 12, 2, 12, 1, 12, 32, n_runs=1, n_catch=1, n_raw_sessions=1),
        "small": PhantomSize(1, 20, 12, 10, 12, 1, 12, 64, n_runs=2, n_catch=4, n_raw_sessions=2),
        "demo": PhantomSize(1, 80, 12, 30, 12, 1, 12, 112, n_runs=2, n_catch=10, n_raw_sessions=1),
        "full": PhantomSize(4, 1654, 12, 200, 12, 1, 12, 500, n_runs=10, n_catch=200, n_raw_sessions=12),
    },
    "nsd": {
        "tiny": _REPACKED["tiny"].replace(n_imagery=6, imagery_repetitions=16, n_synthetic=16),
        "small": _REPACKED["small"].replace(n_imagery=6, imagery_repetitions=16, n_synthetic=32),
        "demo": _REPACKED["demo"].replace(n_imagery=18, imagery_repetitions=16, n_synthetic=64),
        "full": _REPACKED["full"].replace(
            voxel_mm=1.8, n_imagery=18, imagery_repetitions=16, n_synthetic=284
        ),
    },
    "things-fmri": {
        "tiny": PhantomSize(1, 4, 4, 2, 4, 1, 4, 32, n_runs=1, n_catch=1, voxel_mm=8),
        "small": PhantomSize(1, 30, 6, 10, 6, 1, 6, 64, n_runs=2, n_catch=4, voxel_mm=6),
        "demo": PhantomSize(1, 80, 12, 40, 12, 1, 12, 112, n_runs=2, n_catch=10, voxel_mm=4),
        "full": PhantomSize(3, 620, 12, 100, 12, 1, 12, 500, n_runs=10, n_catch=100, voxel_mm=2),
    },
    "god": {
        "tiny": PhantomSize(
            1, 6, 2, 4, 1, 1, 4, 32, n_runs=2, voxel_mm=8, n_imagery=4, imagery_repetitions=2
        ),
        "small": PhantomSize(
            1, 40, 4, 20, 1, 1, 12, 64, n_runs=4, voxel_mm=6, n_imagery=20, imagery_repetitions=5
        ),
        "demo": PhantomSize(
            2, 150, 8, 50, 1, 1, 35, 112, n_runs=10, voxel_mm=4, n_imagery=50, imagery_repetitions=10
        ),
        "full": PhantomSize(
            5, 150, 8, 50, 1, 1, 35, 500, n_runs=24, voxel_mm=3, n_imagery=50, imagery_repetitions=10
        ),
    },
    "bids-eeg": {
        "tiny": PhantomSize(1, 6, 2, 3, 1, 1, 4, 32, n_runs=1),
        "small": PhantomSize(1, 30, 4, 10, 2, 2, 8, 64, n_runs=2),
        "demo": PhantomSize(1, 100, 5, 30, 2, 2, 20, 112, n_runs=2),
        "full": PhantomSize(10, 1000, 8, 100, 4, 4, 40, 500, n_runs=8),
    },
    "bids-fmri": {
        "tiny": PhantomSize(1, 6, 2, 3, 1, 1, 4, 32, n_runs=1, voxel_mm=8),
        "small": PhantomSize(1, 30, 4, 10, 2, 1, 6, 64, n_runs=2, voxel_mm=6),
        "demo": PhantomSize(1, 100, 4, 30, 4, 1, 12, 112, n_runs=3, voxel_mm=5),
        "full": PhantomSize(5, 500, 8, 50, 10, 1, 30, 500, n_runs=10, voxel_mm=2),
    },
    "things-eeg1": {
        "tiny": PhantomSize(1, 8, 3, 3, 1, 1, 4, 32),
        "small": PhantomSize(2, 60, 6, 20, 1, 1, 12, 64),
        "demo": PhantomSize(2, 200, 12, 40, 1, 1, 12, 112),
        "full": PhantomSize(50, 1654, 12, 200, 1, 1, 12, 400),
    },
    "alljoined1": {
        "tiny": PhantomSize(1, 8, 2, 4, 2, 4, 4, 32),
        "small": PhantomSize(1, 40, 5, 20, 2, 4, 4, 64),
        "demo": PhantomSize(2, 92, 5, 40, 2, 8, 8, 112),
        "full": PhantomSize(8, 170, 5, 110, 2, 4, 4, 425),
    },
    "alljoined16m": {
        "tiny": PhantomSize(1, 8, 2, 3, 1, 1, 4, 32),
        "small": PhantomSize(1, 40, 4, 12, 2, 2, 16, 64),
        "demo": PhantomSize(2, 160, 5, 40, 2, 2, 40, 112),
        "full": PhantomSize(20, 1654, 10, 200, 4, 4, 80, 500),
    },
    "eeg-imagenet": {
        "tiny": PhantomSize(1, 2, 30, 4, 1, 1, 1, 32),
        "small": PhantomSize(1, 8, 30, 32, 1, 1, 1, 64),
        "demo": PhantomSize(2, 20, 30, 200, 1, 1, 1, 112),
        "full": PhantomSize(16, 80, 30, 1600, 1, 1, 1, 400),
    },
    "deeprecon": {
        "tiny": PhantomSize(
            1, 6, 2, 4, 1, 2, 4, 32, n_runs=2, voxel_mm=8, n_imagery=4, imagery_repetitions=2
        ),
        "small": PhantomSize(
            1, 40, 4, 20, 1, 2, 12, 64, n_runs=4, voxel_mm=6, n_imagery=10, imagery_repetitions=5
        ),
        "demo": PhantomSize(
            2, 150, 8, 50, 1, 3, 24, 112, n_runs=10, voxel_mm=4, n_imagery=10, imagery_repetitions=10
        ),
        "full": PhantomSize(
            3, 150, 8, 50, 1, 5, 24, 500, n_runs=24, voxel_mm=2, n_imagery=10, imagery_repetitions=20
        ),
    },
    "nsd-timeseries": {**_REPACKED, "tiny": PhantomSize(1, 6, 1, 3, 1, 3, 3, 32, n_runs=2, voxel_mm=8)},
    "nsd-mindeye1": _REPACKED,
    "nsd-mindeye2": _REPACKED,
    "nsd-brain-diffuser": _REPACKED,
    "nod": {
        "tiny": PhantomSize(1, 6, 3, 3, 1, 1, 4, 32, n_runs=1, voxel_mm=8),
        "small": PhantomSize(1, 40, 4, 12, 2, 1, 6, 64, n_runs=2, voxel_mm=6),
        "demo": PhantomSize(2, 100, 6, 40, 2, 1, 10, 112, n_runs=4, voxel_mm=5),
        "full": PhantomSize(9, 1000, 4, 120, 4, 1, 10, 375, n_runs=10, voxel_mm=2),
    },
    "nod-eeg": _NOD_MEEG,
    "nod-meg": _NOD_MEEG,
    "cneuromod-things": {
        "tiny": PhantomSize(1, 6, 2, 3, 2, 3, 3, 32, n_runs=2, voxel_mm=8),
        "small": PhantomSize(1, 40, 4, 12, 4, 3, 3, 64, n_runs=3, voxel_mm=6),
        "demo": PhantomSize(2, 150, 5, 40, 8, 3, 3, 112, n_runs=6, voxel_mm=4),
        "full": PhantomSize(4, 648, 6, 432, 36, 3, 3, 500, n_runs=6, voxel_mm=2),
    },
    "vim-1": {
        "tiny": PhantomSize(1, 20, 2, 6, 1, 2, 4, 64, voxel_mm=8),
        "small": PhantomSize(2, 60, 4, 30, 1, 2, 13, 125, voxel_mm=6),
        "demo": PhantomSize(2, 175, 4, 60, 1, 2, 13, 250, voxel_mm=4),
        "full": PhantomSize(2, 350, 5, 120, 1, 2, 13, 500, voxel_mm=2),
    },
    "v4-photographs": {
        "tiny": PhantomSize(1, 20, 2, 10, 1, 3, 5, 32, voxel_mm=5),
        "small": PhantomSize(1, 60, 4, 30, 1, 4, 8, 64, voxel_mm=4),
        "demo": PhantomSize(1, 200, 4, 40, 1, 6, 12, 112, voxel_mm=3),
        "full": PhantomSize(3, 290, 4, 40, 1, 8, 12, 112, voxel_mm=3),
    },
    "laion-fmri": {
        "tiny": PhantomSize(1, 9, 2, 4, 2, 3, 4, 32, n_runs=2, voxel_mm=8),
        "small": PhantomSize(1, 40, 4, 12, 4, 4, 4, 64, n_runs=2, voxel_mm=6),
        "demo": PhantomSize(2, 150, 5, 60, 6, 4, 6, 112, n_runs=6, voxel_mm=4),
        "full": PhantomSize(5, 580, 10, 224, 30, 4, 12, 500, n_runs=12, voxel_mm=1.8),
    },
    "mosaic": _MOSAIC,
    "mosaic-merged": _MOSAIC,
    "bold5000": {
        "tiny": PhantomSize(1, 6, 2, 3, 2, 1, 4, 32, n_runs=1, voxel_mm=8),
        "small": PhantomSize(1, 40, 4, 12, 4, 1, 4, 64, n_runs=2, voxel_mm=6),
        "demo": PhantomSize(2, 120, 5, 40, 4, 1, 4, 112, n_runs=5, voxel_mm=5),
        "full": PhantomSize(4, 966, 5, 113, 15, 1, 4, 375, n_runs=10, voxel_mm=2),
    },
    "corpus": {
        "tiny": PhantomSize(6, 6, 2, 3, 1, 1, 1, 32, n_runs=2, voxel_mm=8, n_sites=3, minutes=4),
        "small": PhantomSize(24, 40, 4, 12, 1, 1, 1, 64, n_runs=2, voxel_mm=6, n_sites=3, minutes=10),
        "demo": PhantomSize(60, 120, 5, 40, 1, 1, 1, 112, n_runs=2, voxel_mm=5, n_sites=3, minutes=20),
        "full": PhantomSize(1000, 966, 5, 113, 2, 1, 1, 375, n_runs=4, voxel_mm=4, n_sites=12, minutes=60),
    },
    "corpus-eeg": {
        "tiny": PhantomSize(5, 6, 2, 3, 1, 1, 1, 32, n_runs=2, n_sites=3, minutes=1),
        "small": PhantomSize(12, 30, 4, 10, 1, 1, 1, 64, n_runs=2, n_sites=3, minutes=2),
        "demo": PhantomSize(30, 100, 5, 30, 1, 1, 1, 112, n_runs=2, n_sites=3, minutes=8),
        "full": PhantomSize(1000, 1000, 8, 100, 2, 1, 1, 500, n_runs=4, n_sites=12, minutes=60),
    },
    "bold5000-betas": {
        "tiny": PhantomSize(1, 6, 3, 4, 2, 1, 4, 32, voxel_mm=8),
        "small": PhantomSize(1, 40, 5, 12, 4, 1, 4, 64, voxel_mm=6),
        "demo": PhantomSize(2, 150, 6, 40, 5, 1, 4, 112, voxel_mm=4),
        "full": PhantomSize(4, 966, 5, 113, 15, 1, 4, 375, voxel_mm=2),
    },
}
"""Presets of every format. ``full`` has the counts of the public data set, where there is one."""
