"""Handwritten sixes and nines, seen by one subject (van Gerven, de Lange and Heskes 2010).

Owns the MATLAB file ``digit69_28x28.mat`` as redistributed with Du et al. (2018): 90 + 10 trials of 3092 voxels
in arbitrary units, with the 28 x 28 image of each trial. The file has no runs, repetitions or voxel positions, so the
trials have none.

References
----------
van Gerven, de Lange, Heskes (2010), doi:10.1162/NECO_a_00047.
Du, Du, Huang, He (2018), IEEE Transactions on Neural Networks and Learning Systems.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_file, write_responses, write_stimuli
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.loaded import LoadedSettings, tabulate_trials
from braindecode_vis.datasets.manifests import check_one_file, read_manifest

FILE_NAME = "digit69_28x28.mat"
_CONCEPTS = {1: "six", 2: "nine"}
LAYOUT = Layout(
    data=File(
        FILE_NAME,
        "mat5",
        what="the data file of digits69",
        hint="pass its folder with --root",
        arrays={
            f"{name}{suffix}": array
            for suffix, trial in (("Trn", "training trial"), ("Test", "test trial"))
            for name, array in (
                ("fmri", Array((trial, "voxel"))),
                ("stim", Array((trial, "pixel"), "uint8")),
                ("label", Array((trial,), "uint8", codes=_CONCEPTS)),
            )
        },
    )
)


class Digits69Config(LoadedSettings):
    """Folder of the file, and whether its bytes must be the published ones.

    Parameters
    ----------
    root
        Folder that holds ``digit69_28x28.mat``.
    verify
        Refuse a file whose sha256 differs from the manifest's.
    """

    kind: Literal["digits69"] = "digits69"
    verify: bool = True

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "verify"})

    files = LAYOUT

    def find_files(self) -> dict[str, Path]:
        """Return the file."""
        return {FILE_NAME: LAYOUT.find(self.find_root(), "data")}

    def read(self) -> tuple[Responses, StimulusSet]:
        """Return training and test trials, and the image of each."""
        return read_digits69(self.find_files()[FILE_NAME])

    def write(self, folder: Path, *, seed: int) -> None:
        """Write responses and stimuli below `folder`, after the file was read and compared with the published one."""
        responses, stimuli = self.read()
        # After reading: a damaged file has a clearer message of its own.
        finding = check_one_file(self.find_root(), self.manifest, self.manifest.files[0])
        if self.verify and not finding.ok:
            raise DataError(f"{finding.message}, or accept this copy with --set dataset.verify=false.")
        write_responses(folder / "responses", responses)
        write_stimuli(folder / "stimuli", stimuli)

    def count_facts(self, responses: Responses, stimuli: StimulusSet) -> dict[str, Any]:
        """Return the numbers of trials, voxels and pixels."""
        trials = responses.trials
        per_class = {split: own["concept"].value_counts() for split, own in trials.groupby("split")}
        assert stimuli.pixels is not None
        return {
            "n_train": int((trials["split"] == "train").sum()),
            "n_test": int((trials["split"] == "test").sum()),
            "n_voxels": responses.data.shape[1],
            "image_height": stimuli.pixels.shape[1],
            "image_width": stimuli.pixels.shape[2],
            "n_train_per_class": int(per_class["train"].min()),
            "n_test_per_class": int(per_class["test"].min()),
        }


def read_digits69(path: Path) -> tuple[Responses, StimulusSet]:
    """Read the recording and its images.

    Parameters
    ----------
    path
        The MATLAB file.

    Returns
    -------
    responses : Responses of shape (100 trials, 3092 voxels)
        Training trials first; the column `split` marks them.
    stimuli : StimulusSet of 100 images
        uint8, 28 x 28, upright, the grey value repeated over the three colours.

    Raises
    ------
    DataError
        If the file is damaged, a variable is missing, or a voxel is not finite.
    """
    import pandas as pd

    published = read_manifest("digits69").files[0].sha256
    hint = (
        f"it is damaged or truncated: sha256 {hash_file(path)}, expected {published}; copy or fetch it again"
    )
    blocks, tables, images = [], [], []
    with LAYOUT.open(path, "data", hint=hint) as file:
        content = {key: file.read(key) for key in LAYOUT.files["data"].arrays}
    for split, suffix in (("train", "Trn"), ("test", "Test")):
        voxels, stimuli, labels = (content[f"{name}{suffix}"] for name in ("fmri", "stim", "label"))
        if (
            not np.isfinite(stimuli).all()
            or (stimuli != np.round(stimuli)).any()
            or (np.abs(stimuli - 127.5) > 127.5).any()
        ):
            raise DataError(f"{path}: stim{suffix} must hold whole grey values from 0 to 255.")
        concepts = [_CONCEPTS[int(label)] for label in labels]
        blocks.append(voxels)
        images.append(stimuli)
        names = [f"{split}_{i:02d}_{concept}" for i, concept in enumerate(concepts)]
        tables.append(
            tabulate_trials(
                subject="01",
                session="01",
                run="01",
                stimulus_id=names,
                repetition=0,
                split=split,
                concept=concepts,
            )
        )
    trials = pd.concat(tables, ignore_index=True)
    data = np.concatenate(blocks).astype(np.float32)
    responses = Responses(
        data, ("trial", "voxel"), trials, "arbitrary", {"voxel_id": np.arange(data.shape[1])}
    )
    pixels = _stand_upright(np.concatenate(images))
    ids, concepts = trials["stimulus_id"].tolist(), trials["concept"].tolist()
    return responses, StimulusSet.from_pixels(pixels, ids, concepts, source=FILE_NAME)


def _stand_upright(flat: np.ndarray) -> np.ndarray:
    """Return the images, uint8 of shape (n, 28, 28, 3)."""
    if flat.shape[1] != 28 * 28:
        raise DataError(
            f"the images have {flat.shape[1]} pixels instead of 28 x 28; the file is not as published."
        )
    upright = flat.reshape(-1, 28, 28).transpose(0, 2, 1)  # column-major on disk
    return np.repeat(upright[..., None], 3, axis=-1).astype(np.uint8)
