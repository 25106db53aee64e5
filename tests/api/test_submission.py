"""A run becomes a submission: its file predicts what the run does, on a machine without this package."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import braindecode_vis as bdv
from braindecode_vis.api.submission import (
    BATCH,
    N_FEATURES,
    load_submission,
    trace_network,
    write_submission,
)
from braindecode_vis.base import store
from braindecode_vis.base.arrays import normalise_rows
from braindecode_vis.datasets.things_eeg2.dataset import ALL63, ThingsEeg2Config
from braindecode_vis.encoders.atm import TSConv
from tests.encoders.test_network_contract import NETWORKS, build, make_batch

pytestmark = [
    pytest.mark.whole,
    pytest.mark.filterwarnings("ignore"),
]  # torch's exporter warns of its own insides

TIMES = np.arange(120) / 120 - 0.2
#: The channels of the sealed phase.
EMOTIV32 = (
    "Cz", "Fz", "Fp1", "F7", "F3", "FC1", "C3", "FC5", "FT9", "T7", "CP5", "CP1", "P3", "P7", "PO9", "O1", "Pz", "Oz",
    "O2", "PO10", "P8", "P4", "CP2", "CP6", "T8", "FT10", "FC6", "C4", "FC2", "F4", "F8", "Fp2",
)  # fmt: skip
N_IMAGES = 12
FAST = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}
LINEAR = {"kind": "linear_gaussian", "n_components": 4, "misfit": 0.25}

#: The judge's machine: Python without this package, and without the network.
JUDGE = """
import importlib.abc, json, pathlib, socket, sys, types
import numpy as np

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "braindecode_vis":
            raise ImportError(name)

def refuse(*args, **kwargs):
    raise OSError("there is no network")

sys.meta_path.insert(0, Absent())
socket.socket.connect = socket.create_connection = refuse
package, base = types.ModuleType("benchmark_utils"), types.ModuleType("benchmark_utils.base_solver")

class CompetSolver:
    def get_model(self, meta):
        return self.load_model(meta)

base.CompetSolver = CompetSolver
sys.modules.update({"benchmark_utils": package, "benchmark_utils.base_solver": base})
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
sys.dont_write_bytecode = True
import submission, torch
asked = json.loads(sys.argv[2])
model = submission.Solver().get_model({**asked, "device": "cpu", "submission_dir": folder})
X = torch.from_numpy(np.load(sys.argv[3]))
found = torch.cat([model.predict(X[:1]), model.predict(X[1:8]), model.predict(X[8:])])
np.save(sys.argv[4], np.asarray(found))
"""


def make_trials(names, n=72, times=TIMES, **how):
    rng = np.random.default_rng(0)
    pictures = rng.random((N_IMAGES, 8, 8))
    shown = np.arange(n) % N_IMAGES
    X = pictures.reshape(N_IMAGES, -1)[shown] @ rng.normal(size=(64, len(names) * len(times)))
    X = (X + rng.normal(size=X.shape)).astype(np.float32).reshape(n, len(names), len(times))
    given = {"ch_names": list(names), "times": times, "modality": "eeg", "title": "Mine", **how}
    return bdv.from_arrays(X, images=pictures, shown=shown, **given)


def make_target(folder, data, n_features=N_FEATURES):
    """Return a target of as many features as the judge's, whatever they are."""
    ids = list(data.pictures.ids) if hasattr(data, "pictures") else sorted(set(data.trials["stimulus_id"]))
    (folder / "ids.txt").write_text("\n".join(ids))
    np.save(
        folder / "rows.npy", np.random.default_rng(1).normal(size=(len(ids), n_features)).astype(np.float32)
    )
    return {
        "kind": "imported", "layout": "rows", "files": str(folder / "rows.npy"), "ids": str(folder / "ids.txt"),
        "network": "giant",
    }  # fmt: skip


