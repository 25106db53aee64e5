"""fMRI to the store: statistics from training trials, in blocks, in bounded memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.sources.betas_source import BetasPart, BetasPlan, FmriSource, Geometry
from braindecode_vis.preprocessing import betas, scaling

N_VOXELS = 6
FILE = Path("sub/ses/betas.nii.gz")


def make_source(sessions, *, n_runs=2, times=None, seed=0, read_image=None, **plan):
    """One part per session; `sessions` holds the splits of its trials as text, for example ``ttTT`` (T: test)."""
    rng = np.random.default_rng(seed)
    parts, arrays = [], []
    for number, letters in enumerate(sessions, start=1):
        n = len(letters)
        shape = (n, N_VOXELS) if times is None else (n, N_VOXELS, len(times))
        data = (rng.standard_normal(shape) * number + 10 * number).astype(np.float32)
        trials = pd.DataFrame(
            {
                "subject": "01", "session": f"{number:02d}", "run": [f"{1 + i * n_runs // n:02d}" for i in range(n)],
                "stimulus_id": [f"{'train' if c == 't' else 'test'}{number}-{i}" for i, c in enumerate(letters)],
                "repetition": 0, "split": ["train" if c == "t" else "test" for c in letters], "concept": "c",
            }
        )  # fmt: skip
        arrays.append(data)
        parts.append(BetasPart(trials, (FILE,), N_VOXELS, lambda a, b, data=data: data[a:b]))
    ids = pd.concat([part.trials for part in parts])["stimulus_id"]
    stimuli = StimulusSet(pd.DataFrame({"stimulus_id": ids, "concept": "c", "path": "", "sha256": ""}))
    source = FmriSource(
        tuple(parts), stimuli, BetasPlan(**plan), "percent signal change", Geometry(np.arange(N_VOXELS)),
        times=times, read_image=read_image, notes={"protocol": "P"},
    )  # fmt: skip
    return source, arrays


def write(source, folder):
    betas.write_fmri_source(source, folder)
    return store.read_responses(folder / "responses")


def zscore(data, train):
    data = data.astype(np.float64)
    return (data - data[train].mean(axis=0)) / data[train].std(axis=0)


@pytest.fixture(params=[1 << 25, 100], ids=["one block", "many blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(scaling, "_BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_session_has_its_own_training_statistics(tmp_path, dtype):
    source, arrays = make_source(["ttttTt", "tTtttt"], dtype=dtype)
    responses = write(source, tmp_path)
    expected = np.concatenate(
        [
            zscore(a, (p.trials["split"] == "train").to_numpy())
            for a, p in zip(arrays, source.parts, strict=True)
        ]
    )
    assert responses.data.dtype == dtype
    # float16 has 11 bits.
    np.testing.assert_allclose(responses.data, expected, atol=1e-5 if dtype == "float32" else 5e-3)
    assert responses.unit == "z"
    assert not (tmp_path / "scratch").exists()


@pytest.mark.usefixtures("_blocks")
def test_runs_are_standardised_one_by_one(tmp_path):
    source, (data,) = make_source(["tttTtttt"], zscore="run")
    expected = np.concatenate(
        [zscore(data[:4], np.array([1, 1, 1, 0], bool)), zscore(data[4:], np.ones(4, bool))]
    )
    np.testing.assert_allclose(write(source, tmp_path).data, expected, atol=1e-5)


def test_none_keeps_the_numbers_and_their_unit(tmp_path):
    source, arrays = make_source(["ttT", "tT"], zscore="none")
    responses = write(source, tmp_path)
    np.testing.assert_array_equal(responses.data, np.concatenate(arrays))
    assert responses.unit == "percent signal change"
    assert store.read_json(tmp_path / "responses/meta.json")["provenance"]["protocol"] == "P"


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_test_session_borrows_the_statistics_of_the_others(tmp_path, dtype):
    source, arrays = make_source(["TTT", "tttt", "tttttt"], dtype=dtype)
    responses = write(source, tmp_path)
    mean = (arrays[1].mean(axis=0) + arrays[2].mean(axis=0)) / 2
    std = np.sqrt((arrays[1].var(axis=0) + arrays[2].var(axis=0)) / 2)
    np.testing.assert_allclose(
        responses.data[:3], (arrays[0] - mean) / std, atol=1e-4 if dtype == "float32" else 2e-2
    )
    remarks = store.read_json(tmp_path / "responses/meta.json")["provenance"]
    assert remarks["standardised_with_other_sessions"] == ["subject 01, session 01"]


def test_own_statistics_of_test_trials_are_called_transductive(tmp_path):
    source, arrays = make_source(["TTT", "tttt"], untrained="own")
    responses = write(source, tmp_path)
    np.testing.assert_allclose(responses.data[:3], zscore(arrays[0], np.ones(3, bool)), atol=1e-5)
    remarks = store.read_json(tmp_path / "responses/meta.json")["provenance"]
    assert remarks["standardised_with_own_test_trials"] == ["subject 01, session 01"]


def test_no_training_trial_at_all_is_refused(tmp_path):
    source, _ = make_source(["TTT"])
    with pytest.raises(DataError, match=r"subject 01 has no training trial .*dataset\.zscore to none"):
        write(source, tmp_path)


def test_poisoned_test_trials_change_no_training_trial(tmp_path):
    source, arrays = make_source(["ttTtT", "tTTtt"])
    clean = write(source, tmp_path / "clean")
    train = (clean.trials["split"] == "train").to_numpy()
    for data, part in zip(arrays, source.parts, strict=True):
        data[(part.trials["split"] == "test").to_numpy()] += 1e3
    poisoned = write(source, tmp_path / "poisoned")
    np.testing.assert_array_equal(clean.data[train], poisoned.data[train])


def test_a_large_baseline_costs_no_digits(tmp_path):
    source, (data,) = make_source(["tttttttt"])
    small = write(source, tmp_path / "small").data
    data += 4096  # exactly representable together with what float32 keeps of the rest
    kept = data - 4096
    expected = zscore(kept.astype(np.float64), np.ones(8, bool))
    np.testing.assert_allclose(write(source, tmp_path / "large").data, expected, atol=2e-4)
    assert np.abs(small - expected).max() < 5e-3


def test_constant_voxels_become_zero_and_are_counted(tmp_path):
    source, (data,) = make_source(["ttttT"])
    data[:, 2] = 7
    responses = write(source, tmp_path)
    assert (responses.data[:, 2] == 0).all()
    assert store.read_json(tmp_path / "responses/meta.json")["provenance"]["constant_features"] == 1


def test_a_time_axis_keeps_the_shape_of_the_response(tmp_path):
    times = np.array([2.0, 4.0, 6.0])
    source, (data,) = make_source(["ttttTt"], times=times)
    responses = write(source, tmp_path)
    assert responses.dims == ("trial", "voxel", "time")
    np.testing.assert_array_equal(responses.coords["times"], times)
    train = data[[0, 1, 2, 3, 5]]
    expected = (data - train.mean(axis=(0, 2))[:, None]) / train.std(axis=(0, 2))[:, None]
    np.testing.assert_allclose(responses.data, expected, atol=1e-5)


def test_nan_and_wrong_shapes_name_the_file(tmp_path):
    source, (data,) = make_source(["tttT"])
    data[2, 3] = np.nan
    with pytest.raises(
        DataError, match=r"session 01, file sub/ses/betas\.nii\.gz: trial 2 holds 1 non-finite"
    ):
        write(source, tmp_path / "a")
    odd = replace(source, parts=(replace(source.parts[0], read=lambda a, b: np.zeros((b - a, 2))),))
    with pytest.raises(DataError, match=r"gave an array of shape \(4, 2\)"):
        write(odd, tmp_path / "b")
    data[2, 3] = 1e6
    small, (big,) = make_source(["tttT"], dtype="float16", zscore="none")
    big[0, 0] = 1e6
    with pytest.raises(DataError, match="too large for float16"):
        write(small, tmp_path / "c")


def test_images_are_copied_one_by_one(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    source, _ = make_source(["tttT"], read_image=lambda row: images[row])
    write(source, tmp_path)
    stimuli = store.read_stimuli(tmp_path / "stimuli")
    np.testing.assert_array_equal(stimuli.pixels, images)
    assert stimuli.table["sha256"].nunique() == 4
    for bad, words in (
        (lambda row: images[row] if row < 2 else images[row][:3], r"image 2 has the shape \(3, 6, 3\)"),
        (lambda row: images[row].astype(float), "images must be uint8"),
    ):
        with pytest.raises(DataError, match=words):
            write(replace(source, read_image=bad), tmp_path / "bad")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    source, _ = make_source(["tttT"])
    monkeypatch.setattr(betas.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match="4 trials of 6 features"):
        write(source, tmp_path)


MEMORY = """
import resource, sys, tempfile
from pathlib import Path
import numpy as np, pandas as pd
from braindecode_vis.datasets.sources.betas_source import BetasPart, BetasPlan, FmriSource, Geometry
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.base.stimuli import StimulusSet

