"""Networks that turn embeddings into words: ATM's projector onto the tokens of GIT, and a small decoder as in CoCa.

Owns the two networks, the losses of the second, and the loop that trains either on rows of training images. Every epoch
draws from its own named seed, so that a training that was killed goes on from its checkpoint to the same weights. Words
are numbers here; which word a number stands for is known by those who give them.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721, appendix C.4; Yu et al. (2022), CoCa, arXiv:2205.01917; Ma et al. (2024),
SyCoCa, arXiv:2401.02137.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from braindecode_vis.base.contracts import Progress
from braindecode_vis.base.devices import seeded
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.embeddings.caption_bank import END, PAD, START
from braindecode_vis.training.optimisation import (
    compute_warm_cosine,
    list_shapes,
    optimise,
    pack_optimiser,
    read_checkpoint,
    take,
    unpack_optimiser,
    write_checkpoint,
)

CHECKPOINT = "captions_checkpoint.safetensors"
_LOG_SCALE, MOST_SCALE = math.log(1 / 0.07), 100.0  # CLIP's start and bound of the learnt temperature


class TokenProjector(nn.Module):
    """ATM's map from one vector to the image tokens of GIT.

    Every feature becomes a value for each token by one linear map that all features share; then each token is mapped
    linearly. A layer norm follows each step.

    Parameters
    ----------
    n_features
        Size of the embedding.
    n_tokens, token_width
        Image tokens of GIT (257 x 1024).
    """

    def __init__(self, n_features: int, n_tokens: int, token_width: int) -> None:
        super().__init__()
        self.spread, self.spread_norm = nn.Linear(1, n_tokens), nn.LayerNorm(n_tokens)
        self.mix, self.mix_norm = nn.Linear(n_features, token_width), nn.LayerNorm(token_width)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return tokens of shape (n, n_tokens, token_width) for vectors of shape (n, n_features)."""
        # (n, n_features, 1) to (n, n_features, n_tokens) to (n, n_tokens, n_features)
        spread = self.spread_norm(self.spread(vectors[..., None])).transpose(1, 2)
        return self.mix_norm(self.mix(spread))


@dataclass(frozen=True)
class CaptionSizes:
    """Sizes of a `CaptionNetwork`.

    Parameters
    ----------
    n_tokens, n_features
        Vectors of an embedding, and values of each.
    n_words
        Words, the special ones included.
    max_words
        Longest caption.
    width, depth, heads, n_queries, dropout
        See `CocaCaptionsConfig`.
    """

    n_tokens: int
    n_features: int
    n_words: int
    max_words: int
    width: int
    depth: int
    heads: int
    n_queries: int
    dropout: float


