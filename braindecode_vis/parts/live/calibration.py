"""Adapts a run to the present person: a block of pictures, few-shot adaptation, and running statistics.

Owns the order and times of a block, the clock between the page and the stream, the flank of a photodiode, the proof of
what it gained that encoders of a run adapt to the recorded trials (pictures that the adaptation has not seen), and
running whitening and z-score. Knows no browser. How an encoder adapts is its own (`adapt`). Trials of a block train;
none of them is a test.

References
----------
He and Wu (2020), doi:10.1109/TBME.2019.2913914: Euclidean alignment, of which the running whitening is a causal form.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, Responses, normalise_rows
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder, Context
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.parts.live.judge import Judge
from braindecode_vis.parts.live.session import LiveSession
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Listener, Marker, StreamInfo
from braindecode_vis.pipeline.leaks.likeness import find_copies
from braindecode_vis.pipeline.predicting import open_given_gallery
from braindecode_vis.pipeline.preparing import embed, preprocess
from braindecode_vis.scoring.uncertainty import jackknife_interval

#: Pictures and trials below which nothing is learnt: a choice of ours, as fewer leave no interval worth its name.
FEWEST_IMAGES, FEWEST_TRIALS = 5, 10
#: Into how many groups pictures are parted, each of which is left out in turn, and how often a ridge does so, each time
#: with other groups. A network, whose every fit takes a while, does it once.
GROUPS, ROUNDS = 5, 8
FLANK_S = (-0.05, 0.25)  # around the time that the page tells
#: How long the last epochs of a block are waited for, in s; responses of fMRI take that long.
LATE_S, LATE_FMRI_S = 5.0, 45.0
DECODER = "calibration.json"


# --- the block ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One showing of a block; see `braindecode_vis.parts.live.page.server.Showing`."""

    stimulus_id: str
    duration: float
    pause: float


def plan_block(
    ids: Sequence[str],
    *,
    repetitions: int = 3,
    soa: float = 1.0,
    jitter: float = 0.2,
    duration: float = 0.5,
    seed: int = 0,
) -> list[Picture]:
    """Return the showings of a block: every picture once in each round, and never twice in a row.

    Parameters
    ----------
    ids
        Of the pictures.
    repetitions
        Rounds.
    soa, jitter
        From one onset to the next in s, and by how much it varies to both sides.
    duration
        How long a picture stays, in s.
    seed
        Of order and jitter.

    Examples
    --------
    >>> [one.stimulus_id for one in plan_block(["a", "b"], repetitions=2, seed=1)]
    ['a', 'b', 'a', 'b']
    """
    if soa - jitter < duration:
        raise ConfigError(
            f"pictures of {duration:g} s every {soa:g} s, give or take {jitter:g} s, would overlap."
        )
    draw, shown = make_generator(seed, "calibration"), list[str]()
    for _ in range(repetitions):
        order = [str(ids[n]) for n in draw.permutation(len(ids))]
        if shown and order[0] == shown[-1] and len(order) > 1:
            order = [*order[1:], order[0]]
        shown += order
    pauses = soa - duration + draw.uniform(-jitter, jitter, len(shown))
    return [Picture(name, duration, float(pause)) for name, pause in zip(shown, pauses, strict=True)]


