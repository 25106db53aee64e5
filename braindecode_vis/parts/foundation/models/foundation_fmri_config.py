"""Settings of published foundation models of fMRI: their parcels or volumes, repetition times and scalings.

`ParcelModelConfig` is common to those that read parcels x times of one atlas; what is common to all foundation models
is in `foundation_config`. Imports no torch.

References
----------
Ortega Caro et al. (2024), BrainLM, ICLR. Dong et al. (2024), Brain-JEPA, NeurIPS. Lane et al. (2025), CortexMAE,
arXiv:2510.13768. Wang et al. (2026), NeuroSTORM, Nature Biomedical Engineering.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_file
from braindecode_vis.base.store import hash_file
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.parts.foundation.models import WeightsLayout
from braindecode_vis.parts.foundation.models.foundation_config import FoundationConfig

if TYPE_CHECKING:
    from braindecode_vis.parts.foundation.models.foundation import Backbone

Scaling = Literal["none", "trial", "frame"]
#: Unit of values that were scaled by median and interquartile range.
ROBUST = "robust"
_SCHAEFER = re.compile(r"^(\d+)Networks_([LR])H_")
_LAST_NUMBER = re.compile(r"(\d+)\D*$")


def order_schaefer(names: Sequence[str], title: str) -> list[int]:
    """Return the rows of Schaefer's 400 parcels of 17 networks, left ones first, as their label numbers have them.

    Raises
    ------
    DataError
        If these are other parcels; those of 7 networks are the same places in another order.
    """
    found = [(row, match) for row, name in enumerate(names) if (match := _SCHAEFER.match(name))]
    networks = sorted({match.group(1) for _, match in found})
    sides = "".join(match.group(2) for _, match in found)
    if networks == ["17"] and sides == "L" * 200 + "R" * 200:
        return [row for row, _ in found]
    other = (
        f"{len(found)} of Schaefer with {' and '.join(networks)} networks" if found else "none of Schaefer"
    )
    raise DataError(
        f"{title} was pretrained on Schaefer's 400 parcels with 17 networks, but the responses have {len(names)} "
        f"parcels, {other} (first {names[0]}); set dataset.atlas to that of the model."
    )


class ParcelModelConfig(FoundationConfig):
    """Settings that models of parcels share: an atlas in its order, a repetition time, a scaling.

    Trials are interpolated linearly to the model's repetition time, and frames that fill no patch are left out.

    Parameters
    ----------
    parcels
        ``by_name`` compares number and names of the parcels with the model's atlas and puts them into its order;
        ``as_given`` compares only the number, for responses without meaningful names.
    """

    parcels: Literal["by_name", "as_given"] = "by_name"

    removed_settings: ClassVar[Mapping[str, Any]] = {"t_r": None}

    model_t_r: ClassVar[float]
    n_parcels: ClassVar[int]
    #: Frames of a patch, and how many frames the model can take.
    patch_frames: ClassVar[int]
    max_frames: ClassVar[int]
    #: Its name, for messages.
    atlas: ClassVar[str]

    def find_order(self, names: Sequence[str]) -> list[int]:
        """Return the rows of the model's parcels in its order, from the names of all parcels."""
        raise NotImplementedError

    def make_parcel_front(
        self, signal: Signal, order: Sequence[int] | None, *, scaling: Scaling, divisor: float = 1.0
    ) -> Any:
        """Return what orders parcels, interpolates in time, cuts and scales.

        Parameters
        ----------
        signal
            Trials of parcels x times.
        order
            Rows in the model's order; None takes that of `find_rows`.
        scaling, divisor
            See `foundation_fmri.ParcelFront`.

        Raises
        ------
        DataError
            If the axes, the parcels or the length do not fit.
        """
        from braindecode_vis.parts.foundation.models.foundation_fmri import ParcelFront

        title, t_r = self.layout.title, self.model_t_r
        frames = find_frames(signal, t_r, title)
        n_frames = min(self.count_frames(frames.shape[1]), self.max_frames)
        if n_frames < 1:
            needed = next(n for n in range(frames.shape[1] + 1, self.max_frames + 1) if self.count_frames(n))
            raise DataError(
                f"{title} needs trials of at least {needed} frames of {t_r:g} s, but these "
                f"have {frames.shape[1]}; take a longer window (dataset.model)."
            )
        if frames.shape[1] > self.max_frames:
            raise DataError(
                f"{title} has places for {self.max_frames} frames of {t_r:g} s, but these "
                f"trials have {frames.shape[1]}; take a shorter window (dataset.model)."
            )
        rows = self.find_rows(signal) if order is None else order
        return ParcelFront(rows, frames[:, :n_frames], scaling=scaling, divisor=divisor)

    def count_frames(self, n_frames: int) -> int:
        """Return how many of the frames fill patches."""
        return n_frames // self.patch_frames * self.patch_frames

    def find_rows(self, signal: Signal) -> list[int]:
        """Return the rows of the model's parcels in its order.

        Raises
        ------
        DataError
            If these are parcels of another atlas, or some are missing.
        """
        title, n = self.layout.title, signal.size_of("parcel")
        if n != self.n_parcels:
            raise DataError(
                f"{title} was pretrained on {self.n_parcels} parcels of {self.atlas}, but the responses have {n}: "
                "another atlas, or parcels without voxels were left out; set dataset.atlas to that of the model."
            )
        if self.parcels == "as_given":
            return list(range(n))
        if len(signal.parcels) != n:
            raise DataError(
                f"{title} needs parcel names, but the responses have none; if they are those of {self.atlas} in "
                "its order, set encoder.network.parcels=as_given."
            )
        return self.find_order(signal.parcels)

    def check_tensors(self, tensors: Mapping[str, Any], path: Path) -> None:
        """Raise `DataError` if a file of weights has places for other parcels; see `FoundationConfig.check_tensors`."""
        name, axis, size = self.find_table()
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) > axis and shape[axis] != size:
            raise DataError(
                f"{path} was trained on another atlas or length: its {name} has {shape[axis]} places, and those of "
                f"{self.atlas} are {size}; take the authors' file for that atlas, or another encoder.network.kind."
            )

    def find_table(self) -> tuple[str, int, int]:
        """Return the tensor whose size shows the atlas, its axis, and the size there."""
        raise NotImplementedError


