"""Embed any number of images by the target of a configuration or a run, in one process or several, into one bank."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from braindecode_vis import pipeline
from braindecode_vis.base import roles, store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import ImageEncoderSettings
from braindecode_vis.base.locks import hold_folder
from braindecode_vis.base.memory import describe_kill
from braindecode_vis.config import RunConfig
from braindecode_vis.embeddings.image_bank import (
    BankPlan,
    embed_parts,
    finish_bank,
    take_share,
)
from braindecode_vis.embeddings.image_sources import BrokenImageError, ImageSource, load_image
from braindecode_vis.pipeline.runs import Run
from braindecode_vis.pipeline.together import limit_threads, make_command, read_last_line

_POLL_S = 0.2


def open_encoder(config: RunConfig, run: Run | None, source: ImageSource) -> Any:
    """Return the image encoder of a target.

    Parameters
    ----------
    config
        Its target is taken where there is no run.
    run
        A run, whose stage `embed` is done or will be: what the encoder has learnt from training images is taken.
    source
        Pixels without a size take that of its first image.

    Raises
    ------
    ConfigError
        If the target is fitted on training images and there is no run, or folds of the run have spaces of their own.
    """
    if run is not None:
        banks = pipeline.embed(run)
        if len({bank.embeddings.space for bank in banks}) > 1:
            raise ConfigError(
                f"the target {config.target.kind} of {run.folder.path} has a different space in every "
                "fold; embed with a run with one fold (split.kind published)."
            )
        return banks[0].encoder
    settings = roles.complete(ImageEncoderSettings, config.target)
    if settings.fitted_on_training_images:
        raise ConfigError(
            f"the target {config.target.kind} is fitted on training images; instead of a configuration, "
            "give the folder of a run with the fitted target, for example made by braindecode-vis embed."
        )
    encoder = roles.build(roles.find_image_encoder_role(config.target), config.target)
    try:
        encoder.space  # noqa: B018 (only asked whether it is known)
    except DataError:
        first = source.list_shards()[0].name
        for item in islice(source.read(first, 0, len(source.name_images(first))), 100):
            with suppress(BrokenImageError):
                encoder.fit([load_image(item)[0]])
                break
    return encoder


def embed_images(
    plan: BankPlan,
    source: ImageSource,
    encoder: Any,
    *,
    skip_broken: bool = False,
    share: tuple[int, int] | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any] | None:
    """Compute what is missing of a bank, or the share of one of several processes, and finish it once all is there.

    Parameters
    ----------
    plan, source, encoder, skip_broken, advance
        As for `image_bank.embed_parts`.
    share
        Number of this process and how many there are; None computes all that is missing.
    tell
        Called with a sentence when another process has to be waited for.

    Returns
    -------
    dict or None
        The manifest; None if other processes have not finished.
    """
    if share is not None:
        embed_parts(
            plan, source, encoder, take_share(plan.parts, *share), skip_broken=skip_broken, advance=advance
        )
        if not plan.is_finished and plan.list_missing():
            return None
    with hold_folder(plan.folder, store.hash_json(plan.request), tell):
        if not plan.is_finished:
            missing = plan.list_missing()
            if share is None:
                advance(plan.n_images - sum(part.stop - part.start for part in missing))
            embed_parts(plan, source, encoder, missing, skip_broken=skip_broken, advance=advance)
        return finish_bank(plan)


def embed_in_processes(
    plan: BankPlan, words: Sequence[str], n_workers: int, advance: Callable[[int], None]
) -> None:
    """Let processes of this machine compute the parts of a bank that are missing.

    Parameters
    ----------
    plan
        Of the bank.
    words
        The command line of one process without ``--worker`` and ``--workers``.
    n_workers
        How many.
    advance
        Called with the number of images done.

    Raises
    ------
    DataError
        If one fails, with its sentence; the others are then ended too, and what they have finished is kept.
    """
    if plan.is_finished or not plan.list_missing():
        return
    logs = [plan.folder / f".worker-{number}.log" for number in range(n_workers)]
    workers: list[subprocess.Popen[bytes]] = []
    done = 0
    try:
        for number, log in enumerate(logs):
            share = ["--worker", str(number), "--workers", str(n_workers)]
            with log.open("wb") as file:
                workers.append(
                    subprocess.Popen(
                        make_command([*words, *share]), stdout=file, stderr=subprocess.STDOUT,
                        env=limit_threads(n_workers),
                    )
                )  # fmt: skip
        while any(worker.poll() is None for worker in workers) and not any(w.poll() for w in workers):
            time.sleep(_POLL_S)
            left = 0 if plan.is_finished else sum(part.stop - part.start for part in plan.list_missing())
            advance(plan.n_images - left - done)
            done = plan.n_images - left
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()
    for number, (worker, log) in enumerate(zip(workers, logs, strict=True)):
        if worker.returncode:
            said = read_last_line(log) or f"it ended with {worker.returncode}"
            if worker.returncode < 0 and not said.startswith("stopped"):
                killed = worker.returncode == -signal.SIGKILL
                how = describe_kill() if killed else f"it was ended by signal {-worker.returncode}"
                said = f"{how}; run the same command again to continue"
            raise DataError(f"process {number} of {n_workers}: {said}")
    for log in logs:
        log.unlink(missing_ok=True)
