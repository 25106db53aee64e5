"""The configuration of a run: which component plays each role, with which settings.

Owns the unions that are the registry, reading YAML, dotted overrides that are validated again, and errors that
name the full path and the known keys. A new component is one file plus one name in a union here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from braindecode_vis.checks import ConfigError, suggest
from braindecode_vis.datasets.alljoined1 import Alljoined1Config
from braindecode_vis.datasets.alljoined16m import Alljoined16mConfig
from braindecode_vis.datasets.bids_fmri import BidsFmriConfig
from braindecode_vis.datasets.bids_meeg import BidsMeegConfig
from braindecode_vis.datasets.bold5000 import Bold5000Config
from braindecode_vis.datasets.deeprecon import DeepreconConfig
from braindecode_vis.datasets.digits69 import Digits69Config
from braindecode_vis.datasets.eeg_imagenet import EegImagenetConfig
from braindecode_vis.datasets.god import GodConfig
from braindecode_vis.datasets.haxby_slices import HaxbySlicesConfig
from braindecode_vis.datasets.manifests import find_package_data
from braindecode_vis.datasets.muse_n170 import MuseN170Config
from braindecode_vis.datasets.nod import NodConfig
from braindecode_vis.datasets.nsd import NsdConfig
from braindecode_vis.datasets.nsd_imagery import NsdImageryConfig
from braindecode_vis.datasets.nsd_repacks import NsdRepackConfig
from braindecode_vis.datasets.synthetic_digits import SyntheticDigitsConfig
from braindecode_vis.datasets.things_eeg1 import ThingsEeg1Config
from braindecode_vis.datasets.things_eeg2 import ThingsEeg2Config
from braindecode_vis.datasets.things_fmri import ThingsFmriConfig
from braindecode_vis.datasets.things_meg import ThingsMegConfig
from braindecode_vis.embeddings.degradations import ViewsConfig
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
from braindecode_vis.embeddings.engineered import EngineeredConfig
from braindecode_vis.embeddings.latents import AutoencoderKLConfig, TinyAutoencoderConfig
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.pixels import PcaConfig, PixelsConfig
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.embeddings.torchvision_models import TorchvisionConfig
from braindecode_vis.embeddings.transformers_models import TransformersConfig
from braindecode_vis.encoders.categories import LdaConfig, LogisticConfig
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.generators.latents import LatentsConfig
from braindecode_vis.generators.nearest import NearestConfig
from braindecode_vis.preprocessing.splits import PublishedSplitConfig, SplitConfig
from braindecode_vis.priors.identity import IdentityPriorConfig
from braindecode_vis.settings import Settings

DatasetConfig = Annotated[
    Alljoined1Config
    | Alljoined16mConfig
    | BidsFmriConfig
    | BidsMeegConfig
    | Bold5000Config
    | DeepreconConfig
    | Digits69Config
    | EegImagenetConfig
    | GodConfig
    | HaxbySlicesConfig
    | MuseN170Config
    | NodConfig
    | NsdConfig
    | NsdImageryConfig
    | NsdRepackConfig
    | SyntheticDigitsConfig
    | ThingsEeg1Config
    | ThingsEeg2Config
    | ThingsFmriConfig
    | ThingsMegConfig,
    Field(discriminator="kind"),
]
ImageEncoderConfig = Annotated[
    PixelsConfig
    | PcaConfig
    | EfficientNetConfig
    | OpenClipConfig
    | TimmConfig
    | TorchvisionConfig
    | TransformersConfig
    | EngineeredConfig
    | AutoencoderKLConfig
    | TinyAutoencoderConfig
    | ViewsConfig,
    Field(discriminator="kind"),
]
BrainEncoderConfig = Annotated[RidgeConfig | LdaConfig | LogisticConfig, Field(discriminator="kind")]
PriorConfig = IdentityPriorConfig
CATEGORY_DECODERS = ("lda", "logistic")
GeneratorConfig = Annotated[LatentsConfig | NearestConfig, Field(discriminator="kind")]


class RetrievalConfig(Settings):
    """How predictions are searched in a gallery.

    Parameters
    ----------
    gallery
        ``fold`` ranks each query among the test images of its own fold; ``all`` among the test images of all
        folds, which needs a space that the folds share. ``auto`` takes ``all`` where it can.
    centre
        What is taken off every embedding before the cosine: the ``mean`` of the training images' embeddings, their
        mean and spread (``zscore``), or nothing (``none``, as the papers do that train with the same cosine).
    n_top
        How many of the best candidates are kept per query.
    device
        Where the similarity runs; does not enter the fingerprint.
    """

    gallery: Literal["auto", "fold", "all"] = "auto"
    centre: Literal["mean", "zscore", "none"] = "mean"
    n_top: int = Field(default=5, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})


class RepeatsConfig(Settings):
    """Whether the repetitions of an image are averaged before the brain encoder sees them.

    Parameters
    ----------
    train, test
        ``averaged`` gives one trial per subject and image, ``single`` keeps every trial.
    """

    train: Literal["averaged", "single"] = "averaged"
    test: Literal["averaged", "single"] = "averaged"


class EvaluationConfig(Settings):
    """How scores get their intervals and nulls.

    Parameters
    ----------
    n_bootstrap
        Resamples of the stimuli behind every interval.
    n_permutations
        Shuffles of the image labels behind every chance level and p-value.
    features
        Image encoder whose features are compared as well, beside the pixels; None compares pixels only.
    """

    n_bootstrap: int = Field(default=10_000, ge=100)
    n_permutations: int = Field(default=10_000, ge=100)
    features: EfficientNetConfig | None = None


class RunConfig(Settings):
    """Everything that decides the result of a run.

    Parameters
    ----------
    name
        Name of the run; its folder is ``runs/<name>`` unless ``--out`` says otherwise.
    seed
        The one root seed.
    dataset, split, target, encoder, prior, generator
        The component of each role, by its ``kind``.
    repeats, retrieval, evaluation
        Settings of the steps that have no components.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    dataset: DatasetConfig
    split: SplitConfig = PublishedSplitConfig()
    target: ImageEncoderConfig = PixelsConfig()
    encoder: BrainEncoderConfig = RidgeConfig()
    repeats: RepeatsConfig = RepeatsConfig()
    prior: PriorConfig = IdentityPriorConfig()
    generator: GeneratorConfig = LatentsConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def decodes_categories(self) -> bool:
        """Whether the encoder names a class instead of predicting an embedding."""
        return self.encoder.kind in CATEGORY_DECODERS

    @model_validator(mode="after")
    def _check_split_fits_encoder(self) -> Self:
        if self.decodes_categories != (self.split.kind == "leave_one_run_out"):
            raise ValueError(
                f"the encoder {self.encoder.kind!r} and the split {self.split.kind!r} do not go together: categories "
                "are decoded by lda or logistic under split.kind leave_one_run_out, images by other encoders and splits"
            )
        return self

    @model_validator(mode="after")
    def _check_standardising_fits_split(self) -> Self:
        zscore = getattr(self.dataset, "zscore", "none")
        # Standardising precedes the split, with the trials that the data set itself declares as training.
        fits = {"kfold": ("none",), "leave_one_run_out": ("none", "run")}.get(self.split.kind, (zscore,))
        if zscore not in fits:
            raise ValueError(
                f"dataset.zscore {zscore!r} would standardise with trials that the split {self.split.kind!r} tests; "
                f"set dataset.zscore to {' or '.join(fits)}, or split.kind to published"
            )
        return self

    @model_validator(mode="after")
    def _check_whitening_fits_split(self) -> Self:
        # Noise normalisation precedes the split, too, and learns from the declared training trials.
        mvnn = getattr(self.dataset, "mvnn", "none")
        if mvnn != "none" and self.split.kind in ("kfold", "leave_one_run_out"):
            raise ValueError(
                f"dataset.mvnn {mvnn!r} would whiten with trials that the split {self.split.kind!r} tests; "
                "set dataset.mvnn to none, or split.kind to published"
            )
        return self

    @model_validator(mode="after")
    def _check_generator_accepts_target(self) -> Self:
        if not self.generator.accepts(self.target.kind):
            raise ValueError(
                f"the generator {self.generator.kind!r} cannot turn embeddings of the target "
                f"{self.target.kind!r} into images; set generator.kind to nearest, or target.kind to "
                "pixels, pca, vae or taesd"
            )
        return self


