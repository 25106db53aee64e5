"""Captions decoded from embeddings: of the nearest image, by GIT's tokens or sentence vectors, by a decoder of its own.

Owns the fitted decoders, one per kind of `captions_config`, their files, and retrieval of captions. A decoder is given
embeddings (predictions, or draws of the prior) and returns a text each; it never samples, so that the same embeddings
give the same captions. Networks are in `caption_networks`, scores of captions in `scoring.metrics.caption_metrics`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder, find_class
from braindecode_vis.base.devices import choose_device, seeded
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.embeddings.caption_bank import (
    END,
    PAD,
    SPECIAL,
    START,
    load_captioner,
    read_caption_bank,
    split_words,
    write_captions,
)
from braindecode_vis.embeddings.text import make_unit
from braindecode_vis.generation.captions_config import (
    CocaCaptionsConfig,
    GitCaptionsConfig,
    MinilmCaptionsConfig,
    NearestCaptionsConfig,
)
from braindecode_vis.generation.gap import Gap, GapConfig, fit_gap
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.scoring.caption_retrieval import retrieve_nearest

if TYPE_CHECKING:
    from braindecode_vis.base.arrays import Responses
    from braindecode_vis.training.caption_networks import CaptionNetwork, TokenProjector

_BATCH = 64  # captions that are written together; changes nothing but rounding


class CaptionDecoder(Protocol):
    """A fitted decoder of captions."""

    def decode(self, embeddings: Embeddings) -> list[str]:
        """Return a caption of each row."""
        ...

    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder`, which exists, without pickle."""
        ...


def fit_decoders(settings: tuple[Any, ...], data: GeneratorData, *, seed: int) -> dict[str, CaptionDecoder]:
    """Return every decoder of embeddings of a run, by its kind, fitted on the training split."""
    return {each.kind: fit_decoder(each, data, seed=seed) for each in settings if not each.reads_responses}


@dataclass(frozen=True)
class WrittenCaptions:
    """What a brain encoder has written: a caption of each trial, and the one of no trial in particular."""

    rows: list[str]
    mean: str


def write_with_encoder(
    settings: Sequence[Any], encoder: BrainEncoder, responses: Responses
) -> WrittenCaptions | None:
    """Return what the brain encoder writes of responses; None if none of the settings asks for it."""
    asked = next((each for each in settings if each.reads_responses), None)
    if asked is None:
        return None
    writer = encoder.captions
    if writer is None:
        raise ConfigError(
            f"{find_class(encoder).__name__} writes no captions (it has no property captions); use a "
            "network with the objective captioning."
        )
    return WrittenCaptions(writer.write(responses, asked.n_beams), writer.write_mean(asked.n_beams))


def write_decoders(folder: Path, decoders: Mapping[str, CaptionDecoder]) -> None:
    """Write fitted decoders below `folder`, each under its kind; see `read_decoders`."""
    for kind, decoder in decoders.items():
        (folder / "captions" / kind).mkdir(parents=True)
        decoder.write(folder / "captions" / kind)


def read_decoders(folder: Path, settings: Sequence[Any], data: GeneratorData) -> dict[str, CaptionDecoder]:
    """Return the decoders that `write_decoders` wrote, by their kinds.

    Parameters
    ----------
    folder
        That they lie below.
    settings
        Name them.
    data
        Of the training split.
    """
    learnt = [each for each in settings if not each.reads_responses]
    return {each.kind: read_decoder(each, folder / "captions" / each.kind, data) for each in learnt}


def fit_decoder(settings: Any, data: GeneratorData, *, seed: int) -> CaptionDecoder:
    """Return the decoder of some settings, fitted on the training split."""
    if isinstance(settings, NearestCaptionsConfig):
        return NearestCaptions(settings.read_training(data), data.embeddings, settings.device)
    if isinstance(settings, MinilmCaptionsConfig):
        return fit_minilm(settings, data, seed=seed)
    fit = fit_git if isinstance(settings, GitCaptionsConfig) else fit_coca
    return fit(settings, data, seed=seed)


