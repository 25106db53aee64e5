"""Published foundation models of EEG and fMRI as encoders.

Owns what their settings and their networks both read: how the public file of a model names its tensors, and the presets
that change none of its weights. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Presets in which the pretrained weights never change.
FROZEN = ("freeze", "linear_probe", "attentive_probe")


@dataclass(frozen=True)
class WeightsLayout:
    """How the public file of a model names its tensors.

    Parameters
    ----------
    title
        Name of the model, as its authors write it.
    wrappers
        Keys under which the table of tensors may lie; the first that is there is taken.
    prefix
        Start of the names that belong to the network; removed. Names without it are left out.
    prefix_may_lack
        Whether a file in which no name has the prefix is read as it is.
    beside
        Starts of names of parts that are beside it and keep their names; they are read if the network has them.
    ignored
        Starts of names (after the prefix) of parts that decoding does not use.
    absent
        Starts of names that the network has and the file has not; they keep their first values.
    """

    title: str
    wrappers: tuple[str, ...] = ()
    prefix: str = ""
    prefix_may_lack: bool = False
    beside: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


#: Parts of names that give a model's file away, and the title of its layout; the first that fits counts.
MARKS = {
    "quantize.embedding": "LaBraM's tokenizer (vqnsp)",
    "patch_embed.conv1.weight": "LaBraM",
    "patch_embedding.mask_encoding": "CBraMod",
    "summary_token": "EEGPT",
    "Encoder_0.0.weight": "BENDR",
    "mask_replacement": "BENDR",
    "to_patch_embedding.0.weight": "REVE",
    "vit.embeddings.": "BrainLM",
    "pos_embed_proj.emb_h": "Brain-JEPA",
    "mamba.A_log": "NeuroSTORM",
    "temparature": "LUNA",
    "pos_embed.weight_spatial": "CortexMAE",
}
