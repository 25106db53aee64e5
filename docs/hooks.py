"""What happens to the pages of the site while Sphinx reads and writes them; `conf.py` connects these functions.

While pages are read, the first use of each term of the glossary becomes a link, and a table of notebooks becomes cards
with pictures. When all are written, the pictures of the cards are taken from the outputs of the notebooks, pages that
moved get a page that leads on, and the texts of all pages are kept for a search without a server, since browsers do not
let a page on disk read another one. What the pages say is made in ``generate.py``.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import generate
import write_versions
from docutils import nodes
from PIL import Image
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

#: Page that is gone -> the page that took it in.
MOVED = {
    "BENCHMARKS": "research/BENCHMARKS",
    "CORPUS": "PRETRAINING",
    "ENCODING": "ANALYSES",
    "FETCHING": "DATASETS",
    "FOUNDATION": "PRETRAINING",
    "LOG": "research/LOG",
    "OBJECTIVES": "NETWORKS",
    "PHANTOM": "research/PHANTOM",
    "PUBLISHED": "research/PUBLISHED",
    "REPORT": "AUDIT",
    "SCORE": "AUDIT",
    "WAVE": "PRETRAINING",
}

# --- glossary ---------------------------------------------------------------------------------------------------------


class LinkTerms(SphinxTransform):
    """Link the first use of each term in the prose of a page, in the singular or plural, to the glossary."""

    default_priority = 700
    #: Text inside of these is no prose, as what a notebook printed and cards, which are links, are none.
    left_out = (
        nodes.literal,
        nodes.literal_block,
        nodes.title,
        nodes.reference,
        nodes.table,
        nodes.raw,
        nodes.math,
        nodes.caption,
        addnodes.pending_xref,
        addnodes.desc_signature,
        addnodes.download_reference,
    )
    linked_pages = re.compile(r"[A-Z_\d]+|index|generated/tutorials/.*|generated/catalogue")

    def apply(self, **kwargs: Any) -> None:
        """Link the terms of one page."""
        if not self.linked_pages.fullmatch(self.env.docname) or any(self.document.findall(addnodes.glossary)):
            return
        waiting = {term.lower(): term for term in self.config.glossary_terms}  # longest first
        if not waiting:
            return
        listed = "|".join(map(re.escape, waiting))
        pattern = re.compile(rf"(?<![\w-])({listed})(?:e?s)?(?![\w-])", re.I)
        for text in list(self.document.findall(nodes.Text)):
            if any(match[1].lower() in waiting for match in pattern.finditer(text)) and self._is_prose(text):
                text.parent.replace(text, list(self._split(str(text), pattern, waiting)))

    def _is_prose(self, text: nodes.Text) -> bool:
        above = list(_list_above(text))
        outputs_and_cards = {"cell_output", "sd-card"}
        return any(isinstance(node, nodes.paragraph) for node in above) and not any(
            isinstance(node, self.left_out) or outputs_and_cards & set(node.get("classes", ()))
            for node in above
        )

    def _split(self, text: str, pattern: re.Pattern[str], waiting: dict[str, str]) -> Iterator[nodes.Node]:
        """Yield the parts of a text; a term that is linked is taken out of `waiting`."""
        start = 0
        for match in pattern.finditer(text):
            term = waiting.pop(match[1].lower(), None)
            if term is not None:
                yield nodes.Text(text[start : match.start()])
                link = addnodes.pending_xref(
                    "", refdomain="std", reftype="term", reftarget=term, refexplicit=True, refwarn=True
                )
                link["refdoc"] = self.env.docname
                link += nodes.inline(match[0], match[0], classes=["xref", "std", "std-term"])
                yield link
                start = match.end()
        yield nodes.Text(text[start:])


# --- pictures of notebooks --------------------------------------------------------------------------------------------


def write_placeholders(folder: Path) -> None:
    """Write a picture of each notebook that holds its number, for as long as there is no figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in generate.list_notebooks():
        number = html.escape(path.stem.partition("_")[0])
        shown = (
            f'<text x="240" y="190" text-anchor="middle" font-family="sans-serif" font-size="120" '
            f'fill="#8a94a6">{number}</text>'
        )
        _write_picture(folder / f"{path.stem}.svg", shown, kept=True)