n_sessions, n_trials, n_voxels = 6, 300, 20_000
base = np.random.default_rng(0).standard_normal((50, n_voxels), dtype=np.float32)
read = lambda a, b: base[np.arange(a, b) % 50] + np.arange(a, b, dtype="f4")[:, None]  # no trial twice
parts = []
for s in range(n_sessions):
    trials = pd.DataFrame({"subject": "01", "session": f"{s:02d}", "run": "01",
        "stimulus_id": [f"i{i}" for i in range(n_trials)], "repetition": s,
        "split": ["train" if i % 10 else "test" for i in range(n_trials)], "concept": "c"})
    parts.append(BetasPart(trials, (Path("f"),), n_voxels, read))
ids = parts[0].trials["stimulus_id"]
stimuli = StimulusSet(pd.DataFrame({"stimulus_id": ids, "concept": "c", "path": "", "sha256": ""}))
source = FmriSource(tuple(parts), stimuli, BetasPlan(), "x", Geometry(np.arange(n_voxels)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tempfile.TemporaryDirectory() as folder:
    n_bytes = write_fmri_source(source, Path(folder))["n_bytes"]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(n_bytes / 2**20, (peak - before) / 1024)
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="counts memory in other units")
def test_memory_does_not_grow_with_the_data():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    written, used = map(float, result.stdout.split())
    assert written > 130
    # A few blocks of 32 MiB, in float64 at worst; the mapped file must not count.
    assert used < 320
