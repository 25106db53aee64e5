"""Fits of one run made by several processes: each fold once, and the bits of a serial run."""

import threading
from dataclasses import replace

import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.locks import LEASE, BeingMade, hold_lease
from braindecode_vis.config import read_config
from braindecode_vis.parts.analyses.analyze import analyze, analyze_share
from braindecode_vis.parts.analyses.windows import SlidingWindowConfig
from braindecode_vis.pipeline import fit_share, train
from braindecode_vis.pipeline.learning import predict_out_of_fold, train_fold
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.array_file import KeptParts
from tests.parts.analyses.planted import make_epochs_study
from tests.parts.cluster.test_slurm import digest_results

TINY = [
    "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
    "dataset.n_train=30",
    "dataset.n_test=12",
    "dataset.n_voxels=20",
    "split={kind: kfold, n_folds: 3}",
    "prior={kind: spread}",
    "encoder.alphas=[1.0]",
]


def find_lease(run, number):
    """Return the lease of a fold that was fitted."""
    path = train_fold(run, number).artifact.path
    return path.with_name(f"{LEASE}{path.name}")


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    run = open_run(read_config("synthetic_digits", TINY), tmp_path_factory.mktemp("serial"))
    train(run)
    predict_out_of_fold(run)
    return run


def test_shares_make_the_fits_of_a_serial_run(serial, tmp_path):
    config = read_config("synthetic_digits", TINY)
    taken = tmp_path / "stages" / "train" / find_lease(serial, 1).name
    taken.parent.mkdir(parents=True)
    with hold_lease(taken, lambda: False, print):  # as another process that fits this fold
        left = []
        worker = threading.Thread(target=lambda: left.append(fit_share(open_run(config, tmp_path), 1, 2)))
        worker.start()
        worker.join()
    assert left == [1]
    assert len(list(tmp_path.glob("stages/train/[!.]*"))) == 2
    assert fit_share(open_run(config, tmp_path), 0, 2) == 0
    assert digest_results(tmp_path) == digest_results(serial.folder.path)
    with pytest.raises(ConfigError, match="no worker 2 of 2"):
        fit_share(serial, 2, 2)


def test_cuts_are_fitted_once_by_processes_that_share_them(tmp_path):
    study = make_epochs_study(onset=0.1, n_times=30)
    windows = SlidingWindowConfig(metric="two_way", width=0.1, step=0.1)
    shared = replace(study, kept=KeptParts(tmp_path, shared=True))
    left = []

    def share():
        with pytest.raises(BeingMade) as error:
            windows.compute(shared)
        left.append(str(error.value))

    name = f"1, fold 0, {1!r}"
    with shared.kept.claim(name) as mine:
        assert mine
        worker = threading.Thread(target=share)
        worker.start()
        worker.join()
    assert left == ["1 of 3 fits of sliding window are being made by other processes"]
    assert len(list(tmp_path.glob("part-*"))) == 2
    expected = windows.compute(study).table
    pd.testing.assert_frame_equal(
        windows.compute(replace(study, kept=KeptParts(tmp_path, shared=True))).table, expected
    )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow  # figures
def test_analyses_are_shared_and_finished_by_whoever_finds_nothing_missing(serial, tmp_path):
    config = read_config("synthetic_digits", TINY)
    kinds = ["hubness"]
    assert analyze_share(open_run(config, tmp_path), kinds, 1, 2) == 0
    there = digest_results(tmp_path)
    artifacts, refusals = analyze(open_run(config, tmp_path), kinds)
    assert [artifact.reused for artifact in artifacts] == [True] * len(artifacts)
    assert digest_results(tmp_path) == there
    assert not refusals
    analyze(serial, kinds)
    assert there.items() <= digest_results(serial.folder.path).items()
