"""Runs of fMRI of every layout, written with nibabel as fMRIPrep, the HCP and XCP-D name them; samples are noise."""

import json
import pickle

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nibabel import cifti2

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.consent import give_consent
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig, FmriChannels
from braindecode_vis.datasets.sources.betas_source import AtlasConfig
from braindecode_vis.parts.foundation.corpus.atlases import read_corpus_atlas
from braindecode_vis.parts.foundation.corpus.fmri_sources import (
    close_gaps,
    expand_motion,
    find_fmri_runs,
    read_fmri_channels,
)

NAMES = [f"7Networks_{side}H_{network}_1" for side in "LR" for network in ("Vis", "Default", "SomMot")]
AFFINE = np.diag([2.0, 2, 2, 1]) + np.array([[0, 0, 0, -6], [0, 0, 0, -8], [0, 0, 0, -4], [0, 0, 0, 0.0]])
SHAPE = (6, 8, 4)
N_VERTICES = 20
PLAIN = {"confounds": {"strategy": []}, "detrend": False, "scrubbing": "none"}
RNG = np.random.default_rng(0)


def label_volume():
    labels = np.zeros(SHAPE, np.int16)
    for number in range(6):
        labels[number, 1:7, 1:3] = number + 1
    return labels


def label_surface(side):
    """Two places of background, then three parcels of six vertices."""
    return np.r_[[0, 0], np.repeat(np.arange(1, 4), 6)].astype(np.int32) + (3 * (side == "R")) * np.r_[
        [0, 0], np.ones(18, int)
    ].astype(np.int32)


def models():
    left, right = (
        cifti2.BrainModelAxis.from_mask(label_surface(side) > 0, name=f"CORTEX_{word}")
        for side, word in (("L", "LEFT"), ("R", "RIGHT"))
    )
    return left + right


@pytest.fixture
def atlas(tmp_path):
    """One atlas as a volume, a table, a dlabel file and label.gii files."""
    folder = tmp_path / "atlas"
    folder.mkdir()
    nib.save(nib.Nifti1Image(label_volume(), AFFINE), folder / "atlas.nii.gz")
    (folder / "names.txt").write_text("".join(f"{n}\t{name}\t0 0 0 0\n" for n, name in enumerate(NAMES, 1)))
    axis = cifti2.LabelAxis(
        ["atlas"], [{0: ("???", (0, 0, 0, 0))} | {n: (name, (1, 0, 0, 1)) for n, name in enumerate(NAMES, 1)}]
    )
    labels = np.concatenate([label_surface(s)[2:] for s in "LR"])[None]
    cifti2.save(cifti2.Cifti2Image(labels.astype(np.int32), (axis, models())), folder / "atlas.dlabel.nii")
    for side in "LR":
        table = nib.gifti.GiftiLabelTable()
        for key, name in enumerate(["???", *NAMES]):
            label = nib.gifti.GiftiLabel(key)
            label.label = name
            if key == 0 or (key > 3) == (side == "R"):
                table.labels.append(label)
        array = nib.gifti.GiftiDataArray(label_surface(side), intent="NIFTI_INTENT_LABEL", datatype="int32")
        nib.save(nib.gifti.GiftiImage(darrays=[array], labeltable=table), folder / f"atlas.{side}.label.gii")
    return folder


def make_config(atlas, *files, cleaning=PLAIN, **options):
    files = [atlas / name for name in files]
    channels = {
        "kind": "fmri",
        "atlas": "own",
        "files": files,
        "labels": atlas / "names.txt",
        "cleaning": cleaning,
        **options,
    }
    return CorpusConfig(channels=channels)


def courses(n=40, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 6)) + 100


def write_volume(
    root, stem, series, t_r=2.0, sidecar=2.0, space="MNI152NLin2009cAsym", affine=AFFINE, drop=(), flat=None
):
    folder = root.joinpath(*[p for p in stem.split("_") if p.startswith(("sub-", "ses-"))], "func")
    folder.mkdir(parents=True, exist_ok=True)
    data = np.zeros((*SHAPE, len(series)), np.float32)
    for number in range(6):
        inside = label_volume() == number + 1
        # Places differ around the course of their parcel, whose mean it is.
        spread = RNG.standard_normal(inside.sum())
        data[inside] = series[:, number] + (spread - spread.mean())[:, None]
    if flat is not None:
        # Four of its twelve voxels are left, a third.
        data[np.nonzero(label_volume() == flat + 1)[0][0], 3:7] = 0
    mask = np.ones(SHAPE, np.uint8)
    for number in drop:
        mask[label_volume() == number + 1] = 0
    image = nib.Nifti1Image(data, affine)
    image.header.set_zooms((2, 2, 2, t_r))
    image.header.set_xyzt_units("mm", "sec")
    base = folder / f"{stem}_space-{space}"
    nib.save(image, f"{base}_desc-preproc_bold.nii.gz")
    nib.save(nib.Nifti1Image(mask, affine), f"{base}_desc-brain_mask.nii.gz")
    if sidecar is not None:
        (folder / f"{base.name}_desc-preproc_bold.json").write_text(json.dumps({"RepetitionTime": sidecar}))
    return folder / stem


