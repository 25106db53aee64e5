"""BrainLM: a masked autoencoder over a picture of parcels x frames, and its older form over parcels' time series.

`BrainLM` is the form of 111 M and 650 M parameters: the 424 parcels of the atlas A424, sorted from back to front, are
the rows of a picture with 200 frames as columns, which a vision transformer reads in square patches. `OldBrainLM` is
that of 13 M: a token is one parcel's 20 frames, and its place is the parcel's coordinates. Both carry the names of the
published weights in their state dicts, so that such files load as they are. Written from the description; knows
neither files nor training.

References
----------
Ortega Caro et al. (2024), BrainLM: a foundation model for brain activity recordings, ICLR. He et al. (2022),
arXiv:2111.06377 (masked autoencoders). Xiong et al. (2021), arXiv:2102.03902 (layers of the older form).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from braindecode_vis.parts.foundation.models.foundation import Backbone, attend

N_PARCELS = 424
N_FRAMES = 200
PAD = -1.0  # what surrounds the picture
EPS = 1e-12


def make_sine_table(positions: np.ndarray, width: int) -> Tensor:
    """Return sines, then cosines, of positions at `width` / 2 frequencies between 1 and 1 / 10000.

    Parameters
    ----------
    positions : array of any shape
        Flattened in C order.
    width
        Even.

    Returns
    -------
    float32 tensor of shape (n_positions, width)

    Examples
    --------
    >>> make_sine_table(np.array([0.0, 1.0]), 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """
    rates = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    angles = np.ravel(positions).astype(float)[:, None] * rates
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


def _make_grid_table(side: int, width: int) -> Tensor:
    """Return the places of a square grid row by row after a row of zeros, shape (1, 1 + side², width)."""
    row, column = np.divmod(np.arange(side * side), side)
    # The first half tells the column: the published tables were made that way round.
    table = torch.cat([make_sine_table(column, width // 2), make_sine_table(row, width // 2)], dim=1)
    return torch.cat([table.new_zeros(1, width), table])[None]


def _split(layers: nn.ModuleDict, tokens: Tensor, n_heads: int) -> list[Tensor]:
    """Return queries, keys and values, each of shape (batch, n_heads, n_tokens, width / n_heads)."""
    names = ("query", "key", "value")
    return [layers[name](tokens).unflatten(-1, (n_heads, -1)).transpose(1, 2) for name in names]


def _projections(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})


class _Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        output = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.attention = nn.ModuleDict({"attention": _projections(width), "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=EPS)
        self.layernorm_after = nn.LayerNorm(width, eps=EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        part: dict[str, nn.ModuleDict] = dict(self.attention.items())  # type: ignore[arg-type]
        q, k, v = _split(part["attention"], self.layernorm_before(tokens), self.n_heads)
        tokens = tokens + part["output"]["dense"](attend(q, k, v))
        hidden = F.gelu(self.intermediate["dense"](self.layernorm_after(tokens)))
        return tokens + self.output["dense"](hidden)


class _Embeddings(nn.Module):
    def __init__(self, width: int, patch: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position_embeddings = nn.Parameter(_make_grid_table(grid, width), requires_grad=False)
        # The series stands in all three colours, which the published weights tell apart.
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, stride=patch)})


class _Decoder(nn.Module):
    def __init__(
        self, width: int, inner: int, depth: int, n_heads: int, hidden: int, patch: int, grid: int
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_pos_embed = nn.Parameter(_make_grid_table(grid, inner), requires_grad=False)
        self.decoder_embed = nn.Linear(width, inner)
        self.decoder_layers = nn.ModuleList(_Layer(inner, n_heads, hidden) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(inner, eps=EPS)
        self.decoder_pred = nn.Linear(inner, 3 * patch * patch)


class _Transformer(Backbone):
    """What both forms have under the same names: what makes tokens, the layers, and a norm behind them."""

    n_extra = 1
    stack = "vit.encoder.layer"
    attention = ("attention.",)
    top = ("vit.layernorm.",)

    def __init__(self, start: nn.Module, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.width = width
        self.vit = nn.ModuleDict(
            {
                "embeddings": start,
                "encoder": nn.ModuleDict({"layer": layers}),
                "layernorm": nn.LayerNorm(width, eps=EPS),
            }
        )

    def read(self, tokens: Tensor) -> Tensor:
        """Return the normed tokens that the layers make of tokens."""
        for layer in self.vit["encoder"]["layer"]:  # type: ignore[index]
            tokens = layer(tokens)
        return self.vit["layernorm"](tokens)


class BrainLM(_Transformer):
    """The vision transformer of BrainLM.

    Parameters
    ----------
    width, depth, n_heads, hidden
        Of the encoder: 768, 12, 12, 3072 for 111 M parameters; 1280, 32, 16, 5120 for 650 M.
    patch
        Side of a patch in parcels and frames: 16 and 14.
    n_parcels, n_frames
        Rows and columns of the picture before it is padded to a square of whole patches.
    decoder
        Whether the decoder, which only reconstruction needs, is there: 512 wide, 8 layers, 16 heads, 2048 hidden.
    """

    def __init__(
        self,
        *,
        width: int = 768,
        depth: int = 12,
        n_heads: int = 12,
        hidden: int = 3072,
        patch: int = 16,
        n_parcels: int = N_PARCELS,
        n_frames: int = N_FRAMES,
        decoder: bool = False,
    ) -> None:
        grid = -(-max(n_parcels, n_frames) // patch)  # patches along a side
        layers = nn.ModuleList(_Layer(width, n_heads, hidden) for _ in range(depth))
        super().__init__(_Embeddings(width, patch, grid), layers, width)
        self.patch, self.n_parcels, self.n_frames, self.grid = patch, n_parcels, n_frames, grid
        self.decoder = _Decoder(width, 512, 8, 16, 2048, patch, grid) if decoder else None

    @property
    def margin(self) -> int:
        """Columns of padding before the first frame."""
        return (self.grid * self.patch - self.n_frames) // 2

    def pad(self, picture: Tensor) -> Tensor:
        """Return the picture (batch, n_parcels, n) in a square, surrounded by -1; missing frames are the last ones."""
        side = self.grid * self.patch
        above, before = (side - self.n_parcels) // 2, self.margin
        behind, below = side - before - picture.shape[2], side - above - picture.shape[1]
        return F.pad(picture, (before, behind, above, below), value=PAD)

    def find_tokens(self, n_frames: int) -> Tensor:
        """Return the tokens, counted row by row, whose patches hold one of the first `n_frames` frames."""
        columns = torch.arange(self.margin // self.patch, (self.margin + n_frames - 1) // self.patch + 1)
        return (torch.arange(self.grid)[:, None] * self.grid + columns).flatten()

    def forward(self, data: Tensor) -> Tensor:
        """Return the normed tokens of the patches that hold frames, the extra one first.

        Parameters
        ----------
        data : tensor of shape (batch, n_parcels, n)
            At most `n_frames` frames; the whole width in its full length, surroundings included.

        Returns
        -------
        tensor of shape (batch, 1 + n_tokens, width)
        """
        n = data.shape[2]
        return self.encode(data, None if n == self.n_frames else self.find_tokens(n).to(data.device))

    def encode(self, picture: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the normed tokens, the extra one first, in the order of the picture.

        Parameters
        ----------
        picture : tensor of shape (batch, n_parcels, n)
            Rows sorted as in training.
        visible : integer tensor of shape (n_visible,), optional
            Tokens that the transformer sees, counted row by row; all by default.

        Returns
        -------
        tensor of shape (batch, 1 + n_visible, width)
        """
        start: _Embeddings = self.vit["embeddings"]  # type: ignore[assignment]
        size = self.patch
        patches = self.pad(picture).unfold(1, size, size).unfold(2, size, size).flatten(1, 2)
        places = start.position_embeddings[:, 1:]
        if visible is not None:
            patches, places = patches[:, visible], places[:, visible]
        embed = start.patch_embeddings["projection"]
        # Three equal colours through a convolution are one through the sum of its weights.
        tokens = F.linear(patches.flatten(2), embed.weight.sum(dim=1).flatten(1), embed.bias) + places  # type: ignore[operator,arg-type]
        extra = start.cls_token + start.position_embeddings[:, :1]
        return self.read(torch.cat([extra.expand(len(tokens), -1, -1), tokens], dim=1))

    def reconstruct(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the pixels of every patch, (batch, grid², 3 * patch²), from the tokens that `encode` gave.

        Parameters
        ----------
        tokens : tensor of shape (batch, 1 + n_visible, width)
        visible : integer tensor of shape (n_visible,), optional
            As in `encode`.
        """
        if self.decoder is None:
            raise RuntimeError("this BrainLM was built without its decoder")
        own = self.decoder
        embedded = own.decoder_embed(tokens)
        patches = embedded[:, 1:]
        if visible is not None:
            patches = own.mask_token.repeat(len(tokens), self.grid**2, 1)
            patches[:, visible] = embedded[:, 1:].to(patches.dtype)
        tokens = torch.cat([embedded[:, :1], patches], dim=1) + own.decoder_pos_embed
        for layer in own.decoder_layers:
            tokens = layer(tokens)
        return own.decoder_pred(own.decoder_norm(tokens))[:, 1:]


class _OldLayer(nn.Module):
    """Attention beside a convolution of the values over tokens, and feed-forward, each normed afterwards.

    The Nystrom approximation of the paper behind these layers is not here: with as many landmarks as means (64 and
    64, as released) the layer attends in full.
    """

    def __init__(self, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        inner = _projections(width)
        inner["conv"] = nn.Conv2d(n_heads, n_heads, (65, 1), padding=(32, 0), groups=n_heads, bias=False)
        output = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=EPS)}
        self.attention = nn.ModuleDict({"self": inner, "output": nn.ModuleDict(output)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, eps=EPS)}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        part: dict[str, nn.ModuleDict] = dict(self.attention.items())  # type: ignore[arg-type]
        q, k, v = _split(part["self"], tokens, self.n_heads)
        mixed = attend(q, k, v) + part["self"]["conv"](v).transpose(1, 2).flatten(2)
        tokens = part["output"]["LayerNorm"](part["output"]["dense"](mixed) + tokens)
        hidden = F.gelu(self.intermediate["dense"](tokens))
        return self.output["LayerNorm"](self.output["dense"](hidden) + tokens)


class _TimeTable(nn.Module):
    """Sines at even and cosines at odd places, one row per patch of time; part of the published files."""

    pe: Tensor

    def __init__(self, width: int, length: int = 5000) -> None:
        super().__init__()
        table = make_sine_table(np.arange(length), width)
        # (length, [sin | cos], rate) to (length, rate, [sin | cos])
        self.register_buffer("pe", table.unflatten(1, (2, -1)).transpose(1, 2).flatten(1).contiguous())


class OldBrainLM(_Transformer):
    """The encoder of the older BrainLM of 13 M parameters: tokens of one parcel's 20 frames, placed by coordinates.

    Parameters
    ----------
    places : tensor of shape (n_parcels, 3)
        Coordinates in mm; not part of the state dict.
    width, depth, n_heads, hidden
        512, 4, 4, 1024 by default.
    patch
        Frames of a token.
    """

    places: Tensor

    def __init__(
        self,
        places: Tensor,
        *,
        width: int = 512,
        depth: int = 4,
        n_heads: int = 4,
        hidden: int = 1024,
        patch: int = 20,
    ) -> None:
        start = nn.Module()
        start.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        start.signal_embedding_projection = nn.Linear(patch, width)
        start.xyz_embedding_projection = nn.Linear(3, width)
        start.pos_embedding = _TimeTable(width)
        super().__init__(start, nn.ModuleList(_OldLayer(width, n_heads, hidden) for _ in range(depth)), width)
        self.patch = patch
        self.register_buffer("places", places.float(), persistent=False)

    def forward(self, series: Tensor) -> Tensor:
        """Return the normed tokens, the extra one first, parcel by parcel.

        Parameters
        ----------
        series : tensor of shape (batch, n_parcels, n_frames)
            A whole number of patches.

        Returns
        -------
        tensor of shape (batch, 1 + n_parcels * n_frames / patch, width)
        """
        start = self.vit["embeddings"]
        patches = series.unflatten(2, (-1, self.patch))  # (batch, n_parcels, n_patches, patch)
        tokens = start.signal_embedding_projection(patches)  # type: ignore[operator]
        tokens = tokens + start.xyz_embedding_projection(self.places)[:, None]  # type: ignore[operator]
        tokens = tokens + start.pos_embedding.pe[: patches.shape[2]]  # type: ignore[union-attr,index]
        extra = start.cls_token.expand(len(series), -1, -1)  # type: ignore[operator]
        return self.read(torch.cat([extra, tokens.flatten(1, 2)], dim=1))