def read_decoder(settings: Any, folder: Path, data: GeneratorData) -> CaptionDecoder:
    """Return the decoder that was written into `folder`."""
    if isinstance(settings, NearestCaptionsConfig):
        return NearestCaptions(read_json(folder / "captions.json"), data.embeddings, settings.device)
    if isinstance(settings, MinilmCaptionsConfig):
        return read_minilm(settings, folder)
    read = read_git if isinstance(settings, GitCaptionsConfig) else read_coca
    return read(settings, folder)


def find_device(settings: Any) -> str:
    """Return ``cpu`` or ``cuda``."""
    return choose_device(settings.device, setting="reconstruction.captions.device")


# --- of the nearest training image ----------------------------------------------------------------------------


class NearestCaptions:
    """Captions of training images.

    Parameters
    ----------
    bank
        Captions by id, of training images alone.
    training
        Embeddings of the training images.
    device
        Where similarities are computed.
    """

    def __init__(self, bank: Mapping[str, Sequence[str]], training: Embeddings, device: str = "auto") -> None:
        self.bank, self.training = {name: list(texts) for name, texts in bank.items()}, training
        self.device = device

    def decode(self, embeddings: Embeddings) -> list[str]:
        """Return the first caption of the training image nearest to each row."""
        device = find_device(self)
        return retrieve_nearest([embeddings], [self.training], self.bank, device=device)

    def write(self, folder: Path) -> None:
        """Write the captions; the embeddings are those of the run."""
        write_json(folder / "captions.json", self.bank)


# --- through the image tokens of GIT ------------------------------------------------------------------------------


class GitCaptions:
    """ATM's caption branch with a fitted projector.

    Parameters
    ----------
    config
        Where GIT is, and how captions are searched.
    projector
        From an embedding to image tokens.
    scale
        What embeddings are multiplied with first, so that those of training images have unit mean square.
    described
        What came of the training.
    """

    def __init__(
        self, config: GitCaptionsConfig, projector: TokenProjector, scale: float, described: dict[str, Any]
    ) -> None:
        self.config, self.projector, self.scale, self.described = config, projector, scale, described
        self._loaded: tuple[Any, Any] | None = None

    def decode(self, embeddings: Embeddings) -> list[str]:
        """Return the caption that GIT gives to the tokens of each row."""
        import torch

        if self._loaded is None:
            processor, model = load_captioner(self.config.find_folder())
            model.git.image_encoder = _make_stand_in()
            self._loaded = processor, model.to(find_device(self.config))
        processor, model = self._loaded
        self.projector.to(model.device)
        rows, captions = embeddings.flat().astype(np.float32) * self.scale, []
        with torch.inference_mode():
            for start in range(0, len(rows), _BATCH):
                tokens = self.projector(torch.from_numpy(rows[start : start + _BATCH]).to(model.device))
                written = model.generate(
                    # (n, 1, n_tokens, width): as an image to its shape, which `_make_stand_in` takes for tokens
                    pixel_values=tokens[:, None].to(model.dtype), max_new_tokens=self.config.max_new_tokens,
                    num_beams=self.config.n_beams, do_sample=False,
                )  # fmt: skip
                captions += [t.strip() for t in processor.batch_decode(written, skip_special_tokens=True)]
        return captions

    def write(self, folder: Path) -> None:
        """Write the projector; GIT stays in its folder."""
        _write_network(folder, self.projector, {"scale": self.scale, **self.described})


def _make_stand_in() -> Any:
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput

    class TokensAsImages(nn.Module):
        """Stands where GIT encodes images, and gives the tokens that it is given."""

        def forward(self, tokens: Any, **ignored: Any) -> Any:
            """Return tokens of shape (n, n_tokens, width) for (n, 1, n_tokens, width)."""
            return BaseModelOutput(last_hidden_state=tokens[:, 0])

    return TokensAsImages()


