"""NSD: the phantom in the bucket's formats, the traps, and the real experimental design."""

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat, savemat

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.nsd.beta_files import SurfaceBetas
from braindecode_vis.datasets.nsd.dataset import NsdConfig, check_design_facts
from braindecode_vis.datasets.nsd.experiment_design import (
    LAYOUT,
    describe_protocol,
    make_trials,
    read_design,
)
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.pipeline.scoring import describe_protocol as describe_run_protocol
from braindecode_vis.preprocessing.betas import write_fmri
from tests.datasets.nsd_phantom import (
    AFFINE,
    N_TRIALS,
    SHAPE,
    VERSION,
    find_general,
    make_betas,
    make_design,
    make_labels,
    write_hdf5_betas,
    write_root,
)
from tests.datasets.reading import refuse_changes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp("nsd"))


@pytest.fixture
def own_root(tmp_path):
    """A root that a test may damage."""
    return write_root(tmp_path / "nsd", sessions=(1, 2))


def find_betas(root, session, end="nii.gz"):
    return root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{VERSION}/betas_session{session:02d}.{end}"


def read_all(source):
    return np.concatenate([part.read(0, len(part.trials)) for part in source.parts])


# --- the real design --------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_design_gives_the_declared_counts(shared):
    design = read_design(shared / "data" / "nsd" / "nsd_expdesign.mat")
    findings = {finding.item: finding for finding in check_design_facts(design)}
    assert len(findings) == len(read_manifest("nsd").facts) == 9
    assert all(finding.ok for finding in findings.values()), [f for f in findings.values() if not f.ok]
    order = loadmat(shared / "data" / "nsd" / "nsd_expdesign.mat")["masterordering"][0].astype(int)
    assert ((np.bincount(order[: 30 * 750])[1:1001] == 3).sum()) == 515


@pytest.mark.shared
def test_real_trials_and_both_protocols(shared):
    design = read_design(shared / "data" / "nsd" / "nsd_expdesign.mat")
    trials = [make_trials(design, 1, session) for session in range(1, 41)]
    for n, words in ((37, "982 of 1000 shared images"), (40, "1000 of 1000 shared images")):
        text = describe_protocol(trials[:n], 1000)
        assert words in text
        assert f"{n} sessions (01 to {n})" in text
    assert "(839 of them shown three times), 8859 other images" in describe_protocol(trials[:37], 1000)
    first = trials[0]
    assert first["run"].value_counts(sort=False).tolist() == [63, 62] * 6
    tested = first[first["split"] == "test"]
    shared_ids = loadmat(shared / "data" / "nsd" / "nsd_expdesign.mat")["sharedix"][0]
    assert set(tested["nsd_id"] + 1) <= set(shared_ids.tolist())
    assert first["stimulus_id"].iloc[0] == f"nsd{first['nsd_id'].iloc[0] + 1:05d}"


# --- values, trials, geometry -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nii.gz", "hdf5"])
def test_betas_are_those_of_nibabel_divided_by_300(tmp_path, form):
    root = write_root(tmp_path, sessions=(1, 2), form=form)
    source = NsdConfig(root=root, sessions=2).open_betas()
    mask = find_general()
    expected = np.concatenate([np.rint(make_betas(s)[:, mask] * 300) / 300 for s in (1, 2)])
    np.testing.assert_array_equal(read_all(source), expected.astype(np.float32))
    pieces = np.concatenate([source.parts[0].read(a, b) for a, b in ((0, 7), (7, 8), (8, 30))])
    np.testing.assert_array_equal(pieces, expected[:30].astype(np.float32))
    assert source.unit == "percent signal change"


def test_trials_follow_the_design_and_name_images_from_one(root):
    source = NsdConfig(root=root).open_betas()
    design = make_design()
    trials = pd.concat([part.trials for part in source.parts], ignore_index=True)
    for session in range(1, 5):
        images = nsd_format.get_trial_images(design, 1, session)
        rows = trials[trials["session"] == f"{session:02d}"]
        assert rows["stimulus_id"].tolist() == [f"nsd{image:05d}" for image in images]
        assert rows["nsd_id"].tolist() == (images - 1).tolist()
    assert set(trials.loc[trials["split"] == "test", "nsd_id"] + 1) == set(design["sharedix"][0].tolist())
    assert (trials.groupby("stimulus_id")["repetition"].agg(sorted).map(tuple) == (0, 1, 2)).all()
    assert trials["run"].unique().tolist() == ["01", "02", "03"]
    assert source.notes["trials_cross_checked_with_responses_tsv"]


