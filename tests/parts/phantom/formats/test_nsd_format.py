"""NSD phantom: read back with scipy, nibabel, h5py and pandas, traps included."""

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.nsd.dataset import NsdConfig
from braindecode_vis.datasets.nsd.experiment_design import LAYOUT
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, estimate_phantom, make_phantom
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.parts.phantom.formats.file_writers import write_csv, write_tsv
from braindecode_vis.parts.phantom.formats.nsd_files import SHAPES, make_subject_scanner

SHAPE = (5, 4, 3)
AFFINE = np.diag([1.8, 1.8, 1.8, 1.0])


@pytest.fixture(scope="module")
def design():
    return nsd_format.make_nsd_expdesign(
        2, 4, images_per_subject=40, n_shared=10, n_images=90, seed=1, n_runs=3
    )


@pytest.fixture(scope="module")
def betas():
    return np.random.default_rng(0).standard_normal((6, *SHAPE)) * 2


def test_full_design_has_the_published_types_and_shapes(tmp_path):
    full = nsd_format.make_nsd_expdesign()
    path = LAYOUT.write(tmp_path, "design", full)
    loaded = loadmat(path)
    expected = {
        "masterordering": ((1, 30000), np.uint16),
        "subjectim": ((8, 10000), np.int32),
        "sharedix": ((1, 1000), np.int32),
        "basiccnt": ((3, 40), np.uint16),
        "stimpattern": ((40, 12, 75), np.uint8),
    }
    for key, (shape, dtype) in expected.items():
        assert (loaded[key].shape, loaded[key].dtype) == (shape, dtype), key
        np.testing.assert_array_equal(loaded[key], full[key])
    assert (np.diff(loaded["sharedix"][0]) > 0).all()
    # The published file has 437, 106 and 34 images shown once, twice and three times in a session.
    np.testing.assert_allclose(loaded["basiccnt"].mean(axis=1), [437, 106, 34], rtol=0.1)
    assert (loaded["stimpattern"].sum(axis=2)[0] == [63, 62] * 6).all()
    assert path.read_bytes() == LAYOUT.write(tmp_path / "again", "design", full).read_bytes()


def test_design_counts_from_one_and_shares_the_first_columns(design):
    order = design["masterordering"][0]
    assert order.min() == 1
    assert (np.bincount(order)[1:] == 3).all()
    np.testing.assert_array_equal(design["subjectim"][:, :10], np.tile(design["sharedix"], (2, 1)))
    own = design["subjectim"][:, 10:]
    assert len(np.unique(own)) == own.size
    assert not np.isin(own, design["sharedix"]).any()
    np.testing.assert_array_equal(np.array([1, 2, 3]) @ design["basiccnt"], 30)
    images = nsd_format.get_trial_images(design, 2, 3)
    np.testing.assert_array_equal(images, design["subjectim"][1, order[60:90].astype(int) - 1])


def test_design_refuses_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match="do not divide"):
        nsd_format.make_nsd_expdesign(1, 7, images_per_subject=10, n_shared=1, n_images=20)
    with pytest.raises(ConfigError, match="need 110 images"):
        nsd_format.make_nsd_expdesign(2, 4, images_per_subject=60, n_shared=10, n_images=90, n_runs=3)


def test_stim_info_points_back_at_the_trials(tmp_path, design):
    table = pd.read_csv(
        write_csv(tmp_path / "info.csv", nsd_format.make_stim_info(design, 90), index=True), index_col=0
    )
    assert table["nsdId"].tolist() == list(range(90))
    np.testing.assert_array_equal(np.flatnonzero(table["shared1000"]) + 1, design["sharedix"][0])
    order = design["masterordering"][0].astype(int)
    for row in table[table["subject2"] == 1].itertuples():
        for trial in (row.subject2_rep0, row.subject2_rep1, row.subject2_rep2):
            assert design["subjectim"][1, order[trial - 1] - 1] == row.nsdId + 1
    assert (table.loc[table["subject2"] == 0, "subject2_rep0"] == 0).all()


def test_responses(tmp_path, design):
    path = write_tsv(
        LAYOUT.place(tmp_path, "behaviour", subject=2), nsd_format.make_responses(design, 2, 3), missing="NaN"
    )
    assert path == tmp_path / "nsddata" / "ppdata" / "subj02" / "behav" / "responses.tsv"
    table = pd.read_csv(path, sep="\t")
    assert table.shape == (90, 19)
    np.testing.assert_array_equal(table["73KID"][30:60], nsd_format.get_trial_images(design, 2, 2))
    np.testing.assert_array_equal(table["10KID"], design["masterordering"][0, :90])
    assert table["ISOLD"].equals(table.duplicated("73KID").astype("int64"))
    assert table["MEMORYRECENT"].isna().equals(table["ISOLD"] == 0)
    assert table.groupby("SESSION")["RUN"].max().tolist() == [3, 3, 3]
    assert table["TIME"].is_monotonic_increasing