def find_frames(signal: Signal, t_r: float, title: str) -> np.ndarray:
    """Return the matrix that interpolates trials linearly to a repetition time, shape (n_times, n_frames).

    Frames begin with the first sample; a last one beyond the trial's end is left out.

    Raises
    ------
    DataError
        If the trials have no time axis, or its times are unknown.
    """
    if signal.dims[1:] != ("time",):
        raise DataError(
            f"{title} reads time series of trials, but these are {' x '.join(signal.dims)}; keep the volumes of a "
            "window (dataset.model: {kind: window, keep: times}), or choose another encoder.network.kind."
        )
    if signal.times is None or len(signal.times) < 2:
        raise DataError(f"{title} needs the repetition time, but the responses have no times of the samples.")
    times = np.asarray(signal.times, float)
    step = float(np.median(np.diff(times)))
    n_frames = int(np.floor((len(times) - 1) * step / t_r + 1e-3)) + 1
    places = np.clip(np.arange(n_frames) * t_r / step, 0, len(times) - 1)
    return np.maximum(0, 1 - np.abs(np.arange(len(times))[:, None] - places))  # hats of linear interpolation


def read_table(path: Path, what: str, n_rows: int, n_columns: int, field: str) -> np.ndarray:
    """Return a table of numbers, comma or space between columns.

    Raises
    ------
    DataError
        If it is missing, is no such table, or has another size or values that are not finite.
    """
    path = path.expanduser()
    check_file(path, what=what, hint=f"correct encoder.network.{field}")
    try:
        text = path.read_text().replace(",", " ")
        table = np.array(
            [[float(word) for word in line.split()] for line in text.splitlines() if line.strip()]
        )
    except ValueError:
        table = np.empty(0)
    if table.shape != (n_rows, n_columns) or not np.isfinite(table).all():
        raise DataError(
            f"{path} must hold {n_rows} rows of {n_columns} finite numbers, {what}; correct encoder.network.{field}."
        )
    return table


