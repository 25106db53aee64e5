"""Settings of the caption decoders; the decoders themselves are in `captions`.

Five ways, each a ``kind``: the caption of the nearest training image, which can say nothing new; ATM's caption branch,
which projects an embedding onto the image tokens of GIT and lets GIT speak; the same without weights of a hub, which
projects it onto sentence vectors and takes the nearest caption; a small decoder of its own, learnt from the
captions of training images, or from texts alone, with CoCa's loss; and the decoder that a brain encoder has learnt with
the objective ``captioning``. None sees a test image or its caption.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721, appendix C.4 (``git``); Wang et al. (2022), GIT, arXiv:2205.14100; Yu et al.
(2022), CoCa, arXiv:2205.01917, and Ma et al. (2024), SyCoCa, arXiv:2401.02137 (``coca``); Gu et al. (2023), CLOSE,
arXiv:2211.09778 (noise on embeddings while a decoder learns).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError, check_file
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.registry import ByKind
from braindecode_vis.base.settings import DeviceSettings, NeededWeights, Settings
from braindecode_vis.base.store import hash_file, hash_json, read_json
from braindecode_vis.embeddings.caption_bank import read_caption_bank
from braindecode_vis.embeddings.sentence_encoder import (
    MINILM,
    find_sentence_folder,
    hash_sentence_encoder,
    list_sentence_weights,
)
from braindecode_vis.embeddings.weights import PublishedFiles, describe_snapshot
from braindecode_vis.generation.gap import GapConfig
from braindecode_vis.generation.generator_data import GeneratorData

GIT = "microsoft/git-large-coco"


class _Banked(DeviceSettings):
    """Settings of a decoder that knows the captions of training images.

    Parameters
    ----------
    bank
        CSV file with the columns ``id`` and ``caption``; captions of training images alone are looked at.
    """

    bank: Path

    not_hashed: ClassVar[frozenset[str]] = frozenset({"bank", "device"})

    #: Whether it learns from out-of-fold predictions of training trials, and reads predictions and no draws of a prior.
    needs_predictions: ClassVar[bool] = False
    reads_draws: ClassVar[bool] = False
    #: Whether the brain encoder writes it of responses, and nothing is fitted.
    reads_responses: ClassVar[bool] = False

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the bank."""
        if not (bank := self.bank.expanduser()).is_file():
            raise ConfigError(
                f"reconstruction.captions names the bank {bank}, which is not a file; give a CSV file "
                "with the columns id and caption."
            )
        return {**super().hashed_fields(), "bank_sha256": hash_file(bank)}

    def check_files(self) -> None:
        """Raise `DataError` unless the bank can be read."""
        read_caption_bank(self.bank.expanduser())

    def read_training(self, data: GeneratorData) -> dict[str, list[str]]:
        """Return the captions of the training images that have some.

        Raises
        ------
        DataError
            If none has.
        """
        bank = read_caption_bank(self.bank.expanduser())
        known = {name: bank[name] for name in data.embeddings.ids.astype(str).tolist() if name in bank}
        if not known:
            raise DataError(
                f"the caption bank {self.bank} contains none of the training images (first "
                f"{data.embeddings.ids[0]!r}); "
                "its ids belong to another data set."
            )
        return known


class NearestCaptionsConfig(_Banked):
    """The caption of the training image nearest to the prediction, after the training mean is subtracted."""

    kind: Literal["nearest"] = "nearest"


