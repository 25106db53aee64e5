"""In-context decoding: pictures that a new person saw, and its responses, are enough to decode it; nothing is trained.

Owns the brain encoder after BrainCoDec. Stage 1 (`voxel_context`) turns the context of a person, n pairs of
picture and response, into weights of its voxels. Stage 2 inverts them for a response: a linear inversion first, and a
set network (`set_inverter`) that corrects its direction from the best voxels. Both are learnt across people:
the prior of stage 1 from their voxels, the network first on simulated voxels and then on the people themselves, each
time with another context. The correction is used as far as it helped for images of these people that it had not learnt
from. Voxels of different people need not correspond; where they do (parcels, sensors), those of the training people
also count a little in the context of a new person, and are the context of one who gave no trial.

Departs from BrainCoDec: its stage 1 is not public and is ridge here; its network predicts the image itself, and has no
linear inversion to start from; simulated weights here have the errors of a context.

References
----------
Yu et al. (2026), BrainCoDec, arXiv:2604.08537.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import (
    Embeddings,
    Responses,
    check_target_rows,
    count_own_voxels,
    normalise_rows,
)
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import (
    NOTHING_LENT,
    BrainEncoder,
    Context,
    EncoderSettings,
    FewTrialAdaptation,
)
from braindecode_vis.base.devices import choose_device, seeded
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.settings import DeviceSettings
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.parts.foundation.models.voxel_context import (
    VoxelContext,
    VoxelModel,
    VoxelPrior,
    draw_voxels,
    learn_prior,
    make_context,
    model_voxels,
)
from braindecode_vis.preprocessing.common_space import FEW, FEWEST_IMAGES
from braindecode_vis.training.optimisation import compute_warm_cosine, optimise

if TYPE_CHECKING:
    import torch

    from braindecode_vis.parts.foundation.models.set_inverter import SetInverter

#: As in BrainCoDec: voxels and images of a step, noise of the contrast and its weight beside the cosine, weight decay.
_VOXELS, _QUERIES, _TEMPERATURE, _CONTRAST, _DECAY = (100, 200), 32, 0.2, 0.1, 0.01
_SIZES = (15, 1000)  # of the contexts that are learnt from
_MOST_VOXELS = 1000  # of a person in one step
_LEARNING_RATE = 1e-3  # BrainCoDec has 1e-5 for a network of 56 million weights and 100 000 steps
_HELD_OUT, _TRIED = (
    0.1,
    24,
)  # share of images that the network does not learn from, and steps that judge it by them
_GAINS = (0.0, 0.25, 0.5, 1.0)
# As how many trials all training people together count for a new one whose features correspond to theirs.
_OTHERS = 30.0


class InContextConfig(EncoderSettings, DeviceSettings):
    """Decode a person from a context of pictures and responses, by what was learnt across people (BrainCoDec).

    Every tested subject needs training trials, which are its context: ``split: {kind: leave_one_subject_out,
    own_trials: 60}`` gives it some. A subject with less than half as many images as the subject with most gives its
    context alone, and nothing is learnt from it. Features that correspond between subjects need no trial.

    Parameters
    ----------
    n_components
        Principal components of the training embeddings that are used; fewer if the images span fewer.
    width, n_blocks
        Of the set network; BrainCoDec has 768 and 8.
    simulated_steps, people_steps
        Steps of its training on simulated voxels, and on training subjects; 0 and 0 leave the linear inversion.
    """

    kind: Literal["in_context"] = "in_context"
    n_components: int = Field(default=128, ge=2)
    width: int = Field(default=64, ge=8, multiple_of=8)
    n_blocks: int = Field(default=2, ge=1)
    simulated_steps: int = Field(default=100, ge=0)
    people_steps: int = Field(default=100, ge=0)

    may_know_likelihood: ClassVar[bool] = False
    growth: ClassVar[float] = 1.0  # steps of the network, whose number and voxels do not depend on the trials

    def build(self, *, seed: int) -> InContextEncoder:
        """Return the unfitted encoder."""
        return InContextEncoder(self, seed=seed)


@dataclass(frozen=True)
class _Space:
    """Principal components of the target, in which image vectors have the mean square length 1."""

    mean: np.ndarray
    components: np.ndarray  # (n_components, n_targets), rows of length 1
    scale: float
    shape: tuple[int, ...]
    name: str

    def enter(self, targets: Embeddings) -> np.ndarray:
        return np.asarray((targets.flat() - self.mean) @ self.components.T / self.scale, dtype=np.float64)

    def leave(self, vectors: np.ndarray, ids: Any) -> Embeddings:
        values = (vectors * self.scale) @ self.components + self.mean
        return Embeddings(values.astype(np.float32).reshape(len(values), *self.shape), ids, self.name)


@dataclass(frozen=True)
class _Person:
    """Training trials of one subject: image vectors, responses of its own voxels, and a number for each image."""

    vectors: np.ndarray
    responses: np.ndarray
    images: np.ndarray


class InContextEncoder(BrainEncoder):
    """The brain encoder; see the module for what is learnt across people and what a context gives."""

    def __init__(self, config: InContextConfig, *, seed: int = 0) -> None:
        self.config, self.seed, self.context = config, seed, NOTHING_LENT
        self.space: _Space | None = None
        self.prior: VoxelPrior | None = None
        self.people: dict[str, VoxelContext] = {}
        self.network: SetInverter | None = None
        #: How much of the network's correction is used, and the mean cosine to images without it and with it.
        self.gain = 0.0
        self.judged: dict[str, float] = {}
        self._others: VoxelContext | None = None
        self._models: dict[str, VoxelModel] = {}

    def bind(self, context: Context) -> None:
        """Take where progress is reported."""
        self.context = context

    # --- learning across people -------------------------------------------------------------------------------

    def fit(self, responses: Responses, targets: Embeddings) -> InContextEncoder:
        """Learn across the subjects of the training trials, whose contexts these trials are.

        Parameters
        ----------
        responses
            Training trials.
        targets
            One row per trial, in the order of `responses`.
        """
        check_target_rows(responses, targets, what="in_context")
        check_memory(
            12 * responses.data.size + 24 * targets.vectors.size,
            what=f"in-context decoding of {responses.n_trials} trials of {responses.data[0].size} features",
            reduce="the subjects (--subject), or choose voxels (selection.*)",
        )
        self.space, known = _find_space(targets, self.config.n_components)
        found = _part_people(responses, self.space.enter(targets))
        self._check(found)
        self.people = {name: make_context(one.vectors, one.responses) for name, one in found.items()}
        counts = {name: len(np.unique(one.images)) for name, one in found.items()}
        taught = {name: one for name, one in found.items() if counts[name] >= FEW * max(counts.values())}
        self.prior = learn_prior(known.T @ known / len(known), [self.people[name] for name in taught])
        self._others = None if count_own_voxels(responses) else _join([self.people[name] for name in taught])
        self._models = {}
        if self.config.simulated_steps + self.config.people_steps:
            self._train(known, list(taught.values()))
        return self

    def _check(self, found: Mapping[str, _Person]) -> None:
        for name, one in found.items():
            if (n := len(np.unique(one.images))) < FEWEST_IMAGES:
                raise DataError(
                    f"the context of subject {name} shows {n} picture, which says nothing once the mean is taken "
                    f"off; give pairs of {FEWEST_IMAGES} pictures or more (60 are a beginning)."
                )

    def _train(self, known: np.ndarray, people: list[_Person]) -> None:
        import torch

        assert self.prior is not None
        config, prior = self.config, self.prior
        device = choose_device(config.device, setting="encoder.device")
        seen = np.unique(np.concatenate([one.images for one in people]))
        order = make_generator(self.seed, "in context", "held out").permutation(seen)
        held = np.isin(np.arange(seen[-1] + 1), order[: max(1, round(_HELD_OUT * len(seen)))])
        # A person who saw few images may have seen only held-out ones, or none of them.
        pupils = [one for one in people if not held[one.images].all()]
        judges = [one for one in people if held[one.images].any()]
        n_steps = config.simulated_steps + config.people_steps

        def draw(step: int) -> _Task:
            generator = make_generator(self.seed, "in context", step)
            if step < config.simulated_steps:
                return _simulate(prior, known, generator)
            return _pick(prior, pupils, ~held, generator)

        with seeded(derive_seed(self.seed, "in context", "weights"), device):
            network = self._build_network().to(device)
            # It begins as the linear inversion, which it corrects.
            for last in (network.leave.layers[-1], network.leave.direct):
                for parameter in last.parameters():
                    torch.nn.init.zeros_(parameter)
            optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_DECAY)
            network.train()

            def compute(step: int) -> Iterator[torch.Tensor]:
                start, correction, truth = draw(step).forward(network, device)
                yield _compute_loss(start + correction, truth)

            def report(step: int, losses: list[torch.Tensor]) -> None:
                if self.context.progress is not None:
                    on = "simulated voxels" if step < config.simulated_steps else "subjects"
                    self.context.progress(step + 1, n_steps, f"set network on {on}")

            optimise(
                optimiser, network.parameters(), range(n_steps), compute, after=report, clip_norm=1.0,
                rate=lambda step: compute_warm_cosine(step, n_steps, n_steps // 20),
                describe_failure=lambda step, loss: f"the loss of the set network is {loss} in step {step}.",
            )  # fmt: skip
        network.eval()
        self.network, self.gain, self.judged = network, 0.0, {}
        if not judges:
            return
        cosines = np.zeros(len(_GAINS))
        with torch.no_grad():
            for number in range(_TRIED):
                generator = make_generator(self.seed, "in context", "judge", number)
                start, correction, truth = _pick(prior, judges, held, generator).forward(network, device)
                cosines += [
                    float(torch.cosine_similarity(start + gain * correction, truth).mean()) / _TRIED
                    for gain in _GAINS
                ]
        self.gain = _GAINS[int(cosines.argmax())]
        self.judged = {"linear": float(cosines[0]), "corrected": float(cosines.max())}

    def _build_network(self) -> SetInverter:
        from braindecode_vis.parts.foundation.models.set_inverter import SetInverter

        # No dropout: every step has voxels and a context of its own.
        return SetInverter(
            len(self._require_space().components), width=self.config.width, n_blocks=self.config.n_blocks,
            n_heads=max(1, min(8, self.config.width // 16)), dropout=0.0,
        )  # fmt: skip

    # --- a new person -----------------------------------------------------------------------------------------

    def adapt(self, responses: Responses, targets: Embeddings) -> InContextEncoder:
        """Return an encoder that also knows the contexts of these trials; those of known subjects grow by them.

        Parameters
        ----------
        responses, targets
            Row by row: what the subjects saw, and how they responded.

        Raises
        ------
        DataError
            If a subject saw a single picture, or has another number of voxels than in its context.
        """
        space = self._require_space()
        found = _part_people(responses, space.enter(targets))
        self._check(found)
        grown = InContextEncoder(self.config, seed=self.seed)
        vars(grown).update(vars(self))
        grown.people, grown._models = dict(self.people), {}
        for name, one in found.items():
            context, earlier = make_context(one.vectors, one.responses), self.people.get(name)
            if (known := earlier or self._others) is not None:
                self._check_voxels(name, one.responses.shape[1], known)
            if earlier is not None:
                context = earlier.add(context)
            elif self._others is not None:
                context = context.lean_on(self._others.count_as(min(_OTHERS, self._others.n)))
            grown.people[name] = context
        return grown

    @property
    def adaptation(self) -> FewTrialAdaptation:
        """See `adapt`; nothing is trained."""
        return FewTrialAdaptation(self.adapt, is_quick=True, adapt_subject=self.adapt)

    def _check_voxels(self, name: str, n: int, context: VoxelContext) -> None:
        if n != len(context.response_mean):
            whose = f"the context of subject {name}" if name in self.people else "the training subjects"
            raise DataError(
                f"{n} voxels of subject {name} do not match the {len(context.response_mean)} of {whose}; give the "
                "same voxels, parcels or channels in the same order, or a new context under another name."
            )

    def _find_model(self, name: str, n_voxels: int) -> VoxelModel:
        context = self.people.get(name, self._others)
        if context is None or self.prior is None:
            raise DataError(
                f"in_context has no context of subject {name}, only of {', '.join(self.people)}: give pairs of "
                "picture and response of this subject (split.own_trials, or context in Python)."
            )
        self._check_voxels(name, n_voxels, context)
        if name not in self._models:
            self._models[name] = model_voxels(self.prior, context)
        return self._models[name]

    def predict(self, responses: Responses) -> Embeddings:
        """Return one predicted embedding per trial, in the target space.

        Parameters
        ----------
        responses
            Of subjects with a context, or of any if features correspond between subjects.
        """
        space = self._require_space()
        vectors = np.zeros((responses.n_trials, len(space.components)))
        for name, rows, data in _iterate_people(responses):
            model = self._find_model(name, data.shape[1])
            scaled = model.scale(data)
            start = model.invert(scaled)
            vectors[rows] = self._correct(model, scaled, start) if self.gain else start
        return space.leave(vectors, responses.stimulus_ids)

    def _correct(self, model: VoxelModel, scaled: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Return image vectors of the same lengths, with directions as the network corrects them."""
        import torch

        assert self.network is not None
        device = choose_device(self.config.device, setting="encoder.device")
        network, best = self.network.to(device), np.argsort(-model.signal, kind="stable")[: _VOXELS[1]]
        turned = np.empty_like(start)
        with torch.no_grad():
            for first in range(0, len(start), _QUERIES):
                rows = slice(first, first + _QUERIES)
                task = _Task(model, scaled[rows], start[rows], start[rows], best)
                direction, correction, _ = task.forward(network, device)
                turned[rows] = (direction + self.gain * correction).cpu().numpy()
        return np.asarray(normalise_rows(turned) * np.linalg.norm(start, axis=1, keepdims=True))

    def _require_space(self) -> _Space:
        if self.space is None:
            raise DataError("the in-context encoder has not been fitted; run train first.")
        return self.space

    # --- files ------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write what was learnt and the contexts as safetensors and JSON."""
        space, prior = self._require_space(), self.prior
        assert prior is not None
        tensors = {f"prior.{f.name}": getattr(prior, f.name) for f in fields(prior)}
        tensors |= {"mean": space.mean, "components": space.components}
        named = self.people if self._others is None else {**self.people, "": self._others}
        for number, context in enumerate(named.values()):
            arrays = {f.name: getattr(context, f.name) for f in fields(context)[1:]}
            tensors |= {f"context{number}.{name}": array for name, array in arrays.items()}
        if self.network is not None:
            state = self.network.state_dict()
            tensors |= {f"network.{name}": value.cpu().numpy() for name, value in state.items()}
        plain = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        write_tensors(folder / "in_context.safetensors", plain)
        write_json(
            folder / "in_context.json",
            {
                "space": space.name, "target_shape": list(space.shape), "scale": space.scale, "seed": self.seed,
                "subjects": {name: context.n for name, context in named.items()}, "gain": self.gain,
                "cosine_to_held_out_images": self.judged,
            },
        )  # fmt: skip

    def read(self, folder: Path) -> InContextEncoder:
        """Read what `write` wrote."""
        tensors, meta = load_tensors(folder / "in_context.safetensors"), read_json(folder / "in_context.json")
        self.seed, self.gain = meta["seed"], meta["gain"]
        self.judged = meta["cosine_to_held_out_images"]
        self.space = _Space(
            tensors["mean"], tensors["components"], meta["scale"], tuple(meta["target_shape"]), meta["space"]
        )

        def take(group: str) -> dict[str, np.ndarray]:
            start = f"{group}."
            return {key.removeprefix(start): a for key, a in tensors.items() if key.startswith(start)}

        self.prior = VoxelPrior(**take("prior"))
        self.people = {
            name: VoxelContext(n, **take(f"context{number}"))
            for number, (name, n) in enumerate(meta["subjects"].items())
        }
        self._others, self._models = self.people.pop("", None), {}
        if weights := take("network"):
            import torch

            self.network = self._build_network()
            self.network.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
            self.network.eval()
        return self


