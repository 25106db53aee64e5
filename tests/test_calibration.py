"""Every kind of interval and p-value is simulated: what makes one is listed, and draws of each hold its promise."""

import ast
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from braindecode_vis.scoring.uncertainty import KINDS

pytestmark = pytest.mark.whole

ROOT = Path(__file__).resolve().parents[1]
SCOPE = ("scoring", "preprocessing", "pipeline", "report", "parts", "api")
N_DRAWS = 150


@pytest.fixture(scope="module")
def calibration():
    """The benchmark, imported as `python benchmarks/calibration.py` does."""
    environment = dict(os.environ)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("calibration")
    sys.path.remove(str(ROOT / "benchmarks"))
    os.environ.clear()
    os.environ.update(environment)


def list_makers() -> set[str]:
    """Return ``module:function`` of all functions that turn draws or quantiles of a law into limits or p-values."""
    found: set[str] = set()
    for folder in SCOPE:
        for path in sorted((ROOT / "braindecode_vis" / folder).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT / "braindecode_vis").with_suffix("").parts)
            found |= {f"{module}:{name}" for name in _list_makers_of(ast.parse(path.read_text()))}
    return found


def _list_makers_of(tree: ast.AST, outer: str = "") -> set[str]:
    found = set()
    for node in ast.iter_child_nodes(tree):
        name = outer
        if isinstance(node, ast.FunctionDef) and node.name.startswith("correct_") and not outer:
            found.add(node.name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (not outer or isinstance(tree, ast.ClassDef)):
            name = f"{outer}.{node.name}" if outer else node.name
        if isinstance(node, ast.Call) and _makes(node):
            found.add(name)
        found |= _list_makers_of(node, name)
    return found


def _makes(call: ast.Call) -> bool:
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if called in ("quantile", "percentile"):
        numbers = {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)}
        return bool({0.025, 2.5, 0.975, 97.5} & numbers)
    makers = (
        "compute_p_value",
        "_percentiles",
        "proportion_ci",
        "permutation_cluster_1samp_test",
        "ppf",
        "isf",
        "ndtri",
        "stdtrit",
        "bdtrik",
        "fdtri",
    )
    return called in makers


def test_every_kind_has_a_row_and_every_maker_a_kind(calibration):
    """A function that makes limits or p-values is a kind that somebody has simulated, or says why it is none."""
    assert {check.kind for check in calibration.CHECKS} == set(KINDS) == set(calibration.MADE_BY)
    listed = [name for names in calibration.MADE_BY.values() for name in names]
    assert list_makers() == {*listed, *calibration.NO_CLAIM}
    own = [check for check in calibration.CHECKS if check.goal not in (calibration.COVERS, calibration.HOLDS)]
    assert own
    assert all(check.why for check in own)


def test_makers_are_found_where_they_stand():
    code = """
class A:
    def f(self):
        return np.quantile(x, [0.025, 0.975], axis=0), np.quantile(x, 0.5)
def g():
    def inner():
        return stats.t.ppf(0.9, 3)
    return inner
def h():
    return np.quantile(x, [0.25, 0.75])
"""
    assert _list_makers_of(ast.parse(code)) == {"A.f", "g"}


def test_a_wrong_interval_and_a_wrong_p_are_noticed(calibration):
    """Half the width covers .7 with ten subjects, and the smallest of seven p-values rejects .3."""
    check = next(check for check in calibration.CHECKS if check.kind == "crossed")

    def narrow(rng, **size):
        value, low, high = check.draw(rng, **size)
        return calibration.Ranged(value, (value + low) / 2, (value + high) / 2)

    size = {"subjects": 10, "images": 100, "sd": (0.25, 1.0), "hits": None}
    broken = calibration.Check("crossed", "half as wide", narrow, (size,), check.truth)
    cell = calibration.simulate(broken, broken.sizes[0], N_DRAWS)
    assert "0.92 to 0.99 are wanted" in calibration.misses(broken, cell, slack=4)
    p = calibration.Check("Holm", "no correction", lambda rng: rng.random(7).min(), ({},), goal=(0, 0.065))
    assert calibration.misses(p, calibration.simulate(p, {}, N_DRAWS), slack=4)
    nothing = calibration.Check("crossed", "never", lambda rng: None, ({},))
    assert calibration.simulate(nothing, {}, 3).n_none == 3
    assert "**" in calibration.tabulate([(broken, broken.sizes[0], cell)], "x")


def pytest_generate_tests(metafunc):
    """Parametrise over the kinds without importing the benchmark at collection."""
    if "kind" in metafunc.fixturenames:
        # An interval and a p-value that are drawn quickly stand for the others.
        quick = ("Wilson", "permutation of images")
        kinds = [pytest.param(kind, marks=() if kind in quick else pytest.mark.further) for kind in KINDS]
        metafunc.parametrize("kind", kinds)


def test_a_few_draws_hold_what_the_kind_promises(calibration, kind):
    """The first size of each check, 150 fixed draws.

    Shares of 150 draws scatter by .018; four of these are allowed beyond the goal, so that an interval that covers .85,
    or a p-value that rejects .14, is found, while a change of random numbers is not.
    """
    for check in calibration.CHECKS:
        if check.kind != kind or check.goal is None:
            continue
        size = check.sizes[0]
        n_draws = N_DRAWS if kind != "exchange of whole subjects" else 60  # each takes 280 fits
        cell = calibration.simulate(check, size, n_draws)
        assert cell.n >= 0.9 * n_draws, size
        assert calibration.misses(check, cell, slack=4) is None, size


def test_a_section_is_put_where_the_last_one_was():
    from benchmarks.measuring import carry_sections, put_section

    page = put_section("# Page\n", "## One\n", "one.py")
    assert put_section(page + "kept\n", "## Other\n", "one.py").endswith("kept\n")
    assert put_section(page, "## Other", "one.py").count("## O") == 1
    both = put_section(page, "## Two", "two.py")
    carried = carry_sections(both, "# New\n")
    assert [carried.count(words) for words in ("# New", "## One", "## Two")] == [1, 1, 1]
    assert carry_sections("# Old", "# New\n") == "# New\n"
    np.testing.assert_array_equal([both.count("begin of"), both.count("end of")], [2, 2])
