"""A corpus in memory, with the methods that pretraining asks for."""

from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError


class ToyWindows:
    def __init__(self, corpus, n_times, step, keep):
        self.corpus, self.places = corpus, []
        for row, run in enumerate(corpus.runs.itertuples()):
            if keep[row]:
                self.places += [
                    (row, start) for start in range(0, run.n_times - n_times + 1, step or n_times)
                ]
        self.n_times = n_times
        runs = corpus.runs.iloc[[row for row, _ in self.places]]
        self.person, self.site, self.run_id = (runs[c].to_numpy(str) for c in ("person", "site", "run_id"))
        self.interval_s = runs["interval_s"].to_numpy(float)

    def __len__(self):
        return len(self.places)

    def read(self, rows):
        cuts = [self.places[row] for row in rows]
        data = [np.nan_to_num(self.corpus.data[run][:, start : start + self.n_times]) for run, start in cuts]
        return np.stack(data).astype(np.float32)

    def observed(self, rows):
        missing = self.corpus.missing
        return np.stack([~missing[self.places[row][0]] for row in rows])

    def iterate(self, batch_size, *, seed, epoch):
        order = np.random.default_rng([seed % 2**32, epoch]).permutation(len(self))
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


class ToyCorpus:
    """Persons whose parcels of a network share courses with gains that are each person's own."""

    modality = "fmri"

    def __init__(
        self, n_persons=6, n_runs=2, n_times=48, n_parcels=12, interval_s=2.0, missing=0, seed=0, held_out=2,
        prefix="p", noise=0.5,
    ):  # fmt: skip
        generator, anatomy = np.random.default_rng(seed), np.random.default_rng(99)
        network = np.arange(n_parcels) // 4
        self.folder, self.digest = Path(f"corpora/{prefix}"), f"digest{seed}"
        self.channels = tuple(f"parcel{i}" for i in range(n_parcels))
        self.networks = tuple(f"network{k}" for k in network)
        self.coordinates = anatomy.normal(size=(n_parcels, 3)) * 30
        self.data, self.missing, rows = [], [], []
        common = anatomy.choice([-1, 1], size=n_parcels)
        for person in range(n_persons):
            gains = common * generator.uniform(0.2, 1.8, size=n_parcels)
            for run in range(n_runs):
                courses = generator.normal(size=(network.max() + 1, n_times + 4))
                courses = sum(courses[:, k : k + n_times] for k in range(5)) / np.sqrt(5)
                series = gains[:, None] * courses[network] + noise * generator.normal(
                    size=(n_parcels, n_times)
                )
                absent = np.zeros(n_parcels, bool)
                absent[generator.permutation(n_parcels)[: missing if run else 0]] = True
                series[absent] = np.nan
                self.data.append(series)
                self.missing.append(absent)
                rows.append(
                    {
                        "run_id": f"{prefix}{person}_{run}", "source": prefix, "subject": str(person),
                        "person": f"{prefix}{person}", "session": "", "run": str(run), "task": "rest", "site": "a",
                        "n_times": n_times, "interval_s": interval_s, "hours": n_times * interval_s / 3600,
                        "held_out": person >= n_persons - held_out, "digest": f"{prefix}{seed}{person}{run}",
                    }
                )  # fmt: skip
        self.runs = pd.DataFrame(rows)
        self.interval_s = interval_s

    def list_subjects(self, *, held_out=False):
        runs = self.runs[self.runs["held_out"] == held_out]
        return runs[["source", "subject", "person"]].drop_duplicates().to_dict(orient="records")

    def windows(self, n_times, step=None, part="train"):
        keep = self.runs["held_out"].to_numpy() == (part == "held_out")
        return ToyWindows(self, n_times, step, keep if part != "all" else np.ones(len(keep), bool))

    changed = False

    def verify(self, *, read=False):
        if self.changed:
            raise DataError(f"the corpus {self.folder} was changed since it was opened.")