def draw_thumbnails(app: Any, env: Any) -> None:
    """Put the first figure of each notebook that was run into its picture, before pictures are copied."""
    for path in generate.list_notebooks():
        page = f"generated/tutorials/{path.stem}"
        if page in env.found_docs and (figure := _find_figure(env.get_doctree(page), Path(app.srcdir))):
            width, height = 'width="448"', 'height="268"'
            shown = f'<image x="16" y="16" {width} {height} href="{figure}"/>'
            _write_picture(Path(app.srcdir) / "generated" / "thumbnails" / f"{path.stem}.svg", shown)


def _write_picture(path: Path, shown: str, kept: bool = False) -> None:
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="480" height="300" viewBox="0 0 480 300">'
    text = f'{frame}<rect width="480" height="300" fill="#fff"/>{shown}</svg>\n'
    if not path.is_file() or (not kept and path.read_text(encoding="utf-8") != text):
        path.write_text(text, encoding="utf-8")


def _find_figure(doctree: nodes.document, folder: Path) -> str | None:
    """Return the first figure among the outputs of a notebook as a data address, no larger than a card needs."""
    for image in doctree.findall(nodes.image):
        file = folder / image["uri"]
        if (
            not any("cell_output" in node.get("classes", ()) for node in _list_above(image))
            or not file.is_file()
        ):
            continue
        if file.suffix == ".svg":
            kind, content = "svg+xml", file.read_bytes()
        else:
            kind, buffer = "png", io.BytesIO()
            with Image.open(file) as picture:
                picture.thumbnail((896, 536))
                picture.convert("RGB").quantize(64).save(buffer, "PNG", optimize=True)
            content = buffer.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return None


def _list_above(node: nodes.Node) -> Iterator[nodes.Element]:
    while node.parent is not None:
        node = node.parent
        yield node


# --- after the pages --------------------------------------------------------------------------------------------------


def finish(app: Any, exception: Exception | None) -> None:
    """Write what belongs beside the pages: those that lead on, the texts for the search on disk, and the versions."""
    if exception is None and app.builder.format == "html":
        out = Path(app.outdir)
        write_moved(out)
        pages = [name for name in sorted(app.env.found_docs) if (out / f"{name}.html").is_file()]
        write_excerpts(out, pages)
        write_versions.write_versions(out, app.config.version)


def write_moved(out: Path) -> None:
    """Write a page that leads on for each page that is gone; the part after ``#`` is kept."""
    for name, target in MOVED.items():
        if not (generate.HERE / f"{name}.md").is_file():
            title = html.escape(generate.read_title(generate.HERE / f"{target}.md"))
            (out / f"{name}.html").write_text(
                f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Moved</title>\n'
                f'<link rel="canonical" href="{target}.html">\n'
                f'<meta http-equiv="refresh" content="0; url={target}.html">\n'
                f'<script>location.replace("{target}.html" + location.hash)</script>\n'
                f'<p>This page is now part of <a href="{target}.html">{title}</a>.</p>\n</html>\n',
                encoding="utf-8",
            )


def write_excerpts(out: Path, pages: Sequence[str]) -> None:
    """Write the text of every page, in its sections, to a script that a search on disk reads."""
    texts = {}
    for name in pages:
        page = (out / f"{name}.html").read_text(encoding="utf-8")
        body = page.partition('<article class="bd-article">')[2].partition("</article>")[0]
        body = re.sub(r"<(script|style|pre)\b.*?</\1>", " ", body, flags=re.S)
        body = re.sub(r'<a class="headerlink".*?</a>', "", body, flags=re.S)
        body = re.sub(r"<section\b[^>]*?( id=\"[^\"]+\")[^>]*>", r"<section\1>", body)
        body = re.sub(r"<(?!/?section\b)[^>]*>", "", body)
        texts[name] = re.sub(r"\s+", " ", body).strip()
    content = json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
    (out / "_static" / "excerpts.js").write_text(f"window.siteTexts = {content};\n", encoding="utf-8")
