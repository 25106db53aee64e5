"""Real recordings through `from_arrays` and the folder of arrays give what their own loaders give, without a leak.

A leak would be a warning, which is an error here: raw volumes of one run correlate above .999, and are no copies.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import braindecode_vis as bdv

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.whole,
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the real recordings in ../shared are not here"),
]
FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}


def get_score(run, metric):
    return run.scores.query("metric == @metric and method == 'decoded'")["value"].item()


def take_apart(data):
    """Return an array and a table as a user would hold them: nothing of a loader is left but numbers and names."""
    return np.array(data.responses.data), data.trials.copy()


def test_digits69_published_split(tmp_path):
    loaded = bdv.load("digits69", root=SHARED / "digits69")
    X, trials = take_apart(loaded)
    ridge = {"kind": "ridge", "n_features": [100, 200, 400, 800, 1600, None]}
    own = bdv.from_arrays(
        X, images=np.asarray(loaded.stimuli.pixels)[..., 0], shown=np.arange(len(X)), labels=trials["concept"],
        split=trials["split"], modality="fmri",
    )  # fmt: skip
    run = bdv.decode(own, target="pixels", encoder=ridge, out=tmp_path / "own", settings=FEW)
    assert get_score(run, "pixcorr") == pytest.approx(0.811, abs=5e-4)
    reference = bdv.decode(loaded, target="pixels", encoder=ridge, out=tmp_path / "loader", settings=FEW)
    for metric in ("pixcorr", "mse", "ssim", "top1"):
        assert get_score(run, metric) == pytest.approx(get_score(reference, metric), abs=1e-6)


def test_haxby_blocks():
    logistic = {"kind": "logistic", "c": [0.01]}
    X, trials = take_apart(bdv.load("haxby_slices", root=SHARED / "haxby_slices"))
    own = bdv.from_arrays(X, labels=trials["concept"], run=trials["run"], modality="fmri")
    run = bdv.decode(own, encoder=logistic, split="leave-one-run-out", settings=FEW)
    assert get_score(run, "accuracy") == pytest.approx(0.594, abs=5e-4)


@pytest.mark.slow
def test_haxby_volumes_decided_together():
    """Window and penalty are chosen in every fold, which takes minutes."""
    clean = {"drift": "polynomial", "order": 2, "scaling": "zscore"}
    model = {"kind": "window", "start": 0, "stop": 5, "until": "offset", "keep": "volumes", "clean": clean}
    X, trials = take_apart(bdv.load("haxby_slices", root=SHARED / "haxby_slices", model=model))
    windows = [[a, b] for a in (0, 2.5, 5) for b in (0, 2.5, 5)]
    pooled = {
        "kind": "logistic",
        "c": [0.001, 0.01, 0.1, 1.0],
        "n_inner_folds": 12,
        "pool": True,
        "windows": windows,
    }
    columns = trials[["concept", "run", "onset", "duration", "volume", "time", "repetition"]]
    own = bdv.from_arrays(X, trials=columns, group=trials["run"] + "/" + trials["onset"].astype(str))
    run = bdv.decode(own, encoder=pooled, split="leave-one-run-out", settings=FEW)
    assert get_score(run, "accuracy") == pytest.approx(0.9375, abs=5e-4)


def test_muse_n170_by_arrays_and_by_a_folder(tmp_path):
    loaded = bdv.load("muse_n170", root=SHARED / "muse_n170")
    X, trials = take_apart(loaded)
    coords = loaded.responses.coords
    own = bdv.from_arrays(
        X, labels=trials["concept"], session=trials["session"], run=trials["run"], times=coords["times"],
        ch_names=coords["ch_names"], modality="eeg", unit="V",
    )  # fmt: skip
    run = bdv.decode(own, encoder="lda", split="leave-one-run-out", settings=FEW)
    assert get_score(run, "auc") == pytest.approx(0.667, abs=5e-4)
    np.save(tmp_path / "data.npy", X)
    trials[["concept", "session", "run"]].to_csv(tmp_path / "trials.csv", index=False)
    again = bdv.decode(
        bdv.load("arrays", root=tmp_path), encoder="lda", split="leave-one-run-out", settings=FEW
    )
    assert get_score(again, "auc") == get_score(run, "auc")


def test_an_evoked_file_opens():
    """MNE's sample evokeds: four conditions of one person, as four trials."""
    import mne

    evokeds = mne.read_evokeds(SHARED / "readers" / "mne" / "test-ave.fif.gz", verbose="error")
    data = bdv.from_arrays(
        np.stack([evoked.copy().pick("grad").data for evoked in evokeds]), labels=[e.comment for e in evokeds],
        times=evokeds[0].times, ch_names=evokeds[0].copy().pick("grad").ch_names, modality="meg",
    )  # fmt: skip
    assert data.responses.dims == ("trial", "channel", "time")
    assert len(pd.unique(data.trials["concept"])) == 4
