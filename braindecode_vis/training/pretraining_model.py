"""The objectives of the parcel encoder without labels: masked patches, masked latents, and two windows of one person.

Owns which tokens are hidden, the light network that predicts them, and the three errors; all share one pass of the
encoder over the visible tokens. Channels that a recording lacks are neither seen nor predicted. Knows no files, no
steps and no data.

References
----------
He et al. (2022), arXiv:2111.06377 (masked autoencoders). Assran et al. (2023), arXiv:2301.08243 (I-JEPA: latents of
hidden places, predicted from visible ones, of an encoder that follows slowly). Bardes et al. (2024), arXiv:2404.08471
(V-JEPA). Dong et al. (2024), arXiv:2409.19407 (Brain-JEPA: the same over parcels x time, with whole parcels and whole
times hidden). van den Oord et al. (2018), arXiv:1807.03748 (InfoNCE). Fan et al. (2024), arXiv:2408.00759 (text-guided
masking of videos: the patches that match the caption are hidden).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import gather_rows, sum_processes
from braindecode_vis.encoders.parcels import ParcelEncoder, PlaceEmbedding, TransformerBlock

Normalisation = Literal["patch", "parcel"]
_HEADS = 4  # of the decoder and of the predictor
# Of run_contrast: what similarities are divided by, and size of the space that they are taken in.
_TEMPERATURE, _CONTRAST_WIDTH = 0.1, 128
PATCH_EPS = 1e-6  # as in the released code of He et al.
RIDGE = (
    0.1  # of the fits that say what a token matches, per trial; values of a token have about unit variance
)


@dataclass(frozen=True)
class PretrainingBatch:
    """Trials or windows on the device.

    Parameters
    ----------
    data : tensor of shape (batch, n_parcels) or (batch, n_parcels, n_times)
    interval : tensor of shape (batch,) or None
        Seconds between samples, where they differ between windows.
    observed : boolean tensor of shape (batch, n_parcels) or None
        Which parcels were recorded; None if all of them were.
    """

    data: Tensor
    interval: Tensor | None = None
    observed: Tensor | None = None


@dataclass(frozen=True)
class Mask:
    """Which tokens are seen and which are predicted.

    Parameters
    ----------
    order : integer tensor of shape (batch, n_tokens)
        A permutation of each trial's tokens: those that are seen, those that are hidden, those without data.
    n_visible
        Tokens that the encoder gets, the most that one trial has.
    first
        Place in the order from which tokens are predicted, the fewest visible ones of a trial.
    seen : boolean tensor of shape (batch, n_visible) or None
        Which of those that the encoder gets are seen; None if all are.
    hidden : boolean tensor of shape (batch, n_tokens - first) or None
        Which of the predicted ones count; None if all do.
    present : boolean tensor of shape (batch, n_tokens) or None
        Which have data; None if all have.
    """

    order: Tensor
    n_visible: int
    first: int
    seen: Tensor | None = None
    hidden: Tensor | None = None
    present: Tensor | None = None


def count_visible(n_tokens: int, mask_ratio: float) -> int:
    """Return the number of visible tokens.

    Raises
    ------
    ConfigError
        If the ratio hides all tokens or none.
    """
    n_visible = round(n_tokens * (1 - mask_ratio))
    if not 0 < n_visible < n_tokens:
        raise ConfigError(
            f"pretrain.mask_ratio = {mask_ratio} leaves {n_visible} of {n_tokens} tokens visible; at "
            "least one must be visible and one masked."
        )
    return n_visible


def draw_ranks(
    n: int, n_parcels: int, n_patches: int, style: str, generator: torch.Generator | None = None
) -> Tensor:
    """Return a random number per token, shape (n, n_tokens): the smallest ones are seen.

    Parameters
    ----------
    n
        Number of trials.
    n_parcels, n_patches
        Of a trial.
    style
        ``tokens``, ``parcels``, ``times`` or ``mixed``, see `PretrainConfig`.
    generator
        On the CPU; torch's global one by default.
    """
    ranks = torch.rand(n, n_parcels * n_patches, generator=generator)
    if style == "tokens":
        return ranks
    grid = ranks.view(n, n_parcels, n_patches)
    # One number for all tokens of a parcel or of a time; what is left of their own only breaks ties.
    whole = {
        "parcels": torch.rand(n, n_parcels, 1, generator=generator) + 1e-6 * grid,
        "times": torch.rand(n, 1, n_patches, generator=generator) + 1e-6 * grid,
    }
    if style != "mixed":
        return whole[style].flatten(1)
    lot = torch.randint(3, (n, 1, 1), generator=generator)
    return torch.where(lot == 0, grid, torch.where(lot == 1, whole["parcels"], whole["times"])).flatten(1)


def make_mask(ranks: Tensor, mask_ratio: float, observed: Tensor | None = None) -> Mask:
    """Return the mask of some trials; of each, the same share of the tokens that have data is hidden.

    Parameters
    ----------
    ranks : tensor of shape (batch, n_tokens)
        From `draw_ranks`.
    mask_ratio
        Share that is hidden.
    observed : boolean tensor of shape (batch, n_parcels), optional
        Which parcels have data.
    """
    n_tokens = ranks.shape[1]
    n_visible = count_visible(n_tokens, mask_ratio)
    if observed is None:
        return Mask(ranks.argsort(dim=1), n_visible, n_visible)
    there = observed.repeat_interleave(n_tokens // observed.shape[1], dim=1)  # (batch, n_tokens)
    order = torch.where(there, ranks, ranks + 2).argsort(dim=1)  # ranks lie below 2
    count = there.sum(dim=1, keepdim=True)
    visible = (count * (1 - mask_ratio)).round().clamp(min=1).minimum((count - 1).clamp(min=1))
    most, least = int(visible.max()), int(visible.min())
    place = torch.arange(n_tokens, device=ranks.device)
    return Mask(
        order, most, least,
        seen=place[:most] < visible,
        hidden=(place[least:] >= visible) & (place[least:] < count),
        present=place < count,
    )  # fmt: skip


@dataclass(frozen=True)
class TokenMatch:
    """How well each token of a trial matches what was seen: the vector read from it alone against that of the image.

    Parameters
    ----------
    weights : tensor of shape (n_tokens, patch_times, n_components)
        Ridge from the standardised values of each token to the vectors.
    mean : tensor of shape (n_tokens, patch_times)
        Of those values over the trials of the fit.
    """

    weights: Tensor
    mean: Tensor

    def measure(self, patches: Tensor, vectors: Tensor) -> Tensor:
        """Return the cosine of each token's reading with the vector, shape (batch, n_tokens).

        Parameters
        ----------
        patches : tensor of shape (batch, n_tokens, patch_times)
        vectors : tensor of shape (batch, n_components)
        """
        read = torch.einsum("btl,tlk->btk", patches - self.mean, self.weights)
        return functional.cosine_similarity(read, vectors[:, None], dim=-1)


def reduce_vectors(vectors: np.ndarray, n_components: int) -> np.ndarray:
    """Return the scores of the first principal components, float32 of shape (n_images, at most n_components).

    Parameters
    ----------
    vectors : array of shape (n_images, n_features)
    n_components
        Most of them; fewer where the vectors do not vary in more directions.

    Raises
    ------
    DataError
        If all vectors are alike.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    # By the smaller of the two: images are thousands, values of layers hundreds of thousands.
    wide = centred.shape[1] > len(centred)
    values, axes = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    kept = np.argsort(values)[::-1][:n_components]
    kept = kept[values[kept] > 1e-10 * max(float(values.max()), 1e-300)]
    if not len(kept):
        raise DataError(
            "the vectors of pretrain.guide are all equal, so no token matches one better than another."
        )
    scores = axes[:, kept] * np.sqrt(values[kept]) if wide else centred @ axes[:, kept]
    return np.asarray(scores, np.float32)


