"""CNeuroMod-THINGS: the phantom in the layout of its DataLad collection, the split of ours, and what may be missing."""

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.cneuromod_things import CneuromodThingsConfig
from braindecode_vis.preprocessing.betas import write_fmri
from tests.datasets.reading import refuse_changes, run_to_report
from tests.parts.phantom.tiny import make_tiny

OUTPUT = "THINGS/glmsingle/sub-01/glmsingle/output"
EVENTS = "THINGS/fmriprep/sourcedata/things"
STEM = "sub-01_task-things_space-T1w_model-fitHrfGLMdenoiseRR"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_tiny("cneuromod-things", tmp_path_factory.mktemp("cneuromod"), 0.5, n_subjects=2)


@pytest.fixture
def own_root(tmp_path):
    """A root that a test may damage."""
    return make_tiny("cneuromod-things", tmp_path / "cneuromod", 0.5, n_subjects=2)


def find_betas(root):
    return root / OUTPUT / f"{STEM}_stat-trialBetas_desc-zscore_statseries.h5"


def test_betas_and_events_are_paired_run_by_run(root, tmp_path):
    config = CneuromodThingsConfig(root=root, subjects=(1,), zscore="none")
    summary = write_fmri(config, tmp_path / "out")
    assert (
        "12 training images, 3 test images of unseen categories (every 10th), a split of ours"
        in summary["protocol"]
    )
    assert "standardised over all trials" in summary["protocol"]
    responses = store.read_responses(tmp_path / "out/responses")
    trials = responses.trials
    expected, events = [], []
    with h5py.File(find_betas(root)) as file:
        for session, run in ((1, 1), (1, 2), (2, 1), (2, 2)):
            expected.append(file[f"{session}/{run}/betas"][()])
            name = f"sub-01_ses-{session:02d}_task-things_run-{run:02d}_events.tsv"
            events.append(pd.read_csv(root / EVENTS / f"sub-01/ses-{session:02d}/func/{name}", sep="\t"))
        mask = file["mask_array"][()] > 0
    np.testing.assert_allclose(responses.data, np.concatenate(expected), atol=1e-6)
    events = pd.concat(events, ignore_index=True)
    assert trials["stimulus_id"].tolist() == [path.split("/")[-1][:-4] for path in events["image_path"]]
    assert (trials["split"] == "test").tolist() == (events["category_nr"] % 10 == 0).tolist()
    assert trials["answered"].tolist() == events["response"].notna().tolist()
    assert trials.groupby("stimulus_id")["repetition"].max().eq(2).all()
    np.testing.assert_array_equal(responses.coords["mask"], mask)
    stimuli = store.read_stimuli(tmp_path / "out/stimuli")
    assert stimuli.read_image(trials["stimulus_id"].iloc[0]).shape == (32, 32, 3)


def test_people_have_the_numbers_of_the_collection(root):
    assert CneuromodThingsConfig(root=root)._find_subjects() == [1, 2]
    with pytest.raises(DataError, match="CNeuroMod-THINGS subject 6 is not there; found 1, 2"):
        CneuromodThingsConfig(root=root, subjects=(6,)).open_betas()
    with pytest.raises(ConfigError, match="do not correspond"):
        CneuromodThingsConfig(root=root).open_betas()
    padded = CneuromodThingsConfig(root=root, pad_subjects=True)
    assert padded.open_betas().subjects == ("01", "02")


def test_other_splits(root):
    config = CneuromodThingsConfig(root=root, subjects=(1,))
    with pytest.raises(DataError, match=r"no test trial: the sixth image .* change dataset\.test"):
        CneuromodThingsConfig(root=root, subjects=(1,), test="exemplars").open_betas()
    trials = pd.concat(part.trials for part in config.open_betas().parts)
    assert ((trials["split"] == "test") == (trials["category_nr"] % 10 == 0)).all()
    one = CneuromodThingsConfig(root=root, subjects=(1,), sessions=(2,)).open_betas()
    assert {part.group for part in one.parts} == {("01", "02")}


