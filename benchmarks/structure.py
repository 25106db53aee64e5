"""How easy the tree is to own: its three rings, rooms and arrows, circles, names, settings, long functions.

    python benchmarks/structure.py             # the table, in some 15 s; --names says what was counted
    python benchmarks/structure.py --train     # also trains on a tiny simulated recording, by ATM-S and by ridge
    python benchmarks/structure.py --write     # the ratchet of tests/test_structure.py takes today's figures

Prints which tree was measured, then one row per measure beside the wanted value.

- A room is a package or file directly below the package. The parts are one room in the first rows, and one each in the
  rows after these. An arrow is an ordered pair of rooms with at least one import, also inside functions and for types
  alone. Floors are the rooms of the longest way down along arrows.
- The core is everything outside ``parts/``. Names of parts in strings are module paths such as ``parts.live.session``
  in code of the core, without docstrings: they tie as an import does. The table of old module paths is left out:
  nothing in the package needs what it names.
- A part may import another one where `ALLOWED` says so.
- A setting is a field of a settings class that `docs/SETTINGS.md` lists, counted once, in the class that declares it,
  without ``kind``. A configuration shows it when the YAML file sets it. A page, notebook or benchmark shows it when its
  key stands there before ``=`` or ``:``; a key that several classes have is then shown for all of them.
- A function's lines are those from ``def`` to its end without its docstring; its parameters are all but self and cls.
- With ``--train``, files are counted of which a function ran between the start and the end of the training.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAME = "braindecode_vis"
#: Part -> the parts that it may import.
ALLOWED = {
    "studies": {"analyses", "phantom"},
    "live": {"studies", "phantom"},
    "cluster": {"studies", "phantom"},
}
#: The table of old module paths.
MOVED = "api.moved"
LONG, MANY = 100, 10

#: Measure and what is wanted of it. Others are only printed, or held by the ratchet.
WANTED = {
    "rooms at the top": "15 to 17",
    "arrows between rooms at the top": "under 95",
    "circles, counting imports inside functions": "0",
    "class names with two meanings": "0",
    "module names that occur twice or more": "at most 8",
    "imports from the core into parts": "0",
    "names of parts in strings of the core": "0",
    "imports between parts that are not allowed": "0",
    "private functions named exactly once": "under 50 %",
    "comments per 100 lines": "about 4",
    "public top-level functions and classes": "about 30 of them promised",
    "lines judged by mypy": "100 %",
    "files whose code runs in train, ATM-S": "at most 35",
    "files whose code runs in train, ridge": "at most 20",
}


@dataclass(frozen=True)
class Figure:
    """What was counted, and in which unit where it is no number of things."""

    value: float
    members: tuple[str, ...] = ()
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.value:,}".replace(",", " ") + self.unit

    @classmethod
    def count(cls, members: Any) -> Figure:
        """Return the number of things with their names."""
        found = tuple(sorted(members))
        return cls(len(found), found)


def main() -> None:
    """Print the table, or write the ratchet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the checkout; by default the one of this file"
    )
    parser.add_argument("--train", action="store_true", help="also train on a tiny simulated recording")
    parser.add_argument("--names", action="store_true", help="name what was counted")
    parser.add_argument(
        "--write", action="store_true", help="write today's figures into tests/test_structure.py"
    )
    arguments = parser.parse_args()
    try:
        tree = Tree(arguments.root)
    except FileNotFoundError as error:
        print(f"structure.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(tree.describe())
    found = tree.measure() | measure_settings(tree.root)
    if arguments.train or arguments.write:
        found |= measure_train(tree.root)
    if arguments.write:
        write_ratchet(found, tree.root / "tests" / "test_structure.py")
        return
    width = max(map(len, (*found, *WANTED)))
    for name in dict.fromkeys((*found, *WANTED)):
        figure = found.get(name)
        print(f"{name:{width}}  {figure or 'not run'!s:>10}  {WANTED.get(name, '')}".rstrip())
        for member in figure.members if figure and arguments.names else ():
            print(f"    {member}")


# --- what the source alone says ---------------------------------------------------------------------------------


class Tree:
    """The modules of one checkout.

    Parameters
    ----------
    root
        Folder of the checkout.

    Raises
    ------
    FileNotFoundError
        If there is no package in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.paths = {self._name(path): path for path in sorted((self.root / NAME).rglob("*.py"))}
        if NAME not in self.paths:
            raise FileNotFoundError(
                f"{self.root} holds no package {NAME}; pass the folder of a checkout with --root."
            )
        self.texts = {name: path.read_text(encoding="utf-8") for name, path in self.paths.items()}
        # All nodes stay: looking for cycles among them again and again takes longer than parsing.
        gc.disable()
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}
        gc.enable()
        self.imports = {name: self._find_imports(name) for name in self.trees}

    def describe(self) -> str:
        """Return where the tree lies, and its revision."""
        revision = _ask_git(self.root, "rev-parse", "--short", "HEAD") or "no git revision"
        changed = " with changes" if _ask_git(self.root, "status", "--porcelain", "--", NAME) else ""
        return f"{self.root / NAME}, {revision}{changed}"

    def measure(self) -> dict[str, Figure]:
        """Count in the source alone."""
        return {
            **self.measure_rooms(),
            **self.measure_sizes(),
            **self.measure_walls(),
            **self.measure_names(),
            **self.measure_functions(),
            **self.measure_text(),
        }

    def measure_rooms(self) -> dict[str, Figure]:
        """Count rooms, arrows, floors, and circles of modules."""
        top = {name: self._find_room(name).partition(".")[0] for name in self.paths}
        apart = {name: self._find_room(name) for name in self.paths}
        arrows, arrows_apart = self._find_arrows(top), self._find_arrows(apart)
        circles = find_groups(self.imports)
        return {
            "rooms at the top": Figure.count(set(top.values())),
            "arrows between rooms at the top": Figure.count(f"{a} -> {b}" for a, b in arrows),
            "floors": _find_floors(set(top.values()), arrows),
            "rooms, each part one of its own": Figure.count(set(apart.values()) - {"parts"}),
            "arrows between these": Figure.count(
                f"{a} -> {b}" for a, b in arrows_apart if "parts" not in (a, b)
            ),
            "circles, counting imports inside functions": Figure.count(
                " ".join(circle) for circle in circles
            ),
            "modules in circles": Figure(sum(map(len, circles))),
        }

    def measure_sizes(self) -> dict[str, Figure]:
        """Count lines and files of the core and of each part."""
        owners = {name: self._find_part(name) for name in self.paths}
        found = {}
        for owner in ["", *sorted(set(owners.values()) - {""})]:
            names = [name for name in self.paths if owners[name] == owner]
            label = f"part {owner}" if owner else "the core"
            found[f"lines of {label}"] = Figure(sum(self.texts[name].count("\n") for name in names))
            found[f"files of {label}"] = Figure(len(names))
        return found

    def measure_walls(self) -> dict[str, Figure]:
        """Count what ties the core to parts, and parts to each other."""
        inward, named, across = set(), set(), set()
        for name, others in self.imports.items():
            part = self._find_part(name)
            knows_parts = part or self._find_room(name) == "parts" or name == f"{NAME}.{MOVED}"
            for other in others:
                target = self._find_part(other)
                if target and not knows_parts:
                    inward.add(f"{name} -> {other}")
                elif part and target not in ("", part, *ALLOWED.get(part, ())):
                    across.add(f"{name} -> {other}")
            if not knows_parts:
                named.update(f"{name}: {text}" for text in _find_names_of_parts(self.trees[name]))
        return {
            "imports from the core into parts": Figure.count(inward),
            "names of parts in strings of the core": Figure.count(named),
            "imports between parts that are not allowed": Figure.count(across),
        }

    def measure_names(self) -> dict[str, Figure]:
        """Count names with two meanings, and what is public or used once."""
        classes, stems = defaultdict(list), defaultdict(list)
        private, n_public = set(), 0
        for name, tree in self.trees.items():
            if self.paths[name].name != "__init__.py":
                stems[self.paths[name].stem].append(name)
            for node in tree.body:
                if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    continue
                if not node.name.startswith("_"):
                    n_public += 1
                    if isinstance(node, ast.ClassDef):
                        classes[node.name].append(name)
                elif isinstance(node, ast.FunctionDef):
                    private.add(node.name)
        mentions = Counter(word for text in self.texts.values() for word in re.findall(r"\b_[a-z]\w+", text))
        # The definition is one mention and the only call the other.
        once = tuple(sorted(name for name in private if mentions[name] == 2))
        return {
            "class names with two meanings": _count_repeated(classes),
            "module names that occur twice or more": _count_repeated(stems),
            "public top-level functions and classes": Figure(n_public),
            "private functions named exactly once": Figure(_percent(len(once), len(private)), once, " %"),
        }

    def measure_functions(self) -> dict[str, Figure]:
        """Count long functions and those with many parameters."""
        long, many = [], []
        for name, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    if (n_lines := _count_lines(node)) > LONG:
                        long.append(f"{name}.{node.name}, {n_lines} lines")
                    if (n_parameters := _count_parameters(node)) >= MANY:
                        many.append(f"{name}.{node.name}, {n_parameters} parameters")
        return {
            f"functions over {LONG} lines, without docstring": Figure.count(long),
            f"functions with {MANY} or more parameters": Figure.count(many),
        }

    def measure_text(self) -> dict[str, Figure]:
        """Count comments, and lines under mypy."""
        n_lines = sum(text.count("\n") for text in self.texts.values())
        n_comments = sum(
            token.type == tokenize.COMMENT
            for text in self.texts.values()
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
        )
        with (self.root / "pyproject.toml").open("rb") as file:
            listed = [self.root / name for name in tomllib.load(file)["tool"]["mypy"]["files"]]
        judged = [
            name for name, path in self.paths.items() if any(path.is_relative_to(each) for each in listed)
        ]
        return {
            "comments per 100 lines": Figure(round(100 * n_comments / n_lines, 1)),
            "lines judged by mypy": Figure(
                _percent(sum(self.texts[name].count("\n") for name in judged), n_lines), unit=" %"
            ),
        }

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _find_room(self, name: str) -> str:
        """Return the room of a module, ``parts.x`` for that of a part."""
        words = name.split(".")[1:] or ["__init__"]
        return ".".join(words[: 2 if words[0] == "parts" else 1])

    def _find_part(self, name: str) -> str:
        return self._find_room(name).partition("parts.")[2]

    def _find_arrows(self, rooms: dict[str, str]) -> set[tuple[str, str]]:
        pairs = {(rooms[name], rooms[other]) for name, others in self.imports.items() for other in others}
        return {(a, b) for a, b in pairs if a != b}

    def _find_imports(self, name: str) -> set[str]:
        """Return the modules that one imports, at its top or inside functions; typing-only ones too."""
        found = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in self.paths else node.module)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
        return {other for other in found if other in self.paths and other != name}


def find_groups(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (strongly connected components of two or more)."""
    # Tarjan's algorithm: a node closes a group when nothing it reaches was entered earlier and is still open.
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


def _find_floors(rooms: set[str], arrows: set[tuple[str, str]]) -> Figure:
    """Return the longest way down, in which rooms that reach each other share one floor."""
    groups = find_groups({room: {b for a, b in arrows if a == room} for room in rooms})
    shared = {room: " = ".join(group) for group in groups for room in group}
    below = defaultdict(set)
    for a, b in arrows:
        if shared.get(a, a) != shared.get(b, b):
            below[shared.get(a, a)].add(shared.get(b, b))

    @functools.cache
    def go_down(room: str) -> tuple[str, ...]:
        return (room, *max(map(go_down, sorted(below[room])), key=len, default=()))

    longest = max(map(go_down, sorted({shared.get(room, room) for room in rooms})), key=len)
    return Figure(len(longest), longest)


def _find_names_of_parts(tree: ast.Module) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"\bparts\.[a-z]\w*[\w.:]*", node.value)


