"""Write the pages of the documentation that follow from the code: ``docs/generated``, which is not kept in git.

    python docs/generate.py

The catalogue of data sets and the parts to fetch come from the manifests, the configurations from their files and
headers, the settings from their classes, the verbs from their help, the public names from ``braindecode_vis.__all__``,
the tutorials from the notebooks, and changelog, contributing and security from the files on top of the repository.
``conf.py`` calls it before each build; a file whose content is the same is not touched, so that only what changed is
built again. What happens to pages while they are read and written stands in ``hooks.py``.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import yaml  # noqa: E402

import braindecode_vis as bdv  # noqa: E402
from braindecode_vis.base.memory import describe_bytes  # noqa: E402
from braindecode_vis.config import list_shipped, list_weights, read_config, read_header  # noqa: E402
from braindecode_vis.datasets.hosts import describe_place  # noqa: E402
from braindecode_vis.datasets.manifests import (  # noqa: E402
    Manifest,
    ManifestPart,
    describe_source,
    find_manifest,
    read_manifests,
)

#: Notebooks on real recordings -> the file or folder that they need below the folder of the data sets.
RECORDINGS = {
    "09_digits_fmri": "digits69/digit69_28x28.mat",
    "10_faces_eeg": "muse_n170",
    "11_categories_fmri": "haxby_slices",
}
#: Files on top of the repository -> their pages.
TOP = {
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


@dataclass(frozen=True)
class Measured:
    """What a configuration reached on the real recordings: `text` stands in that section of RESULTS.md."""

    config: str
    text: str
    figures: tuple[str, ...]
    section: str


#: Of each data set that was measured. `figures` are looked for in RESULTS.md, so that the two pages agree.
MEASURED = {
    "digits69": (
        Measured("digits69_ridge_10fold", "pixel correlation 0.756 (chance 0.527), two-way 0.982 (0.5)",
                 ("**0.756**", "**0.982**"), "ten-folds-over-all-100-images"),
        Measured("digits69_generative_5fold", "pixel correlation 0.786, SSIM 0.584",
                 ("**0.786**", "**0.584**"), "five-folds-beside-a-deep-generative-model"),
    ),
    "muse_n170": (
        Measured("muse_n170", "AUC 0.667 (chance 0.5)", ("**0.667**",),
                 "faces-against-houses-from-four-dry-electrodes-real-eeg-one-subject-six-runs"),
    ),
    "haxby_slices": (
        Measured("haxby_slices", "accuracy 0.594 of 96 blocks (chance 0.125)", ("**0.594**",),
                 "eight-categories-from-one-slice-of-bold-real-fmri-one-subject-twelve-runs"),
    ),
}  # fmt: skip


def write_pages(out: Path) -> None:
    """Write all generated pages below a folder; what is there and no longer made is deleted."""
    pages = dict(make_pages())
    for name, content in pages.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
    for path in [*out.glob("*.md"), *out.glob("*/*.md"), *out.glob("tutorials/*.ipynb")]:
        if path.relative_to(out).as_posix() not in pages:
            path.unlink()


def make_pages() -> Iterator[tuple[str, str]]:
    """Yield the path below the folder and the content of every generated page."""
    yield "catalogue.md", make_catalogue()
    yield "fetching.md", make_fetching()
    yield "configurations.md", make_configurations()
    yield "published_configurations.md", make_published()
    yield "cli.md", make_cli()
    yield from make_settings()
    yield from make_api()
    yield from make_tutorials()
    for source, page in TOP.items():
        yield page, redirect_links(f"generated/{page[:-3]}", [(ROOT / source).read_text(encoding="utf-8")])


# --- words and tables -------------------------------------------------------------------------------------------------


def make_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines) + "\n"


def _escape(cell: str) -> str:
    return " ".join(str(cell).split()).replace("|", "\\|")


def _plain(text: str) -> str:
    """Return text in which nothing is taken for markup."""
    return re.sub(r"([\\`*_<>\[\]{}$~#])", r"\\\1", " ".join(str(text).split()))


def _link_sources(text: str) -> str:
    """Return plain text in which identifiers of papers are links."""
    text = re.sub(r"\barXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", _plain(text))
    return re.sub(
        r"\bdoi:(10\.\d{4,9}/[^\s,;)]+?)(?=[.,;)]?(?:\s|$))",
        lambda m: f"[doi:{m[1]}](https://doi.org/{m[1].replace(chr(92), '')})",
        text,
    )


def describe_minutes(n_bytes: float, megabit: float = 100) -> str:
    """Return how long a download takes on a line of so many Mbit/s."""
    seconds = n_bytes * 8 / (megabit * 1e6)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{round(seconds / 3600)} h" if seconds < 2 * 86400 else f"{round(seconds / 86400)} days"


# --- data sets --------------------------------------------------------------------------------------------------------

_CATALOGUE = """# Catalogue of data sets