def test_nifti_betas_are_int16_times_300(tmp_path, betas):
    options = {"shape": SHAPE, "n_trials": 6, "affine": AFFINE}
    path = nsd_format.write_betas(tmp_path, 1, 1, iter(betas), **options)
    assert path.relative_to(tmp_path).as_posix() == (
        "nsddata_betas/ppdata/subj01/func1pt8mm/betas_fithrf_GLMdenoise_RR/betas_session01.nii.gz"
    )
    image = nib.load(path)
    assert image.shape == (*SHAPE, 6)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.rint(np.moveaxis(betas, 0, -1) * 300))
    np.testing.assert_allclose(image.affine, AFFINE, rtol=1e-6)  # the header keeps float32
    assert (
        path.read_bytes() == nsd_format.write_betas(tmp_path / "b", 1, 1, iter(betas), **options).read_bytes()
    )


def test_betas_beyond_int16_are_refused(tmp_path, betas):
    with pytest.raises(DataError, match="109 %"):
        nsd_format.write_betas(tmp_path, 1, 1, iter(betas * 1000), shape=SHAPE, n_trials=6, affine=AFFINE)


def test_regions_are_minus_one_outside_the_cortex(tmp_path):
    cortex = np.zeros(SHAPE, dtype=bool)
    cortex[1:] = True
    labels = np.zeros(SHAPE, dtype=int)
    labels[2:] = 1
    path = nsd_format.write_roi(tmp_path, 1, "nsdgeneral", labels, cortex, AFFINE)
    volume = nib.load(path).get_fdata()
    assert set(np.unique(volume)) == {-1, 0, 1}
    assert (volume == 1).sum() == labels.sum() < (volume != -1).sum()
    nsd_format.write_roi(tmp_path, 1, "floc-faces", labels, cortex, AFFINE, names={1: "OFA"})
    table = tmp_path / "nsddata" / "freesurfer" / "subj01" / "label" / "floc-faces.mgz.ctab"
    assert table.read_text() == "0 Unknown\n1 OFA\n"
    ncsnr = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    np.testing.assert_array_equal(
        nib.load(nsd_format.write_ncsnr(tmp_path, 1, ncsnr, AFFINE)).get_fdata(), ncsnr
    )


def test_stimuli(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 425, 425, 3), dtype=np.uint8)
    path = nsd_format.write_stimuli(tmp_path, iter(images), 3)
    with h5py.File(path) as file:
        assert file["imgBrick"].dtype == np.uint8
        np.testing.assert_array_equal(file["imgBrick"][()], images)
    with pytest.raises(DataError, match="announced with 4 images"):
        nsd_format.write_stimuli(tmp_path / "b", iter(images), 4)


def test_the_published_grid_holds_the_cortex_of_every_subject():
    """At 1.8 mm the volumes are those of the eight subjects, with 0 mm in their middle, and the same voxels in all."""
    scanners = [make_subject_scanner(1.8, subject) for subject in (1, 7, 9)]
    assert [scanner.mask.shape for scanner in scanners] == [SHAPES[0], SHAPES[6], SHAPES[0]]
    np.testing.assert_allclose(np.diag(scanners[0].affine), [1.8, 1.8, 1.8, 1])
    np.testing.assert_allclose(scanners[0].affine[:3, 3], [-72.0, -92.7, -73.8])
    assert scanners[0].n_voxels == scanners[1].n_voxels > 90_000
    np.testing.assert_array_equal(scanners[0].positions, scanners[1].positions)
    # Coarser grids keep the box of the head.
    for voxel_mm in (3, 6, 12):
        small = make_subject_scanner(voxel_mm, 1).mask.shape
        np.testing.assert_allclose(
            np.array(small) * voxel_mm, np.array(SHAPES[0]) * 1.8, atol=voxel_mm / 2 + 0.01
        )


def test_every_version_and_form_of_the_betas_that_is_asked_for(tmp_path):
    size = SIZES["nsd"]["tiny"].replace(
        beta_versions=("betas_assumehrf", "betas_fithrf"),
        beta_form="hdf5",
        n_imagery=0,
        imagery_repetitions=0,
    )
    estimate = estimate_phantom("nsd", size)
    steps = []
    make_phantom(
        "nsd", tmp_path, size=size, config=PhantomConfig(snr=0.3), advance=steps.append,
        embed=lambda stimuli: np.random.default_rng(0).standard_normal((len(stimuli), 8)),
    )  # fmt: skip
    assert sum(steps) == estimate.n_steps
    made = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.5 < made / estimate.n_bytes < 2
    read = {}
    for version in size.beta_versions:
        source = NsdConfig(root=tmp_path, betas=version).open_betas()
        assert source.parts[0].files[0].name == "betas_session01.hdf5"
        read[version] = np.concatenate([part.read(0, len(part.trials)) for part in source.parts])
    # The same trials with more noise on them.
    rough, fine = (read[version] for version in size.beta_versions)
    assert 0.5 < np.corrcoef(rough.ravel(), fine.ravel())[0, 1] < 0.99
    assert rough.std() > fine.std()
    with pytest.raises(DataError, match="betas_fithrf_GLMdenoise_RR does not exist; there are"):
        NsdConfig(root=tmp_path).open_betas()
    with pytest.raises(ConfigError, match="did you mean 'betas_fithrf'"):
        estimate_phantom("nsd", size.replace(beta_versions=("betas_fithr",)))
    with pytest.raises(ConfigError, match=r"form of the betas .* must be one of nii\.gz, hdf5"):
        estimate_phantom("nsd", size.replace(beta_form="mat"))
    with pytest.raises(ConfigError, match="beta_form is hdf5, but a phantom in the format god has no such"):
        estimate_phantom("god", SIZES["god"]["tiny"].replace(beta_form="hdf5"))
