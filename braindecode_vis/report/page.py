"""One `report.html` per run: plain data in, one file out, and images in full size in a folder beside it.

Owns what a report says and in which order; the looks are in `templates/`, the pictures in `figures` and `gallery`,
what the templates are given in `page_scores` and `page_gallery`. The page needs nothing else: thumbnails and figures
are embedded, and a content security policy forbids the browser to fetch anything but images from where the page lies,
or to run a script other than its own. All text is escaped. Knows nothing of how a number was computed.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import SCORE_KEYS
from braindecode_vis.base.checks import DataError, check_columns
from braindecode_vis.base.memory import PROFILE, describe_profile
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.report import figures
from braindecode_vis.report.gallery import SEEN, GalleryContent
from braindecode_vis.report.page_gallery import (
    GalleryThumbnails,
    make_thumbnails,
    view_gallery,
    write_full_images,
)
from braindecode_vis.report.page_scores import view_cards, view_groups, view_methods
from braindecode_vis.report.words import (
    DASH,
    DECODED,
    MetricNote,
    ScoreRow,
    count_decimals,
    format_number,
    sort_methods,
)
from braindecode_vis.scoring.score_row import describe_resampled, format_p_value

if TYPE_CHECKING:
    from jinja2 import Environment

# Beside the code, so that an installed package finds them.
TEMPLATES = Path(__file__).parent / "templates"
MAX_TABLE_ROWS = 200  # the whole table lies beside the page as a file
OPEN_TABLE_ROWS = 12  # longer tables are folded away


@dataclass(frozen=True)
class RankContent:
    """Ranks of the seen images in an explicit gallery.

    Parameters
    ----------
    ranks : array of shape (n_queries,)
        From 1 (best) to `gallery_size`; ties may share a fractional rank.
    gallery_size
        Number of candidates.
    caption
        One or two sentences on queries and gallery.
    """

    ranks: np.ndarray
    gallery_size: int
    caption: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", figures.check_ranks(self.ranks, self.gallery_size))


@dataclass(frozen=True)
class SectionFigure:
    """One figure of an analysis.

    Parameters
    ----------
    figure
        PNG, JPEG or WebP bytes, or SVG as text or bytes.
    figure_dark
        The same for readers in dark mode; without it the figure sits on a light sheet.
    alt
        What the figure shows, in words, for readers who do not see it.
    caption
        One or two sentences below the figure.
    """

    figure: bytes | str
    figure_dark: bytes | str | None = None
    alt: str = ""
    caption: str = ""


@dataclass(frozen=True)
class SectionFile:
    """A file that a section links: its path from the page, its name, and what it holds."""

    path: str
    name: str
    caption: str = ""


@dataclass(frozen=True)
class ExtraSection:
    """A further analysis: text, figures and a table, or some of them.

    Parameters
    ----------
    title
        Heading.
    caption
        Text below the heading; it is escaped unless it is `markupsafe.Markup`.
    figure
        PNG, JPEG or WebP bytes, or SVG as text or bytes.
    figure_dark
        The same for readers in dark mode; without it the figure sits on a light sheet.
    alt
        What the figure shows, in words, for readers who do not see it.
    table
        A data frame or a list of rows (dicts); long ones are folded away, and cut with a note.
    figures
        Further figures, each with words and a caption of its own.
    files
        Files beside the page, which are linked: they are found as long as page and files are moved together.
    """

    title: str
    caption: str = ""
    figure: bytes | str | None = None
    figure_dark: bytes | str | None = None
    alt: str = ""
    table: pd.DataFrame | Sequence[Mapping[str, Any]] | None = None
    figures: Sequence[SectionFigure] = ()
    files: Sequence[SectionFile] = ()


@dataclass(frozen=True)
class Addition:
    """What a part adds to the report of a run.

    Parameters
    ----------
    shows
        Plain values that change when what is shown changes; the page is then written anew.
    make
        Returns the sections, in order; called only when the page is written.
    problems
        What could not be shown, one sentence each.
    has_time_course
        Whether one of them says when the image can be decoded.
    """

    shows: Sequence[Any]
    make: Callable[[], Sequence[ExtraSection]]
    problems: Sequence[str] = ()
    has_time_course: bool = False


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report says.

    Parameters
    ----------
    title
        Headline of the page.
    dataset
        Name of the data set.
    result
        The result in one plain sentence, above everything else.
    counted
        Number of subjects, of trials kept and of trials dropped, in one sentence.
    method
        What decoded, with its size: ``ATM-S, 40 epochs``.
    differences
        Decoded less control with the paired 95 % interval, as in ``differences.json``; the verdict of a card asks them.
    description
        One paragraph in plain words.
    protocol
        Data set, split, averaging and gallery: a text, or a mapping of such labels to texts.
    facts
        Label and value of what is known of the data: number of trials, voxels or channels, licence.
    scores
        Rows with the keys of `braindecode_vis.base.arrays.SCORE_KEYS`; ``decoded`` is the system under test.
    ranks
        Ranks of the seen images, if retrieval ran.
    gallery
        Images, if there are any.
    sections
        Further analyses, in order.
    leaks
        What an audit found that no score survives; it is above everything else.
    warnings
        What a reader must know before any number, for example that the design is blocked.
    hints
        Where a setting probably costs much, or a score needs an explanation.
    provenance
        Nested mapping: config, seed, versions, git revision, input hashes, fingerprints.
    command
        The exact command that made the report.
    headline
        Metrics of the cards on top, in order; up to four well-known ones by default.
    metric_notes
        Words for metrics, where those of `describe_metric` do not fit; by metric name.
    method_notes
        One sentence for each control whose name does not speak for itself; by method name.

    Raises
    ------
    DataError
        If a score row lacks a key or a metric of `headline` has no decoded score.
    """

    title: str
    dataset: str
    result: str = ""
    counted: str = ""
    method: str = ""
    differences: Sequence[Mapping[str, Any]] = ()
    description: str = ""
    protocol: str | Mapping[str, str] = ""
    facts: Sequence[tuple[str, Any]] = ()
    scores: Sequence[ScoreRow] = ()
    ranks: RankContent | None = None
    gallery: GalleryContent | None = None
    sections: Sequence[ExtraSection] = ()
    leaks: Sequence[str] = ()
    warnings: Sequence[str] = ()
    hints: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    headline: Sequence[str] = ()
    metric_notes: Mapping[str, MetricNote] = field(default_factory=dict)
    method_notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, row in enumerate(self.scores):
            # Rows from elsewhere may have no p-value, and none of the store's fingerprints.
            required = [key for key in SCORE_KEYS if key not in ("p_value", "fingerprint", "resampled")]
            check_columns(row, required, what=f"score row {number}")
        decoded = {row["metric"] for row in self.scores if row["method"] == DECODED}
        for metric in self.headline:
            if metric not in decoded:
                raise DataError(
                    f"the headline names {metric!r}, but the decoded scores are {sorted(decoded)}."
                )


