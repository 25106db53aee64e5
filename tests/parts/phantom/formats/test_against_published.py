"""The phantom's tables have the columns, kinds and quirks of the published files beside the checkout."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat

from braindecode_vis.datasets.kamitani import bdata
from braindecode_vis.parts.phantom.formats import (
    nsd_format,
    things_fmri_format,
    things_meg_format,
)

DATA = Path(__file__).resolve().parents[5] / "shared" / "data"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not beside the checkout"),
]


def read_published(pattern):
    return pd.read_csv(sorted(DATA.glob(f"bids_metadata/{pattern}"))[0], sep="\t")


def test_meg_events_and_channels(tmp_path):
    images = things_meg_format.make_image_table(["ant", "bee"], 1, 1)
    design = things_meg_format.make_things_meg_design(images, 1, 1, n_catch=1)
    names = ["MLC11-1609", "MZP01-1609"]
    block = np.zeros((2, things_meg_format.count_run_samples(design)))
    path = things_meg_format.write_raw_run(tmp_path, 1, 1, 1, [block], design, ch_names=names)
    for kind in ("events", "channels"):
        ours = pd.read_csv(str(path).replace("_meg.fif", f"_{kind}.tsv"), sep="\t")
        theirs = read_published(f"ds004212/sub-BIGMEG1/ses-01/meg/*run-01_{kind}.tsv")
        assert list(ours.columns) == list(theirs.columns)
        assert (ours.dtypes == theirs.dtypes).all()
        if kind == "channels":
            pd.testing.assert_frame_equal(
                ours.set_index("name").loc[[*names, "UPPT001"]],
                theirs.set_index("name").loc[[*names, "UPPT001"]],
            )
        else:
            assert set(ours["trial_type"]) == set(theirs["trial_type"])
            assert theirs["value"].isna().equals(theirs["trial_type"] == "catch")


def test_fmri_events(tmp_path):
    images = things_fmri_format.make_image_table(["ant", "bee"], 1, 1)
    design = things_fmri_format.make_things_fmri_design(images, 1, 1, n_catch=2)
    ours = pd.read_csv(things_fmri_format.write_events(tmp_path, 1, 1, 1, design, images), sep="\t")
    theirs = read_published("ds004192/sub-01/ses-things01/func/*run-01_events.tsv")
    assert list(ours.columns) == list(theirs.columns)
    assert (ours.dtypes == theirs.dtypes).all()
    assert ours["onset"].tolist() == theirs["onset"].tolist()[: len(ours)]


def test_nsd_design_has_the_published_arrays():
    theirs = loadmat(DATA / "nsd" / "nsd_expdesign.mat")
    ours = nsd_format.make_nsd_expdesign()
    assert set(ours) == {key for key in theirs if not key.startswith("__")}
    for key, array in ours.items():
        assert (array.shape, array.dtype) == (theirs[key].shape, theirs[key].dtype), key
    per_run = theirs["stimpattern"].sum(axis=2)
    np.testing.assert_array_equal(ours["stimpattern"].sum(axis=2), per_run)


def test_god_ids_are_the_published_numbers():
    for name in ("Training", "Test"):
        table = pd.read_csv(DATA / "god" / f"stimulus_ImageNet{name}.tsv", sep="\t", header=None)
        assert [bdata.encode_stimulus_id(text) for text in table[0]] == table[1].tolist()
