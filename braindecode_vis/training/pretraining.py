"""Self-supervised pretraining of the parcel encoder, no labels: one loop for all objectives and all kinds of data.

Owns statistics, steps, the held-out error, the log with its probes, and the files that `encoders.parcels` starts from.
What is learnt is in `pretraining_model`, what is read in `pretraining_data`.

References
----------
He et al. (2022), arXiv:2111.06377 (masked autoencoders). Wang et al. (2024), arXiv:2411.07121 (WAVE). Assran et al.
(2023), arXiv:2301.08243 (I-JEPA).
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.devices import (
    check_same_start,
    choose_device,
    count_processes,
    get_rank,
    is_sharded,
    open_accelerator,
    seed_device,
    seeded,
    share_network,
    sum_processes,
    take_share,
)
from braindecode_vis.base.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.base.store import hash_json, replace_atomically, write_json, write_tensors
from braindecode_vis.encoders.parcels import check_architecture, describe_encoder, read_encoder
from braindecode_vis.encoders.parcels_config import DESCRIPTION, WEIGHTS
from braindecode_vis.training.optimisation import (
    compute_warm_cosine,
    optimise,
    pack_optimiser,
    read_checkpoint,
    split_decayed,
    take,
    unpack_optimiser,
    write_checkpoint,
)
from braindecode_vis.training.pretraining_config import PretrainConfig
from braindecode_vis.training.pretraining_data import (
    Material,
    Rows,
    WindowPartners,
    open_material,
    read_learnt,
    read_start,
)
from braindecode_vis.training.pretraining_model import (
    Mask,
    PretrainingBatch,
    SelfSupervised,
    TokenMatch,
    average_hidden,
    count_visible,
    draw_ranks,
    fit_match,
    make_mask,
    rank_by_match,
    reduce_vectors,
    take_hidden,
)
from braindecode_vis.training.pretraining_probes import LabelledSet, check_labelled, measure_probes

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
CHECKPOINT = "pretrain.safetensors"
LOG = "log.jsonl"
N_COMPONENTS = 32  # of the vectors of images, which tokens are matched with
SHORT_PATCH = 8  # samples; the own variance of a shorter patch says too little to divide by
_EMA = 0.996  # share of the copy of jepa that stays at the first step; Assran et al. start there
#: Parts of a checkpoint that are not the encoder's.
_BESIDE_ENCODER = (
    "best.",
    "optimiser.",
    "model.decoder.",
    "model.predictor.",
    "model.teacher.",
    "model.head.",
)


def pretrain(
    config: PretrainConfig,
    responses: Responses | None,
    *,
    folder: Path,
    checkpoints: Path,
    seed: int,
    progress: Progress | None = None,
    labelled: LabelledSet | None = None,
    guide: Embeddings | None = None,
    fingerprint: str = "",
) -> dict[str, Any]:
    """Pretrain and write ``encoder.safetensors``, ``encoder.json`` and ``log.jsonl`` into `folder`.

    Parameters
    ----------
    config
        Encoder, training, and the corpora if there are any.
    responses
        Trials or windows of unlabelled runs, parcels x times or parcels; possibly a memory map. Rows whose split is
        ``test`` are never read. None if `config` names corpora.
    folder
        Where the result goes; it exists.
    checkpoints
        Where an interrupted run left its state and finds it again; it outlives `folder` being thrown away.
    seed
        Root of weights, order, masks and hold-out.
    progress
        Called with a description and the number of epochs; a context manager that gives the function that advances.
    labelled
        What the probe of decoding is asked about.
    guide
        Vectors of the images of training trials, by stimulus id, for `config.guide`; others are not looked at.
    fingerprint
        Written into ``encoder.json``, for whoever looks whether the result is there.

    Returns
    -------
    dict
        Held-out error of the written weights, that of predicting the mean, epoch and number of trials.

    Raises
    ------
    ConfigError, DataError
        If there are too few groups to hold some out, a mask hides nothing or everything, the loss is not finite, a
        corpus changed meanwhile, or the checkpoint is of another run.
    """
    material = open_material(config, responses, seed)
    n_processes = count_processes()
    if min(len(material.train), config.batch_size) < n_processes:
        raise ConfigError(
            f"{len(material.train)} training trials in batches of {config.batch_size} cannot be shared by "
            f"{n_processes} processes; start fewer."
        )
    if (guide is None) != (config.guide is None):
        raise ConfigError(
            "pretrain.guide masks what matches the images of a run, but this pretraining has no image "
            "vectors; use a configuration that names data and target."
        )
    run = Pretraining(config, material, checkpoints, seed, labelled, guide)
    run.resume()
    shown = nullcontext(lambda n: None) if progress is None else progress("pretraining", config.n_epochs)
    with shown as advance:
        advance(run.epoch)
        while run.epoch < config.n_epochs:
            run.train_epoch()
            run.write_checkpoint()
            advance(1)
    reached = run.describe_result()
    if not run.rank:
        run.write_result(folder, reached, fingerprint)
    return reached


class Pretraining:
    """One run from its first step or from its checkpoint to its last.

    Parameters
    ----------
    config, seed, labelled, guide
        As in `pretrain`.
    material
        What is read.
    folder
        Of the checkpoint and the log.

    A step's order, masks and dropout follow from the seed and the step's number alone, so weights, optimiser and
    position are all that a checkpoint needs. Several processes each read and take their share of every batch, of the
    held-out trials and of the statistics; the first one writes.
    """

    def __init__(
        self,
        config: PretrainConfig,
        material: Material,
        folder: Path,
        seed: int,
        labelled: LabelledSet | None = None,
        guide: Embeddings | None = None,
    ) -> None:
        self.config, self.material, self.signal = config, material, material.signal
        self.folder, self.seed, self.labelled = folder, seed, labelled
        self.rank, self.n_ranks = get_rank(), count_processes()
        self.device = torch.device(choose_device(config.device, setting="pretrain.device"))
        with seeded(derive_seed(seed, "pretrain", "weights"), self.device):
            self.model = self._make_model()
        encoder = self.model.encoder
        count_visible(encoder.n_tokens, config.mask_ratio)  # before anything is read
        if labelled is not None:
            check_labelled(labelled, encoder)
        self._start_from_earlier()
        mean, std = measure_parcels(material.read, material.measured, encoder.n_parcels, config.batch_size)
        # Of training rows; the encoder that is tuned later standardises by the same numbers.
        encoder.mean.copy_(torch.as_tensor(mean)[:, None])
        encoder.std.copy_(torch.as_tensor(std)[:, None])
        self.model.meet_teacher()
        self.model.to(self.device)
        self.partners = self._make_partners()
        #: Scores of the image of each row, not a number where it has none, and how well each token matches them.
        self.seen: np.ndarray | None = None
        self.match: TokenMatch | None = None
        if guide is not None:
            self._fit_guide(guide)
        # He et al. decay neither biases nor norms; tables of positions and parcels are spared as well.
        tables = [m.weight for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        learning = [p for p in self.model.parameters() if p.requires_grad]
        groups = split_decayed(learning, 0.05, spared=tables)
        self.optimiser: Any = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
        self.wrapped: Any = self.model
        self.accelerator: Any = None
        if self.n_ranks > 1 or config.precision != "fp32":
            self.accelerator = open_accelerator(config.device, config.precision, role="pretrain")
            if is_sharded(self.accelerator):
                raise ConfigError(
                    "pretraining keeps the whole encoder in every process; take cluster.distributed=ddp (no "
                    "ACCELERATE_USE_FSDP)."
                )
            self.wrapped, self.optimiser = share_network(self.accelerator, self.model, self.optimiser)
        self.epoch, self.best_epoch = 0, 0
        # Where an epoch was left, and the sums of its losses until there.
        self.n_done, self.totals = 0, dict.fromkeys(("loss", *config.objectives), 0.0)
        self.best: dict[str, Tensor] = {}
        self.best_error = math.inf
        self.probed: dict[str, Any] = {}
        self.baseline: float | None = None
        if "masked" in config.objectives:
            self.baseline = self._measure_baseline()
            if not self.baseline > 0:
                raise DataError(
                    "the held-out trials do not differ from the mean of the others: there is nothing to learn."
                )

    def _make_model(self) -> SelfSupervised:
        config = self.config
        n_times = self.signal.shape[1] if len(self.signal.shape) == 2 else 1
        length = config.encoder.patch_times or n_times
        kind = config.normalisation
        if kind == "auto":
            # He et al. predict patches that are normalised one by one.
            kind = "patch" if length >= SHORT_PATCH else "parcel"
        if kind == "patch" and length < 2:
            raise DataError("a patch of one sample has no variance; set pretrain.normalisation=parcel.")
        return SelfSupervised(
            config.encoder.build_encoder(self.signal),
            objectives=tuple(config.objectives),
            decoder_width=config.decoder_width,
            decoder_depth=config.decoder_depth,
            normalisation=kind,
        )

    def _start_from_earlier(self) -> None:
        file = self.config.start_file
        if file is None:
            return
        encoder = self.model.encoder
        check_architecture(read_start(file).get("architecture", {}), describe_encoder(encoder), file.parent)
        prefix = {"model.encoder.": ""} if file.name == CHECKPOINT else {}
        read_encoder(encoder, file, key_map=prefix, ignore=_BESIDE_ENCODER if prefix else ())
        seen = sorted(
            {row["person"] for corpus in self.earlier for row in corpus["subjects"]}
            & {person for corpus in self.corpora for person in corpus["held_out_persons"]}
        )
        if seen:
            warnings.warn(
                f"{seen[0]}{f' and {len(seen) - 1} more' if len(seen) > 1 else ''} held out now, but the "
                f"encoder of {self.config.start_from} was trained on recordings of that person: the "
                "held-out error is too low.",
                Notice,
                stacklevel=2,
            )

    def _make_partners(self) -> dict[str, WindowPartners]:
        if "run_contrast" not in self.config.objectives:
            return {}
        material, found = self.material, {}
        for part, rows in (("train", material.train), ("held_out", material.held_out)):
            n_persons = len(np.unique(material.person[rows]))
            if n_persons < 2 and part == "held_out" and "masked" not in self.config.objectives:
                # Its contrast would be with nobody, and 0 from the first epoch on.
                raise DataError(
                    "run_contrast is measured by distinguishing held-out persons, but only one is held "
                    "out; hold out another (corpus --hold-out), or add masked to pretrain.objectives."
                )
            if n_persons < 2 and part == "train":
                raise DataError(
                    "run_contrast distinguishes the windows of a person from those of others, but the "
                    "training data have only one person; leave it out of pretrain.objectives, or add persons."
                )
            found[part] = WindowPartners(rows, material.person, material.run)
        return found

    def _fit_guide(self, guide: Embeddings) -> None:
        """Reduce the vectors of the training images to components, and fit what each token says of them."""
        rows, material = self.material.train, self.material
        names = material.list_images(rows)
        place = {str(name): number for number, name in enumerate(guide.ids)}
        known = np.array([str(name) in place for name in names])
        if not known.any():
            raise DataError(
                "pretrain.guide has no vector or caption for any image of the training trials; correct "
                "the ids, or leave guide out."
            )
        if not known.all():
            warnings.warn(
                f"{(~known).sum()} of {len(names)} training trials show images without a vector or "
                f"caption in pretrain.guide, first {names[~known][0]}; their masks are drawn at random.",
                Notice,
                stacklevel=3,
            )
        images, of = np.unique(np.array([place[str(name)] for name in names[known]]), return_inverse=True)
        reduced = reduce_vectors(guide.vectors[images].reshape(len(images), -1), N_COMPONENTS)
        seen = np.full((int(rows.max()) + 1, reduced.shape[1]), np.nan, np.float32)
        seen[rows[known]] = reduced[of]

        def read(part: np.ndarray) -> tuple[Tensor, np.ndarray]:
            return self.model.encoder.cut_patches(self._to_device(self._read(part)).data), seen[part]

        mine, size = take_share(rows[known]), self.config.batch_size
        self.match = fit_match((read(mine[i : i + size]) for i in range(0, len(mine), size)), self.device)
        self.seen = seen

    # --- one epoch ----------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """Take every training trial once, then measure the held-out error and add a line to the log."""
        config = self.config
        self._verify()
        batches = self.material.make_batches(config.batch_size, self.seed, self.epoch)
        first = self.epoch * len(batches)

        def compute_losses(step: int) -> Iterator[Tensor]:
            yield self.compute_loss(batches[step - first], step)

        def after(step: int, losses: list[Tensor]) -> None:
            n = len(batches[step - first])
            # of this process's share, times their number
            self.totals["loss"] += float(losses[0]) * n
            if len(config.objectives) > 1:
                for name, value in self.parts.items():
                    self.totals[name] += value * n
            # the teacher's share rises to 1 over the training, as in I-JEPA
            self.model.follow(1 - (1 - _EMA) * (1 - step / n_steps))
            self.n_done = step - first + 1
            every = config.checkpoint_steps
            if every is not None and self.n_done % every == 0 and self.n_done < len(batches):
                self.write_checkpoint()

        def describe_failure(step: int, loss: float) -> str:
            rows = batches[step - first]
            return (
                f"the pretraining loss is {loss} at step {step} (epoch {self.epoch + 1}, rows {rows[:3].tolist()} "
                f"and {max(0, len(rows) - 3)} more); {self._describe_rescue()}"
            )

        n_steps = config.n_epochs * len(batches)
        n_warm = round(0.05 * n_steps)
        self.model.train()
        scaled = self.accelerator is not None and self.accelerator.scaler is not None
        optimise(
            self.optimiser if scaled else getattr(self.optimiser, "optimizer", self.optimiser),
            [p for p in self.model.parameters() if p.requires_grad],
            range(first + self.n_done, first + len(batches)), compute_losses,
            after=after, rate=lambda step: compute_warm_cosine(step, n_steps, n_warm), clip_norm=1.0,
            describe_failure=None if scaled else describe_failure, accelerator=self.accelerator,
        )  # fmt: skip
        self.epoch += 1
        self._judge(len(batches))
        self.n_done, self.totals = 0, dict.fromkeys(self.totals, 0.0)

    def _judge(self, n_batches: int) -> None:
        """Measure the held-out error, keep the weights if they are the best so far, and add a line to the log."""
        errors = self.measure_errors()
        judged = next((n for n in ("masked", "run_contrast") if n in errors), "jepa")
        error = errors[judged]
        if not math.isfinite(error):
            raise DataError(
                f"the held-out error is {error} after epoch {self.epoch}; {self._describe_rescue()}"
            )
        if error < self.best_error:
            self.best_error, self.best_epoch = error, self.epoch
            self.best = {k: v.detach().cpu().clone() for k, v in self.model.written.state_dict().items()}
        n = self.n_ranks * len(self.material.train)
        line = {
            "epoch": self.epoch,
            "step": self.epoch * n_batches,
            "loss": float(sum_processes(self.totals["loss"])) / self.n_ranks / len(self.material.train),
            "held_out": error,
            "mean_baseline": self.baseline,
            "explained": None if self.baseline is None else 1 - error / self.baseline,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        if list(self.config.objectives) != ["masked"]:
            line["held_out_parts"] = errors
            parts = {name: self.totals[name] for name in self.config.objectives}
            if len(parts) > 1:
                line["loss_parts"] = {name: float(sum_processes(v)) / n for name, v in parts.items()}
        probes = self.config.probes
        if probes is not None and (self.epoch % probes.every == 0 or self.epoch == self.config.n_epochs):
            if not self.rank:
                self.probed = measure_probes(
                    self.model.written, self.material, probes, seed=self.seed,
                    batch_size=self.config.batch_size, labelled=self.labelled,
                )  # fmt: skip
            line["probes"] = self.probed
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _verify(self) -> None:
        try:
            self.material.verify()
        except DataError as error:
            kept = self.folder / CHECKPOINT
            rescue = f"pretrain.start_from={kept}" if kept.is_file() else "pretrain.start_from"
            raise DataError(
                f"{str(error).rstrip('.')}; the present weights belong to the former corpus: restore "
                f"that corpus, or continue from the weights on the new corpus with {rescue} and another folder."
            ) from error

    def compute_loss(self, rows: np.ndarray, step: int) -> Tensor:
        """Return the weighted error of these rows; the step's number decides masks, partners and dropout.

        Several processes each return that of their share, so weighed that the mean over processes is the error.
        """
        config = self.config
        with seeded(derive_seed(self.seed, "pretrain", "step", step), self.device):
            ranks = self._draw_ranks(len(rows))
            partner_rows, partner_ranks = None, None
            if self.partners:
                generator = make_generator(self.seed, "pretrain", "partner", step)
                partner_rows = self.partners["train"].draw(rows, generator)
                partner_ranks = self._draw_ranks(len(rows))
            guided: np.ndarray | None = None
            if self.seen is not None:
                torch.rand(len(rows))  # a draw of earlier versions, so that dropout draws what it drew then
                guided = ~np.isnan(self.seen[rows, 0])
            counts, n_rows = None, len(rows)
            if self.n_ranks > 1:
                # Masks are those of one process; dropout is drawn by each for itself.
                seed_device(self.device, derive_seed(self.seed, "pretrain", "dropout", step, self.rank))
                places, counts = self._share(n_rows)
                rows, ranks = rows[places], ranks[places]
                guided = None if guided is None else guided[places]
                if partner_rows is not None and partner_ranks is not None:
                    partner_rows, partner_ranks = partner_rows[places], partner_ranks[places]
            errors = self._compute_errors(
                self.wrapped, rows, ranks, partner_rows, partner_ranks, counts, guided
            )
            total: Tensor | None = None
            self.parts: dict[str, float] = {}
            for name, weight in config.objectives.items():
                error = errors[name]
                if error.dim() and counts is None:
                    error = error.mean()
                elif counts is not None and error.dim():
                    error = (error * counts).sum() * (self.n_ranks / n_rows)
                if len(config.objectives) > 1:
                    self.parts[name] = float(error.detach())
                part = error if weight == 1 else weight * error
                total = part if total is None else total + part
            assert total is not None
            return total

    def _share(self, n: int) -> tuple[np.ndarray, Tensor]:
        """Return which of the rows of a batch this process takes, and which of those count.

        All processes must meet with as many rows: the last batch is filled up with rows that do not count.
        """
        places = take_share(np.arange(n + -n % self.n_ranks))
        counts = torch.as_tensor(places < n, dtype=torch.float32, device=self.device)
        return places % n, counts

    def _draw_ranks(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        encoder = self.model.encoder
        return draw_ranks(n, encoder.n_parcels, encoder.n_patches, self.config.mask, generator)

    def _compute_errors(
        self,
        model: Any,
        rows: np.ndarray,
        ranks: Tensor,
        partner_rows: np.ndarray | None = None,
        partner_ranks: Tensor | None = None,
        counts: Tensor | None = None,
        guided: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        batch, mask = self._make_view(rows, ranks, guided)
        partner, person = None, None
        if partner_rows is not None and partner_ranks is not None:
            partner = self._make_view(partner_rows, partner_ranks)
            person = torch.from_numpy(self.material.person[rows]).to(self.device)
        errors: dict[str, Tensor] = model(batch, mask, partner, person, counts)
        return errors

    def _make_view(
        self, rows: np.ndarray, ranks: Tensor, guided: np.ndarray | None = None
    ) -> tuple[PretrainingBatch, Mask]:
        read = self._read(rows)
        batch = self._to_device(read)
        if guided is not None and guided.any():
            ranks = ranks.clone()
            ranks[guided] = self._rank_by_match(batch.data[guided], rows[guided], ranks[guided])
        observed = None if read.observed is None else torch.from_numpy(read.observed)
        mask = make_mask(ranks, self.config.mask_ratio, observed)
        return batch, _move(mask, self.device)

    def _rank_by_match(self, data: Tensor, rows: np.ndarray, ranks: Tensor) -> Tensor:
        assert self.match is not None
        assert self.seen is not None
        encoder = self.model.encoder
        with torch.no_grad():
            match = self.match.measure(
                encoder.cut_patches(data), torch.from_numpy(self.seen[rows]).to(self.device)
            )
        return rank_by_match(match.cpu(), ranks, encoder.n_parcels, self.config.mask)

    def _to_device(self, read: Rows) -> PretrainingBatch:
        moved = [
            None if part is None else torch.from_numpy(part).to(self.device)
            for part in (np.asarray(read.data, dtype=np.float32), read.interval, read.observed)
        ]
        assert moved[0] is not None
        return PretrainingBatch(moved[0], moved[1], moved[2])

    def _describe_rescue(self) -> str:
        kept = self.folder / CHECKPOINT
        where = f"the last good state is in {kept}" if kept.is_file() else "no state was kept yet"
        return f"{where}; lower pretrain.learning_rate and check those trials."

    def _read(self, rows: np.ndarray) -> Rows:
        return self.material.read(rows)

    # --- held-out error -----------------------------------------------------------------------------------

    def measure_errors(self) -> dict[str, float]:
        """Return the mean error of the held-out trials by objective, under fixed masks and partners."""
        self.model.eval()
        totals: dict[str, float] = {}
        totals |= dict.fromkeys(self.config.objectives, 0.0)
        if "jepa" in totals:
            totals["jepa_of_mean"] = 0.0
        with torch.no_grad():
            for rows, ranks, partner, counts in self._iterate_held_out():
                other_rows, other_ranks = partner or (None, None)
                errors = self._compute_errors(self.model, rows, ranks, other_rows, other_ranks, counts)
                n_rows = (
                    len(rows) if counts is None else float(sum_processes(float(counts.sum()))) / self.n_ranks
                )
                for name, error in errors.items():
                    each = error if counts is None or not error.dim() else error * counts
                    # a contrast is one number for the rows of all processes
                    totals[name] += float(each.sum() if error.dim() else error * n_rows)
        n = len(self.material.held_out)
        return {name: float(sum_processes(total)) / n for name, total in totals.items()}

    def _measure_baseline(self) -> float:
        """Return the error, on the same tokens, of predicting the mean that a token has over the training trials."""
        size, total = self.config.batch_size, 0.0
        mean: Tensor | None = None
        measured = self.material.measured
        mine = take_share(measured)
        n_parcels = self.model.encoder.n_parcels
        counted = np.zeros(n_parcels)
        with torch.no_grad():
            for start in range(0, len(mine), size):
                batch = self._to_device(self._read(mine[start : start + size]))
                targets = self.model.make_targets(batch.data)
                if batch.observed is not None:
                    targets = targets * _spread(batch.observed, targets)
                counted += len(targets) if batch.observed is None else batch.observed.sum(dim=0).cpu().numpy()
                # a running mean in float64, batch by batch
                part = targets.double().sum(dim=0) / len(measured)
                mean = part if mean is None else mean + part
            assert mean is not None
            if self.n_ranks > 1:
                mean = torch.as_tensor(sum_processes(mean.cpu().numpy()), device=self.device)
            counted = sum_processes(counted)
            if (counted < len(measured)).any():  # of those windows alone that have the parcel
                share = torch.as_tensor(np.maximum(counted, 1) / len(measured), device=self.device)
                mean = mean / share.repeat_interleave(len(mean) // n_parcels)[:, None]
            for rows, ranks, _, counts in self._iterate_held_out(alone=True):
                batch, mask = self._make_view(rows, ranks)
                errors = (self.model.make_targets(batch.data) - mean.float()).square()
                # hidden tokens only, as the loss counts
                each = average_hidden(take_hidden(errors.mean(dim=-1, keepdim=True), mask), mask)
                total += float((each if counts is None else each * counts).sum())
        return float(sum_processes(total)) / len(self.material.held_out)

    def _iterate_held_out(
        self, *, alone: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor, tuple[np.ndarray, Tensor] | None, Tensor | None]]:
        """Yield rows of this process, ranks of their tokens, their partners where asked for, and which rows count."""
        # The same masks at every look, so that epochs are compared on the same tokens.
        generator = make_torch_generator(self.seed, "pretrain", "held_out_masks")
        held_out, size = self.material.held_out, self.config.batch_size
        if self.partners:
            # Neighbours are windows of one person, none of which is a negative of another.
            held_out = make_generator(self.seed, "pretrain", "held_out_order").permutation(held_out)
        for start in range(0, len(held_out), size):
            rows = held_out[start : start + size]
            ranks = self._draw_ranks(len(rows), generator)
            partner: tuple[np.ndarray, Tensor] | None = None
            if self.partners and not alone:
                own = make_generator(self.seed, "pretrain", "held_out_partner", start)
                # with a generator of its own: the masks of the rows stay those that the baseline is measured under
                masks = make_torch_generator(self.seed, "pretrain", "held_out_partner_masks", start)
                partner = self.partners["held_out"].draw(rows, own), self._draw_ranks(len(rows), masks)
            counts = None
            if self.n_ranks > 1:
                places, counts = self._share(len(rows))
                rows, ranks = rows[places], ranks[places]
                partner = None if partner is None else (partner[0][places], partner[1][places])
            yield rows, ranks, partner, counts

    # --- files --------------------------------------------------------------------------------------------

    @cached_property
    def corpora(self) -> list[dict[str, Any]]:
        """What is written down about the corpora that are learnt from."""
        return self.material.describe()

    @cached_property
    def earlier(self) -> list[dict[str, Any]]:
        """The same of those that the encoder had learnt from before."""
        return [] if self.config.start_from is None else read_learnt(self.config.start_from)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """All that makes one run another: what was computed so far would not fit it.

        Taken once: a corpus that changes later must not pass for the one that was learnt from.
        """
        statistics = [self.model.encoder.mean.tolist(), self.model.encoder.std.tolist()]
        if self.match is not None:
            statistics.append(self.match.weights.tolist())
        return {
            "layout": 2,
            "config": self.config.hashed_fields(),
            "n_processes": self.n_ranks,
            "seed": self.seed,
            "signal": self.signal.as_json(),
            "data": hash_json([self.material.identify(), statistics]),
        }

    def write_checkpoint(self) -> None:
        """Write weights, optimiser and position into one file that replaces the former at once."""
        totals = {name: float(sum_processes(total)) for name, total in self.totals.items()}
        if self.rank:
            return
        groups = {
            "model": self.model.state_dict(), "best": self.best, "optimiser": pack_optimiser(self.optimiser)
        }  # fmt: skip
        state = {
            "identity": self._identity,
            "epoch": self.epoch,
            "n_done": self.n_done,
            "totals": totals,
            "best_epoch": self.best_epoch,
            "best_error": self.best_error if self.best else None,  # no number of JSON before the first epoch
            "probed": self.probed,
            "architecture": describe_encoder(self.model.encoder),
            # For whoever trains on from here.
            "corpora": self.corpora,
            "earlier_corpora": self.earlier,
        }
        if self.accelerator is not None and self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        write_checkpoint(self.folder / CHECKPOINT, groups, state)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one; lines of the log after it are dropped.

        Raises
        ------
        DataError
            If the checkpoint is damaged or of another run, or processes find different ones.
        """
        found = read_checkpoint(self.folder / CHECKPOINT, self._identity)
        if found is not None:
            self._load(*found)
        check_same_start(self.epoch, self.folder, self.device)
        if self.rank:
            return
        if found is None:
            (self.folder / LOG).unlink(missing_ok=True)
        else:
            self._cut_log()

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict(take(tensors, "model"))
        self.best = take(tensors, "best")
        unpack_optimiser(self.optimiser, take(tensors, "optimiser"))
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.best_error = math.inf if state["best_error"] is None else state["best_error"]
        self.n_done, self.probed = state["n_done"], state["probed"]
        # The sum of all processes, which the first one alone continues from.
        self.totals = {name: 0.0 if self.rank else total for name, total in state["totals"].items()}
        if self.accelerator is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _cut_log(self) -> None:
        path = self.folder / LOG
        lines = path.read_text().splitlines() if path.is_file() else []
        with replace_atomically(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines[: self.epoch]))

    def describe_result(self) -> dict[str, Any]:
        """Return what was reached, and by what."""
        best = self.config.keep == "best"
        reached: dict[str, Any] = {
            "held_out": self.best_error,
            "mean_baseline": self.baseline,
            "epoch": self.best_epoch if best else self.epoch,
            "normalisation": self.model.normalisation,
            "n_train": len(self.material.train),
            "n_held_out": len(self.material.held_out),
        }
        if not best:
            errors = self.measure_errors()
            reached["held_out"] = errors.get("masked", next(iter(errors.values())))
        if self.probed:
            reached["probes"] = self.probed  # of the last epoch
        return reached

    def write_result(self, folder: Path, reached: dict[str, Any], fingerprint: str) -> None:
        """Write the encoder with its description and the log into `folder`."""
        encoder = self.model.written
        weights = self.best if self.config.keep == "best" else encoder.state_dict()
        write_tensors(folder / WEIGHTS, {k: v.detach().cpu().contiguous() for k, v in weights.items()})
        description: dict[str, Any] = {
            "architecture": describe_encoder(encoder),
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "reached": reached,
        }
        if self.corpora:
            description["corpora"] = self.corpora
        if self.earlier:
            description["earlier_corpora"] = self.earlier
        if fingerprint:
            description["fingerprint"] = fingerprint
        if (self.folder / LOG).is_file() and folder.resolve() != self.folder.resolve():
            shutil.copyfile(self.folder / LOG, folder / LOG)
        # Last: where it lies, all is there.
        write_json(folder / DESCRIPTION, description)


