"""Learned weights of target layers, choice among views of an image, and clusters of images.

`LayerFusion` is a weighted sum over the layers of a target. `ViewChooser` chooses among stacked views (target kind
``views`` with ``combine: stacked``): the mean of all, a random one, or the one that the brain's answer deserves. Views
are chosen in training only; held-out trials, galleries and the space of the predictions have one vector per image: the
usual view with the rule of uncertainty, the mean of the views otherwise.

References
----------
Peters et al. (2018), ELMo, arXiv:1802.05365, for the softmax-weighted sum of layers. Wu et al. (2025), UBP,
arXiv:2503.04207, for the rule of uncertainty. SAMGA (2026), arXiv:2604.17782, for the router.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from braindecode_vis.base.arrays import normalise_rows
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.training.image_config import LayerFusionConfig, ViewChoice


class LayerFusion(nn.Module):
    """Weighted sum over the token axis of stacked targets.

    Parameters
    ----------
    config
        The settings.
    target_shape
        Tokens and features of one target.
    n_subjects
        Training subjects, for what belongs to single ones.

    Raises
    ------
    DataError
        If the targets have no token axis.
    ConfigError
        If there is no such layer as `centre`.
    """

    def __init__(self, config: LayerFusionConfig, target_shape: tuple[int, ...], n_subjects: int) -> None:
        super().__init__()
        if len(target_shape) != 2:
            raise DataError(
                "encoder.fusion weighs several layers, but the targets have one vector per image; set target.layer to "
                "several layers, target.kind to layers, or leave out encoder.fusion."
            )
        self.config = config
        self.n_tokens, self.n_raw = target_shape
        #: Features of what comes out.
        self.n_features = self.n_raw if config.size is None else config.size
        start = torch.zeros(self.n_tokens)
        if config.centre is not None:
            if config.centre >= self.n_tokens:
                raise ConfigError(
                    f"encoder.fusion.centre is {config.centre}, but the targets have the layers 0 to "
                    f"{self.n_tokens - 1}."
                )
            start = -(torch.arange(self.n_tokens) - config.centre).abs().float()
        self.logits = nn.Parameter(start.expand(n_subjects, -1).clone() if self.per_subject else start)
        if config.weights == "routed":
            self.subject_bias = nn.Parameter(torch.zeros(n_subjects, self.n_tokens))
        self.shared_map = None if config.hidden is None else nn.Linear(self.n_raw, config.hidden)
        self.maps: nn.ModuleList | None = None
        if config.size is not None:
            n_in = config.hidden or self.n_raw
            self.maps = nn.ModuleList(nn.Linear(n_in, config.size) for _ in range(self.n_tokens))

    @property
    def per_subject(self) -> bool:
        """Whether subjects have weights of their own, and thus galleries."""
        return self.config.weights == "per_subject"

    def weigh(self, subject: Tensor | None = None) -> Tensor:
        """Return the weights, which sum to one: (n_tokens,), or (n, n_tokens) for subjects with weights of their own.

        Parameters
        ----------
        subject : integer tensor of shape (n,)
            Index of each subject; one beyond the last is an unknown one, and so is None.
        """
        if self.config.weights == "routed":
            return self._route(subject).softmax(dim=-1)
        weights = self.logits.softmax(dim=-1)
        if not self.per_subject:
            return weights
        mean = weights.mean(dim=0)
        return mean if subject is None else torch.cat([weights, mean[None]])[subject]

    def _route(self, subject: Tensor | None) -> Tensor:
        """Return the logits: those for all, in training with the bias of each trial's subject unless it is hidden."""
        if subject is None or not self.training:
            return self.logits
        bias = torch.cat([self.subject_bias, self.subject_bias.new_zeros(1, self.n_tokens)])[subject]
        # From the global state, which the loop seeds for every part of an update.
        shown = torch.rand(len(subject), 1, device=bias.device) >= self.config.hide_subject
        return self.logits + bias * shown

    def forward(self, stacked: Tensor, subject: Tensor | None = None) -> Tensor:
        """Return fused targets of shape (..., n, n_features) for flat ones of (..., n, n_tokens * n_raw)."""
        tokens = stacked.unflatten(-1, (self.n_tokens, self.n_raw))
        if self.shared_map is not None:
            tokens = self.shared_map(tokens)
        if self.maps is not None:
            tokens = torch.stack([each(tokens[..., i, :]) for i, each in enumerate(self.maps)], dim=-2)
        return (tokens * self.weigh(subject)[..., None]).sum(dim=-2)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the logits as a group for the optimiser; maps are trained like any other weight."""
        logits = [self.logits] if self.config.weights != "routed" else [self.logits, self.subject_bias]
        return [{"params": logits, "lr_scale": self.config.lr_scale, "weight_decay": 0.0}]

    def describe(self, subjects: tuple[str, ...]) -> dict[str, list[float]]:
        """Return the weight of each token: under ``all``, or by subject with their mean under ``unknown``."""
        with torch.no_grad():
            if not self.per_subject:
                return {"all": self.logits.softmax(dim=-1).tolist()}
            rows = self.logits.softmax(dim=-1).tolist()
            return {**dict(zip(subjects, rows, strict=True)), "unknown": self.weigh().tolist()}


USUAL = 1  # of less, usual and more blur


class ViewChooser:
    """The choice of views during one training.

    Parameters
    ----------
    choice
        ``mean``, ``sample`` or ``uncertainty``.
    n_views
        Views of each image.
    ids
        Stimulus id of each image code.
    seed
        Root of the random choice.
    """

    def __init__(self, choice: ViewChoice, n_views: int, ids: np.ndarray, *, seed: int) -> None:
        from braindecode_vis.embeddings.degradations import UncertaintyRule

        self.choice, self.n_views, self.ids, self.seed = choice, n_views, [str(i) for i in ids], seed
        self.rule = UncertaintyRule()

    @property
    def learns(self) -> bool:
        """Whether the choice depends on how well images were matched."""
        return self.choice == "uncertainty"

    def reduce(self, stacked: Tensor) -> Tensor:
        """Return one vector per row as outside training; flat rows of shape (n, n_views * n_features)."""
        views = stacked.unflatten(-1, (self.n_views, -1))
        return views[:, USUAL] if self.learns else views.mean(dim=1)

    def choose(self, stacked: Tensor, stimuli: np.ndarray, place: tuple[int, ...]) -> Tensor:
        """Return the chosen view of each training row, shape (n, n_features).

        Parameters
        ----------
        stacked : tensor of shape (n, n_views * n_features)
        stimuli : int array of shape (n,)
            Image code of each row.
        place
            Update, part and process, which decide a random choice.
        """
        if self.choice == "mean":
            return self.reduce(stacked)
        if self.choice == "sample":
            chosen = make_generator(self.seed, "views", *place).integers(self.n_views, size=len(stimuli))
        else:
            chosen = self.rule.choose([self.ids[code] for code in stimuli])
        # one view per row: (n, n_views, n_features) -> (n, n_features)
        index = torch.from_numpy(chosen).to(stacked.device)
        return stacked.unflatten(-1, (self.n_views, -1))[torch.arange(len(index), device=index.device), index]

    def learn(self, stimuli: np.ndarray, similarities: np.ndarray) -> None:
        """Take in how similar brain and image of each trial of a batch were; trials of one image are averaged."""
        codes, index = np.unique(stimuli, return_inverse=True)
        # The rule of UBP moves an image once per batch, however many trials show it.
        means = np.bincount(index, weights=similarities) / np.bincount(index)
        self.rule.update([self.ids[code] for code in codes], means)

    def count(self) -> list[int]:
        """Return how many of the scored images have each view at present."""
        return np.bincount(list(self.rule.view.values()), minlength=self.n_views).tolist()

    def as_tensors(self) -> dict[str, Tensor]:
        """Return the averages and views of the scored images, for a checkpoint."""
        codes = [code for code, name in enumerate(self.ids) if name in self.rule.average]
        names = [self.ids[code] for code in codes]
        return {
            "codes": torch.tensor(codes, dtype=torch.int64),
            # float64, or a resumed run would round the averages once more
            "average": torch.tensor([self.rule.average[n] for n in names], dtype=torch.float64),
            "view": torch.tensor([self.rule.view[n] for n in names], dtype=torch.int64),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `as_tensors` gave."""
        names = [self.ids[code] for code in tensors["codes"].tolist()]
        self.rule.average = dict(zip(names, tensors["average"].tolist(), strict=True))
        self.rule.view = dict(zip(names, tensors["view"].tolist(), strict=True))


def cluster_images(vectors: np.ndarray, trained: np.ndarray, n_clusters: int, *, seed: int) -> np.ndarray:
    """Return the cluster of each image by k-means of unit vectors, fitted on the trained images.

    Parameters
    ----------
    vectors : array of shape (n_images, n_features)
    trained : int array
        Rows that the centres are learnt from.
    n_clusters
        Number of clusters, at most that of the trained images.
    seed
        Decides the start.
    """
    from sklearn.cluster import KMeans

    # On the sphere, where Euclidean k-means follows the cosine that the objectives compare.
    unit = normalise_rows(vectors)
    # scikit-learn seeds by 32 bits.
    kmeans = KMeans(min(n_clusters, len(trained)), n_init=1, random_state=seed % 2**32).fit(unit[trained])
    return kmeans.predict(unit).astype(np.int64)