def write_confounds(stem, n=40, moved=(), fd=0.1, early=0, **columns):
    table = pd.DataFrame(
        {name: RNG.standard_normal(n) for name in ("csf", "white_matter", "cosine00")}
        | {f"{kind}_{axis}": RNG.standard_normal(n) for kind in ("trans", "rot") for axis in "xyz"}
    )
    table["framewise_displacement"] = fd
    table.loc[list(moved), "framewise_displacement"] = 2.0
    table.loc[0, "framewise_displacement"] = np.nan
    for k in range(early):
        table[f"non_steady_state_outlier{k:02d}"] = np.eye(n)[k].astype(int)
    table.assign(**columns).to_csv(
        f"{stem}_desc-confounds_timeseries.tsv", sep="\t", index=False, na_rep="n/a"
    )
    stem.with_name(f"{stem.name}_desc-confounds_timeseries.json").write_text("{}")
    return table


def write_cifti(path, series, axis, t_r=0.72):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = cifti2.SeriesAxis(0, t_r, len(series), "SECOND")
    cifti2.save(cifti2.Cifti2Image(series.astype(np.float32), (time, axis)), path)


def parcels_axis(names):
    return cifti2.ParcelsAxis(
        names,
        np.array([np.zeros((0, 3), int)] * len(names), object),
        [{"CIFTI_STRUCTURE_CORTEX_LEFT": np.array([i])} for i in range(len(names))],
        nvertices={"CIFTI_STRUCTURE_CORTEX_LEFT": N_VERTICES},
    )


def test_every_layout_gives_the_same_parcels(tmp_path, atlas):
    """Volumes, grayordinates, surfaces, parcels and tables of the same courses are read as these very courses."""
    root, series = tmp_path / "data", courses()
    write_volume(root, "sub-01_task-rest", series)
    spread = RNG.standard_normal((6, 6))
    spread -= spread.mean(axis=1, keepdims=True)
    vertices = (series[:, :, None] + spread).reshape(len(series), -1).astype(np.float32)
    stem = root / "sub-02" / "func" / "sub-02_task-movie_run-1"
    write_cifti(stem.with_name(f"{stem.name}_space-fsLR_den-91k_bold.dtseries.nii"), vertices, models(), 2.0)
    stem.with_name(f"{stem.name}_space-fsLR_den-91k_bold.json").write_text('{"RepetitionTime": 2.0}')
    func = root / "sub-03" / "ses-a" / "func"
    func.mkdir(parents=True)
    for side, part in (("L", vertices[:, :18]), ("R", vertices[:, 18:])):
        full = np.concatenate([np.zeros((len(part), 2), np.float32), part], axis=1)
        image = nib.gifti.GiftiImage(
            darrays=[
                nib.gifti.GiftiDataArray(
                    v, "NIFTI_INTENT_TIME_SERIES", "NIFTI_TYPE_FLOAT32", meta={"TimeStep": "2000"}
                )
                for v in full
            ]
        )
        nib.save(image, func / f"sub-03_ses-a_task-rest_hemi-{side}_space-fsaverage5_bold.func.gii")
    # The HCP: other order of the parcels, other spelling of their names.
    place = root / "100307" / "MNINonLinear" / "Results" / "rfMRI_REST1_LR"
    order = [3, 0, 1, 2, 5, 4]
    short = [NAMES[i].removeprefix("7Networks_") for i in order]
    write_cifti(place / "rfMRI_REST1_LR_Atlas.ptseries.nii", series[:, order], parcels_axis(short))
    tables = root / "sub-04"
    tables.mkdir()
    table = pd.DataFrame(series, columns=NAMES).drop(columns=NAMES[4]).assign(**{NAMES[1]: np.nan})
    table.to_csv(
        tables / "sub-04_task-rest_seg-own_timeseries.tsv", sep="\t", index_label="time", na_rep="n/a"
    )
    np.save(tables / "sub-04_task-rest_run-2_timeseries.npy", series)
    (root / "task-rest_bold.json").write_text('{"RepetitionTime": 1.5}')
    (root / "participants.tsv").write_text("participant_id\tsite\nsub-01\tNYU\n")
    config = make_config(atlas, "atlas.nii.gz", "atlas.dlabel.nii", cleaning=PLAIN)
    # What all runs of rest inherit holds for the tables, and not for those that say it themselves.
    left_out = find_fmri_runs(root, config)[1]
    assert [item.path.name.split("_")[0] for item in left_out] == ["sub-03"]
    assert "1.5 s in its sidecar, but 2 s in its header" in left_out[0].reason
    (func / "sub-03_ses-a_task-rest_hemi-L_space-fsaverage5_bold.json").write_text('{"RepetitionTime": 2.0}')
    runs, excluded = find_fmri_runs(root, config)
    assert excluded == []
    assert [(r.subject, r.session, r.task, r.run, r.interval_s, r.site) for r in runs] == [
        ("01", "", "rest", "", 2.0, "NYU"),
        ("02", "", "movie", "1", 2.0, "data"),
        ("03", "a", "rest", "", 2.0, "data"),
        ("04", "", "rest", "", 1.5, "data"),
        ("04", "", "rest", "2", 1.5, "data"),
        ("100307", "", "rest", "rfMRI_REST1_LR", 0.72, "data"),
    ]
    for run in runs:
        values = pickle.loads(pickle.dumps(run.read))()
        gone = np.isin(NAMES, run.missing)
        assert values.shape == (run.n_times, 6)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values[:, ~gone], series[:, ~gone], rtol=1e-5, err_msg=run.subject)
        assert np.isnan(values[:, gone]).all()
    assert [run.missing for run in runs if run.missing] == [(NAMES[1], NAMES[4])]
    channels = read_fmri_channels(config.channels)
    assert channels.networks == ("Vis", "Default", "SomMot") * 2
    assert channels.coordinates[0].tolist() == [-6.0, -1.0, -1.0]


