"""Several people of NSD in one store: padded, with brains and images of their own."""

import numpy as np
import pytest
from pydantic import ValidationError

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.nsd.beta_files import check_scale, read_sample
from braindecode_vis.datasets.nsd.dataset import NsdConfig
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.preprocessing.betas import write_fmri
from braindecode_vis.preprocessing.voxel_geometry import read_geometry
from tests.datasets.nsd_phantom import AFFINE, make_labels, write_root


@pytest.fixture
def root(tmp_path):
    root = write_root(tmp_path / "nsd", sessions=(1, 2))
    write_root(root, sessions=(1, 2), subject=2, images=False)
    labels, cortex = make_labels()
    smaller = ((labels == 1) | (labels == 2)).astype(int)
    nsd_format.write_roi(root, 2, "nsdgeneral", smaller, cortex, AFFINE, names={1: "nsdgeneral"})
    return root


def make(root, **options):
    return NsdConfig(root=root, **({"subjects": (1, 2), "sessions": 2, "pad_subjects": True} | options))


def test_two_people_in_one_store_are_those_alone(root, tmp_path):
    write_fmri(make(root), tmp_path / "joint")
    joint = store.read_responses(tmp_path / "joint/responses")
    sizes = joint.coords["n_voxels_of"]
    assert sizes["01"] > sizes["02"] == joint.coords["voxel_id_sub-02"].size
    stimuli = store.read_stimuli(tmp_path / "joint/stimuli")
    for subject in (1, 2):
        write_fmri(make(root, subjects=None, subject=subject), tmp_path / str(subject))
        alone = store.read_responses(tmp_path / str(subject) / "responses")
        rows = (joint.trials["subject"] == f"{subject:02d}").to_numpy()
        n = alone.data.shape[1]
        np.testing.assert_array_equal(joint.data[rows][:, :n], alone.data)
        assert not joint.data[rows][:, n:].any()
        own = read_geometry(joint, f"{subject:02d}")
        np.testing.assert_array_equal(own.mask, np.asarray(alone.coords["mask"]))
        assert set(own.rois) == {"nsdgeneral", "streams", "HCP_MMP1"}
        images = store.read_stimuli(tmp_path / str(subject) / "stimuli")
        for name in (images.ids[0], images.ids[-1]):
            np.testing.assert_array_equal(stimuli.read_image(name), images.read_image(name))
    assert len(stimuli) < 2 * len(images)  # shared ones are there once
    assert len(make(root).hash_inputs()) == sum(
        len(make(root, subjects=None, subject=s).hash_inputs()) for s in (1, 2)
    )
    assert f"{sizes['01']} and {sizes['02']} voxels" in make(root).check()[-2].message


def test_joint_reading_must_be_asked_for(root):
    with pytest.raises(ConfigError, match=r"set dataset\.pad_subjects"):
        make(root, pad_subjects=False).open_betas()
    with pytest.raises(ValidationError, match="each once"):
        make(root, subjects=(1, 1))


def test_design_facts_of_a_phantom_are_told_not_judged(root):
    assert any(not finding.ok for finding in make(root).check())
    (root / "phantom_truth").mkdir()
    findings = make(root).check()
    assert all(finding.ok for finding in findings)
    assert any("simulated (the real data set has 73000)" in finding.message for finding in findings)


def test_one_odd_trial_does_not_pass_for_another_scale(tmp_path):
    """A beta image of a subject who moved is large; four ordinary ones beside it say what the file holds."""
    betas = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    betas[0] *= 1000
    with pytest.raises(DataError, match="still multiplied"):
        check_scale(betas[:1], 300, tmp_path)
    check_scale(read_sample(lambda start, stop: betas[start:stop], 8), 300, tmp_path)