# --- trials by subject ----------------------------------------------------------------------------------------


def _find_space(targets: Embeddings, n_components: int) -> tuple[_Space, np.ndarray]:
    """Return the space, and the vectors of the distinct training images in it."""
    _, first = np.unique(targets.ids.astype(str), return_index=True)
    if len(first) < FEWEST_IMAGES:
        raise DataError(f"in_context needs {FEWEST_IMAGES} training images or more, but there is one.")
    values = targets.flat()[first].astype(np.float64)
    mean = values.mean(axis=0)
    _, sizes, directions = np.linalg.svd(values - mean, full_matrices=False)
    n_kept = max(1, min(n_components, int((sizes > 1e-6 * max(sizes[0], 1e-30)).sum())))
    scale = float(np.sqrt(np.square(sizes[:n_kept]).sum() / len(values))) or 1.0
    space = _Space(
        mean.astype(np.float32), directions[:n_kept].astype(np.float32), scale, targets.vectors.shape[1:],
        targets.space,
    )  # fmt: skip
    return space, (values - mean) @ directions[:n_kept].T / scale


def _iterate_people(responses: Responses) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each subject, its rows, and its trials of shape (n_trials, n_voxels) without what pads them."""
    own, data = count_own_voxels(responses), responses.as_matrix()
    names = responses.trials["subject"].astype(str).to_numpy(dtype=object)
    a_voxel = data.shape[1] // responses.data.shape[1]  # 1, or the times of each
    for name in dict.fromkeys(names.tolist()):
        rows = np.flatnonzero(names == name)
        stop = own[name] * a_voxel if name in own else data.shape[1]
        yield name, rows, data[rows][:, :stop]


def _part_people(responses: Responses, vectors: np.ndarray) -> dict[str, _Person]:
    _, images = np.unique(responses.stimulus_ids.astype(str), return_inverse=True)
    return {
        name: _Person(vectors[rows], data, images[rows]) for name, rows, data in _iterate_people(responses)
    }


def _join(contexts: list[VoxelContext]) -> VoxelContext:
    """Return the context of all subjects together, each around its own means."""
    joined = contexts[0]
    for context in contexts[1:]:
        joined = joined.add(context)
    return joined


# --- steps of the network -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """Images to find from the voxels of one person: scaled responses, linear inversion, image vectors, voxels."""

    model: VoxelModel
    scaled: np.ndarray
    start: np.ndarray
    truth: np.ndarray
    voxels: np.ndarray

    def forward(self, network: SetInverter, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return directions of the linear inversion, the network's correction, and the image vectors."""
        import torch

        def give(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32), device=device)

        correction = network(
            give(self.model.weights[self.voxels]), give(self.model.bias[self.voxels]),
            give(self.scaled[:, self.voxels]),
        )  # fmt: skip
        return give(normalise_rows(self.start)), correction, give(self.truth)