def test_regions_and_noise_ceiling_choose_voxels(root):
    source = CneuromodThingsConfig(root=root, subjects=(1,), rois=("FFA", "PPA")).open_betas()
    masks = [
        nib.load(next((root / "fLoc/rois/sub-01").rglob(f"*_roi-{name}_*.nii.gz"))).get_fdata() > 0
        for name in ("FFA", "PPA")
    ]
    np.testing.assert_array_equal(source.geometry.mask, masks[0] | masks[1])
    assert source.geometry.rois["FFA"].labels.sum() == masks[0].sum()
    with h5py.File(find_betas(root)) as file:
        whole, mask = file["1/1/betas"][()], file["mask_array"][()] > 0
    np.testing.assert_allclose(
        source.parts[0].read(0, 3), whole[:3][:, (masks[0] | masks[1])[mask]].astype(np.float32)
    )
    reliable = CneuromodThingsConfig(root=root, subjects=(1,), min_noise_ceiling=20.0).open_betas()
    assert 0 < reliable.geometry.n_voxels < mask.sum()
    assert reliable.geometry.maps["noise_ceiling"].min() >= 20
    assert "voxels_chosen_with_test_images" in reliable.notes
    with pytest.raises(ConfigError, match=r"no mask of the region 'FFB'.* there are EBA, FFA, OPA, PPA"):
        CneuromodThingsConfig(root=root, subjects=(1,), rois=("FFB",)).open_betas()


def test_check_tells_counts(root):
    findings = {f.item: f for f in CneuromodThingsConfig(root=root, subjects=(1,)).check()}
    assert all(finding.ok for finding in findings.values()), findings
    assert findings["subject 01 images"].message == "15 images; simulated (the real data set has 4320)"
    assert len(CneuromodThingsConfig(root=root, subjects=(1,)).hash_inputs()) > 5


def test_what_is_missing_is_named(own_root):
    config = CneuromodThingsConfig(root=own_root, subjects=(1,))
    events = own_root / EVENTS / "sub-01/ses-02/func/sub-01_ses-02_task-things_run-02_events.tsv"
    lines, path = events.read_text().splitlines(), find_betas(own_root)
    column, cells = lines[0].split("\t").index("category_nr"), lines[2].split("\t")
    damaged = "\t".join([*cells[:column], "1\b1", *cells[column + 1 :]])

    def link():
        """A collection of DataLad without its content is links to nothing."""
        path.unlink()
        path.symlink_to("../../.git/annex/objects/none")

    def write(**arrays):
        with h5py.File(path, "a") as file:
            for name, values in arrays.items():
                file[name] = values

    refuse_changes(
        config,
        (DataError, r"session 02, run 02: .* lists \d+ trials, but .* has \d+ betas",
         lambda: events.write_text("\n".join(lines[:-1]) + "\n")),
        (DataError, "in the column category_nr, line 3, but a number is expected",
         lambda: events.write_text("\n".join([*lines[:2], damaged, *lines[3:]]))),
        (DataError, "session 02, run 02, but its events are not there", events.unlink),
        (DataError, "which is not there; in a data set of datalad", link),
        (DataError, r"was not found at .*; fetch it with datalad get", path.unlink),
        (DataError, "contains no sessions", lambda: write(mask_array=np.ones((2, 2, 2)), mask_affine=np.eye(4))),
        (DataError, r"betas of shape \(4, 7\) do not fit the mask of 8 voxels",
         lambda: write(**{"1/1/betas": np.zeros((4, 7))})),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no events .* --set dataset\.events=DIR"):
        CneuromodThingsConfig(root=own_root / "THINGS/glmsingle", subjects=(1,))._find_events_folder()


def test_the_configuration_runs_from_files_to_a_report(root, tmp_path):
    run_to_report(
        "cneuromod_things_ridge", root, tmp_path / "run", "a split of ours", "encoder.alphas=[1000]"
    )
