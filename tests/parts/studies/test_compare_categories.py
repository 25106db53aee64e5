"""Runs that decode categories know no images; they are compared trial by trial, on simulated files of `muse_n170`."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.config import read_config
from braindecode_vis.parts.studies.compare import compare_runs, read_items
from braindecode_vis.pipeline import evaluate
from braindecode_vis.pipeline.runs import open_run

QUICK = ["evaluation.n_bootstrap=200", "evaluation.n_permutations=200", "dataset.runs=[1, 2, 3]"]
NETWORK = "encoder={kind: network_categories, size: 8, epochs: 3, network: {kind: eegproject, width: 8}}"


def make_run(path, seed, n_events=16):
    generator = np.random.default_rng(seed)
    n = 4096
    onsets, codes = 200 + 190 * np.arange(n_events), 1 + generator.permutation(np.arange(n_events) % 2)
    table = pd.DataFrame({"timestamps": np.round(np.arange(n) / 256, 3)})
    for name in ("TP9", "AF7", "AF8", "TP10"):
        table[name] = 5 * generator.normal(size=n)
        for onset in onsets[codes == 2]:
            table.loc[onset + 36 : onset + 52, name] -= 15
    table["Right AUX"], table["Marker0"] = 0.0, 0
    table.loc[onsets, "Marker0"] = codes
    table.round(3).to_csv(path, index=False)


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "data").mkdir()
    for seed in range(3):
        make_run(tmp_path / "data" / f"data_2017-09-13-15.3{seed}.01.csv", seed)
    made = []
    for name, changes in {"lda": [], "network": [NETWORK]}.items():
        run = open_run(read_config("muse_n170", QUICK + changes, root=tmp_path / "data"), tmp_path / name)
        evaluate(run)
        made.append(tmp_path / name)
    return made


def test_category_runs_are_compared_trial_by_trial(folders):
    """Such runs list no image per trial, and the comparison used to stop at the missing column."""
    first, second = (read_items(folder) for folder in folders)
    assert len(first) == 48
    assert first["stimulus_id"].is_unique
    table = compare_runs(folders, n_boot=200).set_index("metric")
    assert table.loc["accuracy", "n_items"] == 48
    assert table.loc["accuracy", "difference"] == pytest.approx(
        second["accuracy"].mean() - first["accuracy"].mean()
    )
    assert first["accuracy"].mean() > 0.8
