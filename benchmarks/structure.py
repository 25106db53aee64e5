"""How easy the tree is to enter: size, circles, names, comments, and what one has to open to follow a training.

Prints one row per measure beside the wanted value. With ``--train`` a tiny simulated recording is trained by ATM-S and
by ridge, and the files whose functions ran are counted; without it the table takes seconds and runs nothing of the
package.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "braindecode_vis"

#: Measure and what is wanted of it.
WANTED = {
    "files": "at most 320",
    "lines": "at most 73 000",
    "circles, counting imports inside functions": "0",
    "private functions named exactly once": "under 50 %",
    "comments per 100 lines": "about 4",
    "public top-level functions and classes": "about 30 of them promised",
    "lines judged by mypy": "100 %",
    "class names with two meanings": "0",
    "module names that occur twice or more": "under 8",
    "files whose code runs in train, ATM-S": "at most 35",
    "files whose code runs in train, ridge": "at most 20",
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="also train on a tiny simulated recording")
    parser.add_argument("--names", action="store_true", help="name what was counted")
    arguments = parser.parse_args()
    found = measure_tree()
    if arguments.train:
        found.update(measure_train())
    width = max(map(len, WANTED))
    for name, wanted in WANTED.items():
        value, members = found.get(name, ("not run", ()))
        print(f"{name:{width}}  {value:>10}  {wanted}")
        if arguments.names:
            for member in members:
                print(f"    {member}")


def measure_tree() -> dict[str, tuple[str, list[str]]]:
    """Count in the source alone."""
    modules = {_name_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    texts = {name: path.read_text() for name, path in modules.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    n_lines = sum(text.count("\n") for text in texts.values())
    n_comments = sum(
        token.type == tokenize.COMMENT
        for text in texts.values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    mentions = Counter(word for text in texts.values() for word in re.findall(r"\b_[a-z]\w+", text))
    private, public, classes, stems = set(), [], defaultdict(list), defaultdict(list)
    for name, tree in trees.items():
        if modules[name].name != "__init__.py":
            stems[modules[name].stem].append(name)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                hidden = node.name.startswith("_")
                if hidden and isinstance(node, ast.FunctionDef):
                    private.add(node.name)
                elif not hidden:
                    public.append(node.name)
                    if isinstance(node, ast.ClassDef):
                        classes[node.name].append(name)
    # The definition is one mention and the only call the other.
    once = sorted(name for name in private if mentions[name] == 2)
    circles = find_circles({name: find_imports(name, tree, modules) for name, tree in trees.items()})
    twice = {name: places for name, places in classes.items() if len(places) > 1}
    repeated = {stem: places for stem, places in stems.items() if len(places) > 1}
    judged = sum(texts[name].count("\n") for name in modules if _is_judged(modules[name]))
    return {
        "files": (str(len(modules)), []),
        "lines": (f"{n_lines:,}".replace(",", " "), []),
        "circles, counting imports inside functions": (
            f"{len(circles)} ({sum(map(len, circles))})",
            [" ".join(circle) for circle in circles],
        ),
        "private functions named exactly once": (f"{100 * len(once) / len(private):.0f} %", once),
        "comments per 100 lines": (f"{100 * n_comments / n_lines:.1f}", []),
        "public top-level functions and classes": (str(len(public)), []),
        "lines judged by mypy": (f"{100 * judged / n_lines:.0f} %", []),
        "class names with two meanings": (
            str(len(twice)),
            [f"{k}: {', '.join(v)}" for k, v in twice.items()],
        ),
        "module names that occur twice or more": (
            str(len(repeated)),
            [f"{k}: {', '.join(v)}" for k, v in repeated.items()],
        ),
    }


def find_imports(name: str, tree: ast.Module, modules: dict[str, Path]) -> set[str]:
    """Return the modules of the package that one imports, at its top or inside functions; typing-only ones too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {other for other in found if other in modules and other != name}


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other (strongly connected components of two or more)."""
    # Tarjan's algorithm: a module closes a group when nothing it reaches was entered earlier and is still open.
    entered: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        entered[node] = lowest[node] = len(entered)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in entered:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], entered[other])
        if lowest[node] == entered[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in entered:
            visit(node)
    return groups


def measure_train() -> dict[str, tuple[str, list[str]]]:
    """Train on a tiny simulated recording and name the files of the package whose functions ran."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, overrides in {
            "ATM-S": ["encoder.kind=network", "encoder.network.kind=atm_s", "encoder.epochs=2"],
            "ridge": [],
        }.items():
            script = Path(folder) / "trace.py"
            script.write_text(_TRACE)
            command = [sys.executable, str(script), folder, str(PACKAGE), *overrides]
            files = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            found[f"files whose code runs in train, {label}"] = (str(len(files)), files)
    return found


# Functions are counted, not the bodies of modules and classes, which run at import, nor comprehensions in these; the
# stages before are not counted.
_TRACE = """
import sys, threading
from pathlib import Path
from braindecode_vis.config import read_config
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.pipeline.learning import embed, train
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.parts.studies.demo import make_phantom

folder, package = Path(sys.argv[1]), sys.argv[2]
root = folder / "phantom"
if not root.is_dir():
    make_phantom("things-eeg2", root, size=SIZES["things-eeg2"]["tiny"], snr=0.5, seed=0)
run = open_run(read_config("phantom_eeg", sys.argv[3:], root=root), folder / f"run{len(sys.argv)}")
embed(run)
ran = set()

def note(frame, event, argument):
    code = frame.f_code
    at_import = code.co_name[0] == "<" and frame.f_back is not None and frame.f_back.f_code.co_name == "<module>"
    if event == "call" and code.co_filename.startswith(package) and code.co_flags & 0x2 and not at_import:
        ran.add(code.co_filename[len(package) + 1:])

threading.setprofile(note)
sys.setprofile(note)
train(run)
sys.setprofile(None)
print("\\n".join(sorted(ran)))
"""


def _name_module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_judged(path: Path) -> bool:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["mypy"]["files"]
    return any(path.is_relative_to(ROOT / name) for name in listed)


if __name__ == "__main__":
    main()
