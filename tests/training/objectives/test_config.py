"""The contract that every objective keeps."""

import dataclasses
import subprocess
import sys
import typing

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.registry import Component, find_component, list_inside
from braindecode_vis.training.objectives.objective import NEED_FIELDS, Outputs, StepSizes
from braindecode_vis.training.objectives.objectives_config import ClipObjectiveConfig

ADAPTER = TypeAdapter(typing.Annotated[typing.Any, Component("objective")])
CONFIGS = [find_component("objective", kind)() for kind in list_inside("objective")]
CONFIGS += [
    ADAPTER.validate_python(extra)
    for extra in (
        {
            "kind": "clip",
            "scale": "softplus",
            "symmetric": False,
            "normalise_brain": False,
            "duplicates": "mask",
        },
        {"kind": "siglip", "duplicates": "mask"},
        {"kind": "uniformity", "between": "cross"},
        {"kind": "cua", "cross": True},
        {"kind": "multiview", "form": "infonce", "views": ["brain", "image"]},
        {"kind": "distillation", "duplicates": "mask"},
        {"kind": "hydra", "classes": "attributes", "unit": False, "partner": "arbitrary"},
        {"kind": "composition", "duplicates": "mask", "symmetric": False},
        {"kind": "sentence_contrast", "form": "margin"},
        {"kind": "sentence_contrast", "passes": "halves"},
    )
]
NAMES = [f"{config.kind}-{index}" for index, config in enumerate(CONFIGS)]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)


