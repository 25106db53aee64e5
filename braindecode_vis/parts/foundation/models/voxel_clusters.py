"""Brain-IT's transformer: voxels with learned codes form clusters that all subjects share, whose tokens are decoded.

Each subject has a code per voxel, and the cluster of each voxel; everything else is shared. One layer of graph
attention gathers the voxels of each cluster into a token, and tokens of the output ask these by cross-attention. A new
subject gets cluster and code of the nearest known voxel and then trains its codes alone (`NetworkEncoder.adapt`). Which
voxels are near is known from their codes in a `UniversalEncoder`, which `VoxelClusters.prepare` fits before the
decoder. The decoder's codes start as a random map of those codes, so that voxels that respond alike start alike (a
choice of ours; the paper's start at random).

References
----------
Brain-IT, arXiv:2510.25976. Shi et al. (2021), arXiv:2009.03509 (graph attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.devices import choose_device, seeded
from braindecode_vis.encoders.mindeye import apply_by_subject, check_request, get_token_size
from braindecode_vis.encoders.parcels import TransformerBlock
from braindecode_vis.encoders.signal import Signal, TrialPairs
from braindecode_vis.parts.foundation.models.universal_encoder import (
    PersonTrials,
    UniversalEncoder,
    find_nearest,
    group_codes,
)

_MLP_RATIO = 4.0
_INIT = 0.1  # scale of codes


class Voxels(nn.Module):
    """The voxels of one subject.

    Parameters
    ----------
    n_voxels, width
        Number of voxels, and size of the code that the decoder learns.
    code_size
        Size of the code in the universal encoder.
    n_clusters
        Clusters, through which voxels go in turn before they are prepared.

    Attributes
    ----------
    codes : parameter of shape (n_voxels, width)
    place : tensor of shape (n_voxels, code_size)
        Codes in the universal encoder.
    cluster : integer tensor of shape (n_voxels,)
    """

    place: Tensor
    cluster: Tensor

    def __init__(self, n_voxels: int, width: int, code_size: int, n_clusters: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(n_voxels, width) / math.sqrt(width))
        self.register_buffer("place", torch.zeros(n_voxels, code_size))
        self.register_buffer("cluster", torch.arange(n_voxels) % n_clusters)

    @property
    def is_prepared(self) -> bool:
        """Whether the voxels have their places, and so their clusters."""
        return bool(self.place.any())


class VoxelClusters(nn.Module):
    """The transformer and the universal encoder whose codes form its clusters.

    Parameters
    ----------
    signal
        Trials of voxels or parcels; rows are padded where subjects have different numbers of voxels.
    n_outputs
        Size of the output, all tokens together.
    n_tokens, n_clusters, width, depth, n_heads
        As in `VoxelClustersConfig`.
    code_sizes
        Sizes of a voxel's code and of an image token in the universal encoder.
    updates
        Steps of its fit to all training subjects, and to the voxels of a new one.
    """

    def __init__(
        self,
        signal: Signal,
        n_outputs: int,
        *,
        n_tokens: int,
        n_clusters: int,
        width: int,
        depth: int,
        n_heads: int,
        code_sizes: tuple[int, int],
        updates: tuple[int, int],
    ) -> None:
        super().__init__()
        check_request(signal, "one", None)
        self.signal, self.n_tokens, self.n_clusters = signal, n_tokens, n_clusters
        self.updates, self.new_updates = updates
        size = get_token_size(n_outputs, n_tokens)
        n_rest = math.prod(signal.shape[1:])  # a time axis gives each voxel that many values
        own = signal.n_voxels or (signal.shape[0],) * len(signal.subjects)
        self.centres = nn.Parameter(_draw_codes(self.n_clusters, width))
        self.gather = ClusterAttention(width)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(_draw_codes(self.n_tokens, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, n_heads, _MLP_RATIO, 0.0) for _ in range(depth))
        self.crosses = nn.ModuleList(CrossBlock(width, n_heads) for _ in range(depth + 1))
        self.last = nn.Linear(width, size)
        self.universal = UniversalEncoder(n_tokens, size, *code_sizes)
        # Last, so that weights of the shared parts do not depend on the number of subjects.
        self.subjects = nn.ModuleList(Voxels(n * n_rest, width, code_sizes[0], n_clusters) for n in own)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output of each trial, shape (batch, n_outputs).

        Parameters
        ----------
        data : tensor of shape (batch, n_voxels) or (batch, n_voxels, n_times)
            Rows padded to the largest number of voxels.
        subject : integer tensor of shape (batch,)

        Raises
        ------
        DataError
            If a trial is of an unknown subject.
        """
        tokens = apply_by_subject(self._gather, data.flatten(1), subject, self.signal)
        tokens = self.norm(tokens.relu())  # (batch, n_clusters, width)
        found = self.queries.expand(len(tokens), -1, -1)
        found = found + self.crosses[0](tokens, found)
        for block, cross in zip(self.blocks, list(self.crosses)[1:], strict=True):
            tokens = block(tokens)
            found = found + cross(tokens, found)
        return self.last(found).flatten(1)  # (batch, n_tokens, size) -> (batch, n_outputs)

    def _gather(self, number: int, rows: Tensor) -> Tensor:
        own = cast(Voxels, self.subjects[number])
        return self.gather(rows[:, : len(own.codes)], own.codes, own.cluster, self.centres)

    def prepare(self, trials: TrialPairs) -> None:
        """Give voxels that have none their codes in the universal encoder, and their clusters.

        The first training fits the universal encoder, and a mixture of the codes of all its subjects gives the
        clusters. Later, with the universal encoder frozen, voxels of new subjects take cluster and decoder's code of
        the nearest voxel that was there before. A universal encoder that `fit_universal` has fitted to the same trials
        is read instead, if the voxels are the same.

        Parameters
        ----------
        trials
            Training trials of all new subjects, those that are measured and no others.

        Raises
        ------
        DataError
            If there are too few voxels, or the targets are of another size than the output.
        """
        everyone = [cast(Voxels, one) for one in self.subjects]
        new = [number for number, one in enumerate(everyone) if not one.is_prepared]
        known = [one for one in everyone if one.is_prepared]
        if not new:
            return
        people = [self._pick(trials, number) for number in new]
        counts = {self.signal.subjects[number]: len(everyone[number].codes) for number in new}
        codes = None if known or trials.fitted is None else self.universal.read(trials.fitted, counts)
        if codes is None:
            codes = self.universal.fit(
                people, [self.universal.make_codes(n) for n in counts.values()], frozen=bool(known),
                updates=self.new_updates if known else self.updates,
            )  # fmt: skip
        if known:
            places = torch.cat([one.place for one in known])
            for number, place in zip(new, codes, strict=True):
                nearest, voxels = find_nearest(place, places), everyone[number]
                voxels.cluster.copy_(torch.cat([one.cluster for one in known])[nearest])
                voxels.codes.data.copy_(torch.cat([one.codes.data for one in known])[nearest])
        else:
            seed = int(torch.randint(2**31, ()))
            clusters = torch.from_numpy(group_codes(torch.cat(codes), self.n_clusters, seed))
            start = torch.randn(codes[0].shape[1], self.centres.shape[1]) / math.sqrt(self.centres.shape[1])
            parts = clusters.split([len(one) for one in codes])
            for number, own, place in zip(new, parts, codes, strict=True):
                everyone[number].cluster.copy_(own)
                everyone[number].codes.data.copy_(
                    nn.functional.normalize(place, dim=1) @ start.to(place.device)
                )
        for number, place in zip(new, codes, strict=True):
            everyone[number].place.copy_(place)

    def _pick(self, trials: TrialPairs, number: int) -> PersonTrials:
        """Return the trials of a subject as the universal encoder reads them."""
        n_outputs = self.n_tokens * self.last.out_features

        def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            data, targets = trials.read(rows)
            if targets.shape[1] != n_outputs:
                raise ConfigError(
                    f"voxel_clusters predicts the target itself, which has {targets.shape[1]} values, but is asked "
                    f"for {n_outputs}; leave out encoder.projector and encoder.fusion."
                )
            return data, targets

        n_voxels = len(cast(Voxels, self.subjects[number]).codes)
        return read_person(replace(trials, read=read), number, n_voxels, self.n_tokens)


