"""Finds the settings class of a `kind`, by role, inside the package and outside it.

Holds the tables of the components of the core, the entry points through which other packages add components, and the
annotation of a settings field that takes any component of a role. The module of a component is imported when its kind
is used, so that a mistyped name is reported before torch, mne and pandas are loaded. It does not know the methods of a
role; those are in `roles`. The components of parts come from `parts`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from pydantic import (
    GetCoreSchemaHandler,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import CoreSchema, PydanticCustomError

from braindecode_vis.base.checks import ConfigError, check_option
from braindecode_vis.base.consent import ConsentError, describe_refusal, find_code, give_consent, may_import
from braindecode_vis.base.parts import describe_missing, find_parts, is_beside_the_caller
from braindecode_vis.base.settings import (
    OUTSIDE,
    OutsideCode,
    Settings,
    describe_unknown_key,
    describe_unknown_kind,
    describe_validation_error,
)

#: Role -> kind of the core -> ``module:Class`` below the package, in the order in which kinds are listed.
_CORE: dict[str, dict[str, str]] = {
    "dataset": {
        "alljoined1": "datasets.alljoined.alljoined1:Alljoined1Config",
        "alljoined16m": "datasets.alljoined.alljoined16m:Alljoined16mConfig",
        "arrays": "datasets.array_folder:ArraysConfig",
        "bids_fmri": "datasets.bids.fmri_dataset:BidsFmriConfig",
        "bids_meeg": "datasets.bids.meeg_dataset:BidsMeegConfig",
        "bold5000": "datasets.bold5000:Bold5000Config",
        "bold5000_betas": "datasets.bold5000:Bold5000BetasConfig",
        "cneuromod_things": "datasets.cneuromod_things:CneuromodThingsConfig",
        "deeprecon": "datasets.kamitani.deeprecon:DeepreconConfig",
        "digits69": "datasets.digits69:Digits69Config",
        "eeg_imagenet": "datasets.eeg_imagenet:EegImagenetConfig",
        "god": "datasets.kamitani.god:GodConfig",
        "haxby_slices": "datasets.haxby_slices:HaxbySlicesConfig",
        "laion_fmri": "datasets.laion_fmri:LaionFmriConfig",
        "mosaic": "datasets.mosaic:MosaicConfig",
        "muse_n170": "datasets.muse_n170:MuseN170Config",
        "nod": "datasets.nod:NodConfig",
        "nod_eeg": "datasets.nod_meeg:NodEegConfig",
        "nod_meg": "datasets.nod_meeg:NodMegConfig",
        "nsd": "datasets.nsd.dataset:NsdConfig",
        "nsd_imagery": "datasets.nsd.imagery_dataset:NsdImageryConfig",
        "nsd_repack": "datasets.nsd.repacks:NsdRepackConfig",
        "nsd_synthetic": "datasets.nsd.synthetic_dataset:NsdSyntheticConfig",
        "nsd_timeseries": "datasets.nsd.timeseries:NsdTimeseriesConfig",
        "synthetic_digits": "datasets.synthetic_digits:SyntheticDigitsConfig",
        "things_eeg1": "datasets.things_eeg1:ThingsEeg1Config",
        "things_eeg2": "datasets.things_eeg2.dataset:ThingsEeg2Config",
        "things_fmri": "datasets.things_fmri.dataset:ThingsFmriConfig",
        "things_meg": "datasets.things_meg.dataset:ThingsMegConfig",
        "v4_photographs": "datasets.v4_photographs:V4PhotographsConfig",
        "vim1": "datasets.vim1:Vim1Config",
    },
    "split": {
        "published": "preprocessing.splits:PublishedSplitConfig",
        "kfold": "preprocessing.splits:KFoldSplitConfig",
        "group_kfold": "preprocessing.splits:GroupKFoldSplitConfig",
        "leave_one_image_out": "preprocessing.splits:LeaveOneImageOutConfig",
        "leave_one_group_out": "preprocessing.splits:LeaveOneGroupOutConfig",
        "leave_one_run_out": "preprocessing.splits:LeaveOneRunOutConfig",
        "leave_one_subject_out": "preprocessing.splits:LeaveOneSubjectOutConfig",
    },
    "target": {
        "pixels": "embeddings.pixels:PixelsConfig",
        "pca": "embeddings.pixels:PcaConfig",
        "efficientnet-lite0": "embeddings.efficientnet:EfficientNetConfig",
        "openclip": "embeddings.openclip:OpenClipConfig",
        "timm": "embeddings.timm_models:TimmConfig",
        "torchvision": "embeddings.torchvision_models:TorchvisionConfig",
        "transformers": "embeddings.transformers_models:TransformersConfig",
        "engineered": "embeddings.pixels:EngineeredConfig",
        "layers": "embeddings.layer_fusion:LayersConfig",
        "vae": "embeddings.autoencoders:AutoencoderKLConfig",
        "taesd": "embeddings.autoencoders:TinyAutoencoderConfig",
        "packaged_latents": "generation.packaged_latents:PackagedLatentsConfig",
        "views": "embeddings.degradations:ViewsConfig",
        "imported": "embeddings.imported:ImportedConfig",
        "clip_text": "embeddings.text:ClipTextConfig",
        "minilm": "embeddings.sentence_encoder:MinilmConfig",
        "conditional": "embeddings.conditional:ConditionalConfig",
    },
    "encoder": {
        "ridge": "encoders.ridge:RidgeConfig",
        "linear_gaussian": "encoders.linear_gaussian:LinearGaussianConfig",
        "average": "encoders.average:AverageConfig",
        "network": "training.network_config:NetworkEncoderConfig",
        "auto": "training.auto:AutoConfig",
        "lda": "encoders.category_decoders:LdaConfig",
        "logistic": "encoders.category_decoders:LogisticConfig",
        "network_categories": "training.category_network:NetworkCategoriesConfig",
    },
    "network": {
        "eegproject": "encoders.atm_config:EEGProjectConfig",
        "tsconv": "encoders.atm_config:TSConvConfig",
        "atm_s": "encoders.atm_config:AtmSConfig",
        "atm_e": "encoders.atm_config:AtmEConfig",
        "simpleconv_image": "encoders.simpleconv_config:SimpleConvImageConfig",
        "eegnet": "encoders.atm_config:EEGNetConfig",
        "braindecode": "encoders.braindecode_models:BraindecodeConfig",
        "residual_mlp": "encoders.mindeye_config:ResidualMlpConfig",
        "shared_space": "encoders.mindeye_config:SharedSpaceConfig",
        "parcels": "encoders.parcels_config:ParcelsConfig",
        "latent_decoder": "encoders.latent_decoder_config:LatentDecoderConfig",
    },
    "objective": {
        "clip": "training.objectives.objectives_config:ClipObjectiveConfig",
        "clip_image_text": "training.objectives.objectives_config:ClipImageTextObjectiveConfig",
        "siglip": "training.objectives.objectives_config:SiglipObjectiveConfig",
        "mse": "training.objectives.objectives_config:MseObjectiveConfig",
        "l1": "training.objectives.objectives_config:L1ObjectiveConfig",
        "cosine": "training.objectives.objectives_config:CosineObjectiveConfig",
        "soft_clip": "training.objectives.objectives_config:SoftClipObjectiveConfig",
        "bimixco": "training.objectives.objectives_config:BimixcoObjectiveConfig",
        "alignment": "training.objectives.objectives_config:AlignmentObjectiveConfig",
        "mmd": "training.objectives.objectives_config:MmdObjectiveConfig",
        "uniformity": "training.objectives.objectives_config:UniformityObjectiveConfig",
        "cua": "training.objectives.objectives_config:CuaObjectiveConfig",
        "multiview": "training.objectives.objectives_config:MultiviewObjectiveConfig",
        "distillation": "training.objectives.objectives_config:DistillationObjectiveConfig",
        "tcl": "training.objectives.objectives_config:TclObjectiveConfig",
        "within_cluster": "training.objectives.objectives_config:ClusterObjectiveConfig",
        "hydra": "training.objectives.objectives_config:HydraObjectiveConfig",
        "captioning": "training.objectives.objectives_config:CaptioningObjectiveConfig",
        "salient": "training.objectives.objectives_config:SalientObjectiveConfig",
        "propagation": "training.objectives.objectives_config:PropagationObjectiveConfig",
        "sentence_contrast": "training.objectives.objectives_config:SentenceObjectiveConfig",
        "composition": "training.objectives.objectives_config:CompositionObjectiveConfig",
        "diffusion_prior": "generation.priors.diffusion_config:DiffusionPriorObjectiveConfig",
    },
    "augmentation": {
        "channel_dropout": "training.augment:ChannelDropoutConfig",
        "time_shift": "training.augment:TimeShiftConfig",
        "gaussian_noise": "training.augment:GaussianNoiseConfig",
        "smoothing": "training.augment:SmoothingConfig",
        "braindecode": "training.augment:BraindecodeAugmentationConfig",
        "trial_mixing": "training.augment:TrialMixingConfig",
        "subject_mixing": "training.augment:SubjectMixingConfig",
        "repetition_averaging": "training.augment:RepetitionAveragingConfig",
    },
    "prior": {
        "identity": "generation.priors.closed_form:IdentityPriorConfig",
        "mean": "generation.priors.closed_form:MeanPriorConfig",
        "spread": "generation.priors.closed_form:SpreadPriorConfig",
        "moments": "generation.priors.closed_form:MomentsPriorConfig",
        "neighbours": "generation.priors.neighbours:NeighboursPriorConfig",
        "diffusion": "generation.priors.diffusion_config:DiffusionPriorConfig",
        "joint_diffusion": "generation.priors.diffusion_config:JointPriorConfig",
    },
    "generator": {
        "latents": "generation.inversion:LatentsConfig",
        "nearest": "generation.inversion:NearestConfig",
        "refiner": "generation.refiner_config:RefinerConfig",
        "latent_diffusion": "generation.latent_diffusion_config:LatentDiffusionConfig",
        "sdxl_turbo": "generation.hub_config:SdxlTurboConfig",
        "sd_ip_adapter": "generation.hub_config:SdAdapterConfig",
        "versatile_diffusion": "generation.hub_config:VersatileDiffusionConfig",
        "token_unclip": "generation.token_unclip:TokenUnclipConfig",
    },
    "analysis": {},  # the part `analyses` brings them
    # only those that are scored where a configuration names them; all others need no settings
    "metric": {
        "correlation_distance": "scoring.metrics.metric_config:CorrelationDistanceConfig",
    },
}

#: Makes settings of a class of plain torch modules, which stand where the settings of a network do.
_PLAIN_MODULES = "braindecode_vis.encoders.plain_module:make_settings"

#: The roles of components.
ROLES = tuple(_CORE)

#: Role -> kind that an earlier version had -> what to write instead, or why it is no more.
DROPPED: dict[str, dict[str, str]] = {
    "target": {
        "concept_table": "write {kind: imported, layout: rows, ...} with a file of one row per image",
    },
    "encoder": {
        "multistage": "two stages found no more images than one training; write {kind: network}, with {kind: "
        "within_cluster} among its objectives for negatives of one cluster",
    },
    "network": {
        **{
            kind: f"write {{kind: braindecode, model: {model}}} (pip install 'braindecode_vis[braindecode]')"
            for kind, model in {"shallow_fbcsp": "ShallowFBCSPNet", "deep4": "Deep4Net"}.items()
        },
        "simpleconv": "it stayed at chance; write {kind: simpleconv_image}, the same stack with heads for images",
        "simpleconv_time_agg": "write {kind: simpleconv_image}, which takes the weighted sum over time too",
    },
    "generator": {
        "unclip": "its weights were withdrawn; write {kind: sdxl_turbo}, which takes the same embedding of ViT-H-14",
        "kandinsky": "write {kind: token_unclip} for ViT-bigG-14, or {kind: sdxl_turbo} for ViT-H-14",
    },
    "objective": {
        "within_concept": "it found no more images than clip alone; write {kind: within_cluster}",
    },
    "metric": {
        "cosine_to_target": "no page or configuration asked for it; write {kind: correlation_distance}",
    },
    "augmentation": {
        "frequency_dropout": "write {kind: braindecode, name: BandstopFilter, parameters: {bandwidth: 4}} (pip install "
        "'braindecode_vis[braindecode]')",
    },
}

#: Role -> group of the entry points with which a package from outside adds components. Splits stay inside: what is
#: trained and what is tested is the one thing that every number of the report rests on.
GROUPS: dict[str, str] = {
    "dataset": "braindecode_vis.datasets",
    "target": "braindecode_vis.image_encoders",
    "encoder": "braindecode_vis.brain_encoders",
    "network": "braindecode_vis.networks",
    "objective": "braindecode_vis.objectives",
    "augmentation": "braindecode_vis.augmentations",
    "prior": "braindecode_vis.priors",
    "generator": "braindecode_vis.generators",
    "metric": "braindecode_vis.metrics",
    "analysis": "braindecode_vis.analyses",
}


@cache
def list_inside(role: str) -> Mapping[str, str]:
    """Return the kinds of a role in this package, with parts, and their settings as ``module:Class``."""
    found = {kind: f"braindecode_vis.{reference}" for kind, reference in _CORE[role].items()}
    for part in find_parts():
        if part.distribution is None:
            found |= {kind: f"{part.package}.{place}" for kind, place in part.kinds.get(role, {}).items()}
    return MappingProxyType(found)


def list_kinds(role: str) -> list[str]:
    """Return the known kinds of a role, first those of the package, then those of other installed packages."""
    check_option("role", role, ROLES)
    inside = list_inside(role)
    return [*inside, *(kind for kind in _read_entry_points()[role] if kind not in inside)]


def find_component(role: str, kind: str) -> type[Settings]:
    """Return the settings class of a component, and import its module.

    Parameters
    ----------
    role
        One of `ROLES`.
    kind
        Name of a component of the package, of an entry point, or ``package.module:Class``.

    Raises
    ------
    LookupError
        If nothing has this name.
    ConfigError
        If a component from outside is missing, broken, named like one inside, or not allowed in this call.
    """
    if ":" in kind:
        return _find_outside(role, kind)
    # Read for kinds inside too: a package that takes one of their names would else be ignored without a word.
    entries = _read_entry_points()[role].get(kind, [])
    if kind in (inside := list_inside(role)):
        if entries:
            raise ConfigError(_describe_clash(kind, _describe_package(entries[0])))
        module, _, name = inside[kind].partition(":")
        found: type[Settings] = getattr(importlib.import_module(module), name)
        return found
    if not entries and kind in DROPPED.get(role, {}):
        raise ConfigError(f"{kind!r} is no longer a kind of {role}: {DROPPED[role][kind]}")
    if not entries and (missing := describe_missing(kind)):
        raise ConfigError(missing)
    if not entries:
        raise LookupError(kind)
    if len(entries) > 1:
        raise ConfigError(
            f"both {' and '.join(map(_describe_package, entries))} name a component {kind!r}; uninstall one of them, "
            "or write package.module:Class instead of the name"
        )
    return _find_outside(role, entries[0].value, entries[0])


def validate_component(role: str, content: Any, *, trusted: bool = False) -> Any:
    """Return the settings of a component from plain values that name its ``kind``; see `Component`.

    Parameters
    ----------
    role
        One of `ROLES`.
    content
        Plain values, or a settings object.
    trusted
        Whether the user wrote them for this call, so that code that they name may be imported.

    Raises
    ------
    ConfigError
        If the values are not valid.
    """
    try:
        with give_consent(code=find_code(content) if trusted else ()):
            return TypeAdapter(Annotated[Any, Component(role)]).validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"{describe_validation_error(error, role)}.") from error


class Component:
    """Annotation of a field that takes the settings of any component of a role: ``Annotated[Any, Component("prior")]``.

    The field takes a mapping with a ``kind``, or a settings object. A component from outside is written with the name
    that the user gave.

    Parameters
    ----------
    role
        One of `ROLES`.
    only
        The allowed kinds of the package; None allows all of them.
    outside
        Whether components from outside are allowed.
    """

    def __init__(self, role: str, *, only: Sequence[str] | None = None, outside: bool = True) -> None:
        self.role, self.outside = role, outside and role in GROUPS
        self._only = None if only is None else tuple(only)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The allowed kinds of this package."""
        return tuple(list_inside(self.role)) if self._only is None else self._only

    def list_kinds(self) -> list[str]:
        """Return the allowed kinds."""
        return [kind for kind in list_kinds(self.role) if kind in self.kinds or self._is_outside(kind)]

    def _is_outside(self, kind: str) -> bool:
        return self.outside and kind not in list_inside(self.role)

    def find(self, content: Mapping[str, Any], key: str) -> type[Settings] | None:
        """Return the class of the package that plain values name, None if only `validate` can find it."""
        kind = content.get("kind")
        if not isinstance(kind, str) or ":" in kind or kind in DROPPED.get(self.role, {}):
            return None
        if kind not in self.list_kinds():
            missing = describe_missing(kind)
            raise ConfigError(
                f"{key}: {missing}" if missing else describe_unknown_kind(kind, key, self.list_kinds())
            )
        return find_component(self.role, kind) if kind in self.kinds else None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate and dump by the class that the kind names."""
        return handler.generate_schema(Annotated[Any, PlainValidator(self.validate), PlainSerializer(_dump)])

    def validate(self, value: Any) -> Settings:
        """Return the settings of a component; errors list the known kinds, and pydantic adds the path."""
        if isinstance(value, Settings):
            return self._check_instance(value)
        kind, content = _split_kind(value)
        # What `hashed_fields` adds, where stored fields are read again; analyses have a setting of that name, a word.
        if isinstance(content.get("outside"), Mapping):
            kind = str(content.pop("outside").get("class"))
        if kind not in self.kinds and not self._is_outside(kind):
            raise _make_unknown(kind, self.list_kinds())
        try:
            found = find_component(self.role, kind)
        except LookupError:
            raise _make_unknown(kind, self.list_kinds()) from None
        except ConfigError as error:
            raise PydanticCustomError(
                "outside", "{sentence}", {"sentence": str(error).rstrip(".")}
            ) from error
        return found.model_validate({**content, "kind": found.model_fields["kind"].default})

    def _check_instance(self, value: Settings) -> Settings:
        cls = type(value)
        field = cls.model_fields.get("kind")
        kind = None if field is None else field.default
        inside = cls.__module__.startswith("braindecode_vis.")
        if inside and kind in self.kinds and isinstance(value, find_component(self.role, str(kind))):
            return value
        if inside or not self.outside:
            raise _make_unknown(kind or cls.__name__, self.list_kinds())
        if cls not in OUTSIDE:
            try:
                _load_outside(self.role, f"{cls.__module__}:{cls.__qualname__}")
            except ConfigError as error:
                raise PydanticCustomError(
                    "outside", "{sentence}", {"sentence": str(error).rstrip(".")}
                ) from error
        return value


#: Any image encoder whose features are a layer; fitted targets and degraded images are none.
LayerConfig = Annotated[
    Any,
    Component(
        "target",
        only=(
            "pixels",
            "engineered",
            "efficientnet-lite0",
            "openclip",
            "timm",
            "torchvision",
            "transformers",
        ),
    ),
]


def find_nested(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[Component | type[Settings]]:
    """Yield the roles and settings classes that an annotation names; pydantic takes the outer metadata off it."""
    roles = [entry for entry in metadata if isinstance(entry, Component)]
    if roles:
        yield from roles
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        yield from find_nested(inner, more)
    else:
        for member in get_args(annotation):
            yield from find_nested(member)


def check_names(
    cls: type[Settings], content: Mapping[str, Any], key: str = "", role: str | None = None
) -> None:
    """Raise `ConfigError` at the first unknown key or kind, before any value is checked.

    Validation would find it too, but a component that is validated before may load a library, which takes seconds.

    Parameters
    ----------
    cls
        Settings class.
    content
        Plain values of the settings, with nested ones.
    key
        Key of these settings.
    role
        The role of which `cls` is a kind; the message then names other kinds that have an unknown setting.
    """
    for name, value in content.items():
        whole = f"{key}.{name}".lstrip(".")
        if name in cls.list_removed():
            continue  # the class itself refuses what is not its value now
        if name not in cls.model_fields:
            clause, owners = describe_unknown_key(whole, list(cls.model_fields)), list_owners(role, name)
            theirs = f"; it is a setting of the {role} {' and '.join(owners)}" if owners else ""
            raise ConfigError(clause + theirs)
        field = cls.model_fields[name]
        nested = list(find_nested(field.annotation, field.metadata))
        if len(nested) != 1:  # a value, or one of a few variants
            continue
        entries = enumerate(value) if isinstance(value, list | tuple) else [("", value)]
        for place, entry in entries:
            if isinstance(entry, Mapping):
                where = f"{whole}.{place}".rstrip(".")
                found = nested[0].find(entry, where) if isinstance(nested[0], Component) else nested[0]
                if found is not None:
                    own = nested[0].role if isinstance(nested[0], Component) else None
                    check_names(found, entry, where, own)


def list_owners(role: str | None, name: str) -> list[str]:
    """Return the kinds of the package that have a setting, for roles whose settings load quickly."""
    # Others (data sets, networks) share most names, and looking into all of them takes seconds.
    if role not in ("prior",):
        return []
    return [kind for kind in list_inside(role) if name in find_component(role, kind).model_fields]


class ByKind:
    """Annotation of a union of settings that differ in ``kind``: ``Annotated[A | B, ByKind()]``.

    For a few variants of one component inside the package; `Component` is for roles.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by the member that the kind names; unlike pydantic's own, errors carry no tag in their path."""
        members: dict[str, type[Settings]] = {m.model_fields["kind"].default: m for m in get_args(source)}

        def validate(value: Any) -> Any:
            if isinstance(value, tuple(members.values())):
                return value
            kind, content = _split_kind(value)
            if kind not in members:
                raise _make_unknown(kind, list(members))
            return members[kind].model_validate({**content, "kind": kind})

        return handler.generate_schema(Annotated[Any, PlainValidator(validate), PlainSerializer(_dump)])