def read_config(source: str | Path, overrides: Iterable[str] = (), *, root: Path | None = None) -> RunConfig:
    """Read a configuration and apply overrides.

    Parameters
    ----------
    source
        A YAML file, a run folder that holds ``config.yaml``, the name of a shipped configuration, or the name of
        a data set (its default configuration).
    overrides
        Texts ``a.b=value``; the value is YAML.
    root
        Folder of the data set, as given on the command line.

    Raises
    ------
    ConfigError
        If the file is missing or any value is not valid; the message names the full path of the key.
    """
    path = find_config(source)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers raise ValueError
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not {type(content).__name__}.")
    # A new kind drops the settings of the old one, so kinds are chosen before their settings.
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith("kind")):
        _apply_override(content, text)
    if root is not None:
        if not isinstance(content.get("dataset"), dict):
            raise ConfigError(f"{path} names no dataset that --root could apply to.")
        content["dataset"]["root"] = str(root.expanduser().absolute())
    _make_paths_absolute(content, path.parent)
    return validate_config(content, where=str(path))


def _make_paths_absolute(content: dict[str, Any], base: Path) -> None:
    """Resolve relative folders and weights here, or beside the YAML file, since a run may be taken up elsewhere."""
    for role in ("dataset", "target"):
        settings = content.get(role)
        if not isinstance(settings, dict):
            continue
        for key in ("root", "images", "weights"):
            value = settings.get(key)
            if not isinstance(value, str) or value == "random" or Path(value).expanduser().is_absolute():
                continue
            here = Path(value).expanduser()
            settings[key] = str(
                (here if here.exists() or not (base / here).exists() else base / here).absolute()
            )


