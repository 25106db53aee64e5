"""A network as a category decoder: trained by contrast between trials and one learned prototype per class.

Owns the class-shaped targets and the way from cosines back to probabilities; training is that of `NetworkEncoder`.
The target of a trial is the indicator of its class, and the image side one linear map, whose value for a class is its
prototype. The two directions of the contrast are then a softmax over prototypes, and for each prototype one over the
trials of the batch, all those of its class being right answers (supervised contrast). Imports torch only to train.

References
----------
Khosla et al. (2020), arXiv:2004.11362: several positives. Snell et al. (2017), arXiv:1703.05175: prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Responses, normalise_rows
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import CategoryDecoder, Context
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.encoders.category_decoders import read_labels
from braindecode_vis.training.network_config import NetworkEncoderConfig, NetworkTrainingSettings

if TYPE_CHECKING:
    from braindecode_vis.training.network_encoder import NetworkEncoder

_FILE = "categories.json"
_SPACE = "classes"


class NetworkCategoriesConfig(NetworkTrainingSettings):
    """A network that decodes the class of a trial; trained on all training trials, and the last epoch is kept.

    Parameters
    ----------
    size
        Features of the space in which trials and prototypes are compared.
    """

    kind: Literal["network_categories"] = "network_categories"

    decodes_categories: ClassVar[bool] = True

    size: int = Field(default=64, ge=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {"temperature": 0.07}

    def make_training(self) -> NetworkEncoderConfig:
        """Return the settings of the training by contrast with prototypes."""
        shared = {name: getattr(self, name) for name in NetworkTrainingSettings.model_fields}
        return NetworkEncoderConfig.model_validate(
            {
                **shared,
                "objectives": [{"kind": "clip"}],
                "normalise_targets": "none",
                "projector": {"sides": "image", "size": self.size},
                "selection": {"kind": "last", "hold_out": 0},
            }
        )

    def build(self, *, seed: int) -> NetworkCategoryDecoder:
        """Return the unfitted decoder."""
        return NetworkCategoryDecoder(self, seed=seed)


class NetworkCategoryDecoder(CategoryDecoder):
    """A classifier of trials by their nearest prototype; see the module for what is learnt."""

    def __init__(self, config: NetworkCategoriesConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.encoder: NetworkEncoder | None = None
        self._classes: tuple[str, ...] = ()
        self._lent = Context()

    def bind(self, context: Context) -> None:
        """Take the folder of checkpoints and the progress from what the pipeline lends."""
        self._lent = context

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `decision`."""
        self._require_fit()
        return self._classes

    def fit(self, responses: Responses, labels: np.ndarray) -> NetworkCategoryDecoder:
        """Learn from training trials.

        Parameters
        ----------
        responses
            Training trials.
        labels : array of shape (n_trials,)
            Name of the class of each trial.

        Raises
        ------
        DataError
            If labels and trials do not match, there is one class only, or a loss is not finite.
        """
        names = read_labels(self.config.kind, responses, labels)
        classes, codes = np.unique(names, return_inverse=True)
        # The class takes the place of the image, so that all trials of a class are right answers.
        ids = classes.astype(object)[codes]
        named = responses.with_trials(responses.trials.assign(stimulus_id=ids, concept=ids))
        # A linear map of an indicator is a table of prototypes.
        indicators = np.eye(len(classes), dtype=np.float32)
        encoder = self.config.make_training().build(seed=self.seed)
        encoder.bind(self._lent)
        self.encoder = encoder.fit(named, Embeddings(indicators[codes], ids, _SPACE))
        self._classes = tuple(str(name) for name in classes)
        return self

    def decision(self, responses: Responses) -> np.ndarray:
        """Return the probability of each class, float64 of shape (n_trials, n_classes); rows sum to one."""
        from scipy.special import softmax

        prototypes, scale = self._find_prototypes()
        brain = normalise_rows(self._require_fit().predict(responses).vectors.astype(np.float64))
        return np.asarray(softmax(scale * brain @ prototypes.T, axis=1))

    def _find_prototypes(self) -> tuple[np.ndarray, float]:
        """Return the vector of length one of each class, and the inverse temperature of their cosines."""
        encoder, classes = self._require_fit(), np.array(self._classes, dtype=object)
        bank = Embeddings(np.eye(len(classes), dtype=np.float32), classes, _SPACE)
        prototypes = normalise_rows(encoder.map_targets(bank).vectors.astype(np.float64))
        objective: Any = encoder.require_fit().model.objectives[0]
        # The learned inverse temperature makes cosines the logits that training saw.
        return prototypes, float(objective.term.scale().detach())

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return the decision as a torch module, and these trials as its input."""
        from braindecode_vis.training.fitted import NetworkPrediction, PrototypePrediction, take_inputs

        fit = self._require_fit().require_fit()
        module = PrototypePrediction(NetworkPrediction(fit), *self._find_prototypes())
        return module.eval(), take_inputs(fit, responses)

    def write(self, folder: Path) -> None:
        """Write the network as safetensors and JSON, and the names of the classes beside it."""
        self._require_fit().write(folder)
        write_json(folder / _FILE, {"kind": self.config.kind, "classes": list(self._classes)})

    def read(self, folder: Path) -> NetworkCategoryDecoder:
        """Read what `write` wrote.

        Raises
        ------
        DataError
            If it was written with other settings or is a decoder of another kind.
        """
        record = read_json(folder / _FILE)
        if record["kind"] != self.config.kind:
            raise DataError(f"{folder} holds a decoder of kind {record['kind']!r}, not {self.config.kind!r}.")
        self.encoder = self.config.make_training().read(folder)
        self._classes = tuple(record["classes"])
        return self

    def _require_fit(self) -> NetworkEncoder:
        if self.encoder is None:
            raise DataError(f"the {self.config.kind} decoder has not been fitted; run train first.")
        return self.encoder
