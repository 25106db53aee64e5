"""Predicts the response of any voxel of any subject to an image, from tokens of the image and a code of the voxel.

Owns Brain-IT's image-to-voxel network for one layer of image tokens, how its weights and the codes are fitted, how the
codes of a new subject are fitted to the frozen network, and the clusters of codes. Voxels with similar codes respond
alike, whoever they belong to: that is what `voxel_clusters` groups voxels by. Knows nothing of decoding.

The paper reads five layers of a DINOv2 that it tunes by low-rank terms, and shifts the pictures by up to 3 pixels; here
there is one layer of a frozen network, and no shift. It fits codes of 256 values by epochs, here they are fitted by a
number of updates, so that 15 trials of a new subject are not over after one.

References
----------
Brain-IT, arXiv:2510.25976.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import load_tensors, write_tensors

_BATCH, _VOXELS = 32, 5000  # images of a batch, and voxels that are drawn for it
_LR, _COSINE = 1e-3, 0.1  # learning rate of Adam, and the weight of the cosine beside the squared error
_INIT = 0.1  # scale of new codes
_FILE, _CODES = "universal.safetensors", "codes of "
_PREDICTED_TOGETHER = 256  # images
_LARGEST_MIXTURE = 20_000  # voxels that a mixture is fitted on; all voxels are then assigned


@dataclass(frozen=True)
class PersonTrials:
    """Training trials of one subject, read some at a time.

    Parameters
    ----------
    n_trials
        Number of trials.
    read
        Returns responses of shape (n, n_voxels) and image tokens of shape (n, n_tokens, n_features) of some trials.
    """

    n_trials: int
    read: Callable[[np.ndarray], tuple[Tensor, Tensor]]


class UniversalEncoder(nn.Module):
    """Image tokens to responses of voxels that are known by their codes.

    Parameters
    ----------
    n_tokens, n_features
        Shape of the tokens of an image.
    code_size
        Values of a voxel's code.
    width
        Size that tokens are mapped to.
    dropout
        Within the network (0.25 in the paper).
    """

    def __init__(
        self, n_tokens: int, n_features: int, code_size: int, width: int, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.code_size = code_size
        scale = 1 / (2 * np.sqrt(code_size))
        self.position = nn.Parameter(scale * torch.randn(n_tokens, code_size))
        self.readout = nn.Parameter(scale * torch.randn(code_size, width))
        self.enter = nn.Sequential(nn.LayerNorm(n_features), nn.Linear(n_features, width))
        self.query, self.key = nn.Linear(code_size, code_size), nn.Linear(width, code_size)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(4 * width, width), nn.Dropout(dropout),
        )  # fmt: skip
        # It is fitted before the decoder and then stays: no gradient of a decoder reaches it.
        self.requires_grad_(False)

    def make_codes(self, n_voxels: int) -> Tensor:
        """Return new codes, shape (n_voxels, code_size)."""
        return _INIT / (2 * np.sqrt(self.code_size)) * torch.randn(n_voxels, self.code_size)

    def forward(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """Return responses of shape (n_images, n_voxels).

        Parameters
        ----------
        tokens : tensor of shape (n_images, n_tokens, n_features)
        codes : tensor of shape (n_voxels, code_size)
        """
        entered = self.enter(tokens)  # (n_images, n_tokens, width)
        keys = self.key(entered) + self.position  # (n_images, n_tokens, code_size)
        weights = (self.query(codes) @ keys.transpose(1, 2)).softmax(dim=-1)  # (n_images, n_voxels, n_tokens)
        seen = self.drop(self.norm(weights @ entered))  # (n_images, n_voxels, width)
        seen = seen + self.mlp(seen)
        return (seen * (codes @ self.readout)).sum(-1)

    def fit(
        self, people: Sequence[PersonTrials], codes: Sequence[Tensor], *, updates: int, frozen: bool = False
    ) -> list[Tensor]:
        """Fit the codes of all voxels, and the network unless it is `frozen`; draws come from torch's generator.

        Parameters
        ----------
        people
            Training trials of each subject.
        codes : tensors of shape (n_voxels, code_size)
            Where the codes of each subject's voxels start.
        updates
            Steps of the optimiser; each sees a batch of one subject, drawn by the numbers of trials.
        frozen
            Whether the weights of the network stay as they are.

        Returns
        -------
        list of tensors
            The fitted codes of each subject.
        """
        place = self.position.device
        own = [nn.Parameter(one.detach().clone().to(place)) for one in codes]
        weights = [] if frozen else list(self.parameters())
        share = torch.tensor([float(one.n_trials) for one in people])
        optimiser = torch.optim.Adam([*weights, *own], lr=_LR, amsgrad=True)
        self.train()
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for _ in range(updates):
                who = int(torch.multinomial(share, 1))
                rows = torch.randperm(people[who].n_trials)[:_BATCH].numpy()
                data, tokens = (part.to(place) for part in people[who].read(np.sort(rows)))
                voxels = torch.randperm(len(own[who]))[:_VOXELS].to(place)
                found, truth = self(tokens, own[who][voxels]), data[:, voxels]
                likeness = functional.cosine_similarity(found, truth).mean()
                loss = functional.mse_loss(found, truth) - _COSINE * likeness
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        self.requires_grad_(False).eval()
        return [one.detach() for one in own]

    def write(self, folder: Path, codes: Mapping[str, Tensor]) -> None:
        """Write the weights and the codes of each subject's voxels into a folder, which is made."""
        folder.mkdir(parents=True)
        tensors = {**self.state_dict(), **{f"{_CODES}{who}": own for who, own in codes.items()}}
        write_tensors(folder / _FILE, {name: one.cpu().contiguous() for name, one in tensors.items()})

    def read(self, folder: Path, n_voxels: Mapping[str, int]) -> list[Tensor] | None:
        """Take the weights from a folder and return the codes; None if the subjects or their voxels are others."""
        tensors = load_tensors(folder / _FILE, library="torch")
        codes = {
            name.removeprefix(_CODES): tensors.pop(name) for name in list(tensors) if name.startswith(_CODES)
        }
        if {who: len(own) for who, own in codes.items()} != dict(n_voxels):
            return None
        self.load_state_dict(tensors)
        self.eval()
        return [codes[who].to(self.position.device) for who in n_voxels]

    @torch.no_grad()
    def predict(self, images: np.ndarray, codes: Tensor) -> np.ndarray:
        """Return float32 responses of shape (n_images, n_voxels), some images and voxels at a time.

        Parameters
        ----------
        images : array of shape (n_images, n_tokens * n_features)
        codes : tensor of shape (n_voxels, code_size)
        """
        self.eval()
        predicted = np.empty((len(images), len(codes)), np.float32)
        for start in range(0, len(images), _PREDICTED_TOGETHER):
            some = slice(start, start + _PREDICTED_TOGETHER)
            tokens = torch.from_numpy(np.array(images[some], np.float32)).to(codes.device)
            tokens = tokens.unflatten(1, (len(self.position), -1))
            parts = [self(tokens, part) for part in codes.split(_VOXELS)]
            predicted[some] = torch.cat(parts, dim=1).cpu().numpy()
        return predicted


