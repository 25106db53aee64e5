"""Write ``docs/SETTINGS.md``: every setting of a run, with its type, its default and what it does.

    python docs/write_settings.py

The text is that of the docstrings: an option is described under ``Parameters`` in its class or in a class that it
inherits from. ``tests/test_settings_page.py`` fails where the page is not current or an option has no description.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from braindecode_vis.base.registry import GROUPS
from braindecode_vis.base.settings import Settings
from braindecode_vis.config import RunConfig
from braindecode_vis.config.explain import (
    ROLES,
    describe_default,
    describe_options,
    describe_type,
    find_classes,
)
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
from braindecode_vis.parts.studies.train_generator import GeneratorTrainingConfig

PAGE = Path(__file__).resolve().parent / "SETTINGS.md"
#: Verbs whose settings are no part of a run.
VERBS: dict[str, type[Settings]] = {"train-generator": GeneratorTrainingConfig, "corpus": CorpusConfig}
HEADER = """# Settings

Every option of a run's YAML file, and of `--set`. This page is written by `python docs/write_settings.py` from the
docstrings of the settings classes; a test keeps it current.

A component is chosen by its `kind`. A `kind` may also be the name of an entry point of another installed package, or
`package.module:Class`; see OUTSIDE.md. Options in *italics* say how something runs
and not what it computes, so that they stay out of the fingerprint.

`braindecode-vis describe network.atm_s` prints the same. Editors complete and check a file that begins with
`# yaml-language-server: $schema=braindecode-vis.schema.json`, after
`braindecode-vis configs --schema > braindecode-vis.schema.json`.
"""


def write_class(cls: type[Settings], title: str, level: str) -> str:
    """Return the section of one settings class."""
    first = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("\n\n")[0]
    lines = [f"{level} {title}", "", " ".join(first.split()), ""]
    descriptions = describe_options(cls)
    if descriptions:
        lines += ["| option | type | default | |", "|---|---|---|---|"]
    for name, text in descriptions.items():
        field = cls.model_fields[name]
        shown = f"*{name}*" if name in cls.not_hashed else name
        cells = [shown, describe_type(field.annotation, tuple(field.metadata)), describe_default(field), text]
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_page() -> str:
    """Return the whole page."""
    roles, others = find_classes(*VERBS.values())
    parts = [HEADER, write_class(RunConfig, "A run", "##")]
    for role, kinds in roles.items():
        parts.append(f"## {ROLES[role]}\n")
        if role in GROUPS:
            parts.append(f"Entry points of other packages: `{GROUPS[role]}`.\n")
        parts += [write_class(cls, f"`{kind}`", "###") for kind, cls in kinds.items()]
    parts.append("## Settings inside other settings\n")
    parts += [write_class(cls, cls.__name__, "###") for cls in others]
    parts += [write_class(cls, f"The verb `{verb}`", "##") for verb, cls in VERBS.items()]
    page = "\n".join(parts)
    for role, kinds in roles.items():  # a class that is a kind has no heading by its own name
        for cls in kinds.values():
            page = page.replace(f"(#{cls.__name__.lower()})", f"(#{ROLES[role].lower().replace(' ', '-')})")
    return page


if __name__ == "__main__":
    PAGE.write_text(write_page())