What each data set is, what it costs and what to expect of it. This page is made from the manifests, so that it says
what `braindecode-vis datasets NAME` says. How each loader reads its files stands in [Data sets](../DATASETS.md).

Sizes are those of what `fetch` takes without being asked for more; `fetch NAME --dry-run` says the rest, and what no
manifest knows. Times of downloads are for a line of 100 Mbit/s. [Parts to fetch](fetching.md) has the parts, their
addresses and how sure these are. Scores are **measured here** where [Results](../research/RESULTS.md) has them; what
others published is **not re-measured** here, and stands with its protocol.

"""


def make_catalogue() -> str:
    """Return the page of data sets."""
    manifests = read_manifests()
    rows, sections = [], []
    configs = _list_configs()
    for name, manifest in manifests.items():
        rows.append(
            (
                f"[{name}](#{name})", manifest.modality, str(manifest.subjects or "any"), _describe_size(manifest),
                _describe_terms(manifest), _describe_expected(name, configs) or "",
            )
        )  # fmt: skip
        sections.append(_make_data_set(manifest, configs))
    head = ("name", "modality", "subjects", "size", "terms", "score to expect")
    toctree = "\n```{toctree}\n:hidden:\n\nfetching\n```\n"
    return _CATALOGUE + make_table(head, rows) + "\n" + "\n".join(sections) + toctree


def _list_fetched(manifest: Manifest) -> list[Any]:
    """Return the parts that are fetched without being named."""
    return [part for part in manifest.parts if part.default and part.access != "by_hand"]


def _sum_bytes(manifest: Manifest) -> int | None:
    known = [part.count_bytes() for part in _list_fetched(manifest)]
    return sum(filter(None, known)) or None


def _describe_size(manifest: Manifest) -> str:
    if not manifest.needs_files:
        return "made in memory"
    if manifest.source is None:
        return "your own"
    size, parts = _sum_bytes(manifest) or 0, _list_fetched(manifest)
    if not parts:
        return "brought by hand"
    if None not in [part.count_bytes() for part in parts]:
        return describe_bytes(size)
    return f"over {describe_bytes(size)}" if size >= 1e9 else "shown when fetched"


def _describe_terms(manifest: Manifest) -> str:
    if not manifest.needs_files or manifest.source is None:
        return ""
    access = {part.access for part in manifest.parts if part.default}
    words = {
        "by_hand": "some by hand" if _list_fetched(manifest) else "by hand",
        "terms": "to accept",
        "open": "none",
    }
    return next((words[kind] for kind in ("terms", "by_hand", "open") if kind in access), "see the notes")


def _describe_expected(name: str, configs: Sequence[dict[str, Any]]) -> str:
    if name in MEASURED:
        best = MEASURED[name][0]
        return f"{best.text}, measured here"
    published = [config for config in configs if config["dataset"] == name and _has_number(config["header"])]
    return f"[{len(published)} published](#{name}), not re-measured" if published else ""


def _has_number(header: Any) -> bool:
    return bool(header.as_published) and "no number published" not in header.as_published


def _make_data_set(manifest: Manifest, configs: Sequence[dict[str, Any]]) -> str:
    name = manifest.name
    own = [config for config in configs if config["dataset"] == name]
    size = _sum_bytes(manifest) or 0
    subjects = f"{manifest.subjects or 'any number of'} subject{'' if manifest.subjects == 1 else 's'}"
    lines = [
        ("What", f"{_plain(manifest.summary)}"),
        ("Modality", f"{_plain(manifest.modality)}, {subjects}; {_plain(manifest.stimuli)}"),
        ("Size", _describe_size(manifest) + (f", {describe_minutes(size)} to fetch" if size > 1e6 else "")),
        ("Licence", _plain(manifest.licence)),
        ("Terms", _plain(manifest.gate or "")),
        ("From", _plain(describe_source(manifest)) if manifest.source else ""),
        ("Parts", f"{', '.join(p.name for p in manifest.parts)} ([sizes, terms, commands](fetching.md#{name}))"
         if manifest.parts else ""),
        ("Cite", _link_sources(manifest.citation)),
        ("Configurations", ", ".join(f"[{c['name']}](configurations.md#{_slug(c['name'])})" for c in own)),
        ("Measured here", "; ".join(f"`{m.config}`: {m.text} ([how](../research/RESULTS.md#{m.section}))"
                                    for m in MEASURED.get(name, ()))),
        ("Published, not re-measured", "; ".join(f"`{c['name']}`: {_plain(c['header'].as_published)}"
                                                 for c in own if _has_number(c["header"]))),
    ]  # fmt: skip
    text = [f"## {name}\n", f"**{_plain(manifest.title)}**\n"]
    text += [f"- **{label}**: {content}" for label, content in lines if content]
    commands = []
    if fetched := _list_fetched(manifest):
        accept = " --accept-terms" if any(part.access == "terms" for part in fetched) else ""
        commands.append(f"braindecode-vis fetch {name} --root data/{name}{accept}")
    if manifest.needs_files:
        commands.append(f"braindecode-vis check {name} --root data/{name}")
    commands += [
        f"braindecode-vis phantom {form} --size tiny --out phantom" for form in manifest.phantoms[:1]
    ]
    if commands:
        text += ["", "```console", *(f"$ {command}" for command in commands), "```"]
    notes = [f"- {_plain(note)}" for note in manifest.notes]
    if notes:
        text += ["", ":::{dropdown} Worth knowing", *notes, ":::"]
    return "\n".join(text) + "\n"


_FETCHING = """# Parts to fetch