def choose_pictures(judge: Judge, pictures: str | Path, n: int, seed: int) -> tuple[Embeddings, list[Any]]:
    """Return the targets of the pictures of a block, and the pictures themselves.

    Parameters
    ----------
    judge
        Of the session.
    pictures
        A folder of pictures, or ``run``: training pictures of the run.
    n
        How many, drawn by `seed`.

    Raises
    ------
    DataError
        If they are too few, or not available.
    """
    number, run = judge.folds[0], judge.run
    draw = make_generator(seed, "calibration pictures")
    if str(pictures) == "run":
        bank, prepared = embed(run)[number], preprocess(run)
        ids = pd.unique(prepared.responses.stimulus_ids[prepared.folds[number].train].astype(str))
        targets, stimuli = bank.embeddings, prepared.stimuli
    else:
        gallery = open_given_gallery(run, number, Path(pictures))
        if gallery.stimuli is None:
            raise DataError(
                f"{pictures} holds embeddings, but a block shows pictures; give a folder of pictures."
            )
        ids, targets, stimuli = gallery.embeddings.ids.astype(str), gallery.embeddings, gallery.stimuli
    if len(ids) < FEWEST_IMAGES:
        raise DataError(f"a block needs {FEWEST_IMAGES} pictures, but {pictures} has {len(ids)}; give more.")
    if not stimuli.has_pixels:
        raise DataError(
            "the training pictures of the run are not available; give a folder of pictures to --calibrate."
        )
    chosen = [str(i) for i in draw.permutation(ids)[:n]]
    return targets.select(chosen), [stimuli.read_image(name) for name in chosen]