def read_person(trials: TrialPairs, number: int, n_voxels: int, n_tokens: int) -> PersonTrials:
    """Return the trials of a subject as a universal encoder reads them."""
    rows = np.flatnonzero(trials.subject == number)

    def read(some: np.ndarray) -> tuple[Tensor, Tensor]:
        data, targets = map(torch.from_numpy, trials.read(rows[some]))
        return data.flatten(1)[:, :n_voxels], targets.unflatten(1, (n_tokens, -1))

    return PersonTrials(len(rows), read)


def fit_universal(
    n_features: Mapping[str, int],
    trials: TrialPairs,
    seed: int,
    folder: Path,
    *,
    n_tokens: int,
    code_sizes: tuple[int, int],
    updates: int,
) -> Callable[[int, np.ndarray], np.ndarray]:
    """Fit a universal encoder alone and return what predicts responses with it; see `NetworkSettings.fit_responses`."""
    n_values = trials.read(np.arange(1))[1].shape[1]
    size = get_token_size(n_values, n_tokens)
    with seeded(seed):
        universal = UniversalEncoder(n_tokens, size, *code_sizes)
        universal.to(choose_device("auto", setting="encoder.device"))
        people = [read_person(trials, who, n, n_tokens) for who, n in enumerate(n_features.values())]
        codes = universal.fit(people, [universal.make_codes(n) for n in n_features.values()], updates=updates)
    universal.write(folder, dict(zip(n_features, codes, strict=True)))
    return lambda who, images: universal.predict(images, codes[who])