def test_the_store_keeps_images_regions_and_the_protocol(root, tmp_path):
    config = NsdConfig(root=root, sessions=3, image_size=32)
    steps = []
    summary = write_fmri(config, tmp_path, progress=lambda *told: steps.append(told))
    assert steps[-1][:2] == (summary["n_trials"], summary["n_trials"]) == (90, 90)
    assert "NSD subject 01, 3 sessions (01 to 03): 10 of 10 shared images" in summary["protocol"]
    responses = store.read_responses(tmp_path / "responses")
    labels, _ = make_labels()
    mask = find_general()
    np.testing.assert_array_equal(responses.coords["mask"], mask)
    np.testing.assert_allclose(responses.coords["affine"], AFFINE)
    np.testing.assert_array_equal(responses.coords["roi_streams"], labels[mask])
    assert responses.coords["roi_names"]["streams"] == {"1": "early", "2": "ventral", "3": "lateral"}
    assert responses.coords["roi_names"]["HCP_MMP1"] == {}
    stimuli = store.read_stimuli(tmp_path / "stimuli")
    assert stimuli.pixels.shape == (len(stimuli), 32, 32, 3)
    assert set(stimuli.ids) == set(responses.stimulus_ids)
    assert stimuli.table["sha256"].str.len().eq(64).all()
    assert responses.unit == "z"
    assert (
        store.read_json(tmp_path / "responses" / "meta.json")["provenance"]["protocol"] == summary["protocol"]
    )
    rows = responses.trials["session"] == "02"
    is_train = responses.trials["split"] == "train"
    np.testing.assert_allclose(responses.data[rows & is_train].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(responses.data[rows & is_train].std(axis=0), 1, atol=1e-4)


def test_images_come_from_the_row_one_below_their_number(root, tmp_path):
    write_fmri(NsdConfig(root=root, sessions=(2,)), tmp_path)
    stimuli = store.read_stimuli(tmp_path / "stimuli")
    with h5py.File(root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        for stimulus_id in stimuli.ids[:5]:
            expected = file["imgBrick"][int(stimulus_id[3:]) - 1]
            np.testing.assert_array_equal(stimuli.read_image(stimulus_id), expected)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("nsdgeneral", lambda labels, cortex: (labels > 0) & cortex),
        ("cortex", lambda labels, cortex: cortex),
        ("streams", lambda labels, cortex: (labels > 0) & cortex),
        ("streams:ventral,lateral", lambda labels, cortex: (labels > 1) & cortex),
        ("HCP_MMP1:2", lambda labels, cortex: (labels == 2) & cortex),
    ],
)
def test_masks(root, mask, expected):
    source = NsdConfig(root=root, sessions=1, mask=mask, with_images=False).open_betas()
    np.testing.assert_array_equal(source.geometry.mask, expected(*make_labels()))


def test_a_mask_of_ones_own_and_the_ncsnr(own_root, tmp_path):
    labels, cortex = make_labels()
    ncsnr = np.random.default_rng(0).random(SHAPE)
    nsd_format.write_ncsnr(own_root, 1, ncsnr, AFFINE)
    path = tmp_path / "mine.nii.gz"
    nib.save(nib.Nifti1Image(np.where(cortex, labels, -1).astype(np.int16), AFFINE), path)
    source = NsdConfig(root=own_root, sessions=1, mask_file=path).open_betas()
    np.testing.assert_array_equal(source.geometry.mask, find_general())
    np.testing.assert_allclose(source.geometry.maps["ncsnr"], ncsnr[find_general()], rtol=1e-6)
    (ceiling,) = own_root.glob("**/ncsnr.nii.gz")
    ceiling.unlink()
    ceiling.symlink_to(".git/annex/objects/aa/bb")  # it was taken for one that nobody asked for
    with pytest.raises(DataError, match="datalad get"):
        NsdConfig(root=own_root, sessions=1, mask_file=path).open_betas()


