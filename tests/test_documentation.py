"""Every page is reached, every link leads somewhere, and every command and line of Python in them is real."""

import ast
import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

import braindecode_vis as bdv
from braindecode_vis.cli import app
from braindecode_vis.config import find_config, list_shipped, read_config
from braindecode_vis.config.explain import explain
from braindecode_vis.datasets.manifests import read_manifests

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("research/*.md"))]
PAGES = [*WRITTEN, *sorted(ROOT.glob("*.md"))]

VERBS = get_command(app).commands


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate = load_generator()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every page of the site, by its path below docs: written by hand, and generated."""
    found = {path.relative_to(DOCS).as_posix(): path.read_text() for path in WRITTEN}
    return found | {f"generated/{name}": content for name, content in generate.make_pages()}


def find_blocks(text, *languages):
    """Return the fenced blocks of these languages; blocks inside of directives count as well."""
    found = re.findall(r"^[ \t]*```(\w+)\n(.*?)^[ \t]*```", text, re.M | re.S)
    return [content for language, content in found if language in languages]


def list_commands(text):
    """Return every command line of ours in a page, with continued lines joined and remarks cut off."""
    shown = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^(?:[ \t]{4,}|\$ |[ \t]*\$ )(braindecode-vis .*)$", shown, re.M)
    lines += [line for block in find_blocks(shown, "console", "bash", "text") for line in block.splitlines()
              if line.startswith("braindecode-vis ") and "Usage" not in line]  # fmt: skip
    return [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in lines]


# --- pages and links -------------------------------------------------------------------------------------


def test_every_page_is_in_a_table_of_contents(pages):
    reached, waiting = set(), ["index.md"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        trees = re.findall(r"^```\{toctree\}\n(.*?)^```", pages.get(name, ""), re.M | re.S)
        listed = [line for tree in trees for line in tree.splitlines() if line]
        assert len(listed) == len(set(listed)), f"{name} lists a page twice"
        for tree in trees:
            for line in filter(None, map(str.strip, tree.splitlines())):
                if not line.startswith(":"):
                    entry = re.sub(r".*<(.+)>", r"\1", line)
                    base = Path(name).parent
                    matched = [
                        page
                        for page in pages
                        if Path(page).match(f"{base / entry}.*" if base.name else f"{entry}.*")
                    ]
                    assert matched, f"{name} lists {entry}, which is not there"
                    waiting += matched
    left_out = {"SETTINGS.md"}  # the site has a page for each role instead
    assert set(pages) - reached == left_out


@functools.cache
def make_anchors(text):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#{1,4} (.+)$", text, re.M)
    return {generate._slug(re.sub(r"\\(.)", r"\1", title).strip()) for title in titles}


def list_links(text):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(path):
    """As they are read in the repository, where pages of the site that are generated are not."""
    for link in list_links(path.read_text()):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target) or re.match(r"(\.\./)?generated/", target):
            continue
        file = (path.parent / target) if target else path
        assert file.exists(), f"{path.name} links to {link}"
        if anchor and file.suffix == ".md":
            assert anchor in make_anchors(file.read_text()), f"{path.name} links to {link}"


def test_links_of_the_site_lead_to_its_pages(pages):
    lost = []
    for name, content in pages.items():
        if name == "SETTINGS.md" or name.endswith(".ipynb"):
            continue
        shown = generate.redirect_links(name[:-3], [content])
        for link in list_links(shown):
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            parts = []
            for part in (Path(name).parent / target).parts if target else Path(name).parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            found = "/".join(parts)
            if found not in pages and not (DOCS / found).is_file():
                lost.append(f"{name}: {link}")
            elif anchor and anchor not in make_anchors(pages.get(found, "")):
                lost.append(f"{name}: {link}")
    assert lost == []


def test_the_written_pages_can_be_finished():
    """Long notes belong into docs/research, and what follows from the code is generated."""
    written = [path for path in DOCS.glob("*.md") if path.name != "SETTINGS.md"]
    words = {path.name: len(path.read_text().split()) for path in written}
    assert len(words) <= 25
    assert sum(words.values()) <= 40_000, words


# --- what is generated -----------------------------------------------------------------------------------


def test_generated_pages_name_everything(pages):
    assert all(f"\n## {name}\n" in pages["generated/catalogue.md"] for name in read_manifests())
    assert all(f"\n## {name}\n" in pages["generated/configurations.md"] for name in list_shipped())
    assert all(f"\n## {name}\n" in pages["generated/cli.md"] for name in VERBS)
    assert all(f"generated/api/{name}.md" in pages for name in bdv.__all__ if not name.startswith("_"))
    assert {f"generated/tutorials/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= set(pages)
    rows = [line.split(" | ")[0] for line in pages["generated/fetching.md"].splitlines()]
    parts = [part.name for manifest in read_manifests().values() for part in manifest.parts]
    assert [row[2:] for row in rows if row[2:] in parts] == parts
    listed = re.findall(r"^\| \[.+?\]\((\w+)\.md\) \| (.*?) \|", pages["generated/settings/index.md"], re.M)
    settings = {Path(name).stem for name in pages if name.startswith("generated/settings/")} - {"index"}
    assert {name for name, about in listed if about} == settings


def test_public_names_say_where_they_are_used(pages):
    used = pages["generated/api/decode.md"].partition("## Used in")[2]
    assert "(../../generated/tutorials/06_bring_your_own_data.ipynb)" in used
    assert "(../../OWN_DATA.md)" in used
    # What `decode` returns is used where it is called.
    assert "(../../OWN_DATA.md)" in pages["generated/api/DecodingRun.md"]
    assert generate._list_public("import braindecode_vis as bdv\nbdv.load('x').trials") == {"load"}
    assert generate._list_public("from braindecode_vis import decode, load") == {"decode", "load"}
    assert generate._list_public("bdv.load(  # a sketch") == set()


def test_every_notebook_can_be_downloaded(pages):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        text = "".join(
            line
            for cell in json.loads(pages[f"generated/tutorials/{path.name}"])["cells"]
            for line in cell["source"]
        )
        (link,) = re.findall(r"\{download\}`[^<]*<([^>]+)>`", text)
        assert (DOCS / "generated" / "tutorials" / link).resolve() == path


def test_tables_of_notebooks_become_cards(pages):
    other = "\n| a | b |\n|---|---|\n| [Page](OWN_DATA.md) | text |\n"
    source = [pages["TUTORIALS.md"] + other]
    generate.show_cards("TUTORIALS", source)
    cards = re.findall(r"^:link: generated/tutorials/(\w+)\n", source[0], re.M)
    assert sorted(cards) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert ".ipynb)" not in source[0]
    assert source[0].endswith(other)


def test_terms_are_those_of_the_glossary(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text\n\n```{glossary}\ntrial\nepoch\n  One picture.\n\nmean image\n  A control.\n```\n\nText\n"
    )
    assert generate.read_terms(page) == ["mean image", "epoch", "trial"]


def test_what_the_catalogue_says_was_measured_stands_in_the_results():
    text = (DOCS / "research" / "RESULTS.md").read_text()
    for name, entries in generate.MEASURED.items():
        assert name in read_manifests()
        for entry in entries:
            assert entry.config in list_shipped()
            assert entry.section in make_anchors(text)
            assert all(figure in text for figure in entry.figures), entry
            assert all(figure.strip("*") in entry.text for figure in entry.figures), entry


def test_every_site_of_a_release_gets_the_list_of_versions(tmp_path):
    for number in ("0.10.0", "0.9.1", "images"):
        (tmp_path / number).mkdir()
    subprocess.run([sys.executable, DOCS / "write_versions.py", tmp_path, "0.11.0.dev0"], check=True)
    texts = {path.read_text() for path in tmp_path.rglob("versions.json")}
    assert len(texts) == 1
    versions = json.loads(texts.pop())
    assert [entry["version"] for entry in versions] == ["0.11.0.dev0", "0.10.0", "0.9.1"]
    assert versions[1]["url"] == versions[0]["url"] + "0.10.0/"
    assert (tmp_path / "0.9.1" / "_static" / "versions.json").is_file()


def test_pages_are_rewritten_only_where_they_changed(tmp_path, monkeypatch):
    """A page that is touched is built again."""
    monkeypatch.setattr(
        generate, "make_pages", lambda: {"cli.md": "# Verbs", "api/load.md": "# load"}.items()
    )
    generate.write_pages(tmp_path)
    (tmp_path / "gone.md").write_text("made by an earlier version")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    generate.write_pages(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == {path: time for path, time in before.items() if path.name != "gone.md"}


def test_a_tutorial_without_its_recording_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("BRAINDECODE_VIS_DATA", str(tmp_path))
    tutorials = dict(generate.make_tutorials())
    assert len(generate.list_without_recordings()) == len(generate.RECORDINGS)
    for name in generate.RECORDINGS:
        if f"tutorials/{name}.ipynb" in tutorials:
            assert "without the recording" in tutorials[f"tutorials/{name}.ipynb"]


# --- commands and Python ---------------------------------------------------------------------------------


def check_command(line, page):
    """Parse a command as the program would, and read the shipped configuration that it changes."""
    words = shlex.split(re.sub(r"\s[|>].*", "", line))[1:]
    if not words or words[0].startswith("-") or words[0].isupper():
        return
    verb, arguments = words[0], words[1:]
    command = VERBS.get(verb)
    assert command is not None, f"no verb {verb}"
    if {"--help", "[--subject"} & set(arguments):  # what is optional stands in brackets
        return
    parsed = command.make_context(verb, arguments)  # refuses what it does not know, and calls nothing
    parsed.close()  # what the line would allow ends here
    source = str(parsed.params.get("source") or "")
    name = str(parsed.params.get("name") or "")
    if source in list_shipped() and page != "OUTSIDE.md":  # whose components are not installed
        read_config(source, parsed.params.get("overrides") or ())
    elif verb == "configs" and name and parsed.params["name"]:
        find_config(name)
    elif verb == "describe" and name not in list_shipped() and not name.isupper():
        assert explain(name)


def collect_commands():
    found = {}
    for path in PAGES:
        for line in list_commands(path.read_text()):
            found.setdefault(line, path.name)
    return found


COMMANDS = collect_commands()


def test_there_are_commands():
    assert len(COMMANDS) > 70


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: f"{COMMANDS[line]}: {line[16:60]}")
def test_commands_are_real(line):
    check_command(line, COMMANDS[line])


def test_commands_of_generated_pages_are_real(pages):
    """The catalogue advised to fetch with an option that had gone."""
    lines = {
        line for name, text in pages.items() if name.startswith("generated/") for line in list_commands(text)
    }
    assert len(lines) > 100
    for line in lines - set(COMMANDS):
        check_command(line, "")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_of_the_pages_is_python_with_public_names(path):
    """The examples of CONTRIBUTING.md, README.md and OUTSIDE.md are run by tests of their own."""
    for block in find_blocks(path.read_text(), "python"):
        if path.name == "CONTRIBUTING.md":  # lines to put into a file are no module
            continue
        found = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
        used = {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == "bdv"}
        assert used <= set(bdv.__all__), used - set(bdv.__all__)


def test_the_notebooks_that_the_site_lists_are_there():
    linked = set(re.findall(r"generated/tutorials/(\w+)\.ipynb", (DOCS / "TUTORIALS.md").read_text()))
    assert linked == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


_KERNELS = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel, nbformat, nbclient
kernel.offer_kernel()
for code in ("import sys, os; named = 1; print('torch' in sys.modules, os.getcwd())", "print('named' in globals())"):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
    print(notebook.cells[0].outputs[0].text, end="")
"""


