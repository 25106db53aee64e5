"""A teacher: the moving average of a model, and the queue of its earlier outputs.

References
----------
Li et al. (2021), ALBEF, arXiv:2107.07651.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from braindecode_vis.optimisation import MovingAverage
from braindecode_vis.training.gathering import gather_rows
from braindecode_vis.training.model import Batch, BrainImageModel


class Queue:
    """The last outputs of the teacher on both sides.

    Parameters
    ----------
    size
        Number of rows kept; 0 keeps none.
    n_features
        Length of a row.
    device
        Where they lie.
    """

    def __init__(self, size: int, n_features: int, device: torch.device) -> None:
        self.rows = torch.zeros(2, size, n_features, device=device)
        self.next = self.count = 0

    def add(self, brain: Tensor, image: Tensor) -> None:
        """Put a batch in, over the oldest rows."""
        size = self.rows.shape[1]
        if not size:
            return
        new = torch.stack([brain, image])[:, -size:].float()
        places = (torch.arange(new.shape[1], device=new.device) + self.next) % size
        self.rows[:, places] = new
        self.next = (self.next + new.shape[1]) % size
        self.count = min(size, self.count + new.shape[1])

    def get(self) -> tuple[Tensor, Tensor]:
        """Return brain and image rows, copies of shape (count, n_features)."""
        return self.rows[0, : self.count].clone(), self.rows[1, : self.count].clone()


class Teacher:
    """A moving-average model with its queue; sees trials without augmentation, their other view if there is one."""

    def __init__(self, model: BrainImageModel, *, decay: float, queue: int, n_features: int) -> None:
        self.average = MovingAverage(model, decay, warm_up=False)
        self.average.model.objectives = nn.ModuleList()  # their temperatures are not averaged
        device = next(model.parameters()).device
        self.queue = Queue(queue, n_features, device)

    @torch.no_grad()
    def teach(self, batch: Batch, plain: Tensor) -> dict[str, Tensor]:
        """Return the teacher's parts of `Outputs` and put this batch into the queue for the next ones.

        Parameters
        ----------
        batch
            The batch, for its targets.
        plain : tensor of shape (n, ...)
            The trials that the teacher sees.
        """
        brain = self.average.model.encode_brain(plain, batch.subject).float()
        images = self.average.model.embed_images(batch)
        image = self.average.model.encode_image(images, batch.subject).float()
        queue_brain, queue_image = self.queue.get()
        self.queue.add(gather_rows(brain), gather_rows(image))
        return {
            "teacher_brain": brain,
            "teacher_image": image,
            "queue_brain": queue_brain,
            "queue_image": queue_image,
        }

    def follow(self, model: BrainImageModel, update: int) -> None:
        """Move one step toward `model`."""
        self.average.follow(model, update)
