"""NSD-synthetic (Gifford et al. 2026): one more session of NSD's subjects, with images out of distribution.

Owns the session of 284 synthetic images (noise, gratings, words, manipulated scenes), 744 trials in eight runs, and its
two uses: training on the core sessions and a test on it, or only the session, for prediction by a finished run of NSD.
The last 64 images (coloured noise) are different for each subject.

From published code of its authors and other groups, not from the files: runs have 93 trials, odd ones with a task at
fixation and even ones with a one-back task; the image file holds linear intensities, and their square root was shown on
the screen.

References
----------
Gifford, Cichy, Naselaris, Kay (2026), doi:10.1038/s41467-026-69345-9; code gifale95/NSD-synthetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from braindecode_vis.base.checks import DataError, check_file, is_there
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet, resize_image
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings, compare_facts
from braindecode_vis.datasets.nsd.beta_files import (
    UNIT,
    SurfaceBetas,
    check_trial_count,
    find_mask,
    find_regions,
    make_volume_geometry,
    open_volume_session,
    recognise_volume,
)
from braindecode_vis.datasets.nsd.dataset import NsdConfig
from braindecode_vis.datasets.nsd.experiment_design import ImageBrick
from braindecode_vis.datasets.nsd.further_sessions import (
    describe_standardising,
    join_sessions,
    open_training,
)
from braindecode_vis.datasets.sources.betas_source import (
    BetasPart,
    FmriSource,
    Geometry,
    keep_rows,
    number_betas,
)

if TYPE_CHECKING:
    import pandas as pd

Task = Literal["fixation", "one_back"]
SESSION = "nsdsynthetic"
N_RUNS = 8
_EXPERIMENT = Path("nsddata/experiments/nsdsynthetic")
_DESIGN_FILE = (_EXPERIMENT / "nsdsynthetic_expdesign.mat").as_posix()
LAYOUT = Layout(
    design=File(
        _DESIGN_FILE,
        "mat5",
        what="the design of NSD-synthetic",
        hint=f"fetch {_DESIGN_FILE} from the bucket of NSD (a few kB)",
        arrays={"masterordering": Array(("trial",), "uint16")},
    ),
    # Optional.
    classes=File(
        (_EXPERIMENT / "nsdsyntheticimageinformation.csv").as_posix(),
        "csv",
        what="the table of images of NSD-synthetic",
        hint="fetch it from the bucket of NSD",
        columns=("Image class",),
    ),
)
IMAGES_FOLDER = Path("nsddata_stimuli/stimuli/nsdsynthetic")


class NsdSyntheticConfig(NsdConfig):
    """Subject, test trials of the synthetic session, and whether the core sessions are used for training.

    Parameters
    ----------
    root
        Folder of NSD; the synthetic betas are in ``nsddata_betas/ppdata/subjAA/func1pt8mm/nsdsyntheticbetas_...``.
    betas
        Version of the core betas; the synthetic ones of the same model are read; they were published for
        ``betas_fithrf`` and ``betas_fithrf_GLMdenoise_RR``.
    tasks
        Runs that are kept: the task at ``fixation``, the ``one_back`` task, or both.
    core
        Read the core sessions for training. Without them, only the synthetic session is read, and all its trials are
        test trials, for prediction by a finished run of NSD.
    untrained
        ``pooled`` standardises the synthetic session with the core sessions, ``own`` with its own test trials, as
        the published analyses do.
    synthetic_images
        Folder of ``nsdsynthetic_stimuli.hdf5`` and ``nsdsynthetic_colorstimuli_subj0N.hdf5``;
        ``nsddata_stimuli/stimuli/nsdsynthetic`` below the root by default.
    """

    kind: Literal["nsd_synthetic"] = "nsd_synthetic"  # type: ignore[assignment]
    tasks: tuple[Task, ...] = ("fixation", "one_back")
    core: bool = True
    synthetic_images: Path | None = None

    removed_settings: ClassVar[Mapping[str, Any]] = {"tone": "shown"}

    not_hashed: ClassVar[frozenset[str]] = NsdConfig.not_hashed | {"synthetic_images"}

    @model_validator(mode="after")
    def _check_session(self) -> Self:
        if not self.tasks:
            raise ValueError("tasks is empty; choose fixation, one_back, or both")
        if self.subjects is not None:
            raise ValueError("nsd_synthetic reads one subject at a time; set subject and leave subjects out")
        if self.betas == "betas_assumehrf":
            raise ValueError(
                "no betas_assumehrf of the synthetic session were published; choose another betas"
            )
        if not self.core and self.space == "fsaverage":
            raise ValueError(
                "core: false needs the functional volume; the core sessions determine the kept vertices"
            )
        return self

    def continues(self) -> tuple[str, ...]:
        """Return the kinds of data sets whose finished runs can predict these trials."""
        return ("nsd",)

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root = self.find_root()
        paths = [*self._find_betas(root), self._find_design(root)]
        if is_there(classes := LAYOUT.place(root, "classes")):
            paths.append(classes)
        if self.with_images:
            paths += self._find_images(root)
        own = digest_files({path.name: path for path in paths})
        if self.core:
            return self._make_core().hash_inputs() | own
        regions = find_regions(root, self.subject, self.space)
        kept = [path for name in sorted(regions.files) for path in regions.files[name]]
        return digest_files({"/".join(path.parts[-2:]): path for path in kept}) | own

    def open_betas(self) -> FmriSource:
        """Return the core sessions (training) followed by the synthetic session (test), lazily."""
        root = self.find_root()
        trials = self._read_trials(root)
        if not self.core:
            geometry = self._find_geometry(root)
            tested = self._open_session(root, geometry, trials)
            return self._open_alone(root, geometry, tested)
        core = self._make_core().open_betas()
        geometry, training = open_training(core)
        tested = self._open_session(root, geometry, trials)
        own = self._list_stimuli(tested)
        images = self._open_images(root, own) if self.with_images else None
        table = own[["stimulus_id", "concept", "split", "path"]]
        protocol = self._describe(training, tested)
        return join_sessions(core, training, tested, table, images, protocol=protocol, tasks=self.tasks)

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Recompute the declared facts of the session, and open betas and images."""
        root = self.find_root()
        trials = self._read_trials(root)
        times = trials["stimulus_id"].value_counts().value_counts()
        found = {
            "n_stimuli": int(trials["stimulus_id"].nunique()),
            "n_trials": len(trials),
            "images_by_times_shown": {int(n): int(times[n]) for n in sorted(times.index)},
        }
        yield from compare_facts(found, self.manifest.facts, root)
        source = self.open_betas()
        n_core = len(source.parts) - 1
        yield CheckFinding("betas", True, f"{len(source.parts[-1].trials)} trials, {n_core} core sessions")
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    def _make_core(self) -> NsdConfig:
        return NsdConfig(**{name: getattr(self, name) for name in NsdConfig.model_fields if name != "kind"})

    # --- files ----------------------------------------------------------------------------------------------

    def _find_betas(self, root: Path) -> tuple[Path, ...]:
        folder = Path(f"ppdata/subj{self.subject:02d}") / self.space / f"nsdsynthetic{self.betas}"
        bases = (root / "nsddata_betas", root)
        if self.space == "fsaverage":
            names = tuple(f"{side}.betas_{SESSION}.mgh" for side in ("lh", "rh"))
            for base in bases:
                if all((base / folder / name).is_file() for name in names):
                    return tuple(base / folder / name for name in names)
        else:
            names = tuple(f"betas_{SESSION}.{end}" for end in ("nii.gz", "nii", "hdf5"))
            for path in (base / folder / name for base in bases for name in names):
                if is_there(path):
                    return (path,)
        raise DataError(f"{bases[0] / folder / names[0]} does not exist; fetch it from the bucket of NSD.")

    def _find_design(self, root: Path) -> Path:
        return LAYOUT.find(root, "design")

    def _find_images(self, root: Path) -> list[Path]:
        folder = self.synthetic_images.expanduser() if self.synthetic_images else root / IMAGES_FOLDER
        names = (f"{SESSION}_stimuli.hdf5", f"{SESSION}_colorstimuli_subj{self.subject:02d}.hdf5")
        return [
            check_file(
                folder / name,
                what="an image file of NSD-synthetic",
                hint="fetch it, name its folder with --set dataset.synthetic_images=DIR, or leave the images out with "
                "--set dataset.with_images=false",
            )
            for name in names
        ]

    def _read_trials(self, root: Path) -> pd.DataFrame:
        """Return the trials of the session: run, task, image and, if the table exists, its class."""
        import pandas as pd

        path = self._find_design(root)
        order = read_order(path)
        runs = np.concatenate(
            [np.full(len(part), n + 1) for n, part in enumerate(np.array_split(order, N_RUNS))]
        )
        ids = [f"synthetic{number:03d}" for number in order]
        # Not called `task`, which separates seen from imagined trials: in both tasks the same image is seen.
        trials = pd.DataFrame(
            {
                "subject": f"{self.subject:02d}", "session": SESSION, "run": [f"{run:02d}" for run in runs],
                "stimulus_id": ids, "repetition": 0, "split": "test", "concept": ids, "nsd_id": -1,
                "synthetic_id": order - 1, "viewing_task": np.where(runs % 2 == 1, "fixation", "one_back"),
            }
        )  # fmt: skip
        classes = read_classes(LAYOUT.place(root, "classes"), int(order.max()))
        return trials if classes is None else trials.assign(image_class=classes[order - 1])

    def _list_stimuli(self, tested: BetasPart) -> pd.DataFrame:
        own = tested.trials.drop_duplicates("stimulus_id").sort_values("synthetic_id")
        return own[["stimulus_id", "concept", "split", "nsd_id", "synthetic_id"]].assign(
            path=f"{SESSION}_stimuli.hdf5", sha256=""
        )

    # --- responses ------------------------------------------------------------------------------------------

    def _find_geometry(self, root: Path) -> Geometry:
        """Return the mask of the core sessions, without reading any of them."""
        regions = find_regions(root, self.subject, self.space)
        mask, affine = find_mask(regions, root, self.subject, self.mask, self.mask_file)
        return make_volume_geometry(regions, mask, affine, self.rois, {})

    def _open_session(self, root: Path, geometry: Geometry, trials: pd.DataFrame) -> BetasPart:
        paths, n_trials = self._find_betas(root), len(trials)
        read: Any
        if self.space == "fsaverage":
            read = SurfaceBetas(paths, divide_by=self.find_divisor())
            check_trial_count(paths[0], read.n_volumes, n_trials)
            read.vertices = geometry.voxel_ids
        else:
            if geometry.mask is None or geometry.affine is None:
                raise DataError("the core sessions have no mask.")
            item = recognise_volume(paths[0], 1)
            read = open_volume_session(
                item, geometry.mask, geometry.affine, n_trials, divide_by=self.find_divisor()
            )
        whole = BetasPart(trials, paths, geometry.n_voxels, read)
        return number_betas([keep_rows(whole, trials["viewing_task"].isin(self.tasks).to_numpy())])[0]

    def _open_alone(self, root: Path, geometry: Geometry, tested: BetasPart) -> FmriSource:
        own = self._list_stimuli(tested).reset_index(drop=True)
        read_own = self._open_images(root, own) if self.with_images else None
        notes = {"protocol": self._describe([], tested), "tasks": list(self.tasks), "betas": self.betas}
        read_image = None
        if read_own is not None:
            # NSD's own images have 425 pixels.
            def read_image(row: int) -> np.ndarray:
                size = self.image_size or 425
                return resize_image(read_own(row), size, size)

        stimuli = StimulusSet(own.drop(columns="synthetic_id"))
        return FmriSource((tested,), stimuli, self.make_plan(), UNIT, geometry, None, read_image, notes)

    def _open_images(self, root: Path, own: pd.DataFrame) -> SyntheticImages:
        return SyntheticImages(self._find_images(root), own["synthetic_id"].to_numpy())

    def _describe(self, training: list[BetasPart], tested: BetasPart) -> str:
        import pandas as pd

        tasks = " and ".join(task.replace("_", "-") for task in self.tasks)
        text = f"NSD-synthetic subject {self.subject:02d}: "
        if training:
            n_images = pd.concat([part.trials["stimulus_id"] for part in training]).nunique()
            text += f"trained on {n_images} non-shared images of {len(training)} NSD core sessions, "
        return (
            f"{text}tested out of distribution on {tested.trials['stimulus_id'].nunique()} synthetic images in "
            f"{len(tested.trials)} trials ({tasks}); {self.betas}, synthetic session "
            f"{describe_standardising(self.zscore, self.untrained) if training else 'alone'}"
        )