The parts of each data set, with size, terms, host and command; the manifests of the package say the same, and so does
`braindecode-vis fetch NAME --dry-run`. [Data sets](../DATASETS.md) explains how to fetch.

**How sure an address is.** *Verified*: found in its owner's own repository, mirror or code, in stored copies.
*Second-hand*: found in other people's scripts. *Unconfirmed*: neither. No address was contacted when it was entered
here: `braindecode-vis fetch NAME --check-addresses` asks each address whether it answers. A file that differs from the
published one is refused.

"""


def make_fetching() -> str:
    """Return the page of the parts that can be fetched, with a table for each data set."""
    sections = []
    head = ("part", "what", "size", "subjects", "access", "from", "command")
    for manifest in read_manifests().values():
        if manifest.parts:
            rows = [_describe_part(manifest, part) for part in manifest.parts]
            about = f"{manifest.title}. Licence: {' '.join(manifest.licence.split())}."
            sections.append(f"## {manifest.name}\n\n{about}\n\n{make_table(head, rows)}")
    return _FETCHING + "\n".join(sections)


def _describe_part(manifest: Manifest, part: ManifestPart) -> tuple[str, ...]:
    """Return the line of one part."""
    size = part.count_bytes()
    if part.access == "by_hand":
        return part.name, part.what, "", str(len(part.list_subjects()) or ""), f"by hand: {part.gate}", "", ""
    return (
        part.name,
        part.what,
        "shown when fetched" if size is None else describe_bytes(size),
        str(len(part.list_subjects()) or ""),
        "open" if part.access == "open" else f"`--accept-terms`: {part.gate}",
        f"{describe_place(part)}, {part.mark}",
        f"`fetch {manifest.name}`" if part.default else f"`fetch {manifest.name} --parts {part.name}`",
    )


# --- configurations ---------------------------------------------------------------------------------------------------


@cache
def _list_configs() -> list[dict[str, Any]]:
    found = []
    for path in list_shipped().values():
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        encoder = content.get("encoder", {"kind": "ridge"})
        kind = content["dataset"]["kind"]
        found.append(
            {
                "name": path.stem, "path": path, "dataset": kind, "modality": find_manifest(kind).modality,
                "encoder": encoder.get("network", encoder)["kind"], "header": read_header(path),
                "target": content.get("target", {"kind": ""})["kind"],
            }
        )  # fmt: skip
    return found


_CONFIGURATIONS = """# Configurations