def fit_match(parts: Iterable[tuple[Tensor, np.ndarray]], device: torch.device) -> TokenMatch:
    """Return the fit of a ridge from each token alone to the vectors of the images, in one pass over the trials.

    Parameters
    ----------
    parts
        Of some trials each: patches, a tensor of shape (n, n_tokens, patch_times), and vectors, (n, n_components).
        Several processes each give their share.
    device
        Where the fit will be used.
    """
    n, sums = 0.0, None
    for patches, vectors in parts:
        x, z = patches.double().cpu().numpy(), np.asarray(vectors, np.float64)
        new = [
            x.sum(axis=0), z.sum(axis=0), np.einsum("ntl,ntm->tlm", x, x), np.einsum("ntl,nk->tlk", x, z)
        ]  # fmt: skip
        n, sums = n + len(x), new if sums is None else [a + b for a, b in zip(sums, new, strict=True)]
    assert sums is not None
    n = float(sum_processes(n))
    x_sum, z_sum, squares, products = (np.asarray(sum_processes(part)) for part in sums)
    mean = x_sum / n
    squares = squares / n - mean[:, :, None] * mean[:, None]  # (n_tokens, patch_times, patch_times)
    products = products / n - mean[:, :, None] * (z_sum / n)
    weights = np.linalg.solve(squares + RIDGE * np.eye(mean.shape[1]), products)
    made = [torch.as_tensor(part, dtype=torch.float32, device=device) for part in (weights, mean)]
    return TokenMatch(made[0], made[1])


