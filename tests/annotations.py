"""Enforces annotations of chosen modules at every call while the tests run.

Functions of modules and methods are decorated with beartype when their module is imported; a name that is imported
for type checkers alone stands for anything. Functions inside functions stay as they are: decorating them at every
call of the outer one costs more than the calls.
"""

import ast
import dataclasses
import inspect
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from typing import Any

from beartype import beartype


def enforce(names: tuple[str, ...]) -> None:
    """Enforce annotations of modules that are imported from now on.

    Parameters
    ----------
    names
        Of modules, and of packages with all that is in them.
    """
    sys.meta_path.insert(0, _Finder(names))


class _Finder(MetaPathFinder):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if not any(name == own or name.startswith(f"{own}.") for own in self.names):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Compiles what it reads anew: compiled files beside the source belong to modules without checks."""

    def get_code(self, fullname):
        tree = ast.parse(self.get_data(self.path), self.path)
        _decorate(tree.body)
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module):
        vars(module)["__enforced__"] = _enforce_one
        super().exec_module(module)


def _decorate(body: list[ast.stmt]) -> None:
    """Put the decorator next to each function, below all others, and above all others of each class."""
    for node in body:
        mark = ast.Name("__enforced__", ast.Load(), lineno=node.lineno, col_offset=node.col_offset)
        if isinstance(node, ast.FunctionDef):
            node.decorator_list.append(mark)
        elif isinstance(node, ast.ClassDef):
            _decorate(node.body)
            node.decorator_list.insert(0, mark)


def _enforce_one(thing):
    if not inspect.isclass(thing):
        return _enforce_function(thing, vars(sys.modules[thing.__module__]))
    made = vars(thing).get("__init__")
    if dataclasses.is_dataclass(thing) and inspect.isfunction(made) and not hasattr(made, "__wrapped__"):
        thing.__init__ = _enforce_function(made, vars(sys.modules[thing.__module__]))
    return thing


def _enforce_function(function, names):
    function.__annotations__ = {
        name: _resolve(hint, names) for name, hint in function.__annotations__.items()
    }
    return beartype(function)


def _resolve(hint, names):
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, names)
    except Exception:  # imported for type checkers alone, or defined below
        return Any