def run_with(folder, encoder, ch_names=ALL63, n_features=N_FEATURES, **how):
    folder.mkdir(exist_ok=True)
    data = make_trials(ch_names, **how)
    target = make_target(folder, data, n_features)
    return bdv.decode(data, encoder=encoder, target=target, split=2, out=folder / "run", settings=FAST)


def make_network(kind="eegproject", joint=None, **settings):
    own = {} if joint is None else {"joint": joint}
    return {"kind": "network", "network": {"kind": kind, **own}, "epochs": 1, "device": "cpu", **settings}


def judge(folder, data, meta, place):
    """Return what a submission predicts in another process, for batches of 1, 7 and 64."""
    np.save(place / "X.npy", data)
    command = [sys.executable, "-c", JUDGE, folder, json.dumps(meta), place / "X.npy", place / "found.npy"]
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=env, check=False
    )
    return done, np.load(place / "found.npy") if not done.returncode else None


def describe(ch_names):
    return {
        "n_chans": len(ch_names), "n_times": 120, "sfreq": 120.0, "ch_names": list(ch_names),
        "chs_info": [{"ch_name": name} for name in ch_names], "n_outputs": N_FEATURES,
    }  # fmt: skip


@pytest.mark.parametrize(
    "encoder, ch_names, asked",
    [
        # Channels are found by their names, in whatever order they come, and nobody is known.
        (
            {"kind": "average", "members": [LINEAR, make_network("atm_s", joint=True)], "weights": [2, 1]},
            ALL63[40:],
            ALL63[::-1],
        ),
        pytest.param(
            {"kind": "ridge", "alphas": [1.0]},
            EMOTIV32,
            tuple(name.upper() for name in EMOTIV32),
            marks=pytest.mark.further,
        ),
    ],
)
def test_a_submission_predicts_what_its_run_does(tmp_path, command_line, encoder, ch_names, asked):
    run = run_with(tmp_path / "work", encoder, ch_names, subject=np.resize(["a", "b"], 72))
    done = command_line(
        "export", run.folder, "--what", "submission", "--to", "challenge", "--fold", 0, "--out", tmp_path / "mine"
    )  # fmt: skip
    assert not done.returncode, done.stderr
    path, files = tmp_path / "mine", ["submission.py", "weights.npz"]
    assert sorted(file.name for file in path.iterdir()) == files
    with zipfile.ZipFile(tmp_path / "mine.zip") as packed:
        assert sorted(packed.namelist()) == files
    imported = set(re.findall(r"^(?:from|import) (\w+)", (path / "submission.py").read_text(), re.M))
    assert imported == {"math", "pathlib", "numpy", "torch", "benchmark_utils"}
    for file in (*path.iterdir(), path):
        file.chmod(file.stat().st_mode & ~0o222)
    X = np.random.default_rng(2).normal(size=(72, len(asked), 120)).astype(np.float32)
    done, found = judge(path, X, describe(asked), tmp_path)
    assert not done.returncode, done.stderr
    places = [[name.lower() for name in asked].index(name.lower()) for name in ch_names]
    expected = bdv.Decoder.from_run(run, fold=0).predict(X[:, places])
    assert np.isfinite(found).all()
    # float32 sums in another order
    np.testing.assert_allclose(found, normalise_rows(expected.reshape(len(found), -1)), atol=1e-5)
    for wrong, words in (
        ({"ch_names": ["Fz"]}, f"needs {len(ch_names)} channels, of which the trials do not have "),
        ({"sfreq": 100.0}, "needs 120 samples at 120 Hz, but the trials have 120 at 100 Hz"),
        ({"n_outputs": 32}, "predicts 1536 features, not 32"),
    ):
        with pytest.raises(ValueError, match=words):
            load_submission(path, {**describe(asked), "device": "cpu", **wrong})
    path.chmod(0o755)  # so that the folder can be removed


