"""Old module paths: known for one version, with a warning that names the new one."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest

import braindecode_vis
from braindecode_vis.api.moved import MOVED, find_new_path, find_old_paths
from braindecode_vis.base import arrays, contracts


@pytest.fixture
def anew():
    """Forget which old paths were imported, before and after."""

    def forget():
        for name in [name for name in sys.modules if find_new_path(name)]:
            del sys.modules[name]
        for name in MOVED:
            if "." not in name:
                vars(braindecode_vis).pop(name, None)

    forget()
    yield
    forget()


@pytest.mark.parametrize("old", MOVED)
def test_every_old_path_leads_to_a_module(old):
    new = f"braindecode_vis.{MOVED[old]}"
    words = new.split(".")
    if words[1] == "parts" and find_spec(".".join(words[:3])) is None:
        pytest.skip(f"the part {words[2]} is not here")
    assert find_spec(new) is not None
    assert find_new_path(new) is None  # or an import would go in a circle


def test_an_old_import_gives_the_same_module_and_names_the_new_path(anew):
    with pytest.warns(DeprecationWarning, match="the next version removes the old path") as warned:
        from braindecode_vis.arrays import Embeddings
    (told,) = warned
    assert str(told.message).startswith("braindecode_vis.arrays is now braindecode_vis.base.arrays; ")
    assert told.filename == __file__
    assert Embeddings is arrays.Embeddings
    with pytest.warns(DeprecationWarning, match=r"now braindecode_vis\.base\.contracts;"):
        import braindecode_vis.contracts as old
    assert old is contracts
    assert contracts.__spec__.name == contracts.__name__ == "braindecode_vis.base.contracts"
    with pytest.warns(DeprecationWarning, match=r"now braindecode_vis\.base\.stimuli;"):
        from braindecode_vis import stimuli
    assert stimuli is importlib.import_module("braindecode_vis.base.stimuli")


def test_modules_of_an_old_package_are_not_loaded_twice(anew):
    with pytest.warns(DeprecationWarning, match="the next version removes the old path") as warned:
        from braindecode_vis.metrics.uncertainty import bootstrap_interval
    assert (
        bootstrap_interval
        is importlib.import_module("braindecode_vis.scoring.uncertainty").bootstrap_interval
    )
    with pytest.warns(DeprecationWarning, match=r"now braindecode_vis\.scoring\.metrics\.metric_registry;"):
        from braindecode_vis.metrics.metric_registry import Metric
    assert Metric is importlib.import_module("braindecode_vis.scoring.metrics.metric_registry").Metric
    assert [str(told.message).partition(";")[0] for told in warned] == [
        "braindecode_vis.metrics is now braindecode_vis.scoring.metrics",
        "braindecode_vis.metrics.uncertainty is now braindecode_vis.scoring.uncertainty",
    ]


def test_what_never_was_there_is_still_not_found(anew):
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'braindecode_vis\.nothing'"):
        importlib.import_module("braindecode_vis.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"braindecode_vis\.generation\.nothing"), pytest.warns():
        importlib.import_module("braindecode_vis.generators.nothing")
    before = list(sys.meta_path)
    find_old_paths()
    assert sys.meta_path == before


def call(*words, path="", code=0):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=env, timeout=280
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_package_alone_imports_no_old_path():
    told = call(
        "-W", "error::DeprecationWarning", "-c", "import braindecode_vis, sys; print(len(sys.modules))"
    ).stdout
    assert int(told) < 200


#: A brain encoder as docs/OUTSIDE.md of version 0.2 showed one.
MODULE = """
from typing import Literal

import braindecode_vis.contracts as contracts
import numpy as np
from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.settings import Settings


class Nearest:
    def fit(self, responses, targets):
        assert isinstance(responses, Responses) and isinstance(targets, Embeddings) and contracts.Context
        self.rows, self.vectors, self.space = responses.as_matrix(), targets.vectors, targets.space
        return self

    def predict(self, responses):
        best = (responses.as_matrix() @ self.rows.T).argmax(axis=1)
        return Embeddings(self.vectors[best], responses.stimulus_ids, self.space)

    def write(self, folder):
        np.savez(folder / "nearest.npz", rows=self.rows, vectors=self.vectors, space=self.space)

    def read(self, folder):
        with np.load(folder / "nearest.npz") as stored:
            self.rows, self.vectors, self.space = stored["rows"], stored["vectors"], str(stored["space"])
        return self


class NearestTrialConfig(Settings):
    kind: Literal["nearest_trial"] = "nearest_trial"

    def build(self, *, seed):
        return Nearest()
"""


@pytest.mark.further
def test_an_installed_package_with_old_paths_still_works(tmp_path):
    """Its kind is found by entry point, its classes are ours, and its author is warned once for each path."""
    site, out = tmp_path / "site", tmp_path / "run"
    (site / "old_tools").mkdir(parents=True)
    (site / "old_tools" / "__init__.py").touch()
    (site / "old_tools" / "nearest.py").write_text(MODULE)
    info = site / "old_tools-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: old-tools\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[braindecode_vis.brain_encoders]\nnearest_trial = old_tools.nearest:NearestTrialConfig\n"
    )
    settings = ["encoder.kind=nearest_trial", "evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]
    done = call(
        "-W", "always::DeprecationWarning:old_tools.nearest", "-m", "braindecode_vis", "run", "synthetic_digits",
        "--out", out, *[word for setting in settings for word in ("--set", setting)], path=site,
    )  # fmt: skip
    for name in ("contracts", "arrays", "settings"):
        assert done.stderr.count(f"braindecode_vis.{name} is now braindecode_vis.base.{name}; ") == 1
    scores = {
        row["metric"]: row
        for row in json.loads((out / "scores.json").read_text())
        if row["method"] == "decoded"
    }
    assert scores["top1"]["value"] > scores["top1"]["chance"]


def test_a_job_that_waits_in_a_queue_names_old_modules(tmp_path):
    """Its pickle was written before the move; it must load, and say in its own words what it finds."""
    job = pytest.importorskip("braindecode_vis.parts.cluster.job")
    sent = job.CommandJob(
        "fit", ["true"], str(tmp_path), str(tmp_path / "log"), str(tmp_path / "note"), "1", "slurm"
    )
    old = pickle.dumps(sent, protocol=0).replace(b"braindecode_vis.parts.cluster", b"braindecode_vis.cluster")
    (tmp_path / "sent.pkl").write_bytes(old)
    told = call(
        "-c", "import pickle, sys; job = pickle.load(open(sys.argv[1], 'rb')); print(type(job).__module__, job.name)",
        tmp_path / "sent.pkl",
    )  # fmt: skip
    assert told.stdout.split() == ["braindecode_vis.parts.cluster.job", "fit"]