The configurations that ship with the package. Any of them is started by its name, changed with `--set`, and printed
with `braindecode-vis configs NAME`, for a copy of your own:

```console
$ braindecode-vis configs --modality eeg
$ braindecode-vis describe things_eeg2_ubp_rn50
$ braindecode-vis configs things_eeg2_ubp_rn50 > mine.yaml
$ braindecode-vis run digits69_ridge --root data/digits69 --out runs/digits
```

One that follows a paper says which of its settings are the paper's and where it departs. **Numbers under "as published"
are those of the authors; they are not re-measured here**, unless [Results](../research/RESULTS.md) says so.

"""


def make_configurations() -> str:
    """Return the page of configurations: a table, then each with header and text."""
    configs = _list_configs()
    rows = [
        (
            f"[{c['name']}](#{_slug(c['name'])})",
            c["modality"],
            c["dataset"],
            c["encoder"],
            _plain(c["header"].about),
        )
        for c in configs
    ]
    parts = [_CONFIGURATIONS, make_table(("name", "modality", "data set", "encoder", "what"), rows)]
    for config in configs:
        header = config["header"]
        text = [f"\n## {config['name']}\n", _plain(header.about) + "\n"]
        for label, value in (
            ("Source", header.source),
            ("As published (not re-measured)", header.as_published),
        ):
            if value:
                text.append(f"- **{label}**: {_link_sources(value)}")
        text.append(f"- **Data set**: [{config['dataset']}](catalogue.md#{_slug(config['dataset'])})")
        text.append(f"- **Weights**: {_describe_weights(config['path'])}")
        for label, entries in (("Same as published", header.same), ("Departs", header.departs)):
            if entries:
                text += [f"- **{label}**:", *(f"    - {_plain(entry)}" for entry in entries)]
        body = re.sub(r"\A(#[^\n]*\n)+", "", config["path"].read_text(encoding="utf-8"))
        text += ["", ":::{dropdown} The file", "```yaml", body.rstrip(), "```", ":::"]
        parts.append("\n".join(text))
    return "\n".join(parts) + "\n"


def _describe_weights(path: Path) -> str:
    """Say which trained networks a configuration loads, with size and licence, whether they are here or not."""
    needed = [one for one in list_weights(read_config(path)) if one.name]
    parts = []
    for optional in (False, True):
        names = [
            f"`{one.name}` ({'' if one.size is None else describe_bytes(one.size) + ', '}{one.licence})"
            for one in needed if bool(one.leaves_out) == optional
        ]  # fmt: skip
        if names:
            parts.append(("for further rows of scores: " if optional else "") + ", ".join(names))
    return "; ".join(parts) or "none to fetch"


def make_published() -> str:
    """Return the table of what the configurations of papers were published to reach."""
    rows = [
        (f"[{c['name']}](configurations.md#{_slug(c['name'])})", c["dataset"],
         _link_sources(c["header"].as_published), "no")
        for c in _list_configs() if _has_number(c["header"])
    ]  # fmt: skip
    head = ("configuration", "data set", "as published", "re-measured here")
    return (
        "# What the configurations of papers reached\n\n"
        "The numbers of their authors, with their protocol, as the header of each configuration states them. None of "
        "them is re-measured here: the recordings were not at hand. "
        "[Beside published numbers](../research/PUBLISHED.md) says which rules lie behind such numbers.\n\n"
        + make_table(head, rows)
    )


# --- settings ---------------------------------------------------------------------------------------------------------

#: Page of settings -> what it decides.
_SETTINGS = {
    "run": "The top of a configuration, and the steps that have no kinds: repetitions, retrieval, scores.",
    "dataset": "Which recording is read, and how: subjects, channels, times, voxels, repetitions.",
    "split": "Which trials train and which are tested.",
    "target": "What the brain encoder predicts: embeddings of images, pixels or principal components.",
    "encoder": "How responses are mapped to the target or to classes.",
    "network": "The architecture inside an encoder that is a network.",
    "objective": "The losses that train a network.",
    "augmentation": "Random changes of training trials.",
    "prior": "How a prediction is moved towards the embeddings of real images.",
    "generator": "How a picture is made from a predicted embedding.",
    "analysis": "When, where and how the response is decoded: questions to a finished run.",
    "metric": "Metrics that need settings of their own.",
    "inside": "Groups of options inside other settings, for example an optimiser or a schedule.",
    "train_generator": "How a generator is trained on images, without brain data.",
    "corpus": "How a corpus of recordings without labels is built.",
}


def make_settings() -> Iterator[tuple[str, str]]:
    """Yield the pages of the settings: those of a run, one for each role, and those inside of others."""
    import write_settings as settings

    from braindecode_vis.config.explain import ROLES, find_classes

    roles, others = find_classes(*settings.VERBS.values())
    places = {_slug(ROLES[role].replace(".", "")): f"{role}.md" for role in roles}
    places |= {cls.__name__.lower(): f"inside.md#{cls.__name__.lower()}" for cls in others}
    named = [
        (cls, f"{role}.md#{_slug(kind)}") for role, kinds in roles.items() for kind, cls in kinds.items()
    ]
    places |= {cls.__name__.lower(): place for cls, place in named}

    def lead(text: str) -> str:
        text = text.replace("| default | |\n", "| default | what it does |\n")
        return re.sub(r"\]\(#([\w-]+)\)", lambda m: f"]({places.get(m[1], '#' + m[1])})", text)

    yield "settings/run.md", lead(settings.write_class(settings.RunConfig, "A run", "#"))
    for role, kinds in roles.items():
        # A page that links to itself leads to its top.
        text = (
            f"# {ROLES[role]}\n\nWhat may stand under `{role}.kind` (`braindecode-vis describe {role}`).\n\n"
        )
        rows = [(f"[{kind}](#{_slug(kind)})", _first_sentence(cls)) for kind, cls in kinds.items()]
        text += make_table(("kind", "what"), rows) + "\n"
        text += "\n".join(settings.write_class(cls, kind, "##") for kind, cls in kinds.items())
        yield f"settings/{role}.md", lead(text)
    text = "# Settings inside other settings\n\nThese have no `kind`: each is named by the setting that holds it.\n\n"
    yield (
        "settings/inside.md",
        lead(text + "\n".join(settings.write_class(c, c.__name__, "##") for c in others)),
    )
    for verb, cls in settings.VERBS.items():
        yield (
            f"settings/{verb.replace('-', '_')}.md",
            lead(settings.write_class(cls, f"The verb {verb}", "#")),
        )
    titles = (
        {"run": "A run"}
        | {role: ROLES[role] for role in roles}
        | {"inside": "Settings inside other settings"}
    )
    titles |= {verb.replace("-", "_"): f"The verb `{verb}`" for verb in settings.VERBS}
    rows = [
        (f"[{title}]({name}.md)", _SETTINGS.get(name, ""), str(len(roles.get(name, ())) or ""))
        for name, title in titles.items()
    ]
    header = settings.HEADER.replace("see OUTSIDE.md", "see [Components of your own](../../OUTSIDE.md)")
    header = header.replace(
        "This page is written by `python docs/write_settings.py` from the\ndocstrings of the settings classes; a test "
        "keeps it current.",
        "These pages are made from the settings\nclasses and their docstrings.",
    )
    toctree = "\n".join(["```{toctree}", ":hidden:", "", *titles, "```"])
    table = make_table(("settings of", "what they decide", "kinds"), rows)
    yield "settings/index.md", f"{header}\n{table}\n{toctree}\n"


def _first_sentence(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("\n\n")[0].split())


def _slug(title: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# --- command line -----------------------------------------------------------------------------------------------------

_CLI = """# Command line