class GitCaptionsConfig(DeviceSettings):
    """ATM's caption branch: embedding, projector, image tokens of GIT, caption.

    The projector is learnt on training images: their embeddings, and the tokens that GIT's own image encoder gives
    (ATM: 257 x 1024, a linear map of each feature onto all tokens, a linear map of features, each with a layer norm;
    mean squared error, AdamW 1e-3, 30 epochs of batches of 32; 25 new word pieces). As in ATM, GIT's networks are not
    changed. The embedding is the prior's draw, the same one from which the image is made.

    Parameters
    ----------
    captioner
        Folder of a GIT; None takes ``microsoft/git-large-coco``, which needs `allow_download` unless it was fetched.
    allow_download
        Allow the download of this GIT from the hub. Only the call can allow it, not a file.
    """

    packages: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["git"] = "git"
    captioner: Path | None = None
    allow_download: bool = False

    #: Length and search of captions.
    max_new_tokens: ClassVar[int] = 25
    n_beams: ClassVar[int] = 1
    #: Training of the projector.
    epochs: ClassVar[int] = 30
    batch_size: ClassVar[int] = 32
    learning_rate: ClassVar[float] = 1e-3
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "max_new_tokens", "n_beams", "epochs", "batch_size", "learning_rate",
    })  # fmt: skip

    not_hashed: ClassVar[frozenset[str]] = frozenset({"captioner", "allow_download", "device"})
    needs_predictions: ClassVar[bool] = False
    reads_draws: ClassVar[bool] = True
    reads_responses: ClassVar[bool] = False

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of GIT's folder."""
        folder = self.find_folder()
        kept = [p for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".txt", ".safetensors")]
        digests = digest_files({str(path.relative_to(folder)): path for path in kept})
        return {**super().hashed_fields(), "captioner_digest": hash_json(digests)}

    def check_files(self) -> None:
        """Raise `ConfigError` unless there is a GIT, or it may be downloaded."""
        if self.captioner is not None or not (self.allow_download or may_download()):
            self.find_folder()

    def list_weights(self) -> list[NeededWeights]:
        """Return the folder of GIT."""
        return [self._published.describe("captioner", self.captioner)]

    @property
    def _published(self) -> PublishedFiles:
        return describe_snapshot(
            GIT, ["*.json", "*.txt", "model.safetensors"],
            refusal=f"captions of kind git need the folder of {GIT}: give it with captioner, or leave these "
            "captions out (--set reconstruction.captions=[] --set reconstruction.prompt=null)",
        )  # fmt: skip

    def find_folder(self) -> Path:
        """Return the folder of GIT."""
        if self.captioner is None:
            return self._published.find(self.allow_download)
        config = self.captioner.expanduser() / "config.json"
        if not config.is_file():
            raise ConfigError(
                f"reconstruction.captions names the captioner {self.captioner}, which has no config.json "
                f"and is therefore no network; use the whole folder of {GIT}."
            )
        if (found := read_json(config).get("model_type")) != "git":
            raise ConfigError(
                f"reconstruction.captions of kind git names {self.captioner}, which holds a network of kind {found!r}; "
                "use the folder of a GIT."
            )
        return config.parent


class MinilmCaptionsConfig(_Banked):
    """ATM's caption branch without weights of a hub: embedding, linear map, sentence vector, nearest training caption.

    A stand-in for ``git``: sentence vectors of all-MiniLM-L6-v2, which the extra ``text`` installs, take the place of
    GIT's image tokens, and the training caption nearest to the mapped draw that of the written one, so that it can say
    nothing new. The map is learnt as ATM's is (mean squared error, AdamW 1e-3, 30 epochs of batches of 32), and reads
    the prior's draw, the very one that the image is made from.

    Parameters
    ----------
    weights
        Folder of a sentence encoder; None takes all-MiniLM-L6-v2 where it is installed.
    """

    packages: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["minilm"] = "minilm"
    weights: Path | None = None

    #: Training of the map.
    epochs: ClassVar[int] = 30
    batch_size: ClassVar[int] = 32
    learning_rate: ClassVar[float] = 1e-3
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"epochs", "batch_size", "learning_rate"})

    not_hashed: ClassVar[frozenset[str]] = _Banked.not_hashed | {"weights"}
    reads_draws: ClassVar[bool] = True

    @property
    def folder(self) -> Path:
        """Folder of the sentence encoder."""
        return find_sentence_folder(self.weights or MINILM, "reconstruction.captions.weights")

    def list_weights(self) -> list[NeededWeights]:
        """Return the sentence encoder."""
        return list_sentence_weights(self.weights or MINILM, "weights")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of bank and sentence encoder."""
        return {**super().hashed_fields(), "weights_digest": hash_sentence_encoder(self.folder)}

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the bank can be read and there is a sentence encoder."""
        super().check_files()
        hash_sentence_encoder(self.folder)


