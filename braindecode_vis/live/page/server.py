"""The server of the live page, and what a calibration block must offer to be shown in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Showing:
    """One image of a calibration block.

    Parameters
    ----------
    stimulus_id
        Of the image.
    duration
        How long it stays on the screen, in s.
    pause
        How long the fixation cross stands alone before it, in s.
    """

    stimulus_id: str
    duration: float = 0.5
    pause: float = 0.5


class Calibration(Protocol):
    """A block of images that the page shows; `PageListener` calls it from its own thread."""

    def list_showings(self) -> Sequence[Showing]:
        """Return the images in the order in which they are shown."""
        ...

    def find_images(self, ids: Sequence[str]) -> Sequence[Path | np.ndarray | None]:
        """Return the pictures: files, or uint8 of shape (height, width, 3)."""
        ...

    def mark(self, stimulus_id: str, time: float, uncertainty: float) -> None:
        """An image appeared at `time` s of ``time.perf_counter()``, plus or minus `uncertainty` s."""
        ...

    def finish(self, complete: bool) -> str:
        """The block is over, or was stopped; called once. Returns a sentence that the page shows."""
        ...
