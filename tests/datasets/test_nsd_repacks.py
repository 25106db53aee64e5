"""Copies of NSD as MindEye1, MindEye2 and Brain-Diffuser shared them, written in the same formats."""

import shutil

import h5py
import numpy as np
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.nsd.experiment_design import LAYOUT
from braindecode_vis.datasets.nsd.repacks import NsdRepackConfig
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.parts.phantom.formats.nsd_repacks import make_behaviour, make_mindeye1_sample, write_tar
from braindecode_vis.preprocessing.betas import write_fmri
from tests.datasets.nsd_phantom import AFFINE, find_general, make_design
from tests.datasets.reading import refuse_changes

N_VOXELS = 7


def read_all(source):
    return np.concatenate([part.read(0, len(part.trials)) for part in source.parts])


# --- MindEye1 ---------------------------------------------------------------------------------------------


def make_sample(number, n_unique=3, seed=0):
    values = np.random.default_rng([seed, number]).standard_normal((n_unique, N_VOXELS)).astype(np.float32)
    image = np.full((32, 32, 3), number, np.uint8)
    return make_mindeye1_sample(image, number, values, 10 * number + np.arange(n_unique))


@pytest.fixture
def mindeye1(tmp_path):
    base = tmp_path / "webdataset_avg_split"
    write_tar(base / "train/train_subj01_0.tar", {f"{i:05d}": make_sample(i, 1 + i % 3) for i in range(6)})
    write_tar(base / "train/train_subj01_1.tar", {f"{i:05d}": make_sample(i) for i in range(6, 9)})
    write_tar(base / "train/train_subj02_0.tar", {"00000": make_sample(50)})
    write_tar(base / "test/test_subj01_0.tar", {f"{i:05d}": make_sample(i) for i in range(20, 23)})
    return tmp_path


def test_mindeye1_leaves_padding_out(mindeye1, tmp_path):
    config = NsdRepackConfig(root=mindeye1)
    source = config.open_betas()
    counts = [1 + i % 3 for i in range(6)] + [3] * 6
    assert source.n_trials == sum(counts)
    numbers = [*range(9), *range(20, 23)]
    expected = np.concatenate(
        [make_sample(i, n)["nsdgeneral.npy"][:n] for i, n in zip(numbers, counts, strict=True)]
    )
    np.testing.assert_array_equal(read_all(source), expected)
    trials = write_fmri(config, tmp_path / "out")
    assert trials["n_trials"] == sum(counts)
    assert "9 training and 3 shared test images" in trials["protocol"]
    responses = store.read_responses(tmp_path / "out/responses")
    # coco73k counts from 0, our names from 1.
    assert responses.trials["stimulus_id"].unique().tolist() == [f"nsd{i + 1:05d}" for i in numbers]
    assert responses.trials["repetition"].tolist() == [r for n in counts for r in range(n)]
    assert responses.trials["trial"].tolist()[:3] == [0, 10, 11]
    stimuli = store.read_stimuli(tmp_path / "out/stimuli")
    assert np.abs(stimuli.read_image("nsd00022").astype(int) - 21).max() <= 2  # JPEG


