"""Back to the brain, regions and networks by name, parcels, and atlases of other spaces."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.sources.betas_source import (
    AtlasConfig,
    BetasPart,
    BetasPlan,
    FmriSource,
    Geometry,
    Roi,
)
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.parcellation import Parcels, average_parcels, place_in_parcels, read_atlas
from braindecode_vis.preprocessing.voxel_geometry import (
    find_networks,
    find_rois,
    inverse_transform,
    read_geometry,
    select_features,
)

SHAPE = (6, 5, 4)
AFFINE = np.array([[-2.0, 0, 0, 5], [0, 2, 0, -5], [0, 0, 2, 1], [0, 0, 0, 1]])
NAMES = ("7Networks_LH_Vis_1", "7Networks_LH_SomMot_1", "7Networks_RH_Vis_1", "7Networks_RH_Default_PFC_1")


@pytest.fixture
def mask():
    return np.random.default_rng(0).random(SHAPE) < 0.5


@pytest.fixture
def atlas(tmp_path):
    """Four parcels, one for each step of the last axis."""
    labels = np.broadcast_to(np.arange(1, 5, dtype=np.int16), SHAPE).copy()
    labels[0] = 0
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "atlas.nii.gz")
    table = tmp_path / "atlas.txt"
    table.write_text("".join(f"{i}\t{name}\t1\t2\t3\t0\n" for i, name in enumerate(NAMES, start=1)))
    return labels, AtlasConfig(files=(tmp_path / "atlas.nii.gz",), labels=table)


def make_trials(n, subject="01"):
    return pd.DataFrame(
        {
            "subject": subject, "session": "01", "run": "01", "stimulus_id": [f"i{i}" for i in range(n)],
            "repetition": 0, "split": "train", "concept": "c",
        }
    )  # fmt: skip


def make_responses(geometry, n=5):
    data = np.random.default_rng(1).standard_normal((n, geometry.n_voxels)).astype(np.float32)
    return Responses(data, ("trial", "voxel"), make_trials(n), "z", geometry.as_coords())


def write(folder, geometries, atlas, data, times=None):
    parts = tuple(
        BetasPart(make_trials(len(d), s), (folder / s,), g.n_voxels, lambda a, b, d=d: d[a:b])
        for (s, g), d in zip(geometries.items(), data, strict=True)
    )
    table = pd.DataFrame(
        {"stimulus_id": parts[0].trials["stimulus_id"], "concept": "c", "path": "", "sha256": ""}
    )
    plan = BetasPlan(zscore="none", atlas=atlas)
    source = FmriSource(parts, StimulusSet(table), plan, "arbitrary", geometries, times=times)
    write_fmri_source(source, folder)
    return store.read_responses(folder / "responses")


def test_inverse_transform_puts_every_voxel_back(mask, tmp_path):
    responses = make_responses(Geometry.from_mask(mask, AFFINE))
    store.write_responses(tmp_path / "r", responses)
    again = store.read_responses(tmp_path / "r")
    image = inverse_transform(again)
    assert image.shape == (*SHAPE, 5)
    np.testing.assert_array_equal(image.get_fdata()[mask].T, responses.data)
    assert (image.get_fdata()[~mask] == 0).all()
    np.testing.assert_array_equal(image.affine, AFFINE)
    scores = np.arange(mask.sum())
    np.testing.assert_array_equal(inverse_transform(again, scores).get_fdata()[mask], scores)
    with pytest.raises(DataError, match="must have"):
        inverse_transform(again, scores[:-1])


def test_voxels_without_a_place_say_so():
    responses = make_responses(Geometry(np.arange(4)))
    with pytest.raises(DataError, match="published without a mask"):
        inverse_transform(responses)
    with pytest.raises(DataError, match="no voxel ids"):
        read_geometry(replace(responses, coords={}))


def test_regions_by_name(mask):
    labels = np.random.default_rng(2).integers(-1, 3, int(mask.sum()))
    rois = {"streams": Roi(labels, {1: "early", 2: "ventral"}), "prf": Roi(np.where(labels == 1, 7, 0))}
    responses = make_responses(Geometry.from_mask(mask, AFFINE, rois))
    np.testing.assert_array_equal(find_rois(responses, {"streams": ["ventral"]}), labels == 2)
    np.testing.assert_array_equal(find_rois(responses, {"streams": None}), labels > 0)
    np.testing.assert_array_equal(find_rois(responses, {"streams": ["ventral"], "prf": ["7"]}), labels > 0)
    with pytest.raises(ConfigError, match="did you mean 'ventral'"):
        find_rois(responses, {"streams": ["ventrl"]})
    with pytest.raises(ConfigError, match="did you mean 'streams'"):
        find_rois(responses, {"stream": None})
    cut = select_features(responses, labels == 2)
    image = inverse_transform(cut, np.ones(cut.data.shape[1]))
    assert image.get_fdata().sum() == (labels == 2).sum()
    np.testing.assert_array_equal(cut.data, responses.data[:, labels == 2])
    assert set(cut.coords["roi_streams"].tolist()) == {2}
    for bad, words in ((np.zeros(3, bool), "boolean of shape"), (labels > 9, "empty")):
        with pytest.raises(DataError, match=words):
            select_features(responses, bad)


def test_parcels_average_their_voxels_and_go_back(mask, atlas, tmp_path):
    labels, config = atlas
    geometry = Geometry.from_mask(mask, AFFINE)
    data = np.random.default_rng(1).standard_normal((3, geometry.n_voxels)).astype(np.float32)
    responses = write(tmp_path / "run", {"01": geometry}, config, [data])
    assert responses.dims == ("trial", "parcel")
    assert responses.coords["parcel_names"] == list(NAMES)
    assert responses.coords["parcel_networks"] == ["Vis", "SomMot", "Vis", "Default"]
    own = labels[mask]
    expected = np.stack([data[:, own == k].mean(axis=1) for k in range(1, 5)], axis=1)
    np.testing.assert_allclose(responses.data, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(find_networks(responses, ["Vis"]), [True, False, True, False])
    with pytest.raises(ConfigError, match="network"):
        find_networks(responses, ["Visual"])
    visual = select_features(responses, find_networks(responses, ["Vis"]))
    assert visual.coords["parcel_names"] == [NAMES[0], NAMES[2]]
    image = inverse_transform(visual, np.array([1.0, 3.0])).get_fdata()
    np.testing.assert_array_equal(image, np.where(mask & np.isin(labels, [1, 3]), labels, 0))


def test_parcels_of_several_subjects_and_times(mask, atlas, tmp_path):
    labels, config = atlas
    other = np.random.default_rng(5).random(SHAPE) < 0.5
    geometries = {"01": Geometry.from_mask(mask, AFFINE), "02": Geometry.from_mask(other, AFFINE)}
    rng = np.random.default_rng(1)
    data = [rng.standard_normal((3, g.n_voxels, 2)).astype(np.float32) for g in geometries.values()]
    responses = write(tmp_path / "run", geometries, config, data, times=np.array([4.0, 6.0]))
    assert responses.dims == ("trial", "parcel", "time")
    np.testing.assert_allclose(
        responses.data[3:, 1], data[1][:, labels[other] == 2].mean(axis=1), rtol=1e-4, atol=1e-6
    )
    image = inverse_transform(responses, np.arange(1.0, 5.0), subject="02").get_fdata()
    np.testing.assert_array_equal(image, np.where(other, labels, 0))
    with pytest.raises(ConfigError, match="01, 02"):
        inverse_transform(responses, np.arange(4.0))
    assert find_networks(responses, ["Default"]).tolist() == [False, False, False, True]
    kept = select_features(responses, np.array([False, True, True, False]))
    image = inverse_transform(kept, np.array([2.0, 3.0]), subject="01").get_fdata()
    np.testing.assert_array_equal(image, np.where(mask & np.isin(labels, [2, 3]), labels, 0))


def test_an_atlas_in_another_space_is_refused_or_resampled(mask, atlas):
    labels, config = atlas
    moved = AFFINE.copy()
    moved[:3, 3] += [0, 0, 2.0]
    geometry = Geometry.from_mask(mask, moved)
    with pytest.raises(DataError, match=r"another space than the data: shape .* steps of 2, 2, 2 mm"):
        place_in_parcels({"01": geometry}, config)
    with pytest.raises(DataError, match=r"shape \(6, 5, 4\) .* against \(7, 5, 4\)"):
        place_in_parcels({"01": Geometry.from_mask(np.ones((7, 5, 4), bool), AFFINE)}, config)
    loose = config.model_copy(update={"resample": True, "max_missing": 0.25})
    placed, missing = place_in_parcels({"01": geometry}, loose)
    assert missing == [NAMES[0]]
    image = np.zeros(SHAPE)
    image[mask] = placed["01"].parcels.labels
    shifted = np.concatenate([labels[..., 1:], np.zeros((6, 5, 1), int)], axis=-1)
    np.testing.assert_array_equal(image, np.where(mask, np.maximum(shifted - 1, 0), 0))
    far = moved.copy()
    far[:3, 3] += 500
    with pytest.raises(DataError, match="no voxel of the data lies inside"):
        place_in_parcels({"01": Geometry.from_mask(mask, far)}, loose)


def test_too_many_empty_parcels_are_refused(atlas):
    _, config = atlas
    few = np.zeros(SHAPE, bool)
    few[2, 2, :2] = True
    with pytest.raises(
        DataError, match=r"2 of the 4 regions .* hold no voxel of the mask, first 7Networks_RH_Vis_1"
    ):
        place_in_parcels({"01": Geometry.from_mask(few, AFFINE)}, config)


def test_odd_atlases_are_refused(atlas, tmp_path):
    _, config = atlas
    with pytest.raises(ConfigError, match="either files or fetch"):
        read_atlas(AtlasConfig())
    (tmp_path / "x.nii").write_text("no")
    with pytest.raises(DataError, match="cannot be read as NIfTI"):
        read_atlas(AtlasConfig(files=(tmp_path / "x.nii",)))
    nib.save(nib.Nifti1Image(np.full(SHAPE, 0.5, np.float32), AFFINE), tmp_path / "y.nii")
    with pytest.raises(DataError, match="whole numbers"):
        read_atlas(AtlasConfig(files=(tmp_path / "y.nii",)))
    config.labels.write_text("1 a\n2 b\n")
    with pytest.raises(DataError, match=r"label 3 of .* has no name"):
        read_atlas(config)
    with pytest.raises(DataError, match="does not exist"):
        AtlasConfig(files=(tmp_path / "none.nii",)).hash_inputs()
    assert set(config.hash_inputs()) == {"atlas/atlas.nii.gz", "atlas/atlas.txt"}


def test_aal_names_have_no_network_and_gaps_in_their_numbers(mask, tmp_path):
    labels = np.where(np.arange(4) < 2, 2001, 2002) * np.ones(SHAPE, int)
    nib.save(nib.Nifti1Image(labels.astype(np.int32), AFFINE), tmp_path / "aal.nii")
    (tmp_path / "aal.txt").write_text("2001 Precentral_L\n2002 Precentral_R\n")
    config = AtlasConfig(files=(tmp_path / "aal.nii",), labels=tmp_path / "aal.txt")
    placed, _ = place_in_parcels({"01": Geometry.from_mask(mask, AFFINE)}, config)
    assert placed["01"].parcels.names == ("Precentral_L", "Precentral_R")
    assert placed["01"].parcels.networks == ("", "")


def test_surface_atlases(tmp_path):
    left = np.array([0, 1, 1, 2, 2], np.int32)
    right = np.array([1, 1, 0, 2, 2], np.int32)
    colours = np.array([[0, 0, 0, 0, 0], [10, 0, 0, 0, 0], [20, 0, 0, 0, 0]])
    files = []
    for side, values in (("lh", left), ("rh", right)):
        path = tmp_path / f"{side}.atlas.annot"
        names = [
            "Background+FreeSurfer_Defined_Medial_Wall",
            f"7Networks_{side[0].upper()}H_Vis_1",
            f"{side}_b",
        ]
        nib.freesurfer.write_annot(path, values, colours, names, fill_ctab=True)
        files.append(path)
    config = AtlasConfig(files=tuple(files))
    keep = np.array([0, 1, 2, 3, 5, 6, 7, 9])
    geometry = Geometry(keep, surface="fsaverage", n_vertices=(5, 5))
    placed, missing = place_in_parcels({"01": geometry}, config)
    assert missing == []
    parcels = placed["01"].parcels
    assert parcels.names == ("7Networks_LH_Vis_1", "lh_b", "7Networks_RH_Vis_1", "rh_b")
    assert parcels.labels.tolist() == [0, 1, 1, 2, 3, 3, 0, 4]
    np.testing.assert_allclose(average_parcels(np.arange(8.0)[None], parcels), [[1.5, 3, 4.5, 7]])
    data = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    responses = write(tmp_path / "run", {"01": geometry}, config, [data])
    back = inverse_transform(
        responses, np.arange(1.0, 5)
    )  # vertices of no parcel hold nothing, as unmeasured ones
    np.testing.assert_array_equal(back["left"], [np.nan, 1, 1, 2, np.nan])
    np.testing.assert_array_equal(back["right"], [3, 3, np.nan, np.nan, 4])
    with pytest.raises(DataError, match="made for another surface"):
        place_in_parcels({"01": replace(geometry, n_vertices=(6, 5))}, config)
    with pytest.raises(DataError, match="a surface, but the data are on a volume"):
        place_in_parcels({"01": Geometry.from_mask(np.ones(SHAPE, bool), AFFINE)}, config)


def test_fetching_happens_only_if_asked_for(monkeypatch, mask, atlas, tmp_path):
    _, config = atlas
    asked = []

    def fetch(**options):
        asked.append(options)
        labels = [b"Background", *(name.encode() for name in NAMES)]
        return type("Bunch", (), {"maps": str(config.files[0]), "labels": labels})()

    # Importing nilearn takes longer than all other tests of this file.
    datasets = SimpleNamespace(fetch_atlas_schaefer_2018=fetch, get_data_dirs=lambda: [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "nilearn", SimpleNamespace(datasets=datasets))
    with pytest.raises(
        ConfigError, match=r"the atlas schaefer400 is not on this machine: .*--allow-download"
    ):
        read_atlas(AtlasConfig(fetch="schaefer400"))
    assert asked == []
    found = read_atlas(AtlasConfig(fetch="schaefer400", allow_download=True))
    assert asked[0]["n_rois"] == 400
    assert found.names == dict(enumerate(NAMES, start=1))
    read_atlas(config)
    assert len(asked) == 1
    (tmp_path / "schaefer_2018").mkdir()
    (tmp_path / "schaefer_2018" / "Schaefer2018_400Parcels_7Networks_order_FSLMNI152_2mm.nii.gz").touch()
    read_atlas(AtlasConfig(fetch="schaefer400"))  # it was fetched before


def test_parcels_average_every_time_of_their_voxels():
    labels = np.array([2, 1, 0, 2, 1, 2])
    parcels = Parcels(labels, ("a", "b"), ("", ""))
    block = np.random.default_rng(0).normal(size=(3, 6, 4))
    wanted = np.stack([block[:, labels == n].mean(axis=1) for n in (1, 2)], axis=1)
    np.testing.assert_allclose(average_parcels(block, parcels), wanted, rtol=1e-6)
    np.testing.assert_allclose(average_parcels(block[..., 0], parcels), wanted[..., 0], rtol=1e-6)
