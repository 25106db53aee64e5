"""Run every notebook and write it as a page of the documentation.

Call it as ``python notebooks/build.py site/notebooks``. The pages are made with nbconvert; where it is not
installed, an index with links to the notebooks themselves is written, and nothing is run.
"""

from __future__ import annotations

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Notebooks of braindecode_vis</title><style>
body {{ max-width: 46rem; margin: 3rem auto; padding: 0 1rem; font: 1.05rem/1.6 system-ui, sans-serif }}
</style></head>
<body><h1>Notebooks</h1>{note}<ol>
{entries}
</ol><p><a href="../index.html">Reference of the package</a></p></body></html>
"""


def list_notebooks() -> list[Path]:
    """Return the notebooks in the order in which they are read."""
    return sorted(HERE.glob("*.ipynb"))


def execute(path: Path, timeout: float = 600) -> Any:
    """Return a notebook with the outputs of a fresh run; the file stays as it is."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources).execute()
    return notebook


def read_title(path: Path) -> str:
    """Return the first heading of a notebook."""
    import nbformat

    first = nbformat.read(path, as_version=4).cells[0].source
    return first.splitlines()[0].lstrip("# ").strip()


def render(notebook: Any) -> str:
    """Return an executed notebook as one page, with links to the other pages instead of the notebooks."""
    from nbconvert import HTMLExporter

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.html)", cell.source)
    # No formulas and no widgets, so nothing has to be fetched from elsewhere.
    exporter = HTMLExporter(require_js_url="", mathjax_url="", embed_images=True)
    page, _ = exporter.from_notebook_node(notebook)
    return page


def build(out: Path) -> None:
    """Write one page per notebook and an index."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        import nbconvert  # noqa: F401
    except ImportError:
        note = "<p>Pages with results need <code>pip install nbconvert</code>; these are the notebooks.</p>"
        targets = {path: os.path.relpath(path, out) for path in list_notebooks()}
    else:
        note, targets = "", {}
        os.environ.pop("MPLBACKEND", None)  # figures belong into the page
        for path in list_notebooks():
            print(f"running {path.name}", flush=True)
            (out / f"{path.stem}.html").write_text(render(execute(path)), encoding="utf-8")
            targets[path] = f"{path.stem}.html"
    entries = "\n".join(
        f'<li><a href="{html.escape(target)}">{html.escape(read_title(path))}</a></li>'
        for path, target in targets.items()
    )
    (out / "index.html").write_text(INDEX.format(note=note, entries=entries), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "site" / "notebooks")
