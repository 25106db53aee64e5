"""A plain torch module as the encoder: trained, kept, read by other processes; one sentence for what does not fit."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

import braindecode_vis as bdv
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.encoders.plain_module import describe_module

N, CHANNELS, TIMES = 12, 3, 8
FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}
QUICK = {"kind": "network", "epochs": 2, "device": "cpu", "selection": {"kind": "last", "hold_out": 0}}
CODE = """
from torch import nn

class Small(nn.Module):
    def __init__(self, width=5, dropout=0.1):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(24, width))

    def forward(self, data):
        return self.layers(data)
"""


def make_data():
    rng = np.random.default_rng(0)
    pictures = rng.random((N, 4, 4))
    X = (pictures.reshape(N, -1) @ rng.normal(size=(16, CHANNELS * TIMES))).reshape(N, CHANNELS, TIMES)
    return X.astype(np.float32), pictures


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A module of a lab, on the path of this process and of its children."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "lab_small_nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path / "src")
    sys.modules.pop("lab_small_nets", None)
    import lab_small_nets

    return lab_small_nets


def run_python(code, *path):
    search = ":".join([*map(str, path), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": search}
    )


def test_a_module_is_trained_kept_and_read_in_another_process(lab, tmp_path):
    X, pictures = make_data()
    data = bdv.from_arrays(X, images=pictures, ch_names=list("abc"))
    run = bdv.decode(
        data, encoder={**QUICK, "network": lab.Small(6)}, split=2, out=tmp_path / "run", settings=FEW
    )
    settings = run.config.encoder.network
    assert settings.model_dump()["arguments"] == {"width": 6}
    assert len(settings.hashed_fields()["outside"]["sha256"]) == 64
    # A second call finds the same run, and other arguments are another one.
    again = bdv.decode(
        data, encoder={**QUICK, "network": lab.Small(6)}, split=2, out=tmp_path / "run", settings=FEW
    )
    np.testing.assert_array_equal(again.predictions.vectors, run.predictions.vectors)
    with pytest.raises(ConfigError, match=r"run with other settings: encoder.network.arguments"):
        bdv.decode(
            data, encoder={**QUICK, "network": lab.Small(7)}, split=2, out=tmp_path / "run", settings=FEW
        )
    open_it = f"import braindecode_vis as bdv; print(bdv.open_run({str(tmp_path / 'run')!r}"
    read = run_python(
        f"{open_it}, trust_code='lab_small_nets').predict(__import__('numpy').zeros((2, 3, 8)), fold=0))"
    )
    assert "2 trials by the run" in read.stdout, read.stderr
    assert "trust_code=" in run_python(f"{open_it}))").stderr
    (tmp_path / "src" / "lab_small_nets.py").unlink()
    assert "there is no module 'lab_small_nets'; install its package" in run_python(f"{open_it}))").stderr


def test_a_decoder_takes_a_module_and_is_saved_without_it(lab, tmp_path):
    X, pictures = make_data()
    decoder = bdv.Decoder(encoder={**QUICK, "network": lab.Small(6)}).fit(X, pictures)
    assert clone(decoder).encoder["network"].width == 6
    loaded = bdv.Decoder.load(decoder.save(tmp_path / "decoder"))
    np.testing.assert_array_equal(loaded.predict(X), decoder.predict(X))
    assert loaded.encoder["network"] == {"kind": "lab_small_nets:Small", "arguments": {"width": 6}}


def test_a_look_at_a_module_draws_no_number_of_the_caller(lab):
    module = lab.Small(6)
    state = torch.random.get_rng_state()
    assert describe_module(module)["arguments"] == {"width": 6}
    assert torch.equal(torch.random.get_rng_state(), state)


class OfThisFile(nn.Module):
    """Counts on the attributes that its subclasses keep."""

    def __init__(self, width=4):
        super().__init__()
        self.width = width
        self.layer = nn.Linear(CHANNELS * TIMES, width)

    def forward(self, data):
        return self.layer(data.flatten(1))


class Unkept(OfThisFile):
    def __init__(self, size):
        super().__init__(size)


class Changed(OfThisFile):
    def __init__(self, share=0.1):
        super().__init__()
        self.drop = nn.Dropout(share)


class Empty(OfThisFile):
    def __init__(self):
        nn.Module.__init__(self)


class Deep(OfThisFile):
    def forward(self, data):
        return data * self.layer.bias[0]


class Tuple(OfThisFile):
    def forward(self, data):
        return super().forward(data), data


class Pooled(OfThisFile):
    def forward(self, data):
        return super().forward(data).mean(0)


class Wrong(OfThisFile):
    def forward(self, data):
        return self.layer(data)


def make_local():
    class Local(OfThisFile):
        pass

    return Local()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: OfThisFile, r"encoder is the class OfThisFile; give a module of it: OfThisFile\(\.\.\.\)"),
        (Empty, "the module Empty has no parameters, so there is nothing to train"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 4)),
            r"Sequential\(\) differs .* write a class of your own",
        ),
        (lambda: Unkept(4), "its argument size is not known: write self.size = size in its __init__"),
        (lambda: Changed(0.5), r"Changed\(\) differs from the module that was given \(first in drop"),
        (make_local, "the class Local is defined within a function"),
        (
            Deep,
            r"Deep returns float32 of shape \(2, 3, 8\) for 2 trials of 3 channels x 8 times, but must return floats",
        ),
        (Tuple, r"the module Tuple returns tuple, but must return a tensor of shape \(trials, width\)"),
        (Pooled, r"Pooled returns float32 of shape \(4,\) for 2 trials"),
        (
            Wrong,
            r"Wrong fails on trials of 3 channels x 8 times \(RuntimeError: .*; it gets a tensor of shape \(2, 3, 8\)",
        ),
        (
            lambda: np.zeros(3),
            "must be a name such as 'ridge' or 'atm_s', a torch module, or a mapping of settings",
        ),
        (lambda: print, "a torch module, or a mapping of settings"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_trained_is_one_sentence(make, words):
    X, pictures = make_data()
    data = bdv.from_arrays(X, images=pictures, dims=("trial", "channel", "time"))
    with pytest.raises(ConfigError, match=words) as caught:
        bdv.decode(data, encoder=make(), split=2, settings={**FEW, "encoder.device": "cpu"})
    assert "\n" not in str(caught.value)


#: Runs a file as a cell of a notebook is run.
AS_CELL = (
    "import sys; from IPython.core.interactiveshell import InteractiveShell; "
    "InteractiveShell.instance().run_cell(open(sys.argv[1]).read()).raise_error()"
)


@pytest.mark.parametrize(
    "how", [(), pytest.param(("-c", AS_CELL), marks=pytest.mark.further)], ids=["script", "notebook"]
)
def test_a_class_of_a_script_is_trained_and_says_where_to_move_it(how, tmp_path):
    """Its module is that of the process, which another process does not have."""
    script = tmp_path / "analysis.py"
    script.write_text(
        f"{CODE}\nimport sys; sys.path[:0] = {sys.path!r}\n"
        "import braindecode_vis as bdv\nfrom tests.api.test_plain_module import FEW, QUICK, make_data\n"
        "X, pictures = make_data()\n"
        f"run = bdv.decode(bdv.from_arrays(X, images=pictures), encoder={{**QUICK, 'network': Small()}}, split=2, "
        f"out={str(tmp_path / 'run')!r}, settings=FEW)\n"
        "print(run.config.encoder.network.kind, bdv.open_run(run.folder).predictions.vectors.shape)\n"
    )
    done = subprocess.run([sys.executable, *how, script], capture_output=True, text=True)
    assert "__main__:Small (12, 16)" in done.stdout, done.stderr
    with pytest.raises(
        ConfigError, match=r"Small was defined in a notebook or script, .* move the class into a module"
    ):
        bdv.open_run(tmp_path / "run")
