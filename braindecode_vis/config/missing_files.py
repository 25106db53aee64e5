"""Checks before anything is computed that the files of a configuration exist.

Knows which settings each stage reads. A data set and an analysis check their own files, which they read first anyway.
"""

from __future__ import annotations

import re
from pathlib import Path

from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, check_installed
from braindecode_vis.base.contracts import EncoderSettings, ImageEncoderSettings, Prior
from braindecode_vis.base.remote import refuse_address
from braindecode_vis.base.roles import build, complete, find_encoder_role, find_image_encoder_role
from braindecode_vis.base.settings import OUTSIDE, Settings
from braindecode_vis.config.models import RunConfig

#: Settings that are read first at each stage; a stage needs those of the stages before it too.
READS = {
    "preprocess": (),
    "embed": ("target",),
    "train": ("encoder", "text"),
    "retrieve": (),
    "reconstruct": ("prior", "generator", "reconstruction"),
    "evaluate": ("evaluation", "text"),
    "report": (),
}


def check_files(config: RunConfig, stage: str = "report") -> None:
    """Raise `ConfigError` if a file that a run needs up to a stage is missing.

    Packages of extras must be installed, paths must exist, weights of a network must be there or their download
    allowed, and a caption bank must be readable.

    Parameters
    ----------
    config
        Configuration of the run.
    stage
        The last stage to run.
    """
    config.choose_cache()
    _check_outside(config)
    for key, entry in config.dataset.walk("dataset"):
        _check_packages(key, entry)
        for name in type(entry).model_fields:
            value = getattr(entry, name)
            for path in value if isinstance(value, list | tuple) else (value,):
                if isinstance(path, Path):
                    refuse_address(path, f"{key}.{name}")
    stages = list(READS)
    for name in stages[: stages.index(stage) + 1]:
        for part in READS[name]:
            if _is_read(config, part, name):
                settings: Settings | None = getattr(config, part)
                for key, entry in () if settings is None else settings.walk(part):
                    _check_settings(key, entry)


def _check_outside(config: RunConfig) -> None:
    """Build components from outside, so that missing parts are reported before their stage starts."""
    target, encoder = complete(ImageEncoderSettings, config.target), complete(EncoderSettings, config.encoder)
    if type(config.target) in OUTSIDE:
        build(find_image_encoder_role(target), target)
    if type(config.encoder) in OUTSIDE:
        build(find_encoder_role(encoder), encoder, seed=0)
    if type(config.prior) in OUTSIDE:
        build(Prior, config.prior, seed=0)


def _is_read(config: RunConfig, part: str, stage: str) -> bool:
    if config.decodes_categories:
        return part == "encoder"
    if part != "text":
        return True
    named = "zero_shot_text" in config.evaluation.protocols
    return named if stage == "evaluate" else complete(EncoderSettings, config.encoder).reads_text


def _check_packages(key: str, settings: Settings) -> None:
    for module in settings.packages:
        check_installed(module, f"{key} ({getattr(settings, 'kind', module)})")


def _check_settings(key: str, settings: Settings) -> None:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if getattr(settings, f"{name}_digest", None) is not None:
            continue  # seen before: what was fitted from it needs it no more, and a training says that it is gone
        named = value if isinstance(value, dict) else {"": value}
        for entry, path in named.items():
            if isinstance(path, Path) and not path.expanduser().exists():
                whole = f"{key}.{name}.{entry}".rstrip(".")
                raise ConfigError(f"{whole} names {path}, which does not exist; correct it or leave it out.")
    _check_packages(key, settings)
    try:
        settings.check_files()
    except BraindecodeVisError as error:
        # A network speaks of itself as the target, wherever it is used.
        text = re.sub(r"(?<![\w./])target\.(?=\w)", f"{key}.", str(error))
        raise type(error)(text) from error