class ClusterAttention(nn.Module):
    """One head of graph attention from the voxels of each cluster to its token.

    A voxel's features are its response times its code, and the query of a cluster is the same in every trial. The score
    of a voxel is therefore its response times one number, and the values of a cluster's voxels are weighted sums of
    their mapped codes: nothing of size trials x voxels x width is ever made.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.skip = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, rows: Tensor, codes: Tensor, cluster: Tensor, centres: Tensor) -> Tensor:
        """Return a token of each cluster, shape (batch, n_clusters, width); one without voxels has no values.

        Parameters
        ----------
        rows : tensor of shape (batch, n_voxels)
        codes : tensor of shape (n_voxels, width)
        cluster : integer tensor of shape (n_voxels,)
        centres : tensor of shape (n_clusters, width)
        """
        order = cluster.argsort(stable=True)
        own = cluster[order]
        counts = torch.bincount(own, minlength=len(centres)).tolist()
        sorted_codes, sorted_rows = codes[order], rows[:, order]
        # A bias of the keys would move all scores of a query alike, which the softmax does not see.
        strength = (self.query(centres)[own] * self.key(sorted_codes)).sum(1) / math.sqrt(codes.shape[1])
        values = nn.functional.linear(sorted_codes, self.value.weight)  # (n_voxels, width)
        gathered = [
            (score.softmax(dim=1) * response) @ value + self.value.bias
            if len(value)
            else rows.new_zeros(len(rows), centres.shape[1])
            for score, response, value in zip(
                (sorted_rows * strength).split(counts, dim=1), sorted_rows.split(counts, dim=1),
                values.split(counts), strict=True,
            )
        ]  # fmt: skip
        return torch.stack(gathered, dim=1) + self.skip(centres)


class CrossBlock(nn.Module):
    """What tokens that ask get from others: cross-attention, then a feed-forward layer around a skip connection."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.key_value, self.out = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width)
        hidden = round(width * _MLP_RATIO)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """Return one vector per query, shape (batch, n_queries, width), for tokens (batch, n_tokens, width)."""
        heads = (self.n_heads, -1)
        # The paper's queries are the tokens themselves, without a map and a norm.
        query = queries.unflatten(2, heads).transpose(1, 2)
        key, value = (
            part.unflatten(2, heads).transpose(1, 2)
            for part in self.key_value(self.norm1(tokens)).chunk(2, 2)
        )
        mixed = nn.functional.scaled_dot_product_attention(query.to(key.dtype), key, value)
        found = self.out(mixed.transpose(1, 2).flatten(2))
        return found + self.mlp(self.norm2(found))


def _draw_codes(n: int, width: int) -> Tensor:
    """Return first codes of clusters or of output tokens, at the paper's scale."""
    return _INIT / (2 * math.sqrt(width)) * torch.randn(n, width)
