"""A fitted network for any montage, and NeuralBench's own check and networks where that package is installed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from tests.training.toy_task import make_config, make_task

POSITIONS = np.array([[0.0, 0.1, 0.0], [0.1, 0.0, 0.0], [0.0, -0.1, 0.0], [-0.1, 0.0, 0.0]])
PAGE = Path(__file__).parents[2] / "docs" / "OUTSIDE.md"


def make_placed_task(**settings):
    responses, targets = make_task(**settings)
    coords = {**responses.coords, "ch_pos": POSITIONS, "ch_names": list("abcd")}
    return Responses(responses.data, responses.dims, responses.trials, responses.unit, coords), targets


@pytest.fixture(scope="module")
def fitted():
    responses, targets = make_placed_task()
    return responses, targets, make_config().build(seed=0).fit(responses, targets)


def test_any_channels_and_lengths_give_one_vector_each(fitted):
    """The probes of NeuralBench's `check_model` for its image task: 3, 19, 64 and 128 channels of 120 samples."""
    model = fitted[2].as_any_montage()
    for n_channels in (3, 19, 64, 128):
        data, positions = torch.randn(2, n_channels, 120), torch.randn(2, n_channels, 3)
        with torch.no_grad():
            out = model(data, channel_positions=positions)
        assert out.shape == (2, 6)
        assert torch.isfinite(out).all()


def test_the_own_montage_is_found_again_and_units_of_positions_play_no_part(fitted):
    responses, _, encoder = fitted
    model = encoder.as_any_montage()
    data = torch.from_numpy(np.array(responses.data[:5]))
    own = torch.from_numpy(POSITIONS).float().expand(5, -1, -1)
    with torch.no_grad():
        near, plain = model(data, own), model(data)
        torch.testing.assert_close(near, plain, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(model(data, 1000 * own + 3), near, atol=1e-4, rtol=1e-4)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(model(data[:, order], own[:, order]), near, atol=1e-5, rtol=1e-5)
        # in other units, and seen twice as often, the trials are the same
        torch.testing.assert_close(model(7 * data + 2), plain, atol=1e-3, rtol=1e-3)


def test_without_positions_or_with_aligned_subjects_it_is_refused(fitted):
    responses, targets = make_task()
    with pytest.raises(DataError, match="with known positions"):
        make_config().build(seed=0).fit(responses, targets).as_any_montage()
    responses, targets = make_placed_task()
    aligned = make_config(subject_alignment="zscore").build(seed=0).fit(responses, targets)
    with pytest.raises(DataError, match="subject_alignment none"):
        aligned.as_any_montage()


def test_neuralbench_accepts_our_encoders(fitted):
    """Version 0.4.0 under Python 3.11, beside torch for CPUs: all four rows of EEG and of MEG are ok."""
    neuralbench = pytest.importorskip(
        "neuralbench", reason="the extra neuralbench needs Python 3.12 or later"
    )
    if not hasattr(neuralbench, "check_model"):
        pytest.skip("this version of neuralbench has no check_model")
    model = fitted[2].as_any_montage()
    for device in ("eeg", "meg"):
        rows = neuralbench.check_model(model, device, "image")
        assert list(rows["status"]) == ["ok"] * 4


def test_networks_of_neuraltrain_train_here():
    """The module that docs/OUTSIDE.md shows, unchanged."""
    pytest.importorskip("neuraltrain.models", reason="the extra neuralbench needs Python 3.12 or later")
    (text,) = re.findall(r"```python\n# neuraltrain_nets\.py\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict = {"__name__": "neuraltrain_nets"}
    exec(text, names)
    places = {"n_virtual_channels": 8, "fourier_emb_config": {"n_freqs": None, "total_dim": 54, "n_dims": 3}}
    model = {"name": "SimpleConvTimeAgg", "hidden": 8, "time_agg_out": "linear", "merger_config": places}
    network = names["NeuralTrainConfig"](model=model)
    responses, targets = make_placed_task()
    config = make_config()
    encoder = config.model_copy(update={"network": network}).build(seed=0).fit(responses, targets)
    assert encoder.predict(responses).vectors.shape == (48, 6)
