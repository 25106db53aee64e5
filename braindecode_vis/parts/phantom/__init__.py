"""Phantoms: complete simulated data sets with a known ground truth, in the files of public ones. No recording was made.

images (`braindecode_vis.datasets.drawn`) -> `drive` (their features) -> `brain` (tuning and time courses on `cortex`)
-> `forward` (lead fields) and `noise` -> `meeg_signal` (EEG, MEG) or `scanner` and `bold_signal` (fMRI) -> `formats`
(files, one module per format). `build` runs all of it in one call, `sizes` defines the sizes, `truth` writes the ground
truth, and `ceiling` computes the score of the best possible decoder.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Module -> the public names in it, loaded when they are first used: every command looks at the parts.
_MODULES = {
    "bold_signal": "compute_betas simulate_betas simulate_bold",
    "brain": "Person make_person",
    "build": "Estimate FORMATS UNLABELLED change_size check_space estimate_phantom expect_image_seconds make_phantom",
    "drive": "DRIVES StimulusDrive make_drive",
    "formats.nsd_files": "BETA_VERSIONS",
    "forward": "SensorSystem make_sensor_system",
    "phantom_config": "FmriConfig NoiseConfig PhantomConfig",
    "meeg_signal": "compute_evoked simulate_continuous simulate_endless",
    "scanner": "Scanner make_scanner",
    "sizes": "PhantomSize SIZES SIZE_NAMES",
    "truth": "PhantomTruth read_truth",
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
