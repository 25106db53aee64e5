"""The ratchet: figures of the tree as they are, which a change lowers, or raises with its reason.

`benchmarks/structure.py` says what each figure counts. ``python benchmarks/structure.py --write`` writes them anew.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "structure.py"

#: Lines are rounded up to the next 250, so that a small change need not touch them.
FIGURES = {
    "rooms at the top": 16,
    "arrows between rooms at the top": 83,
    "floors": 12,
    "rooms, each part one of its own": 22,
    "arrows between these": 134,
    "circles, counting imports inside functions": 0,
    "modules in circles": 0,
    "lines of the core": 119750,
    "files of the core": 344,
    "lines of part analyses": 9500,
    "files of part analyses": 32,
    "lines of part audit": 4000,
    "files of part audit": 14,
    "lines of part cluster": 2750,
    "files of part cluster": 10,
    "lines of part foundation": 9000,
    "files of part foundation": 31,
    "lines of part live": 9750,
    "files of part live": 24,
    "lines of part phantom": 14000,
    "files of part phantom": 48,
    "lines of part studies": 9250,
    "files of part studies": 28,
    "imports from the core into parts": 0,
    "names of parts in strings of the core": 0,
    "imports between parts that are not allowed": 0,
    "class names with two meanings": 0,
    "module names that occur twice or more": 5,
    "functions over 100 lines, without docstring": 0,
    "functions with 10 or more parameters": 33,
    "settings": 943,
    "settings that no configuration sets": 630,
    "settings that nothing shows": 0,
    "files whose code runs in train, ATM-S": 33,
    "files whose code runs in train, ridge": 20,
}


def load_script():
    spec = importlib.util.spec_from_file_location("structure", SCRIPT)
    module = sys.modules["structure"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


structure = load_script()


def compare(held, found):
    """Return a sentence for each figure that is not what is held."""
    sentences = []
    for name in dict.fromkeys((*held, *found)):
        before, now = held.get(name), found.get(name)
        if before is None:
            sentences.append(f"{name} is {now} and not held yet: add it to FIGURES here.")
        elif now is None:
            sentences.append(f"{name} is held at {before} and counted no more: take it out of FIGURES here.")
        elif now > before:
            sentences.append(
                f"{name} rose from {before} to {now}. Lower it, or change the number in FIGURES here in the same "
                "commit and say why in its message."
            )
        elif now < before:
            sentences.append(f"{name} fell from {before} to {now}: lower the number in FIGURES here.")
    hint = "`python benchmarks/structure.py --names` says what was counted, `--write` changes FIGURES."
    return "\n".join([*sentences, hint]) if sentences else ""


def is_of_train(name):
    return "in train" in name


def test_the_tree_is_as_it_is_held():
    tree = structure.Tree(ROOT)
    # Not measure_text, which takes longest and of which nothing is held.
    found = structure.make_ratchet(
        tree.measure_rooms() | tree.measure_sizes() | tree.measure_walls() | tree.measure_names()
        | tree.measure_functions() | structure.measure_settings(ROOT)
    )  # fmt: skip
    told = compare({name: value for name, value in FIGURES.items() if not is_of_train(name)}, found)
    assert not told, told


@pytest.mark.further
@pytest.mark.whole
def test_a_training_opens_as_many_files_as_are_held():
    found = structure.make_ratchet(structure.measure_train(ROOT))
    told = compare({name: value for name, value in FIGURES.items() if is_of_train(name)}, found)
    assert not told, told


@pytest.mark.parametrize(
    "held, found, said",
    [
        ({"circles": 2}, {"circles": 2}, None),
        ({"circles": 2}, {"circles": 3}, "circles rose from 2 to 3. Lower it, or change the number"),
        ({"circles": 2}, {"circles": 1}, "circles fell from 2 to 1: lower the number"),
        ({}, {"circles": 1}, "circles is 1 and not held yet"),
        ({"circles": 1}, {}, "circles is held at 1 and counted no more"),
    ],
)
def test_what_moved_is_named(held, found, said):
    told = compare(held, found)
    assert told.startswith(said) if said else not told


MODULES = {
    "__init__": "",
    "base/arrays": "class Grid: ...\n",
    "base/names": 'KINDS = {"board": "parts.game.board:Board"}\n',
    "flow/draw": (
        '"""Draws, as parts.game.board does."""\nfrom toy.base.arrays import Grid\nfrom toy.flow import paint\n'
    ),
    "flow/paint": "def paint():\n    from toy.flow.draw import Grid\n    import toy.parts.game.board\n",
    "api/play": "from toy.flow import draw\n",
    "api/moved": 'MOVED = {"game": "parts.game"}\n',
    "parts/game/board": "from toy.flow.draw import Grid as Board\nfrom toy.parts.sound import horn\n",
    "parts/sound/horn": "class Grid: ...\n\n\ndef blow(self, a, b, c, d, e, f, g, h, *i, j=0): ...\n",
    "parts/sound/draw": 'def draw():\n    """Say what.\n\n    More.\n    """\n' + "    pass\n" * 100,
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of three rings with one of everything that is counted."""
    for name, text in MODULES.items():
        path = tmp_path / "toy" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text('[tool.mypy]\nfiles = ["toy/base"]\n')
    monkeypatch.setattr(structure, "NAME", "toy")
    return tmp_path


def test_a_small_tree_is_counted(toy):
    found = structure.Tree(toy).measure()
    assert found["rooms at the top"].members == ("__init__", "api", "base", "flow", "parts")
    assert found["arrows between rooms at the top"].members == (
        "api -> flow", "flow -> base", "flow -> parts", "parts -> flow",
    )  # fmt: skip
    assert found["floors"].members == ("api", "flow = parts", "base")
    assert found["circles, counting imports inside functions"].members == (
        "toy.flow.draw toy.flow.paint toy.parts.game.board",
    )
    assert found["imports from the core into parts"].members == ("toy.flow.paint -> toy.parts.game.board",)
    assert found["names of parts in strings of the core"].members == (
        "toy.base.names: parts.game.board:Board",
    )
    assert found["imports between parts that are not allowed"].members == (
        "toy.parts.game.board -> toy.parts.sound.horn",
    )
    assert found["class names with two meanings"].members == ("Grid: toy.base.arrays, toy.parts.sound.horn",)
    assert found["module names that occur twice or more"].members == (
        "draw: toy.flow.draw, toy.parts.sound.draw",
    )
    assert found["functions with 10 or more parameters"].members == (
        "toy.parts.sound.horn.blow, 10 parameters",
    )
    assert found["functions over 100 lines, without docstring"].members == (
        "toy.parts.sound.draw.draw, 101 lines",
    )
    assert structure.make_ratchet(found)["lines of part sound"] == 250


def test_a_folder_without_the_package_is_refused(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--root", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"structure.py: {tmp_path.resolve()} holds no package braindecode_vis; "
        "pass the folder of a checkout with --root.\n"
    )