def test_forms_of_an_atlas_agree_in_names_whatever_their_numbers(tmp_path, atlas):
    surface = FmriChannels(atlas="own", files=(atlas / "atlas.L.label.gii", atlas / "atlas.R.label.gii"))
    dlabel = FmriChannels(atlas="own", files=(atlas / "atlas.dlabel.nii", atlas / "atlas.nii.gz"))
    first, second = read_corpus_atlas(surface), read_corpus_atlas(dlabel)
    assert first.channels.names == second.channels.names == tuple(NAMES)
    first_labels = first.place_surface((20, 20)).labels
    np.testing.assert_array_equal(first.place_surface((20, 20)).labels, second.place_surface((20, 20)).labels)
    assert first.channels.digest != second.channels.digest
    with pytest.raises(ConfigError, match=r"has 6 regions, but the atlas glasser has 360"):
        read_corpus_atlas(FmriChannels(atlas="glasser", files=(atlas / "atlas.dlabel.nii",)))
    with pytest.raises(ConfigError, match=r"named after 7 networks; set channels.networks=7"):
        read_corpus_atlas(FmriChannels(atlas="schaefer100", networks=17, labels=make_table(tmp_path, 100)))
    with pytest.raises(ConfigError, match="a424 cannot be fetched by nilearn: give its files"):
        read_corpus_atlas(FmriChannels(atlas="a424"))
    with pytest.raises(ConfigError, match="not its other hemisphere"):
        read_corpus_atlas(FmriChannels(atlas="own", files=(atlas / "atlas.L.label.gii",)))
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n} Area_{n}\n" for n in range(1, 7)))
    with pytest.raises(DataError, match=r"'7Networks_LH_Vis_1' of .*dlabel.nii is none of"):
        read_corpus_atlas(FmriChannels(atlas="own", files=(atlas / "atlas.dlabel.nii",), labels=other))
    other.write_text("".join(f"{n}\t{name}\n" for n, name in enumerate([*NAMES, "One", "Two"], 1)))
    with pytest.raises(DataError, match=r"2 of the 8 named regions have no label in .*atlas.nii.gz"):
        read_corpus_atlas(FmriChannels(atlas="own", files=(atlas / "atlas.nii.gz",), labels=other))
    for side, first in (("lh", 0), ("rh", 3)):
        words = ["Background+FreeSurfer_Defined_Medial_Wall", *NAMES[first : first + 3]]
        colours = np.c_[np.arange(4), np.zeros((4, 3), int), np.arange(4)]
        labels = np.maximum(label_surface("L"), 0)
        nib.freesurfer.write_annot(tmp_path / f"{side}.own.annot", labels, colours, words, fill_ctab=True)
    annot = read_corpus_atlas(
        FmriChannels(atlas="own", files=(tmp_path / "rh.own.annot", tmp_path / "lh.own.annot"))
    )
    assert annot.channels.names == tuple(NAMES)
    np.testing.assert_array_equal(annot.place_surface((20, 20)).labels, first_labels)
    with pytest.raises(ValueError, match="'schaefer450' is not known"):
        FmriChannels(atlas="schaefer450")


