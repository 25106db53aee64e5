"""Images of decisions, made in a thread of their own so that decisions do not wait for them.

Prior and generator are those of the run. While one image is made, the latest decision that came waits; others go
without an image.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.live.stream_roles import Decision
from braindecode_vis.pipeline.finished_run import FinishedRun
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.predicting import find_fits, prepare_images

#: Seconds that the end of a session waits for the last image.
LAST_IMAGE_S = 60.0


class Reconstructor:
    """Makes images of decisions in a thread.

    Parameters
    ----------
    run, folds
        The run, and the folds that predict.

    Raises
    ------
    DataError
        If the run has made no images, and has no prior and generator that are fitted.
    """

    def __init__(self, run: FinishedRun, folds: list[int]) -> None:
        try:
            find_fits(run)
        except DataError as error:
            raise DataError(
                f"{run.folder.path} has no fitted prior and generator, which are needed to make images; "
                "run braindecode-vis "
                f"reconstruct {run.folder.path} first, or leave out --reconstruct."
            ) from error
        self._run, self._folds = run, folds
        self._asked: queue.Queue[tuple[Decision, Responses, Embeddings] | None] = queue.Queue(1)
        self._made: queue.SimpleQueue[Decision | str] = queue.SimpleQueue()
        self._busy = threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self, decision: Decision, trial: Responses, predicted: Embeddings) -> bool:
        """Ask for the image of a decision, and say whether there will be one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="reconstruction", daemon=True)
            self._thread.start()
        try:
            self._asked.put_nowait((decision, trial, predicted))
        except queue.Full:
            return False
        return True

    def take_finished(self) -> Iterator[Decision | str]:
        """Yield the decisions whose image is done, with it."""
        while not self._made.empty():
            yield self._made.get()

    def finish(self) -> Iterator[Decision | str]:
        """Wait for what was asked for, yield it, and end the thread."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(LAST_IMAGE_S)
            self._thread = None
        yield from self.take_finished()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            decision, trial, predicted = asked
            try:
                image = self._make(trial, predicted)
                self._made.put(replace(decision, image=image))
            except Exception as error:
                self._made.put(
                    f"No image could be made for decision {decision.number} ({type(error).__name__}: {error})."
                )

    def _make(self, trial: Responses, predicted: Embeddings) -> np.ndarray:
        chosen = [train(self._run)[number].select(trial) for number in self._folds]
        images = prepare_images(self._run, self._folds, chosen, trial, predicted)()[0]
        image = np.asarray(images[0])
        return image[0] if image.ndim == 4 else image  # the first of several draws
