"""What networks know of their trials: read back as written, lengths at another rate, windows that fit."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.signal import (
    Signal,
    check_signal,
    count_windows,
    describe_signal,
    scale_length,
)

EEG = Signal(
    ("channel", "time"), (2, 50), ("01", "02"), ("Oz", "Pz"), np.array([[0.0, 0.1, 0.0], [0.0, 0.0, 0.1]]),
    np.arange(50) / 100, 100.0,
)  # fmt: skip
BOLD = Signal(("parcel",), (3,), ("01",), networks=("Vis", "Vis", "Default"), n_voxels=(90, 80))


@pytest.mark.parametrize("signal", [EEG, BOLD])
def test_a_signal_is_read_as_it_was_written(signal):
    again = Signal.from_json(signal.as_json())
    for field in dataclasses.fields(Signal):
        one, two = getattr(signal, field.name), getattr(again, field.name)
        assert type(one) is type(two), field.name
        np.testing.assert_array_equal(one, two)


def test_subjects_are_numbered_and_those_outside_the_training_set_share_a_number():
    assert EEG.index_subjects(["02", "guest", "01", 1, "02"]).tolist() == [1, 2, 0, 2, 1]


@pytest.mark.parametrize(
    ("dims", "shape", "fits"),
    [
        (("channel", "time"), (2, 50), True),
        (("channel", "time"), (2, 49), False),
        (("channel", "time"), (3, 50), False),
        (("parcel", "time"), (2, 50), False),
    ],
)
def test_trials_of_other_axes_or_another_size_are_refused(dims, shape, fits):
    columns = ("subject", "session", "run", "stimulus_id", "repetition", "split")
    trials = pd.DataFrame({name: ["1"] * 4 for name in columns})
    responses = Responses(np.zeros((4, *shape)), ("trial", *dims), trials, "V")
    with (
        nullcontext()
        if fits
        else pytest.raises(DataError, match="trained on trials of 2 channels x 50 times")
    ):
        check_signal(EEG, responses)


def test_lengths_keep_their_duration():
    assert scale_length(25, EEG, "net", 250.0) == 10
    assert scale_length(25, EEG, "net", 90.0) == 28
    assert scale_length(1, EEG, "net", 1000.0) == 1
    with pytest.raises(DataError, match="scales its kernels to the sampling rate"):
        scale_length(25, BOLD, "net", 250.0)


def test_the_least_length_with_a_window_is_named():
    assert count_windows(EEG, "net", lambda n: (n - 30) // 10) == 2
    assert count_windows(EEG, "net", lambda n: n - 49) == 1
    with pytest.raises(DataError, match=r"at least 61 samples \(0.61 s at 100 Hz\), but these have 50"):
        count_windows(EEG, "net", lambda n: n - 60)


def test_a_signal_has_what_the_responses_say():
    """Every coordinate, of the training responses' own subjects alone."""
    trials = pd.DataFrame(
        {"subject": ["02", "01"], "session": "01", "run": "01", "stimulus_id": ["a", "b"], "repetition": 0,
         "split": "train"}
    )  # fmt: skip
    coords = {
        "ch_names": list(EEG.ch_names), "ch_pos": EEG.ch_pos, "times": EEG.times, "sfreq": 100, "modality": "eeg",
        "n_voxels_of": {"01": 90, "02": 80, "03": 70}, "parcel_networks": ["Vis", "Default"],
        "parcel_names": ["a", "b"],
    }  # fmt: skip
    found = describe_signal(
        Responses(np.zeros((2, 2, 50), np.float32), ("trial", "channel", "time"), trials, "V", coords)
    )
    expected = dataclasses.replace(
        EEG, n_voxels=(90, 80), networks=("Vis", "Default"), unit="V", parcels=("a", "b")
    )
    for field in dataclasses.fields(Signal):
        np.testing.assert_array_equal(
            getattr(found, field.name), getattr(expected, field.name), err_msg=field.name
        )
    assert found.voxel_ids is None
    bare = Responses(np.zeros((2, 2, 50), np.float32), ("trial", "channel", "time"), trials, "V", {})
    found = describe_signal(bare)
    assert (found.times, found.sfreq, found.ch_pos, found.ch_names, found.n_voxels) == (
        None,
        None,
        None,
        (),
        (),
    )


def test_time_series_of_voxels_say_where_they_lie():
    trials = pd.DataFrame(
        {
            "subject": ["01"],
            "session": "01",
            "run": "01",
            "stimulus_id": ["a"],
            "repetition": 0,
            "split": "train",
        }
    )
    mask = np.ones((2, 1, 1), bool)
    coords = {
        "voxel_id": np.arange(2),
        "mask": mask,
        "affine": np.eye(4),
        "times": np.arange(3.0),
        "modality": "fmri",
    }
    series = Responses(np.zeros((1, 2, 3), np.float32), ("trial", "voxel", "time"), trials, "z", coords)
    signal = Signal.from_json(describe_signal(series).as_json())
    np.testing.assert_array_equal(signal.voxel_ids, [0, 1])
    np.testing.assert_array_equal(signal.affine, np.eye(4))
    assert signal.grid == (2, 1, 1)


def test_a_voxel_belongs_to_the_smallest_of_its_regions():
    trials = pd.DataFrame(
        {"subject": ["01"], "session": "", "run": "", "stimulus_id": "i", "repetition": 0, "split": "train"}
    )
    coords = {
        "roi_VC": [1, 1, 1, 1, 0], "roi_areas": [2, 2, 3, 0, 0], "roi_LVC": [1, 1, 1, 0, 0],
        "roi_names": {"areas": {"2": "V1"}, "VC": {"1": "ROI_VC"}, "LVC": {"1": "ROI_LVC"}},
    }  # fmt: skip
    responses = Responses(np.zeros((1, 5), np.float32), ("trial", "voxel"), trials, "z", coords)
    found = describe_signal(responses)
    assert found.networks == ("areas/V1", "areas/V1", "areas/3", "VC/ROI_VC", "")
    assert Signal.from_json(found.as_json()) == found
    padded = dataclasses.replace(responses, coords={**coords, "n_voxels_of": {"01": 5}})
    assert describe_signal(padded).networks == ()


def test_parcels_of_another_atlas_are_refused_by_name():
    expected = dataclasses.replace(BOLD, parcels=("a", "b", "c"))
    trials = pd.DataFrame(
        {"subject": ["01"], "session": "", "run": "", "stimulus_id": "i", "repetition": 0, "split": "test"}
    )
    data = np.zeros((1, 3), np.float32)
    check_signal(
        expected, Responses(data, ("trial", "parcel"), trials, "z", {"parcel_names": ["a", "b", "c"]})
    )
    check_signal(expected, Responses(data, ("trial", "parcel"), trials, "z"))
    other = Responses(data, ("trial", "parcel"), trials, "z", {"parcel_names": ["a", "v", "c"]})
    with pytest.raises(DataError, match="number 2 was 'b' but is 'v' here"):
        check_signal(expected, other)