class SyntheticImages:
    """Reads single images from the two bricks: first those of all subjects, then those of one.

    Parameters
    ----------
    paths
        The two HDF5 files.
    rows
        Number of each image, from 0 over both files.
    """

    def __init__(self, paths: list[Path], rows: np.ndarray) -> None:
        first = ImageBrick(paths[0], np.zeros(1, int))
        n_common = first.n_images
        second = ImageBrick(paths[1], np.zeros(1, int))
        if rows.max() >= n_common + second.n_images:
            raise DataError(
                f"the design shows image {rows.max() + 1}, but {paths[0].name} and {paths[1].name} hold {n_common} and "
                f"{second.n_images}: fetch both again."
            )
        self.bricks, self.rows, self.n_common = (first, second), rows, n_common

    def __call__(self, row: int) -> np.ndarray:
        """Return one image as uint8 of shape (height, width, 3)."""
        number = int(self.rows[row])
        brick = self.bricks[number >= self.n_common]
        image = brick.read(number - self.n_common * (number >= self.n_common))
        if row == len(self.rows) - 1:
            for each in self.bricks:
                each.close()
        # The files hold intensities. gifale95/NSD-synthetic gives a network sqrt(image / 255) * 255, clipped; so do we.
        return (np.sqrt(image / 255) * 255).astype(np.uint8)


def read_order(path: Path) -> np.ndarray:
    """Return the image of each trial, counted from 1, from ``nsdsynthetic_expdesign.mat``.

    Raises
    ------
    DataError
        If the file is damaged, or counts from 0.
    """
    with LAYOUT.open(path, "design") as file:
        order = file.read("masterordering").astype(np.int64)
    if order.min() < 1:
        raise DataError(
            f"masterordering in {path} counts from {order.min()}: the published file counts from 1, fetch it again."
        )
    return order


def read_classes(path: Path, n_images: int) -> np.ndarray | None:
    """Return the class of each image (``Noise``, ``Spiral gratings``...); None if the table was not fetched."""
    if not is_there(path):
        return None
    table = LAYOUT.read_table(path, "classes")
    if len(table) < n_images:
        raise DataError(f"{path} lists {len(table)} images, but the design shows {n_images}; fetch it again.")
    return table["Image class"].to_numpy(str)
