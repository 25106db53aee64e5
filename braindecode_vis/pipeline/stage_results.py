"""What each stage hands to the next: arrays, fitted components, and the artifact that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.contracts import WholeBrainEncoder, WholeImageEncoder
from braindecode_vis.pipeline.galleries import GalleryPart
from braindecode_vis.preprocessing.selection import Selection
from braindecode_vis.preprocessing.splits import Fold, Split, split_imagined_trials
from braindecode_vis.retrieval import Retrieval
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import Artifact, read_json


@dataclass(frozen=True)
class Prepared:
    """What preprocessing gives: responses, stimuli and the split.

    `folds` are those of the split without the test trials that have no picture, whose rows `imagined` keeps; see
    `braindecode_vis.preprocessing.splits`.
    """

    artifact: Artifact
    responses: Responses
    stimuli: StimulusSet
    split: Split

    @cached_property
    def _parted(self) -> tuple[tuple[Fold, ...], tuple[np.ndarray, ...]]:
        return split_imagined_trials(self.responses.trials, self.stimuli, self.split.folds)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The folds, tested on trials that show a picture."""
        return self._parted[0]

    @property
    def imagined(self) -> tuple[np.ndarray, ...]:
        """Rows of the test trials of each fold that imagine something without a picture."""
        return self._parted[1]

    @property
    def declared_protocol(self) -> str:
        """What the data set says of its published split, for example which shared images of NSD; empty without one."""
        if not self.split.protocol.startswith("published"):
            return ""
        meta = read_json(self.artifact.path / "responses" / "meta.json")
        return str(meta.get("provenance", {}).get("protocol", ""))


@dataclass(frozen=True)
class TargetBank:
    """The image encoder of one fold, and the embedding of every image in its space."""

    artifact: Artifact
    encoder: WholeImageEncoder
    embeddings: Embeddings


@dataclass(frozen=True)
class TrainedFold:
    """A fitted brain encoder, its out-of-fold predictions of training trials, and the features it was given."""

    artifact: Artifact
    encoder: WholeBrainEncoder
    out_of_fold: Embeddings
    selection: Selection | None = None


@dataclass(frozen=True)
class RetrievedFold:
    """Predictions of the test trials of one fold, their ranks, and the subject of each.

    `parts` hold predictions and galleries as they were compared; most encoders have one part.
    """

    predicted: Embeddings
    parts: list[GalleryPart]
    retrieval: Retrieval
    subjects: np.ndarray


@dataclass(frozen=True)
class Retrieved:
    """All folds, and the protocol of their gallery."""

    artifact: Artifact
    folds: list[RetrievedFold]
    gallery_protocol: str


@dataclass(frozen=True)
class Reconstructed:
    """What was seen and what each method made of it, row by row.

    Parameters
    ----------
    ids, concepts, subjects
        Stimulus, its concept and the subject of each row.
    seen : uint8 array of shape (n_rows, height, width, 3)
    images
        Method to uint8 images of the shape of `seen`: ``decoded``, then the controls.
    decoded_concepts
        Name of the decoded class of each row, or None where the test concepts were never trained on.
    """

    artifact: Artifact
    ids: np.ndarray
    concepts: np.ndarray
    subjects: np.ndarray
    seen: np.ndarray
    images: dict[str, np.ndarray]
    decoded_concepts: np.ndarray | None