class BrainLMConfig(ParcelModelConfig):
    """BrainLM (Ortega Caro et al. 2024): a masked autoencoder over the 424 parcels of A424 and 200 frames.

    Trials shorter than 200 frames are placed at the beginning of the picture, and only patches with frames are used, as
    in pretraining, which masked three quarters of them. The first patch holds 12 frames (9 with patches of 14). Parcels
    are scaled by median and interquartile range (``encoder.input_scaling.kind: robust``), then divided.

    Parameters
    ----------
    form
        ``picture``: the vision transformer of 111 M parameters; ``picture_650m``: the larger one, whose sizes are
        inferred from its name and its number of parameters; ``series``: the older model of 13 M.
    coordinates
        ``A424_Coordinates.dat`` of the model's authors: number, x, y, z of each parcel. The picture's rows are sorted
        by y; the older model places tokens by all three.
    pooling
        ``mean`` over patches, ``cls`` for the extra token, ``flatten`` for all patches side by side.
    """

    kind: Literal["brainlm"] = "brainlm"
    form: Literal["picture", "picture_650m", "series"] = "picture"
    coordinates: Path
    pooling: Literal["mean", "cls", "flatten"] = "mean"  # type: ignore[assignment]

    #: Sizes of each form.
    all_sizes: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "picture": {"width": 768, "depth": 12, "n_heads": 12, "hidden": 3072, "patch": 16},
        "picture_650m": {"width": 1280, "depth": 32, "n_heads": 16, "hidden": 5120, "patch": 14},
        "series": {"width": 512, "depth": 4, "n_heads": 4, "hidden": 1024, "patch": 20},
    }
    removed_settings: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("width", "depth", "n_heads", "hidden", "patch", "divisor")
    )

    not_hashed: ClassVar[frozenset[str]] = frozenset({"pretrained", "coordinates"})
    model_t_r: ClassVar[float] = 0.735
    n_parcels: ClassVar[int] = 424
    max_frames: ClassVar[int] = 200
    atlas: ClassVar[str] = "A424"
    layout: ClassVar[WeightsLayout] = WeightsLayout("BrainLM", ignored=("decoder.",))

    @property
    def sizes(self) -> dict[str, int]:
        """Width, depth, n_heads, hidden and patch."""
        return dict(self.all_sizes[self.form])

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields; files count by their content."""
        fields = super().hashed_fields()
        path = self.coordinates.expanduser()
        check_file(path, what="A424_Coordinates.dat", hint="correct encoder.network.coordinates")
        return fields | {"coordinates_digest": hash_file(path)}

    def read_places(self) -> np.ndarray:
        """Return x, y and z of each parcel in mm, shape (424, 3).

        Raises
        ------
        DataError
            If the file is not that of A424.
        """
        table = read_table(self.coordinates, "number, x, y, z of each parcel of A424", 424, 4, "coordinates")
        rows = np.argsort(table[:, 2], kind="stable")
        # The sum of rank times parcel of the published order: another table, or an order that is not stable, differs.
        if int(np.arange(424) @ rows) != 18_750_276 or not np.array_equal(table[:, 0], np.arange(1, 425)):
            raise DataError(
                f"{self.coordinates} holds other places than those of A424, so rows would be in another "
                "order than in the pretraining; give the A424_Coordinates.dat of BrainLM's authors in "
                "encoder.network.coordinates."
            )
        return table[:, 1:]

    def find_order(self, names: Sequence[str]) -> list[int]:
        """Return the rows as they are, if numbers or the names of the label file say that they are those of A424."""
        numbers = [match and int(match.group(1)) for match in map(_LAST_NUMBER.search, names)]
        foreign = any(_SCHAEFER.match(name) for name in names)
        official = (names[0], names[-1]) == ("R_V1_ROI", "Right_X")
        if foreign or not (official or numbers == list(range(1, 425))):
            raise DataError(
                f"BrainLM was pretrained on the parcels of A424 (numbers 1 to 424, or R_V1_ROI to Right_X), but the "
                f"responses have {names[0]} to {names[-1]}; set dataset.atlas to A424, or encoder.network.parcels="
                "as_given if they are the same parcels under other names."
            )
        return list(range(len(names)))

    def count_frames(self, n_frames: int) -> int:
        """Return how many of the frames fill patches; those at the picture's ends hold fewer than `patch`."""
        patch = self.sizes["patch"]
        if self.form == "series":
            return n_frames // patch * patch
        if n_frames >= self.max_frames:
            return self.max_frames
        side = -(-self.n_parcels // patch) * patch
        before = (side - self.max_frames) // 2
        return max(0, (before + n_frames) // patch * patch - before)

    def find_table(self) -> tuple[str, int, int]:
        """Return the table of places; the older model has none, and is recognised by its names."""
        side = -(-self.n_parcels // self.sizes["patch"])
        return "vit.embeddings.position_embeddings", 1, 1 + side * side

    def find_divisor(self, signal: Signal) -> float:
        """Return what scaled values are divided by.

        Raises
        ------
        ConfigError
            If the values were not scaled by median and interquartile range.
        """
        if signal.unit != ROBUST:
            raise ConfigError(
                "BrainLM was pretrained on parcels scaled by median and interquartile range, but the network sees "
                f"{signal.unit or 'an unknown unit'!r}; set encoder.input_scaling.kind to robust."
            )
        return 1.0 if self.form == "series" else 5.6430855

    def make_parts(self, signal: Signal) -> tuple[Any, Backbone]:
        """Return the front and the transformer; see `FoundationConfig.make_parts`."""
        import torch

        from braindecode_vis.parts.foundation.models.brainlm import BrainLM, OldBrainLM

        rows, places = self.find_rows(signal), self.read_places()
        if self.form != "series":
            rows = [rows[row] for row in np.argsort(places[:, 1], kind="stable")]
        front = self.make_parcel_front(signal, rows, scaling="none", divisor=self.find_divisor(signal))
        if self.form != "series":
            return front, BrainLM(**self.sizes, decoder=False)
        return front, OldBrainLM(torch.as_tensor(places, dtype=torch.float32), **self.sizes)


class BrainJepaConfig(ParcelModelConfig):
    """Brain-JEPA (Dong et al. 2024): a transformer over 450 parcels and patches of 16 frames of 2.2 s.

    The parcels are Tian's 50 of scale 3, then Schaefer's 400 of 17 networks; responses may have them in either order.
    A trial needs 35 s, so that the model suits movies and blocks rather than single pictures.

    Parameters
    ----------
    gradients
        The authors' table of functional gradients (``gradient_mapping_450.csv``), 30 columns, which is not in the file
        of weights.
    """

    kind: Literal["brain_jepa"] = "brain_jepa"
    gradients: Path

    #: Of the transformer.
    width: ClassVar[int] = 768
    depth: ClassVar[int] = 12
    n_heads: ClassVar[int] = 12
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"width", "depth", "n_heads"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"scaling": "trial"}

    not_hashed: ClassVar[frozenset[str]] = frozenset({"pretrained", "gradients"})
    model_t_r: ClassVar[float] = 2.205  # every third volume of 0.735 s
    n_parcels: ClassVar[int] = 450
    patch_frames: ClassVar[int] = 16
    max_frames: ClassVar[int] = 160
    atlas: ClassVar[str] = "Tian (scale 3) and Schaefer (400, 17 networks)"
    layout: ClassVar[WeightsLayout] = WeightsLayout(
        "Brain-JEPA", wrappers=("target_encoder",), prefix="module."
    )

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields; files count by their content."""
        fields = super().hashed_fields()
        path = self.gradients.expanduser()
        check_file(path, what="the table of gradients", hint="correct encoder.network.gradients")
        return fields | {"gradients_digest": hash_file(path)}

    def find_order(self, names: Sequence[str]) -> list[int]:
        """Return the subcortical rows, then those of cortex."""
        cortex = order_schaefer(names, self.layout.title)
        others = sorted(set(range(len(names))) - set(cortex))
        sides = [names[row].lower()[-2:] for row in others]
        if sides.count("rh") != 25 or sides.count("lh") != 25:
            raise DataError(
                "Brain-JEPA was pretrained on Tian's 50 subcortical parcels of scale 3, 25 whose names end in rh and "
                f"25 in lh, but the responses have {', '.join(names[row] for row in others[:4])}, ...; set "
                "dataset.atlas to that of the model, or encoder.network.parcels=as_given if they are the same under "
                "other names."
            )
        return [*others, *cortex]

    def find_table(self) -> tuple[str, int, int]:
        """Return the table of times, a row per token."""
        return "pos_embed_proj.emb_h", 0, self.n_parcels * self.max_frames // self.patch_frames

    def make_parts(self, signal: Signal) -> tuple[Any, Backbone]:
        """Return the front and the transformer; see `FoundationConfig.make_parts`."""
        import torch

        from braindecode_vis.parts.foundation.models.brain_jepa import BrainJEPA

        front = self.make_parcel_front(signal, None, scaling="trial")  # as the authors' fine-tuning
        table = read_table(self.gradients, "functional gradients of each parcel", 450, 30, "gradients")
        gradients = torch.as_tensor(table, dtype=torch.float32)
        return front, BrainJEPA(gradients, width=self.width, depth=self.depth, n_heads=self.n_heads)


class CortexMaeConfig(ParcelModelConfig):
    """CortexMAE for parcels (Lane et al. 2025): a masked autoencoder over Schaefer's 400 parcels and 16 frames of 1 s.

    Parcels are z-scored (``encoder.input_scaling.kind: zscore``), then each frame over its parcels, and cut at ±3.

    Parameters
    ----------
    pooling
        ``mean`` over patches, ``cls`` for the extra token, ``flatten`` for all patches side by side.
    """

    kind: Literal["cortex_mae"] = "cortex_mae"
    pooling: Literal["mean", "cls", "flatten"] = "mean"  # type: ignore[assignment]

    #: Of the transformer.
    width: ClassVar[int] = 768
    depth: ClassVar[int] = 12
    n_heads: ClassVar[int] = 12
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"width", "depth", "n_heads"})

    model_t_r: ClassVar[float] = 1.0
    n_parcels: ClassVar[int] = 400
    patch_frames: ClassVar[int] = 4
    max_frames: ClassVar[int] = 16
    atlas: ClassVar[str] = "Schaefer (400, 17 networks)"
    layout: ClassVar[WeightsLayout] = WeightsLayout("CortexMAE", wrappers=("model",), ignored=("decoder.",))

    def find_order(self, names: Sequence[str]) -> list[int]:
        """Return the rows of cortex."""
        return order_schaefer(names, self.layout.title)

    def find_table(self) -> tuple[str, int, int]:
        """Return the places of parcels."""
        return "encoder.pos_embed.weight_spatial", 1, self.n_parcels

    def make_parts(self, signal: Signal) -> tuple[Any, Backbone]:
        """Return the front and the transformer; see `FoundationConfig.make_parts`."""
        from braindecode_vis.parts.foundation.models.cortex_mae import CortexMAE

        front = self.make_parcel_front(signal, None, scaling="frame")
        return front, CortexMAE(width=self.width, depth=self.depth, n_heads=self.n_heads)


#: From indices of the model's volume to mm of MNI: 2-mm voxels from right to left; of FSL's 91 x 109 x 91, with three
#: rows of padding before the first and the last axis, and six rows of the second cut off.
NEUROSTORM_AFFINE = np.array([[-2.0, 0, 0, 96], [0, 2, 0, -114], [0, 0, 2, -78], [0, 0, 0, 1]])

#: Its repetition time in s.
NEUROSTORM_T_R = 0.8


class NeuroStormConfig(FoundationConfig):
    """NeuroSTORM (Wang et al. 2026): volumes of the whole brain over time through windows of state-space layers.

    Reads voxels of one grid in MNI space that all subjects share. Each place of the model's volume of 96 x 96 x 96
    voxels of 2 mm takes the nearest voxel; trials are interpolated linearly to 0.8 s and z-scored over voxels and
    frames together, and places outside of the brain take the least value. Four frames are a window, others are left
    out. Every layer is a recurrence over 256 steps, which is slow without a GPU.
    """

    kind: Literal["neurostorm"] = "neurostorm"

    #: Features of a token in the first of the stages, and blocks of each; as in the released settings.
    width: ClassVar[int] = 36
    depths: ClassVar[tuple[int, ...]] = (2, 2, 6, 2)
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"width", "depths"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"t_r": None}

    side: ClassVar[int] = 96
    layout: ClassVar[WeightsLayout] = WeightsLayout(
        "NeuroSTORM",
        wrappers=("state_dict",),
        prefix="model.",
        ignored=(
            "mask_token", "window_mask_token", "atlas_mask_token", "atlas_map", "first_patch_expanding.", "layers_up.",
            "norm_up.", "decoder_pred.",
        ),
    )  # fmt: skip

    def make_parts(self, signal: Signal) -> tuple[Any, Backbone]:
        """Return the front and the network; see `FoundationConfig.make_parts`."""
        from braindecode_vis.parts.foundation.models.foundation_fmri import VolumeFront, find_voxels
        from braindecode_vis.parts.foundation.models.neurostorm import NeuroSTORM

        title, n_voxels = self.layout.title, signal.size_of("voxel")
        frames = find_frames(signal, NEUROSTORM_T_R, title)
        n_frames = frames.shape[1] // 4 * 4
        if not 4 <= n_frames <= 20:
            raise DataError(
                f"{title} reads 4 to 20 frames of {NEUROSTORM_T_R:g} s, but these trials have {frames.shape[1]}; "
                "set the window of dataset.model."
            )
        if signal.voxel_ids is None or signal.affine is None:
            raise DataError(
                f"{title} reads volumes, but the voxels of these responses have no common grid in mm: give all "
                "subjects one mask in MNI space."
            )
        shape = (self.side,) * 3
        voxels = find_voxels(signal.voxel_ids, signal.grid, signal.affine, shape, NEUROSTORM_AFFINE)
        n_found = len(np.unique(voxels[voxels >= 0]))
        if n_found < 0.5 * n_voxels:
            raise DataError(
                f"only {n_found} of {n_voxels} voxels are inside the volume of {title}, so the images "
                "are not in MNI space; use images in MNI space (dataset.space)."
            )
        network = NeuroSTORM(side=self.side, width=self.width, depths=self.depths)
        return VolumeFront(voxels, frames[:, :n_frames]), network