def rank_by_match(match: Tensor, ranks: Tensor, n_parcels: int, style: str) -> Tensor:
    """Return numbers like those of `draw_ranks`, under which the tokens that match most are hidden first.

    Parameters
    ----------
    match : tensor of shape (n, n_tokens)
        From `TokenMatch`.
    ranks : tensor of shape (n, n_tokens)
        Drawn ones, which break ties.
    n_parcels
        Of a trial.
    style
        ``tokens``, or the mean of whole ``parcels`` or ``times``.
    """
    grid = match.view(len(match), n_parcels, -1)
    if style != "tokens":
        grid = grid.mean(dim=2 if style == "parcels" else 1, keepdim=True).expand_as(grid)
    return grid.flatten(1) + 1e-6 * ranks


class TokenPredictor(nn.Module):
    """A light transformer that predicts something of each hidden token from the visible ones.

    Parameters
    ----------
    encoder
        Whose tokens are read; of the same places.
    width, depth
        Size of the transformer.
    n_outputs
        Numbers that are predicted for a token.
    """

    def __init__(self, encoder: ParcelEncoder, *, width: int, depth: int, n_outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(encoder.cls.shape[0], width)
        self.hidden_token = nn.Parameter(torch.randn(width) * 0.02)
        self.place: PlaceEmbedding = encoder.make_places(width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, _HEADS, encoder.mlp_ratio, encoder.dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, n_outputs)

    def forward(self, context: Tensor, mask: Mask, n_patches: int, interval: Tensor | None = None) -> Tensor:
        """Return predictions, shape (batch, n_tokens - mask.first, n_outputs).

        Parameters
        ----------
        context : tensor of shape (batch, 1 + n_visible, width of the encoder)
            What the encoder made of the visible tokens.
        mask
            Which tokens those are.
        n_patches, interval
            As for `PlaceEmbedding`.
        """
        seen = self.reduce(context)
        n, n_tokens = mask.order.shape
        visible = seen[:, 1:]
        if mask.seen is not None:
            visible = torch.where(mask.seen[..., None], visible, self.hidden_token)
        blank = self.hidden_token.expand(n, n_tokens - mask.n_visible, -1)
        place = self.place(n_patches, interval)
        if place.dim() == 2:
            place = place[mask.order]  # (batch, n_tokens, width), in the order of the permutation
        else:
            place = place.gather(1, mask.order[..., None].expand(-1, -1, place.shape[-1]))
        # The extra token has no place in cortex or time, so that it joins after places were added.
        tokens = torch.cat([visible, blank.to(visible.dtype)], dim=1) + place
        tokens = torch.cat([seen[:, :1], tokens.to(seen.dtype)], dim=1)  # batch, 1 + n_tokens, width
        kept = None if mask.present is None else functional.pad(mask.present, (1, 0), value=True)
        for block in self.blocks:
            tokens = block(tokens, kept)
        return self.predict(self.norm(tokens[:, 1 + mask.first :]))


class SelfSupervised(nn.Module):
    """The encoder with all that it learns by.

    Parameters
    ----------
    encoder
        Learns with the rest.
    objectives
        Of ``masked``, ``jepa`` and ``run_contrast``.
    decoder_width, decoder_depth
        Size of the decoder and of the predictor.
    normalisation
        What the decoder predicts: ``patch``, the patch with its own mean and variance removed, or ``parcel``, the
        patch standardised by the parcel's training statistics (for patches of few samples, whose own variance says
        nothing).
    """

    def __init__(
        self,
        encoder: ParcelEncoder,
        *,
        objectives: Collection[str] = ("masked",),
        decoder_width: int,
        decoder_depth: int,
        normalisation: Normalisation = "parcel",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalisation = normalisation
        width = encoder.cls.shape[0]

        def make_predictor(n_outputs: int) -> TokenPredictor:
            return TokenPredictor(encoder, width=decoder_width, depth=decoder_depth, n_outputs=n_outputs)

        self.decoder = make_predictor(encoder.patch_times) if "masked" in objectives else None
        self.predictor, self.teacher = None, None
        if "jepa" in objectives:
            self.predictor = make_predictor(width)
            self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.head: nn.Sequential | None = None
        if "run_contrast" in objectives:
            self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, _CONTRAST_WIDTH))

    @property
    def written(self) -> ParcelEncoder:
        """The encoder that is written: the teacher where there is one, as I-JEPA evaluates it."""
        return self.encoder if self.teacher is None else self.teacher

    def meet_teacher(self) -> None:
        """Make the teacher what the encoder is now."""
        if self.teacher is not None:
            self.teacher.load_state_dict(self.encoder.state_dict())

    def follow(self, decay: float) -> None:
        """Move the teacher toward the encoder; `decay` is the share that stays."""
        if self.teacher is None:
            return
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.teacher.parameters()), [p.detach() for p in self.encoder.parameters()], 1 - decay
            )

    def forward(
        self,
        batch: PretrainingBatch,
        mask: Mask,
        partner: tuple[PretrainingBatch, Mask] | None = None,
        person: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the errors by objective: of each trial, shape (batch,), and one number for ``run_contrast``.

        Parameters
        ----------
        batch, mask
            Trials, and which of their tokens are seen.
        partner
            Of each trial another window of the same person; only ``run_contrast`` looks at it.
        person : integer tensor of shape (batch,)
            Of whom each trial is.
        counts : tensor of shape (batch,), optional
            0 for trials that only fill up a share of several processes.
        """
        context = self.encoder(
            batch.data, mask.order[:, : mask.n_visible], interval=batch.interval, kept=mask.seen
        )
        n_patches = mask.order.shape[1] // self.encoder.n_parcels
        errors: dict[str, Tensor] = {}
        if self.decoder is not None:
            predicted = self.decoder(context, mask, n_patches, batch.interval)
            wanted = take_hidden(self.make_targets(batch.data), mask)
            # visible tokens carry no loss, as in He et al.
            errors["masked"] = average_hidden((predicted - wanted).square(), mask)
        if self.predictor is not None:
            predicted = self.predictor(context, mask, n_patches, batch.interval)
            wanted = take_hidden(self.make_latents(batch), mask)
            errors["jepa"] = average_hidden(
                functional.smooth_l1_loss(predicted, wanted, reduction="none"), mask
            )
            if not self.training:
                # What the mean of a window's hidden latents would get; it falls to zero where the teacher collapses.
                weight = 1.0 if mask.hidden is None else mask.hidden[..., None].to(wanted.dtype)
                share = (wanted * weight).sum(dim=1, keepdim=True)
                n_hidden = wanted.shape[1] if mask.hidden is None else mask.hidden.sum(dim=1)[:, None, None]
                plain = functional.smooth_l1_loss(
                    (share / n_hidden).expand_as(wanted), wanted, reduction="none"
                )
                errors["jepa_of_mean"] = average_hidden(plain, mask)
        if self.head is not None and partner is not None:
            assert person is not None
            other, other_mask = partner
            tokens = self.encoder(
                other.data, other_mask.order[:, : other_mask.n_visible], interval=other.interval,
                kept=other_mask.seen,
            )  # fmt: skip
            pair = (self.head(pool(context, mask.seen)), self.head(pool(tokens, other_mask.seen)))
            errors["run_contrast"] = contrast(*pair, person, _TEMPERATURE, counts)
        return errors

    def make_latents(self, batch: PretrainingBatch) -> Tensor:
        """Return what the teacher, which sees every token that has data, makes of each: (batch, n_tokens, width)."""
        assert self.teacher is not None
        self.teacher.eval()
        kept = None
        if batch.observed is not None:
            n_patches = batch.data[0].numel() // (self.encoder.n_parcels * self.encoder.patch_times)
            kept = batch.observed.repeat_interleave(n_patches, dim=1)
        with torch.no_grad():
            tokens = self.teacher(batch.data, interval=batch.interval, kept=kept)[:, 1:]
        # each latent with its own mean and variance removed, as in I-JEPA
        return functional.layer_norm(tokens.float(), tokens.shape[-1:])

    def make_targets(self, data: Tensor) -> Tensor:
        """Return what the decoder has to predict, shape (batch, n_tokens, patch_times)."""
        patches = self.encoder.cut_patches(data)
        if self.normalisation == "parcel":
            return patches
        centred = patches - patches.mean(dim=-1, keepdim=True)
        return centred / (patches.var(dim=-1, keepdim=True, unbiased=False) + PATCH_EPS).sqrt()


def pool(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """Return the mean of the tokens without the extra one, of those `kept`: (batch, width)."""
    if kept is None:
        return tokens[:, 1:].mean(dim=1)
    weight = kept[..., None].to(tokens.dtype)
    return (tokens[:, 1:] * weight).sum(dim=1) / weight.sum(dim=1)


def contrast(
    one: Tensor, other: Tensor, person: Tensor, temperature: float, counts: Tensor | None = None
) -> Tensor:
    """Return InfoNCE over the rows of all processes, both ways; windows of one person are no negatives of each other.

    Parameters
    ----------
    one, other : tensors of shape (batch, width)
        Two windows of the same person in each row.
    person : integer tensor of shape (batch,)
    temperature
        What cosines are divided by.
    counts : tensor of shape (batch,), optional
        0 for rows that count for nothing.
    """
    one, other = (gather_rows(functional.normalize(x.float(), dim=-1)) for x in (one, other))
    person = gather_rows(person)
    counts = torch.ones_like(one[:, 0]) if counts is None else gather_rows(counts.to(one.dtype))
    # Of the same person, or no row at all: neither a positive nor a negative.
    left_out = (person[:, None] == person[None]) | (counts[None] == 0)
    left_out.fill_diagonal_(False)
    similarity = one @ other.T / temperature
    places = torch.arange(len(one), device=one.device)
    losses = [
        functional.cross_entropy(s.masked_fill(left_out, -torch.inf), places, reduction="none")
        for s in (similarity, similarity.T)
    ]
    return ((losses[0] + losses[1]) / 2 * counts).sum() / counts.sum()


def take_hidden(tokens: Tensor, mask: Mask) -> Tensor:
    """Return the predicted ones of all tokens, (batch, n_tokens - mask.first, n), in the order of the mask."""
    places = mask.order[:, mask.first :]
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def average_hidden(errors: Tensor, mask: Mask) -> Tensor:
    """Return the mean over the hidden tokens of each trial, shape (batch,)."""
    if mask.hidden is None:
        return errors.mean(dim=(1, 2))
    errors = errors.mean(dim=2) * mask.hidden
    return errors.sum(dim=1) / mask.hidden.sum(dim=1).clamp(min=1)
