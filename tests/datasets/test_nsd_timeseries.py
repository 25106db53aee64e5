"""NSD's time series on a phantom: volumes around the onset of every trial, in voxels and in parcels."""

import nibabel as nib
import numpy as np
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.nsd.timeseries import T_R, NsdTimeseriesConfig
from braindecode_vis.parts.phantom.formats.file_writers import write_text, write_volumes
from braindecode_vis.preprocessing.bold import write_bold
from tests.datasets.nsd_phantom import AFFINE, SHAPE, make_design, make_labels, write_root

N_VOLUMES = 44
NAMES = ("7Networks_LH_Vis_1", "7Networks_LH_Default_Temp_1", "7Networks_RH_Vis_1")
CLEAN = {"drift": "none", "scaling": "none"}
MODEL = {"kind": "window", "start": 0.0, "stop": 4.0, "keep": "times", "clean": CLEAN}


def find_ids(session):
    design = make_design()
    columns = design["masterordering"].ravel().reshape(4, -1)[session - 1]
    return design["subjectim"][0, columns - 1].reshape(3, 10)


def write_series(root, session):
    """Three runs of ten pictures, one every four volumes."""
    base = root / "nsddata_timeseries/ppdata/subj01/func1pt8mm"
    series = {}
    for number, ids in enumerate(find_ids(session), start=1):
        run = number
        rng = np.random.default_rng(100 * session + run)
        volumes = np.rint(rng.standard_normal((N_VOLUMES, *SHAPE)) * 20 + 1000)
        end = f"_session{session:02d}_run{run:02d}"
        write_volumes(
            base / f"timeseries/timeseries{end}.nii.gz",
            iter(volumes),
            shape=SHAPE,
            n_volumes=N_VOLUMES,
            affine=AFFINE,
            dtype=np.int16,
        )
        shown = np.zeros(N_VOLUMES, int)
        shown[2 : 2 + 4 * 10 : 4] = ids
        write_text(base / f"design/design{end}.tsv", "".join(f"{number}\n" for number in shown))
        (base / "motion").mkdir(exist_ok=True)
        np.savetxt(base / f"motion/motion{end}.tsv", rng.standard_normal((N_VOLUMES, 6)), delimiter="\t")
        series[f"{run:02d}"] = volumes
    return series


@pytest.fixture
def root(tmp_path):
    root = write_root(tmp_path / "nsd", sessions=())
    return root, {f"{session:02d}": write_series(root, session) for session in (1, 2)}


def make(root, **options):
    return NsdTimeseriesConfig(root=root, **({"model": MODEL, "zscore": "none", "image_size": 32} | options))


def test_every_trial_gets_its_volumes(root, tmp_path):
    folder, series = root
    write_bold(make(folder), tmp_path / "out")
    responses = store.read_responses(tmp_path / "out/responses")
    cortex = make_labels()[1]
    assert responses.dims == ("trial", "voxel", "time")
    assert responses.data.shape == (60, cortex.sum(), 3)
    np.testing.assert_allclose(responses.coords["times"], [0, T_R, 2 * T_R])
    np.testing.assert_array_equal(np.asarray(responses.coords["mask"]), cortex)
    ids = np.concatenate([find_ids(s).ravel() for s in (1, 2)])
    assert responses.trials["stimulus_id"].tolist() == [f"nsd{i:05d}" for i in ids]
    for row in (0, 7, 29, 45):
        trial = responses.trials.iloc[row]
        volumes = series[trial["session"]][trial["run"]][:, cortex]
        first = 2 + 4 * (row % 10)
        expected = (volumes - volumes.mean(axis=0))[first : first + 3].T
        np.testing.assert_allclose(responses.data[row], expected, atol=1e-3)
    stimuli = store.read_stimuli(tmp_path / "out/stimuli")
    assert stimuli.pixels.shape[1:] == (32, 32, 3)
    assert set(responses.trials["split"]) == {"train", "test"}


def test_whole_cortex_in_parcels(root, tmp_path):
    folder, _ = root
    labels = np.broadcast_to(np.repeat([1, 2, 3], [2, 2, 3])[:, None, None], SHAPE).astype(np.int16)
    nib.Nifti1Image(labels, AFFINE).to_filename(tmp_path / "atlas.nii.gz")
    (tmp_path / "atlas.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(NAMES, start=1)))
    atlas = {"files": (tmp_path / "atlas.nii.gz",), "labels": tmp_path / "atlas.txt"}
    write_bold(make(folder, atlas=atlas, with_images=False), tmp_path / "parcels")
    write_bold(make(folder, with_images=False), tmp_path / "voxels")
    parcels, voxels = (store.read_responses(tmp_path / n / "responses") for n in ("parcels", "voxels"))
    assert parcels.dims == ("trial", "parcel", "time")
    assert parcels.coords["parcel_names"] == list(NAMES)
    assert parcels.coords["parcel_networks"] == ["Vis", "Default", "Vis"]
    inside = labels[make_labels()[1]]
    for number in (1, 2, 3):
        expected = voxels.data[:, inside == number].mean(axis=1)
        np.testing.assert_allclose(parcels.data[:, number - 1], expected, atol=1e-3)


def test_resting_runs_are_left_out(root):
    folder, _ = root
    base = folder / "nsddata_timeseries/ppdata/subj01/func1pt8mm"
    whole = make(folder).open_bold()
    assert len(whole.runs) == 6
    for number in range(4, 15):  # as if rest, three runs, and ten that the design does not know
        (base / f"timeseries/timeseries_session02_run{number:02d}.nii.gz").write_bytes(
            (base / "timeseries/timeseries_session02_run01.nii.gz").read_bytes()
        )
    with pytest.raises(DataError, match="has 12 runs of pictures, the design 3"):
        make(folder).open_bold()
    assert len(make(folder, sessions=1).open_bold().runs) == 3


def test_motion_is_regressed_out_if_asked_for(root):
    folder, _ = root
    assert make(folder).open_bold().runs[0].confounds.shape == (N_VOLUMES, 0)
    assert make(folder, motion=True).open_bold().runs[0].confounds.shape == (N_VOLUMES, 6)
    assert len(make(folder, motion=True).hash_inputs()) == len(make(folder).hash_inputs()) + 6


def test_designs_that_do_not_fit_are_named(root):
    folder, _ = root
    design = folder / "nsddata_timeseries/ppdata/subj01/func1pt8mm/design"
    first, second = (design / f"design_session01_run0{n}.tsv" for n in (1, 2))
    kept = first.read_text()
    first.write_text(second.read_text())
    with pytest.raises(
        DataError, match=r"begins 10 pictures, and not the 10 that nsd_expdesign\.mat lists for run 01"
    ):
        make(folder).open_bold()
    assert not make(folder).check()[0].ok
    first.write_text(kept + "0\n")
    with pytest.raises(DataError, match=f"has {N_VOLUMES + 1} rows"):
        make(folder).open_bold()
    first.unlink()
    with pytest.raises(DataError, match="does not exist; fetch it with the time series"):
        make(folder).open_bold()
    with pytest.raises(DataError, match="no time series of session 03"):
        make(folder, sessions=(3,)).open_bold()