def test_mindeye1_val_that_holds_the_test_tars(mindeye1):
    base = mindeye1 / "webdataset_avg_split"
    write_tar(base / "val/val_subj01_0.tar", {f"{i:05d}": make_sample(i) for i in range(20, 22)})
    source = NsdRepackConfig(root=mindeye1).open_betas()
    assert source.notes["left_out"] == "folder val: its 2 images are all test images"
    write_tar(base / "val/val_subj01_0.tar", {f"{i:05d}": make_sample(i) for i in range(19, 22)})
    with pytest.raises(DataError, match=r"2 of 3 images of .*val are test images"):
        NsdRepackConfig(root=mindeye1).open_betas()
    write_tar(base / "val/val_subj01_0.tar", {f"{i:05d}": make_sample(i) for i in range(30, 32)})
    trials = NsdRepackConfig(root=mindeye1).open_betas().parts[-2].trials
    assert trials["split"].unique().tolist() == ["train"]
    assert trials["run"].iloc[0] == "val-val_subj01_0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coco73k.npy": None}, r"is missing coco73k\.npy"),
        ({"num_uniques.npy": np.array([2])}, "has 2 different responses"),
        ({"num_uniques.npy": None, "trial.npy": None}, r"neither num_uniques\.npy nor trial\.npy"),
        ({"nsdgeneral.npy": np.zeros((2, N_VOXELS), np.float32)}, "has 2 responses, but counts 3"),
    ],
)
def test_mindeye1_odd_samples(mindeye1, change, words):
    sample = {k: v for k, v in (make_sample(3) | change).items() if v is not None}
    write_tar(mindeye1 / "webdataset_avg_split/train/train_subj01_1.tar", {"00003": sample})
    with pytest.raises(DataError, match=words):
        read_all(NsdRepackConfig(root=mindeye1).open_betas())


def test_a_damaged_picture_within_a_tar_is_told(mindeye1):
    """Its reader raised an error without a name, which came out as a traceback."""
    source = NsdRepackConfig(root=mindeye1).open_betas()
    tar = mindeye1 / "webdataset_avg_split/train/train_subj01_0.tar"
    content = bytearray(tar.read_bytes())
    place = content.index(b"\xff\xd8\xff")  # where a JPEG begins
    content[place + 20 : place + 300] = content[place + 20 : place + 300][::-1]
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"a picture of .*tar is damaged"):
        [source.read_image(row) for row in range(len(source.stimuli))]


def test_mindeye1_leaks_and_missing_parts(mindeye1):
    train = mindeye1 / "webdataset_avg_split/train"
    with pytest.raises(DataError, match="no tar of subject 05"):
        NsdRepackConfig(root=mindeye1, subject=5).open_betas()
    first = train / "train_subj01_0.tar"
    refuse_changes(
        NsdRepackConfig(root=mindeye1),
        (DataError, r"1 image.* in both the training and the test part .* first nsd00021",
         lambda: write_tar(train / "train_subj01_1.tar", {"00020": make_sample(20)})),
        (DataError, r"train_subj01_0\.tar is truncated: 5000 of",
         lambda: first.write_bytes(first.read_bytes()[:5000])),
    )  # fmt: skip


# --- MindEye2 ---------------------------------------------------------------------------------------------


@pytest.fixture
def mindeye2(tmp_path):
    rng = np.random.default_rng(0)
    betas = rng.standard_normal((1500, N_VOXELS)).astype(np.float32)
    with h5py.File(tmp_path / "betas_all_subj01_fp32_renorm.hdf5", "w") as file:
        file["betas"] = betas
    images = rng.random((40, 3, 8, 8)).astype(np.float16)
    with h5py.File(tmp_path / "coco_images_224_float16.hdf5", "w") as file:
        file["images"] = images

    def samples(pairs):
        return {f"sample{i:09d}": make_behaviour(*pair) for i, pair in enumerate(pairs)}

    folder = tmp_path / "wds/subj01"
    write_tar(folder / "train/0.tar", samples([(5, 0), (6, 3), (5, 7)]))
    write_tar(folder / "train/1.tar", samples([(7, 751), (6, 1499)]))
    write_tar(folder / "new_test/0.tar", samples([(30, 900), (30, 2), (31, 760)]))
    write_tar(folder / "test/0.tar", samples([(30, 2)]))
    return tmp_path, betas, images


