"""V4 photographs: the phantom in the published kinds of files, and the real recordings written in them."""

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.v4_photographs import LAYOUT, V4PhotographsConfig, find_animal
from tests.datasets.reading import check_and_prepare, refusals, save_images
from tests.parts.phantom.tiny import make_tiny


def read(folder, **settings):
    """Return the data set below `folder`, whose phantom or files are in ``v4``."""
    config = V4PhotographsConfig(root=folder / "v4", **settings)
    return check_and_prepare(config, folder / config.trials)


def write(root, session, counts, images):
    LAYOUT.write(root, "single", {"counts": counts}, session=session)
    LAYOUT.write(root, "averaged", {"counts": np.nanmean(counts, axis=2)}, session=session)
    LAYOUT.write_pictures(root, "pictures", save_images(root, images), session=session)


def test_single_trials_of_the_phantom_and_their_means(tmp_path):
    make_tiny("v4-photographs", tmp_path / "v4", snr=1.0)
    single, stimuli = read(tmp_path, trials="single")
    averaged, _ = read(tmp_path)
    assert single.data.shape == (20 * 2 * 3 + 10 * 5, 31)
    assert (single.dims, single.coords["modality"]) == (("trial", "channel"), "spikes")
    assert (single.data == np.rint(single.data)).all()
    rows = single.trials.groupby("stimulus_id").indices
    means = [single.data[rows[name]].mean(axis=0) for name in averaged.trials["stimulus_id"]]
    np.testing.assert_allclose(means, averaged.data, rtol=1e-5)  # float32
    assert (len(stimuli), stimuli.ids[0]) == (50, "201025_image0001")


def test_a_picture_that_an_archive_holds_twice_is_one_stimulus(tmp_path):
    images = np.array([7, 9, 7], np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    write(tmp_path / "v4", "190925", np.arange(6.0).reshape(2, 3, 1), images)
    responses, stimuli = read(tmp_path, session="190925")
    assert responses.trials["stimulus_id"].str[-1].tolist() == ["1", "2", "1"]
    assert responses.trials["repetition"].tolist() == [0, 0, 1]
    assert len(stimuli) == 2


def test_sessions_belong_to_the_same_animal_in_the_reader_and_in_the_list_of_files():
    files = [file for part in read_manifest("v4_photographs").parts for file in part.files]
    assert (len(files), all(file.checksum for file in files)) == (146, True)
    assert all(find_animal(file.path[-10:-4]) == file.subject for file in files if file.subject)


def test_what_does_not_fit_is_named(tmp_path):
    write(tmp_path, "201025", np.ones((2, 1, 1)), np.zeros((1, 4, 4, 3), np.uint8))
    np.save(LAYOUT.place(tmp_path, "averaged", session="201025"), np.ones((2, 3)))
    refuse = refusals(V4PhotographsConfig, root=tmp_path)
    refuse(DataError, "fetch both")
    refuse(ConfigError, "did you mean '201025'", session="201024")
    assert not all(finding.ok for finding in V4PhotographsConfig(root=tmp_path).check())
    write(tmp_path, "201025", np.zeros((2, 1, 1)), np.zeros((1, 4, 4, 3), np.uint8))
    refuse(DataError, "neurons whose count never changes")


@pytest.mark.shared
def test_real_single_trials_go_through_the_published_files(shared, tmp_path):
    """The recordings at hand were made from the public files; written in these, they come back as they were."""
    real = np.load(shared / "data/v4_photographs/v4_210325.npz", allow_pickle=False)
    counts = np.full((50, 640, int(real["trial_repeat"].max()) + 1), np.nan)
    counts[:, real["trial_image"], real["trial_repeat"]] = real["X_trials"].T
    write(tmp_path / "v4", "210325", counts, real["images"])
    single, stimuli = read(tmp_path, session="210325", trials="single")
    averaged, _ = read(tmp_path, session="210325")
    assert single.data.shape == (4840, 50)
    np.testing.assert_allclose(averaged.data, real["X"], rtol=1e-5)  # float32 of the same means
    np.testing.assert_array_equal(stimuli.read_image("210325_image0007"), real["images"][6])
