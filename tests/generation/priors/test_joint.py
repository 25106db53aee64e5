"""The prior that MindEye2 trains with its encoder: its arithmetic, its training, its files and its sentences."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Context, Prior
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.cli import main
from braindecode_vis.config import read_config
from braindecode_vis.generation.priors.diffusion import compute_clean_loss
from braindecode_vis.generation.priors.diffusion_config import (
    DiffusionPriorConfig,
    DiffusionPriorObjectiveConfig,
    JointPriorConfig,
)
from braindecode_vis.generation.priors.diffusion_networks import BrainTokenTransformer
from braindecode_vis.generation.priors.sampling import NoiseSchedule, draw_samples, guide_network
from braindecode_vis.pipeline.reconstruction import read_fits
from braindecode_vis.training.loop import make_optimiser
from braindecode_vis.training.optimisation import OptimiserConfig
from tests.constants import replace_constants
from tests.training.toy_task import assert_same_weights, get_weights, make_config, make_task

SCHEDULE = NoiseSchedule(100, "squaredcos_cap_v2", "sample")
#: What the public code gave in double precision; see the test that reads it.
PUBLIC = {
    "loss": 37.688160341915825,
    "gradients": {
        "places": 10.877456736899537, "absent": 17.75755226819996, "hidden": 10.25214196279149,
        "distances.weight": 0.5925829574370534, "norm.gain": 3.2338014993533393, "exit.weight": 14.500116886247806,
        "time.0.weight": 1.8194021162904415, "time.0.bias": 0.7003977297146224, "time.2.weight": 2.309380679337872,
        "time.2.bias": 2.679701304957523, "time.4.weight": 3.269038282215822, "time.4.bias": 8.473003668694053,
        "attention.0.norm.gain": 5.3624855645702825, "attention.0.first": 3.545907794058157,
        "attention.0.query.weight": 34.28320060529789, "attention.0.key_value.weight": 42.953308044542716,
        "attention.0.exit.weight": 17.76170329402882, "attention.0.exit_norm.gain": 1.511522681142596,
        "mixing.0.norm.gain": 0.20542953828227398, "mixing.0.entry.weight": 1.7298416453713092,
        "mixing.0.exit.weight": 1.3162691277047136, "attention.1.norm.gain": 1.8810506794648774,
        "attention.1.first": 1.0445621129200342, "attention.1.query.weight": 12.156686086170827,
        "attention.1.key_value.weight": 15.90019711020503, "attention.1.exit.weight": 7.279802140661583,
        "attention.1.exit_norm.gain": 0.7186584020172692, "mixing.1.norm.gain": 0.050936809366167596,
        "mixing.1.entry.weight": 0.5202541814391318, "mixing.1.exit.weight": 0.3796861346439916,
    },
    "brain gradients": [26.013345573121036, 9.793536718129113],
    "weights": {
        "places": 2.10203619261627, "absent": -0.5485056554951544, "hidden": -1.11122615573951,
        "distances.weight": 0.525236847429549, "norm.gain": -3.485361826573005, "exit.weight": -0.50445415320407,
        "time.0.weight": 2.1746408901920304, "time.0.bias": 0.5201663197908292, "time.2.weight": -4.298094141031201,
        "time.2.bias": 0.6523997772603058, "time.4.weight": 0.9530435927221608, "time.4.bias": 0.16506934142976767,
        "attention.0.norm.gain": -3.481664207603051, "attention.0.first": 0.2052552067402501,
        "attention.0.query.weight": -2.2103185543273174, "attention.0.key_value.weight": 0.7837629586348019,
        "attention.0.exit.weight": -0.8032956046918704, "attention.0.exit_norm.gain": -3.789912526786673,
        "mixing.0.norm.gain": -3.6139435415526444, "mixing.0.entry.weight": 0.818082440054031,
        "mixing.0.exit.weight": -0.9301796906202633, "attention.1.norm.gain": -3.839885523875964,
        "attention.1.first": 0.09183301122122003, "attention.1.query.weight": -0.4229183646195074,
        "attention.1.key_value.weight": -0.8026492697608739, "attention.1.exit.weight": 0.4584996219956978,
        "attention.1.exit_norm.gain": -3.4780076676223786, "mixing.1.norm.gain": -3.752032587573238,
        "mixing.1.entry.weight": 5.2279132674961355, "mixing.1.exit.weight": -1.1511977038609522,
    },
    "samples": [
        8.783410379316061, -13.255246000723663, 5.680573220443873, 1.463126666348824, 1.6314237918820518,
        9.588181237333652,
    ],
}  # fmt: skip


def compute_cosine_signal(n=100):
    """Nichol and Dhariwal's schedule, from its formula, in double precision."""
    bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return torch.from_numpy(np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999)))