def test_mindeye2_follows_image_and_trial_columns(mindeye2, tmp_path):
    root, betas, images = mindeye2
    config = NsdRepackConfig(root=root)
    source = config.open_betas()
    trials = [part.trials for part in source.parts]
    assert [t["session"].unique().tolist() for t in trials] == [["01"], ["02"]]
    assert trials[0]["trial"].tolist() == [0, 2, 3, 7]
    assert trials[0]["stimulus_id"].tolist() == ["nsd00006", "nsd00031", "nsd00007", "nsd00006"]
    assert trials[0]["split"].tolist() == ["train", "test", "train", "train"]
    assert trials[0]["repetition"].tolist() == [0, 0, 0, 1]
    assert trials[1]["repetition"].tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(read_all(source), betas[[0, 2, 3, 7, 751, 760, 900, 1499]])
    summary = write_fmri(config, tmp_path / "out")
    assert "shared images included" in summary["protocol"]
    stimuli = store.read_stimuli(tmp_path / "out/stimuli")
    expected = np.rint(images[30].astype(np.float32) * 255).astype(np.uint8).transpose(1, 2, 0)
    np.testing.assert_array_equal(stimuli.read_image("nsd00031"), expected)
    old = NsdRepackConfig(root=root, test_set="test").open_betas()
    assert old.n_trials == 6


def test_copies_made_with_the_notebook_of_mindeye2_are_read(mindeye2):
    """Its authors' notebook calls them otherwise than the shared ones, and writes no folder new_test."""
    root, betas, _ = mindeye2
    (root / "betas_all_subj01_fp32_renorm.hdf5").rename(root / "betas_subj01.hdf5")
    shutil.rmtree(root / "wds/subj01/new_test")
    with pytest.raises(DataError, match=r"new_test; fetch it, or use .* --set dataset\.test_set=test"):
        NsdRepackConfig(root=root).open_betas()
    (root / "wds").rename(root / "mindeyev2_wds")
    source = NsdRepackConfig(root=root, test_set="test").open_betas()
    assert "by the authors' notebook" in source.notes["protocol"]
    np.testing.assert_array_equal(read_all(source), betas[[0, 2, 3, 7, 751, 1499]])
    (root / "mindeyev2_wds").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"betas_subj01\.hdf5 is in .* neither wds/subj01 nor mindeyev2_wds"):
        NsdRepackConfig(root=root, test_set="test").open_betas()


def test_mindeye2_bad_files(mindeye2):
    root, betas, images = mindeye2
    tar, pictures = root / "wds/subj01/train/2.tar", root / "coco_images_224_float16.hdf5"
    with pytest.raises(DataError, match="betas_all_subj02"):
        NsdRepackConfig(root=root, subject=2).open_betas()

    def add(trial):
        write_tar(tar, {"a": make_behaviour(5, trial)})

    def store(path, name, values):
        with h5py.File(path, "w") as file:
            file[name] = values

    found = next(root.glob("betas_all*"))
    refuse_changes(
        NsdRepackConfig(root=root),
        (DataError, "name trial 0 more than once", lambda: add(0)),
        (DataError, r"name trial 1500, but .* has 1500 rows", lambda: add(1500)),
        (DataError, "17 columns", lambda: write_tar(tar, {"a": {"behav.npy": np.zeros(3)}})),
        (DataError, r"has the shape \(\d+,\), but should be trial x voxel",
         lambda: (tar.unlink(), store(found, "betas", betas.reshape(-1)))),
    )  # fmt: skip
    store(found, "betas", betas)
    store(pictures, "images", images.reshape(len(images), -1))
    with pytest.raises(
        DataError, match=r"has the shape \(\d+, 192\), but should be image x colour x row x column"
    ):
        NsdRepackConfig(root=root).open_betas().read_image(0)
    refuse_changes(
        NsdRepackConfig(root=root),
        (DataError, r"5 of 5 images are not in .*with_images=false", pictures.unlink),
    )
    assert NsdRepackConfig(root=root, with_images=False).open_betas().read_image is None


# --- Brain-Diffuser ---------------------------------------------------------------------------------------


