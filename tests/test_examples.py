"""The examples of docstrings give what is beneath them."""

import doctest
import importlib
from pathlib import Path

import pytest

import braindecode_vis.cli

ROOT = Path(braindecode_vis.__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "braindecode_vis").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name, tmp_path, monkeypatch, capsys):
    """Eight of them showed what an earlier version gave, or names that were not there."""
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed, capsys.readouterr().out