def fit_git(config: GitCaptionsConfig, data: GeneratorData, *, seed: int) -> GitCaptions:
    """Learn the projector from training images: their embeddings, and the tokens of GIT's image encoder.

    Raises
    ------
    DataError
        If the disk has no space for the tokens.
    """
    import torch

    from braindecode_vis.training.caption_networks import CaptionTraining, TokenProjector, train_rows
    from braindecode_vis.training.optimisation import sum_rows

    device = find_device(config)
    rows, scale = _scale_rows(data.embeddings.flat())
    context = data.context.take_part("captions_git")
    with _keep_tokens(config, data, context.checkpoints, device) as tokens:
        with seeded(derive_seed(seed, "git captions")):
            projector = TokenProjector(rows.shape[1], *tokens.shape[1:]).to(device)

        def compute_loss(batch: np.ndarray, rng: np.random.Generator) -> Any:
            order = np.sort(batch)  # a file is read forward
            wanted = torch.from_numpy(tokens[order].astype(np.float32)).to(device)
            made = projector(torch.from_numpy(rows[order]).to(device))
            return torch.nn.functional.mse_loss(made, wanted)

        how = CaptionTraining(
            config.epochs, config.batch_size, config.learning_rate, 0.01, False,
            derive_seed(seed, "git captions", "training"), "captions through GIT",
        )  # fmt: skip
        losses = train_rows(
            projector, len(rows), compute_loss, how, data=sum_rows([rows]), workspace=context.checkpoints,
            progress=context.progress,
        )  # fmt: skip
    described = {"loss": losses[-1], "images": data.embeddings.ids.astype(str).tolist()}
    return GitCaptions(config, projector.eval(), scale, described)


