"""The encoder of a run as a submission to the NeurIPS 2026 EEG-to-image challenge (track 1).

The judge's machine has torch and numpy, but not this package. So the prediction is traced by `torch.export`, and its
operators are written out as the Python code of one file, beside their weights as arrays. A file of `torch.export` need
not be readable by another version of torch, and that of the judge is not known; torch keeps the arguments of its
operators (``torch.ops.aten``), and ``.npz`` needs no torch. Owns what the judge's trials are, what of a run they cannot
give, and the written file. Knows nothing of how a run was trained.
"""

from __future__ import annotations

import runpy
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from braindecode_vis import __version__
from braindecode_vis.api.exports import write_new
from braindecode_vis.api.model_export import make_noise
from braindecode_vis.base.arrays import Embeddings, Responses, normalise_rows
from braindecode_vis.base.checks import ConfigError, DataError

#: Every trial that the judge gives: rate in Hz, time of its first sample in s, and number of samples.
SFREQ, FIRST_TIME, N_TIMES = 120.0, -0.2, 120
#: Trials that the written network takes at a time.
BATCH = 32
#: Features of the judge's image embeddings, the mean token of layer 26 of DINOv2-giant.
N_FEATURES = 1536
#: A submission may differ from its run by this, where predictions have length one: float32 sums in another order.
TOLERANCE = 1e-5
#: How the judge cuts and cleans recordings, by the names of settings of a data set.
_CHAIN: Mapping[str, Any] = {
    "notch": [50.0, 60.0], "l_freq": 0.1, "h_freq": 75.0, "scaling.method": "robust", "scaling.clamp": 20.0,
    "baseline": [-0.2, 0.0], "mvnn": "none", "reference": "none", "interpolate": False, "causal": False, "ica": None,
    "autoreject": None,
}  # fmt: skip
_BASE = "benchmark_utils.base_solver"


def write_submission(decoder: Any, out: str | Path, preparation: Mapping[str, Any]) -> Path:
    """Write the folder of a submission, and the ZIP file of its content that is uploaded.

    Parameters
    ----------
    decoder
        Fitted.
    out
        The folder; ``OUT.zip`` is written beside it. Neither may exist.
    preparation
        What the data set of the run says of how its trials were cut and cleaned; empty for trials that came prepared.

    Raises
    ------
    ConfigError, DataError
        If the encoder needs other trials than the judge's, the network cannot be traced, or the written file predicts
        other vectors.
    """
    first = _check_trials(decoder, preparation)
    trials = decoder._take_new(make_noise(decoder._shape, decoder._typical))
    module, inputs, expected = _take_module(decoder, trials)
    _check_target(decoder, expected)
    code, weights = trace_network(module, inputs)
    with write_new(out, "challenge") as folder:
        folder.mkdir()
        np.savez(folder / "weights.npz", **weights)
        about = fill(
            f"Run {decoder._facts.title or 'without a title'}, encoder {decoder._settings.kind}, target "
            f"{decoder._bank.space}. {decoder._facts.protocol}", 110,
        ).replace('"', "'").replace("\\", "/")  # fmt: skip
        file = folder / "submission.py"
        subject_number = int(inputs["subject"][0]) if "subject" in inputs else None
        file.write_text(
            _FILE.format(
                version=__version__, about=about, channels=tuple(map(str, decoder._coords["ch_names"])),
                first=first, n_times=decoder._shape[1], sfreq=SFREQ, subject=subject_number,
                n_features=N_FEATURES, batch=BATCH, code=code, name=f"braindecode_vis {decoder._settings.kind}",
            ),
            encoding="utf-8",
        )  # fmt: skip
        _compare(folder, decoder, trials.data, expected.flat(), first)
        shutil.make_archive(str(folder), "zip", folder)
    return Path(out).expanduser().absolute()