`braindecode-vis VERB --help` says the same. Every verb prints tables and progress to people and one JSON object with
`--json`; an error is one sentence and exit code 2. `braindecode-vis --install-completion` completes verbs, options,
configurations and kinds.

"""


def make_cli() -> str:
    """Return the page of verbs, from the help of each."""
    from typer.main import get_command

    from braindecode_vis.cli import EXAMPLES, app

    command, parts, rows = get_command(app), [], []
    for name, examples in EXAMPLES.items():
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            command.main([name, "--help"], "braindecode-vis", standalone_mode=False, terminal_width=80)
        usage, about, rest = re.split(r"\n{2,}", shown.getvalue().strip(), maxsplit=2)
        rest = rest.partition("\n  Examples:")[0].rstrip()
        about = _plain(about)
        rows.append((f"[{name}](#{_slug(name)})", about))
        parts += [
            f"\n## {name}\n",
            about + "\n",
            "```console",
            *(f"$ braindecode-vis {line}" for line in examples),
            "```",
            "",
        ]
        parts += ["```text", usage, "", rest, "```"]
    return "\n".join([_CLI, make_table(("verb", "does"), rows), *parts]) + "\n"


# --- Python -----------------------------------------------------------------------------------------------------------

_API = """# Python

Everything that is promised: `import braindecode_vis as bdv`. The names below keep their meaning between versions; what
they are built from may change. Importing the package loads nothing heavy.