def _count_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    n_lines = (node.end_lineno or 0) - node.lineno + 1
    if ast.get_docstring(node, clean=False) is None:
        return n_lines
    return n_lines - ((node.body[0].end_lineno or 0) - node.body[0].lineno + 1)


def _count_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    named = [argument for argument in given if argument.arg not in ("self", "cls")]
    return len(named) + (node.args.vararg is not None) + (node.args.kwarg is not None)


def _count_repeated(places: dict[str, list[str]]) -> Figure:
    return Figure.count(f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1)


def _percent(count: int, whole: int) -> int:
    return round(100 * count / max(whole, 1))


def _ask_git(folder: Path, *words: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# --- settings ---------------------------------------------------------------------------------------------------

# Prints [class, key, whether a configuration sets it] of every setting.
_SETTINGS = """
import json, sys
from pathlib import Path

root = Path(sys.argv[1])
sys.path.insert(0, str(root / "docs"))
import write_settings
from braindecode_vis.base.settings import Settings
from braindecode_vis.config import RunConfig, list_shipped, read_config

roles, others = write_settings.find_classes(*write_settings.VERBS.values())
kinds = [cls for known in roles.values() for cls in known.values()]
classes = [RunConfig, *kinds, *others, *write_settings.VERBS.values()]
found = {}


def declare(cls, key):
    owner = next(base for base in cls.__mro__ if key in vars(base).get("__annotations__", {}))
    return f"{owner.__module__}.{owner.__qualname__}", key


def look(value):
    if isinstance(value, Settings):
        for key in type(value).model_fields:
            where = declare(type(value), key)
            if key in value.model_fields_set and where in found:
                found[where] = True
            look(getattr(value, key))
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            look(entry)


for cls in classes:
    found |= {declare(cls, key): False for key in cls.model_fields if key != "kind"}
for name in list_shipped():
    look(read_config(name))
print(json.dumps([[*where, shown] for where, shown in found.items()]))
"""


def measure_settings(root: Path) -> dict[str, Figure]:
    """Count settings, and those that no configuration, page, notebook or benchmark shows."""
    listed = json.loads(_run(root, "-c", _SETTINGS, str(root)))
    pages = [
        path
        for path in (root / "docs").rglob("*.md")
        if path.name != "SETTINGS.md" and "generated" not in path.parts
    ]
    others = [*root.glob("*.md"), *root.glob("notebooks/*.ipynb"), *root.glob("benchmarks/**/*.py")]
    keys = {
        key
        for path in (*pages, *others)
        for key in re.findall(r"\b([a-z_0-9]+)\s?[=:]", path.read_text(encoding="utf-8"))
    }
    return {
        "settings": Figure(len(listed)),
        "settings that no configuration sets": Figure.count(
            f"{c}.{key}" for c, key, there in listed if not there
        ),
        "settings that nothing shows": Figure.count(
            f"{c}.{key}" for c, key, there in listed if not there and key not in keys
        ),
    }


# --- a training ---------------------------------------------------------------------------------------------------

# Functions are counted, not the bodies of modules and classes, which run at import, nor comprehensions in these, nor
# what finds modules; the stages before are not counted.
_TRACE = """
import sys, threading
from pathlib import Path
from braindecode_vis.cli import main
from braindecode_vis.config import read_config
from braindecode_vis.pipeline import embed, train
from braindecode_vis.pipeline.runs import open_run

folder, package, label, *overrides = sys.argv[1:]
root, package = Path(folder, "phantom"), package + "/"
if not root.is_dir():
    sys.argv = ["braindecode-vis", "phantom", "things-eeg2", "--out", str(root), "--size", "tiny"]
    sys.stdout = sys.stderr
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout = sys.__stdout__
run = open_run(read_config("phantom_eeg", overrides, root=root), Path(folder, label))
embed(run)
ran = set()

def note(frame, event, argument):
    code = frame.f_code
    caller = "" if frame.f_back is None else frame.f_back.f_code
    at_import = caller and (
        code.co_name[0] == "<" and caller.co_name == "<module>"
        or caller.co_filename.startswith("<frozen importlib") or caller.co_name == "find_spec"
    )
    if event == "call" and code.co_filename.startswith(package) and code.co_flags & 0x2 and not at_import:
        ran.add(code.co_filename[len(package):])

threading.setprofile(note)
sys.setprofile(note)
train(run)
sys.setprofile(None)
print("\\n".join(sorted(ran)))
"""


def measure_train(root: Path) -> dict[str, Figure]:
    """Train on a tiny simulated recording and name the files of the package whose functions ran."""
    kinds = {
        "ATM-S": ("encoder.kind=network", "encoder.network.kind=atm_s", "encoder.epochs=2"),
        "ridge": (),
    }
    with tempfile.TemporaryDirectory() as folder:
        return {
            f"files whose code runs in train, {label}": Figure.count(
                _run(root, "-c", _TRACE, folder, str(root / NAME), label, *overrides, cache=folder).split()
            )
            for label, overrides in kinds.items()
        }


def _run(root: Path, *words: str, cache: str = "") -> str:
    """Run Python on the measured tree, whichever is installed; GPU and cache of this machine would change what runs."""
    env = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "BRAINDECODE_VIS_CACHE": cache}
    done = subprocess.run([sys.executable, "-P", *words], capture_output=True, text=True, env=env, cwd=root)
    if done.returncode:
        raise RuntimeError(f"a command on {root} failed:\n{done.stderr[-2000:]}")
    return done.stdout


