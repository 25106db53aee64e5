"""Natural photographs seen by three macaques: spike counts of neurons in V4 (Cowley et al. 2023), 50 sessions.

Owns the folder ``data_V4_responses`` of the public archive: for each session the counts of single presentations and
their means (spikes in 100 ms, an array of neurons by pictures), and the pictures in a zip archive, in the order of the
columns. The neurons of two sessions differ, so a run reads one session. The run chooses the test pictures; the authors
tested whole sessions (190923, 201025, 210225, 211022). These are not human recordings.

References
----------
Cowley, Stan, Pillow, Smith (2023), Compact deep neural network models of visual cortex, doi:10.1101/2023.11.22.568315;
files as in cowleygroup/V4_compact_models@f4552ad9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.loaded import LoadedSettings, find_first_of_same, tabulate_trials

_HINT = "fetch the session, or name another with --set dataset.session=..."
LAYOUT = Layout(
    averaged=File(
        "responses_repeat_averaged/responses_{session}.npy", "npy", "the file of mean spike counts", _HINT,
        {"counts": Array(("neuron", "picture"))},
    ),
    single=File(
        "responses_raw/responses_{session}.npy", "npy", "the file of spike counts of single trials", _HINT,
        {"counts": Array(("neuron", "picture", "repeat"))},  # NaN where a picture has fewer repeats
    ),
    pictures=File(
        "images/images_{session}.zip", "pictures", "the archive of pictures", f"{_HINT} (201016 to 201020 have none)",
        member="image{number:04d}.jpg",
    ),
)  # fmt: skip
# The last session of each animal, in the order of their recording.
_LAST = {"WE": "190929", "PE": "210326", "RA": "211103"}


def find_animal(session: str) -> str:
    """Return the animal of a session (six digits of its date)."""
    return next((animal for animal, last in _LAST.items() if session <= last), "RA")


class V4PhotographsConfig(LoadedSettings):
    """Session to read, as means or single trials.

    Parameters
    ----------
    root
        The folder ``data_V4_responses`` with ``responses_repeat_averaged``, ``responses_raw`` and ``images``.
    session
        Its date, six digits. Use some sessions to choose methods (``201025``, ``210325``), and the others once, at the
        end.
    trials
        ``averaged`` reads the mean of each picture, ``single`` every presentation.
    """

    kind: Literal["v4_photographs"] = "v4_photographs"
    session: str = "201025"
    trials: Literal["averaged", "single"] = "averaged"

    files = LAYOUT

    def find_files(self) -> dict[str, Path]:
        """Return the counts and the pictures of the session, which must exist."""
        root = self.find_root()
        LAYOUT.check_labels(root, self.trials, session=self.session)
        return {name: LAYOUT.find(root, name, session=self.session) for name in (self.trials, "pictures")}

    def count_facts(self, responses: Responses, stimuli: StimulusSet) -> dict[str, Any]:
        """Return the numbers of neurons and of different pictures of the session."""
        found = {"n_neurons": responses.data.shape[1], "n_pictures": len(stimuli)}
        return {f"{name} of {self.session}": number for name, number in found.items()}

    def read(self) -> tuple[Responses, StimulusSet]:
        """Return every trial as a training trial (a split is chosen later), and the different pictures."""
        root, session, places = self.find_root(), self.session, self.find_files()
        counts = LAYOUT.read(root, self.trials, "counts", session=session)
        counts = counts.reshape(*counts.shape[:2], -1)  # (n_neurons, n_pictures, n_repeats)
        pictures = LAYOUT.read_pictures(root, "pictures", session=session)
        if len(pictures) != counts.shape[1]:
            raise DataError(
                f"session {session} below {root} has {len(pictures)} pictures, but counts for {counts.shape[1]}; fetch "
                "both again."
            )
        if (np.fmax.reduce(counts, axis=(1, 2)) == np.fmin.reduce(counts, axis=(1, 2))).any():
            raise DataError(f"{places[self.trials]} has neurons whose count never changes; fetch it again.")
        # A missing repeat is NaN for all neurons; other gaps are an error of the responses.
        shown, repeat = np.nonzero(~np.isnan(counts).all(axis=0))
        kept = find_first_of_same(pictures)  # some archives hold a picture twice
        ids = np.array([f"{session}_image{n + 1:04d}" for n in range(len(pictures))], object)
        names = ids[kept[shown]]
        table = tabulate_trials(
            stimulus_id=names, concept=names, split="train", subject=find_animal(session), session=session
        )
        data = counts[:, shown, repeat].T.astype(np.float32)  # (n_trials, n_neurons)
        coords = {"modality": "spikes", "ch_names": [f"neuron {n + 1}" for n in range(data.shape[1])]}
        responses = Responses(data, ("trial", "channel"), table, "spikes per 100 ms", coords)
        first = np.unique(kept)
        source = places["pictures"].relative_to(root).as_posix()
        return responses, StimulusSet.from_pixels(pictures[first], ids[first].tolist(), source=source)
