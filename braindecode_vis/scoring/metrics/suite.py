"""The metric suite of the natural-image literature: rows, networks, and what could not be computed.

Owns the rows PixCorr, SSIM, AlexNet(2), AlexNet(5), Inception, CLIP, EffNet-B, SwAV, LPIPS and DreamSim, and n-way
semantic accuracy by a classifier. Each distinct image goes through each network once. A row whose weights are not here
is named as not computed, with the file that it needs; no other network ever takes its place. Several draws per image
are scored one round at a time and the rounds averaged.

Two-way rows are named ``two_way_identification@alexnet-2`` and so on, distances ``correlation_distance@swav-resnet50``.

Semantic accuracy asks whether a classifier names the reconstruction as it names the seen image: a hit if the class of
the seen image has one of the k highest scores among itself and n - 1 random other classes. MinD-Vis draws
those classes; how WAVE does it is not known, because its code is not public. The mean over all draws has a closed
form, which is used here and has no noise.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207; Chen et al. (2023), MinD-Vis, arXiv:2211.06956 (n-way accuracy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError, check_finite, check_installed
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.base.stimuli import Images
from braindecode_vis.scoring.metrics.identification import make_identification_table
from braindecode_vis.scoring.metrics.image import ImageTable, make_image_table
from braindecode_vis.scoring.metrics.metric_registry import compare_pairs

Network = Literal[
    "alexnet", "inception", "clip", "efficientnet_b1", "swav", "lpips_alexnet", "lpips_vgg16", "dreamsim"
]
WeightsName = Literal[
    "alexnet", "inception", "clip", "efficientnet_b1", "swav", "vgg16", "lpips_alexnet", "lpips_vgg16", "dreamsim"
]  # fmt: skip
#: Rows that compare pairs of images, and the network whose layers they read.
LPIPS_NETWORKS: dict[str, str] = {"lpips_alexnet": "alexnet", "lpips_vgg16": "vgg16"}
#: Columns of the published tables.
PUBLISHED: tuple[Network, ...] = ("alexnet", "inception", "clip", "efficientnet_b1", "swav")
CPU_BATCH, GPU_BATCH = 8, 64


class MetricSuiteConfig(DeviceSettings):
    """Which rows are computed, and the files of their weights.

    Parameters
    ----------
    networks
        Rows that need a network: ``alexnet`` (AlexNet(2) and (5)), ``inception``, ``clip``, ``efficientnet_b1``,
        ``swav``, ``lpips_alexnet``, ``lpips_vgg16``, ``dreamsim``.
    weights
        File of each network, for DreamSim a folder. LPIPS needs the trunk (``alexnet`` or ``vgg16``) and its channel
        weights, which the package ``lpips`` ships. A row without its file is reported as not computed.
    pixels
        Add PixCorr and SSIM at 425 pixels, whatever the size of the stimuli.
    legacy_ssim
        Add SSIM as scikit-image up to 0.18 computed it; only for comparison with older numbers.
    legacy_resize
        Add PixCorr and SSIM at 425 pixels without antialiasing (``pixcorr@425-legacy``, ``ssim@425-legacy``), as
        torchvision up to 0.16 resized tensors; MindEye2's numbers are of that kind.
    semantic_ways
        Values of n for n-way top-1 semantic accuracy, by the classifier of the embedded EfficientNet-lite0.
    batch_size
        Images at a time, which does not change the result; without it, 8 images on a CPU and 64 on a GPU.
    """

    networks: tuple[Network, ...] = (*PUBLISHED, "lpips_alexnet")
    weights: dict[WeightsName, Path] = Field(default_factory=dict)
    pixels: bool = True
    legacy_ssim: bool = False
    legacy_resize: bool = False
    semantic_ways: tuple[Annotated[int, Field(ge=2, le=1000)], ...] = (50,)
    batch_size: int | None = Field(default=None, ge=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights", "batch_size", "device"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"legacy_resize"})

    @model_validator(mode="after")
    def _check_networks(self) -> MetricSuiteConfig:
        for name in ("networks", "semantic_ways"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names an entry twice: {list(values)}")
        return self

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of every file of weights that is used."""
        from braindecode_vis.embeddings.weights import hash_weights

        digests = {}
        for name in self.networks:
            files = self.find_files(name)
            # None is hashed too: a row that was not computed appears once its weights are there.
            digests[name] = None if files is None else [_hash_path(path, hash_weights) for path in files]
        return {**super().hashed_fields(), "weights_digests": digests}

    def check_files(self) -> None:
        """Raise `ConfigError` if weights were given of a network that only an extra can build."""
        if "clip" in self.networks and "clip" in self.weights:
            check_installed("open_clip", "clip of evaluation.suite")

    def list_weights(self) -> list[NeededWeights]:
        """Return the file of each network; rows without theirs are not computed."""
        from braindecode_vis.embeddings.published import read_models
        from braindecode_vis.embeddings.weights import describe_needed

        rows: dict[str, list[str]] = {}
        for network in self.networks:
            for name in list_needs(network):
                rows.setdefault(name, []).append(network)
        return [
            describe_needed(
                read_models().get({"clip": "clip_vit_l14"}.get(name, name)), f"weights.{name}",
                self.weights[name] if name in self.weights else self._find_file(name), what=describe_file(name),
                named=name in self.weights, automatic=False, leaves_out=", ".join(networks),
            )
            for name, networks in rows.items()
        ]  # fmt: skip

    def build(self) -> MetricSuite:
        """Return the suite; a network is loaded when its row is computed."""
        return MetricSuite(self)

    def find_files(self, network: Network) -> list[Path] | None:
        """Return the files that a row needs, or None if one of them was not given.

        Raises
        ------
        ConfigError
            If a path was given that does not exist.
        """
        found = [self._find_file(name) for name in list_needs(network)]
        return None if any(path is None for path in found) else [path for path in found if path is not None]

    def _find_file(self, name: str) -> Path | None:
        path = self.weights.get(name)  # type: ignore[call-overload]
        if path is None:
            if name in LPIPS_NETWORKS:
                from braindecode_vis.scoring.metrics.feature_networks import find_linear_weights

                return find_linear_weights(LPIPS_NETWORKS[name])
            return None
        path = path.expanduser()
        if not path.exists():
            raise ConfigError(
                f"evaluation.suite.weights.{name} names {path}, which does not exist; correct it or remove it."
            )
        return path


