"""MOSAIC: files of people and of all people, the split without near copies, people in several sets, and parcels."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from nibabel import cifti2

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_responses
from braindecode_vis.config import read_config
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.mosaic import LAYOUT, N_CORTEX, N_GRAYORDINATES, SETS, MosaicConfig, find_people
from braindecode_vis.datasets.sources.betas_source import AtlasConfig
from braindecode_vis.preprocessing.betas import write_fmri
from braindecode_vis.preprocessing.parcellation import read_atlas
from tests.datasets.reading import refusals
from tests.parts.phantom.tiny import make_tiny


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A phantom in files of people, and the same one in the file of all people."""
    folder = tmp_path_factory.mktemp("mosaic")
    return {name: make_tiny(name, folder / name, n_parcels=20) for name in ("mosaic", "mosaic-merged")}


@pytest.fixture
def root(roots, tmp_path):
    """A root that a test may damage."""
    return shutil.copytree(roots["mosaic"], tmp_path / "own")


def read(root, folder, **settings):
    config = MosaicConfig(root=root, **settings)
    assert [finding for finding in config.check() if not finding.ok] == []
    write_fmri(config, folder)
    return read_responses(folder / "responses")


def find_atlas(root):
    return {"files": (root / "phantom_truth/parcels.dlabel.nii",)}


def merge(root, people):
    """Write the authors' file that holds every person's groups as they are."""
    with h5py.File(LAYOUT.place(root, "merged"), "w") as merged:
        for person, place in people.items():
            with h5py.File(place.path) as file:
                group = merged.create_group(person)
                for name in file:
                    file.copy(name, group)
                group.attrs.update(file.attrs)


def test_a_parcel_is_the_mean_of_its_grayordinates_in_every_kind_of_file(roots, tmp_path):
    root, people = roots["mosaic"], find_people(roots["mosaic"])
    found = read(root, tmp_path / "people", atlas=find_atlas(root))
    labels = np.zeros(N_GRAYORDINATES, int)
    labels[:N_CORTEX] = cifti2.load(find_atlas(root)["files"][0]).get_fdata()[0]
    assert (found.dims, found.data.shape[1]) == (("trial", "parcel"), labels.max())
    assert set(found.coords["parcel_networks"]) >= {"Vis", "Default"}
    responses = {}
    for place in people.values():
        with h5py.File(place.path) as file:
            responses |= {name: data[:] for name, data in file["betas"].items()}
    gaps = np.isnan(list(responses.values())).any(axis=0)
    assert int(gaps.sum()) == 27  # of all people: those of the scanner, and of two of the sets
    for trial, row in zip(found.trials.itertuples(), found.data, strict=True):
        name = f"{trial.person}_stimulus-{trial.stimulus_id}_phase-{trial.run}_rep-"
        means = [
            [data[(labels == n) & ~gaps].mean() for n in range(1, labels.max() + 1)]
            for key, data in responses.items()
            if key.startswith(name)
        ]
        assert np.abs(np.array(means) - row).max(axis=1).min() < 1e-5  # float32
    copy = tmp_path / "merged"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("fMRIPrep*"))
    merge(copy, people)
    for number, other in enumerate((copy, roots["mosaic-merged"])):
        again = read(other, tmp_path / str(number), atlas=find_atlas(root))
        order = again.trials.merge(found.trials.reset_index(), how="left")["index"].to_numpy()
        np.testing.assert_allclose(again.data, found.data[order], atol=1e-5)  # float32 and float64


