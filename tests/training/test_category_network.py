import numpy as np
import pytest
from pydantic import ValidationError

from braindecode_vis.base.checks import DataError
from braindecode_vis.config import RunConfig
from braindecode_vis.training.category_network import NetworkCategoriesConfig
from tests.encoders.test_categories import make_trials
from tests.references import assert_close


def make_config(**changes):
    network = {"kind": "eegproject", "width": 16}
    content = {"network": network, "size": 8, "epochs": 20, "optimiser": {"lr": 3e-3}, "device": "cpu"}
    return NetworkCategoriesConfig.model_validate({**content, **changes})


def decode(decoder, responses):
    return np.array(decoder.classes)[decoder.decision(responses).argmax(axis=1)]


@pytest.mark.parametrize(
    ("signal", "low", "high"), [(0.0, 0.1, 0.6), (1.5, 0.9, 1.01)], ids=["nothing to find", "a clear signal"]
)
def test_classes_are_found_where_there_is_a_signal(signal, low, high):
    """The interval of chance is that of 40 trials of three classes, widely drawn."""
    responses, labels = make_trials(3, signal=signal, n_runs=1)
    decoder = make_config().build(seed=0).fit(responses.select(np.arange(80)), labels[:80])
    held = responses.select(np.arange(80, 120))
    assert low <= (decode(decoder, held) == labels[80:]).mean() <= high
    assert_close(decoder.decision(held).sum(axis=1), 1.0, scale=1)


def test_probabilities_are_a_softmax_over_the_learned_prototypes():
    responses, labels = make_trials(3, n_runs=1)
    decoder = make_config().build(seed=0).fit(responses, labels)
    fit = decoder.encoder.require_fit()
    projector = fit.model.image_projector
    prototypes = (projector.weight.T + projector.bias).detach().numpy().astype(float)
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    brain = decoder.encoder.predict(responses).vectors.astype(float)
    brain /= np.linalg.norm(brain, axis=1, keepdims=True)
    scale = np.exp(float(fit.model.objectives[0].term.scale.raw.detach()))
    weights = np.exp(scale * brain @ prototypes.T)
    # Prototypes come through single precision.
    np.testing.assert_allclose(
        decoder.decision(responses), weights / weights.sum(axis=1, keepdims=True), atol=1e-4
    )
    assert fit.held_out == ()


def test_a_seed_decides_the_decoder_which_survives_the_disk(tmp_path):
    responses, labels = make_trials(3, n_runs=1)
    config = make_config(epochs=2)
    decided = [config.build(seed=seed).fit(responses, labels) for seed in (1, 1, 2)]
    first, again, other = (decoder.decision(responses) for decoder in decided)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    decided[0].write(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    back = config.read(tmp_path)
    np.testing.assert_array_equal(back.decision(responses), first)
    assert back.classes == ("face", "house", "shoe")
    with pytest.raises(DataError, match="other settings"):
        make_config(epochs=3).read(tmp_path)


def test_bad_input_is_named():
    responses, labels = make_trials(3, n_runs=1)
    decoder = make_config().build(seed=0)
    with pytest.raises(DataError, match="labels of shape"):
        decoder.fit(responses, labels[:5])
    with pytest.raises(DataError, match="needs two classes"):
        decoder.fit(responses, np.full(120, "face"))
    with pytest.raises(DataError, match="run train first"):
        decoder.decision(responses)


def test_a_split_of_categories_takes_it_and_not_a_network_that_finds_images():
    content = {"name": "x", "dataset": {"kind": "muse_n170"}, "split": {"kind": "leave_one_run_out"}}
    assert RunConfig.model_validate({**content, "encoder": {"kind": "network_categories"}}).decodes_categories
    with pytest.raises(ValidationError, match="network_categories"):
        RunConfig.model_validate({**content, "encoder": {"kind": "network"}})


def test_a_decoder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "categories.json").write_text('{"kind": "lda", "classes": ["a", "b"]}')
    with pytest.raises(DataError, match="decoder of kind 'lda'"):
        make_config().read(tmp_path)