def fill(module):
    """Weights that a program without torch can make again."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
            draws = np.random.default_rng(number).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(0.1 * draws + name.endswith("gain")))


def draw(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.fixture
def double(monkeypatch):
    """Double precision: with random weights, twenty steps make 3e-4 of a difference of 1e-7 in their start."""
    torch.set_default_dtype(torch.float64)
    signal = compute_cosine_signal()
    monkeypatch.setattr(NoiseSchedule, "compute_signal", lambda self, device="cpu": signal)
    yield
    torch.set_default_dtype(torch.float32)


class Step(nn.Module):
    """A linear encoder with the prior as its only objective, as `make_optimiser` sees a model."""

    fusion = tower = shared_projector = None

    def __init__(self, n_inputs, n_tokens, n_features, **sizes):
        super().__init__()
        self.brain = nn.Linear(n_inputs, n_tokens * n_features)
        objective = nn.Module()
        objective.term = nn.Module()
        objective.term.network = BrainTokenTransformer(n_tokens, n_features, **sizes)
        objective.term.parameter_groups = objective.term.network.parameter_groups
        self.objectives = nn.ModuleList([objective])
        self.network = objective.term.network

    @property
    def whole_network(self):
        return self

    def parameter_groups(self):
        return [{"params": [self.brain.weight]}, {"params": [self.brain.bias], "weight_decay": 0.0}]


def test_loss_update_and_samples_are_those_of_the_public_code(double):
    """The figures are those of MedARC-AI/MindEyeV2@c184718 with dalle2-pytorch 1.15.6 and the same weights.

    12 tokens of 16 features, two layers, three heads of 8; four trials, one without a condition and one without what
    was noised; AdamW of both in the groups of its notebook, at 30 times the loss; 20 of 100 steps. Run side by side in
    double precision, the two agree to 2e-16 in the loss, 1e-14 in gradients, 2e-13 in weights after the update and 4e-8
    in samples at worst of six networks of three sizes; 1e-6 here is room for other processors. In single precision:
    2e-7 in the loss and 3e-5 of the largest gradient of a tensor. Samples of random weights part there as much as when
    their start moves by 1e-7, and by 8e-6 where weights are small and tokens many.
    """
    n, n_tokens, n_features = 4, 12, 16
    model = Step(7, n_tokens, n_features, depth=2, n_heads=3, head_width=8)
    network = model.network
    fill(network)
    fill(model.brain)
    optimiser = make_optimiser(OptimiserConfig(kind="adamw", lr=3e-4, weight_decay=0.01), model)
    voxels, clean, noise = (
        draw(100, n, 7),
        draw(101, n, n_tokens, n_features),
        draw(102, n, n_tokens, n_features),
    )
    times = torch.from_numpy(np.random.default_rng(103).integers(0, 100, n))
    times[0], times[1] = 99, 0
    keep, keep_noised = torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 1, 0, 1])
    condition = model.brain(voxels).unflatten(1, (n_tokens, n_features))
    loss = 30 * compute_clean_loss(network, condition, clean, SCHEDULE, times, noise, keep, keep_noised)
    loss.backward()
    parameters = dict(network.named_parameters())
    near = {"rel": 1e-6, "abs": 1e-8}
    assert float(loss.detach()) == pytest.approx(PUBLIC["loss"], **near)
    got = {name: float(parameter.grad.norm()) for name, parameter in parameters.items()}
    assert got == pytest.approx(PUBLIC["gradients"], **near)
    brain = [float(parameter.grad.norm()) for parameter in model.brain.parameters()]
    assert brain == pytest.approx(PUBLIC["brain gradients"], **near)  # the loss reaches the encoder
    optimiser.step()
    got = {name: float((p.detach() * draw(300, *p.shape)).sum()) for name, p in parameters.items()}
    assert got == pytest.approx(PUBLIC["weights"], **near)
    with torch.no_grad():
        condition = model.brain(voxels).unflatten(1, (n_tokens, n_features))
        generator = torch.Generator().manual_seed(5)
        start = torch.randn(condition.shape, generator=generator)
        samples = draw_samples(
            guide_network(network, condition, 1.0), start, SCHEDULE, sampler="stochastic-ddim", n_steps=20,
            generator=generator,
        )  # fmt: skip
    got = [float((samples * draw(200 + i, *samples.shape)).sum()) for i in range(6)]
    assert got == pytest.approx(PUBLIC["samples"], **near)


def test_the_schedule_is_the_cosine_of_its_paper():
    """Single precision; the last step keeps 2e-8 of the signal, of which rounding is more."""
    own, wanted = SCHEDULE.compute_signal().double(), compute_cosine_signal()
    np.testing.assert_allclose(own[:-1], wanted[:-1], rtol=1e-6)
    np.testing.assert_allclose(own[-1], wanted[-1], rtol=1e-4)


def test_twenty_of_a_hundred_steps_are_nineteen_calls_from_94_to_4():
    asked = []

    def predict(rows, timestep):
        asked.append(int(timestep))
        return torch.zeros_like(rows)

    drawn = draw_samples(predict, torch.ones(1, 3), SCHEDULE, sampler="stochastic-ddim", n_steps=20)
    assert (asked[0], asked[-1], len(asked)) == (94, 4, 19)
    assert not drawn.any()  # the last prediction is the sample


# --- trained with an encoder --------------------------------------------------------------------------------

PRIOR = {"kind": "diffusion_prior"}


@pytest.fixture(autouse=True, scope="module")
def _small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"depth": 1, "heads": 2, "head_width": 4}.items():
            patch.setattr(DiffusionPriorObjectiveConfig, name, value)
        yield


@pytest.fixture(scope="module")
def trained():
    responses, targets = make_task(n_images=40, noise=0.5)
    config = make_config(objectives=[{"kind": "clip"}, PRIOR], epochs=60, normalise_targets="none")
    return config.build(seed=0).fit(responses, targets), responses, targets


def bind(encoder, **settings):
    prior = JointPriorConfig(**settings).build()
    prior.bind(Context(encoder=encoder, device="cpu"))
    return prior


def test_the_encoder_trains_the_prior_and_samples_lie_near_their_images(trained):
    encoder, responses, targets = trained
    prior = bind(encoder).fit(None, targets)
    assert isinstance(prior, Prior)
    predicted = encoder.predict_for_generator(responses)
    drawn = prior.sample(predicted, n_draws=2, seed=0)
    assert drawn.ids.tolist() == np.repeat(predicted.ids, 2).tolist()
    apart = np.linalg.norm(drawn.vectors[::2] - targets.vectors, axis=1).mean()
    # Of trials that were learnt from; any other image of six features is 2 sqrt(3) away.
    assert apart < 0.6 * 2 * np.sqrt(3)
    assert np.abs(drawn.vectors[0] - drawn.vectors[1]).max() > 0
    again = prior.sample(predicted, n_draws=2, seed=0)
    np.testing.assert_array_equal(drawn.vectors, again.vectors)
    assert prior.describe()["trained"] == "with the brain encoder"
    losses = [record["objectives"]["diffusion_prior"] for record in encoder.fitted.history]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def test_its_loss_alone_moves_the_encoder():
    """What trains after the encoder would leave it as it was."""
    responses, targets = make_task()
    untrained, trained = (
        make_config(objectives=[PRIOR], optimiser={"lr": lr}, epochs=1).build(seed=0).fit(responses, targets)
        for lr in (1e-12, 1e-3)
    )
    before, after = get_weights(untrained), get_weights(trained)
    own = [name for name in before if name.startswith("network.") and "weight" in name]
    assert all(np.abs(after[name] - before[name]).max() > 1e-5 for name in own)


def test_weight_decay_spares_biases_alone():
    network = BrainTokenTransformer(2, 4, depth=1, n_heads=1, head_width=4)
    decays, spared = network.parameter_groups()
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {
        "distances.weight", "time.0.bias", "time.2.bias", "time.4.bias",
    }  # fmt: skip
    assert spared["weight_decay"] == 0
    assert "weight_decay" not in decays
    assert len(decays["params"]) + len(spared["params"]) == len(names)


def test_a_killed_training_goes_on_to_the_same_prior(tmp_path):
    responses, targets = make_task()
    config = make_config(objectives=[{"kind": "clip"}, PRIOR], checkpoint_seconds=0)

    class Killed(Exception):
        pass

    def stop(done, total, text):
        if done == 4:
            raise Killed

    whole = config.build(seed=0).fit(responses, targets)
    encoder = config.build(seed=0)
    encoder.workspace, encoder.progress = tmp_path, stop
    with pytest.raises(Killed):
        encoder.fit(responses, targets)
    again = config.build(seed=0)
    again.workspace = tmp_path
    assert_same_weights(again.fit(responses, targets), whole)


def test_fitted_priors_and_encoders_are_read_as_they_were_written(trained, tmp_path):
    encoder, responses, targets = trained
    prior = bind(encoder).fit(None, targets)
    prior.write(tmp_path)
    predicted = encoder.predict_for_generator(responses)
    expected = prior.sample(predicted, n_draws=1, seed=3)
    read = JointPriorConfig().read(tmp_path)
    np.testing.assert_array_equal(read.sample(predicted, n_draws=1, seed=3).vectors, expected.vectors)
    folder = tmp_path / "encoder"
    folder.mkdir()
    encoder.write(folder)
    of_file = bind(encoder.config.read(folder)).fit(None, targets)
    np.testing.assert_array_equal(of_file.sample(predicted, n_draws=1, seed=3).vectors, expected.vectors)


def test_the_network_serves_a_prior_that_is_trained_afterwards():
    """Its heads divide the width of a token, and the rest of MindEye2's recipe are settings of ``diffusion``."""
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(40)]
    target = Embeddings(rng.standard_normal((40, 4)).astype(np.float32), ids, "toy")
    predicted = Embeddings(0.5 * target.vectors, ids, "toy")
    config = replace_constants(DiffusionPriorConfig, depth=1)(
        network="mindeye2", heads=2, prediction="sample", betas="squaredcos_cap_v2", timesteps=100,
        sampler="stochastic-ddim", steps=10, guidance=1, epochs=1, min_steps=300, batch_size=40,
        held_out=0, device="cpu", ema_decay=0.9,
        warmup_steps=10, learning_rate=5e-3,
    )  # fmt: skip
    drawn = config.build(seed=0).fit(predicted, target).sample(predicted, n_draws=1, seed=0)
    cosine = (
        (drawn.vectors * target.vectors).sum()
        / np.linalg.norm(drawn.vectors)
        / np.linalg.norm(target.vectors)
    )
    assert cosine > 0.3  # chance 0 with a deviation of 0.08; the training is short


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_prior_without_its_training_is_refused(trained):
    encoder, _, targets = trained
    plain = make_config(objectives=[{"kind": "clip"}], epochs=1).build(seed=0).fit(*make_task())
    for other in (None, plain):
        with pytest.raises(ConfigError, match="this encoder trains none; add"):
            bind(other).fit(None, targets)
    with pytest.raises(
        ConfigError, match=r"prior.steps is 100, but the prior was trained on a schedule of 100"
    ):
        bind(encoder, steps=100).fit(None, targets)
    wider = Embeddings(np.zeros((2, 7), np.float32), ["a", "b"], "toy")
    with pytest.raises(
        DataError, match=r"trained a prior of embeddings of shape \(6,\), but those of 'toy' have"
    ):
        bind(encoder).fit(None, wider)
    with pytest.raises(DataError, match="has no network yet"):
        bind(encoder).sample(targets, n_draws=1, seed=0)
    with pytest.raises(DataError, match="trained in the space 'toy' with rows of shape"):
        bind(encoder).fit(None, targets).sample(wider, n_draws=1, seed=0)