def _dump(value: Settings, info: SerializationInfo) -> dict[str, Any]:
    content = value.model_dump(mode=info.mode)
    code = OUTSIDE.get(type(value))
    return content if code is None else {**content, "kind": code.name}


def _split_kind(value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise PydanticCustomError("component_type", "Input should be a mapping that names a kind")
    content = {str(key): entry for key, entry in value.items()}
    if "kind" not in content:
        raise PydanticCustomError("no_kind", "needs a kind")
    return str(content.pop("kind")), content


def _make_unknown(kind: str, known: list[str]) -> PydanticCustomError:
    return PydanticCustomError("unknown_kind", "unknown kind {given}", {"given": kind, "known": known})


class _Entry(NamedTuple):
    """A component of another package, by an entry point of its own or by a part of that package."""

    name: str
    value: str
    dist: metadata.Distribution | None


@cache
def _read_entry_points() -> dict[str, dict[str, list[_Entry]]]:
    """Return the components of other packages by role and name; several packages may use the same name."""
    there = metadata.entry_points()  # once for all roles: it opens the metadata of every installed package
    found: dict[str, dict[str, list[_Entry]]] = {role: {} for role in ROLES}
    for role, group in GROUPS.items():
        for entry in there.select(group=group):
            found[role].setdefault(entry.name, []).append(_Entry(entry.name, entry.value, entry.dist))
        for part in find_parts():
            if part.distribution is not None:
                for kind, place in part.kinds.get(role, {}).items():
                    reference = f"{part.package}.{place}"
                    found[role].setdefault(kind, []).append(_Entry(kind, reference, part.distribution))
    return found


def _find_outside(role: str, reference: str, entry: _Entry | None = None) -> type[Settings]:
    """Return a component from outside if this call may import it; installed packages are always allowed."""
    # What a stage has stored of a component names its class, and not its entry point.
    same = [e for listed in _read_entry_points()[role].values() for e in listed if e.value == reference]
    installed = any(not is_beside_the_caller(e) for e in ([entry] if entry else same))
    if not installed and not may_import(reference.partition(":")[0]):
        raise ConsentError(f"it {describe_refusal([reference])}")
    return _load_outside(role, reference, entry)


def import_reference(reference: str, whose: str) -> tuple[Any, Any]:
    """Import the object ``package.module:Name``; the caller must have checked that this code may run.

    Parameters
    ----------
    reference
        Module and name.
    whose
        Description of the object, for messages.

    Returns
    -------
    module, found

    Raises
    ------
    ConfigError
        If there is no such module or name, or the module fails at import; without a full stop, for the caller's
        sentence.
    """
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of others: a module may also call sys.exit
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{whose} is not on this machine: there is no module {error.name!r}; install its package, or put its "
                "folder on PYTHONPATH"
            ) from error
        text = " ".join(str(error).split())
        raise ConfigError(f"{whose} fails at import with {type(error).__name__}: {text}") from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None and module_name == "__main__":
        raise ConfigError(
            f"{name} was defined in a notebook or script, which this process is not: move the class into a module "
            "(a file that can be imported), import it from there and run again"
        )
    if found is None:
        raise ConfigError(f"{whose} is missing: the module {module_name} has no {name!r}")
    return module, found