def list_needs(network: str) -> tuple[str, ...]:
    """Return the names of the files that a row needs."""
    return (LPIPS_NETWORKS[network], network) if network in LPIPS_NETWORKS else (network,)


def describe_file(name: str) -> str:
    """Say in one clause which file belongs to a name of `MetricSuiteConfig.weights`."""
    from braindecode_vis.scoring.metrics.feature_networks import NETWORKS

    if name in NETWORKS:
        return NETWORKS[name].needs
    if name == "vgg16":
        return "torchvision's vgg16 IMAGENET1K_V1, vgg16-397923af.pth"
    return f"the channel weights of {name} (v0.1 of the package lpips, or pip install lpips)"


def _hash_path(path: Path, hash_weights: Callable[[Path], str]) -> str:
    from braindecode_vis.base.digests import hash_once
    from braindecode_vis.base.store import hash_json

    if path.is_file():
        return hash_weights(path)
    # Weights may come as a folder; every file of it counts, in an order that no disk decides.
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return hash_json({str(p.relative_to(path)): hash_once(p) for p in files})


class MetricSuite:
    """The rows of a configuration whose weights are here."""

    def __init__(self, config: MetricSuiteConfig) -> None:
        self.config = config

    @property
    def available(self) -> list[Network]:
        """The networks whose files are all there."""
        return [name for name in self.config.networks if self.config.find_files(name) is not None]

    @property
    def not_computed(self) -> list[str]:
        """One sentence for each row that lacks its weights."""
        return [
            f"{name} not computed: needs {describe_file(part)} as evaluation.suite.weights.{part}"
            for name in self.config.networks
            for part in list_needs(name)
            if self.config._find_file(part) is None
        ]

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return choose_device(self.config.device, setting="evaluation.suite.device")

    @property
    def batch_size(self) -> int:
        """Images that go through a network together."""
        return self.config.batch_size or (GPU_BATCH if self.device == "cuda" else CPU_BATCH)

    def correlate(
        self,
        network: Network,
        table: ImageTable,
        *,
        advance: Callable[[int], None] = lambda n: None,
        spreads: dict[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return, for each space of a network, correlations of every distinct image with every one that was seen.

        Parameters
        ----------
        network
            One of `available` that has a space (all but LPIPS).
        table
            The images.
        advance
            Called with the number of images done.
        spreads
            As in `feature_networks.correlate_with_seen`.

        Returns
        -------
        dict
            Space to a float array of shape (n_distinct, n_shown).
        """
        from braindecode_vis.scoring.metrics.feature_networks import (
            NETWORKS,
            correlate_with_seen,
            load_network,
        )

        (path,) = self._require_files(network)
        extract = load_network(network, path, self.device)
        return correlate_with_seen(
            table.images, table.shown, NETWORKS[network], extract,
            device=self.device, batch_size=self.batch_size, advance=advance, spreads=spreads,
        )  # fmt: skip

    def compute_lpips(self, network: Network, images: Images, pairs: np.ndarray) -> np.ndarray:
        """Return the LPIPS distance of pairs of images, shape (n_pairs,); see `lpips.Lpips.compute_pairs`."""
        from braindecode_vis.scoring.metrics.feature_networks import Lpips

        trunk, linear = self._require_files(network)
        distance = Lpips(LPIPS_NETWORKS[network], trunk, linear, device=self.device)
        return distance.compute_pairs(images, pairs, batch_size=self.batch_size)

    def _require_files(self, network: Network) -> list[Path]:
        files = self.config.find_files(network)
        if files is None:
            raise ConfigError("; ".join(line for line in self.not_computed if line.startswith(network)) + ".")
        return files


@dataclass(frozen=True)
class SuiteResult:
    """Values of a suite.

    Parameters
    ----------
    values
        Metric to a float array of shape (n_images,), the rounds averaged; its mean is the number of a table.
    not_computed
        One sentence for each row that lacks its weights.
    """

    values: dict[str, np.ndarray]
    not_computed: list[str]


def compute_suite(truth: Images, decoded: Images, config: MetricSuiteConfig) -> SuiteResult:
    """Return every metric of the suite for decoded images beside the seen ones.

    Parameters
    ----------
    truth : uint8 array of shape (n_images, height, width, 3), or `ImageRows`
        Different images.
    decoded : uint8 array of shape (n_images, height, width, 3) or (n_images, n_draws, height, width, 3), or `ImageRows`
        What was made of each. Several draws are scored one round at a time. Rows that are read from files may be of
        other sizes than the seen images, and few are in memory at a time.
    config
        Rows and weights.

    Raises
    ------
    DataError
        If shapes do not fit or two seen images are the same.
    """
    suite, table = config.build(), make_image_table(truth, {"decoded": decoded})
    # A picture that is shown twice would be a distractor that cannot be beaten.
    if len(table.shown) < len(truth):
        raise DataError("two seen images of the suite are the same; give each of them once.")
    rounds, own = table.made["decoded"], np.arange(len(truth))
    # Image by image, so that each seen one is resized once.
    pairs = np.stack([np.tile(np.arange(len(rounds)), len(own)), *2 * [np.repeat(own, len(rounds))]], axis=1)
    pixels = compare_pairs(list_pixel_metrics(config), [table.images[one] for one in rounds], truth, pairs)
    values = {metric: several.reshape(len(own), -1).mean(axis=1) for metric, several in pixels.items()}
    for network in suite.available:
        if network in LPIPS_NETWORKS:
            # (n_rounds * n_images, 2): the seen image and what was made of it, round after round.
            pairs = np.stack([np.tile(table.seen, len(rounds)), rounds.ravel()], axis=1)
            distances = suite.compute_lpips(network, table.images, pairs)
            values[name_lpips(network)] = distances.reshape(rounds.shape).mean(axis=0)
            continue
        for space, matrix in suite.correlate(network, table).items():
            metric, is_two_way = name_comparison(network, space)
            tables = [
                matrix[one][:, table.column] for one in rounds
            ]  # (n_images, n_images), truths in columns
            # EfficientNet-B1 and SwAV are compared by distance, the others by identification, as in published
            # tables.
            tables = [make_identification_table(one, 2) if is_two_way else 1 - one for one in tables]
            values[metric] = np.mean([one[own, own] for one in tables], axis=0)
    return SuiteResult(values | compute_semantic(table, "decoded", config.semantic_ways), suite.not_computed)


def compute_semantic(table: ImageTable, method: str, ways: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return n-way semantic accuracy of each row by the embedded classifier, the rounds averaged."""
    if not ways:
        return {}
    tables, own = tabulate_semantic(table, method, ways), np.arange(len(table.seen))
    return {
        name_semantic_metric(n, 1, "efficientnet-lite0"): np.mean(
            [one[own, table.column] for one in tables[n]], axis=0
        )
        for n in ways
    }


def tabulate_semantic(
    table: ImageTable, method: str, ways: tuple[int, ...], logits: np.ndarray | None = None
) -> dict[int, list[np.ndarray]]:
    """Return, for each n and each round, semantic accuracy if each shown image were a row's own.

    Parameters
    ----------
    table
        The images.
    method
        Whose images.
    ways
        Values of n.
    logits : array of shape (n_distinct, 1000), optional
        From `classify`, if it was called before.

    Returns
    -------
    dict
        n to one array of shape (n_rows, n_shown) per round.
    """
    scores = classify(table) if logits is None else logits
    shown = scores[table.shown]
    return {n: [compute_semantic_table(shown, scores[one], n) for one in table.made[method]] for n in ways}


def classify(table: ImageTable) -> np.ndarray:
    """Return ImageNet logits of every distinct image by the embedded EfficientNet-lite0, shape (n_distinct, 1000)."""
    from braindecode_vis.embeddings.efficientnet import EfficientNetConfig

    return EfficientNetConfig().build().classify(table.images)


def list_pixel_metrics(config: MetricSuiteConfig) -> list[str]:
    """Return the names of the rows that need no network."""
    names = ["pixcorr@425", "ssim@425"] * config.pixels + ["ssim_legacy@425"] * config.legacy_ssim
    return names + ["pixcorr@425-legacy", "ssim@425-legacy"] * config.legacy_resize


def name_lpips(network: str) -> str:
    """Return the name of an LPIPS row, ``lpips@alexnet`` or ``lpips@vgg16``."""
    return f"lpips@{LPIPS_NETWORKS[network]}"


def name_comparison(network: str, space: str) -> tuple[str, bool]:
    """Return the name of the metric of a space, and whether it is two-way identification."""
    from braindecode_vis.scoring.metrics.feature_networks import NETWORKS

    is_two_way = NETWORKS[network].comparison == "two_way"
    return f"{'two_way_identification' if is_two_way else 'correlation_distance'}@{space}", is_two_way


# --- semantic accuracy --------------------------------------------------------------------------------------------


def compute_semantic_table(
    seen_logits: np.ndarray, made_logits: np.ndarray, n: int, *, top_k: int = 1
) -> np.ndarray:
    """Return the probability of a hit of every reconstruction if every seen image were its own.

    Parameters
    ----------
    seen_logits : array of shape (n_seen, n_classes)
        Scores of the seen images; only the highest of each is used.
    made_logits : array of shape (n_made, n_classes)
        Scores of the reconstructions.
    n
        Number of classes among which the right one has to win, itself included.
    top_k
        How many of them may be named.

    Returns
    -------
    float array of shape (n_made, n_seen)
        Between 0 and 1; for a classifier that sees nothing top_k / n. A tie with another class is lost.

    Raises
    ------
    ConfigError
        If n is not between 2 and the number of classes, or top_k not between 1 and n - 1.

    Examples
    --------
    >>> logits = np.eye(4)
    >>> compute_semantic_table(logits, logits, 4).diagonal()
    array([1., 1., 1., 1.])
    """
    n_classes = seen_logits.shape[1]
    if made_logits.shape[1] != n_classes:
        raise DataError(
            f"logits of {n_classes} classes cannot be compared with logits of {made_logits.shape[1]} classes."
        )
    if not 2 <= n <= n_classes or not 1 <= top_k < n:
        raise ConfigError(
            f"{n}-way semantic accuracy with the best {top_k} needs 2 <= n <= {n_classes} and 1 <= k < n."
        )
    for name, rows in (("seen", seen_logits), ("decoded", made_logits)):
        check_finite(rows, what=f"logits of {name} images", row_names=range(len(rows)), unit="image")
    classes = np.argmax(seen_logits, axis=1)
    own = made_logits[:, classes]  # (n_made, n_seen)
    # The place of each asked class among the sorted logits says how many classes it beats; a tie beats none.
    ordered = np.sort(made_logits, axis=1)
    lower = np.stack([np.searchsorted(row, value, "left") for row, value in zip(ordered, own, strict=True)])
    return make_win_table(n_classes, n, top_k)[n_classes - 1 - lower]


def make_win_table(n_classes: int, n: int, top_k: int) -> np.ndarray:
    """Return the probability of a hit by the number of classes that are not beaten, shape (n_classes,).

    With b such classes, at most ``top_k - 1`` of them may be among the n - 1 that are drawn without replacement from
    the other ``n_classes - 1``: a hypergeometric distribution.
    """
    from scipy.stats import hypergeom

    not_beaten = np.arange(n_classes)  # (n_classes,)
    return np.asarray(hypergeom.cdf(top_k - 1, n_classes - 1, not_beaten, n - 1), dtype=float)


def name_semantic_metric(n: int, top_k: int, classifier: str) -> str:
    """Return the name of the metric with everything that defines it.

    Examples
    --------
    >>> name_semantic_metric(50, 1, "efficientnet-lite0")
    '50_way_top1_semantic_accuracy@efficientnet-lite0'
    """
    return f"{n}_way_top{top_k}_semantic_accuracy@{classifier}"