def _scale_rows(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Return rows of unit mean square as float32, and what they were multiplied with."""
    scaled = rows.astype(np.float32)
    scale = float(1 / np.sqrt(np.mean(scaled.astype(np.float64) ** 2)))
    scaled *= scale
    return scaled, scale


@contextmanager
def _keep_tokens(
    config: GitCaptionsConfig, data: GeneratorData, workspace: Path | None, device: str
) -> Iterator[np.ndarray]:
    """Yield GIT's tokens of the training images, float16 of shape (n_images, n_tokens, width), on disk."""
    import torch

    processor, model = load_captioner(config.find_folder())
    encoder, n = model.git.image_encoder.to(device), len(data.embeddings)
    vision = model.config.vision_config
    shape = (n, (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size)
    if workspace is not None:
        workspace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace) as folder:
        needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(
                f"GIT's tokens of {n} training images take {needed / 1e9:.1f} GB while the projector learns, and "
                f"only {free / 1e9:.1f} GB are free below {folder}; make space, or leave captions of kind git out."
            )
        tokens = np.lib.format.open_memmap(Path(folder) / "tokens.npy", "w+", np.float16, shape)
        with torch.inference_mode():
            for start in range(0, n, 16):
                ids = data.embeddings.ids[start : start + 16]
                # Copies: arrays of a memory map cannot be written, which torch warns of.
                images = [np.array(data.stimuli.read_image(name)) for name in ids]
                pixels = processor(images=images, return_tensors="pt")["pixel_values"]
                made = encoder(pixels.to(device, model.dtype)).last_hidden_state
                if made.shape[1:] != shape[1:]:
                    raise DataError(
                        f"GIT gives image tokens of shape {tuple(made.shape[1:])}, but its config.json "
                        f"says {shape[1:]}; copy the whole folder again."
                    )
                tokens[start : start + len(ids)] = made.half().cpu().numpy()
        yield tokens
        del tokens


def read_git(config: GitCaptionsConfig, folder: Path) -> GitCaptions:
    """Return the decoder that `GitCaptions.write` wrote."""
    from braindecode_vis.training.caption_networks import TokenProjector

    weights, record = _read_network(folder)
    sizes = (
        weights["mix.weight"].shape[1],
        weights["spread.weight"].shape[0],
        weights["mix.weight"].shape[0],
    )
    projector = TokenProjector(*sizes)
    projector.load_state_dict(weights)
    return GitCaptions(config, projector.eval(), record.pop("scale"), record)


# --- through sentence vectors ------------------------------------------------------------------------------------


class MinilmCaptions:
    """ATM's caption branch with sentence vectors in the place of GIT, fitted.

    Parameters
    ----------
    network
        Linear, from an embedding to a sentence vector.
    captions
        Those of training images, each once.
    vectors : float32 array of shape (n_captions, n_features)
        Their sentence vectors.
    scale
        What embeddings are multiplied with first, so that those of training images have unit mean square.
    device
        Where it runs.
    described
        What came of the training.
    """

    def __init__(
        self,
        network: Any,
        captions: list[str],
        vectors: np.ndarray,
        scale: float,
        device: str,
        described: dict[str, Any],
    ) -> None:
        self.network, self.captions, self.vectors = network, captions, vectors
        self.scale, self.device, self.described = scale, device, described

    def decode(self, embeddings: Embeddings) -> list[str]:
        """Return the training caption whose sentence vector is nearest to what each row is mapped onto."""
        import torch

        rows = torch.from_numpy(embeddings.flat().astype(np.float32) * self.scale)
        with torch.inference_mode():
            made = self.network.cpu()(rows).numpy()
        names = [f"{place:09d}" for place in range(len(self.captions))]
        known = Embeddings(self.vectors, names, "sentences")
        bank = {name: [text] for name, text in zip(names, self.captions, strict=True)}
        return retrieve_nearest(
            [Embeddings(made, embeddings.ids, "sentences")], [known], bank, device=self.device
        )

    def write(self, folder: Path) -> None:
        """Write the map, the captions and their vectors; the sentence encoder is not needed again."""
        record = {"scale": self.scale, "captions": self.captions, **self.described}
        _write_network(folder, self.network, record, {"vectors": self.vectors})


def fit_minilm(config: MinilmCaptionsConfig, data: GeneratorData, *, seed: int) -> MinilmCaptions:
    """Learn the map from training images: their embeddings, and the sentence vectors of their captions."""
    import torch

    from braindecode_vis.embeddings.sentence_encoder import SentenceEncoder
    from braindecode_vis.training.caption_networks import CaptionTraining, train_rows
    from braindecode_vis.training.optimisation import sum_rows

    device, known = find_device(config), config.read_training(data)
    kept = np.flatnonzero([str(name) in known for name in data.embeddings.ids])
    rows, scale = _scale_rows(data.embeddings.flat()[kept])
    captions = sorted({text for texts in known.values() for text in texts})
    place = {text: row for row, text in enumerate(captions)}
    vectors = SentenceEncoder(config.folder, device=config.device).encode(captions)
    images = [str(data.embeddings.ids[row]) for row in kept]
    # An image is brought to the mean of its captions, as a target of kind minilm is.
    wanted = make_unit(
        np.stack([np.mean([vectors[place[t]] for t in known[name]], axis=0) for name in images])
    )
    wanted = (wanted * np.sqrt(wanted.shape[1])).astype(np.float32)
    with seeded(derive_seed(seed, "minilm captions")):
        network = torch.nn.Linear(rows.shape[1], wanted.shape[1]).to(device)

    def compute_loss(batch: np.ndarray, rng: np.random.Generator) -> Any:
        made = network(torch.from_numpy(rows[batch]).to(device))
        return torch.nn.functional.mse_loss(made, torch.from_numpy(wanted[batch]).to(device))

    how = CaptionTraining(
        config.epochs, config.batch_size, config.learning_rate, 0.01, False,
        derive_seed(seed, "minilm captions", "training"), "captions through sentence vectors",
    )  # fmt: skip
    context = data.context.take_part("captions_minilm")
    losses = train_rows(
        network, len(rows), compute_loss, how, data=[sum_rows([rows]), sum_rows([wanted])],
        workspace=context.checkpoints, progress=context.progress,
    )  # fmt: skip
    described = {"loss": losses[-1], "images": images}
    return MinilmCaptions(network.eval(), captions, vectors, scale, device, described)


def read_minilm(config: MinilmCaptionsConfig, folder: Path) -> MinilmCaptions:
    """Return the decoder that `MinilmCaptions.write` wrote."""
    import torch

    weights, record = _read_network(folder)
    vectors = weights.pop("state.vectors").numpy()
    network = torch.nn.Linear(*reversed(weights["weight"].shape))
    network.load_state_dict(weights)
    return MinilmCaptions(
        network.eval(), record.pop("captions"), vectors, record.pop("scale"), find_device(config), record
    )


# --- by a decoder of its own ---------------------------------------------------------------------------------------


class CocaCaptions:
    """A small decoder of captions, fitted.

    Parameters
    ----------
    network
        On the CPU.
    vocabulary
        The words, by their numbers.
    mean, scale : float32 arrays of shape (n_features,)
        What embeddings are standardised with.
    device
        Where it runs.
    described
        What came of the training.
    gap
        What is done to embeddings before; None is nothing.
    members
        Which vectors of an embedding are described, of several; None is all of them.
    """

    def __init__(
        self,
        network: CaptionNetwork,
        vocabulary: list[str],
        mean: np.ndarray,
        scale: np.ndarray,
        device: str,
        described: dict[str, Any],
        gap: Gap | None = None,
        members: list[int] | None = None,
    ) -> None:
        self.network, self.vocabulary, self.device, self.described = network, vocabulary, device, described
        self.mean, self.scale, self.gap, self.members = mean, scale, gap, members

    def decode(self, embeddings: Embeddings) -> list[str]:
        """Return the likeliest caption of each row, word after word."""
        import torch

        captions: list[str] = []
        rows = _take_members(embeddings.vectors, self.members)
        rows = rows if self.gap is None else self.gap.serve(rows)
        rows = ((rows - self.mean) * self.scale).astype(np.float32)
        self.network.to(self.device).eval()
        for start in range(0, len(rows), _BATCH):
            words = self.network.decode(torch.from_numpy(rows[start : start + _BATCH]).to(self.device))
            captions += write_captions(words, self.vocabulary)
        return captions

    def write(self, folder: Path) -> None:
        """Write network, words, scale and correction."""
        state = {"mean": self.mean, "scale": self.scale}
        if self.gap is not None:
            state |= {f"gap_{name}": value for name, value in self.gap.__dict__.items()}
        record = {"sizes": self.network.sizes.__dict__, "vocabulary": self.vocabulary, **self.described}
        if self.members is not None:
            record["members"] = self.members
        _write_network(folder, self.network, record, state)


def _take_members(vectors: np.ndarray, members: list[int] | None) -> np.ndarray:
    """Return float32 vectors of shape (n, n_tokens, n_features), of some members alone where there are several."""
    rows = np.asarray(vectors, dtype=np.float32).reshape(len(vectors), -1, vectors.shape[-1])
    return rows if members is None else rows[:, members]


@dataclass(frozen=True)
class _Taught:
    """What a decoder learns from: vectors of shape (n, n_tokens, n_features), and the captions of each row."""

    vectors: np.ndarray
    texts: list[list[str]]
    images: list[str]
    members: list[int] | None = None


def fit_coca(config: CocaCaptionsConfig, data: GeneratorData, *, seed: int) -> CocaCaptions:
    """Learn a decoder from captions of training images.

    Raises
    ------
    ConfigError
        If patches are to be rebuilt and the target has none, the encoder gave no predictions that are needed, or texts
        are to be learnt from and have no place in the space of the embeddings.
    """
    import torch

    from braindecode_vis.training import caption_networks as networks
    from braindecode_vis.training.optimisation import sum_rows

    known = config.read_training(data)
    taught = (
        _embed_texts(config, data, known) if config.learns_from == "texts" else _pair(config, data, known)
    )
    vectors, gap = taught.vectors, None
    if config.correction is not None:
        gap = _fit_gap(config, data, known, taught)
        vectors = gap.prepare(vectors)
    n_tokens, n_features = vectors.shape[1:]
    if config.masked and n_tokens < 4:
        raise ConfigError(
            f"reconstruction.captions.masked predicts masked patches, but {data.embeddings.space!r} has "
            f"{n_tokens} vector(s) per image; use a target with patches (target.pooling patches), or "
            "leave masked out."
        )
    mean = vectors.mean(axis=(0, 1))
    scale = 1 / np.maximum(vectors.std(axis=(0, 1)), 1e-6)
    if gap is None:
        vectors = (vectors - mean) * scale
    texts = [[split_words(text)[: config.max_words] for text in own] for own in taught.texts]
    vocabulary = [*SPECIAL, *sorted({word for own in texts for text in own for word in text})]
    number = {word: place for place, word in enumerate(vocabulary)}
    sizes = networks.CaptionSizes(
        n_tokens, n_features, len(vocabulary), config.max_words, config.width, config.depth, config.heads,
        config.n_queries, config.dropout,
    )  # fmt: skip
    device = find_device(config)
    with seeded(derive_seed(seed, "coca captions")):
        network = networks.CaptionNetwork(sizes, rebuilds=config.masked > 0).to(device)
    weights = {name: getattr(config, name) for name in ("contrastive", "captioning", "masked")}

    def compute_loss(batch: np.ndarray, rng: np.random.Generator) -> Any:
        chosen = [texts[row][rng.integers(len(texts[row]))] for row in batch]
        length = max(map(len, chosen)) + 2
        words = np.full((len(batch), length), PAD)
        for place, text in enumerate(chosen):
            words[place, : len(text) + 2] = [START, *(number[word] for word in text), END]
        rows = vectors[batch]
        if gap is not None:
            rows = ((gap.disturb(rows, rng) - mean) * scale).astype(np.float32)
        same = (words[:, None] == words[None]).all(axis=-1)
        terms = network.compute_losses(
            torch.from_numpy(rows).to(device),
            torch.from_numpy(words).to(device),
            torch.from_numpy(same).to(device),
        )
        return sum(weights[name] * term for name, term in terms.items())

    how = networks.CaptionTraining(
        config.epochs, config.batch_size, config.learning_rate, config.weight_decay, True,
        derive_seed(seed, "coca captions", "training"), "decoder of captions",
    )  # fmt: skip
    context = data.context.take_part("captions_coca")
    marks = [sum_rows([vectors]), [len(own) for own in texts], vocabulary]
    losses = networks.train_rows(
        network, len(vectors), compute_loss, how, data=marks, workspace=context.checkpoints,
        progress=context.progress,
    )  # fmt: skip
    described = {"loss": losses[-1], "images": taught.images}
    if gap is not None and gap.noise.size == 1:
        described["sigma"] = float(gap.noise.item())
    return CocaCaptions(network, vocabulary, mean, scale, device, described, gap, taught.members)


def _pair(config: CocaCaptionsConfig, data: GeneratorData, known: Mapping[str, list[str]]) -> _Taught:
    """Return embeddings of training images, or predictions of training trials, with the captions of each."""
    source = data.predicted if config.learns_from == "predictions" else data.embeddings
    if source is None or not len(source):
        raise ConfigError(
            "captions of kind coca with learns_from predictions need predictions of training trials on "
            "which the encoder was not fitted, but there are none; set learns_from to images, or encoder.out_of_fold."
        )
    kept = np.flatnonzero([str(name) in known for name in source.ids])
    if len(kept) < 2:
        raise DataError(
            f"the caption bank {config.bank} describes {len(kept)} of {len(source)} training rows; a "
            "decoder needs two or more."
        )
    ids = [str(source.ids[row]) for row in kept]
    return _Taught(_take_members(source.vectors[kept], None), [known[name] for name in ids], sorted(set(ids)))


def _embed_texts(config: CocaCaptionsConfig, data: GeneratorData, known: Mapping[str, list[str]]) -> _Taught:
    """Return the vector of every text that is learnt from; no image and no response is looked at."""
    space = data.image_encoder.space
    if data.embeddings.space != space:
        raise ConfigError(
            f"captions of kind coca with learns_from texts learn in {space!r}, but images are made from "
            f"predictions in {data.embeddings.space!r}; give the encoder an objective that predicts the "
            "target (mse), or set "
            "learns_from to images."
        )
    texts = [text for own in known.values() for text in own]
    if config.texts is not None:
        more = read_caption_bank(config.texts.expanduser())
        own = {str(name) for name in data.embeddings.ids}
        shown = own if data.context.images is None else own | {str(name) for name in data.context.images.ids}
        if met := sorted(shown & more.keys()):
            raise DataError(
                f"{config.texts} describes {len(met)} image(s) of the run, first {met[0]}; further texts "
                "must not belong to them, since the decoder would learn tested captions: leave these rows out."
            )
        texts += [text for own in more.values() for text in own]
    texts = list(dict.fromkeys(texts))
    if len(texts) < 2:
        raise DataError(
            f"{config.bank} has the same text for all training images; a decoder needs two or more different texts."
        )
    # Where texts say nothing, no number stands.
    nothing = np.full(data.embeddings.vectors.shape[1:], np.nan, dtype=np.float32)
    vectors = data.image_encoder.embed_texts([[text] for text in texts], nothing)
    if vectors is None:
        vectors = _embed_by_clip(data.image_encoder, texts)
    vectors = np.asarray(vectors, dtype=np.float32).reshape(len(texts), -1, vectors.shape[-1])
    read = np.isfinite(vectors[0]).all(axis=-1)  # (n_tokens,)
    members = None if read.all() else np.flatnonzero(read).tolist()
    return _Taught(_take_members(vectors, members), [[text] for text in texts], sorted(known), members)


def _embed_by_clip(encoder: Any, texts: list[str]) -> np.ndarray:
    """Return vectors of texts by the other tower of a CLIP network."""
    from braindecode_vis.embeddings.openclip import OpenClipConfig
    from braindecode_vis.embeddings.text import ClipText

    config = getattr(encoder, "config", None)
    if not isinstance(config, OpenClipConfig):
        raise ConfigError(
            "captions of kind coca with learns_from texts need a target that also embeds texts, but "
            f"{encoder.space!r} does not; use openclip at its output, minilm, or layers with minilm as a "
            "member, or set learns_from to images."
        )
    tower = ClipText(config)
    assert tower.space == encoder.space  # refused at another layer
    return make_unit(tower.encode(texts))


def _fit_gap(
    config: CocaCaptionsConfig, data: GeneratorData, known: Mapping[str, list[str]], taught: _Taught
) -> Gap:
    """Measure what lies between what is learnt from and predictions of training trials."""
    correction, pairs = cast(GapConfig, config.correction), None
    if correction.needs_predictions:
        predicted = data.predicted
        if predicted is None or not len(predicted):
            raise ConfigError(
                "reconstruction.captions measures its gap on predictions of training trials on which the "
                "encoder was not fitted, but there are none; set encoder.out_of_fold or "
                "encoder.selection.hold_out, or gap.shift to "
                "false and gap.sigma to a number."
            )
        ids, served = predicted.ids.astype(str), _take_members(predicted.vectors, taught.members)
        if config.learns_from == "texts":
            row_of = {own[0]: row for row, own in enumerate(taught.texts)}
            kept = np.flatnonzero([name in known for name in ids])
            if not len(kept):
                raise DataError(
                    f"{config.bank} describes none of the images of {len(ids)} training trials that were predicted."
                )
            # The truth of an image is the mean of its texts, which a prediction comes nearest to.
            truth = np.stack(
                [np.mean([taught.vectors[row_of[t]] for t in known[ids[row]]], axis=0) for row in kept]
            )
        else:
            kept = np.arange(len(ids))
            truth = _take_members(data.embeddings.select(list(ids)).vectors, None)
        pairs = served[kept], truth
    return fit_gap(correction, taught.vectors, pairs)


def read_coca(config: CocaCaptionsConfig, folder: Path) -> CocaCaptions:
    """Return the decoder that `CocaCaptions.write` wrote."""
    from braindecode_vis.training.caption_networks import CaptionNetwork, CaptionSizes

    weights, record = _read_network(folder)
    mean, scale = (weights.pop(f"state.{name}").numpy() for name in ("mean", "scale"))
    parts = {name: weights.pop(name).numpy() for name in list(weights) if name.startswith("state.gap_")}
    gap = Gap(**{name.removeprefix("state.gap_"): value for name, value in parts.items()}) if parts else None
    network = CaptionNetwork(CaptionSizes(**record.pop("sizes")), rebuilds="hidden_patch" in weights)
    network.load_state_dict(weights)
    return CocaCaptions(
        network.eval(), record.pop("vocabulary"), mean, scale, find_device(config), record, gap,
        record.pop("members", None),
    )  # fmt: skip


def _write_network(
    folder: Path, network: Any, record: dict[str, Any], state: Mapping[str, np.ndarray] | None = None
) -> None:
    import torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    tensors |= {
        f"state.{name}": torch.from_numpy(np.ascontiguousarray(a)) for name, a in (state or {}).items()
    }
    write_tensors(folder / "weights.safetensors", tensors)
    write_json(folder / "decoder.json", record)


def _read_network(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return load_tensors(folder / "weights.safetensors", "torch"), read_json(folder / "decoder.json")
