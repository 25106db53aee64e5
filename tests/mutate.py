"""Mutation testing: changes one operator, number, flag or default at a time and asks whether a test notices.

mutmut makes the mutants and pytest runs the tests that are near the change, likely and short ones first, until one
fails or a budget of processor time is spent. Near are the test files that mirror or import the changed file, then those
beside them and those that speak of the changed function. mutmut's own runner is not used: it reaches neither the
defaults of settings, nor constants of a module, nor decorated methods, and it puts every mutant of a module into one
file, where the checks of annotations decorate each of them at every import. Here one mutant at a time is in
a copy of the working tree, which itself is never touched; a fork that has the libraries and the rest of the package
imported already runs its tests. Mutants run in the order of the draw, so that what an interrupted run has judged is a
random sample too, and the next call goes on there.

    make mutate N=400 SEED=1        # a random sample; only what a change concerns is run again
    python tests/mutate.py --files braindecode_vis/scoring/retrieval.py -n 50

Not mutated, since no test should notice: text (f-strings, messages of errors and warnings), ``__repr__``,
annotations, decorators, what only the type checker reads, progress, ``zip(strict=)``, ``device=``, ``copy=``.
Equivalent mutants, each with its reason, are in ``tests/equivalent_mutants.yaml``.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import re
import resource
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
HEAVY = (
    "numpy", "pandas", "scipy.stats", "sklearn.linear_model", "sklearn.decomposition", "torch", "torchvision", "mne",
    "nibabel",
    "nilearn.image", "nilearn.glm", "h5py", "skimage.metrics", "pyarrow.parquet", "safetensors.torch",
    "transformers", "open_clip", "timm", "diffusers", "pydantic", "beartype", "typer", "rich.console",
    "matplotlib.pyplot",
    "hypothesis", "coverage", "pytest", "PIL.Image", "yaml",
)  # fmt: skip
LIMIT = 60  # seconds of the processor after which a mutant that has not ended is endless
WAITING = 20  # that many times as long it may take by the clock, of a machine with other work
EXAMPLES = "tests/test_examples.py"  # of which the one of the changed file runs
MOST_FAR = 6  # test files that are neither mirror nor importer of the changed file
UNKNOWN = 0.5  # seconds of a test that has not run yet
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
    """One change: `place` names function and line, `number` distinguishes equal changes of equal lines."""

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


def draw_mutants(files: list[str], n: int, seed: int, folder: Path) -> list[Mutant]:
    """Return `n` random mutants; each has a draw of its own, so that an edit leaves the rest of a sample alone."""
    store = folder / "places.json"  # reading all files takes minutes
    known = json.loads(store.read_text()) if store.exists() else {}
    drawn, read = [], {}
    for path in files:
        digest = _digest(ROOT / path)
        if known.get(path, {}).get("digest") != digest:
            read[path] = list_places(path)
            known[path] = {"digest": digest, "places": _name_places(*read[path])}
        for i, (what, number) in enumerate(known[path]["places"]):
            key = repr((seed, path, tuple(what), number))
            drawn.append((hashlib.sha256(key.encode()).hexdigest(), path, i))
    store.write_text(json.dumps(known))
    mutants: list[Mutant] = []
    used: collections.Counter[tuple[str, ...]] = collections.Counter()
    for _, path, i in sorted(drawn):
        if len(mutants) == n:
            break
        if path not in read:
            read[path] = list_places(path)
        module, places = read[path]
        node, changed, function, line = places[i]
        text, code = module.code, module.deep_replace(node, changed).code
        if code == text:
            continue
        old, new = _changed_lines(text, code)
        used[path, function, old, new] += 1
        mutants.append(Mutant(path, function, line, old, new, used[path, function, old, new], code))
    return mutants


def _name_places(module, places) -> list[tuple[tuple[str, ...], int]]:
    lines = module.code.splitlines()
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    named = []
    for node, changed, function, line in places:
        what = (function, lines[line - 1].strip(), _show(module, node), _show(module, changed))
        seen[what] += 1
        named.append((what, seen[what]))
    return named


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


class _Judge:
    """Puts likely and short tests first, stops after the budget, and notes what failed and how long tests took."""

    def __init__(self, note: Path, *, names=frozenset(), ranks=None, seconds=None, budget=math.inf):
        self.note, self.names, self.ranks = note, names, ranks or {}
        self.known, self.budget = seconds or {}, budget
        self.told = {"failed": [], "seconds": {}, "stopped": False, "skipped": 0}

    def pytest_collection_modifyitems(self, session, items):
        self.session, self.left = session, len(items)
        items.sort(key=self._rank)

    def _rank(self, item) -> float:
        if self.names & _read_words(getattr(item, "function", None)):
            return 0.2 * self._take(item)
        far = self.ranks.get(item.nodeid.split("::")[0], 2)
        return self._take(item) * (1 + 2 * far) + 0.2 * far

    def _take(self, item) -> float:
        return self.known.get(item.nodeid, UNKNOWN)

    def pytest_runtest_logstart(self, nodeid, location):
        self.began = _spent()

    def pytest_runtest_logreport(self, report):
        self.told["skipped"] += report.skipped
        if report.failed:
            self.told["failed"].append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.told["failed"].append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid, location):
        took = _spent() - self.began
        self.told["seconds"][nodeid] = round(took, 3)
        self.budget -= took
        self.left -= 1
        if self.budget < 0 and self.left and not self.told["failed"]:
            self.told["stopped"] = True
            self.session.shouldstop = "the budget is spent"

    def pytest_sessionfinish(self):
        self.note.write_text(json.dumps(self.told))


@functools.cache
def _read_words(function) -> set[str]:
    try:
        return set(re.findall(r"\w+", inspect.getsource(function)))
    except (OSError, TypeError):  # made by a loop, or no function
        return set()


def _spent() -> float:
    return sum(os.times()[:4])


def run_pytest(tree: Path, words: list[str], limit: int, *, stale=(), **judging) -> dict:
    """Run pytest in a fork that imports `stale` modules anew. Return how it ended, and what its `_Judge` noted."""
    log, note = tree.parent / "log.txt", tree.parent / "note.json"
    note.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(_spent()) + limit, int(_spent()) + limit + 5))
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            _go_to(tree)
            os.environ["PYTHONPATH"] = str(tree)
            _forget(stale)
            importlib.invalidate_caches()
            import pytest

            base = [f"--basetemp={tree.parent / 'temp'}", "-q", "-p", "no:cacheprovider", "--tb=line"]
            base += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that are imported before
            code = int(pytest.main([*base, *words], plugins=[_Judge(note, **judging)]))
        except BaseException:
            traceback.print_exc()
            code = 3
        sys.stdout.flush()
        os._exit(code)
    end = time.monotonic() + WAITING * limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.02)
    told = (
        json.loads(note.read_text())
        if note.exists()
        else {"failed": [], "seconds": {}, "stopped": False, "skipped": 0}
    )
    code = os.waitstatus_to_exitcode(status)
    how = "passed" if code in (0, 5) or told["stopped"] else "endless" if code < 0 else "failed"
    return {**told, "how": how, "said": "\n".join(log.read_text(errors="replace").splitlines()[-6:])}


def _forget(stale) -> None:
    for name in stale:
        sys.modules.pop(name, None)
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            vars(sys.modules[parent]).pop(last, None)
    for module in [sys.modules[name] for name in sys.modules if name.split(".")[0] == "braindecode_vis"]:
        for value in vars(module).values():
            if hasattr(value, "cache_parameters"):
                value.cache_clear()
    # which remembers the classes that names in annotations stood for
    from beartype._cache.cacheclear import clear_caches

    clear_caches()


def _go_to(tree: Path) -> None:
    sys.path[:] = [
        str(tree),
        *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests", tree)),
    ]
    os.chdir(tree)


def load_libraries() -> None:
    """Import what every fork would need seconds for."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"without {name}: {error}")


