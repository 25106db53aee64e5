"""Mutation testing: changes one operator, number, flag or default at a time and asks whether a test notices.

mutmut makes the mutants, ``coverage`` says which tests run the changed function, and pytest runs those until one
fails. mutmut's own runner is not used: it reaches neither the defaults of settings, nor constants of a module, nor
decorated methods, and it puts every mutant of a module into one file, where the checks of shapes (jaxtyping) decorate
each of them at every import. Here one mutant at a time stands in a copy of the working tree, which itself is never
touched; a fork that has the heavy libraries imported already runs its tests.

    make mutate N=400 SEED=1        # a random sample; only what a change concerns is run again
    python tests/mutate.py --files braindecode_vis/scoring/retrieval.py -n 50

Not mutated, since no test should notice: text (f-strings, messages of errors and warnings), ``__repr__``,
annotations, decorators, what only the type checker reads, progress, ``zip(strict=)``, ``device=``, ``copy=``.
Equivalent mutants, each with its reason, stand in ``tests/equivalent_mutants.yaml``.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import difflib
import fnmatch
import hashlib
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# Workers fork after the libraries are loaded: threads of OpenMP would not survive that.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import libcst as cst  # noqa: E402
import yaml  # noqa: E402
from libcst.metadata import MetadataWrapper, PositionProvider  # noqa: E402
from mutmut.mutation import mutators  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = ROOT / "tests" / "equivalent_mutants.yaml"
SCOPE = [
    "braindecode_vis/preprocessing/*.py",
    "braindecode_vis/scoring/*.py",
    "braindecode_vis/scoring/metrics/*.py",
    "braindecode_vis/training/objectives/*.py",
    "braindecode_vis/generation/priors/*.py",
    "braindecode_vis/encoders/*.py",
    "braindecode_vis/embeddings/layer_*.py",
    "braindecode_vis/embeddings/vision_network.py",
    "braindecode_vis/parts/analyses/*.py",
    "braindecode_vis/parts/audit/*.py",
    "braindecode_vis/parts/live/*.py",
    "braindecode_vis/parts/studies/*.py",
    "braindecode_vis/parts/foundation/models/*.py",
    "braindecode_vis/pipeline/leaks/*.py",
    "braindecode_vis/api/*.py",
]
# The tests that mirror these packages and those of whole runs. Tests of single formats would notice more, at ten times
# the time: the score is a lower bound.
TESTS = [
    *(
        f"tests/{folder}/test_*.py"
        for folder in (
            "preprocessing",
            "scoring",
            "scoring/metrics",
            "generation/priors",
            "encoders",
            "embeddings",
            "parts/analyses",
            "parts/audit",
            "parts/live",
            "parts/studies",
            "parts/foundation/models",
            "pipeline/leaks",
            "api",
        )
    ),
    "tests/training/test_*.py",
    "tests/training/objectives/test_*.py",
    *(
        f"tests/{name}.py"
        for name in (
            "test_settings_page",
            "test_pipeline",
            "test_categories",
            "test_reality",
            "test_calibration",
            "test_synthetic",
            "base/test_roles",
            "base/test_memory",
        )
    ),
]
HEAVY = (
    "numpy", "pandas", "scipy.stats", "sklearn.linear_model", "sklearn.decomposition", "torch", "torchvision", "mne",
    "nibabel",
    "nilearn.image", "nilearn.glm", "h5py", "skimage.metrics", "pyarrow.parquet", "safetensors.torch",
    "transformers", "open_clip", "timm", "diffusers", "pydantic", "beartype", "jaxtyping", "typer", "rich.console",
    "matplotlib.pyplot",
    "hypothesis", "coverage", "pytest", "PIL.Image", "yaml",
)  # fmt: skip
TOGETHER = 8  # test files whose coverage is measured by one process
FIRST = 3.0  # seconds of the tests that a mutant meets first; those of other files need not be imported then
UNMUTATED_FUNCTIONS = {"__repr__", "__str__"}
UNMUTATED_CALLS = {
    "isinstance",
    "issubclass",
    "warn",
    "advance",
    "cast",
    "TypeVar",
    "ConfigDict",
    "PrivateAttr",
}
# how a result is computed and not what it is: tests run on the processor
UNMUTATED_KEYWORDS = {"strict", "stacklevel", "device", "copy", "mmap_mode", "buffering"}
# -- making mutants ----------------------------------------------------------------------------------------------


def remove_keyword(node: cst.Call):
    """Leave an argument given by name to its default."""
    for i, argument in enumerate(node.args):
        if argument.keyword and argument.keyword.value not in UNMUTATED_KEYWORDS:
            yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])


# Without those that put None or other text in a place: nearly all of them crash at once and only flatter the score.
OPERATORS = [
    (cst.BaseNumber, mutators.operator_number),
    (cst.Name, mutators.operator_name),
    (cst.AugAssign, mutators.operator_augmented_assignment),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.Call, mutators.operator_symmetric_string_methods_swap),
    (cst.Call, mutators.operator_unsymmetrical_string_methods_swap),
    (cst.Call, remove_keyword),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.IfExp, mutators.operator_if_exp),
]


@dataclass(frozen=True)
class Mutant:
    """One change: `place` names function and line, `number` tells equal changes of equal lines apart."""

    path: str
    function: str
    line: int
    before: str
    after: str
    number: int
    code: str

    @property
    def key(self) -> str:
        """Name that stays the same when other lines of the file change."""
        return f"{self.path}::{self.function}: {self.before} -> {self.after} #{self.number}"


class _Places(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self):
        self.places: list[tuple[cst.CSTNode, cst.CSTNode, str, int]] = []
        self._names: list[str] = []
        self._line = 1

    def on_visit(self, node):
        position = self.get_metadata(PositionProvider, node, None)
        if position is not None:
            self._line = position.start.line
        if _is_unmutated(node):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._names.append(node.name.value)
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                for changed in operator(node):
                    self.places.append((node, changed, ".".join(self._names), self._line))
        return True

    def on_leave(self, node):
        if isinstance(node, cst.FunctionDef | cst.ClassDef) and not _is_unmutated(node):
            self._names.pop()


def _is_unmutated(node: cst.CSTNode) -> bool:
    if isinstance(
        node, cst.Annotation | cst.Decorator | cst.Raise | cst.FormattedString | cst.Import | cst.ImportFrom
    ):
        return True
    if isinstance(node, cst.FunctionDef):
        return node.name.value in UNMUTATED_FUNCTIONS
    if isinstance(node, cst.Call):
        called = node.func
        name = called.attr if isinstance(called, cst.Attribute) else called
        return isinstance(name, cst.Name) and name.value in UNMUTATED_CALLS
    if isinstance(node, cst.IfExp):  # which of two sentences is said
        sides = (node.body, node.orelse)
        return any(isinstance(side, cst.SimpleString) and " " in side.value for side in sides)
    if isinstance(node, cst.Arg) and node.keyword is not None:
        # the last axis and the first one from the front are the same of a matrix
        is_axis = node.keyword.value in ("axis", "dim") and isinstance(node.value, cst.UnaryOperation)
        return node.keyword.value in UNMUTATED_KEYWORDS or is_axis
    if isinstance(node, cst.If):
        return isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING"
    return False


def list_places(path: str):
    """Return module and (node, changed node, function, line) of every mutant of a file."""
    wrapper = MetadataWrapper(cst.parse_module((ROOT / path).read_text()), unsafe_skip_copy=True)
    places = _Places()
    wrapper.visit(places)
    return wrapper.module, places.places


def draw_mutants(files: list[str], n: int, seed: int) -> list[Mutant]:
    """Return `n` random mutants; each has a draw of its own, so that an edit leaves the rest of a sample alone."""
    drawn = []
    for path in files:
        module, places = list_places(path)
        text = module.code  # made anew each time that it is asked for
        lines = text.splitlines()
        seen: collections.Counter[tuple[str, ...]] = collections.Counter()
        for node, changed, function, line in places:
            what = (function, lines[line - 1].strip(), _show(module, node), _show(module, changed))
            seen[what] += 1
            digest = hashlib.sha256(repr((seed, path, what, seen[what])).encode()).hexdigest()
            drawn.append((digest, path, text, module, node, changed, function, line))
    drawn.sort(key=lambda item: item[0])
    mutants: list[Mutant] = []
    used: collections.Counter[tuple[str, ...]] = collections.Counter()
    for _, path, text, module, node, changed, function, line in drawn:
        if len(mutants) == n:
            break
        code = _replace(module, node, changed)
        if code == text:
            continue
        old, new = _changed_lines(text, code)
        used[path, function, old, new] += 1
        mutants.append(Mutant(path, function, line, old, new, used[path, function, old, new], code))
    return mutants


def _replace(module, node, changed) -> str:
    return module.deep_replace(node, changed).code


def _show(module, node) -> str:
    try:
        return module.code_for_node(node)
    except Exception:  # an operator alone
        return type(node).__name__


def _changed_lines(old: str, new: str) -> tuple[str, str]:
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))[3:]
    return tuple("; ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")


# -- a copy of the tree, and pytest in a fork --------------------------------------------------------------------


def make_tree(folder: Path) -> Path:
    """Copy what git knows of the working tree, beside a link to the shared recordings."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    if tree.exists():
        for old in [p for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts]:
            if str(old.relative_to(tree)) not in names:
                old.unlink()
    for name in sorted(names):
        source, target = ROOT / name, tree / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    shared = folder / "shared"
    if not shared.exists() and (ROOT.parent / "shared").is_dir():
        shared.symlink_to((ROOT.parent / "shared").resolve())
    return tree