def test_unknown_masks_and_regions_are_named_with_the_nearest(root):
    for mask, words in (
        ("nsdgenral", "did you mean 'nsdgeneral'"),
        ("streams:ventrl", "did you mean 'ventral'"),
    ):
        with pytest.raises(ConfigError, match=words):
            NsdConfig(root=root, mask=mask).open_betas()
    with pytest.raises(ConfigError, match=r"dataset\.rois"):
        NsdConfig(root=root, rois=("floc-faces",)).open_betas()
    with pytest.raises(ConfigError, match=r"set dataset\.mask=streams:ventral"):
        NsdConfig(root=root, rois=("streams:ventral",)).open_betas()


def test_regions_go_by_number_where_no_table_was_fetched(own_root):
    """Names lie in a folder of FreeSurfer that many people never fetch; the labels themselves are in the volume."""
    own = own_root / "nsddata/freesurfer/subj01/label"
    labels, cortex = make_labels()
    other = own_root / "nsddata/freesurfer/fsaverage/label"
    other.mkdir(parents=True)
    (own / "streams.mgz.ctab").rename(other / "streams.mgz.ctab")
    mask = NsdConfig(root=own_root, sessions=2, mask="streams:ventral").open_betas().geometry.mask
    np.testing.assert_array_equal(mask, (labels == 2) & cortex)
    (other / "streams.mgz.ctab").unlink()
    with pytest.raises(
        ConfigError,
        match=r"'ventral' of streams.*fetch nsddata/freesurfer/subj01/label/streams\.mgz\.ctab.*number \(1, 2, 3\)",
    ):
        NsdConfig(root=own_root, sessions=2, mask="streams:ventral").open_betas()
    by_number = NsdConfig(root=own_root, sessions=2, mask="streams:2").open_betas()
    np.testing.assert_array_equal(by_number.geometry.mask, mask)
    assert dict(by_number.geometry.rois["streams"].names) == {}


def test_sessions_with_gaps_are_named_as_they_are():
    from braindecode_vis.datasets.nsd.experiment_design import NsdDesign

    made = make_design()
    runs = np.ones((4, N_TRIALS), int)
    design = NsdDesign(
        made["masterordering"].reshape(4, -1).astype(int), made["subjectim"], made["sharedix"][0], runs, None
    )
    for sessions, words in (
        ((1, 2, 4), "3 sessions (1, 2, 4): "),
        ((2, 3, 4), "3 sessions (02 to 04): "),
        ((1, 2), "2 sessions (1, 2): "),
        ((3,), "1 session (3): "),
    ):
        assert words in describe_protocol([make_trials(design, 1, s) for s in sessions], 10)


# --- bad input --------------------------------------------------------------------------------------------


def test_missing_sessions_are_all_named(own_root):
    with pytest.raises(DataError, match=r"2 of 4 sessions are missing in .*: 03, 04"):
        NsdConfig(root=own_root).open_betas()
    with pytest.raises(ConfigError, match=r"session 5.* completed sessions 1 to 4"):
        NsdConfig(root=own_root, sessions=5).open_betas()
    with pytest.raises(DataError, match=r"betas_assumehrf does not exist; there are .*GLMdenoise_RR"):
        NsdConfig(root=own_root, betas="betas_assumehrf").open_betas()


def test_betas_already_divided_are_refused(own_root):
    path = find_betas(own_root, 2)
    image = nib.load(path)
    divided = (image.get_fdata() / 300).astype(np.float32)
    nib.save(nib.Nifti1Image(divided, image.affine), path)
    with pytest.raises(DataError, match=r"session02.*already divided by 300"):
        NsdConfig(root=own_root, sessions=2).open_betas()
    source = NsdConfig(root=own_root, sessions=(2,), divide_by=1).open_betas()
    np.testing.assert_allclose(source.parts[0].read(0, 3), divided[find_general()].T[:3])