"""
_API_GROUPS = {
    "Data": ("load", "from_arrays", "from_epochs", "from_nifti", "Data"),
    "Decoding": ("decode", "open_run", "DecodingRun", "Decoder"),
    "Scores of anyone's outputs": ("score",),
    "What there is": ("list_configs", "describe"),
    "Figures": ("plot_gallery", "plot_ranks", "plot_scores"),
    "What results are made of": ("Responses", "StimulusSet", "Embeddings", "Score"),
    "Errors and warnings": ("BraindecodeVisError", "ConfigError", "DataError", "LeakWarning"),
}


def make_api() -> Iterator[tuple[str, str]]:
    """Yield an index of the public names, and a page for each."""
    public = [name for name in bdv.__all__ if not name.startswith("_")]
    groups = dict(_API_GROUPS)
    if rest := [name for name in public if not any(name in names for names in groups.values())]:
        groups["More"] = tuple(rest)
    text = [_API]
    for title, names in groups.items():
        rows = [(f"[{name}]({name}.md)", _summarise(getattr(bdv, name))) for name in names if name in public]
        text.append(f"## {title}\n\n" + make_table(("name", "what"), rows))
    text.append("\n".join(["```{toctree}", ":hidden:", "", *sorted(public, key=str.lower), "```"]))
    yield "api/index.md", "\n".join(text) + "\n"
    uses = find_uses()
    for name in public:
        kind = "autoclass" if inspect.isclass(getattr(bdv, name)) else "autofunction"
        members = ["   :members:", "   :show-inheritance:"] if kind == "autoclass" else []
        block = [
            "```{eval-rst}",
            ".. currentmodule:: braindecode_vis",
            "",
            f".. {kind}:: {name}",
            *members,
            "```",
        ]
        used = [f"- [{title}](../../{page})" for page, title in uses.get(name, {}).items()]
        block += ["", "## Used in", "", *used] if used else []
        yield f"api/{name}.md", f"# {name}\n\n" + "\n".join(block) + "\n"


def _summarise(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def find_uses() -> dict[str, dict[str, str]]:
    """Return, for each public name, the notebooks and pages whose code uses it: path below this folder -> title.

    Who calls a public function uses the public class that it returns as well.
    """
    sources: dict[str, tuple[str, list[str]]] = {}
    for path in list_notebooks():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        sources[f"generated/tutorials/{path.name}"] = (read_title(path), code)
    for path in sorted(HERE.glob("*.md")):
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
        sources[path.name] = (read_title(path), blocks)
    found: dict[str, dict[str, str]] = {}
    for page, (title, blocks) in sources.items():
        names = {name for block in blocks for name in _list_public(block)}
        names |= {_name_returned(name) for name in names}
        for name in names & set(bdv.__all__):
            found.setdefault(name, {})[page] = title
    return found


def _list_public(code: str) -> set[str]:
    """Return the names of the package that code uses: `bdv.load`, or imported from the top of the package."""
    try:
        nodes = list(ast.walk(ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.M))))
    except SyntaxError:  # a part of a file, or a sketch
        return set()
    attributes = [
        node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    found = {node.attr for node in attributes if node.value.id in ("bdv", "braindecode_vis")}
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "braindecode_vis"]
    return found | {alias.name for node in imports for alias in node.names}


def _name_returned(name: str) -> str:
    """Return the name of the class that a public function returns, as its signature writes it."""
    thing = getattr(bdv, name, None)
    returned = inspect.signature(thing).return_annotation if inspect.isfunction(thing) else ""
    return str(getattr(returned, "__name__", returned))


# --- notebooks --------------------------------------------------------------------------------------------------------


def make_tutorials() -> Iterator[tuple[str, str]]:
    """Yield the notebooks; one whose recordings are not here says that it was not run."""
    absent = {Path(pattern).stem for pattern in list_without_recordings()}
    for path in list_notebooks():
        content = json.loads(path.read_text(encoding="utf-8").replace("](../docs/", "](../../"))
        content["metadata"]["package"] = digest_package()  # other code makes another page, which is run again
        note = f"{{download}}`Download this notebook <../../../notebooks/{path.name}>`"
        if path.stem in absent:
            note += "\n\n:::{note}\nThis page was built without the recording, so it has no outputs.\n:::"
        content["cells"].insert(
            1, {"cell_type": "markdown", "id": "how-it-was-run", "metadata": {}, "source": [note]}
        )
        yield f"tutorials/{path.name}", json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def list_notebooks() -> list[Path]:
    """Return the notebooks of the repository in their order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