def make_table(folder, n):
    path = folder / "table.tsv"
    rows = [f"{k}\t7Networks_LH_Vis_{k}\tVis{k % 2}\t{k}\t0\t1\n" for k in range(1, n + 1)]
    path.write_text("index\tname\tnetwork\tx\ty\tz\n" + "".join(rows))
    return path


def test_a_table_of_names_is_an_atlas_for_parcellated_data(tmp_path):
    channels = read_fmri_channels(FmriChannels(atlas="schaefer100", labels=make_table(tmp_path, 100)))
    assert len(channels.names) == 100
    assert channels.networks[:2] == ("Vis1", "Vis0")
    assert channels.coordinates[9].tolist() == [10, 0, 1]


def test_confounds_are_regressed_out_as_nilearn_does_and_moved_volumes_bridged(tmp_path, atlas):
    from nilearn import signal
    from nilearn.interfaces.fmriprep import load_confounds

    series = courses(60)
    stem = write_volume(tmp_path / "data", "sub-01_task-rest", series)
    write_confounds(stem, 60, moved=(20, 21, 24, 59), early=2)
    cleaning = {"scrub_segment": 5, "l_freq": 0.01, "h_freq": 0.1}
    run = find_fmri_runs(tmp_path / "data", make_config(atlas, "atlas.nii.gz", cleaning=cleaning))[0][0]
    image = f"{stem}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
    strategy = ("motion", "wm_csf", "high_pass")
    confounds, _ = load_confounds(image, strategy, "basic", wm_csf="basic", demean=False)
    mask = np.setdiff1d(np.arange(60), [0, 1, 20, 21, 22, 23, 24, 59])
    expected = signal.clean(
        series[2:], sample_mask=mask - 2, confounds=confounds.to_numpy()[2:], standardize=None,
        low_pass=0.1, high_pass=0.01, t_r=2.0,
    )  # fmt: skip
    found = run.read()
    assert (run.n_times, len(found)) == (58, 58)
    assert run.motion_mm == pytest.approx((54 * 0.1 + 4 * 2.0) / 58)
    assert run.scrubbed == pytest.approx(6 / 58)
    np.testing.assert_allclose(found[mask - 2], expected, atol=1e-4)
    # From volume 19 to 25 along a line; behind the last one kept nothing is known.
    np.testing.assert_allclose(found[20], found[17] + (found[23] - found[17]) / 2, atol=1e-4)
    np.testing.assert_allclose(found[57], found[56])
    cut = make_config(atlas, "atlas.nii.gz", cleaning={**cleaning, "scrubbing": "cut"})
    run = find_fmri_runs(tmp_path / "data", cut)[0][0]
    assert run.n_times == 52
    np.testing.assert_allclose(run.read(), expected, atol=1e-4)


def test_motion_of_the_hcp_is_regressed_out_where_its_files_are_not_cleaned(tmp_path, atlas):
    moves = np.cumsum(RNG.standard_normal((40, 6)) * 0.001, axis=0)
    series = courses() + 5000 * moves[:, :1]
    for name in ("tfMRI_WM_LR", "rfMRI_REST1_RL"):
        place = tmp_path / "hcp" / "1" / "MNINonLinear" / "Results" / name
        clean = "_hp2000_clean" if "REST" in name else ""
        write_cifti(place / f"{name}_Atlas{clean}.ptseries.nii", series, parcels_axis(NAMES))
        np.savetxt(place / "Movement_Regressors.txt", np.c_[moves[:, :3], np.rad2deg(moves[:, 3:]), moves])
    config = make_config(atlas, cleaning={"detrend": False})
    cleaned, task = find_fmri_runs(tmp_path / "hcp", config)[0]
    assert (cleaned.task, task.task) == ("rest", "wm")
    joined = tmp_path / "hcp" / "1" / "MNINonLinear" / "Results" / "rfMRI_REST"
    write_cifti(joined / "rfMRI_REST_Atlas_hp0_clean.ptseries.nii", series, parcels_axis(NAMES))
    runs, excluded = find_fmri_runs(tmp_path / "hcp", config)
    assert [run.run for run in runs] == ["rfMRI_REST1_RL", "tfMRI_WM_LR"]
    assert excluded[0].reason == "it is a concatenation of other runs that exist, such as rfMRI_REST1_RL"
    steps = np.abs(np.diff(moves, axis=0))
    assert task.motion_mm == pytest.approx((steps[:, :3].sum() + 50 * steps[:, 3:].sum()) / 40)
    assert np.corrcoef(cleaned.read()[:, 0], moves[:, 0])[0, 1] > 0.9
    assert abs(np.corrcoef(task.read()[:, 0], moves[:, 0])[0, 1]) < 1e-5
    config = make_config(atlas, cleaning={"confounds": {"strategy": ["high_pass"]}})
    slow = 9 * np.cos(np.pi / 300 * (np.arange(300) + 0.5) * 2)[:, None]
    place = tmp_path / "long" / "1" / "MNINonLinear" / "Results" / "tfMRI_WM_LR"
    write_cifti(place / "tfMRI_WM_LR_Atlas.ptseries.nii", 100 + np.tile(slow, 6), parcels_axis(NAMES))
    np.savetxt(place / "Movement_Regressors.txt", np.zeros((300, 12)))
    assert np.abs(find_fmri_runs(tmp_path / "long", config)[0][0].read()).max() < 1e-3


