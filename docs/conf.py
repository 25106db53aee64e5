"""Settings of Sphinx for the documentation site: ``make docs``, or ``sphinx-build docs site``.

The pages are those of this folder, those that `generate.py` writes from the code into ``docs/generated``, and the
notebooks, which are run when they or the package have changed. `hooks.py` adds links, pictures and what a search on
disk needs.
"""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402
import hooks  # noqa: E402
import kernel  # noqa: E402

from braindecode_vis import __version__  # noqa: E402

project = "braindecode_vis"
author = "The braindecode_vis founders"
copyright = "the braindecode_vis founders; MIT licence"
version = release = __version__
language = "en"

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "sphinx_design",
]
# Settings are split into a page for each role.
exclude_patterns = ["**/runs", "**/.ipynb_checkpoints", "generated/notebooks", "SETTINGS.md"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# Single backticks are code in our docstrings, and a link where they name something public.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the docstrings, in words
numpydoc_show_class_members = False
copybutton_exclude = ".linenos, .gp, .go"

# Outputs are kept by what package and notebook are: a change of either runs it again, on what earlier runs left.
nb_execution_mode = "off" if os.environ.get("BRAINDECODE_VIS_DOCS_NOTEBOOKS") == "off" else "cache"
if nb_execution_mode == "cache":
    kernel.offer_kernel()  # which imports once for all notebooks
nb_execution_cache_path = str(generate.make_cache(HERE / "generated" / "notebooks"))
# Seconds of a cell; against a hang alone, since a machine with other work may take long.
nb_execution_timeout = 3600
nb_execution_raise_on_error = True
nb_execution_excludepatterns = generate.list_without_recordings()
nb_merge_streams = True
if generate.find_recordings().is_dir():
    os.environ["BRAINDECODE_VIS_DATA"] = str(generate.find_recordings().resolve())
os.environ.pop("MPLBACKEND", None)  # figures belong into the page
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
# The arrays of the notebooks are small: threads would wait for each other, and that costs as much as the computation.
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

html_theme = "pydata_sphinx_theme"
html_title = f"braindecode_vis {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "static/logo.svg"
html_sourcelink_suffix = ""
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {
        "text": "braindecode_vis",
        "image_light": "static/logo.svg",
        "image_dark": "static/logo_dark.svg",
    },
    "icon_links": [
        {
            "name": "Repository",
            "url": "https://github.com/braindecode-vis/braindecode_vis",
            "icon": "fa-brands fa-github",
        }
    ],
    "switcher": {"json_url": "_static/versions.json", "version_match": version},
    "check_switcher": False,  # the list is written after the pages
    "navbar_align": "left",
    "navbar_end": ["version-switcher", "theme-switcher", "navbar-icon-links"],
    "header_links_before_dropdown": 8,
    "show_toc_level": 2,
    "navigation_depth": 3,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "RESULTS": [], "GUIDES": []},  # wide tables
}


def leave_out(app, what, name, thing, skip, options):
    """Leave out the routing of metadata, which scikit-learn adds to each estimator and explains in its own pages."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def setup(app):
    """Write the generated pages before any is read, and connect what happens to pages later."""
    generate.write_pages(HERE / "generated")
    hooks.write_placeholders(HERE / "generated" / "thumbnails")
    app.add_config_value("glossary_terms", generate.read_terms(HERE / "CONCEPTS.md"), "env")
    app.add_transform(hooks.LinkTerms)
    app.connect("source-read", lambda app, name, source: generate.show_cards(name, source), priority=400)
    app.connect("source-read", lambda app, name, source: generate.redirect_links(name, source))
    app.connect("autodoc-skip-member", leave_out)
    app.connect("env-updated", hooks.draw_thumbnails)
    app.connect("build-finished", hooks.finish)
    return {"parallel_read_safe": True}
