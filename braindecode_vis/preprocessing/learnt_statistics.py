"""Applies the fitted whitening, scaling and standardising of a run to new trials.

Reads these statistics from the responses of a run, and chooses those for a new trial: the statistics of its own session
if the run has it (exactly as in preprocessing), otherwise the average over the known sessions of its subject, and for a
new subject the average over all subjects. Covariances, means and variances are averaged, never matrices. Nothing is
learnt from a new trial, unless `LearntStatistics.learn_anew` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import read_json
from braindecode_vis.preprocessing.glm_by_voxel import VoxelChoices
from braindecode_vis.preprocessing.scaling import (
    FeatureMoments,
    FeatureStatistics,
    RobustScaler,
    fit_channel_zscore,
    fit_robust_scaler,
    pool_statistics,
)
from braindecode_vis.preprocessing.whitening import Whitener, fit_mvnn, make_whitener

#: Files of mean and variance beside ``data.npy``, shape (n_groups, n_features).
ZSCORE_MEAN, ZSCORE_VARIANCE = "zscore_mean.npy", "zscore_variance.npy"
#: Files beside them with the models that were chosen for voxels begin so, and end with the subject.
CHOICES = "choices_sub-"

Group = tuple[str, ...]


@dataclass(frozen=True)
class ZScoreGroup:
    """The trials from which the statistics of one session or run were computed.

    Parameters
    ----------
    subject, session
        Labels.
    run
        Empty if a whole session was standardised together.
    own
        Whether they were learnt from the test trials themselves; these are not pooled with others.
    """

    subject: str
    session: str
    run: str = ""
    own: bool = False


@dataclass
class LearntStatistics:
    """Statistics that preprocessing has learnt from training trials.

    Parameters
    ----------
    variant
        Trials or times over which the noise covariance is computed; see
        `braindecode_vis.preprocessing.whitening.fit_mvnn`.
    whitening
        Subject and session to the whitening matrix of channels, shape (n_channels, n_channels).
    scaling
        Subject, or subject and session, to the scaler of channels.
    zscores
        Mean and variance of the features of sessions or runs.
    noise_channels
        Names of the channels for whitening, if these are more than the stored ones; otherwise empty.
    rows : int array of shape (n_stored,), optional
        Rows of the stored channels among them.
    unit, recorded_unit
        Unit of the output, and unit of the input (empty if it is not known).
    dtype
        Type of the stored numbers, to which new trials are rounded too.
    choices
        Subject to the model that was chosen for its voxels; new scans are estimated with it.

    Attributes
    ----------
    used : dict
        For each requested subject and session, a description of the source of its statistics.
    """

    variant: Literal["epochs", "time"] = "epochs"
    whitening: Mapping[Group, np.ndarray] = field(default_factory=dict)
    scaling: Mapping[Group, RobustScaler] = field(default_factory=dict)
    zscores: Mapping[ZScoreGroup, FeatureStatistics] = field(default_factory=dict)
    unit: str = ""
    recorded_unit: str = ""
    dtype: Any = np.float32
    noise_channels: tuple[str, ...] = ()
    rows: np.ndarray | None = None
    choices: Mapping[str, VoxelChoices] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> LearntStatistics:
        """Read the statistics that preprocessing has written beside its responses.

        Parameters
        ----------
        folder
            Holds ``data.npy`` and ``meta.json``.

        Raises
        ------
        DataError
            If voxels were standardised by a version that kept no statistics.
        """
        meta = read_json(folder / "meta.json")
        coords, provenance = meta["coords"], meta.get("provenance", {})
        whitening: dict[Group, np.ndarray] = {}
        if "whitening_sessions" in coords:
            matrices = np.load(folder / "coord_whitening.npy", allow_pickle=False)
            whitening = {_name(g): m for g, m in zip(coords["whitening_sessions"], matrices, strict=True)}
        scaling: dict[Group, RobustScaler] = {}
        if "scaling_groups" in coords:
            centre, scale = (
                np.load(folder / f"coord_scaling_{key}.npy", allow_pickle=False)
                for key in ("centre", "scale")
            )
            clamp = provenance["cleaning"]["scaling"]["clamp"]
            scaling = {
                _name(group): RobustScaler(centre[row], scale[row], clamp)
                for row, group in enumerate(coords["scaling_groups"])
            }
        zscores: dict[ZScoreGroup, FeatureStatistics] = {}
        if "standardised_groups" in provenance:
            # Mapped: many sessions of many voxels take gigabytes, and mostly one of them is asked for.
            mean = np.load(folder / ZSCORE_MEAN, mmap_mode="r", allow_pickle=False)
            variance = np.load(folder / ZSCORE_VARIANCE, mmap_mode="r", allow_pickle=False)
            for row, record in enumerate(provenance["standardised_groups"]):
                zscores[ZScoreGroup(**record)] = FeatureStatistics(mean[row], variance[row])
        elif provenance.get("plan", {}).get("zscore", "none") != "none":
            raise DataError(
                f"{folder} was written by a version that did not keep mean and variance of its voxels, "
                "so new trials cannot be standardised in the same way; make the run again in a new folder."
            )
        # New trials are rounded alike: float16 has three digits, which a comparison would notice.
        dtype = np.load(folder / "data.npy", mmap_mode="r", allow_pickle=False).dtype
        variant: Literal["epochs", "time"] = (
            "time" if provenance.get("plan", {}).get("mvnn") == "time" else "epochs"
        )
        recorded = str(provenance.get("recorded_unit", ""))
        noise = tuple(map(str, coords.get("whitening_channels", ())))
        rows = np.array([noise.index(name) for name in coords["ch_names"]]) if noise else None
        choices = {
            path.stem.removeprefix(CHOICES): VoxelChoices.read(path)
            for path in sorted(folder.glob(f"{CHOICES}*.npz"))
        }
        return cls(variant, whitening, scaling, zscores, meta["unit"], recorded, dtype, noise, rows, choices)

    @property
    def is_empty(self) -> bool:
        """Whether trials are not changed."""
        return not (self.whitening or self.scaling or self.zscores)

    def apply(self, block: np.ndarray, subject: str, session: str, run: str = "") -> np.ndarray:
        """Return trials of one session as preprocessing would have stored them.

        Parameters
        ----------
        block : array of shape (n_trials, n_channels, n_times), or (n_trials, n_features[, n_times])
            Trials in the unit of the recording, with all `noise_channels` if there are any.
        subject, session, run
            Where the trials come from.

        Returns
        -------
        array of the shape of `block`, with the stored channels alone
            Of the type of the stored responses.

        Raises
        ------
        DataError
            If whitening needs channels that the trials do not have.
        """
        values = np.asarray(block, dtype=np.float32)
        # The order in which preprocessing did it: whitened, then scaled.
        if self.whitening:
            self._check_noise_channels(values)
            values = self._find_whitener(subject, session).apply(values, self.rows)
        if self.scaling:
            values = self._find_scaler(subject, session).apply(values)
        if self.zscores:
            statistics = self._find_zscore(subject, session, run)
            if len(statistics.mean) != values.shape[1]:
                raise DataError(
                    f"subject {subject}, session {session} has {values.shape[1]} voxels, but those that the run has "
                    f"standardised are {len(statistics.mean)}, so their means do not fit; for a new subject, compute "
                    "them from the new trials with --whiten-new."
                )
            values = statistics.apply(values)
        return values.astype(self.dtype, copy=False)

    def for_session(self, subject: str, session: str, run: str = "") -> LearntStatistics:
        """Return the statistics that `apply` uses for one session, for a stream with trials one by one."""
        one = replace(self)
        if self.whitening:
            one.whitening = {(subject, session): self._find_whitener(subject, session).matrix}
        if self.scaling:
            one.scaling = {(subject, session): self._find_scaler(subject, session)}
        if self.zscores:
            one.zscores = {ZScoreGroup(subject, session, run): self._find_zscore(subject, session, run)}
        one.used = dict(self.used)
        return one

    def apply_to_trials(self, data: np.ndarray, trials: pd.DataFrame) -> np.ndarray:
        """Return trials of any sessions in their order; see `apply`."""
        out = np.empty(data.shape, self.dtype)
        keys = [trials[name].astype(str) for name in ("subject", "session", "run")]
        for group, rows in trials.groupby(keys, sort=False).indices.items():
            out[rows] = self.apply(data[rows], *_name(group))
        return out

    def learn_anew(self, data: np.ndarray, trials: pd.DataFrame) -> LearntStatistics:
        """Return statistics of the same kinds learnt from these trials themselves, which is transductive.

        Parameters
        ----------
        data : array of shape (n_trials, ...)
            In the unit of the recording.
        trials : DataFrame of n_trials rows
        """
        whitening: dict[Group, np.ndarray] = {}
        scaling: dict[Group, RobustScaler] = {}
        zscores: dict[ZScoreGroup, FeatureStatistics] = {}
        by_run = any(name.run for name in self.zscores)
        keys = [trials[name].astype(str) for name in ("subject", "session", *(["run"] if by_run else []))]
        for group, rows in trials.groupby(keys, sort=False).indices.items():
            name = _name(group)
            block = np.asarray(data[rows], dtype=np.float32)
            if self.whitening:
                self._check_noise_channels(block)
                # Noise is what differs between repetitions of an image.
                ids = trials["stimulus_id"].to_numpy(str)[rows]
                whitener = fit_mvnn(block, ids, variant=self.variant)
                whitening[name], block = whitener.matrix, whitener.apply(block, self.rows)
            if self.scaling:
                clamp = next(iter(self.scaling.values())).clamp
                everything = np.arange(len(block))
                if self.unit == "z":
                    score = fit_channel_zscore(block, everything)
                    scaling[name] = RobustScaler(score.mean[:, 0], score.std[:, 0], clamp)
                else:
                    scaling[name] = fit_robust_scaler(block, everything, clamp=clamp)
            if self.zscores:
                if len(block) < 2:
                    raise DataError(f"{' '.join(name)} has one trial, which has no spread to standardise by.")
                moments = FeatureMoments(block[0])
                moments.add(block)
                zscores[ZScoreGroup(name[0], name[1], name[2] if by_run else "", own=True)] = moments.finish()
        return LearntStatistics(
            self.variant, whitening, scaling, zscores, self.unit, self.recorded_unit, self.dtype,
            self.noise_channels, self.rows,
        )  # fmt: skip

    def _check_noise_channels(self, block: np.ndarray) -> None:
        if self.noise_channels and block.shape[1] != len(self.noise_channels):
            raise DataError(
                f"the run fitted its noise on {len(self.noise_channels)} channels and stores only some "
                f"of them, but these trials have {block.shape[1]} channels: read the trials from their "
                "recordings, or whiten them first and pass prepared=True."
            )

    def _find_whitener(self, subject: str, session: str) -> Whitener:
        known = self.whitening.get((subject, session))
        if known is not None:
            self._note(
                subject, session, "whitened and scaled by this session's own training trials of the run"
            )
            return Whitener(np.empty((0, 0)), known)
        sessions, words = self._choose_sessions(subject, self.whitening)
        self._note(subject, session, words)
        if len(sessions) == 1:
            return Whitener(np.empty((0, 0)), self.whitening[sessions[0]])
        # The matrix is the inverse root of a covariance: W W = C^-1. Covariances are what can be averaged.
        matrices = [np.asarray(self.whitening[name], dtype=np.float64) for name in sessions]
        return make_whitener(np.mean([np.linalg.inv(m @ m) for m in matrices], axis=0))

    def _find_scaler(self, subject: str, session: str) -> RobustScaler:
        # Scaling may have gone by session or by subject.
        for name in ((subject, session), (subject,)):
            if name in self.scaling:
                self._note(subject, session, "scaled by training trials of the run")
                return self.scaling[name]
        groups, words = self._choose_sessions(subject, self.scaling)
        self._note(subject, session, words)
        chosen = [self.scaling[name] for name in groups]
        if len(chosen) == 1:
            return chosen[0]
        centre = np.stack([scaler.centre for scaler in chosen]).mean(axis=0, dtype=np.float64)
        scale = np.stack([scaler.scale for scaler in chosen]).mean(axis=0, dtype=np.float64)
        return RobustScaler(centre.astype(np.float32), scale.astype(np.float32), chosen[0].clamp)

    def _find_zscore(self, subject: str, session: str, run: str) -> FeatureStatistics:
        for name, statistics in self.zscores.items():
            if (name.subject, name.session) == (subject, session) and name.run in ("", run):
                of = (
                    "the run's test trials of this session"
                    if name.own
                    else "this session's training trials of the run"
                )
                self._note(subject, session, f"standardised by {of}")
                return statistics
        pooled: dict[Group, FeatureStatistics] = {
            (n.subject, n.session, n.run): s for n, s in self.zscores.items() if not n.own
        }
        groups, words = self._choose_sessions(subject, pooled)
        self._note(subject, session, words)
        # As preprocessing pools for a session without training trials, so that such a one has the same bits.
        return pool_statistics([pooled[name] for name in groups])

    @staticmethod
    def _choose_sessions(subject: str, known: Mapping[Group, Any]) -> tuple[list[Group], str]:
        """Return the groups whose statistics are averaged for a new session, with a description."""
        own = [name for name in known if name[0] == subject]
        if own:
            return own, f"new session: using mean statistics over {_count(own)} of its subject"
        if not known:
            raise DataError(
                "the run has standardised every session by its own trials, so it has no statistics for a "
                "new session; compute them from the new trials with --whiten-new."
            )
        groups = list(known)
        return groups, f"new subject: using mean statistics over {_count(groups)} of other subjects"

    def _note(self, subject: str, session: str, words: str) -> None:
        self.used.setdefault(f"subject {subject}, session {session}", words)


def _name(group: Any) -> Group:
    return tuple(str(part) for part in group)


def _count(groups: list[Group]) -> str:
    return "the one session" if len(groups) == 1 else f"{len(groups)} sessions"