def _check_trials(decoder: Any, preparation: Mapping[str, Any]) -> int:
    """Return the judge's sample at which the run's trials start, or raise `ConfigError`."""
    if decoder._settings.decodes_categories:
        raise ConfigError("the challenge asks for embeddings of images, but the run decodes categories.")
    dims, modality = decoder._dims[1:], decoder._facts.modality.lower()
    if dims != ("channel", "time") or modality not in ("", "eeg"):
        raise ConfigError(
            f"the challenge has trials of EEG channels x times, but the run has {modality or 'other'} trials of "
            f"{' x '.join(dims)}; export a run on EEG."
        )
    missing = [name for name in ("ch_names", "times") if decoder._coords.get(name) is None]
    if missing:
        raise ConfigError(
            f"the challenge names its channels and times, but the run does not know its {' and '.join(missing)}; "
            "pass ch_names and times to from_arrays."
        )
    times = np.asarray(decoder._coords["times"], float)
    first = round((times[0] - FIRST_TIME) * SFREQ)
    grid = FIRST_TIME + (first + np.arange(len(times))) / SFREQ
    if first < 0 or first + len(times) > N_TIMES or not np.allclose(times, grid, atol=5e-4):
        raise ConfigError(
            f"the challenge's trials have {SFREQ:g} Hz from {FIRST_TIME:g} to {FIRST_TIME + N_TIMES / SFREQ:g} s, but "
            f"those of the run have {len(times)} samples from {times[0]:.3f} to {times[-1]:.3f} s; set dataset.sfreq, "
            "dataset.tmin and dataset.window."
        )
    done = _describe_chain(preparation)
    other = [
        f"dataset.{name}={value} (now {done[name]})"
        for name, value in _CHAIN.items()
        if name in done and done[name] != value
    ]
    if other:
        raise ConfigError(
            "the challenge gives finished trials, which were not made as those of the run, and this cannot be done to "
            f"them afterwards; make the run with {', '.join(other)}."
        )
    return first


def _describe_chain(preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the steps of a run as `_CHAIN` has them; nothing where the trials came prepared."""
    done = {**preparation.get("plan", {}), **preparation.get("cleaning", {})}
    if "notch" in done:
        scaling = done.pop("scaling", None) or {}
        done |= {f"scaling.{name}": scaling.get(name) for name in ("method", "clamp")}
        # Multiples lie above the band.
        done["notch"] = sorted({50.0, 60.0} & set(done["notch"]))
    if done.get("baseline") is not None:
        start, stop = done["baseline"]
        done["baseline"] = [done["tmin"] if start is None else start, stop]
    return done


def _take_module(decoder: Any, trials: Responses) -> tuple[Any, dict[str, Any], Embeddings]:
    """Return the encoder as a module, these trials as its inputs, and what it predicts for them."""
    try:  # a person whom the encoder does not know
        trials = trials.with_trials(trials.trials.assign(subject="of the challenge"))
        return *decoder._fitted.as_module(trials), decoder._fitted.predict(trials)
    except DataError:
        if len(decoder._subjects) != 1:
            raise
        # An encoder of one subject treats everybody as this one.
        trials = trials.with_trials(trials.trials.assign(subject=decoder._subjects[0]))
        return *decoder._fitted.as_module(trials), decoder._fitted.predict(trials)


def _check_target(decoder: Any, predicted: Embeddings) -> None:
    found = predicted.flat().shape[1]
    if predicted.space != decoder._bank.space:
        raise ConfigError(
            "the encoder compares in a space that it has learnt, but the challenge compares with image embeddings "
            "themselves; train it without encoder.projector, encoder.fusion and encoder.image_tower."
        )
    if found != N_FEATURES:
        raise ConfigError(
            f"the challenge's image embeddings have {N_FEATURES} features (DINOv2-giant), but the run predicts {found} "
            f"of {decoder._bank.space}; take the target of things_eeg2_neuralbench."
        )


def trace_network(module: Any, inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the source of a function ``network``, and the arrays that it takes beside the inputs, by name."""
    import torch

    # Of one size: some networks of other packages cannot be traced for any number of trials.
    few = tuple(tensor[:BATCH] for tensor in inputs.values())
    try:
        program = torch.export.export(module, few)
    except Exception as error:  # torch raises what it likes
        raise _refuse(error) from error
    traced = program.graph_module
    _keep_operators(traced)
    state = {**program.state_dict, **program.constants}
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target}
    weights = {name: state[target].detach().cpu().numpy() for name, target in names.items()}
    head, body = traced.code.strip().replace("def forward(self, ", "def network(", 1).split("\n", 1)
    if "device(type='cpu')" in body:
        body = "    device = responses.device\n" + body.replace("device(type='cpu')", "device")
    return f"{head}\n{body}", weights


def _refuse(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:160].rstrip(".")
    return ConfigError(
        f"the encoder cannot be written as a program of its own ({type(error).__name__}: {reason}); choose another."
    )