def test_files_of_another_prior_are_refused(trained, tmp_path):
    encoder, _, targets = trained
    prior = bind(encoder).fit(None, targets)
    (tmp_path / "prior").mkdir()
    prior.write(tmp_path / "prior")
    other = read_config("synthetic_digits", ["prior.kind=diffusion"])
    with pytest.raises(
        DataError, match=r"holds a prior of kind joint_diffusion, but prior.kind of this run is diffusion"
    ):
        read_fits(tmp_path, other.model_copy(update={"generator": FakeGenerator()}), None)
    about = {
        **read_json(tmp_path / "prior" / "prior.json"),
        "network": {"depth": 2, "n_heads": 2, "head_width": 4},
    }
    write_json(tmp_path / "prior" / "prior.json", about)
    with pytest.raises(DataError, match=r"prior.safetensors is of another architecture \(it is missing"):
        JointPriorConfig().read(tmp_path / "prior")


class FakeGenerator:
    kind = "fake"

    def build(self, data):
        return self

    def hashed_fields(self):
        return {}

    def accepts(self, space):
        return True

    def generate(self, embeddings, *, seed):
        raise NotImplementedError


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            ["prior.kind=joint_diffusion"],
            "samples with a network that the brain encoder trains, but this encoder",
        ),
        (
            ["prior.kind=joint_diffusion", "prior.guidance=3"],
            "unknown key prior.guidance; known here are kind, steps; it is a setting of the prior diffusion",
        ),
        (
            ["prior.kind=diffusion", "prior.network=mindeye2", "prior.time_features=8"],
            "time_features is 8, but it has no effect",
        ),
        (
            ["prior.kind=diffusion", "prior.sampler=stochastic-ddim", "prior.spacing=leading"],
            "spacing is 'leading'",
        ),
        (["prior.kind=joint_diffusion", "prior.steps=1"], "prior.steps"),
    ],
)
def test_settings_of_the_other_prior_end_in_one_sentence(changes, sentence, tmp_path, monkeypatch, capsys):
    words = [word for change in changes for word in ("--set", change)]
    command = ["braindecode-vis", "run", "synthetic_digits", "--out", str(tmp_path), *words]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert sentence in told
    assert "Traceback" not in told


def test_settings_name_what_they_need():
    assert DiffusionPriorObjectiveConfig().needs == {"regression"}
    assert not DiffusionPriorObjectiveConfig().contrastive
    with pytest.raises(ValueError, match=r"needs prior.steps of 2 or more"):
        DiffusionPriorConfig(sampler="stochastic-ddim", steps=1)