def find_config(source: str | Path) -> Path:
    """Return the YAML file that `source` stands for; see `read_config`."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    if len(path.parts) > 1 and path.parts[0] != "configs":
        raise ConfigError(
            f"the configuration {source} was not found; give a path, a run folder or a shipped name."
        )
    shipped = {p.stem: p for p in sorted(find_package_data("configs").glob("*.yaml"))}
    name = path.stem if path.suffix in (".yaml", ".yml") else str(source)
    if name in shipped:
        return shipped[name]
    defaults = [stem for stem in shipped if stem.split("_")[0] == name or stem.startswith(f"{name}_")]
    if defaults:
        return shipped[min(defaults, key=len)]
    raise ConfigError(
        f"{source} is neither a configuration file, a run folder, nor one of the shipped configurations "
        f"{', '.join(shipped)}{suggest(name, list(shipped))}."
    )


def _apply_override(content: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"the override {text!r} must have the form a.b=value, for example seed=1.")
    node = content
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
        if not isinstance(child, dict):
            raise ConfigError(
                f"the override {text!r} goes below {'.'.join(parts[: depth + 1])}, which is the value {child!r}."
            )
        node = child
    try:
        loaded = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the value of the override {text!r} is not valid YAML.") from error
    if parts[-1] == "kind" and node.get("kind") != loaded:
        node.clear()  # the settings of the old kind are not those of the new one
    node[parts[-1]] = loaded


def validate_config(content: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the validated configuration; the first thing wrong becomes one `ConfigError`."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}.") from error


def describe_validation_error(error: ValidationError) -> str:
    """Return one clause that names the key by its full path, what was given and what is known."""
    details = error.errors(include_url=False)
    first = next((d for d in details if d["type"] in ("extra_forbidden", "union_tag_invalid")), details[0])
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        path = ".".join(_drop_tags(location))
        return f"unknown key {path}; known here are {', '.join(known)}{suggest(location[-1], known)}"
    path = ".".join(_drop_tags(location)) or "the configuration"
    if first["type"] == "union_tag_invalid":
        tags = [tag.strip().strip("'\"") for tag in first["ctx"]["expected_tags"].split(",")]
        given = str(first["ctx"]["tag"])
        return f"unknown kind {given!r} in {path}.kind; known are {', '.join(tags)}{suggest(given, tags)}"
    if first["type"] == "literal_error" and location[-1] == "kind":
        return f"unknown kind {first['input']!r} in {path}; known are {first['ctx']['expected'].replace(chr(39), '')}"
    if first["type"] == "union_tag_not_found":
        return f"{path} must say its kind"
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) if len(location) == 0 else f"{path}: {first['ctx']['error']}"
    return f"{path} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}"


def _walk_models(location: list[str]) -> Iterable[tuple[str, Any]]:
    """Yield each part of an error location with the model that it names, or None."""
    model: Any = RunConfig
    options: dict[str, Any] = {}
    for part in location:
        if part in options:  # the tag of a union, which pydantic puts into the location
            model, options = options[part], {}
            yield part, model
            continue
        field = getattr(model, "model_fields", {}).get(part)
        members = () if field is None else get_args(field.annotation) or (field.annotation,)
        models = [m for m in members if isinstance(m, type) and issubclass(m, Settings)]
        options = {m.model_fields["kind"].default: m for m in models if "kind" in m.model_fields}
        model = models[0] if len(models) == 1 else None
        if model is not None:
            options = {}
        yield part, model


def _known_keys(location: list[str]) -> list[str]:
    model: Any = RunConfig
    for _, found in _walk_models(location):
        model = found
    return [] if model is None else list(model.model_fields)


def _drop_tags(location: list[str]) -> list[str]:
    """Return the location without the union tags, that is, as the user wrote it."""
    kept, model = [], RunConfig
    for part, found in _walk_models(location):
        is_tag = model is None and found is not None
        if not is_tag:
            kept.append(part)
        model = found if found is not None or not is_tag else model
    return kept


def dump_config(config: RunConfig) -> str:
    """Return the YAML of a configuration with every default written out."""
    content = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def list_kinds(role: str) -> list[str]:
    """Return the known kinds of a role (``dataset``, ``split``, ``target``, ``encoder``, ``prior``, ``generator``)."""
    annotation = RunConfig.model_fields[role].annotation
    members = get_args(annotation) or (annotation,)
    return [
        m.model_fields["kind"].default for m in members if isinstance(m, type) and issubclass(m, Settings)
    ]