@pytest.mark.parametrize(
    "network", [one for one in NETWORKS if one.dims == ("channel", "time")], ids=str
)  # fmt: skip
def test_every_network_over_channels_and_times_becomes_code(network):
    """Layers of a subject, switches of precision and sizes of a batch are all gone from the written code."""
    signal = network.make_signal()
    module = build(network, signal).eval()
    data, _ = make_batch(network, signal, BATCH)
    subject = torch.full((BATCH,), signal.unknown_subject if network.unknown_subject else 0)
    code, weights = trace_network(Named(module), {"responses": data, "subject": subject})
    known = {"torch": torch, "inf": float("inf"), "nan": float("nan")}
    exec(code, known)
    assert {word.partition(".")[0] for word in code.split("torch.ops.")[1:]} == {"aten"}
    assert not re.search(r"\bself\b|cpu|_assert", code.partition(":\n")[2])
    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in weights.items()}
        (found,) = known["network"](**given, responses=data, subject=subject)
        expected = module(data, subject)
    # Attention and layers of a subject are summed in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Named(torch.nn.Module):
    """A network as a part of what is exported, whose inputs have these names."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, responses, subject):
        return self.network(responses, subject)


def test_unit_length_is_what_the_sealed_phase_rewards(tmp_path):
    """The mean of raw predictions of one person and image is ranked; a long wrong one outweighs a short right one.

    The gallery, predictions and scores are an example that was computed with the challenge's own two functions.
    """
    gallery = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)], float)
    predicted = [(2, 0.2), (-3, 9), (0, 1), (1, -4), (5, 4), (1, -3), *gallery[[1, 3, 4, 5, 6, 7]]]
    shown = np.array([0, 0, 2, 2, 0, 0, 1, 3, 4, 5, 6, 7])
    person = np.array([1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3])
    raw = np.array(predicted, np.float32)
    data = make_trials(ALL63[:2], n=24, times=TIMES[:8])
    decoder = bdv.Decoder(encoder={"kind": "ridge", "alphas": [1.0]}, target=make_target(tmp_path, data)).fit(
        data
    )
    folder = write_submission(decoder, tmp_path / "mine", {})
    model = load_submission(folder, {**describe(ALL63[:2]), "device": "cpu"})
    # The file's own code, with predictions of the example in place of the network's.
    rows = torch.from_numpy(np.resize(raw, (BATCH, 2)))
    type(model).__init__.__globals__["network"] = lambda **given: (rows,)
    unit = model.predict(torch.zeros(12, 2, 120)).numpy()
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)

    def score(predictions):
        queries = sorted(set(zip(person, shown, strict=True)))
        means = [predictions[(person == who) & (shown == what)].mean(0) for who, what in queries]
        cosines = normalise_rows(np.array(means, np.float64)) @ normalise_rows(gallery).T
        own = np.array([row[what] for row, (_, what) in zip(cosines, queries, strict=True)])
        # Equal cosines share their places; sums in another order differ by less.
        above, equal = (cosines > own[:, None] + 1e-6).sum(1), (abs(cosines - own[:, None]) <= 1e-6).sum(1)
        ranks = (2 * above + equal - 1) / 2
        return len(queries), *(round(float((ranks < k).mean()), 4) for k in (1, 5))

    assert score(raw) == (9, 0.7778, 0.8889)
    assert score(unit) == (9, 0.7778, 1.0)


def fit(folder, data, encoder=None, **how):
    encoder = encoder or {"kind": "ridge", "alphas": [1.0]}
    return bdv.Decoder(encoder=encoder, target=make_target(folder, data, **how)).fit(data)


def prepare(root, **changed):
    """Return what a data set writes of how it cuts and cleans, by default as the judge does."""
    chain = {
        "sfreq": 120, "tmax": 0.8, "window": (-0.2, 0.8), "baseline": (None, 0), "mvnn": "none", "l_freq": 0.1,
        "h_freq": 75, "notch": (50, 60, 100), "scaling": {"method": "robust", "clamp": 20},
    }  # fmt: skip
    settings = ThingsEeg2Config(root=root, **{**chain, **changed})
    plan = {name: value for name, value in vars(settings.make_plan()).items() if name != "cleaning"}
    store.write_json(root / "chain.json", {"plan": plan, "cleaning": settings.make_cleaning().as_json()})
    return json.loads((root / "chain.json").read_text())


def test_what_cannot_be_submitted_is_one_sentence(tmp_path, monkeypatch):
    two = ALL63[:2]
    short = make_trials(two, n=24, times=TIMES[:8])
    people = make_trials(two, n=24, times=TIMES[:8], subject=["a", "b"] * 12)
    aligned = {"kind": "ridge", "alphas": [1.0], "subject_alignment": "zscore"}
    network = make_network("eegproject", subject_alignment="euclidean")
    rng = np.random.default_rng(0)
    voxels = bdv.from_arrays(
        rng.normal(size=(24, 9)), images=rng.random((12, 8, 8)), shown=np.arange(24) % 12
    )
    classes = bdv.Decoder(encoder="lda").fit(rng.normal(size=(24, 9)), np.array(["face", "house"] * 12))
    right = prepare(tmp_path)
    cut = prepare(tmp_path, mvnn="epochs", l_freq=None, scaling=None)
    for decoder, preparation, words in (
        (classes, {}, "asks for embeddings of images, but the run decodes categories"),
        (
            fit(tmp_path, voxels),
            {},
            "trials of EEG channels x times, but the run has other trials of feature",
        ),
        (
            fit(tmp_path, make_trials(two, n=24, times=TIMES[:8], modality="meg")),
            {},
            "the run has meg trials",
        ),
        (fit(tmp_path, make_trials(two, n=24, ch_names=None)), {}, "does not know its ch_names"),
        (
            fit(tmp_path, make_trials(two, n=24, times=np.arange(8) / 100)),
            {},
            "8 samples from 0.000 to 0.070 s",
        ),
        (fit(tmp_path, short, n_features=7), {}, "have 1536 features .DINOv2-giant., but the run predicts 7"),
        (
            fit(tmp_path, short),
            cut,
            "with dataset.l_freq=0.1 .now None., dataset.scaling.method=robust .now None., .*mvnn=none .now epochs",
        ),
        (fit(tmp_path, people, aligned), {}, "ridge with encoder.subject_alignment needs the subject"),
        (fit(tmp_path, people, network), {}, "aligns each subject by its own training trials"),
        (
            fit(tmp_path, short, make_network(projector={"size": 4})),
            {},
            "compares in a space that it has learnt",
        ),
    ):
        with pytest.raises((bdv.ConfigError, bdv.DataError), match=words) as caught:
            write_submission(decoder, tmp_path / "mine", preparation)
        assert "\n" not in str(caught.value)
    decoder = fit(tmp_path, make_trials(two, n=24), make_network("tsconv"))
    forward = TSConv.forward

    def forward_by_value(self, x, *args):
        return forward(self, x * 2 if float(x.sum().item()) > 0 else x, *args)

    monkeypatch.setattr(TSConv, "forward", forward_by_value)
    with pytest.raises(bdv.ConfigError, match=r"as a program of its own .*; choose another"):
        write_submission(decoder, tmp_path / "mine", {})
    # An average of members that ask for no subject.
    linear = {"kind": "average", "members": [LINEAR, {"kind": "ridge", "alphas": [1.0]}]}
    folder = write_submission(fit(tmp_path, short, linear), tmp_path / "linear" / "mine", {})
    assert "SUBJECT = None" in (folder / "submission.py").read_text()
    shutil.rmtree(folder.parent)
    # The network of one subject aligns everybody as this one.
    write_submission(fit(tmp_path, short, network), tmp_path / "mine", right)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chain.json", "ids.txt", "mine", "mine.zip", "rows.npy",
    ]  # fmt: skip
    with pytest.raises(bdv.ConfigError, match="exists"):
        write_submission(fit(tmp_path, short), tmp_path / "mine", {})