def _move(mask: Mask, device: torch.device) -> Mask:
    def move(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device)

    return Mask(
        mask.order.to(device),
        mask.n_visible,
        mask.first,
        move(mask.seen),
        move(mask.hidden),
        move(mask.present),
    )


def _spread(observed: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for each token that has data, 0 for others: (batch, n_tokens, 1)."""
    return observed.repeat_interleave(targets.shape[1] // observed.shape[1], dim=1)[..., None].to(
        targets.dtype
    )


def measure_parcels(
    read: Callable[[np.ndarray], Rows], rows: np.ndarray, n_parcels: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each parcel over trials and times, float32 of shape (n_parcels,).

    Read in blocks, by several processes a share each; trials that lack a parcel do not count for it, and a parcel that
    does not vary gets the deviation 1. Two passes, since the mean of squares less the square of the mean loses all
    digits where the mean is large.
    """
    mine = take_share(rows)

    def average(center: np.ndarray | None) -> np.ndarray:
        total, count = np.zeros(n_parcels), np.zeros(n_parcels)
        for start in range(0, len(mine), block):
            found = read(mine[start : start + block])
            series = np.asarray(found.data, dtype=np.float64)
            series = series.reshape(len(series), n_parcels, -1)
            part = (series if center is None else (series - center[:, None]) ** 2).mean(axis=2)
            if found.observed is not None:
                part = part * found.observed
            total += part.sum(axis=0)
            count += len(part) if found.observed is None else found.observed.sum(axis=0)
        mean: np.ndarray = sum_processes(total) / np.maximum(sum_processes(count), 1)
        return mean

    mean = average(None)
    std = np.sqrt(average(mean))
    # A parcel that never varies would be divided by rounding.
    flat = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    return mean.astype(np.float32), np.where(flat, 1.0, std).astype(np.float32)