def group_codes(codes: Tensor, n_clusters: int, seed: int) -> np.ndarray:
    """Return the cluster of each voxel by a Gaussian mixture of unit-length codes.

    The covariances are full, as in the paper, where there are as many voxels per cluster as values of a code, else
    diagonal, since a full covariance of fewer points than dimensions is singular.

    Parameters
    ----------
    codes : tensor of shape (n_voxels, code_size)
        Those of all subjects together.
    n_clusters
        Components of the mixture.
    seed
        Of its start; the paper sets none.

    Returns
    -------
    int64 array of shape (n_voxels,)

    Raises
    ------
    DataError
        If there are fewer voxels than clusters.
    """
    from sklearn.mixture import GaussianMixture

    if len(codes) < n_clusters:
        raise DataError(
            f"{len(codes)} voxels of all training subjects cannot form {n_clusters} clusters; lower "
            "encoder.network.n_clusters."
        )
    unit = functional.normalize(codes.double().cpu(), dim=1).numpy()
    generator = np.random.default_rng(seed)
    some = unit if len(unit) <= _LARGEST_MIXTURE else generator.permutation(unit)[:_LARGEST_MIXTURE]
    kind = "full" if len(some) >= n_clusters * unit.shape[1] else "diag"
    mixture = GaussianMixture(n_clusters, covariance_type=kind, random_state=seed % 2**32)
    return np.asarray(mixture.fit(some).predict(unit), dtype=np.int64)


def find_nearest(codes: Tensor, known: Tensor) -> Tensor:
    """Return the row of the known code that is nearest to each code, both brought to length one."""
    unit, others = functional.normalize(codes, dim=1), functional.normalize(known, dim=1)
    # On the unit sphere the nearest by distance is the one with the largest product.
    return torch.cat([(some @ others.T).argmax(dim=1) for some in unit.split(_VOXELS)])
