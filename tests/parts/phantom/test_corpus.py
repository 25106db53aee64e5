"""Checks that recordings of a phantom corpus hold what was planted, in files that other programs read."""

import json

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.phantom import SIZES, FmriConfig, PhantomConfig, make_phantom, make_scanner
from braindecode_vis.parts.phantom.format_plan import TRUTH
from braindecode_vis.parts.phantom.scanner import make_parcels

SIZE = SIZES["corpus"]["tiny"].replace(n_subjects=5, n_parcels=40, voxel_mm=10)


def embed(stimuli):
    return np.random.default_rng(0).standard_normal((len(stimuli), 24))


def make(root, size=SIZE, **config):
    return make_phantom("corpus", root, size=size, config=PhantomConfig(snr=1.0, **config), embed=embed)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make(tmp_path_factory.mktemp("phantom") / "corpus")


def read_run(truth, run):
    """Return a run as parcels, (n_times, n_parcels), and its repetition time, with readers that know nothing of us."""
    import nibabel

    root, folder = truth.root, truth.root / run.folder
    if run.site == "siteA":
        derived = root / "siteA" / "derivatives" / "fmriprep" / folder.relative_to(root / "siteA")
        image = nibabel.load(next(derived.glob(f"{run.stem}_*preproc_bold.nii.gz")))
        labels = np.asarray(nibabel.load(root / TRUTH / "parcels.nii.gz").dataobj)
        volumes = image.get_fdata()
        averages = np.stack([volumes[labels == label].mean(axis=0) for label in range(1, labels.max() + 1)])
        return averages.T, float(image.header.get_zooms()[3])
    if run.site == "siteB":
        image = nibabel.load(folder / f"{run.stem}_Atlas.ptseries.nii")
        return image.get_fdata(), image.header.get_axis(0).step
    path = next(folder.glob(f"{run.stem}_*timeseries.tsv"))
    names = [line.split()[1] for line in (root / TRUTH / "parcels.txt").read_text().splitlines()]
    table = pd.read_csv(path, sep="\t").reindex(columns=names)
    return table.to_numpy(), json.loads(path.with_suffix(".json").read_text())["RepetitionTime"]


def read_runs(truth):
    table = pd.read_csv(truth.folder / "runs.tsv", sep="\t", dtype={"person": str})
    return [(run, *read_run(truth, run)) for run in table.itertuples()]


def test_runs_hold_the_person_and_the_film(corpus):
    """Connectivity shows who it is, also at another site; pictures drive the parcels that they should."""
    runs = read_runs(corpus)
    connectivity, driven = [], {"movie": [], "rest": []}
    for run, values, t_r in runs:
        assert (values.shape, t_r) == ((run.n_times, 40), run.t_r)
        known = np.isfinite(values).all(axis=0)
        assert known.all() == (run.site != "siteC")
        values = np.nan_to_num(values - values.mean(axis=0))
        connectivity.append(np.corrcoef(values.T + 1e-9 * np.random.default_rng(0).random(values.T.shape)))
        table = pd.read_csv(corpus.folder / f"sub-{run.person}_drive.tsv", sep="\t")
        strong = (table["drive_percent"] > table["drive_percent"].quantile(0.8)) & known
        silent = (table["drive_percent"] == 0) & known
        spread = values.std(axis=0)
        driven[run.task].append(spread[strong].mean() / spread[silent].mean())
    assert np.median(driven["movie"]) > 1.2 * np.median(driven["rest"])
    pairs = np.triu_indices(40, 1)
    flat = np.stack([matrix[pairs] for matrix in connectivity])
    alike = np.corrcoef(flat - flat.mean(axis=0))
    people = np.array([run.person for run, _, _ in runs])
    same = people[:, None] == people[None]
    off = ~np.eye(len(people), dtype=bool)
    assert alike[same & off].mean() > alike[~same].mean() + 0.2
    there = np.array([run.person == "101" and run.site == "siteB" for run, _, _ in runs])
    here = np.array([run.person == "101" and run.site == "siteA" for run, _, _ in runs])
    assert alike[np.ix_(here, there)].mean() > alike[np.ix_(here, ~same[here.argmax()])].mean()


def test_truth_says_who_is_who_and_events_are_nowhere_else(corpus):
    people = corpus.read_people()
    assert people.groupby("person")["site"].nunique().to_dict() == dict(
        zip(["101", "102", "103", "104", "105"], [2, 1, 1, 1, 1], strict=True)
    )
    assert not [
        path for path in corpus.root.rglob("*events*") if path.relative_to(corpus.root).parts[0] != TRUTH
    ]
    restless = people.loc[people["restless"], "subject"].tolist()
    assert restless == ["104"]
    motion = {
        path.name[:7]: pd.read_csv(path, sep="\t", na_values="n/a")["framewise_displacement"].mean()
        for path in corpus.root.glob("siteA/derivatives/fmriprep/sub-*/func/*rest*confounds_timeseries.tsv")
    }
    assert motion["sub-104"] > 0.5 > motion["sub-101"]
    # The patterns of ongoing activity are the size that was asked for, less what averages out in a parcel.
    patterns = np.load(corpus.folder / "sub-101_ongoing.npy")
    assert 0.4 < np.sqrt((patterns**2).sum(axis=0)).mean() < 0.71


def test_the_same_request_gives_the_same_files(corpus, tmp_path):
    make(tmp_path / "again")
    for path in sorted(corpus.root.rglob("*.*")):
        if path.is_file():
            name = path.relative_to(corpus.root)
            assert path.read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_fine_parcels_mean_the_same_place_on_every_grid():
    found = {}
    for size in (6, 8):
        scanner = make_scanner(size)
        labels, names = make_parcels(scanner, 100)
        assert labels.min() == 1
        assert set(np.unique(labels)) == set(names)
        found[size] = {name: scanner.positions[labels == label].mean(axis=0) for label, name in names.items()}
    assert 95 <= len(found[8]) <= len(found[6]) <= 100
    apart = [np.linalg.norm(found[6][name] - place) for name, place in found[8].items()]
    assert np.median(apart) < 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_sites": 9}, "at most the number of subjects"),
        ({"minutes": 0.5}, "at least 1"),
        ({"minutes": 1, "n_sessions": 3}, "at least 30 s"),
        ({"test_repetitions": 4}, "test_repetitions .* must be 1, not 4"),
        ({"n_parcels": 5}, "n_parcels"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        make(tmp_path / "x", SIZE.replace(**changes))


def test_ongoing_activity_without_time_series_is_refused(tmp_path):
    config = PhantomConfig(fmri=FmriConfig(ongoing_percent=0.5))
    with pytest.raises(ConfigError, match="has no time series"):
        make_phantom("god", tmp_path / "x", size=SIZES["god"]["tiny"], config=config, embed=embed)