def write_report(path: str | Path, content: ReportContent) -> Path:
    """Write the report as one HTML file; readers see the old file or the new one, never a part.

    Images of the gallery that are larger than their thumbnails lie in full size in a folder beside it, named after the
    page (``report_images``). The page alone, sent to somebody, shows the thumbnails.

    Parameters
    ----------
    path
        The file to write; its folder is made if needed.
    content
        What to say.

    Returns
    -------
    path
        The file written.
    """
    target, gallery = Path(path), content.gallery
    thumbnails = None if gallery is None else make_thumbnails(gallery)
    folder = target.with_name(f"{target.stem}_images")
    page = render_report(content, thumbnails=thumbnails, folder=folder.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if gallery is not None and thumbnails is not None:
        write_full_images(folder, gallery, thumbnails)
    with replace_atomically(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def has_full_images(path: Path) -> bool:
    """Say whether the images in full size that a page of `write_report` shows on a click still lie beside it."""
    folder = path.with_name(f"{path.stem}_images")
    named = set(re.findall(rf"{re.escape(folder.name)}/(\d{{5}}\.jpg)", path.read_text(encoding="utf-8")))
    return all((folder / name).is_file() for name in named)


def render_report(
    content: ReportContent, *, thumbnails: GalleryThumbnails | None = None, folder: str = ""
) -> str:
    """Return the report as HTML text; the same content gives the same bytes.

    Parameters
    ----------
    content
        What to say.
    thumbnails
        Of its gallery, if they were made before.
    folder
        Name of a folder beside the page with images in full size; none by default.
    """
    return render_template(
        "page.html.j2",
        "_script.html.j2",
        content=content,
        protocol=content.protocol if isinstance(content.protocol, Mapping) else {},
        protocol_text=content.protocol if isinstance(content.protocol, str) else "",
        cards=view_cards(content.scores, content.headline, content.metric_notes, content.differences),
        groups=view_groups(content.scores, content.metric_notes),
        n_controls=len({row["method"] for row in content.scores} - {DECODED}),
        methods=_name_methods(content),
        resampled=describe_resampled(content.scores),
        ranks=_view_ranks(content.ranks) if content.ranks is not None else None,
        gallery=view_gallery(content.gallery, thumbnails, folder) if content.gallery is not None else None,
        profile=_view_profile(content.provenance.get("stages", {})),
        sections=[_view_section(section, number) for number, section in enumerate(content.sections)],
        dash=DASH,
    )


def render_template(name: str, script_name: str, **given: Any) -> str:
    """Return a page with its one script, which the policy of the page allows by its digest; all text is escaped."""
    from markupsafe import Markup

    env = _make_environment()
    script = env.get_template(script_name).render()
    # The policy of the page allows this one script by its digest, and no other.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return env.get_template(name).render(script=Markup(script), script_digest=digest, **given)


def render_static(name: str, **given: Any) -> str:
    """Return a page without a script; all text is escaped."""
    return _make_environment().get_template(name).render(**given)


@functools.cache
def _make_environment() -> Environment:
    """Return the templates of all pages, each of which is compiled once."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Everything is escaped, and a name that a template misspells is an error and not an empty place.
    env = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters.update(number=format_number, p_value=format_p_value)
    return env


def _name_methods(content: ReportContent) -> list[tuple[str, str]]:
    names, notes = [row["method"] for row in sort_methods(content.scores)], dict(content.method_notes)
    if content.gallery is not None:
        names += [*([SEEN] if SEEN in content.gallery.row_notes else []), *content.gallery.rows]
        notes |= content.gallery.row_notes
    return view_methods(names, notes)


# ---- figures and tables
def _view_profile(stages: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table of what each stage took; None if no record has it."""
    rows = [
        [(name, False), *((text, True) for text in describe_profile({**about, **about["profile"]}))]
        for name, about in stages.items()
        if "profile" in about
    ]
    columns = [("stage", False), *((name, True) for name in PROFILE)]
    return {"columns": columns, "rows": rows, "left_out": 0} if rows else None


def _embed(figure: bytes | str) -> str:
    """Return a figure as a ``data:`` address; in an image element an SVG neither runs nor loads anything."""
    data = figure.encode() if isinstance(figure, str) else bytes(figure)
    # By their first bytes: a figure of an analysis comes without a name.
    starts = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp"}
    kind = next((kind for start, kind in starts.items() if data.startswith(start)), None)
    if kind is None:
        if b"<svg" not in data[:2000]:
            raise DataError("a figure must be PNG, JPEG, WebP or SVG.")
        kind = "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _view_ranks(content: RankContent) -> dict[str, Any]:
    ranks, size = content.ranks, content.gallery_size
    # A shared first place is above 1 and is no hit.
    first = float((ranks <= 1).mean())
    median = float(np.median(ranks))
    facts = {"n": len(ranks), "size": size, "first": first, "median": median, "chance_median": (size + 1) / 2}
    return {**_draw_ranks(tuple(ranks.tolist()), size), **facts, "caption": content.caption}


@functools.lru_cache(maxsize=16)  # an audit draws them as the run did
def _draw_ranks(ranks: tuple[float, ...], size: int) -> dict[str, str]:
    drawn: dict[str, str] = {}
    for name, plot in {"histogram": figures.plot_rank_histogram, "curve": figures.plot_top_k_curve}.items():
        light = figures.render_svg(plot(ranks, size))
        drawn |= {f"{name}_light": _embed(light), f"{name}_dark": _embed(figures.darken_svg(light))}
    return drawn


def _view_section(section: ExtraSection, number: int) -> dict[str, Any]:
    drawn = list(section.figures)
    if section.figure is not None:
        drawn.insert(0, SectionFigure(section.figure, section.figure_dark, section.alt))
    return {
        "id": f"section-{number + 1}",
        "title": section.title,
        "caption": section.caption,
        # Two figures fit beside each other on a screen if none is wider than this.
        "beside": len(drawn) > 1 and all(_find_width(figure.figure) <= 380 for figure in drawn),
        "figures": [
            {
                "light": _embed(figure.figure),
                "dark": None if figure.figure_dark is None else _embed(figure.figure_dark),
                "alt": figure.alt or section.title,
                "caption": figure.caption,
            }
            for figure in drawn
        ],
        "files": [
            {"href": quote(file.path), "name": file.name, "caption": file.caption} for file in section.files
        ],
        "table": None if section.table is None else _view_table(pd.DataFrame(section.table)),
    }


def _find_width(figure: bytes | str) -> float:
    """Return the width that an SVG states, in pt; infinity for any other figure."""
    found = re.search(r'<svg[^>]*\bwidth="([\d.]+)pt"', figure[:2000]) if isinstance(figure, str) else None
    return float(found[1]) if found else np.inf


def _view_table(table: pd.DataFrame) -> dict[str, Any]:
    """Return columns with what is a number marked as such, and rows of text."""
    numbers = [pd.api.types.is_numeric_dtype(kind) and kind.kind != "b" for kind in table.dtypes]
    writers = [_choose_writer(str(name), table.iloc[:, at]) for at, name in enumerate(table.columns)]
    # As objects: a frame of several types would turn whole numbers into floats.
    shown = table.head(MAX_TABLE_ROWS).to_numpy(dtype=object).tolist()
    return {
        "columns": list(zip([str(name).replace("_", " ") for name in table.columns], numbers, strict=True)),
        "rows": [
            [(write(value), numeric) for value, write, numeric in zip(row, writers, numbers, strict=True)]
            for row in shown
        ],
        "n": len(table),
        "folded": len(table) > OPEN_TABLE_ROWS,
        "left_out": max(0, len(table) - MAX_TABLE_ROWS),
    }


def _choose_writer(name: str, column: pd.Series) -> Callable[[Any], str]:
    """Return what turns a value of this column into text: one number of decimals, unless that would hide a value."""
    if name.startswith("p_") or name == "p":
        return format_p_value
    if not pd.api.types.is_float_dtype(column):
        return format_number
    sizes = column.abs().to_numpy(dtype=float)
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    decimals = count_decimals(sizes)
    # A column of one number of decimals is easier to read, unless a small value would look like zero.
    hides = sizes.size > 0 and sizes.min() < 0.5 * 10.0**-decimals
    return format_number if hides else functools.partial(format_number, decimals=decimals)
