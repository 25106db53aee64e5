"""The features of a run's `selection` as analyses meet them.

Owns the two halves of a choice. Names (regions, networks, channels) look at no response, so they narrow all trials
before an analysis begins. Ranks (reliability, encoding score) are fitted on training trials, so each cut of an analysis
fits them again on its own, and an encoder of the run keeps those that it was trained with.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis import pipeline
from braindecode_vis.analysis.study import Change, ChoosingEncoder, choose_features
from braindecode_vis.arrays import Responses
from braindecode_vis.pipeline.runs import Run
from braindecode_vis.preprocessing.selection import Selection, SelectionConfig, fit_selection
from braindecode_vis.seeds import derive_seed


def ranks_features(config: SelectionConfig) -> bool:
    """Whether features are chosen by what training trials say of them, and not by name alone."""
    return config.reliability is not None or config.encoding is not None


class ChosenFeatures:
    """What a run's `selection` leaves of trials, and which encoder takes what is left.

    Parameters
    ----------
    run
        The run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.selection
        self._single: tuple[int, Responses] | None = None

    @cached_property
    def _named(self) -> Selection | None:
        names = self.config.model_copy(update={"reliability": None, "encoding": None})
        if names.is_empty:
            return None
        responses = pipeline.preprocess(self.run).responses
        # One trial of each subject says which features there are; nothing else of it is looked at.
        first = responses.trials.drop_duplicates("subject").index.to_numpy()
        return fit_selection(names, responses.select(first))

    @property
    def _ranks(self) -> SelectionConfig:
        return SelectionConfig(reliability=self.config.reliability, encoding=self.config.encoding)

    def narrow(self, responses: Responses) -> Responses:
        """Return the features of the names."""
        return responses if self._named is None else self._named.apply(responses)

    def find_trained(self, number: int) -> Any:
        """Return the run's encoder of a fold, which takes narrowed trials, or its category decoder."""
        fold = pipeline.train(self.run)[number]
        if not hasattr(fold, "encoder"):
            return fold.decoder
        if fold.selection is None or not ranks_features(self.config):
            return fold.encoder
        keep = fold.selection.keep
        if self._named is not None:
            keep = {name: chosen[self._named.keep[name]] for name, chosen in keep.items()}
        return ChoosingEncoder(fold.encoder, Selection(fold.selection.dim, keep, fold.selection.steps))

    def choose(self, number: int, change: Change | None) -> Selection | None:
        """Fit the ranks on the changed single training trials of a fold; None without ranks."""
        if not ranks_features(self.config):
            return None
        if self._single is None or self._single[0] != number:
            prepared = pipeline.preprocess(self.run)
            single = self.narrow(prepared.responses.select(np.sort(prepared.folds[number].train)))
            self._single = (number, single)
        train = self._single[1] if change is None else change(self._single[1])
        targets = None
        if self.config.encoding is not None:
            bank = pipeline.embed(self.run)[number].embeddings
            targets = bank.select(list(pd.unique(train.stimulus_ids)))
        seed = derive_seed(self.run.config.seed, "selection")
        return choose_features(self._ranks, train, targets, seed=seed)