def test_what_does_not_belong_together_is_refused(own_root):
    two, path = NsdConfig(root=own_root, sessions=2), own_root / "nsddata/ppdata/subj01/behav/responses.tsv"
    betas, table, design = make_betas(1), pd.read_csv(path, sep="\t"), make_design()
    with pytest.raises(DataError, match=r"still multiplied by 300"):
        NsdConfig(root=own_root, sessions=2, divide_by=1).open_betas()

    def write(volumes, affine=AFFINE):
        options = {"shape": volumes.shape[1:], "n_trials": len(volumes), "affine": affine}
        nsd_format.write_betas(own_root, 1, 1, volumes, **options)

    def write_hdf5():
        find_betas(own_root, 1).unlink()
        write_hdf5_betas(own_root, 1, 1, betas[..., :-1])

    def write_behaviour(table):
        write(betas)
        table.to_csv(path, sep="\t", index=False)

    def shift_design():
        design["subjectim"] = design["subjectim"] - design["subjectim"].min()
        savemat(own_root / "nsddata/experiments/nsd/nsd_expdesign.mat", design)

    refuse_changes(
        two,
        (DataError, r"fewer trials \(30\) .* than .*session01.* has betas \(33\)",
         lambda: write(np.concatenate([betas, make_betas(2)[:3]]))),
        (DataError, r"affine of .*session01.* differs from that of the mask by up to 1:",
         lambda: write(betas, AFFINE + np.eye(4) * [1, 0, 0, 0])),
        (DataError, r"volumes of \(7, 6, 4\), but the mask has \(7, 6, 5\)", lambda: write(betas[..., :-1])),
        (DataError, r"shape \(30, 4, 6, 7\); as MATLAB writes it", write_hdf5),
        # Ids from zero, a trial of another image, and a table that is cut.
        (DataError, r"73KID in .*responses\.tsv counts from 0",
         lambda: write_behaviour(table.assign(**{"73KID": table["73KID"] - 1}))),
        (DataError, "disagree in 1 trials of session 01, first in trial 4",
         lambda: write_behaviour(table.assign(**{"73KID": table["73KID"] + (table.index == 3)}))),
        (DataError, r"session 02 of subject 01 has 10 trials in .*, but 30 in",
         lambda: write_behaviour(table.iloc[:40])),
        (DataError, r"subjectim in .* counts from 0", shift_design),
    )  # fmt: skip


def test_a_truncated_session_is_named(own_root, tmp_path):
    path = find_betas(own_root, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"session02.*truncated or damaged: it ends in volume \d+ of 30"):
        write_fmri(NsdConfig(root=own_root, sessions=2), tmp_path / "out")


def test_missing_images_say_how_to_go_on(tmp_path):
    root = write_root(tmp_path, sessions=(1,), images=False)
    with pytest.raises(DataError, match=r"image file of NSD was not found .*with_images=false"):
        NsdConfig(root=root, sessions=1).open_betas()
    assert NsdConfig(root=root, sessions=1, with_images=False).open_betas().read_image is None