class CalibrationBlock(Listener):
    """Shows pictures through the page, collects their trials from the session, and adapts its decoder to them.

    A `braindecode_vis.parts.live.page.server.Calibration`, and a listener of the same session.

    Parameters
    ----------
    judge
        What the session decides with.
    targets
        Of the pictures, one row each.
    images
        The pictures.
    inject
        Adds a marker to the session (`LiveSession.inject`).
    photodiode
        Channel of a photodiode on the square of the page; its flank then is the onset.
    out
        Folder for the adapted decoder; must not hold one. None keeps it in memory.
    tell
        Gets sentences.
    **plan
        As for `plan_block`.
    """

    def __init__(
        self,
        judge: Judge,
        targets: Embeddings,
        images: Sequence[Any],
        *,
        inject: Callable[[Marker], None],
        photodiode: str | None = None,
        out: Path | None = None,
        tell: Callable[[str], None] = lambda sentence: None,
        **plan: Any,
    ) -> None:
        if out is not None and (out / DECODER).exists():
            raise DataError(
                f"{out} already holds a calibrated decoder; give another folder, or use this decoder "
                "without a new calibration."
            )
        self.judge, self.targets, self.inject, self.out, self.tell_session = judge, targets, inject, out, tell
        self.images = {str(name): image for name, image in zip(targets.ids, images, strict=True)}
        self.showings = plan_block(list(self.images), **plan)
        self.clock = PageClock()
        self._own, self._said, self._late = list(judge.encoders), judge.adaptation, LATE_S
        self._diode = None if photodiode is None else Photodiode(photodiode)
        self._marked: dict[str, list[float]] = {}
        self._n_marked, self._n_settled, self._uncertainty = 0, 0, 0.0
        self._trials: list[tuple[str, np.ndarray]] = []
        self._changed, self._learning = threading.Condition(), threading.Lock()
        self.adapted: Adaptation | None = None

    # --- the page -----------------------------------------------------------------------------------------

    def list_showings(self) -> Sequence[Picture]:
        """Return the pictures in the order in which they are shown."""
        return self.showings

    def find_images(self, ids: Sequence[str]) -> Sequence[Any]:
        """Return the pictures."""
        return [self.images.get(str(name)) for name in ids]

    def mark(self, stimulus_id: str, time: float, uncertainty: float) -> None:
        """Turn an onset on the clock of the page into a marker of the stream."""
        when = self.clock.find_source_time(time)
        if when is None:
            self.tell_session(f"{stimulus_id} was shown before the stream had begun; it is left out.")
            return
        with self._changed:
            self._n_marked += 1
            self._uncertainty = max(self._uncertainty, uncertainty)
        if self._diode is None:
            self._send(stimulus_id, when)
        else:
            self._diode.ask(stimulus_id, when)

    def finish(self, complete: bool) -> str:
        """Wait for the last epochs, adapt, check, and say what it gained; may be called again after more showings."""
        with self._learning:
            until = time.monotonic() + self._late
            with self._changed:
                while self._n_settled < self._n_marked and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
            try:
                sentence = self._adapt()
            except (BraindecodeVisError, OSError, np.linalg.LinAlgError) as error:
                sentence = f"Nothing was adapted: {error}"
            if not complete:
                sentence = f"The block was stopped early. {sentence}"
            if self._diode is not None:
                sentence += f" {self._diode.describe()}"
            elif self._uncertainty:
                sentence += (
                    f" Onsets are those that the page reports, to {1000 * self._uncertainty:.1f} ms and "
                    "the delay of the screen; a photodiode would measure this delay."
                )
        self.tell_session(sentence)
        return sentence

    # --- the session --------------------------------------------------------------------------------------

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        """Find the photodiode."""
        self._late = LATE_FMRI_S if info.modality == "fmri" else LATE_S
        if self._diode is not None:
            self._diode.open(info)

    def hear(self, chunk: Chunk) -> None:
        """Keep the clock, and the trace of the photodiode."""
        self.clock.hear(chunk)
        if self._diode is not None:
            for name, when in self._diode.hear(chunk):
                self._send(name, when)

    def decide(self, decision: Decision) -> None:
        """Collect the trials of the block."""
        if decision.image is not None or not self.owns(decision):
            return
        with self._changed:
            if not decision.lost and decision.epoch is not None:
                self._trials.append((decision.marker, np.array(decision.epoch)))
            self._n_settled += 1
            self._changed.notify_all()

    def owns(self, decision: Decision) -> bool:
        """Say whether a decision is of a picture of the block."""
        with self._changed:
            return any(abs(when - decision.onset) < 1e-6 for when in self._marked.get(decision.marker, []))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Wait for what is being learnt: it is kept, and no thread is cut off."""
        if self._learning.locked():
            self.tell_session(
                "The session ends after learning from the block; press Ctrl-C again to end it now."
            )
        with self._learning:
            pass

    def _send(self, name: str, when: float) -> None:
        with self._changed:
            self._marked.setdefault(name, []).append(when)
        self.inject(Marker(when, name))

    def _adapt(self) -> str:
        with self._changed:
            trials = list(self._trials)
        shape = self.judge.own.data.shape[1:]
        # Voxels are shown as channels with one time.
        block = np.stack([epoch.reshape(shape) for _, epoch in trials]) if trials else np.empty((0, *shape))
        # From the run's own each time, which has seen none of these trials.
        self.judge.encoders, self.judge.adaptation = list(self._own), self._said
        self.adapted = adapt_to_person(self.judge, block, [name for name, _ in trials], self.targets)
        if self.adapted.is_used:
            self.judge.adopt(encoders=self.adapted.encoders, words=self.adapted.words)
        if self.out is not None and self.adapted.is_used:
            write_adaptation(self.adapted, self.judge, self.out, list(self.images))
            return f"{self.adapted.describe()} It is stored in {self.out}."
        if self.out is not None:
            (self.out / DECODER).unlink(missing_ok=True)  # of an earlier stop of this block
            return f"{self.adapted.describe()} Nothing is stored in {self.out}."
        return self.adapted.describe()


def prepare_calibration(
    session: LiveSession,
    pictures: str | None,
    *,
    calibrated: Path | None = None,
    n_pictures: int = 20,
    repetitions: int = 3,
    soa: float = 1.0,
    photodiode: str | None = None,
    running: bool = False,
) -> CalibrationBlock | None:
    """Let a session adapt, and return the block that its page is to show, if it is to show one.

    Parameters
    ----------
    session
        Not yet running.
    pictures
        As for `choose_pictures`; None shows no block, and takes what lies in `calibrated`.
    calibrated
        Folder of the adapted decoder.
    n_pictures, repetitions, soa
        Size and pace of the block; pictures stay for half of the `soa`, at most 0.5 s.
    photodiode
        Its channel.
    running
        Whether whitening and z-score run along.

    Raises
    ------
    ConfigError
        If the encoder is of a kind that cannot be adapted.
    """
    decoder: Any = session.decoder
    judge: Judge = decoder.judge
    if running:
        judge.adopt(statistics=make_running(judge), words=RunningStatistics.WORDS)
    if pictures is None:
        if calibrated is not None:
            read_adaptation(judge, calibrated)
        return None
    if any(encoder.adaptation is None for encoder in judge.encoders):
        raise ConfigError(
            f"encoders of the kind {judge.run.config.encoder.kind} cannot be adapted to a block of pictures; ridge and "
            "networks can."
        )
    seed = judge.run.config.seed
    targets, images = choose_pictures(judge, pictures, n_pictures, seed)
    if words := _describe_tested(judge, list(targets.ids), images):
        session.tell(words)
    decoder.know(list(targets.ids))
    block = CalibrationBlock(
        judge, targets, images, inject=session.inject, photodiode=photodiode, out=calibrated, tell=session.tell,
        repetitions=repetitions, soa=soa, jitter=0.2 * soa, duration=min(0.5, 0.5 * soa), seed=seed,
    )  # fmt: skip
    session.add(block)
    session.is_counted = lambda decision: not block.owns(decision)
    return block


def _describe_tested(judge: Judge, names: list[str], images: Sequence[Any]) -> str:
    """Say that pictures of a block are test pictures of the run or copies, or not compared; empty if none is."""
    prepared = preprocess(judge.run)
    if not prepared.stimuli.has_pixels:
        return ""
    tested = pd.unique(prepared.responses.stimulus_ids[prepared.folds[judge.folds[0]].test].astype(str))
    try:
        found = find_copies(prepared.stimuli, tested, zip(names, images, strict=True))
    except DataError as error:
        return f"calibration pictures were not compared with the test pictures of the run: {error}"
    if not found:
        return ""
    first, test, how = found[0]
    return (
        f"{len(found)} of {len(names)} calibration pictures are test pictures of the run, first {first} ({test}{how}): "
        "after the block, decisions about them say nothing about new pictures; give others to --calibrate."
    )


class PageClock:
    """The time of the stream for a time of ``time.perf_counter()``.

    A sample is at hand some time after it was taken. The least such delay of the last minute is that of no queue on the
    way; what is left of it is a lag that does not vary.
    """

    def __init__(self, span: float = 60.0) -> None:
        self.span = span
        self._delays: deque[tuple[float, float]] = deque()

    def hear(self, chunk: Chunk) -> None:
        """Look at when samples were taken and when they were at hand."""
        if not len(chunk.times):
            return
        arrived = chunk.arrived or time.perf_counter()
        self._delays.append((arrived, arrived - float(chunk.times[-1])))
        while self._delays[0][0] < arrived - self.span:
            self._delays.popleft()

    def find_source_time(self, page: float) -> float | None:
        """Return the time of the stream, None before its first sample."""
        delays = tuple(self._delays)
        return page - min(delay for _, delay in delays) if delays else None


class Photodiode:
    """Finds the flank of a square that is lit with each picture.

    Parameters
    ----------
    channel
        Its name in the stream.
    """

    def __init__(self, channel: str) -> None:
        self.channel, self.lags = channel, list[float]()
        self._asked: deque[tuple[str, float]] = deque()
        self._trace: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self.n_lost = 0

    def open(self, info: StreamInfo) -> None:
        """Find the channel."""
        if self.channel not in info.ch_names:
            raise DataError(
                f"the stream {info.name} has no channel {self.channel!r} for a photodiode; it has "
                f"{', '.join(info.ch_names[:12])}."
            )
        self._row = info.ch_names.index(self.channel)

    def ask(self, name: str, when: float) -> None:
        """Look for the flank near a time of the stream."""
        self._asked.append((name, when))

    def hear(self, chunk: Chunk) -> list[tuple[str, float]]:
        """Take samples in, and return the names and times of the flanks that were found."""
        if len(chunk.times):
            self._trace.append((np.asarray(chunk.times), np.array(chunk.samples[self._row], float)))
        while len(self._trace) > 2 and self._trace[1][0][0] < self._trace[-1][0][-1] - 20:
            self._trace.popleft()
        found = []
        while self._asked and self._trace and self._trace[-1][0][-1] >= self._asked[0][1] + FLANK_S[1]:
            name, when = self._asked.popleft()
            times, values = (np.concatenate(part) for part in zip(*self._trace, strict=True))
            flank = find_flank(times, values, when)
            if flank is None:
                self.n_lost += 1
            else:
                self.lags.append(flank - when)
            # Without a flank the page's own time is the best that there is, less what the others lag.
            found.append(
                (
                    name,
                    flank if flank is not None else when + (float(np.mean(self.lags)) if self.lags else 0.0),
                )
            )
        return found

    def describe(self) -> str:
        """Return mean and spread of the lag in a sentence."""
        if not self.lags:
            return f"The photodiode {self.channel} showed no light change; onsets are those that the page reports."
        lags = 1000 * np.array(self.lags)
        lost = f"; {self.n_lost} pictures had no light change" if self.n_lost else ""
        return (
            f"According to the photodiode, pictures appeared {lags.mean():.1f} ms (standard deviation "
            f"{lags.std():.1f} ms, "
            f"{len(lags)} pictures) after the page's time, which was corrected{lost}."
        )


def find_flank(times: np.ndarray, values: np.ndarray, when: float) -> float | None:
    """Return when a trace first crosses the middle between dark and bright near a time, None if it does not.

    The square of the page turns bright with one picture and dark with the next.

    Parameters
    ----------
    times, values : arrays of shape (n_samples,)
        Of some seconds around.
    when
        In s.

    Examples
    --------
    >>> times = np.arange(100) / 100
    >>> round(find_flank(times, (times >= 0.5) * 3.0, 0.45), 3)
    0.495
    """
    near = np.flatnonzero((times >= when + FLANK_S[0]) & (times <= when + FLANK_S[1]))
    if len(near) < 2:
        return None
    low, high = float(values[near].min()), float(values[near].max())
    # The whole trace says how bright bright is: noise alone has a middle, too.
    if high - low < 0.5 * (float(values.max()) - float(values.min())) or high == low:
        return None
    above = values[near] > (low + high) / 2
    turns = np.flatnonzero(above[:-1] != above[1:])
    before, after = near[turns[0]], near[turns[0] + 1]
    share = ((low + high) / 2 - values[before]) / (values[after] - values[before])
    return float(times[before] + share * (times[after] - times[before]))


# --- adaptation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adaptation:
    """Encoders that were adapted to a person, and what that gained.

    Parameters
    ----------
    encoders
        One for each fold that predicts.
    n_trials, n_images
        What they learnt from.
    before, after, gain
        How often the true picture is preferred to another that was left out with it (two-way identification; chance is
        0.5), by the run and by an adaptation that has not seen these pictures, and their difference: value and 95 %
        interval over pictures.
    left_out
        What was left out at a time, in words.
    """

    encoders: list[Any]
    n_trials: int
    n_images: int
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    gain: tuple[float, float, float]
    left_out: str

    @property
    def is_used(self) -> bool:
        """Whether the interval of the gain lies above zero."""
        return self.gain[1] > 0

    @property
    def words(self) -> str:
        """For the protocol."""
        return f"calibrated on {self.n_trials} trials of this person ({self.n_images} pictures)"

    def describe(self) -> str:
        """Return what was gained, and whether it is used."""

        def say(numbers: tuple[float, float, float]) -> str:
            return f"{numbers[0]:.3f} ({numbers[1]:.3f} to {numbers[2]:.3f})"

        if self.is_used:
            used = "It is used from now on."
        elif self.gain[2] < 0:
            used = "The adaptation made it worse: the run is not changed."
        else:
            used = "The gain cannot be distinguished from 0: the run is not changed; more pictures or rounds may help."
        return (
            f"{self.n_trials} trials of {self.n_images} pictures; two-way identification, {self.left_out} left out: "
            f"{say(self.before)} before, {say(self.after)} after, chance 0.5, gain {say(self.gain)}. {used}"
        )


def adapt_to_person(judge: Judge, block: np.ndarray, ids: Sequence[str], targets: Embeddings) -> Adaptation:
    """Adapt the encoders of a session to labelled trials, and check what it gains for pictures that were left out.

    Pictures are left out in groups, and each is compared with those of its group alone. If one picture were left out
    and compared with the others, what was learnt would hold the mean of the others: with ten pictures this mean points
    away from the one that is missing, which then comes last though nothing was learnt, or something right.

    Parameters
    ----------
    judge
        What the session decides with; stays as it is.
    block : array of shape (n_trials, ...)
        Trials as the encoders take them.
    ids
        Picture of each trial.
    targets
        Of the pictures.

    Raises
    ------
    DataError
        If there are too few trials or pictures.
    ConfigError
        If the encoder is of a kind that cannot be adapted.
    """
    names = np.asarray(ids, dtype=object)
    images = pd.unique(names)
    if len(names) < FEWEST_TRIALS or len(images) < FEWEST_IMAGES:
        raise DataError(
            f"{len(names)} trials of {len(images)} pictures are too few for learning; show at least {FEWEST_IMAGES} "
            f"pictures and {FEWEST_TRIALS} trials (lost ones do not count)."
        )
    trials = judge.as_trial(np.asarray(block, np.float32))
    trials = trials.with_trials(
        trials.trials.assign(stimulus_id=names, concept=names, split="train", known=True)
    )
    values = targets.select(list(names))
    truth = np.array([int(np.flatnonzero(images == name)[0]) for name in names])
    gallery = judge.centre.apply(_map(judge, targets.select([str(i) for i in images]))).vectors
    own = _predict(judge, judge.encoders, trials)
    is_quick = all(encoder.adaptation.is_quick for encoder in judge.encoders)
    draw = make_generator(judge.run.config.seed, "calibration folds")
    # How often each picture was compared with each other, and preferred to it, before and after.
    met, before, after = (np.zeros((len(images), len(images))) for _ in range(3))
    for _ in range(ROUNDS if is_quick else 1):
        for group in np.array_split(draw.permutation(len(images)), min(GROUPS, len(images) // 2)):
            held = np.isin(truth, group)
            encoders = _fit(judge, trials.select(~held), values.take(~held))
            adapted, place = _predict(judge, encoders, trials.select(held)), np.ix_(group, group)
            met[place] += 1 - np.eye(len(group))
            before[place] += _identify(own[held], truth[held], group, gallery)
            after[place] += _identify(adapted, truth[held], group, gallery)
    size = -(-len(images) // min(GROUPS, len(images) // 2))
    return Adaptation(
        _fit(judge, trials, values), len(names), len(images), _bound(before, met), _bound(after, met),
        _bound(after - before, met, differs=True), f"{size} pictures at a time",
    )  # fmt: skip


def _map(judge: Judge, targets: Embeddings) -> Embeddings:
    encoder = judge.encoders[0]
    mapped: Embeddings = encoder.map_targets(
        targets, judge.subject if encoder.has_subject_galleries else None
    )
    return mapped


def _predict(judge: Judge, encoders: Sequence[Any], trials: Responses) -> np.ndarray:
    """Return predictions as they are compared, the mean over folds, shape (n_trials, n_features)."""
    return judge.centre.apply(judge.predict_trials(trials, encoders)).vectors


def _fit(judge: Judge, trials: Responses, targets: Embeddings) -> list[Any]:
    made = []
    for fold, encoder in zip(judge.fitted, judge.encoders, strict=True):
        chosen = fold.select(trials)
        # As whole as the one that it stands in for.
        made.append(roles.complete(BrainEncoder, encoder.adaptation.adapt(chosen, targets)))
    return made


def _identify(predicted: np.ndarray, truth: np.ndarray, group: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Return how often each picture of a group is preferred to each other, mean over its trials; 0 from itself."""
    similarity = normalise_rows(predicted) @ normalise_rows(gallery[group]).T  # (n_trials, n_group)
    place = np.array([int(np.flatnonzero(group == picture)[0]) for picture in truth])
    own = similarity[np.arange(len(place)), place][:, None]
    wins = (similarity < own) + 0.5 * (similarity == own)
    return np.stack([wins[place == n].mean(axis=0) for n in range(len(group))]) * (1 - np.eye(len(group)))


