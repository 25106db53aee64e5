"""Batches of a training: sampling, reading and augmentation of trials, and their targets.

Owns the tables that join trials to images, and the assembly of a `Batch` on the device: from tensors there where the
data fit, otherwise batch by batch in ascending row order by a thread that reads ahead; both ways give the same numbers.
Of several processes each reads its share from the disk: of every batch, or once of what then stays on all devices.
Which trials stand behind the rows of a batch is the business of `batches`. Everything about a batch is a function of
the seed, the epoch and the place in it, so that a resumed run, or a search for the batch that went wrong, sees the same
numbers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import (
    compute_once,
    count_local_processes,
    count_processes,
    gather_rows,
    get_rank,
)
from braindecode_vis.base.memory import find_memory
from braindecode_vis.base.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.preprocessing.alignment import InputTransform
from braindecode_vis.training.augment import (
    RepetitionAveragingConfig,
    SubjectMixingConfig,
    TimeShiftConfig,
    TrialMixingConfig,
    find_sfreq,
    mix_trials,
)
from braindecode_vis.training.batches import (
    Draw,
    Partners,
    TrainingUnits,
    code_trials,
    draw_all,
    draw_halves,
    draw_subset,
    find_partners,
    make_units,
    mix_draws,
)
from braindecode_vis.training.descriptions import Descriptions
from braindecode_vis.training.image_side import ViewChooser, cluster_images
from braindecode_vis.training.lora import AdaptedTower, ImageSource
from braindecode_vis.training.model import Batch

READ_AHEAD = 2  # batches that wait for the device


@dataclass(frozen=True)
class Extras:
    """What some objectives need beside responses and targets, by stimulus id.

    Parameters
    ----------
    text
        Text embedding of each image (its concept's), of the size of the targets.
    image_views
        Embeddings of other views of the images, each of the size of the targets.
    clusters
        Cluster of each image.
    images
        The images themselves, for a network that is tuned.
    descriptions
        Words, attributes and what else files say of the images.
    """

    text: Embeddings | None = None
    image_views: tuple[Embeddings, ...] = ()
    clusters: dict[str, int] | None = None
    images: ImageSource | None = None
    descriptions: Descriptions | None = None


@dataclass(frozen=True)
class BatchPlan:
    """One batch to read: where it is in the training, its units, and the trials and captions drawn for them."""

    update: int
    units: np.ndarray
    draw: Draw
    views: tuple[Draw, ...] = ()
    rank: int = 0
    captions: np.ndarray | None = None


class Feed:
    """Data of one training.

    Parameters
    ----------
    responses, targets
        Training trials and one target per trial, in the same order.
    transform
        Fitted scaling of the responses.
    signal
        The signal that the network was built for.
    rows, held_rows
        Trials to learn from, and trials held out; ascending row numbers.
    settings
        The `NetworkEncoderConfig`.
    needs
        What the objectives need.
    extras
        Text, views, clusters and descriptions.
    device
        Where batches go.
    seed
        Root of every draw.
    """

    def __init__(
        self,
        responses: Responses,
        targets: Embeddings,
        *,
        transform: InputTransform,
        signal: Signal,
        rows: np.ndarray,
        held_rows: np.ndarray,
        settings: Any,
        needs: frozenset[str],
        extras: Extras,
        device: torch.device,
        seed: int,
    ) -> None:
        self.signal, self.settings, self.needs = signal, settings, needs
        self.device, self.seed = device, seed
        # Batches compare integers; strings would be compared by the thousand in every step.
        self.ids, self.stimuli, self.concepts = code_trials(responses)
        self.described = extras.descriptions
        self.words: Tensor | None = None
        self.tables: dict[str, Tensor] = {}
        self._check_described()
        self.trials = responses.trials
        names = responses.trials["subject"].astype(str).to_numpy(dtype=object)
        self.subjects = signal.index_subjects(names)
        kinds = {a.kind: a for a in settings.augmentations}
        self.averaging: RepetitionAveragingConfig | None = kinds.get("repetition_averaging")
        self.mixing: TrialMixingConfig | None = kinds.get("trial_mixing")
        # Both draw among the repetitions of an image, so that a row of a batch is an image and not a trial.
        by_image = self.averaging is not None or "brain_views" in needs
        self.subject_mixing: SubjectMixingConfig | None = kinds.get("subject_mixing")
        self.train = self._make_units(rows, by_image)
        self.held = self._make_units(held_rows, by_image) if len(held_rows) else None
        self._check_repetitions()
        self.partners = None if self.subject_mixing is None else self._find_partners()
        # The memory map may hold other folds' trials too: only these rows are ever read.
        used = np.union1d(rows, held_rows)
        self.views: ViewChooser | None = None
        if settings.view_choice is not None:
            self.views = ViewChooser(settings.view_choice, targets.vectors.shape[1], self.ids, seed=seed)
        self._fill_sources(responses, targets, transform, names, extras, used)
        self.background = self._find_background()
        self.images: RowSource | None = None
        self._image_source = extras.images
        self._used = used

    def _check_described(self) -> None:
        """Put the descriptions of the images on the device: a few hundred bytes of each."""
        found = self.described
        if found is None:
            return
        if found.concepts is not None:
            self.concepts = found.concepts
        if found.words is not None:
            self.words = torch.from_numpy(found.words).to(self.device)
        self.tables = {name: torch.from_numpy(table).to(self.device) for name, table in found.tables.items()}

    @property
    def threaded(self) -> bool:
        """Whether anything is read from disk."""
        sources = [self.data, *self.sources.values(), *([] if self.images is None else [self.images])]
        return any(source.resident is None for source in sources)

    def _make_units(self, rows: np.ndarray, by_image: bool) -> TrainingUnits:
        return make_units(rows, self.subjects, self.stimuli, self.concepts, by_image=by_image)

    def _check_repetitions(self) -> None:
        fewest, where = self.train.counts.min(), int(self.train.counts.argmin())
        if "brain_views" in self.needs and fewest < 2:
            raise DataError(
                f"an objective compares halves of the repetitions, but image {self.ids[self.train.stimuli[where]]!r} "
                "has only one training trial; set repeats.train to single, or leave that objective out."
            )
        if self.averaging is not None and self.train.counts.max() < 2:
            raise DataError(
                "the augmentation repetition_averaging finds one trial per image; set repeats.train to single."
            )

    def _find_partners(self) -> Partners:
        if len(set(self.signal.n_voxels or ())) > 1:
            raise ConfigError(
                "the augmentation subject_mixing adds trials of several subjects, but here each subject "
                "has different voxels; remove it."
            )
        partners = find_partners(self.train)
        if not partners.counts.any():
            raise ConfigError(
                "the augmentation subject_mixing mixes trials of several subjects who saw the same image, but no "
                "training image was seen by two of them; remove it."
            )
        return partners

    def _fill_sources(
        self,
        responses: Responses,
        targets: Embeddings,
        transform: InputTransform,
        names: np.ndarray,
        extras: Extras,
        used: np.ndarray,
    ) -> None:
        """Decide what stays on the device: targets first, since every batch reads them at random."""
        left = self.settings.max_device_bytes
        limit = find_memory() if self.device.type == "cpu" else None
        if limit is not None:  # half of what is free: the rest is for weights, batches and other programs
            left = min(left, limit.free // 2 // count_local_processes())
        # Of one mind on what stays, since they read it together.
        left = compute_once(lambda: left)
        first = pd.Series(self.stimuli).drop_duplicates().index.to_numpy()  # one trial of each image
        # A stacked target holds every view side by side: (n_views, n_features) flattened.
        n_features = n_stacked = int(np.prod(targets.vectors.shape[1:]))
        if self.views is not None:
            n_features //= self.views.n_views
        self.n_features = n_features
        everyone = np.arange(len(self.ids))

        def keep(read: Any, rows: np.ndarray, n_values: int, stored: np.ndarray | None = None) -> RowSource:
            nonlocal left
            source = RowSource(
                read, rows, row_bytes=4 * n_values, device=self.device, max_bytes=left, stored=stored
            )
            left -= source.n_bytes if source.resident is not None else 0
            return source

        one_each = len(first) == len(
            targets.vectors
        )  # then a row of targets is one of images, in their order
        stored = targets.vectors.reshape(len(first), -1) if one_each else None
        self.sources = {
            "target": keep(lambda r: _flatten(targets.vectors, first[r]), everyone, n_stacked, stored)
        }
        if "text" in self.needs:
            if extras.text is None:
                raise ConfigError(
                    "an objective needs text embeddings; give the encoder text targets, or leave that objective out."
                )
            self.sources["text"] = keep(*self._read_by_id(extras.text, "text"), n_features)
        if "image_views" in self.needs:
            if not extras.image_views:
                raise ConfigError(
                    "an objective compares with image_views, but the target has only one vector per "
                    "image; remove image_views from its views, or give them to the encoder in Python "
                    "(NetworkEncoder.image_views)."
                )
            for number, view in enumerate(extras.image_views):
                self.sources[f"view{number}"] = keep(*self._read_by_id(view, "an image view"), n_features)
        self.clusters = self._find_clusters(targets, first, extras) if "clusters" in self.needs else None
        # Responses last: they are the largest and, read in order, cost least to leave on disk.
        size = int(np.prod(self.signal.shape))  # as the network sees them
        smoothing = [a for a in self.settings.augmentations if a.kind == "smoothing" and a.once]
        units = self.train
        learnt = units.trials[np.arange(units.trials.shape[1]) < units.counts[:, None]]  # without the padding

        def read_trials(r: np.ndarray) -> np.ndarray:
            block = transform.read(responses.data, r, names)
            some = np.isin(r, learnt)  # held-out trials are never augmented
            for one in smoothing:
                block[some] = one.smooth_once(block[some], r[some], self.signal, self.seed)
            return block

        self.data = keep(
            read_trials, used, size, responses.data if transform.is_identity and not smoothing else None
        )
        self.bytes_left = left

    def open_images(self, tower: AdaptedTower) -> None:
        """Make ready the images of all trials for a network that is tuned, on the device if they fit beside the rest.

        Raises
        ------
        ConfigError
            If there are no images.
        """
        images = self._image_source
        if images is None:
            raise ConfigError(
                "encoder.image_tower tunes an image network, which must see the images; give the encoder its images."
            )
        side = tower.frozen.encoder.transform.size
        self.images = RowSource(
            lambda rows: tower.prepare(images, [str(self.ids[row]) for row in rows]),
            # Each image once, however many trials show it.
            np.unique(self.stimuli[self._used]),
            # Pixels stay bytes until the network normalises them.
            row_bytes=3 * side**2, device=self.device, max_bytes=self.bytes_left,
        )  # fmt: skip

    def _read_by_id(self, embeddings: Embeddings, what: str) -> tuple[Any, np.ndarray]:
        # By id: banks of texts and views need not be in the order of the trials.
        rows = pd.Index(embeddings.ids).get_indexer(pd.Index(self.ids, dtype=object))
        if (rows < 0).any():
            missing = self.ids[int(np.flatnonzero(rows < 0)[0])]
            raise DataError(
                f"there is no embedding of {what} for the training image {missing!r}; embed it first."
            )
        found = int(np.prod(embeddings.vectors.shape[1:]))
        if found != self.n_features:
            raise DataError(
                f"the embeddings of {what} have {found} values, but the targets have {self.n_features}: both must come "
                "from one joint space."
            )
        return (lambda r: _flatten(embeddings.vectors, rows[r])), np.arange(len(self.ids))

    def _find_clusters(self, targets: Embeddings, first: np.ndarray, extras: Extras) -> np.ndarray:
        if extras.clusters is not None:
            missing = [i for i in self.ids if i not in extras.clusters]
            if missing:
                raise DataError(
                    f"the training image {missing[0]!r} belongs to no cluster of the earlier stage."
                )
            return np.array([extras.clusters[i] for i in self.ids], dtype=np.int64)
        # Centres from what is learnt from; held-out images are only assigned to them.
        trained = np.unique(self.train.stimuli)
        vectors = _flatten(targets.vectors, first)
        return cluster_images(vectors, trained, self.settings.n_clusters, seed=self.seed)

    def _find_background(self) -> np.ndarray | None:
        """Return the samples that stand for each time of a background trial: the pre-stimulus part, over and over."""
        if "background" not in self.needs:
            return None
        times = self.signal.times
        # Responses of 0 s and later belong to the image.
        n_before = 0 if times is None else int((times < 0).sum())
        if n_before < 2 or self.signal.dims[-1] != "time":
            raise DataError(
                "an objective needs pre-stimulus samples as background, but the trials start at the stimulus; "
                "preprocess with a window (dataset.window or tmin) that begins below 0, or leave that objective out."
            )
        # To and fro, so that no jump arises where the part starts again.
        there_and_back = np.concatenate([np.arange(n_before), np.arange(n_before - 2, 0, -1)])
        return np.resize(there_and_back, self.signal.shape[-1])  # as many as a trial has

    def plan(
        self, units: TrainingUnits, batch: np.ndarray, *, update: int, rank: int, n_ranks: int
    ) -> BatchPlan:
        """Return the plan of one process for one batch of units.

        The draw is made for the whole batch and then cut, so that it does not depend on the number of processes.
        """
        # `make_batches` made it a multiple.
        size = len(batch) // n_ranks
        mine = slice(rank * size, (rank + 1) * size)
        # Held-out units are averaged over all repetitions and never cut: every process scores them all.
        if units is not self.train:
            captions = self._draw_captions(units, batch, None)
            return BatchPlan(update, batch, draw_all(units, batch), captions=captions)
        # By the place in the training, not by a running generator, so that a resumed run draws the same. The 0 that
        # follows the update in every seed is the number of a part of a batch, of which earlier versions had several.
        rng = make_generator(self.seed, "repetitions", update, 0)
        draw = self._draw(units, batch, rng)
        views = draw_halves(units, batch, rng) if "brain_views" in self.needs else ()
        if self.subject_mixing is not None and self.partners is not None:
            rng = make_generator(self.seed, "subject_mixing", update, 0)
            other = self._draw(units, self.partners.draw(batch, rng), rng)
            draw = mix_draws(draw, other, self.subject_mixing.draw_shares(len(batch), rng))
        halves = tuple(_cut(view, mine) for view in views)
        captions = self._draw_captions(units, batch, make_generator(self.seed, "captions", update, 0))
        own = None if captions is None else captions[mine]
        return BatchPlan(update, batch[mine], _cut(draw, mine), halves, rank, own)

    def _draw_captions(
        self, units: TrainingUnits, batch: np.ndarray, rng: np.random.Generator | None
    ) -> np.ndarray | None:
        if self.words is None or self.described is None:
            return None
        return self.described.draw_captions(units.stimuli[batch], rng)

    def _draw(self, units: TrainingUnits, batch: np.ndarray, rng: np.random.Generator) -> Draw:
        own = self.averaging
        if own is None:
            return draw_all(units, batch)
        return draw_subset(units, batch, 1, rng, own.max_repetitions)

    def load(self, plan: BatchPlan) -> dict[str, tuple[Tensor, np.ndarray]]:
        """Read the rows of a plan; this may run in another thread."""
        blocks = {"data": self.data.fetch(plan.draw.trials)}
        for number, view in enumerate(plan.views):
            blocks[f"half{number}"] = self.data.fetch(view.trials)
        return blocks

    def load_all(
        self, units: TrainingUnits, plan: BatchPlan
    ) -> tuple[BatchPlan, dict[str, tuple[Tensor, np.ndarray]]]:
        """Read responses and targets of a plan."""
        blocks = self.load(plan)
        stimuli = units.stimuli[plan.units]
        blocks.update({name: source.fetch(stimuli) for name, source in self.sources.items()})
        if self.images is not None:
            # A tuned network computes each image once per batch; `image_rows` spreads the results.
            blocks["images"] = self.images.fetch(np.unique(stimuli))
        return plan, blocks

    def assemble(
        self,
        units: TrainingUnits,
        plan: BatchPlan,
        blocks: dict[str, tuple[Tensor, np.ndarray]],
        progress: float,
    ) -> Batch:
        """Return the batch on the device, without augmentation."""
        data = self.data.pick(*blocks["data"], plan.draw.weights)
        stimuli, concepts, subject = (
            torch.from_numpy(codes[plan.units]).to(self.device)
            for codes in (units.stimuli, units.concepts, units.subjects)
        )
        found = {name: source.pick(*blocks[name]) for name, source in self.sources.items()}
        batch = Batch(data, subject, stimuli, concepts, found["target"], progress=progress)
        if self.views is not None:
            batch.target = self._choose_views(batch.target, units, plan)
        if self.images is not None:
            batch.images = self.images.pick(*blocks["images"])
            # In the order of np.unique, as the images were fetched.
            rows = np.unique(units.stimuli[plan.units], return_inverse=True)[1]
            batch.image_rows = torch.from_numpy(rows).to(self.device)
        batch.text = found.get("text")
        views = [found[name] for name in found if name.startswith("view")]
        batch.image_views = torch.stack(views) if views else None
        if self.clusters is not None:
            batch.clusters = torch.from_numpy(self.clusters[units.stimuli[plan.units]]).to(self.device)
        for name, table in self.tables.items():
            setattr(batch, name, table[stimuli])
        if self.words is not None and plan.captions is not None:
            batch.words = self.words[torch.from_numpy(plan.captions).to(self.device)].long()
        batch.seed = derive_seed(self.seed, "objectives", plan.update, 0)
        if plan.views:
            # (2, n, ...): two disjoint halves of the repetitions
            halves = [self.data.pick(*blocks[f"half{n}"], view.weights) for n, view in enumerate(plan.views)]
            batch.views = torch.stack(halves)
        if self.background is not None:
            source = torch.from_numpy(self.background).to(self.device)
            # (n, n_channels, n_times), as long as a trial, so that the network takes it
            batch.background = data.index_select(-1, source)
        return batch

    def _choose_views(self, stacked: Tensor, units: TrainingUnits, plan: BatchPlan) -> Tensor:
        assert self.views is not None
        if units is not self.train:
            return self.views.reduce(stacked)
        return self.views.choose(stacked, units.stimuli[plan.units], (plan.update, 0, plan.rank))

    def augment(
        self, batch: Batch, plan: BatchPlan, *, rank: int, hide_subject: float
    ) -> tuple[Batch, Tensor]:
        """Augment a training batch in place, and return it with the trials that a teacher sees.

        Parameters
        ----------
        batch, plan
            What `assemble` gave, and for what.
        rank
            Process, which draws numbers of its own.
        hide_subject
            Chance of each trial to be shown as one of an unknown subject.
        """
        generator = make_torch_generator(self.seed, "augment", plan.update, 0, rank, device=str(self.device))
        # The teacher sees another view: one half of the repetitions if there are halves, else no augmentation.
        plain = batch.data if batch.views is None else batch.views[1]
        augmentations = self.settings.augmentations
        whole = batch.data
        batch.data, offsets = augment_and_time(whole, augmentations, generator, self.signal)
        if "token_views" in self.needs:
            # From a generator of its own, so that the draws that follow are those of a training without it.
            again = make_torch_generator(
                self.seed, "second_view", plan.update, 0, rank, device=str(self.device)
            )
            other, late = augment_and_time(whole, augmentations, again, self.signal)
            batch.token_data = torch.stack([batch.data, other])
            batch.token_offsets = torch.stack([offsets, late])
        if batch.views is not None:
            batch.views = torch.stack(
                [augment_trials(view, augmentations, generator, self.signal) for view in batch.views]
            )
        subject = batch.subject
        if hide_subject > 0:
            # Each trial on its own: a batch in which all subjects are unknown would starve their layers.
            hidden = torch.rand(len(batch.data), generator=generator, device=self.device) < hide_subject
            batch.subject = batch.subject.masked_fill(hidden, self.signal.unknown_subject)
        # Last, so that what is mixed has been augmented already.
        if "mix" in self.needs:
            # In the very updates in which an objective that knows of it counts: any other would see sums of trials.
            counts = any("mix" in o.needs and o.is_active(batch.progress) for o in self.settings.objectives)
            batch.data, batch.mix_partner, batch.mix_weight = mix_trials(
                batch.data, subject, self.mixing if counts else None, generator
            )
        return batch, plain


def augment_trials(data: Tensor, augmentations: Any, generator: torch.Generator, signal: Signal) -> Tensor:
    """Apply every augmentation in order."""
    for augmentation in augmentations:
        data = augmentation.apply(data, generator, signal)
    return data


def augment_and_time(
    data: Tensor, augmentations: Any, generator: torch.Generator, signal: Signal
) -> tuple[Tensor, Tensor]:
    """Apply every augmentation in order; also return how late each trial is for it, in ms, shape (n_trials,).

    The same draws as `augment_trials`. Only ``time_shift`` is known to move a trial in time.
    """
    offsets = data.new_zeros(len(data))
    for augmentation in augmentations:
        if isinstance(augmentation, TimeShiftConfig):
            data, moved = augmentation.shift(data, generator, signal)
            rate = find_sfreq(signal)
            assert rate is not None  # as `shift` has required
            offsets = offsets + moved * (1000 / rate)
        else:
            data = augmentation.apply(data, generator, signal)
    return data, offsets


def _cut(draw: Draw, mine: slice) -> Draw:
    return Draw(draw.trials[mine], None if draw.weights is None else draw.weights[mine])


def _flatten(vectors: Any, rows: np.ndarray) -> np.ndarray:
    return np.asarray(vectors[rows], dtype=np.float32).reshape(len(rows), -1)


def _is_plain(array: Any) -> bool:
    """Say whether torch can use an array in memory as it is."""
    return type(array) is np.ndarray and array.dtype == np.float32 and array.flags.carray


class RowSource:
    """Rows of an array: on the device if they fit, otherwise read where they lie.

    Parameters
    ----------
    read
        Returns rows for ascending row numbers.
    rows
        Row numbers that may be asked for, ascending.
    row_bytes
        Size of a row.
    device
        Where rows go.
    max_bytes
        Most bytes that may stay on the device.
    stored
        An array whose rows are what `read` gives, where there is one; in memory, it is used as it is.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        rows: np.ndarray,
        *,
        row_bytes: int,
        device: torch.device,
        max_bytes: int,
        stored: Any = None,
    ) -> None:
        self.read, self.rows, self.device = read, rows, device
        self.resident: Tensor | None = None
        # All or nothing: half of a source on the device would need both ways at once.
        self.n_bytes = row_bytes * len(rows)
        if self.n_bytes > max_bytes:
            return
        if device.type == "cpu" and _is_plain(stored):
            # Batches are copies of rows: nothing writes into the caller's array.
            self.rows, self.n_bytes, self.resident = np.arange(len(stored)), 0, torch.from_numpy(stored)
        else:
            self.resident = self._load_all(max(1, (64 << 20) // max(1, row_bytes)))

    def _load_all(self, size: int) -> Tensor:
        whole: Tensor | None = None
        for start in range(0, len(self.rows), size):
            # In blocks, so that the copy in host memory stays small beside the data.
            block = self._read_together(self.rows[start : start + size])
            if whole is None:
                whole = torch.empty((len(self.rows), *block.shape[1:]), dtype=block.dtype, device=self.device)
            whole[start : start + len(block)] = block.to(self.device)
        assert whole is not None
        return whole

    def _read_together(self, rows: np.ndarray) -> Tensor:
        """Return rows of which every process reads its share from the disk."""
        n = count_processes()
        if n == 1:
            return torch.from_numpy(np.ascontiguousarray(self.read(rows)))
        size = -(-len(rows) // n)
        # As many for each, the last row again and again where it does not come out even.
        wanted = rows[np.minimum(np.arange(size) + get_rank() * size, len(rows) - 1)]
        needed, places = np.unique(wanted, return_inverse=True)
        block = torch.from_numpy(np.ascontiguousarray(self.read(needed)))
        return gather_rows(block[torch.from_numpy(places)].to(self.device))[: len(rows)]

    def fetch(self, wanted: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return a block of rows and the place of each wanted row in it; the block may be in host memory."""
        if self.resident is not None:
            return self.resident, np.searchsorted(self.rows, wanted)
        # Ascending and each row once, as a memory map is read fastest.
        needed, places = np.unique(wanted, return_inverse=True)
        block = torch.from_numpy(np.ascontiguousarray(self.read(needed)))
        if self.device.type == "cuda":
            # Only pinned memory is copied to a GPU while it computes.
            block = block.pin_memory()
        return block, places.reshape(np.shape(wanted))

    def pick(self, block: Tensor, places: np.ndarray, weights: np.ndarray | None = None) -> Tensor:
        """Return rows of the block on the device; with `weights` the weighted mean over the last axis of `places`."""
        block = block.to(self.device, non_blocking=True)
        index = torch.from_numpy(np.ascontiguousarray(places)).to(self.device, non_blocking=True)
        if weights is None:
            return block.index_select(0, index.reshape(-1))
        share = torch.from_numpy(weights).to(self.device)
        shape = (-1, *[1] * (block.ndim - 1))  # weights broadcast over the axes of a trial
        total = block.index_select(0, index[:, 0]) * share[:, 0].reshape(shape)
        for k in range(1, index.shape[1]):  # one repetition at a time, never (n, k, ...) at once
            total += block.index_select(0, index[:, k]) * share[:, k].reshape(shape)
        return total


def read_ahead(
    plans: Iterable[Any], load: Callable[[Any], Any], *, threaded: bool
) -> Generator[Any, None, None]:
    """Yield ``load(plan)`` in order; if `threaded`, a thread works a few batches ahead.

    An exception of `load` is raised here. The thread ends when the iteration does, whatever the reason.
    """
    if not threaded:
        for plan in plans:
            yield load(plan)
        return
    # Bounded, since each waiting batch holds its memory.
    ready: queue.Queue[Any] = queue.Queue(maxsize=READ_AHEAD)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        # The loop may stop while the queue is full: a plain put would then wait forever.
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for plan in plans:
                if not put(("value", load(plan))):
                    return
            put(("end", None))
        # KeyboardInterrupt included: the loop must not wait for a thread that has ended.
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()