def test_motion_is_expanded_and_gaps_closed_as_nilearn_does(tmp_path):
    from nilearn.interfaces.fmriprep import load_confounds

    table = {f"{kind}_{axis}": RNG.standard_normal(30) for kind in ("trans", "rot") for axis in "xyz"}
    moves = pd.DataFrame(table)
    full = moves.copy()
    for name in moves:
        full[f"{name}_derivative1"] = moves[name].diff()
        full[f"{name}_power2"] = moves[name] ** 2
        full[f"{name}_derivative1_power2"] = moves[name].diff() ** 2
    full["framewise_displacement"] = np.isin(np.arange(30), (3, 9, 12, 20, 26)) * 1.0
    full["std_dvars"] = 0.0
    image = tmp_path / "sub-01_task-rest_desc-preproc_bold.nii.gz"
    full.to_csv(
        tmp_path / "sub-01_task-rest_desc-confounds_timeseries.tsv", sep="\t", index=False, na_rep="n/a"
    )
    (tmp_path / "sub-01_task-rest_desc-confounds_timeseries.json").write_text("{}")
    for how in ("basic", "derivatives", "power2", "full"):
        expected, _ = load_confounds(str(image), ("motion",), motion=how, demean=False)
        found = np.sort(expand_motion(moves.to_numpy(), how)[1:], axis=1)
        np.testing.assert_allclose(found, np.sort(expected.to_numpy()[1:], axis=1))
    _, kept = load_confounds(str(image), ("motion", "scrub"), scrub=5, fd_threshold=0.5, demean=False)
    moved = full["framewise_displacement"].to_numpy() > 0.5
    assert np.flatnonzero(~close_gaps(moved, 5)).tolist() == kept.tolist()


def leave_out(root, config):
    """The reason why the second run of a root is left out, the first one being whole."""
    write_volume(root, "sub-00_task-rest", courses())
    runs, excluded = find_fmri_runs(root, config)
    assert [run.subject for run in runs] == ["00"]
    assert len(excluded) == 1
    return excluded[0].reason


def test_a_wrong_repetition_time_is_refused(tmp_path, atlas):
    config = make_config(atlas, "atlas.nii.gz")
    write_volume(tmp_path / "a", "sub-01_task-rest", courses(), sidecar=0.8)
    assert "0.8 s in its sidecar, but 2 s in its header; correct the sidecar" in leave_out(
        tmp_path / "a", config
    )
    write_volume(tmp_path / "b", "sub-01_task-rest", courses(), t_r=0, sidecar=2000)
    assert "repetition time of 2000 s, which is impossible for a scanner; BIDS uses seconds" in leave_out(
        tmp_path / "b", config
    )
    write_volume(tmp_path / "c", "sub-01_task-rest", courses(), t_r=0, sidecar=None)
    assert "neither the sidecar nor the header" in leave_out(tmp_path / "c", config)