def make_outputs(n=8, d=6, *, dtype=torch.float64, n_views=2, n_queue=3, progress=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    stimuli = torch.arange(n) % max(1, n - 2)
    image = make(n, d)[stimuli]
    brain = image + make(n, d)
    concepts = stimuli // 2
    tensors = {
        "brain": brain, "image": image, "text": make(n, d)[concepts],
        "regression": make(n, d + 1), "raw_target": make(n, d + 1)[stimuli],
        "brain_views": brain + make(n_views, n, d), "image_views": image + 0.1 * make(n_views, n, d),
        "brain_tokens": brain[:, None] + make(n, N_TOKENS, d), "background": make(n, d),
        "teacher_brain": image + make(n, d), "teacher_image": image + 0.1 * make(n, d),
        "queue_brain": make(n_queue, d), "queue_image": make(n_queue, d),
        "token_views": brain[:, None] + make(2, n, N_TOKENS, d), "token_offsets": 20 * make(2, n),
        "teacher_tokens": brain[:, None] + make(2, n, N_TOKENS, d),
        "mix_weight": torch.rand(n, generator=generator), "sentences": make(n, N_SENTENCE)[stimuli],
        "swapped": make(n, 2, N_SENTENCE)[stimuli],
    }  # fmt: skip
    return Outputs(
        **{name: tensor.to(dtype) for name, tensor in tensors.items()},
        stimuli=stimuli, concepts=concepts, clusters=stimuli % 2, mix_partner=torch.arange(n).roll(3),
        progress=progress, swapped_known=torch.arange(2 * n).view(n, 2)[stimuli] % 3 > 0,
        # START, one to three words, END, PAD
        words=torch.tensor([[1, 3, 2, 0, 0], [1, 4, 5, 2, 0], [1, 6, 3, 4, 2]])[stimuli % 3],
        attributes=torch.stack([concepts % 4 - 1, stimuli % 2], dim=1),
    )  # fmt: skip


N_TOKENS, N_SENTENCE = 3, 5


def build(config, d=6, dtype=torch.float64):
    """Return the objective, with weights for `make_outputs` where it has any."""
    objective = config.build()
    if objective.has_sizes:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            objective.prepare(
                StepSizes(
                    n_common=d,
                    n_outputs=d,
                    n_tokens=N_TOKENS,
                    token_step=20.0,
                    n_sentence=N_SENTENCE,
                    n_concepts=2048,
                    attribute_names=("colour", "place"),
                    attribute_values=(3, 2),
                    n_words=7,
                    max_words=5,
                    target_shape=(d + 1,),
                )
            )
        objective.to(dtype)
    # without its dropout
    objective.train(config.kind != "captioning")
    return objective


def name_leaf(config):
    """Return the field of the outputs through which the loss reaches the network."""
    for name in ("regression", "token_views"):
        if name in config.needs:
            return name
    if "local_outputs" in config.needs:
        return "brain_tokens"
    return "brain_views" if getattr(config, "passes", "") == "halves" else "brain"


def permute(outputs, order):
    changed = dataclasses.replace(outputs)
    for field in dataclasses.fields(outputs):
        value = getattr(outputs, field.name)
        if not torch.is_tensor(value) or field.name.startswith("queue"):
            continue
        of_views = field.name.endswith("_views") or field.name in ("token_offsets", "teacher_tokens")
        setattr(changed, field.name, value[:, order] if of_views else value[order])
    changed.mix_partner = order.argsort()[changed.mix_partner]
    return changed


def test_config_imports_without_torch():
    code = (
        "import sys, braindecode_vis.training.objectives.objectives_config; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@every_config
def test_round_trip_through_json(config):
    again = ADAPTER.validate_json(config.model_dump_json())
    assert again == config
    assert again.hashed_fields() == config.hashed_fields()


@every_config
def test_needs_are_known_fields_of_outputs(config):
    fields = {field.name for field in dataclasses.fields(Outputs)}
    assert config.needs <= NEED_FIELDS.keys()
    assert all(name in fields for need in config.needs for name in NEED_FIELDS[need])


@every_config
def test_only_declared_outputs_are_used(config):
    """With everything else None the value is the same; with one need missing there is one clear sentence."""
    outputs = make_outputs()
    wanted = {name for need in config.needs for name in NEED_FIELDS[need]}
    optional = {name for names in NEED_FIELDS.values() for name in names}
    bare = dataclasses.replace(outputs, **dict.fromkeys(optional - wanted))
    objective = build(config)
    assert torch.equal(objective(bare), objective(outputs))
    for name in wanted:
        with pytest.raises(DataError, match=name):
            objective(dataclasses.replace(outputs, **{name: None}))


@every_config
def test_gradient_reaches_the_network_and_every_parameter(config):
    outputs = make_outputs()
    leaf = getattr(outputs, name_leaf(config)).requires_grad_()
    objective = build(config)
    value = objective(outputs)
    assert value.shape == ()
    value.backward()
    assert float(leaf.grad.abs().max()) > 0
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in objective.parameters())


@every_config
def test_gradient_is_right(config):
    if config.kind == "salient":  # the size that salient parts are divided by has no gradient
        config = config.model_copy(update={"scale": False})
    outputs = make_outputs(5, 4)
    name, objective = name_leaf(config), build(config, 4)

    def compute(tensor):
        return objective(dataclasses.replace(outputs, **{name: tensor}))

    assert torch.autograd.gradcheck(
        compute, getattr(outputs, name).requires_grad_(), eps=1e-7, atol=1e-4, rtol=1e-4
    )


# Of `diffusion_prior`, steps and noise are drawn for the place of a row; test_joint compares given ones.
@pytest.mark.parametrize(
    "config",
    [config for config in CONFIGS if config.kind != "diffusion_prior"],
    ids=lambda config: config.kind,
)
def test_order_of_trials_does_not_matter(config):
    if hasattr(config, "partner"):  # what is drawn for a row is another where the rows are in another order
        config = config.model_copy(update={"partner": "identical", "classes": "concepts"})
    outputs = make_outputs()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    objective = build(config)
    assert objective(permute(outputs, order)).item() == pytest.approx(objective(outputs).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "d"), [(256, 512), pytest.param(2048, 1024, marks=pytest.mark.slow)], ids=["small", "large"]
)
@every_config
def test_bfloat16_agrees_with_float32(config, n, d):
    """Rounding outputs to 8 bits moves a cosine by about 1e-4, which a temperature of 0.004 makes 0.03 of a logit."""
    outputs = make_outputs(n, d, dtype=torch.float32, n_views=1, n_queue=n // 8)
    rounded = dataclasses.replace(outputs)
    for field in dataclasses.fields(outputs):
        value = getattr(outputs, field.name)
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(rounded, field.name, value.bfloat16())
    objective = build(config, d, torch.float32)
    with torch.no_grad():
        exact = objective(outputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = objective(rounded)
    assert value.dtype == torch.float32
    # The discrepancy of two such clouds is next to nothing, and what is left of it rounding.
    absolute = 1e-4 if config.kind == "mmd" else 1e-12
    relative = 1e-2 if config.kind == "soft_clip" else 2e-3
    assert float(value) == pytest.approx(float(exact), rel=relative, abs=absolute)


@every_config
def test_a_batch_of_one_image_is_refused(config):
    objective = build(config)
    for n, what in ((1, "has 1 trial"), (3, "has 3 trial")):
        outputs = make_outputs(n)
        outputs.stimuli = torch.zeros(n, dtype=torch.long)
        if config.contrastive:
            with pytest.raises(DataError, match=f"at least two different images.*{what}"):
                objective(outputs)
        else:
            assert torch.isfinite(objective(outputs))


@every_config
def test_one_device_throughout_and_no_wait_for_it(config):
    """The meta device refuses tensors of another device, and any look at a value, which on a GPU stops the queue."""
    outputs = make_outputs()
    for field in dataclasses.fields(outputs):
        value = getattr(outputs, field.name)
        if torch.is_tensor(value):
            setattr(outputs, field.name, value.to("meta"))
    assert build(config).to("meta")(outputs).shape == ()


@every_config
def test_outside_its_phase_an_objective_is_a_zero_with_gradient(config):
    config = config.model_copy(update={"phase": (0.4, 0.6)})
    objective = build(config)
    outputs = make_outputs(progress=0.6)
    outputs.brain.requires_grad_()
    value = objective(outputs)
    value.backward()
    assert value.item() == 0.0
    assert float(outputs.brain.grad.abs().max()) == 0.0
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert objective(make_outputs(progress=0.4)).item() != 0.0


def test_successive_phases_neither_overlap_nor_leave_a_gap():
    first, second = ClipObjectiveConfig(phase=(0.0, 0.33)), ClipObjectiveConfig(phase=(0.33, 1.0))
    for progress in (0.0, 0.1, 0.33, 0.9, 1.0):
        assert first.is_active(progress) + second.is_active(progress) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "clip", "phase": [0.5, 0.5]}, "start before it ends"),
        ({"kind": "clip", "temperature": 0.0}, "greater than 0"),
        ({"kind": "clip", "weight": -1}, "greater than 0"),
        ({"kind": "clip", "temprature": 0.1}, "unknown key temprature"),
        ({"kind": "distillation", "temperature": 0.9}, "temperature was removed: it is always 0.07"),
        ({"kind": "multiview", "views": ["brain", "brain"]}, "each once"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(options)


@every_config
def test_state_of_the_module_can_be_stored(config):
    source, copy = build(config), build(config)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(0.9)
    copy.load_state_dict(source.state_dict())
    outputs = make_outputs()
    assert torch.equal(copy(outputs), source(outputs))
