"""Held-out training images: who they are, and how well the network finds them.

Model selection sees training images only. Whole concepts are held out, so that what is selected for is what a
zero-shot test asks; where the data show too few concepts for that, images are held out instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from braindecode_vis.arrays import normalise_rows
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.seeds import make_generator
from braindecode_vis.training.model import BrainImageModel

if TYPE_CHECKING:
    from braindecode_vis.training.feed import Feed
    from braindecode_vis.training.model import BrainImageModel


FEWEST_HELD_OUT = 2  # one image alone is always found
TOP_K = 5
SMALL_GALLERY = 4 * TOP_K  # below, top-5 is passed by chance too often to tell epochs apart


@dataclass(frozen=True)
class HeldOut:
    """Training trials that the network never learns from.

    Parameters
    ----------
    mask : boolean array of shape (n_trials,)
    by
        ``concept`` or ``image``, what was held out whole; empty if nothing was.
    """

    mask: np.ndarray
    by: str


def hold_out(stimuli: np.ndarray, concepts: np.ndarray, fraction: float, *, seed: int) -> HeldOut:
    """Choose held-out trials.

    Concepts are held out if `fraction` of them are at least two and as many remain, images otherwise.

    Parameters
    ----------
    stimuli, concepts : int arrays of shape (n_trials,)
        Image and concept of each trial.
    fraction
        Share of the concepts (or images) to hold out; 0 holds out nothing.
    seed
        Decides which.

    Raises
    ------
    DataError
        If not even two images can be held out.
    """
    if fraction == 0:
        return HeldOut(np.zeros(len(stimuli), dtype=bool), "")
    # Whole concepts first: a zero-shot test asks for images of concepts never seen.
    for by, groups in (("concept", concepts), ("image", stimuli)):
        names = np.unique(groups)
        n_held = round(fraction * len(names))
        if n_held >= FEWEST_HELD_OUT and len(names) - n_held >= FEWEST_HELD_OUT:
            # A stream of its own, so that other settings do not move who is held out.
            chosen = make_generator(seed, "hold_out", by).permutation(names)[:n_held]
            return HeldOut(np.isin(groups, chosen), by)
    raise DataError(
        f"{fraction:.0%} of {len(np.unique(stimuli))} training images are too few to hold out; "
        "set encoder.selection.hold_out to 0 or higher."
    )


def name_top_k(n_gallery: int) -> tuple[str, int]:
    """Return the name and the k of the accuracy that a gallery of this size can tell: top-5, or top-1 below 20."""
    return (f"top{TOP_K}", TOP_K) if n_gallery >= SMALL_GALLERY else ("top1", 1)


def compute_top_k(brain: np.ndarray, gallery: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Return how often the true image is among the `k` most similar ones by cosine.

    Ties count against the network, so that constant outputs find nothing.

    Parameters
    ----------
    brain : array of shape (n_queries, d)
    gallery : array of shape (n_gallery, d)
    truth : int array of shape (n_queries,)
        Row of the true image in the gallery.
    k
        How many candidates count.

    Examples
    --------
    >>> compute_top_k(np.eye(3), np.eye(3), np.array([0, 1, 0]), 1) == 2 / 3
    True
    """
    similarity = normalise_rows(brain) @ normalise_rows(gallery).T
    own = similarity[np.arange(len(truth)), truth]
    # candidates at least as similar as the true one, itself included
    return float(((similarity >= own[:, None]).sum(axis=1) <= k).mean())


def score_held_out(model: BrainImageModel, feed: Feed, batch_size: int, progress: float) -> dict[str, Any]:
    """Return loss and accuracy of the held-out trials, nothing if none were held out.

    Parameters
    ----------
    model
        The weights to judge; left in evaluation mode.
    feed
        Its data; the held-out training trials alone are read.
    batch_size
        Trials at a time.
    progress
        Share of the training that is done, for objectives that change with it.
    """
    held = feed.held
    if held is None:
        return {}
    model.eval()
    brain, subjects, losses, sizes = [], [], [], []
    images: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(held), batch_size):
            rows = np.arange(start, min(start + batch_size, len(held)))
            plan = feed.plan(held, rows, update=0, part=0, rank=0, n_ranks=1)
            batch = feed.assemble(held, *feed.load_all(held, plan), progress)
            brain.append(model.encode_brain(batch.data, batch.subject).float().cpu().numpy())
            subjects.append(batch.subject)
            batch.tuned = model.embed_images(batch)
            for stimulus, image in zip(batch.stimuli.tolist(), batch.tuned, strict=True):
                images.setdefault(stimulus, image)  # each image once in the gallery, whatever its repetitions
            # A contrast of one image or concept with itself says nothing.
            if len(torch.unique(batch.stimuli)) > 1 and len(torch.unique(batch.concepts)) > 1:
                loss = model.compute_plain_loss(batch)
                if loss is not None:
                    losses.append(float(loss))
                    sizes.append(len(batch.data))
    # ascending, so that searchsorted finds the row of each trial's image
    gallery = sorted(images)
    name, k = name_top_k(len(gallery))
    truth = np.searchsorted(gallery, held.stimuli)
    raw = torch.stack([images[i] for i in gallery])
    score = _find_accuracy(model, np.concatenate(brain), torch.cat(subjects), raw, truth, k)
    found = {f"validation_{name}": score, "n_validation_images": len(gallery)}
    if losses:
        # weighted by batch: the last one is smaller
        found["validation_loss"] = float(np.average(losses, weights=sizes))
    return found


def _find_accuracy(
    model: BrainImageModel,
    brain: np.ndarray,
    subjects: torch.Tensor,
    raw: torch.Tensor,
    truth: np.ndarray,
    k: int,
) -> float:
    """Return the accuracy over all trials, each searched in the gallery of its own subject where there are several."""

    def encode(subject: torch.Tensor | None) -> np.ndarray:
        with torch.no_grad():
            return model.encode_image(raw, subject).float().cpu().numpy()

    if not model.has_subject_galleries:
        return compute_top_k(brain, encode(None), truth, k)
    found, numbers = 0.0, subjects.cpu().numpy()
    # Weights of layers differ between subjects, and with them the vectors of the gallery.
    for number in np.unique(numbers):
        own = numbers == number
        gallery = encode(subjects.new_full((len(raw),), int(number)))
        # weighted by the subject's share of the trials
        found += float(own.mean()) * compute_top_k(brain[own], gallery, truth[own], k)
    return found


def get_monitored_score(monitor: str, record: dict[str, Any]) -> float:
    """Return the number of an epoch's record by which the best epoch is chosen; higher is better.

    Parameters
    ----------
    monitor
        ``accuracy`` or ``loss``.
    record
        With the entries of `score_held_out`.

    Raises
    ------
    ConfigError
        If the loss is asked for and no objective can be computed on held-out trials.
    """
    if monitor != "loss":
        return next(v for k, v in record.items() if k.startswith("validation_top"))
    if "validation_loss" not in record:
        raise ConfigError(
            "encoder.selection.monitor is loss, but no objective can be computed on held-out trials alone; "
            "set it to accuracy."
        )
    return -record["validation_loss"]