def _bound(wins: np.ndarray, met: np.ndarray, *, differs: bool = False) -> tuple[float, float, float]:
    """Return the share of comparisons that were won, or a difference of shares, and its interval over pictures.

    It is not widened as after other folds: the jackknife of pairs is wide enough that 1 to 2 % of blocks of noise are
    taken for a gain, where 2.5 % are allowed.
    """
    total, n = wins.sum(), met.sum()
    # Without a picture as what was seen and as what it is compared with.
    left_out = (total - wins.sum(axis=0) - wins.sum(axis=1)) / (n - met.sum(axis=0) - met.sum(axis=1))
    value = float(total / n)
    if differs:  # a difference lies between -1 and 1
        found = jackknife_interval((1 + value) / 2, (1 + left_out) / 2)
        limits = (np.nan, np.nan) if found is None else (2 * found.low - 1, 2 * found.high - 1)
    else:
        found = jackknife_interval(value, left_out)
        limits = (np.nan, np.nan) if found is None else (found.low, found.high)
    return value, float(limits[0]), float(limits[1])


def write_adaptation(adapted: Adaptation, judge: Judge, folder: Path, pictures: Sequence[str] = ()) -> None:
    """Write an adapted decoder, which `read_adaptation` reads for the same run, and the pictures that it was shown."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, encoder in zip(judge.folds, adapted.encoders, strict=True):
        (folder / f"fold{number:02d}").mkdir(exist_ok=True)
        encoder.write(folder / f"fold{number:02d}")
    record = {
        "protocol": adapted.words, "folds": judge.folds, "fits": [fold.artifact.fingerprint for fold in judge.fitted],
        "subject": judge.subject, "n_trials": adapted.n_trials, "n_images": adapted.n_images,
        "two_way": {"before": adapted.before, "after": adapted.after, "gain": adapted.gain, "chance": 0.5},
        "left_out": adapted.left_out, "pictures": list(pictures),
        "running": isinstance(judge.statistics, RunningStatistics),
    }  # fmt: skip
    write_json(folder / DECODER, record)


def read_adaptation(judge: Judge, folder: Path) -> None:
    """Let a session decide with what an earlier block has learnt; its pictures count in no score.

    Raises
    ------
    DataError
        If the folder holds no such decoder, or one of another run or of other statistics.
    """
    if not (folder / DECODER).is_file():
        raise DataError(f"{folder} holds no calibrated decoder; make one with --calibrate.")
    record = read_json(folder / DECODER)
    if record["fits"] != [fold.artifact.fingerprint for fold in judge.fitted]:
        raise DataError(
            f"{folder} was calibrated for another state of {judge.run.folder.path}; calibrate again."
        )
    if record.get("running", False) != isinstance(judge.statistics, RunningStatistics):
        how = "with" if record["running"] else "without"
        raise DataError(f"{folder} was calibrated {how} --adapt running; use it in the same way.")
    judge.taught |= set(record.get("pictures", ()))
    encoders = []
    for number in record["folds"]:
        encoder = roles.read(BrainEncoder, judge.run.encoder, folder / f"fold{number:02d}")
        encoder.bind(Context(images=preprocess(judge.run).stimuli, device=judge.run.config.retrieval.device))
        encoders.append(encoder)
    judge.adopt(encoders=encoders, words=record["protocol"])


# --- statistics that run along ------------------------------------------------------------------------------


@dataclass
class RunningStatistics:
    """What the run applies to a trial, and then whitening and z-score of the trials of this session so far.

    Channels are brought to the covariance (around their mean) that they have in the run's training trials, voxels to
    their mean and variance. Past trials alone count, the latest most; at the beginning, the run's own statistics are
    used.

    Parameters
    ----------
    base
        With ``apply(block, subject, session)``: what the run has learnt.
    mean : array of shape (n_channels,) or (n_features,)
        Of the run's training trials, as the encoder takes them.
    spread : array of shape (n_channels, n_channels) or (n_features,)
        Their covariance, or their variance.
    half_life
        Trials after which one counts half.
    prior
        How many trials the run's own statistics weigh.
    """

    base: Any
    mean: np.ndarray
    spread: np.ndarray
    half_life: float = 50.0
    prior: float = 10.0
    _sum: np.ndarray | None = field(default=None, repr=False)
    _squares: np.ndarray | None = field(default=None, repr=False)
    _n: float = 0.0

    WORDS = "running whitening and z-score: exponentially weighted, of past trials alone"

    @property
    def used(self) -> dict[str, str]:
        """What is applied before, in words."""
        return {**getattr(self.base, "used", {}), "this session": self.WORDS}

    def apply(self, block: np.ndarray, subject: str, session: str, run: str = "") -> np.ndarray:
        """Return trials of shape (n_trials, ...) by the statistics of those before, and then count them in."""
        values = self.base.apply(block, subject, session)
        out = np.empty_like(values)
        for row, trial in enumerate(values):
            out[row] = self._apply_one(np.asarray(trial, np.float64))
            self._count_in(np.asarray(trial, np.float64))
        return out

    def _apply_one(self, trial: np.ndarray) -> np.ndarray:
        if self._sum is None or self._squares is None:
            return trial
        n = self._n + self.prior
        mean = (self._sum + self.prior * self.mean) / n
        spread = (self._squares + self.prior * self.spread) / n
        if self.spread.ndim == 1:
            scale = np.sqrt(np.divide(self.spread, spread, out=np.ones_like(spread), where=spread > 0))
            return (trial.T - mean).T * (scale if trial.ndim == 1 else scale[:, None]) + (
                self.mean if trial.ndim == 1 else self.mean[:, None]
            )
        change = _root(self.spread, 0.5) @ _root(spread, -0.5)
        return change @ (trial - mean[:, None]) + self.mean[:, None]

    def _count_in(self, trial: np.ndarray) -> None:
        keep = 0.5 ** (1 / self.half_life)
        mean = trial if trial.ndim == 1 else trial.mean(axis=1)
        if self.spread.ndim == 1:
            # Around the run's mean at first, around the running one later.
            centre = (
                self.mean
                if self._sum is None
                else (self._sum + self.prior * self.mean) / (self._n + self.prior)
            )
            power = np.square((trial.T - centre).T)
            spread = power if trial.ndim == 1 else power.mean(axis=1)
        else:
            centred = trial - mean[:, None]
            spread = centred @ centred.T / trial.shape[1]
        self._sum = mean if self._sum is None else keep * self._sum + mean
        self._squares = spread if self._squares is None else keep * self._squares + spread
        self._n = keep * self._n + 1


def _root(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    # A channel without signal has no inverse root.
    return (vectors * np.maximum(values, 1e-10 * values[-1]) ** power) @ vectors.T


def make_running(judge: Judge, *, n_trials: int = 256) -> RunningStatistics:
    """Return running statistics that start from those of the run's training trials.

    Parameters
    ----------
    judge
        What the session decides with.
    n_trials
        Training trials that are looked at, drawn at random.
    """
    rows = preprocess(judge.run).folds[judge.folds[0]].train
    picked = np.sort(np.random.default_rng(0).permutation(rows)[:n_trials])
    data = np.asarray(judge.own.data[picked], dtype=np.float64)
    if judge.own.dims[1] == "channel" and data.ndim == 3:
        mean = data.mean(axis=2)
        centred = data - mean[:, :, None]
        return RunningStatistics(
            judge.statistics,
            mean.mean(axis=0),
            np.einsum("nct,ndt->cd", centred, centred) / (len(data) * data.shape[2]),
        )
    across = (0, 2) if data.ndim == 3 else 0
    return RunningStatistics(judge.statistics, data.mean(axis=across), data.var(axis=across))