def run_pytest(tree: Path, words: list[str], timeout: float, plugin=None) -> tuple[str, str]:
    """Run pytest in a fork. Return how it ended (``passed``, ``failed``, ``timeout``) and the end of what it said."""
    log = tree.parent / "log.txt"
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(tree)
            sys.path[:] = [
                str(tree),
                *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")),
            ]
            os.environ["PYTHONPATH"] = str(tree)
            importlib.invalidate_caches()
            import pytest

            base = [f"--basetemp={tree.parent / 'temp'}", "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
            base += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that are imported before
            code = int(pytest.main([*base, *words], plugins=[plugin] if plugin else None))
        except BaseException:
            traceback.print_exc()
            code = 3
        sys.stdout.flush()
        os._exit(code)
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", ""
        time.sleep(0.02)
    said = "\n".join(log.read_text(errors="replace").splitlines()[-6:])
    return ("passed" if os.waitstatus_to_exitcode(status) in (0, 5) else "failed"), said


def load_libraries() -> None:
    """Import what every fork would need seconds for."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"without {name}: {error}")


def start_workers(n: int, folder: Path, work, tasks: list) -> list:
    """Yield `work(tree, task)` of every task from `n` processes with a tree each, as they finish."""
    context = multiprocessing.get_context("fork")
    waiting, results = context.Queue(), context.Queue()
    for task in tasks:
        waiting.put(task)
    for _ in range(n):
        waiting.put(None)

    def serve(i):
        tree = make_tree(folder / f"worker{i}")
        while (task := waiting.get()) is not None:
            try:
                results.put((task, work(tree, task)))
            except Exception:
                results.put((task, traceback.format_exc()))

    workers = [context.Process(target=serve, args=(i,), daemon=False) for i in range(n)]
    for worker in workers:
        worker.start()
    try:
        for _ in tasks:
            yield results.get()
    finally:
        for worker in workers:
            worker.terminate() if worker.is_alive() and sys.exc_info()[0] else worker.join()


def read_imports(tree: Path, path: Path, *, inside: bool) -> set[str]:
    """Return the modules of the package that a file imports, and their packages; `inside`: in functions too."""
    found: set[str] = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.update([child.module, *(f"{child.module}.{alias.name}" for alias in child.names)])
            is_typing = isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"
            if not is_typing and (inside or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                visit(child)

    visit(ast.parse(path.read_text()))
    parents = {".".join(name.split(".")[:n]) for name in found for n in range(1, name.count(".") + 2)}
    return {name for name in parents if name.startswith("braindecode_vis") and _find_module(tree, name)}


def _find_module(tree: Path, name: str) -> Path | None:
    base = tree.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def import_others(tree: Path, tests: set[str], changed: set[str]) -> None:
    """Import, as the tests would, what they need of the package and what does not see the changed files."""
    sys.path[:] = [
        str(tree),
        *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")),
    ]
    os.chdir(tree)
    # its hook checks shapes in whatever is imported from now on
    spec = importlib.util.spec_from_file_location("hook", tree / "tests" / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    needed: set[str] = set()
    found = set().union(*(read_imports(tree, tree / test, inside=True) for test in tests))
    while found - needed:
        new = found - needed
        needed |= new
        found = set().union(*(read_imports(tree, _find_module(tree, name), inside=True) for name in new))
    sees = {name: read_imports(tree, _find_module(tree, name), inside=False) for name in needed}
    parents = {name: {name.rpartition(".")[0]} & needed for name in needed}
    stale = {name for name in needed if str(_find_module(tree, name).relative_to(tree)) in changed}
    while more := {name for name in needed - stale if (sees[name] | parents[name]) & stale}:
        stale |= more
    for name in sorted(needed - stale):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def run_mutants(n: int, folder: Path, tasks: list[tuple]):
    """Yield task and `try_mutant` of each from `n` processes with a tree each, as they finish.

    Mutants of a folder, and of a file in it, are tried in a process that has imported what does not see them.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def try_all(tree, of):
        for task in of:
            try:
                results.put((task, try_mutant(tree, task)))
            except Exception:
                results.put((task, traceback.format_exc()))

    def nest(tree, of, depth):
        paths = {mutant.path for mutant, *_ in of}
        import_others(tree, {test.split("::")[0] for _, tests, _ in of for test, _ in tests[:20]}, paths)
        part(tree, of, depth + 1)

    def part(tree, of, depth):
        groups: dict[Path, list] = {}
        for task in of:
            groups.setdefault([Path(task[0].path).parent, Path(task[0].path), None][depth], []).append(task)
        for key, own in groups.items():
            if key is None or len(own) < 3:  # a process of their own would cost more than it spares
                try_all(tree, own)
                continue
            process = context.Process(target=nest, args=(tree, own, depth))
            process.start()
            process.join()

    def serve(i, of):
        part(make_tree(folder / f"worker{i}"), of, 0)

    ordered = sorted(tasks, key=lambda task: task[0].path)
    size = -(-len(ordered) // n)
    workers = [
        context.Process(target=serve, args=(i, ordered[i * size : (i + 1) * size]), daemon=False)
        for i in range(n)
    ]
    for worker in workers:
        worker.start()
    n_left = len(tasks)
    while n_left:
        try:
            yield results.get(timeout=5)
            n_left -= 1
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers) and results.empty():
                break


# -- which tests run which function ------------------------------------------------------------------------------


class _Contexts:
    """Tells coverage which test runs, fixtures included, and notes how long it took and whether it passed."""

    def __init__(self, measured):
        self.measured, self.seconds, self.failed = measured, {}, set()

    def pytest_runtest_logstart(self, nodeid, location):
        self.measured.switch_context(nodeid)
        self.seconds[nodeid] = -time.monotonic()

    def pytest_runtest_logfinish(self, nodeid, location):
        self.seconds[nodeid] += time.monotonic()
        self.measured.switch_context("")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def measure_files(tree: Path, test_files: list[str]) -> dict[str, dict]:
    """Return for each test file the seconds of its passing tests, and the tests that run each function of the scope."""
    import coverage

    note = tree.parent / "coverage.json"
    note.unlink(missing_ok=True)

    class Plugin(_Contexts):
        def pytest_unconfigure(self):
            self.measured.stop()
            found = collect_functions(self.measured.get_data(), tree, self.failed)
            seconds = {test: s for test, s in self.seconds.items() if test not in self.failed and s >= 0}
            note.write_text(
                json.dumps({"seconds": seconds, "functions": found, "failed": sorted(self.failed)})
            )

        def pytest_configure(self):
            self.measured.start()

    measured = coverage.Coverage(data_file=None, source=[str(tree / "braindecode_vis")], config_file=False)
    run_pytest(tree, ["--maxfail=1000", *test_files], 900 * len(test_files), Plugin(measured))
    if not note.exists() and len(test_files) > 1:  # one of them ended the process
        return {name: measure_files(tree, [name])[name] for name in test_files}
    empty = {"seconds": {}, "functions": {}, "failed": test_files}
    whole = json.loads(note.read_text()) if note.exists() else empty
    return {
        name: {
            "seconds": {test: s for test, s in whole["seconds"].items() if _is_of(test, name)},
            "functions": {
                function: own
                for function, tests in whole["functions"].items()
                if (own := [test for test in tests if _is_of(test, name)])
            },
            "failed": [test for test in whole["failed"] if _is_of(test, name)],
        }
        for name in test_files
    }


def _is_of(test: str, test_file: str) -> bool:
    return test.split("::")[0] == test_file


def collect_functions(data, tree: Path, failed: set[str]) -> dict[str, list[str]]:
    """Return ``path::function`` -> tests that ran a line of it; module level has an empty name."""
    found: dict[str, set[str]] = {}
    for name in data.measured_files():
        path = str(Path(name).relative_to(tree))
        if not any(fnmatch.fnmatch(path, pattern) for pattern in SCOPE):
            continue
        owner = own_lines(Path(name).read_text())
        for line, tests in data.contexts_by_lineno(name).items():
            found.setdefault(f"{path}::{owner.get(line, '')}", set()).update(set(tests) - failed - {""})
    return {function: sorted(tests) for function, tests in found.items() if tests}


def own_lines(text: str) -> dict[int, str]:
    """Return the innermost function or class of every line."""
    owner: dict[int, str] = {}

    def visit(node, names):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                inner = [*names, child.name]
                # the line of `def` runs at import: it belongs to what is around it
                first = child.body[0].lineno if not isinstance(child, ast.ClassDef) else child.lineno
                owner.update(dict.fromkeys(range(first, (child.end_lineno or first) + 1), ".".join(inner)))
                visit(child, inner)
            else:
                visit(child, names)

    visit(ast.parse(text), [])
    return owner


def read_map(folder: Path, n_workers: int) -> dict[str, dict]:
    """Return `measure_file` of every test file; only new and changed test files are run."""
    store = folder / "tests.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    now = {str(p.relative_to(ROOT)): _digest(p) for pattern in TESTS for p in sorted(ROOT.glob(pattern))}
    known = {name: entry for name, entry in known.items() if name in now}
    due = [name for name, digest in now.items() if known.get(name, {}).get("digest") != digest]
    if due:
        print(f"{len(due)} test files are run once to see what they cover", flush=True)
    # Several in one process, which imports everything once.
    tasks = [due[start : start + TOGETHER] for start in range(0, len(due), TOGETHER)]
    for i, (names, result) in enumerate(start_workers(n_workers, folder, measure_files, tasks)):
        if isinstance(result, str):
            print(names, result)
            continue
        for name, measured in result.items():
            known[name] = {"digest": now[name], **measured}
            if measured["failed"]:
                n = len(measured["failed"])
                print(f"{name}: {n} fail without any mutant and are left out", flush=True)
        store.write_text(json.dumps(known))
        print(f"\r{i + 1}/{len(tasks)}", end="", file=sys.stderr)
    return known


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def choose_tests(mutant: Mutant, known: dict[str, dict]) -> list[tuple[str, float]]:
    """Return tests that run the mutant's function, or its module if it runs at import; likely, short ones first."""
    names = [mutant.function, *_outer(mutant.function)]
    stem = Path(mutant.path).stem
    folder = Path(mutant.path).parent.name
    chosen: dict[str, tuple[float, float]] = {}
    for test_file, entry in known.items():
        far = (
            0
            if stem in test_file or test_file == "tests/test_settings_page.py"
            else 1
            if f"/{folder}/" in test_file
            else 2
        )
        tests: set[str] = set()
        for name in names:
            tests.update(entry["functions"].get(f"{mutant.path}::{name}", ()))
        if not tests and not _is_function(
            mutant
        ):  # a constant or a default: every test of the module may notice
            for function, of in entry["functions"].items():
                if function.startswith(mutant.path + "::"):
                    tests.update(of)
        if test_file == "tests/test_settings_page.py" and not _is_function(mutant):
            tests.update(entry["seconds"])
            far = -0.5  # three seconds, after which hardly a default is left
        for test in tests:
            if test in entry["seconds"]:
                chosen[test] = (far, entry["seconds"][test])
    ordered = sorted(chosen.items(), key=lambda item: item[1][1] * (1 + 2 * item[1][0]) + 0.2 * item[1][0])
    return [(test, seconds) for test, (_, seconds) in ordered]


def _name_tests(tests: list[tuple[str, float]], known: dict[str, dict], budget: float) -> str:
    files = sorted({test.split("::")[0] for test, _ in tests})
    named = repr((sorted(test for test, _ in tests), [known[file]["digest"] for file in files], budget))
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _outer(function: str) -> list[str]:
    parts = function.split(".")
    return [
        ".".join(parts[:i])
        for i in range(len(parts) - 1, 0, -1)
        if parts[i - 1][0].islower() or parts[i - 1][0] == "_"
    ]


def _is_function(mutant: Mutant) -> bool:
    last = mutant.function.split(".")[-1].lstrip("_")
    return bool(last) and not last[0].isupper()


# -- the run -----------------------------------------------------------------------------------------------------


def try_mutant(tree: Path, task) -> dict:
    """Put a mutant into a tree, run its tests until one fails, put the original back."""
    mutant, tests, budget = task
    target = tree / mutant.path
    original, stat = target.read_text(), target.stat()
    began = time.monotonic()
    try:
        target.write_text(mutant.code)
        # no compiled file of another mutant of equal size and second may be taken for this one
        os.utime(
            target,
            (stat.st_atime, int(time.time()) + int(hashlib.sha256(mutant.key.encode()).hexdigest()[:5], 16)),
        )
        n, how, said = 0, "no test", ""
        for chosen, total in divide_tests(tests, budget):
            how, said = run_pytest(tree, chosen, 30 + 6 * total)
            n += len(chosen)
            if how != "passed":
                break
    finally:
        target.write_text(original)
        os.utime(target, (stat.st_atime, stat.st_mtime))
    result = "survived" if how in ("passed", "no test") else "killed"
    return {
        "result": result,
        "how": how,
        "said": said,
        "n": n,
        "seconds": round(time.monotonic() - began, 1),
    }


def divide_tests(tests: list[tuple[str, float]], budget: float) -> list[tuple[list[str], float]]:
    """Return tests and their seconds, within the budget: likely and short ones first, which mostly are enough."""
    total, parts = 0.0, [([], 0.0), ([], 0.0)]
    for i, (test, seconds) in enumerate(tests):
        total += seconds
        if i and total > budget:
            break
        at = int(bool(parts[1][0]) or (i > 0 and total > min(FIRST, budget)))
        parts[at] = ([*parts[at][0], test], parts[at][1] + seconds)
    return [part for part in parts if part[0]]


def main() -> None:
    """Draw, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=400, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--files", nargs="*", default=SCOPE, help="files or patterns, from the top of the repository"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--budget", type=float, default=12.0, help="seconds of tests that a mutant meets at most"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "mutation", help="where copies and results lie"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    files = sorted({str(p.relative_to(ROOT)) for pattern in options.files for p in ROOT.glob(pattern)})
    mutants = draw_mutants(files, options.n, options.seed)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.path}:{mutant.line} {mutant.function}\n  - {mutant.before}\n  + {mutant.after}")
        return
    allowed = (
        {entry["mutant"] for entry in yaml.safe_load(ALLOWED.read_text()) or []}
        if ALLOWED.exists()
        else set()
    )
    load_libraries()
    known = read_map(options.folder, options.jobs)
    store = options.folder / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    due, states = [], {}
    for mutant in mutants:
        tests = choose_tests(mutant, known)
        # a killed mutant stays killed while its file is the same, a survivor survives while its tests are too
        state = {"file": _digest(ROOT / mutant.path), "tests": _name_tests(tests, known, options.budget)}
        entry = results.get(mutant.key, {})
        known_already = entry.get("file") == state["file"] and (
            entry["result"] == "killed" or entry.get("tests") == state["tests"]
        )
        states[mutant.key] = state
        if mutant.key not in allowed and not known_already:
            due.append((mutant, tests, options.budget))
    print(f"{len(mutants)} mutants, {len(due)} to run", flush=True)
    for i, ((mutant, *_), result) in enumerate(run_mutants(options.jobs, options.folder, due)):
        if isinstance(result, str):
            print(mutant.key, result)
            continue
        results[mutant.key] = {**result, **states[mutant.key]}
        store.write_text(json.dumps(results, indent=0))
        print(
            f"{i + 1}/{len(due)} {result['result']} ({result['how']}, {result['seconds']} s)",
            file=sys.stderr,
            flush=True,
        )
    show(mutants, results, allowed)


def show(mutants: list[Mutant], results: dict, allowed: set[str]) -> None:
    """Print survivors and the score by folder."""
    counts: dict[str, collections.Counter[str]] = {}
    for mutant in mutants:
        how = "equivalent" if mutant.key in allowed else results.get(mutant.key, {}).get("result", "not run")
        where = "/".join(Path(mutant.path).parts[1:-1]) or Path(mutant.path).name
        counts.setdefault(where, collections.Counter())[how] += 1
        if how in ("survived", "not run"):
            entry = results.get(mutant.key, {})
            print(
                f"\n{how}: {mutant.path}:{mutant.line} in {mutant.function or 'the module'} ({entry.get('n', 0)} tests)"
            )
            print(f"  - {mutant.before}\n  + {mutant.after}\n  {mutant.key}")
    print()
    for where, counted in sorted(counts.items()):
        print(f"{where:25s} " + ", ".join(f"{name} {n}" for name, n in sorted(counted.items())))
    total = sum((counted for counted in counts.values()), collections.Counter())
    decided = total["killed"] + total["survived"]
    share = total["killed"] / decided if decided else math.nan
    print(
        f"killed {total['killed']} of {decided} ({share:.1%}), {total['equivalent']} equivalent with reasons"
    )


if __name__ == "__main__":
    main()
