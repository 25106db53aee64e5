"""Simulated people with a known ground truth, looking at images, recorded by simulated machines.

images -> `drive` (features) -> `brain` (tuning and time courses on `cortex`) -> `forward` (lead fields) and `noise`
-> `recordings` (EEG, MEG) or `bold` (fMRI) -> `writers` (files in the layout of public data sets); `ceiling` tells
what the best decoder could score.
"""

from braindecode_vis.phantom.bold_signal import compute_betas, simulate_betas, simulate_bold
from braindecode_vis.phantom.brain import Person, make_person
from braindecode_vis.phantom.drive import StimulusDrive, make_drive
from braindecode_vis.phantom.forward import Machine, make_machine
from braindecode_vis.phantom.phantom_config import PhantomConfig
from braindecode_vis.phantom.recordings import compute_evoked, simulate_continuous
from braindecode_vis.phantom.scanner import FmriMachine, make_fmri_machine

__all__ = [
    "FmriMachine",
    "Machine",
    "Person",
    "PhantomConfig",
    "StimulusDrive",
    "compute_betas",
    "compute_evoked",
    "make_drive",
    "make_fmri_machine",
    "make_machine",
    "make_person",
    "simulate_betas",
    "simulate_bold",
    "simulate_continuous",
]