# --- the ratchet --------------------------------------------------------------------------------------------------

#: What the ratchet does not hold: shares, and what is wanted to be more.
LOOSE = {
    "private functions named exactly once",
    "comments per 100 lines",
    "public top-level functions and classes",
    "lines judged by mypy",
}
#: Lines are held in steps, so that a change of few lines needs no new figure.
STEP = 250


def make_ratchet(found: dict[str, Figure]) -> dict[str, int]:
    """Return the figures that a change may not raise without saying so; lines are rounded up to the next `STEP`."""
    return {
        name: -STEP * (-int(figure.value) // STEP) if name.startswith("lines of ") else int(figure.value)
        for name, figure in found.items()
        if name not in LOOSE
    }


def write_ratchet(found: dict[str, Figure], path: Path) -> None:
    """Replace the figures of the test by those of today, and print what changed."""
    text, made = path.read_text(encoding="utf-8"), make_ratchet(found)
    block = re.compile(r"^FIGURES = (\{[^}]*\})", re.MULTILINE)
    match = block.search(text)
    if match is None:
        raise RuntimeError(f"{path} has no table FIGURES")
    before = ast.literal_eval(match[1])
    lines = "".join(f'    "{name}": {value},\n' for name, value in made.items())
    path.write_text(text[: match.start(1)] + "{\n" + lines + "}" + text[match.end(1) :], encoding="utf-8")
    for name in dict.fromkeys((*before, *made)):
        if before.get(name) != made.get(name):
            print(f"{name}: {before.get(name, 'not held')} -> {made.get(name, 'not held')}")


if __name__ == "__main__":
    main()