def test_an_atlas_with_the_medial_wall_needs_the_vertices_of_the_data(roots, tmp_path):
    root = roots["mosaic"]
    small = find_atlas(root)["files"][0]
    image = cifti2.load(small)
    labels, models = (image.header.get_axis(n) for n in (0, 1))
    sides = [
        cifti2.BrainModelAxis.from_surface(np.arange(32492), 32492, side)
        for side in ("CORTEX_LEFT", "CORTEX_RIGHT")
    ]
    values = np.zeros((1, 64984), np.int32)
    values[0, models.vertex + 32492 * (models.name == "CIFTI_STRUCTURE_CORTEX_RIGHT")] = image.get_fdata()[0]
    whole = tmp_path / "whole.dlabel.nii"
    cifti2.Cifti2Image(values, (labels, sides[0] + sides[1])).to_filename(whole)
    plain = read(root, tmp_path / "small", atlas={"files": (small,)})
    picked = read(root, tmp_path / "whole", atlas={"files": (whole,), "template": small})
    np.testing.assert_array_equal(plain.data, picked.data)
    for settings, words in (
        ({}, "only the medial wall differs"),
        ({"template": root}, "cannot be read as CIFTI"),
    ):
        with pytest.raises(DataError, match=words):
            write_fmri(MosaicConfig(root=root, atlas={"files": (whole,), **settings}), tmp_path / "refused")
    with pytest.raises(ConfigError, match=r"for an atlas of a surface, but .* is a volume"):
        read_atlas(AtlasConfig(files=(tmp_path / "volume.nii",), template=small))


def test_the_split_is_that_of_the_lists(roots):
    """Pictures that resemble a test picture are in the files, but in no list."""
    tables = {
        test: pd.concat([p.trials for p in MosaicConfig(root=roots["mosaic"], test=test).open_betas().parts])
        for test in ("naturalistic", "artificial", "both")
    }
    counts = {test: table["list"].value_counts().to_dict() for test, table in tables.items()}
    assert counts["naturalistic"] == {"train": 32, "naturalistic": 21}
    assert counts["artificial"] == {"train": 32, "artificial": 6}
    assert counts["both"] == {"train": 32, "naturalistic": 21, "artificial": 6}
    assert (tables["both"].loc[tables["both"]["list"] == "artificial", "session"] == "NSD").all()
    source = MosaicConfig(root=roots["mosaic"]).open_betas()
    assert (
        source.notes["responses_in_no_list"] == 4 + 6
    )  # a near copy for each person and set, the artificial ones
    assert "B (no repeats) of 1 people, first sub-10_NOD" in source.notes["protocol"]


def test_someone_in_two_sets_is_one_subject_with_two_sessions(root):
    """The columns of the table are unknown: names in full, and numbers below the name of a set, are both read."""
    path = LAYOUT.place(root, "shared")
    full = "person\ta\tb\n1\tsub-01_NSD\tsub-01_NOD\n"
    for content in (path.read_text(), full):
        path.write_text(content)
        parts = MosaicConfig(root=root).open_betas().parts
        assert [part.group for part in parts] == [
            ("sub-01_BOLD5000", "BOLD5000"), ("sub-01_NSD", "NOD"), ("sub-01_NSD", "NSD"), ("sub-10_NOD", "NOD"),
        ]  # fmt: skip
        # Both sets show the test pictures, twice each.
        both = pd.concat([part.trials for part in parts[1:3]])
        assert both[both["split"] == "test"].groupby("stimulus_id")["repetition"].max().eq(3).all()
    assert "warnings" not in MosaicConfig(root=root).open_betas().notes
    path.unlink()
    assert (
        "may train on and test the same person" in MosaicConfig(root=root).open_betas().notes["warnings"][0]
    )
    assert MosaicConfig(root=root, sets=["NOD"]).open_betas().subjects == ("sub-01_NOD", "sub-10_NOD")
    assert MosaicConfig(root=root, subjects=["sub-10_NOD"]).open_betas().n_trials == 11


def test_a_film_is_shown_as_its_middle_frame(root):
    lists = root / "testtrain/train_naturalistic.json"
    entries = json.loads(lists.read_text())
    (head, _), *_ = entries[0].items()
    picture = head.partition("_stimulus-")[2]
    frame = next((root / "stimuli").rglob(picture))
    frame.rename(frame.with_name(f"{frame.stem}_frame-0045_0090.jpg"))
    lists.write_text(lists.read_text().replace(picture, f"{frame.stem}.mp4"))
    stimuli = MosaicConfig(root=root).open_betas().stimuli
    assert stimuli.read_image(frame.stem).shape == (32, 32, 3)