def start_workers(n: int, folder: Path, work, tasks: list):
    """Yield task and `work(tree, task)` of every task from `n` processes with a tree each, as they finish."""
    context = multiprocessing.get_context("fork")
    waiting, results = context.Queue(), context.Queue()
    for task in tasks:
        waiting.put(task)
    for _ in range(n):
        waiting.put(None)

    def serve(i):
        tree = make_tree(folder / f"worker{i}")
        import_package(tree)
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


def import_package(tree: Path) -> None:
    """Import the package, with the checks of shapes that the tests install."""
    _go_to(tree)
    spec = importlib.util.spec_from_file_location("hook", tree / "tests" / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for path in sorted((tree / "braindecode_vis").rglob("*.py")):
        if path.stem != "__main__":
            with contextlib.suppress(Exception):
                importlib.import_module(_name_module(str(path.relative_to(tree))))


def find_stale(tree: Path, path: str) -> list[str]:
    """Return the imported modules of the package that see a file when they are imported."""
    names = [name for name in sys.modules if name.split(".")[0] == "braindecode_vis"]
    sees = {}
    for name in names:
        if file := _find_module(tree, name):
            sees[name] = _read_imports_once(tree, file) | {name.rpartition(".")[0]}
    stale = {_name_module(path)}
    while more := {name for name in sees.keys() - stale if sees[name] & stale}:
        stale |= more
    return sorted(stale)


@functools.cache
def _read_imports_once(tree: Path, file: Path) -> set[str]:
    return read_imports(tree, file, inside=False)


def _name_module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# -- which tests are near ----------------------------------------------------------------------------------------


class Tests:
    """Test files, what they import of the package and which words they use; and what is known of single tests."""

    def __init__(self, folder: Path):
        self.store = folder / "tests.json"
        self.seconds, self.passes = (
            {},
            {},
        )  # the latter: whether it passes without a mutant, by its file's digest
        if self.store.exists():
            self.seconds, self.passes = json.loads(self.store.read_text())
        self.files = {}
        for path in sorted((ROOT / "tests").rglob("test_*.py")):
            text = path.read_text()
            imports = read_imports(ROOT, path, inside=True)
            self.files[str(path.relative_to(ROOT))] = (imports, set(re.findall(r"\w+", text)), len(text))
        self.digests = {name: _digest(ROOT / name) for name in self.files}
        self.importers = collections.defaultdict(set)
        for path in sorted((ROOT / "braindecode_vis").rglob("*.py")):
            name = _name_module(str(path.relative_to(ROOT)))
            for seen in read_imports(ROOT, path, inside=True):
                self.importers[seen].add(name)

    def save(self):
        self.store.write_text(json.dumps([self.seconds, self.passes]))

    def note(self, path: str, test: str, passes: bool):
        """Note whether a test passes without a mutant of a file, which is imported anew all the same."""
        self.passes[f"{path} {test}"] = [self.digests[test.split("::")[0]], passes]

    def is_known(self, path: str, test: str) -> bool:
        """Return whether that was asked of the test as it is now."""
        return self.passes.get(f"{path} {test}", [""])[0] == self.digests.get(test.split("::")[0])

    def list_broken(self, path: str) -> list[str]:
        """Return tests that fail without a mutant of a file."""
        tests = [
            key.partition(" ")[2]
            for key, (_, ok) in self.passes.items()
            if key.startswith(f"{path} ") and not ok
        ]
        return sorted(test for test in tests if self.is_known(path, test))

    def choose(self, mutant: Mutant) -> dict[str, int]:
        """Return near test files: 0 mirrors the changed file, 1 imports it, 2 is beside it or speaks of the change."""
        path = Path(mutant.path)
        module, beside = _name_module(mutant.path), "tests" / Path(*path.parts[1:-1])
        names = name_change(mutant)
        near, far = {}, []
        for name, (imports, words, size) in self.files.items():
            # test_ridge_paths.py of ridge.py, and test_decoder.py of decoder_files.py
            told = Path(name).stem.removeprefix("test_")
            is_mirror = told.startswith(path.stem) or path.stem.startswith(f"{told}_")
            if Path(name).parent == beside and is_mirror:
                near[name] = 0
            elif module in imports:
                near[name] = 1
            else:
                signs = [
                    bool(names & words),
                    Path(name).parent == beside,
                    bool(self.importers[module] & imports),
                    is_mirror,
                ]
                # whole packages import one another: that alone is no sign
                if signs[0] or signs[3] or (signs[1] and signs[2]):
                    far.append((-sum(signs), size, name))
        if ">>> " in (ROOT / mutant.path).read_text():
            near[EXAMPLES] = 0
        if not _is_function(mutant):
            near["tests/test_settings_page.py"] = 0  # three seconds, after which hardly a default is left
        return near | {name: 2 for *_, name in sorted(far)[:MOST_FAR]}


def name_change(mutant: Mutant) -> set[str]:
    """Return the words by which a test would speak of the change: its functions, classes or constant."""
    names = {part for part in mutant.function.split(".") if len(part) > 5 and not part.startswith("__")}
    if not _is_function(mutant) and (found := re.match(r"(\w+)\s*[:=]", mutant.before)):
        names.add(found[1])
    return names


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_function(mutant: Mutant) -> bool:
    last = mutant.function.split(".")[-1].lstrip("_")
    return bool(last) and not last[0].isupper()


# -- the run -----------------------------------------------------------------------------------------------------


def try_mutant(tree: Path, task) -> dict:
    """Put a mutant into a tree, run its tests until one fails, put the original back."""
    mutant, ranks, broken, seconds, budget = task
    target = tree / mutant.path
    original, stat = target.read_text(), target.stat()
    began = _spent()
    stale = find_stale(tree, mutant.path)
    told: dict = {"how": "no test", "failed": [], "seconds": {}, "said": ""}
    try:
        target.write_text(mutant.code)
        # no compiled file of another mutant of equal size and second may be taken for this one
        moved = int(time.time()) + int(hashlib.sha256(mutant.key.encode()).hexdigest()[:5], 16)
        os.utime(target, (stat.st_atime, moved))
        for chosen in (
            [name for name in ranks if ranks[name] < 2],
            [name for name in ranks if ranks[name] == 2],
        ):
            left = budget - sum(told["seconds"].values())
            if not chosen or left <= 0:
                continue
            own = f"{EXAMPLES}::test_examples_give_what_they_show[{_name_module(mutant.path)}]"
            words = [own if name == EXAMPLES else name for name in chosen]
            words += ["-x", *(f"--deselect={test}" for test in broken)]
            judging = {"names": name_change(mutant), "ranks": ranks, "seconds": seconds, "budget": left}
            new = run_pytest(tree, words, LIMIT, stale=stale, **judging)
            told = {**new, "seconds": told["seconds"] | new["seconds"]}
            if told["how"] != "passed":
                break
    finally:
        target.write_text(original)
        os.utime(target, (stat.st_atime, stat.st_mtime))
    told["result"] = "survived" if told["how"] in ("passed", "no test") else "killed"
    return {**told, "n": len(told["seconds"]), "took": round(_spent() - began, 1)}


def find_broken(tree: Path, task) -> list[str]:
    """Return those of some tests that fail without a mutant of a file."""
    path, tests = task
    words = ["--continue-on-collection-errors", *tests]
    told = run_pytest(tree, words, LIMIT * len(tests), stale=find_stale(tree, path))
    return tests if told["how"] == "endless" else [test for test in tests if test in told["failed"]]


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
        "--budget", type=float, default=12.0, help="seconds of the processor for the tests of a mutant"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "mutation", help="where copies and results lie"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    files = sorted({str(p.relative_to(ROOT)) for pattern in options.files for p in ROOT.glob(pattern)})
    mutants = draw_mutants(files, options.n, options.seed, options.folder)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.path}:{mutant.line} {mutant.function}\n  - {mutant.before}\n  + {mutant.after}")
        return
    entries = yaml.safe_load(ALLOWED.read_text()) or [] if ALLOWED.exists() else []
    allowed = {entry["mutant"] for entry in entries}
    load_libraries()
    tests, store = Tests(options.folder), options.folder / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    while due := find_due(mutants, results, allowed, tests, options.budget):
        print(f"{len(mutants)} mutants, {len(due)} to run", flush=True)
        tasks = [task for task, _ in due]
        states = {task[0].key: state for task, state in due}
        for i, ((mutant, *_), told) in enumerate(
            start_workers(options.jobs, options.folder, try_mutant, tasks)
        ):
            if isinstance(told, str):
                sys.exit(f"{mutant.key}\n{told}")
            tests.seconds.update(told.pop("seconds"))
            tests.save()
            results[mutant.key] = {**told, **states[mutant.key]}
            store.write_text(json.dumps(results, indent=0))
            print(
                f"{i + 1}/{len(due)} {told['result']} ({told['how']}, {told['took']} s) {mutant.key}",
                flush=True,
            )
        ask_whether_tests_pass(mutants, results, tests, options.folder, options.jobs)
    show(mutants, results, allowed)