def test_an_atlas_in_another_space_is_refused(tmp_path, atlas):
    moved = AFFINE.copy()
    moved[0, 3] += 1.0
    config = make_config(atlas, "atlas.nii.gz")
    write_volume(tmp_path / "a", "sub-01_task-rest", courses(), affine=moved)
    assert "lies in another space than the data" in leave_out(tmp_path / "a", config)
    # Another grid of the same template may be resampled, a brain of its own may not.
    config = make_config(atlas, "atlas.nii.gz", resample=True)
    assert len(find_fmri_runs(tmp_path / "a", config)[0]) == 2
    write_volume(tmp_path / "b", "sub-01_task-rest", courses(), affine=moved, space="T1w")
    assert "only images in MNI space are resampled" in leave_out(tmp_path / "b", config)
    far = AFFINE.copy()
    far[:3, 3] += 500
    write_volume(tmp_path / "c", "sub-01_task-rest", courses(), affine=far)
    assert "belongs to another space" in leave_out(tmp_path / "c", config)
    surface = make_config(atlas, "atlas.dlabel.nii")
    with pytest.raises(
        DataError, match=r"none of the 2 runs .* the images are volumes, but the atlas .* has none"
    ):
        find_fmri_runs(tmp_path / "a", surface)


def test_a_parcel_without_voxels_is_missing(tmp_path, atlas):
    write_volume(tmp_path / "data", "sub-01_task-rest", courses(), drop=(2,))
    config = make_config(atlas, "atlas.nii.gz")
    run = find_fmri_runs(tmp_path / "data", config)[0][0]
    assert run.missing == (NAMES[2],)
    assert np.isnan(run.read()).all(axis=0).tolist() == [False, False, True, False, False, False]
    # Inside of the mask, but outside of what was scanned: nothing changes there.
    write_volume(tmp_path / "flat", "sub-01_task-rest", courses(), flat=3)
    run = find_fmri_runs(tmp_path / "flat", config)[0][0]
    assert (run.missing, np.ptp(run.read(), axis=0)[3]) == ((), 0)
    write_volume(tmp_path / "data", "sub-01_task-rest", courses(), drop=range(6))
    with pytest.raises(DataError, match="no parcel of the atlas holds a voxel of it"):
        find_fmri_runs(tmp_path / "data", config)


def test_sites_with_other_parcels(tmp_path, atlas):
    """Some parcels fewer are missing ones; parcels of another atlas, or without names, are refused."""
    folder = tmp_path / "data" / "sub-01"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "task-rest_timeseries.json").write_text('{"SamplingFrequency": 0.5}')
    table = pd.DataFrame(courses(), columns=NAMES)
    path = folder / "sub-01_task-rest_timeseries.tsv"
    config = make_config(atlas)

    def find():
        return find_fmri_runs(tmp_path / "data", config)[0][0]

    table[NAMES[:4]].to_csv(path, sep="\t", index=False)
    assert (find().missing, find().interval_s) == (tuple(NAMES[4:]), 2.0)
    table.to_csv(path, sep="\t", index=False, header=False)
    assert (find().missing, find().n_times) == ((), 40)
    np.testing.assert_allclose(find().read(), table, rtol=1e-6)
    table[NAMES[:4]].to_csv(path, sep="\t", index=False, header=False)
    with pytest.raises(DataError, match=r"has 4 parcels without names, but the atlas .* has 6"):
        find()
    table.set_axis([f"Area {k}a" for k in range(6)], axis=1).to_csv(path, sep="\t", index=False)
    with pytest.raises(DataError, match=r"none of its 6 parcels \(first 'Area 0a'\) .* it has another atlas"):
        find()
    table.set_axis([NAMES[0], *NAMES[:5]], axis=1).to_csv(path, sep="\t", index=False)
    with pytest.raises(DataError, match="'7Networks_LH_Vis_1' occurs twice"):
        find()
    table.iloc[3, 3] = np.nan
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    with pytest.raises(DataError, match=r"not finite in the parcel 7Networks_RH_Vis_1, volume 4"):
        find().read()


def test_tables_of_several_atlases_beside_each_other(tmp_path):
    """XCP-D writes one for each atlas; those of Schaefer share names of parcels that are not the same places."""
    root = tmp_path / "data"
    (root / "sub-01").mkdir(parents=True)
    (root / "task-rest_bold.json").write_text('{"RepetitionTime": 2.0}')
    label = "index\tname\n"
    (tmp_path / "names.tsv").write_text(
        label + "".join(f"{k}\t7Networks_LH_Vis_{k}\n" for k in range(1, 201))
    )
    config = CorpusConfig(
        channels={"kind": "fmri", "atlas": "schaefer200", "labels": tmp_path / "names.tsv", "cleaning": PLAIN}
    )

    def write(name, names):
        table = pd.DataFrame(RNG.standard_normal((12, len(names))), columns=names)
        table.to_csv(
            root / "sub-01" / f"sub-01_task-rest_{name}_stat-mean_timeseries.tsv", sep="\t", index=False
        )
        return table.to_numpy(np.float32)

    write("atlas-4S156Parcels", [*(f"LH_Vis_{k}" for k in range(1, 101)), "LH-Thalamus"])
    write("atlas-4S1056Parcels", [*(f"LH_Vis_{k}" for k in range(1, 301)), "LH-Thalamus"])
    with pytest.raises(
        DataError, match=r"has 300 parcels of Schaefer, which are not the 200 .* has 100 parcels of"
    ):
        find_fmri_runs(root, config)
    # A table that lost two of them is taken, unless there is a whole one.
    write("atlas-4S255Parcels", [f"LH_Vis_{k}" for k in range(1, 199)])
    assert len(find_fmri_runs(root, config)[0][0].missing) == 2
    values = write("atlas-4S256Parcels", [*(f"LH_Vis_{k}" for k in range(1, 201)), "LH-Thalamus"])
    (root / "sub-01" / "sub-01_task-rest_atlas-4S256Parcels_stat-coverage_bold.tsv").write_text(
        "LH_Vis_1\n1\n"
    )
    run = find_fmri_runs(root, config)[0][0]
    np.testing.assert_allclose(run.read(), values[:, :200], rtol=1e-5)


