"""Phantoms: complete simulated data sets with a known ground truth, in the files of public ones. No recording was made.

images (`stimuli`) -> `drive` (their features) -> `brain` (tuning and time courses on `cortex`) -> `forward` (lead
fields) and `noise` -> `meeg_signal` (EEG, MEG) or `scanner` and `bold_signal` (fMRI) -> `formats` (files, one module a
format). `build` is the one call that runs all of it, `sizes` says how much, `truth` keeps what was planted, and
`ceiling` tells what the best decoder could score.
"""

from braindecode_vis.parts.phantom.bold_signal import compute_betas, simulate_betas, simulate_bold
from braindecode_vis.parts.phantom.brain import Person, make_person
from braindecode_vis.parts.phantom.build import (
    FORMATS,
    UNLABELLED,
    Estimate,
    change_size,
    check_space,
    estimate_phantom,
    expect_image_seconds,
    make_phantom,
)
from braindecode_vis.parts.phantom.drive import StimulusDrive, make_drive
from braindecode_vis.parts.phantom.formats.nsd_files import BETA_VERSIONS
from braindecode_vis.parts.phantom.forward import SensorSystem, make_sensor_system
from braindecode_vis.parts.phantom.meeg_signal import compute_evoked, simulate_continuous, simulate_endless
from braindecode_vis.parts.phantom.phantom_config import FmriConfig, PhantomConfig
from braindecode_vis.parts.phantom.scanner import Scanner, make_scanner
from braindecode_vis.parts.phantom.sizes import SIZE_NAMES, SIZES, PhantomSize
from braindecode_vis.parts.phantom.truth import PhantomTruth, read_truth

__all__ = [
    "BETA_VERSIONS",
    "FORMATS",
    "SIZES",
    "SIZE_NAMES",
    "UNLABELLED",
    "Estimate",
    "FmriConfig",
    "Person",
    "PhantomConfig",
    "PhantomSize",
    "PhantomTruth",
    "Scanner",
    "SensorSystem",
    "StimulusDrive",
    "change_size",
    "check_space",
    "compute_betas",
    "compute_evoked",
    "estimate_phantom",
    "expect_image_seconds",
    "make_drive",
    "make_person",
    "make_phantom",
    "make_scanner",
    "make_sensor_system",
    "read_truth",
    "simulate_betas",
    "simulate_bold",
    "simulate_continuous",
    "simulate_endless",
]