@cache
def read_title(path: Path) -> str:
    """Return the first heading of a page or notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    found = re.search(r"^# (.+)$", text, re.M)
    return found[1] if found else path.stem


def find_recordings() -> Path:
    """Return the folder of the real recordings: ``$BRAINDECODE_VIS_DATA``, else ``../shared/data`` of the checkout."""
    return Path(os.environ.get("BRAINDECODE_VIS_DATA", ROOT.parent / "shared" / "data"))


def list_without_recordings() -> list[str]:
    """Return patterns of the notebooks whose recordings are not here."""
    root = find_recordings()
    return [
        f"generated/tutorials/{name}.ipynb"
        for name, needed in RECORDINGS.items()
        if not (root / needed).exists()
    ]


@cache
def digest_package() -> str:
    """Return a digest of the code of the package."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "braindecode_vis").rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def make_cache(folder: Path) -> Path:
    """Return the folder of the outputs that this code of the package made; those of other code are deleted."""
    kept = folder / digest_package()
    for other in folder.glob("*"):
        if other != kept:
            shutil.rmtree(other)
    return kept


# --- changes while pages are read -------------------------------------------------------------------------------------


def redirect_links(name: str, source: list[str]) -> str:
    """Lead links between files of the repository to the pages that stand for them.

    Parameters
    ----------
    name
        Page that is read, below this folder, without ending.
    source
        Its text, which is replaced in place, as Sphinx wants it.

    Returns
    -------
    str
        The new text.
    """
    up = "../" * name.count("/")
    pages = {f"{up}../{top}": f"{up}generated/{page}" for top, page in TOP.items()}
    pages |= {f"{up}../notebooks": f"{up}TUTORIALS.md", f"{up}../configs": f"{up}generated/configurations.md"}
    pages |= {f"{up}SETTINGS.md": f"{up}generated/settings/index.md"}
    if name.startswith("generated/"):  # copies of files on top, whose links start there
        pages |= TOP
        written = [
            path.relative_to(HERE).as_posix() for path in HERE.rglob("*.md") if "generated" not in path.parts
        ]
        pages |= {f"docs/{page}": f"../{page}" for page in written}
        pages |= {
            f"docs/images/{path.name}": f"../images/{path.name}" for path in (HERE / "images").iterdir()
        }
        pages |= {"notebooks": "../TUTORIALS.md", "configs": "configurations.md"}

    def lead(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        return f"]({pages.get(target.rstrip('/'), target)}{anchor})"

    if not name.startswith("generated/tutorials/"):
        source[0] = re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", lead, source[0])
    return source[0]


def show_cards(name: str, source: list[str]) -> None:
    """Turn each table whose rows begin with a link to a notebook into cards with a picture of its first figure."""

    def turn(match: re.Match[str]) -> str:
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in match[0].strip().splitlines()[2:]]
        links = [
            re.fullmatch(r"\[(.+)\]\((generated/tutorials/(\w+))\.ipynb\)", row[0].strip()) for row in rows
        ]
        if not rows or not all(links):
            return match[0]
        cards = ["::::{grid} 1 2 2 3", ":gutter: 3", ":class-container: notebooks", ""]
        for link, row in zip(links, rows, strict=True):
            assert link
            title, page, stem = link.groups()
            cards += [
                f":::{{grid-item-card}} {title}",
                f":img-top: generated/thumbnails/{stem}.svg",
                f":img-alt: First figure of {title}",
                f":link: {page}",
                ":link-type: doc",
                " ".join(cell.strip() for cell in row[1:]),
                ":::",
            ]
        return "\n".join([*cards, "::::", ""])

    if "/" not in name:
        source[0] = re.sub(r"(?:^\|.*\n)(?:^\|[ :|-]+\n)(?:^\|.*(?:\n|\Z))+", turn, source[0], flags=re.M)


def read_terms(page: Path) -> list[str]:
    """Return the terms of the glossary in a page, longest first: what stands at the margin of its directive."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^(`{3,}|:{3,})\{glossary\}\n(.*?)^\1", text, re.M | re.S)
    lines = [line for _, block in found for line in block.splitlines()]
    terms = {line.strip() for line in lines if line and line[0] not in " \t:" and not line.startswith("..")}
    return sorted(terms, key=lambda term: (-len(term), term))


if __name__ == "__main__":
    write_pages(HERE / "generated")
