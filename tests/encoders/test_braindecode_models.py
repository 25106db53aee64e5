"""The bridge, against a stand-in for `braindecode.models` with classes of every kind that it must handle."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders.braindecode_models import BraindecodeConfig, find_model
from braindecode_vis.encoders.signal import Signal

SUBJECT = torch.zeros(4, dtype=torch.int64)


class Plain(nn.Module):
    """Asks for sizes only."""

    def __init__(self, n_chans, n_outputs, n_times, depth=1):
        super().__init__()
        if depth > 4:
            raise ValueError("depth must be at most 4")
        self.depth = depth
        self.last = nn.Linear(n_chans * n_times, n_outputs)
        self.norm = nn.BatchNorm1d(n_outputs)

    def forward(self, x):
        return self.norm(self.last(x.flatten(1)))


class Placed(Plain):
    """Asks for the rate and the channels as well."""

    def __init__(self, n_chans=None, n_outputs=None, n_times=None, chs_info=None, sfreq=None, **more):
        super().__init__(n_chans, n_outputs, n_times)
        self.received = {"chs_info": chs_info, "sfreq": sfreq, **more}


class Dense(Plain):
    """Answers every sample."""

    def forward(self, x):
        return super().forward(x)[:, :, None].expand(-1, -1, 3)


class Failing(Plain):
    """Is built, but cannot run."""

    def forward(self, x):
        raise RuntimeError("kernel larger than input")


@pytest.fixture
def fake(monkeypatch):
    package, models = ModuleType("braindecode"), ModuleType("braindecode.models")
    for cls in (Plain, Placed, Dense, Failing):
        setattr(models, cls.__name__, cls)
    models.build_model_config = lambda: None
    models.models_mandatory_parameters = []
    package.models = models
    monkeypatch.setitem(sys.modules, "braindecode", package)
    monkeypatch.setitem(sys.modules, "braindecode.models", models)
    return models


def make_signal(**more):
    names = ("Fz", "Cz", "Oz")
    places = np.arange(9.0).reshape(3, 3) / 100
    known = {"ch_names": names, "ch_pos": places, "sfreq": 100.0} | more
    return Signal(("channel", "time"), (3, 20), ("01",), **known)


def test_builds_a_network_of_any_class(fake):
    network = BraindecodeConfig(model="Plain", settings={"depth": 3}).build(make_signal(), 5)
    assert isinstance(network.model, Plain)
    assert network.model.depth == 3
    assert network.training
    data = torch.randn(4, 3, 20)
    assert network(data, SUBJECT).shape == (4, 5)
    torch.testing.assert_close(network.eval()(data, SUBJECT), network.model(data))


def test_the_trial_run_leaves_the_statistics_alone(fake):
    network = BraindecodeConfig(model="Plain").build(make_signal(), 5)
    assert float(network.model.norm.running_mean.abs().max()) == 0
    assert int(network.model.norm.num_batches_tracked) == 0


def test_passes_what_the_class_asks_for(fake):
    settings = {"embedding": 7}
    received = BraindecodeConfig(model="Placed", settings=settings).build(make_signal(), 5).model.received
    assert received["sfreq"] == 100.0
    assert received["embedding"] == 7
    assert [channel["ch_name"] for channel in received["chs_info"]] == ["Fz", "Cz", "Oz"]
    np.testing.assert_allclose([c["loc"][:3] for c in received["chs_info"]], make_signal().ch_pos)
    bare = BraindecodeConfig(model="Placed").build(make_signal(sfreq=None, ch_names=()), 5).model.received
    assert bare == {"chs_info": None, "sfreq": None}


@pytest.mark.parametrize(
    "model, settings, message",
    [
        ("Plian", {}, r"no such network \(did you mean 'Plain'\?\); it has Dense, Failing, Placed, Plain"),
        ("build_model_config", {}, "no such network"),
        ("Plain", {"dept": 2}, r"no setting 'dept' \(did you mean 'depth'\?\)"),
        ("Plain", {"n_outputs": 2}, "the responses and the target define"),
        ("Plain", {"depth": 9}, "cannot be built for 3 channels x 20 samples.*at most 4"),
        ("Dense", {}, r"must return for 2 trials an array of shape \(2, 5\), but gives \(2, 5, 3\)"),
        ("Failing", {}, "fails on a trial of 3 channels x 20 samples: kernel larger than input"),
    ],
)
def test_what_does_not_fit_is_said(fake, model, settings, message):
    with pytest.raises(ConfigError, match=message):
        BraindecodeConfig(model=model, settings=settings).build(make_signal(), 5)


def test_other_axes_are_refused(fake):
    with pytest.raises(DataError, match="channel axis"):
        BraindecodeConfig(model="Plain").build(Signal(("voxel",), (20,), ("01",)), 5)


def test_missing_extra_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "braindecode", None)
    monkeypatch.setitem(sys.modules, "braindecode.models", None)
    with pytest.raises(ConfigError, match=r"pip install 'braindecode_vis\[braindecode\]'"):
        find_model("EEGNet")


@pytest.mark.parametrize(
    "error", ["OSError('libtorch_cuda.so: not found')", "ModuleNotFoundError('x', name='skorch')"]
)
def test_an_installation_that_does_not_load_is_explained(monkeypatch, tmp_path, error):
    """torchaudio of another build than torch fails with an OSError while braindecode is being imported."""
    package = tmp_path / "braindecode"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(f"raise {error}\n")
    for name in ("braindecode", "braindecode.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"does not load.*CPU build"):
        find_model("EEGNet")
    for name in ("braindecode", "braindecode.models"):
        sys.modules.pop(name, None)


def test_settings_enter_the_fingerprint():
    fields = BraindecodeConfig(model="EEGConformer", settings={"n_layers": 2}).hashed_fields()
    assert fields == {"kind": "braindecode", "model": "EEGConformer", "settings": {"n_layers": 2}}
