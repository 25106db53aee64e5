"""Masking one session of single-trial betas: this package against nibabel's `get_fdata` and boolean indexing.

Prints wall time and peak memory of both, each in a process of its own, and fails if the values differ. The default has
NSD's volumes but fewer trials; `--full` has the 750 of a session (1 GB of int16).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE = (81, 104, 83)
N_VOXELS = 15724


def write_session(path: Path, n_trials: int) -> np.ndarray:
    """Write noise of the spread of real betas, zero outside an ellipsoid, and return a mask of NSD's size."""
    from braindecode_vis.phantom.formats.file_writers import write_volumes

    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    brain = (grid**2).sum(axis=0) < 0.8
    noise = (rng.standard_normal((*SHAPE, 8)) * 500).astype(np.int16)
    mask = np.zeros(SHAPE, bool)
    inside = np.flatnonzero(brain)
    mask.ravel()[inside[np.argsort(grid[1].ravel()[inside])[:N_VOXELS]]] = True

    def iterate():
        for trial in range(n_trials):
            yield np.where(brain, np.roll(noise[..., trial % 8], trial, axis=0), 0)

    write_volumes(
        path, iterate(), shape=SHAPE, n_volumes=n_trials, affine=np.diag([1.8, 1.8, 1.8, 1]), dtype=np.int16
    )
    return mask


def run_reader(reader: str, path: Path, mask_path: Path, out: Path) -> None:
    """Read one session, and print seconds and the peak memory of the process."""
    import nibabel

    from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, read_volume_header

    mask = np.load(mask_path)
    start = time.perf_counter()
    if reader == "nibabel":
        values = (nibabel.load(path).get_fdata()[mask].T / 300).astype(np.float32)
    else:
        header = read_volume_header(path)
        values = MaskedVolumes(header, mask, divide_by=300)(0, header.n_volumes)
    seconds = time.perf_counter() - start
    peak = read_peak()
    np.save(out, values)
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def read_peak() -> float:
    """Return the peak resident memory of this process in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << 20 if sys.platform == "darwin" else 1 << 10
    )


def main() -> None:
    """Compare the readers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="750 trials instead of 150")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        folder = options.folder
        run_reader(
            options.reader, folder / "betas.nii.gz", folder / "mask.npy", folder / f"{options.reader}.npy"
        )
        return
    from braindecode_vis.datasets.sources.fmri_volumes import find_gunzip

    n_trials = 750 if options.full else 150
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "mask.npy", write_session(folder / "betas.nii.gz", n_trials))
        found = {}
        for reader in ("nibabel", "ours"):
            command = [sys.executable, __file__, "--reader", reader, "--folder", name]
            best = None
            for _ in range(2):  # the first reads the file from disk
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                last = json.loads(result.stdout)
                best = last if best is None or last["seconds"] < best["seconds"] else best
            found[reader] = best
        np.testing.assert_array_equal(np.load(folder / "ours.npy"), np.load(folder / "nibabel.npy"))
    theirs, ours = found["nibabel"], found["ours"]
    print(f"{n_trials} trials of {SHAPE} int16, {N_VOXELS} voxels in the mask, gunzip: {find_gunzip()[0]}")
    print(f"nibabel {theirs['seconds']:6.2f} s  {theirs['peak_mb']:7.0f} MB")
    print(f"ours    {ours['seconds']:6.2f} s  {ours['peak_mb']:7.0f} MB")
    print(
        f"{theirs['seconds'] / ours['seconds']:.1f} times as fast, "
        f"{ours['peak_mb'] / theirs['peak_mb']:.3f} of the memory, same values"
    )


if __name__ == "__main__":
    main()