def _keep_operators(traced: Any) -> None:
    """Remove what holds a traced network to the machine of the trace: assertions, and switches around parts of it."""
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if str(node.target).startswith("aten._assert"):
            graph.erase_node(node)
        elif node.target.__module__ == "torch.ops.higher_order":  # of precision or of gradients
            place = next(n for n, arg in enumerate(node.args) if getattr(arg, "op", "") == "get_attr")
            part = getattr(traced, node.args[place].target)
            _keep_operators(part)
            given = (each for each in part.graph.nodes if each.op == "placeholder")
            with graph.inserting_before(node):
                found = graph.graph_copy(part.graph, dict(zip(given, node.args[place + 1 :], strict=True)))
            for user in list(node.users):  # each takes one of the results
                user.replace_all_uses_with(found[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()


def load_submission(folder: Path, meta: Mapping[str, Any]) -> Any:
    """Return what the `Solver` of a submission gives for these facts, with a stand-in of the challenge's base class."""
    package, base = types.ModuleType(_BASE.partition(".")[0]), types.ModuleType(_BASE)
    base.CompetSolver = object  # type: ignore[attr-defined]
    held = {name: sys.modules.get(name) for name in (package.__name__, _BASE)}
    sys.modules.update({package.__name__: package, _BASE: base})
    try:
        solver = runpy.run_path(str(folder / "submission.py"))["Solver"]()
    finally:
        for name, earlier in held.items():
            if earlier is None:
                del sys.modules[name]
            else:
                sys.modules[name] = earlier
    return solver.load_model({**meta, "submission_dir": folder})


def _compare(folder: Path, decoder: Any, data: np.ndarray, expected: np.ndarray, first: int) -> None:
    """Raise `DataError` unless the written file predicts the directions that the encoder does."""
    import torch

    meta = {
        "n_chans": decoder._shape[0], "ch_names": list(decoder._coords["ch_names"]), "n_times": N_TIMES,
        "sfreq": SFREQ, "n_outputs": N_FEATURES, "device": "cpu",
    }  # fmt: skip
    after = N_TIMES - first - data.shape[2]
    whole = torch.from_numpy(np.pad(data, ((0, 0), (0, 0), (first, after))).astype(np.float32))
    for n_trials in (1, len(whole)):
        try:
            found = load_submission(folder, meta).predict(whole[:n_trials]).numpy()
        except Exception as error:  # an operator that has no name there
            raise _refuse(error) from error
        difference = float(np.abs(found - normalise_rows(expected[:n_trials])).max())
        if not difference <= TOLERANCE:
            raise DataError(
                f"the submission differs from the encoder by up to {difference:.2g}, where predictions have length 1; "
                "choose another encoder."
            )


_FILE = '''"""Written by braindecode_vis {version}.

{about}
"""

from math import inf, nan
from pathlib import Path

import numpy as np
import torch
from benchmark_utils.base_solver import CompetSolver

CHANNELS = {channels}
FIRST, N_TIMES, SFREQ = {first}, {n_times}, {sfreq}  # samples of a trial that the network takes
SUBJECT = {subject}  # the number by which the network knows a person
N_FEATURES, BATCH = {n_features}, {batch}


{code}


class Model:
    def __init__(self, weights, rows):
        self.weights, self.rows = weights, rows

    @torch.no_grad()
    def predict(self, X):
        X = torch.as_tensor(X, dtype=torch.float32, device=self.rows.device)
        X = X[:, self.rows, FIRST : FIRST + N_TIMES]
        inputs, pieces = {{}}, []
        if SUBJECT is not None:
            inputs["subject"] = torch.full((BATCH,), SUBJECT, dtype=torch.int64, device=X.device)
        for part in X.split(BATCH):
            # The network takes BATCH trials; the last ones are filled up.
            filled = torch.cat([part, part[-1:].expand(BATCH - len(part), -1, -1)])
            found = network(**self.weights, responses=filled, **inputs)[0]
            pieces.append(found.flatten(1)[: len(part)].float())
        found = torch.cat(pieces)
        # Length one: the sealed phase averages the raw predictions of a person and image, where long ones would
        # count more than short ones. In an example of twelve predictions, this moves top-5 from .889 to 1.
        return found / found.norm(dim=1, keepdim=True).clamp_min(1e-12)


class Solver(CompetSolver):
    name = "{name}"
    requirements = []

    def load_model(self, meta):
        places = {{str(name).lower(): row for row, name in enumerate(meta["ch_names"])}}
        missing = [name for name in CHANNELS if name.lower() not in places]
        if missing:
            raise ValueError(
                f"The network needs {{len(CHANNELS)}} channels, of which the trials do not have {{', '.join(missing)}}."
            )
        if meta["sfreq"] != SFREQ or meta["n_times"] < FIRST + N_TIMES:
            raise ValueError(
                f"The network needs {{FIRST + N_TIMES}} samples at {{SFREQ:g}} Hz, but the trials have "
                f"{{meta['n_times']}} at {{meta['sfreq']:g}} Hz."
            )
        if meta["n_outputs"] != N_FEATURES:
            raise ValueError(f"The network predicts {{N_FEATURES}} features, not {{meta['n_outputs']}}.")
        device = torch.device(meta["device"])
        rows = torch.tensor([places[name.lower()] for name in CHANNELS], device=device)
        with np.load(Path(meta["submission_dir"]) / "weights.npz", allow_pickle=False) as stored:
            weights = {{name: torch.from_numpy(stored[name]).to(device) for name in stored.files}}
        return Model(weights, rows)
'''
