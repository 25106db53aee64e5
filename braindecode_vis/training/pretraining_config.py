"""Settings of the self-supervised pretraining of the parcel encoder. Imports no torch.

References
----------
He et al. (2022), arXiv:2111.06377 (masked autoencoders). Wang et al. (2024), arXiv:2411.07121 (WAVE). Assran et al.
(2023), arXiv:2301.08243 (I-JEPA). Bardes et al. (2024), arXiv:2404.08471 (V-JEPA). Dong et al. (2024),
arXiv:2409.19407 (Brain-JEPA). van den Oord et al. (2018), arXiv:1807.03748 (InfoNCE). Fan et al. (2024),
arXiv:2408.00759 (text-guided masking).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.checks import DataError, check_file, check_installed
from braindecode_vis.base.digests import hash_once, remember_digest
from braindecode_vis.base.settings import DeviceSettings, NeededWeights, Settings
from braindecode_vis.embeddings.caption_bank import read_caption_bank
from braindecode_vis.encoders.parcels_config import WEIGHTS, ParcelsConfig

Objective = Literal["masked", "jepa", "run_contrast"]


class ProbesConfig(Settings):
    """Tests of the frozen encoder during the pretraining; no probe changes a weight.

    Which person a window is of: a linear classifier that is fitted on some runs of each person and tested on the
    others, of held-out persons where at least two have two runs, of the training persons otherwise. Which network a
    parcel belongs to, from its mean token: a linear classifier, tested on parcels it was not fitted on; left out where
    the encoder gets the networks (`encoder.network_embedding`).

    Parameters
    ----------
    every
        Number of epochs between two tests; the last epoch is always tested.
    n_windows
        Largest number of windows that are encoded for the first two probes.
    labelled
        A run folder or a configuration file with a small labelled set: ridge from the frozen features of its training
        trials to the target of its configuration, and how often a training image that was left out is among the
        five nearest of those. Its test trials are never read.
    """

    every: int = Field(default=5, ge=1)
    n_windows: int = Field(default=1024, ge=16)
    labelled: Path | None = None

    not_hashed: ClassVar[frozenset[str]] = frozenset({"labelled"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"identity": True, "network": True, "top": 5}

    @property
    def labelled_source(self) -> Path | None:
        """Run folder or configuration file of the labelled set.

        Raises
        ------
        DataError
            If there is none.
        """
        if self.labelled is None:
            return None
        path = self.labelled.expanduser()
        config = path / "config.yaml" if path.is_dir() else path
        check_file(config, what="the labelled set of the probes", hint="correct pretrain.probes.labelled")
        return path

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the labelled set's configuration."""
        fields = super().hashed_fields()
        if (source := self.labelled_source) is not None:
            fields["labelled_digest"] = hash_once(source / "config.yaml" if source.is_dir() else source)
        return fields


#: Words of a protocol whose encoder a run pretrained on its own trials.
ON_TRAINING_TRIALS = "encoder pretrained without labels on training trials"
ON_GUIDED_TRIALS = "encoder pretrained on training trials with masks guided by what they show"


