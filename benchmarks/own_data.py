"""Processor time from arrays to scores and report, beside that of the ridge regressions in the same run.

python benchmarks/own_data.py

1000 trials of 5000 voxels, 500 pictures shown twice, five folds, eleven penalties chosen by inner folds. The ridge is
what `RidgeEncoder` takes to fit, to predict the training trials out of fold and to predict the test trials. The first
decoding of a process also imports torch and matplotlib; the second is what the work itself costs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, as the numbers claim
import functools
import tempfile
import time
from pathlib import Path

import numpy as np

import braindecode_vis as bdv
from braindecode_vis.encoders.ridge import RidgeEncoder

N_PICTURES, N_VOXELS, SIDE = 500, 5000, 28


def _simulate():
    """Return responses of shape (1000, 5000), pictures, and which picture each trial showed."""
    rng = np.random.default_rng(0)
    pictures = rng.random((N_PICTURES, SIDE, SIDE))
    shown = np.repeat(np.arange(N_PICTURES), 2)
    weights = rng.normal(size=(SIDE**2, N_VOXELS))
    noise = 5 * rng.normal(size=(len(shown), N_VOXELS))
    return (pictures.reshape(N_PICTURES, -1)[shown] @ weights + noise).astype(np.float32), pictures, shown


def _clock(spent, name):
    """Add the processor time of a method of the encoder to `spent`."""
    method = getattr(RidgeEncoder, name)

    @functools.wraps(method)
    def timed(*args, **kwargs):
        start = time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - start

    setattr(RidgeEncoder, name, timed)


def main():
    responses, pictures, shown = _simulate()
    spent = {}
    for name in ("fit", "predict_out_of_fold", "predict"):
        _clock(spent, name)
    print(f"{len(shown)} trials x {N_VOXELS} voxels, seconds of processor time")
    for turn in ("first", "second"):
        spent.clear()
        start = time.process_time()
        data = bdv.from_arrays(responses, images=pictures, shown=shown)
        with tempfile.TemporaryDirectory() as folder:
            bdv.decode(data, target="pixels", encoder="ridge", split=5, out=Path(folder) / "run")
            total = time.process_time() - start
        ridge = sum(spent.values())
        print(
            f"{turn:7s} whole {total:5.1f}   ridge {ridge:4.1f}   beyond it {total - ridge:4.1f}", end="   "
        )
        print(f"ratio {total / ridge:.2f}")


if __name__ == "__main__":
    main()
