"""NSD-Imagery (Kneeland et al. 2025): images that subjects of NSD saw, and later imagined.

Owns the imagery session and its published protocol: train on the other images of the NSD core sessions, and test on the
18 seen or imagined stimuli, none of which is a training image. The session itself has no training trial, so its voxels
are standardised with the mean and standard deviation of the core sessions; published numbers use its own trials
instead, which is transductive, and the notes say so.

References
----------
Kneeland et al. (2025), NSD-Imagery, CVPR.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import DataError, is_there
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import read_image_file
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings, compare_facts
from braindecode_vis.datasets.nsd.beta_files import SessionFile, open_volume_session
from braindecode_vis.datasets.nsd.dataset import NsdConfig, NsdSettings
from braindecode_vis.datasets.nsd.further_sessions import describe_standardising, join_sessions, open_training
from braindecode_vis.datasets.sources.betas_source import BetasPart, FmriSource, keep_rows, number_betas
from braindecode_vis.datasets.sources.fmri_volumes import read_volume_header
from braindecode_vis.datasets.sources.safe_pickle import read_pickled_dict

if TYPE_CHECKING:
    import pandas as pd

Task = Literal["vision", "imagery", "attention"]
BETAS_FILE = "nsdimagerybetas_fithrf_GLMdenoise_RR/betas_nsdimagery.nii.gz"
STIMULI_FILE = "nsdimagery_stimuli.pkl3"
SESSION = "nsdimagery"
_TASKS: dict[str, Task] = {"vis": "vision", "img": "imagery", "att": "attention"}
_SETS = {"A": "simple", "B": "complex", "C": "concept"}
_IMAGE_ENDS = (".png", ".jpg", ".jpeg", ".bmp")


class NsdImageryConfig(NsdSettings):
    """Subject, test tasks, and settings of the core sessions, whose shared images are left out of training.

    Parameters
    ----------
    root
        Folder of NSD; the imagery betas are in ``nsddata_betas/ppdata/subjAA/func1pt8mm``.
    tasks
        Trials of the imagery session that are kept, all of them test trials.
    untrained
        ``pooled`` standardises the imagery session with the core sessions, ``own`` with its own test trials.
    stimuli
        ``nsdimagery_stimuli.pkl3``, which has the stimulus of each trial; found below the root by default.
    imagery_images
        Folder of the 18 images, with the names of the stimulus table; ``nsddata_stimuli/stimuli/nsdimagery`` below
        the root by default.
    """

    kind: Literal["nsd_imagery"] = "nsd_imagery"
    tasks: tuple[Task, ...] = ("vision", "imagery")
    stimuli: Path | None = None
    imagery_images: Path | None = None

    not_hashed: ClassVar[frozenset[str]] = NsdSettings.not_hashed | {"stimuli", "imagery_images"}

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root = self.find_root()
        paths = [self._find_betas(root), self._find_stimuli(root)]
        if self.with_images:
            paths += list(self._find_images().values())
        return self._make_core().hash_inputs() | digest_files({path.name: path for path in paths})

    def open_betas(self) -> FmriSource:
        """Return the core sessions (training) followed by the imagery session (test), lazily."""
        root = self.find_root()
        core = self._make_core().open_betas()
        geometry, training = open_training(core)
        if geometry.mask is None or geometry.affine is None:
            raise DataError("the core sessions have no mask.")
        path = self._find_betas(root)
        trials = read_trials(self._find_stimuli(root), self.subject, read_volume_header(path).n_volumes, path)
        # All volumes of NSD are int16 of percent signal change times 300.
        item = SessionFile(1, (path,), "nifti")
        read = open_volume_session(item, geometry.mask, geometry.affine, len(trials), divide_by=300)
        whole = BetasPart(trials, (path,), geometry.n_voxels, read)
        tested = number_betas([keep_rows(whole, trials["task"].isin(self.tasks).to_numpy())])[0]
        own = tested.trials.drop_duplicates("stimulus_id")
        paths = self._list_images(own["name"].tolist())
        return join_sessions(
            core,
            training,
            tested,
            own[["stimulus_id", "concept", "split"]].assign(
                path=[path.name for path in paths] if paths else ""
            ),
            (lambda row: read_image_file(paths[row])) if paths else None,
            protocol=self._describe(training, tested),
            tasks=self.tasks,
        )

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Open the core sessions, the imagery betas and their trial table."""
        source = self.open_betas()
        trials = source.parts[-1].trials
        found = ", ".join(f"{count} {task}" for task, count in trials["task"].value_counts().items())
        yield CheckFinding("betas", True, f"{found} trials, {len(source.parts) - 1} core sessions")
        yield from compare_facts(
            {"n_stimuli": trials["stimulus_id"].nunique()}, self.manifest.facts, self.find_root()
        )
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    def _make_core(self) -> NsdConfig:
        return NsdConfig(**{name: getattr(self, name) for name in NsdSettings.model_fields})

    def _find_betas(self, root: Path) -> Path:
        place = Path(f"ppdata/subj{self.subject:02d}/func1pt8mm") / BETAS_FILE
        path = next((p for p in (root / "nsddata_betas" / place, root / place) if is_there(p)), None)
        if path is None:
            raise DataError(
                f"{root / 'nsddata_betas' / place} does not exist; fetch it from the bucket of NSD."
            )
        return path

    def _find_stimuli(self, root: Path) -> Path:
        if self.stimuli is not None:
            places = [self.stimuli.expanduser()]
        else:
            folders = (
                "nsddata_stimuli/stimuli",
                "nsddata_stimuli/stimuli/nsdimagery",
                "nsddata/experiments/nsdimagery",
                "",
            )
            places = [root / folder / STIMULI_FILE for folder in folders]
        path = next((place for place in places if is_there(place)), None)
        if path is None:
            raise DataError(
                f"{STIMULI_FILE}, which lists the image of each imagery trial, is not at {places[0]}; name it with "
                "--set dataset.stimuli=FILE."
            )
        return path

    def _find_images(self) -> dict[str, Path]:
        folder = self.imagery_images
        if folder is None:
            folder = self.find_root() / "nsddata_stimuli/stimuli/nsdimagery"
        if not folder.expanduser().is_dir():
            raise DataError(
                f"the folder of the imagery images {folder} does not exist; name it with --set "
                "dataset.imagery_images=DIR, or leave the images out with --set dataset.with_images=false."
            )
        files = sorted(folder.expanduser().iterdir())
        return {path.stem: path for path in files if path.suffix.lower() in _IMAGE_ENDS}

    def _list_images(self, names: Sequence[str]) -> list[Path]:
        """Return the file of each imagery stimulus; none if images are not requested."""
        if not self.with_images:
            return []
        files = self._find_images()
        missing = [name for name in names if name not in files]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(names)} imagery images are not in the folder of the imagery images, "
                f"first {missing[0]!r}; it holds {', '.join(list(files)[:5])}."
            )
        return [files[name] for name in names]

    def _describe(self, training: list[BetasPart], tested: BetasPart) -> str:
        import pandas as pd

        n_images = pd.concat([part.trials["stimulus_id"] for part in training]).nunique()
        return (
            f"NSD-Imagery subject {self.subject:02d}: trained on {n_images} non-shared images of {len(training)} NSD "
            f"core sessions, tested zero-shot on {tested.trials['stimulus_id'].nunique()} stimuli in "
            f"{len(tested.trials)} {' and '.join(self.tasks)} trials; "
            f"imagery session {describe_standardising(self.zscore, self.untrained)}"
        )