@pytest.fixture
def diffuser(tmp_path):
    """Arrays made as its own script makes them: images in order of first appearance in the first 3 sessions."""
    design = make_design()
    LAYOUT.write(tmp_path, "design", design)
    seen = {"train": [], "test": []}
    for column in design["masterordering"][0, : 3 * 30].astype(int):
        nsd_id = int(design["subjectim"][0, column - 1]) - 1
        rows = seen["test" if column <= 10 else "train"]
        if nsd_id not in rows:
            rows.append(nsd_id)
    n_voxels = int(find_general().sum())
    for split, ids in seen.items():
        values = np.arange(len(ids))[:, None] + np.linspace(0.1, 1 + (split == "test"), n_voxels)
        np.save(tmp_path / f"nsd_{split}_fmriavg_nsdgeneral_sub1.npy", values)
        pixels = np.stack([np.full((6, 6, 3), i, np.uint8) for i in ids])
        np.save(tmp_path / f"nsd_{split}_stim_sub1.npy", pixels)
    labels = np.where(find_general(), 1, -1)
    nsd_format.write_roi(tmp_path, 1, "nsdgeneral", labels, labels > 0, AFFINE)
    return tmp_path, seen


def test_brain_diffuser_rows_get_their_names_from_the_design(diffuser, tmp_path):
    root, seen = diffuser
    region = root / "nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz"
    config = NsdRepackConfig(root=root, region_file=region)
    summary = write_fmri(config, tmp_path / "out")
    assert "mean over the repetitions in the first 3 sessions" in summary["protocol"]
    responses = store.read_responses(tmp_path / "out/responses")
    for split, ids in seen.items():
        rows = responses.trials["split"] == split
        assert responses.trials.loc[rows, "stimulus_id"].tolist() == [f"nsd{i + 1:05d}" for i in ids]
        np.testing.assert_allclose(responses.data[rows, 0], np.arange(len(ids)) + 0.1, rtol=1e-6)
    np.testing.assert_array_equal(responses.coords["mask"], find_general())
    stimuli = store.read_stimuli(tmp_path / "out/stimuli")
    for i in seen["test"][:3]:
        assert (stimuli.read_image(f"nsd{i + 1:05d}") == i).all()


def test_brain_diffuser_bad_files(diffuser):
    root, _ = diffuser
    path, pixels = root / "nsd_train_fmriavg_nsdgeneral_sub1.npy", np.zeros((2, 6, 6, 3), np.uint8)
    values = np.load(path)
    with pytest.raises(DataError, match=r"sub2\.npy is below"):
        NsdRepackConfig(root=root, subject=2).open_betas()
    refuse_changes(
        NsdRepackConfig(root=root),
        (DataError, "fit no number of sessions", lambda: np.save(path, values[:-1])),
        (DataError, "still multiplied by 300", lambda: np.save(path, values * 300)),
        (DataError, "voxels", lambda: np.save(path, values[:, :-1])),
        (DataError, "images is expected",
         lambda: (np.save(path, values), np.save(root / "nsd_test_stim_sub1.npy", pixels))),
        (DataError, "experimental design of NSD was not found",
         lambda: (root / "nsddata/experiments/nsd/nsd_expdesign.mat").unlink()),
    )  # fmt: skip


def test_a_region_of_another_size_is_refused(mindeye1):
    labels = np.where(find_general(), 1, -1)
    nsd_format.write_roi(mindeye1, 1, "nsdgeneral", labels, labels > 0, AFFINE)
    region = mindeye1 / "nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz"
    with pytest.raises(DataError, match="voxels above 0, but the responses 7"):
        NsdRepackConfig(root=mindeye1, region_file=region).open_betas()


def test_unknown_folders_and_checks(mindeye1, tmp_path):
    (tmp_path / "empty/one/two").mkdir(parents=True)
    with pytest.raises(DataError, match="not a known copy of NSD"):
        NsdRepackConfig(root=tmp_path / "empty/one/two").open_betas()
    assert all(finding.ok for finding in NsdRepackConfig(root=mindeye1).check())
    assert not NsdRepackConfig(root=tmp_path / "empty/one/two").check()[0].ok
    assert len(NsdRepackConfig(root=mindeye1).hash_inputs()) == 3