class CocaCaptionsConfig(_Banked):
    """A small caption decoder, learnt from captions of training images with CoCa's loss.

    Words are read by a causal transformer whose last token is compared with the embedding (symmetric cross-entropy),
    and written by further layers that look at the embedding. Both terms are as in CoCa; the encoder of images is frozen
    here, so that they shape the decoder alone. Words are those of the training captions, so that no word is new.

    Parameters
    ----------
    learns_from
        ``images`` learns from the embeddings of training images, and describes the prior's draws, or with `gap`
        predictions. ``predictions`` learns from out-of-fold predictions of training trials, with their errors, and
        describes predictions. ``texts`` learns from vectors of texts alone, each to be written again, and describes
        predictions: for targets with a text side (openclip at its output, minilm, layers with either).
    gap
        How training vectors are matched to the described vectors: a shift and noise (CLOSE); see its class. With
        ``texts``, None means its defaults; with ``images``, None means no such step.
    texts
        CSV file with the columns ``id`` and ``caption``, with further training texts for ``texts``, not of images of
        the run.
    width, depth
        Width and depth of the transformer, with 4 heads; half of its layers read only words, the others also use the
        embedding.
    n_queries
        Vectors that the embedding is pooled into for the decoder (CoCa: 256, of the tokens of a whole image).
    masked
        Weight of SyCoCa's text-guided masked image modelling (there 1), for targets with patches: the half of the
        patches that is most similar to the caption is hidden, and rebuilt from the others and the words. 0 leaves it
        out. It shapes the maps of patches and words, and has no part in decoding.
    epochs, batch_size, learning_rate
        Training by AdamW with a decay of 0.01, a cosine with a tenth of warm-up.
    """

    kind: Literal["coca"] = "coca"
    learns_from: Literal["images", "predictions", "texts"] = "images"
    gap: GapConfig | None = None
    texts: Path | None = None
    width: int = Field(default=256, ge=8)
    depth: int = Field(default=4, ge=2)
    n_queries: int = Field(default=16, ge=1)
    masked: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=5e-4, gt=0)

    heads: ClassVar[int] = 4
    weight_decay: ClassVar[float] = 0.01
    #: Longest caption, words and signs; what is longer is cut in training.
    max_words: ClassVar[int] = 24
    #: Weights of the two terms (CoCa: 1, 2).
    contrastive: ClassVar[float] = 1.0
    captioning: ClassVar[float] = 2.0
    #: Of the transformer.
    dropout: ClassVar[float] = 0.1
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "heads", "weight_decay", "max_words", "contrastive", "captioning", "dropout",
    })  # fmt: skip
    removed_settings: ClassVar[Mapping[str, Any]] = {"noise": 0.0}

    not_hashed: ClassVar[frozenset[str]] = _Banked.not_hashed | {"texts"}
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"gap"})

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} cannot be divided into {self.heads} heads; make it a multiple of {self.heads}"
            )
        if self.learns_from == "predictions":
            self.refuse_unused("gap", because="predictions have errors of their own")
        if self.learns_from != "texts":
            self.refuse_unused("texts", because=f"learns_from is {self.learns_from}")
        else:
            self.refuse_unused("masked", because="a text has no patches")
        return self

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of the bank and of further texts."""
        fields = super().hashed_fields()
        if self.texts is None:
            return fields
        check_file(
            self.texts.expanduser(), what="the file of reconstruction.captions.texts",
            hint="give a CSV file with the columns id and caption",
        )  # fmt: skip
        return {**fields, "texts_sha256": hash_file(self.texts.expanduser())}

    def check_files(self) -> None:
        """Raise `DataError` unless bank and further texts can be read."""
        super().check_files()
        if self.texts is not None:
            read_caption_bank(self.texts.expanduser())

    @property
    def correction(self) -> GapConfig | None:
        """How the gap between what is learnt from and what is described is bridged; None if it is not."""
        return self.gap or (GapConfig() if self.learns_from == "texts" else None)

    @property
    def needs_predictions(self) -> bool:  # type: ignore[override]
        """Whether it learns from out-of-fold predictions, or measures the gap on them."""
        measured = self.correction is not None and self.correction.needs_predictions
        return self.learns_from == "predictions" or measured

    @property
    def reads_draws(self) -> bool:  # type: ignore[override]
        """Whether it describes draws of the prior."""
        return self.learns_from == "images" and self.gap is None


class BrainCaptionsConfig(Settings):
    """Captions that the brain encoder writes directly from responses, without an image embedding.

    The decoder is that of the objective ``captioning`` of the encoder, learnt together with it.

    Parameters
    ----------
    n_beams
        Number of beams of the search; 1 takes the most likely word at each step.
    """

    kind: Literal["brain"] = "brain"
    n_beams: int = Field(default=1, ge=1)

    needs_predictions: ClassVar[bool] = False
    reads_draws: ClassVar[bool] = False
    reads_responses: ClassVar[bool] = True


#: Settings of any decoder of captions.
CaptionsConfig = Annotated[
    NearestCaptionsConfig
    | GitCaptionsConfig
    | MinilmCaptionsConfig
    | CocaCaptionsConfig
    | BrainCaptionsConfig,
    ByKind(),
]