@pytest.mark.whole
@pytest.mark.further
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the usual kernels run the notebooks")
def test_kernels_of_the_site_are_copies_that_end(tmp_path):
    """Each starts with the imports and without the names of another, and none outlives the build."""
    environment = dict(os.environ, TMPDIR=str(tmp_path), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", _KERNELS, str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.splitlines() == [f"True {tmp_path}", "False"], done.stderr
    assert list(tmp_path.glob("*/kernel.socket")) == []
    until = time.monotonic() + 60
    while _runs(str(tmp_path)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _runs(str(tmp_path)), "a kernel outlives the build"


def _runs(word):
    """Return whether a process with this word in its command line runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if word.encode() in path.read_bytes():
                return True
    return False


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    """Without the outputs of notebooks, which another test runs."""
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    pytest.importorskip("myst_nb", reason="the extra docs is not installed")
    monkeypatch.setenv("BRAINDECODE_VIS_DOCS_NOTEBOOKS", "off")
    site = tmp_path / "html"
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        tmp_path / "doctrees",
        DOCS,
        site,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (site / "searchindex.js").stat().st_size > 10_000
    built = list(site.rglob("*.html"))
    assert len(built) > 60
    texts = json.loads(
        (site / "_static" / "excerpts.js").read_text().removeprefix("window.siteTexts = ")[:-2]
    )
    assert {
        f"{path.relative_to(site).with_suffix('')}" for path in built if "bd-article" in path.read_text()
    } >= set(texts)
    assert "<section id=" in texts["CONCEPTS"]
    assert re.findall(r"<(?!/?section)", texts["CONCEPTS"]) == []
    (version,) = json.loads((site / "_static" / "versions.json").read_text())
    assert version["version"] == bdv.__version__
    assert len(list((site / "_images").glob("*.svg"))) >= len(list((ROOT / "notebooks").glob("*.ipynb")))
    linked = [path for path in built if "std-term" in path.read_text()]
    assert bool(linked) == bool(generate.read_terms(DOCS / "CONCEPTS.md"))
    for path in linked:  # once on a page, and in no heading
        terms = re.findall(r'<a class="reference internal" href="[^"]*#term-([^"]+)">', path.read_text())
        assert len(terms) == len(set(terms)), path
        assert not re.findall(r"<h\d>[^\n]*std-term", path.read_text()), path
    ids = {path: set(re.findall(r'\bid="([^"]+)"', path.read_text())) for path in built}
    for path in built:
        text = path.read_text()
        # Everything that a page loads comes with it.
        assert not re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//', text
        ), path
        for link in re.findall(r'<a[^>]*href="([^"]+)"', text):
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            file = (path.parent / target).resolve() if target else path
            assert file.exists(), f"{path.name} links to {link}"
            assert not anchor or file.suffix != ".html" or anchor in ids[file], f"{path.name} links to {link}"


def test_outputs_are_no_part_of_the_repository():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "docs/generated/" in ignored
    assert json.loads((ROOT / "notebooks" / "01_quickstart.ipynb").read_text())["cells"]