class PretrainConfig(DeviceSettings):
    """How the encoder is pretrained; the defaults follow He et al. if they give a value.

    Parameters
    ----------
    encoder
        The encoder to pretrain; the projector and `freeze_depth` are not used here.
    corpus
        Folders of corpora, made by the verb ``corpus``, with the training windows; without a corpus, the trials of the
        run are used. All must have the same channels. Persons that a corpus holds out are used only for the held-out
        error.
    corpus_digests
        Digests of their content. They are filled in automatically and kept with a run, so that a finished run can be
        read without its corpora; a changed corpus is refused.
    window_times, window_step
        Samples of a window of a corpus, and from one window to the next (`window_times` by default).
    shared_subjects
        What happens if a run tests a subject whose recordings are in the training of a corpus: ``refuse`` the run, or
        ``named`` in its protocol. Persons are identified by data set and label, and by the corpus (``corpus
        --people``).
    start_from
        Folder of an earlier pretraining (or a file of its weights or its checkpoint) whose encoder is trained further.
    objectives
        The objectives and their weights: ``masked`` reconstructs hidden patches from visible ones (He et al.),
        ``jepa`` predicts the output of a slowly updated copy of the encoder, which gets all patches, for the hidden
        ones (Assran et al.), ``run_contrast`` distinguishes two windows of one person (of different runs if possible)
        from those of others.
    mask
        What is masked together: single ``tokens``, whole ``parcels``, whole ``times``, or one of the three at random
        for each trial (``mixed``).
    mask_ratio
        Share of the tokens that are masked (0.75).
    guide
        Mask what best matches the seen image (text-guided masking) instead of random tokens. Each token alone reads
        the vector of the image, by ridge on the training trials, and those go whose prediction is most like it. Vectors
        are those of the run's ``target``, or of sentences about the images (``captions``). Training trials alone are
        looked at; trials of no known image, and the held-out error, keep masks by lot.
    captions
        For ``guide: captions``: CSV file with the columns ``id`` and ``caption``.
    captions_digest
        Digest of this file. It is filled in automatically and kept with a run, so that a fitted run can be read without
        the file; a changed file is refused.
    sentence_encoder
        For ``guide: captions``: ``minilm``, or the folder of another sentence encoder.
    normalisation
        What is predicted: ``patch``, each patch with its own mean and variance removed (He et al.), or ``parcel``,
        values standardised per parcel by the training trials; ``auto`` takes ``patch`` for patches of at least 8
        samples.
    decoder_width, decoder_depth
        Size of the light decoder, which is not kept, and of the predictor of ``jepa``; both have four heads.
    n_epochs, batch_size
        Passes over the data, and trials per step.
    learning_rate
        Of AdamW, with a linear rise over the first 5 % of the steps and a cosine fall to 0 (He et al.: betas 0.9 and
        0.95, decay 0.05, 5 % of the epochs; the rate is ours); gradients are clipped at a norm of 1. Biases, norms and
        embeddings have no decay.
    held_out
        Share of the groups of trials that only measures the error.
    hold_out_by
        What a group is: all trials of a ``stimulus``, of a ``run`` (right for unlabelled series, whose windows
        resemble their neighbours), or each ``trial``.
    keep
        Which weights are written: those with the lowest held-out error of ``masked``, or where that is no objective of
        ``run_contrast`` (``best``), or the ``last`` ones. With ``jepa`` the copy that follows is written.
    probes
        What is asked of the encoder as it learns.
    precision
        ``fp32``, or mixed precision in ``bf16`` (GPU, and processors with AVX512-BF16 or AMX) or ``fp16`` (GPU).
    checkpoint_steps
        Steps within an epoch between checkpoints; each epoch ends with one anyway. The interrupted and the
        uninterrupted run give the same weights.
    """

    encoder: ParcelsConfig = ParcelsConfig()
    corpus: tuple[Path, ...] = ()
    corpus_digests: tuple[str, ...] = ()
    window_times: int = Field(default=64, ge=1)
    window_step: int | None = Field(default=None, ge=1)
    shared_subjects: Literal["refuse", "named"] = "refuse"
    start_from: Path | None = None
    objectives: dict[Objective, float] = Field(default={"masked": 1.0})
    mask: Literal["tokens", "parcels", "times", "mixed"] = "tokens"
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    guide: Literal["target", "captions"] | None = None
    captions: Path | None = None
    captions_digest: str | None = None
    sentence_encoder: Literal["minilm"] | Path = "minilm"
    normalisation: Literal["auto", "patch", "parcel"] = "auto"
    decoder_width: int = Field(default=128, ge=1)
    decoder_depth: int = Field(default=2, ge=1)
    n_epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    hold_out_by: Literal["stimulus", "run", "trial"] = "stimulus"
    keep: Literal["best", "last"] = "best"
    probes: ProbesConfig | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint_steps: int | None = Field(default=None, ge=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset(
        {
            "device",
            "checkpoint_every",
            "checkpoint_steps",
            "corpus",
            "shared_subjects",
            "start_from",
            "captions",
            "sentence_encoder",
        }
    )
    hashed_if_set: ClassVar[frozenset[str]] = frozenset(
        {
            "corpus_digests", "window_times", "window_step", "objectives", "mask", "ema", "temperature",
            "contrast_width", "probes", "precision", "guide", "guide_share",
            "captions_digest",
        }
    )  # fmt: skip
    removed_settings: ClassVar[Mapping[str, Any]] = {
        "guide_share": 1.0, "decoder_heads": 4, "ema": 0.996, "temperature": 0.1, "contrast_width": 128,
        "warmup": 0.05, "betas": [0.9, 0.95], "weight_decay": 0.05, "clip": 1.0, "checkpoint_every": 1,
    }  # fmt: skip

    @model_validator(mode="after")
    def _check_fit(self) -> PretrainConfig:
        if self.decoder_width % 4:
            raise ValueError("decoder_width must be a multiple of 4, the number of heads")
        if self.encoder.pretrained is not None or self.encoder.freeze_depth:
            raise ValueError(
                "encoder.pretrained and encoder.freeze_depth are for the training that follows; pretrain.start_from "
                "continues from an earlier pretraining"
            )
        if not self.objectives or min(self.objectives.values()) <= 0:
            raise ValueError("objectives needs at least one of masked, jepa, run_contrast, each above 0")
        if self.corpus:
            self.refuse_unused(
                "held_out", "hold_out_by", because="a corpus defines which persons it holds out"
            )
        else:
            self.refuse_unused("window_times", "window_step", because="there is no corpus")
        if "masked" not in self.objectives:
            self.refuse_unused("normalisation", because="masked is not an objective")
        if set(self.objectives) == {"run_contrast"}:
            self.refuse_unused("decoder_width", "decoder_depth", because="no masked part is predicted")
        if set(self.objectives) == {"jepa"} and self.keep == "best":
            raise ValueError(
                "the targets of jepa change during the training, so its error cannot choose the best "
                "epoch; set keep to last, or add masked to the objectives"
            )
        return self

    @model_validator(mode="after")
    def _check_guide(self) -> Self:
        if self.guide != "captions":
            self.refuse_unused("captions", "sentence_encoder", because="guide is not captions")
        elif self.captions is None:
            raise ValueError(
                "guide is captions, but no file says them; set captions to a CSV file (id, caption)"
            )
        if self.guide is not None and self.corpus:
            raise ValueError(
                "guide masks what matches the image of a trial, but windows of a corpus have no image; "
                "leave guide or corpus out"
            )
        if self.guide is not None and self.mask == "mixed":
            raise ValueError(
                "guide masks the tokens, parcels or times that match most; set mask to one of these"
            )
        if self.guide is not None and set(self.objectives) == {"run_contrast"}:
            raise ValueError(
                "guide chooses what is masked, but run_contrast predicts no masked part; leave guide out"
            )
        return self

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the captions can be read and there is a sentence encoder."""
        if self.guide == "captions":
            check_installed("transformers", "pretrain.guide captions")
            self.hashed_fields()
            assert self.captions is not None  # as was checked
            # Captions that were seen before and are gone are missed by a pretraining alone.
            if self.captions.expanduser().exists():
                read_caption_bank(self.captions.expanduser())

    def list_weights(self) -> list[NeededWeights]:
        """Return the sentence encoder of a guide by captions."""
        from braindecode_vis.embeddings.sentence_encoder import list_sentence_weights

        named = self.sentence_encoder if self.guide == "captions" else None
        return list_sentence_weights(named, "sentence_encoder")

    @model_validator(mode="after")
    def _remember_files(self) -> Self:
        self.remember_files()
        return self

    def remember_files(self) -> None:
        """Note the digests of captions and corpora."""
        remember_digest(self, "captions")
        if not self.corpus:
            self.refuse_unused("corpus_digests", because="there is no corpus")
            return
        from braindecode_vis.datasets.corpus.reader import open_corpus

        try:
            found = tuple(open_corpus(folder.expanduser()).digest for folder in self.corpus)
        except DataError:  # gone, or never there: who reads them says so
            return
        if self.corpus_digests not in ((), found):
            raise ValueError(
                f"the corpora {', '.join(map(str, self.corpus))} do not match corpus_digests: they have "
                "grown or changed; leave corpus_digests out to pretrain on the present corpora"
            )
        self.__dict__["corpus_digests"] = found  # the model is frozen for everybody else

    @property
    def on_trials(self) -> str:
        """Words of the protocol of a run that pretrains on its own trials."""
        return ON_TRAINING_TRIALS if self.guide is None else ON_GUIDED_TRIALS

    @property
    def start_file(self) -> Path | None:
        """File of the weights that are trained on, that of the encoder if a folder is given.

        Raises
        ------
        DataError
            If there is no such file.
        """
        if self.start_from is None:
            return None
        path = self.start_from.expanduser()
        if path.is_dir():
            path = path / WEIGHTS
        return check_file(path, what="the earlier encoder", hint="correct pretrain.start_from")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of corpora and weights, which count by their content."""
        fields = super().hashed_fields()
        if self.corpus and not self.corpus_digests:
            from braindecode_vis.datasets.corpus.reader import open_corpus

            # Says what is wrong.
            fields["corpus_digests"] = [open_corpus(folder.expanduser()).digest for folder in self.corpus]
        if (file := self.start_file) is not None:
            fields["start_digest"] = hash_once(file)
        if self.guide == "captions":
            from braindecode_vis.embeddings.sentence_encoder import (
                find_sentence_folder,
                hash_sentence_encoder,
            )
            from braindecode_vis.embeddings.text import hash_captions

            folder = find_sentence_folder(self.sentence_encoder, "pretrain.sentence_encoder")
            fields["sentence_encoder_digest"] = hash_sentence_encoder(folder)
            if self.captions_digest is None:
                fields |= hash_captions(self.captions)
        return fields