def _make_task(
    model: VoxelModel, responses: np.ndarray, truth: np.ndarray, generator: np.random.Generator
) -> _Task:
    scaled = model.scale(responses)
    best = np.argsort(-model.signal, kind="stable")[: _VOXELS[1]]
    n = int(generator.integers(min(_VOXELS[0], len(best)), len(best), endpoint=True))
    return _Task(model, scaled, model.invert(scaled), truth, generator.permutation(best)[:n])


def _draw_size(most: int, generator: np.random.Generator) -> int:
    """Return the size of a context, any order of magnitude as likely."""
    low, high = min(_SIZES[0], most), min(_SIZES[1], most)
    return round(float(np.exp(generator.uniform(np.log(low), np.log(high)))))


def _simulate(prior: VoxelPrior, known: np.ndarray, generator: np.random.Generator) -> _Task:
    """Return images seen by a person of simulated voxels, whose context was seen before."""
    weights, noise = draw_voxels(prior, int(generator.integers(*_VOXELS)), generator)
    n_queries = min(_QUERIES, len(known) // 2)
    shown = generator.permutation(len(known))
    n = _draw_size(len(known) - n_queries, generator)
    vectors = known[shown[: n_queries + n]]
    responses = vectors @ weights.T + noise * generator.standard_normal((len(vectors), len(weights)))
    model = model_voxels(prior, make_context(vectors[n_queries:], responses[n_queries:]))
    return _make_task(model, responses[:n_queries], vectors[:n_queries], generator)


def _pick(
    prior: VoxelPrior, people: list[_Person], asked: np.ndarray, generator: np.random.Generator
) -> _Task:
    """Return trials of a training subject whose context is trials of other images of the same subject.

    Parameters
    ----------
    asked : bool array of shape (n_images,)
        Images that may be asked for; any may be in the context.
    """
    one = people[int(generator.integers(len(people)))]
    images = generator.permutation(np.unique(one.images))
    wanted = images[asked[images]][: min(_QUERIES, len(images) // 2)]
    others = images[~np.isin(images, wanted)]
    shown = others[: max(FEWEST_IMAGES, _draw_size(len(others), generator))]
    voxels = np.sort(generator.permutation(one.responses.shape[1])[:_MOST_VOXELS])
    context, queries = np.isin(one.images, shown), np.flatnonzero(np.isin(one.images, wanted))[:_QUERIES]
    model = model_voxels(prior, make_context(one.vectors[context], one.responses[context][:, voxels]))
    return _make_task(model, one.responses[queries][:, voxels], one.vectors[queries], generator)


def _compute_loss(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return BrainCoDec's loss: distance of directions, and a symmetric contrast within the batch."""
    import torch
    from torch.nn import functional

    predicted, truth = functional.normalize(predicted, dim=1), functional.normalize(truth, dim=1)
    logits = predicted @ truth.T / _TEMPERATURE
    right = torch.arange(len(logits), device=logits.device)
    contrast = functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)
    return 1 - (predicted * truth).sum(dim=1).mean() + _CONTRAST * contrast / 2