def test_volumes_that_were_cut_before_come_back_to_their_times(tmp_path, atlas):
    root, series = tmp_path / "data", courses()
    moved = np.isin(np.arange(40), (4, 5, 20))
    (root / "sub-01").mkdir(parents=True)
    stem = str(root / "sub-01" / "sub-01_task-rest")
    pd.DataFrame(series[~moved], columns=NAMES).to_csv(
        f"{stem}_seg-own_timeseries.tsv", sep="\t", index=False
    )
    (root / "task-rest_bold.json").write_text('{"RepetitionTime": 2.0}')
    pd.DataFrame({"framewise_displacement": moved.astype(int)}).to_csv(
        f"{stem}_outliers.tsv", sep="\t", index=False
    )
    motion = pd.DataFrame({"framewise_displacement": np.where(moved, 0.4, 0.1)})
    motion.to_csv(f"{stem}_motion.tsv", sep="\t", index=False)
    config = make_config(atlas, cleaning={"detrend": False})
    run = find_fmri_runs(root, config)[0][0]
    found = run.read()
    assert (run.n_times, run.scrubbed) == (40, pytest.approx(3 / 40))
    np.testing.assert_allclose(found[~moved], series[~moved], rtol=1e-5)
    np.testing.assert_allclose(found[20], (series[19] + series[21]) / 2, rtol=1e-5)
    with pytest.raises(DataError, match="3 volumes with motion were cut out before"):
        find_fmri_runs(root, make_config(atlas))
    motion[:-1].to_csv(f"{stem}_motion.tsv", sep="\t", index=False)
    with pytest.raises(DataError, match="has 39 rows, but the run 40 volumes"):
        find_fmri_runs(root, config)


def test_runs_that_moved_or_whose_tables_are_of_other_runs_are_left_out(tmp_path, atlas):
    cleaning = {"confounds": {"strategy": ["motion"]}}
    config = make_config(atlas, "atlas.nii.gz", cleaning=cleaning)
    root = tmp_path / "data"
    write_confounds(write_volume(root, "sub-00_task-rest", courses()))
    stem = write_volume(root, "sub-01_task-rest", courses())

    def reason():
        runs, excluded = find_fmri_runs(root, config)
        assert [run.subject for run in runs] == ["00"]
        return excluded[0].reason

    assert "there is no table of confounds beside it" in reason()
    write_confounds(stem, fd=0.6)
    assert "mean framewise displacement is 0.58 mm" in reason()
    write_confounds(stem, moved=range(1, 39, 3), fd=0.0)
    config = make_config(atlas, "atlas.nii.gz", cleaning={**cleaning, "max_motion_mm": None})
    assert "32% of its volumes have motion, above channels.cleaning.max_scrubbed (30%)" in reason()
    write_confounds(stem, n=39)
    assert "has 39 rows, but the run 40 volumes" in reason()
    config = make_config(atlas, "atlas.nii.gz", cleaning={**cleaning, "h_freq": 0.25})
    write_confounds(stem)
    with pytest.raises(DataError, match=r"h_freq 0.25 Hz is not below half of its rate, 0.25 Hz"):
        find_fmri_runs(root, config)