@cache
def _load_outside(role: str, reference: str, entry: _Entry | None = None) -> type[Settings]:
    """Import a component from outside and record where its code comes from."""
    if role not in GROUPS:
        raise ConfigError(f"the role {role} takes no components from outside the package")
    whose = reference if entry is None else f"{entry.name!r} of {_describe_package(entry)} ({reference})"
    module, found = import_reference(reference, whose)
    plain = role == "network" and is_module_class(found)
    if plain:
        maker, _, name = _PLAIN_MODULES.partition(":")
        cls, found = found, getattr(importlib.import_module(maker), name)(found, reference)
    if not (isinstance(found, type) and issubclass(found, Settings)):
        raise ConfigError(f"{whose} is no subclass of braindecode_vis.base.settings.Settings")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"{whose} has no {' and no '.join(missing)}, which its base class requires")
    field = found.model_fields.get("kind")
    kind = None if field is None else field.default
    if not isinstance(kind, str):
        raise ConfigError(f"{whose} has no kind; declare kind: Literal[NAME] = NAME in it")
    if kind in list_inside(role):
        raise ConfigError(_describe_clash(kind, whose))
    if entry is not None and kind != entry.name and not plain:
        raise ConfigError(f"{whose} has settings of the kind {kind!r}; the two names must be the same")
    package, version = (
        _find_distribution(module.__name__) if entry is None else _read_distribution(entry.dist)
    )
    in_main = plain and reference.startswith("__main__:")
    digest = _hash_class(cls) if in_main else _hash_code(module, whose)
    OUTSIDE[found] = OutsideCode(
        role=role, kind=kind, name=reference if entry is None else entry.name, reference=reference, package=package,
        version=version, sha256=digest,
    )  # fmt: skip
    return found