def test_the_files_to_fetch_are_those_that_are_read():
    files = [file for part in read_manifest("mosaic").parts if part.name == "betas" for file in part.files]
    places = {
        LAYOUT.place(Path(), "person", folder=SETS[f.subject.split("_")[1]], person=f.subject) for f in files
    }
    assert (len(files), places) == (93, {Path(file.path) for file in files})


def test_what_does_not_fit_is_named(roots, root, tmp_path):
    refuse = refusals(MosaicConfig, root=root)
    path = find_people(root)["sub-01_NSD"].path
    lists = root / "testtrain/test_naturalistic.json"
    other = tmp_path / "sub-09_NSD.hdf5"
    refuse(DataError, "no file of responses of MOSAIC of GOD", sets=["GOD"])
    refuse(DataError, "sub-02_NSD is not there", subjects=["sub-02_NSD"])
    refuse(DataError, "mosaic.csail.mit.edu", splits=tmp_path)
    with pytest.raises(ConfigError, match=r"dataset\.test"):
        read_config("mosaic_ridge", ["dataset.test=artifical"])

    def spoil(sentence, change, **settings):
        shutil.copy(path, other)
        with h5py.File(path, "a") as file:
            change(file)
        refuse(DataError, sentence, subjects=["sub-01_NSD"], **settings)
        shutil.copy(other, path)

    def rename(file, part, new):
        name = list(file["betas"])[-1]
        file.move(f"betas/{name}", f"betas/{name.replace(part, new)}")

    def shorten(file):
        for name in list(file["betas"]):
            data = file["betas"][name][:]
            del file["betas"][name]
            file["betas"][name] = data[:400]

    spoil("of sub-02_NSD: people are mixed", lambda file: rename(file, "sub-01", "sub-02"))
    spoil("with the phase train or test", lambda file: rename(file, "phase-test", "phase-valid"))
    spoil(
        "no response .*but the lists of the split name",
        lambda file: rename(file, "rep-1", "rep-7"),
        test="both",
    )
    spoil("400 values in a response, but MOSAIC has 91282", shorten)
    spoil("named like the file of a person, but holds no responses", lambda file: file.move("betas", "beta"))

    moved = path.rename(path.with_name("sub-07_NSD.hdf5"))
    refuse(
        DataError, "sub-07_NSD.hdf5 is named like the file of a person, but holds the responses of sub-01_NSD"
    )
    moved.rename(path)

    def hide(file):
        del file["nan_indices_all"]
        file["nan_indices_all"] = np.arange(91282)

    spoil("names every grayordinate of the cortex", hide)
    shared = LAYOUT.place(root, "shared")
    shared.write_text("person\tage\n1\t30\n")
    refuse(DataError, "names nobody as sub-01_NSD")
    shared.unlink()
    training = root / "testtrain/train_naturalistic.json"
    lists.write_text(json.dumps([*json.loads(lists.read_text()), json.loads(training.read_text())[0]]))
    refuse(DataError, "which train_naturalistic.json lists too: it would be trained on and tested")
    for empty in (training, lists):
        content = empty.read_text()
        empty.write_text("[]")
        refuse(
            DataError, f"{empty.name} names no response of the people that are read; download the list again"
        )
        empty.write_text(content)
    lists.write_text('{"a": 1}')
    refuse(DataError, "is no list of pictures with their responses")
    path.write_bytes(path.read_bytes()[:5000])
    refuse(DataError, "cannot be read as HDF5")
    chunks = shutil.copytree(roots["mosaic-merged"], tmp_path / "chunks")
    with h5py.File(find_people(chunks)["sub-01_NSD"].path, "a") as file:
        file["sub-01_NSD/presented_stimulus_filename"][0] = "other.jpg"
    with pytest.raises(DataError, match="which do not agree"):
        MosaicConfig(root=chunks).open_betas()