def ask_whether_tests_pass(mutants, results, tests: Tests, folder: Path, n_workers: int) -> None:
    """Run tests that have failed without any mutant; what fails then notices nothing: its results are taken back."""
    asked: dict[str, set[str]] = {}
    for mutant in mutants:
        for test in results.get(mutant.key, {}).get("failed", ()):
            if test.split("::")[0] in tests.digests and not tests.is_known(mutant.path, test):
                asked.setdefault(mutant.path, set()).add(test)
    tasks = [(path, sorted(own)) for path, own in asked.items()]
    for (path, own), broken in start_workers(n_workers, folder, find_broken, tasks):
        if isinstance(broken, str):
            sys.exit(broken)
        for test in own:
            tests.note(path, test, test not in broken)
        tests.save()
        for mutant in mutants:
            if mutant.path == path and set(results.get(mutant.key, {}).get("failed", ())) & set(broken):
                print(f"{path}: {broken[0]} fails without any mutant and is left out", flush=True)
                del results[mutant.key]


def find_due(mutants, results, allowed, tests: Tests, budget: float) -> list[tuple[tuple, dict]]:
    """Return task and state of the mutants that are not judged.

    A killed mutant stays killed while its file is the same, a survivor survives while its tests are too.
    """
    due = []
    for mutant in mutants:
        ranks = tests.choose(mutant)
        broken = tests.list_broken(mutant.path)
        named = repr((sorted((name, tests.digests[name]) for name in ranks), broken, budget))
        state = {
            "file": _digest(ROOT / mutant.path),
            "tests": hashlib.sha256(named.encode()).hexdigest()[:16],
        }
        entry = results.get(mutant.key, {})
        is_judged = entry.get("file") == state["file"] and (
            entry["result"] == "killed" or entry.get("tests") == state["tests"]
        )
        if mutant.key not in allowed and not is_judged:
            due.append(((mutant, ranks, broken, tests.seconds, budget), state))
    return due


def show(mutants: list[Mutant], results: dict, allowed: set[str]) -> None:
    """Print survivors and the score by folder."""
    counts: dict[str, collections.Counter[str]] = {}
    for mutant in mutants:
        how = "equivalent" if mutant.key in allowed else results.get(mutant.key, {}).get("result", "not run")
        where = "/".join(Path(mutant.path).parts[1:-1]) or Path(mutant.path).name
        counts.setdefault(where, collections.Counter())[how] += 1
        if how in ("survived", "not run"):
            entry = results.get(mutant.key, {})
            met = f"{entry.get('n', 0)} tests, {entry.get('skipped', 0)} skipped"
            met += ", the budget was spent" * entry.get("stopped", False)
            print(f"\n{how}: {mutant.path}:{mutant.line} in {mutant.function or 'the module'} ({met})")
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