def _describe_clash(kind: str, whose: str) -> str:
    return f"{whose} has the name of a component of braindecode_vis, {kind!r}; rename it or uninstall its package"


def _describe_package(entry: _Entry) -> str:
    return " ".join(part for part in _read_distribution(entry.dist) if part) or "a package without metadata"


def _read_distribution(distribution: metadata.Distribution | None) -> tuple[str | None, str | None]:
    return (None, None) if distribution is None else (distribution.name, distribution.version)


def _find_distribution(module_name: str) -> tuple[str | None, str | None]:
    """Return name and version of the installed package that holds a module; None for a plain file on the path."""
    # The name of a package and that of its distribution may differ (sklearn, scikit-learn).
    names = metadata.packages_distributions().get(module_name.partition(".")[0], [])
    return (names[0], metadata.version(names[0])) if names else (None, None)


def is_module_class(found: Any) -> bool:
    """Say whether something is a class of torch modules; torch is not imported for that."""
    torch = sys.modules.get("torch")  # imported already where such a class exists
    return torch is not None and isinstance(found, type) and issubclass(found, torch.nn.Module)


def _hash_class(cls: Any) -> str:
    """Return the digest of the code of a class of a notebook or script, whose other lines change all the time."""
    # Method by method, since Python does not find the code of a whole class of a notebook.
    own = [vars(base) for base in cls.__mro__ if base.__module__ == cls.__module__]
    methods = [value for names in own for _, value in sorted(names.items()) if inspect.isfunction(value)]
    try:
        source = "\0".join(map(inspect.getsource, methods))
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the code of {cls.__qualname__} is not known, so that it has no digest; move the class into a module"
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()


def _hash_code(module: Any, whose: str) -> str:
    """Return the digest of a module's file and of the other Python files in its folder, if that is a package.

    The code of a component is often in several modules beside its settings; for further folders only the version
    counts.
    """
    path = getattr(module, "__file__", None)
    if path is None or not Path(path).is_file():
        raise ConfigError(
            f"{whose} is not defined in a file, so its code has no digest; move it into a module"
        )
    folder = Path(path).resolve().parent
    files = sorted(folder.glob("*.py")) if (folder / "__init__.py").is_file() else [Path(path).resolve()]
    digest = hashlib.sha256()
    for file in files:
        # With the name, so that renaming a module is a change too.
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