def test_too_few_images(own_root):
    with h5py.File(own_root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = np.zeros((20, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="holds 20: the file is truncated"):
        NsdConfig(root=own_root, sessions=1).open_betas()


def test_check_compares_the_design_with_the_manifest(root):
    findings = {finding.item: finding for finding in NsdConfig(root=root).check()}
    assert findings["betas"].ok
    assert "4 sessions, 120 trials" in findings["betas"].message
    assert not findings["n_images"].ok  # the phantom is smaller than the published set
    bad = NsdConfig(root=root, sessions=(9,)).check()[-1]
    assert not bad.ok


def test_hashes_see_every_file(own_root):
    config = NsdConfig(root=own_root, sessions=2)
    before = config.hash_inputs()
    assert {"betas_session01.nii.gz", "streams.nii.gz", "nsd_stimuli.hdf5"} <= {
        k.split("/")[-1] for k in before
    }
    find_betas(own_root, 2).write_bytes(b"\x1f\x8b other")
    assert config.hash_inputs() != before


# --- fsaverage --------------------------------------------------------------------------------------------


def write_surface(root, session, values):
    folder = root / f"nsddata_betas/ppdata/subj01/fsaverage/{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    half = values.shape[1] // 2
    for side, columns in (("lh", values[:, :half]), ("rh", values[:, half:])):
        data = np.asfortranarray(columns.T[:, None, None].astype(np.float32))
        nib.save(nib.MGHImage(data, np.eye(4)), folder / f"{side}.betas_session{session:02d}.mgh")


@pytest.fixture
def surface_root(tmp_path):
    root = tmp_path / "surface"
    LAYOUT.write(root, "design", make_design())
    values = np.random.default_rng(0).standard_normal((N_TRIALS, 80)) * 2
    values[:, 5] = np.nan
    write_surface(root, 1, values)
    labels = np.random.default_rng(1).integers(-1, 3, 80).astype(np.float32)
    labels[5] = 1
    folder = root / "nsddata/freesurfer/fsaverage/label"
    folder.mkdir(parents=True)
    for side, part in (("lh", labels[:40]), ("rh", labels[40:])):
        nib.save(nib.MGHImage(part[:, None, None], np.eye(4)), folder / f"{side}.streams.mgz")
    (folder / "streams.mgz.ctab").write_text("0 Unknown 0 0 0 0\n1 early 1 1 1 0\n2 ventral 2 2 2 0\n")
    return root, values, labels


def test_surface_betas(surface_root, tmp_path):
    from braindecode_vis.preprocessing.voxel_geometry import find_rois, inverse_transform

    root, values, labels = surface_root
    config = NsdConfig(
        root=root, sessions=1, space="fsaverage", mask="streams", zscore="none", with_images=False
    )
    source = config.open_betas()
    keep = (labels > 0) & np.isfinite(values[0])
    np.testing.assert_allclose(read_all(source), values[:, keep], rtol=1e-6)
    write_fmri(config, tmp_path / "out")
    responses = store.read_responses(tmp_path / "out" / "responses")
    assert responses.coords["surface"] == "fsaverage"
    np.testing.assert_array_equal(find_rois(responses, {"streams": ["ventral"]}), labels[keep] == 2)
    sides = inverse_transform(responses, np.arange(keep.sum()))
    whole = np.concatenate([sides["left"], sides["right"]])
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(whole)), np.flatnonzero(keep))


def test_surface_betas_with_many_holes_or_the_wrong_scale(surface_root):
    root, values, _ = surface_root
    config = NsdConfig(root=root, sessions=1, space="fsaverage", mask="brain", with_images=False)
    write_surface(root, 1, values * 300)
    with pytest.raises(DataError, match="still multiplied by 300"):
        config.open_betas()
    values[:, :30] = np.nan
    write_surface(root, 1, values)
    with pytest.raises(DataError, match="30 of 80 vertices"):
        config.open_betas()
    with pytest.raises(ConfigError, match="mask_file is a volume"):
        config.model_copy(update={"mask_file": root}).open_betas()


def test_surface_files_of_different_length(surface_root):
    root, values, _ = surface_root
    write_surface(root, 2, values[:10])
    folder = root / f"nsddata_betas/ppdata/subj01/fsaverage/{VERSION}"
    with pytest.raises(DataError, match="trials\\) is expected"):
        SurfaceBetas((folder / "lh.betas_session01.mgh", folder / "rh.betas_session02.mgh"), divide_by=1)


def test_what_nsd_says_of_its_test_set_is_in_every_score(tmp_path):
    """Whether 982 or 1000 shared images were tested stood in the store alone, and no score said it."""
    root = write_root(tmp_path / "nsd", sessions=(1, 2))
    run = open_run(
        read_config("nsd_ridge", ["dataset.sessions=2", "dataset.image_size=32"], root=root), tmp_path / "run"
    )
    prepared = pipeline.preprocess(run)
    assert "shared images are the test set" in prepared.declared_protocol
    assert prepared.declared_protocol in describe_run_protocol(run, prepared, "2 exact test images")


def test_a_mask_file_that_is_not_there_is_named(tmp_path):
    root = write_root(tmp_path / "nsd", sessions=(1, 2))
    with pytest.raises(DataError, match=r"none\.nii does not exist; correct the setting"):
        NsdConfig(root=root, mask_file=tmp_path / "none.nii", sessions=2).hash_inputs()