def test_voxels_of_grayordinates_are_parcels_where_no_surface_has_them(tmp_path, atlas):
    """A dlabel file of cortex and one subcortical region, over a file whose voxels touch the cortex of a volume."""
    volume = np.zeros(SHAPE, bool)
    volume[5, 1:4, 1:3] = True
    axis = models() + cifti2.BrainModelAxis.from_mask(volume, name="THALAMUS_LEFT", affine=AFFINE)
    names = [*NAMES[:5], "Thalamus"]
    table = {0: ("???", (0, 0, 0, 0))} | {n: (name, (1, 0, 0, 1)) for n, name in enumerate(names, 1)}
    labels = np.r_[np.repeat(np.arange(1, 6), 6), np.zeros(6), np.full(6, 6)][None].astype(np.int32)
    path = tmp_path / "cortex_and_more.dlabel.nii"
    cifti2.save(cifti2.Cifti2Image(labels, (cifti2.LabelAxis(["a"], [table]), axis)), path)
    channels = {"kind": "fmri", "atlas": "own", "files": [path], "cleaning": PLAIN}
    series = courses()
    values = np.concatenate([np.repeat(series, 6, axis=1), np.repeat(series[:, :1] * 2, 6, axis=1)], axis=1)
    write_cifti(tmp_path / "data" / "sub-01" / "sub-01_task-rest_bold.dtseries.nii", values, axis)
    run = find_fmri_runs(tmp_path / "data", CorpusConfig(channels=channels))[0][0]
    np.testing.assert_allclose(run.read(), np.c_[series[:, :5], series[:, 0] * 2], rtol=1e-5)
    # The volume of the other atlas has its sixth parcel there, but its surface comes first.
    run = find_fmri_runs(tmp_path / "data", make_config(atlas, "atlas.dlabel.nii", "atlas.nii.gz"))[0][0]
    np.testing.assert_allclose(run.read(), series, rtol=1e-5)


def test_of_several_forms_the_cleaned_one_is_taken_and_a_space_can_be_chosen(tmp_path, atlas):
    series, root = courses(), tmp_path / "data"
    for space, factor in (("MNI152NLin2009cAsym", 1), ("MNI152NLin6Asym", 2)):
        stem = write_volume(root, "sub-01_task-rest", series * factor, space=space)
    write_confounds(stem)

    def read(**options):
        return find_fmri_runs(root, make_config(atlas, "atlas.nii.gz", **options))[0][0].read()

    np.testing.assert_allclose(read(), series, rtol=1e-5)
    np.testing.assert_allclose(read(space="MNI152NLin6Asym"), 2 * series, rtol=1e-5)
    with pytest.raises(
        DataError, match="exists in the space MNI152NLin2009cAsym, MNI152NLin6Asym, not in T1w"
    ):
        read(space="T1w")
    # XCP-D: denoised, so that the confounds beside it are not taken out again.
    name = "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    source = stem.with_name(name)
    source.rename(stem.with_name(name.replace("preproc", "denoised")))
    stem.with_name(name.replace(".nii.gz", ".json")).rename(
        stem.with_name(name.replace("preproc_bold.nii.gz", "denoised_bold.json"))
    )
    found = read(cleaning={"detrend": False})
    np.testing.assert_allclose(found, 2 * series, rtol=1e-5)


def test_atlases_that_nilearn_fetches(tmp_path, atlas, monkeypatch):
    import nilearn.datasets

    asked = {}

    def fetch(**options):
        asked.update(options)
        names = ["Background", *(f"17Networks_LH_VisCent_{k}" for k in range(1, 101))]
        labels = np.arange(120).clip(max=100).reshape(6, 5, 4).astype(np.int16)
        nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "schaefer.nii.gz")
        return type("Bunch", (), {"labels": names, "maps": tmp_path / "schaefer.nii.gz"})

    monkeypatch.setattr(nilearn.datasets, "fetch_atlas_schaefer_2018", fetch)
    monkeypatch.setattr(nilearn.datasets, "get_data_dirs", lambda: [str(tmp_path)])
    config = FmriChannels(atlas="schaefer100", networks=17)
    with pytest.raises(ConfigError, match=r"schaefer100_17 is not on this machine: .*--set channels.files"):
        read_corpus_atlas(config)
    with give_consent(download=True):
        found = read_corpus_atlas(config)
    assert (asked["n_rois"], asked["yeo_networks"]) == (100, 17)
    assert set(found.channels.networks) == {"VisCent"}
    with pytest.raises(ValueError, match="nilearn fetches no atlas 'glasser'"):
        AtlasConfig(fetch="glasser")


def test_nothing_to_find(tmp_path, atlas):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no time series of fMRI"):
        find_fmri_runs(tmp_path / "empty", make_config(atlas))
    write_cifti(tmp_path / "empty" / "rest.ptseries.nii", courses(), parcels_axis(NAMES))
    with pytest.raises(DataError, match="neither its name nor its folders give the subject"):
        find_fmri_runs(tmp_path / "empty", make_config(atlas))