def read_trials(path: Path, subject: int, n_betas: int, betas: Path) -> pd.DataFrame:
    """Return the trials of the imagery session from ``nsdimagery_stimuli.pkl3``.

    Parameters
    ----------
    path
        Dictionary with `exps` (``visA``, ``imgB_1``...), `cues` (a letter) of each beta, and `image_map` (cue to
        stimulus).
    n_betas
        Fourth dimension of the betas: attention trials have two epochs, so it may be larger than 576.

    Raises
    ------
    DataError
        If the lists do not have one entry per beta, or name unknown experiments or cues.
    """
    import pandas as pd

    content: dict[str, Any] = read_pickled_dict(path)
    missing = [key for key in ("exps", "cues", "image_map") if key not in content]
    if missing:
        raise DataError(f"{path} is missing {', '.join(missing)}; it is not {STIMULI_FILE}.")
    exps = [str(e) for e in np.asarray(content["exps"]).ravel().tolist()]
    cues = [str(c) for c in np.asarray(content["cues"]).ravel().tolist()]
    names = {str(cue): value for cue, value in dict(content["image_map"]).items()}
    if not len(exps) == len(cues) == n_betas:
        raise DataError(
            f"{path} lists {len(exps)} experiments and {len(cues)} cues, but {betas} has {n_betas} betas: they are of "
            "different releases."
        )
    odd = next((e for e in exps if e[:3] not in _TASKS or e[3:4] not in _SETS), None)
    if odd is not None:
        raise DataError(f"{path} names the experiment {odd!r}; visA, attB, imgC_1 and the like are known.")
    # Attention trials show other pictures, so their cues need no image.
    unknown = [c for c, e in zip(cues, exps, strict=True) if c not in names and not e.startswith("att")]
    if unknown:
        raise DataError(f"{path} maps no stimulus to the cue {unknown[0]!r}.")
    labels = [_name(names[c]) if c in names else f"attention-{c}" for c in cues]
    # The file has no runs; a run is a stretch with the same experiment name.
    run = np.cumsum([True, *(a != b for a, b in zip(exps[1:], exps[:-1], strict=True))])
    ids = [f"imagery_{label}" for label in labels]
    return pd.DataFrame(
        {
            "subject": f"{subject:02d}", "session": SESSION, "run": [f"{n:02d}" for n in run], "stimulus_id": ids,
            "repetition": 0, "split": "test", "concept": ids, "task": [_TASKS[e[:3]] for e in exps],
            "stimulus_set": [_SETS[e[3]] for e in exps], "name": labels,
        }
    )  # fmt: skip


def _name(value: Any) -> str:
    return f"{int(value):02d}" if isinstance(value, int | np.integer) else Path(str(value)).stem