class CaptionNetwork(nn.Module):
    """CoCa's text side on a frozen image embedding: layers that read words, layers that look at the embedding too.

    Parameters
    ----------
    sizes
        Of everything.
    rebuilds
        Whether there is a decoder of patches, for SyCoCa's term.
    """

    def __init__(self, sizes: CaptionSizes, *, rebuilds: bool = False) -> None:
        super().__init__()
        width, n_upper = sizes.width, sizes.depth - sizes.depth // 2
        self.sizes = sizes
        layer: dict[str, Any] = {
            "d_model": width, "nhead": sizes.heads, "dim_feedforward": 4 * width, "dropout": sizes.dropout,
            "activation": "gelu", "batch_first": True, "norm_first": True,
        }  # fmt: skip
        self.words = nn.Embedding(sizes.n_words, width, padding_idx=PAD)
        nn.init.normal_(self.words.weight, std=0.02)
        self.places = nn.Parameter(torch.randn(sizes.max_words + 2, width) * 0.02)
        self.summary = nn.Parameter(torch.randn(width) * 0.02)
        self.lower = nn.ModuleList([nn.TransformerEncoderLayer(**layer) for _ in range(sizes.depth // 2)])
        self.upper = nn.ModuleList([nn.TransformerDecoderLayer(**layer) for _ in range(n_upper)])
        self.norm, self.text_out = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        self.image_out = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(_LOG_SCALE))
        self.memory_norm = nn.LayerNorm(width)
        if sizes.n_tokens > 1:
            # CoCa's pooler: queries look at the tokens, one of them for the comparison with texts.
            self.project = nn.Linear(sizes.n_features, width)
            self.queries = nn.Parameter(torch.randn(sizes.n_queries + 1, width) * 0.02)
            self.pooler = nn.MultiheadAttention(width, sizes.heads, batch_first=True)
        else:
            # On one vector, attention has nothing to choose from; each query is a linear map of it.
            self.expand = nn.Linear(sizes.n_features, (sizes.n_queries + 1) * width)
        if rebuilds:
            self.hidden_patch = nn.Parameter(torch.randn(width) * 0.02)
            self.rebuilder = nn.TransformerDecoderLayer(**layer)
            self.patch_out = nn.Linear(width, sizes.n_features)

    def pool(self, embeddings: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what the decoder looks at, shape (n, n_queries, width), and unit vectors that meet texts.

        Parameters
        ----------
        embeddings : tensor of shape (n, n_tokens, n_features)
        hidden : bool tensor of shape (n, n_tokens), optional
            Tokens that are not looked at.
        """
        if self.sizes.n_tokens > 1:
            tokens = self.project(embeddings)
            pooled, _ = self.pooler(
                self.queries.expand(len(tokens), -1, -1), tokens, tokens, key_padding_mask=hidden,
                need_weights=False,
            )  # fmt: skip
        else:
            pooled = self.expand(embeddings[:, 0]).reshape(len(embeddings), -1, self.sizes.width)
        return self.memory_norm(pooled[:, 1:]), F.normalize(self.image_out(pooled[:, 0]), dim=-1)

    def place_tokens(self, embeddings: Tensor) -> Tensor:
        """Return a unit vector of each token that meets texts, shape (n, n_tokens, width)."""
        return F.normalize(self.image_out(self.project(embeddings)), dim=-1)

    def read(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states of words, shape (n, n_words, width), and the unit vector of each text.

        Parameters
        ----------
        words : int tensor of shape (n, n_words)
            Numbers of words, padded; each word sees those before it, and the summary at the end sees all of them.
        """
        n, length = words.shape
        states = self.words(words) + self.places[:length]
        states = torch.cat([states, self.summary.expand(n, 1, -1)], dim=1)  # (n, n_words + 1, width)
        later = _make_causal_mask(length + 1, words.device)
        hidden = torch.cat([words == PAD, torch.zeros_like(words[:, :1], dtype=torch.bool)], dim=1)
        for layer in self.lower:
            states = layer(states, src_mask=later, src_key_padding_mask=hidden)
        return states[:, :-1], F.normalize(self.text_out(self.norm(states[:, -1])), dim=-1)

    def write(self, states: Tensor, memory: Tensor) -> Tensor:
        """Return logits of the word that follows each, shape (n, n_words, number of words)."""
        later = _make_causal_mask(states.shape[1], states.device)
        for layer in self.upper:
            states = layer(states, memory, tgt_mask=later)
        return self.norm(states) @ self.words.weight.T

    def compute_losses(self, embeddings: Tensor, words: Tensor, same: Tensor) -> dict[str, Tensor]:
        """Return the terms ``contrastive`` and ``captioning``, and ``masked`` where patches are rebuilt.

        Parameters
        ----------
        embeddings : tensor of shape (n, n_tokens, n_features)
        words : int tensor of shape (n, n_words)
            With start and end, padded.
        same : bool tensor of shape (n, n)
            Rows with equal captions, which are no negatives of each other.
        """
        memory, image = self.pool(embeddings)
        states, text = self.read(words[:, :-1])
        logits = self.write(states, memory)
        terms = {
            "captioning": compute_word_loss(logits, words[:, 1:]),
            "contrastive": compare_texts(image, text, self.log_scale.exp().clamp(max=MOST_SCALE), same),
        }
        if hasattr(self, "rebuilder"):
            terms["masked"] = self._rebuild(embeddings, states, text, words[:, :-1] == PAD)
        return terms

    def _rebuild(self, embeddings: Tensor, states: Tensor, text: Tensor, hidden: Tensor) -> Tensor:
        tokens = self.project(embeddings)
        likeness = (self.place_tokens(embeddings) @ text[..., None])[..., 0]  # (n, n_tokens)
        chosen = likeness.topk(self.sizes.n_tokens // 2, dim=1).indices
        masked = torch.zeros_like(likeness, dtype=torch.bool).scatter(1, chosen, True)
        shown = torch.where(masked[..., None], self.hidden_patch, tokens)
        made = self.patch_out(self.rebuilder(shown, states, memory_key_padding_mask=hidden))
        return F.mse_loss(made[masked], embeddings[masked])

    @torch.no_grad()
    def decode(self, embeddings: Tensor, n_beams: int = 1) -> np.ndarray:
        """Return the likeliest words, int array of shape (n, n_words) that ends with `END` and padding.

        Parameters
        ----------
        embeddings : tensor of shape (n, n_tokens, n_features)
        n_beams
            Beginnings that are gone on from at each word; 1 takes the likeliest word after each word. Among finished
            beams the one of the highest mean log-likelihood a word is taken, so that long captions may win.
        """
        n, device = len(embeddings), embeddings.device
        memory = self.pool(embeddings)[0].repeat_interleave(n_beams, dim=0)
        words = torch.full((n * n_beams, 1), START, device=device)
        done = torch.zeros(n * n_beams, dtype=torch.bool, device=device)
        # Sum of log-likelihoods; all beams begin alike, so that only the first counts at first.
        score = torch.full((n, n_beams), -torch.inf, device=device)
        score[:, 0] = 0
        length = torch.zeros(n, n_beams, device=device)
        first = torch.arange(n, device=device)[:, None] * n_beams
        for _ in range(self.sizes.max_words):
            logits = self.write(self.read(words)[0], memory)[:, -1]
            logits[:, [PAD, START]] = -torch.inf
            following = logits.log_softmax(dim=-1)
            # What has ended goes on with padding alone, at no cost.
            following[done] = -torch.inf
            following[done, PAD] = 0
            n_words = following.shape[1]
            total = (score.flatten()[:, None] + following).reshape(n, n_beams * n_words)
            score, chosen = total.topk(n_beams, dim=1)
            origin, word = (first + chosen // n_words).flatten(), (chosen % n_words).flatten()
            words = torch.cat([words[origin], word[:, None]], dim=1)
            length = length.flatten()[origin].reshape(n, n_beams) + ~done[origin].reshape(n, n_beams)
            done = done[origin] | (word == END)
            if bool(done.all()):
                break
        best = (first[:, 0] + (score / length).argmax(dim=1)).flatten()
        return words[best, 1:].cpu().numpy()


def compute_word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Return the mean cross-entropy of words that are no padding.

    Parameters
    ----------
    logits : tensor of shape (n, n_words, number of words)
    words : int tensor of shape (n, n_words)
    """
    return F.cross_entropy(logits.flatten(0, 1), words.flatten(), ignore_index=PAD)


def compare_texts(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of images and texts; rows with equal captions do not compete.

    Parameters
    ----------
    images, texts : tensors of shape (n, width)
        Unit vectors, row by row of the same image.
    scale
        Inverse temperature.
    same : bool tensor of shape (n, n)
        Rows with equal captions.
    """
    own = torch.eye(len(images), dtype=torch.bool, device=images.device)
    logits = (scale * images @ texts.T).masked_fill(same & ~own, -torch.inf)
    truth = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def _make_causal_mask(length: int, device: torch.device) -> Tensor:
    """Return which later words each word must not see."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


# --- training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionTraining:
    """How a network is trained on rows.

    Parameters
    ----------
    epochs, batch_size, learning_rate, weight_decay
        By AdamW.
    warm_cosine
        Whether the rate rises over a tenth and falls along a cosine; it is constant otherwise.
    seed
        Of order and dropout.
    name
        In messages.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warm_cosine: bool
    seed: int
    name: str


def train_rows(
    network: nn.Module,
    n_rows: int,
    compute_loss: Callable[[np.ndarray, np.random.Generator], Tensor],
    how: CaptionTraining,
    *,
    data: Any,
    workspace: Path | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train a network in place on batches of rows and return the mean loss of each epoch.

    Parameters
    ----------
    network
        On its device.
    n_rows
        Rows of the training data.
    compute_loss
        Of some rows, with the generator of the epoch.
    how
        Epochs, batches, rates and seed.
    data
        What distinguishes the training data from others, for the checkpoint.
    workspace
        Folder of the checkpoint, which is written after each epoch; None keeps none.
    progress
        Gets the progress of every epoch.
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay)
    device = next(network.parameters()).device
    identity = {"network": list_shapes(network), "how": how.__dict__, "data": data}
    path = None if workspace is None else workspace / CHECKPOINT
    losses: list[float] = []
    found = None if path is None else read_checkpoint(path, identity)
    if found is not None:
        network.load_state_dict(take(found[0], "network"))
        unpack_optimiser(optimiser, take(found[0], "optimiser"))
        losses = list(found[1]["losses"])
    n_batches = math.ceil(n_rows / how.batch_size)
    n_steps = n_batches * how.epochs
    rate = (
        (lambda step: compute_warm_cosine(step, n_steps, max(1, n_steps // 10))) if how.warm_cosine else None
    )
    network.train()
    for epoch in range(len(losses), how.epochs):
        rng, first = make_generator(how.seed, "epoch", epoch), epoch * n_batches
        batches = np.array_split(rng.permutation(n_rows), n_batches)
        told: list[float] = []

        def compute(
            step: int, batches: list[np.ndarray] = batches, first: int = first, rng: np.random.Generator = rng
        ) -> Iterator[Tensor]:
            yield compute_loss(batches[step - first], rng)

        def after(step: int, made: list[Tensor], told: list[float] = told) -> None:
            told.append(float(made[0]))

        with seeded(derive_seed(how.seed, "dropout", epoch), device):
            optimise(
                optimiser, network.parameters(), range(first, first + n_batches), compute, after=after, rate=rate,
                clip_norm=1.0,
                describe_failure=lambda step, loss: (
                    f"the loss of {how.name} is {loss} at step {step}; look for extreme values in the "
                    "embeddings, or lower learning_rate (kind coca)."
                ),
            )  # fmt: skip
        losses.append(float(np.mean(told)))
        if path is not None:
            groups = {"network": network.state_dict(), "optimiser": pack_optimiser(optimiser)}
            write_checkpoint(path, groups, {"identity": identity, "losses": losses})
        if progress is not None:
            progress(epoch + 1, how.epochs, f"{how.name}, loss {losses[-1]:.3f}")
    network.eval()
    return losses
