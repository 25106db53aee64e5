"""Sections of the report on what was recorded and trained: what they say, and that they leave out what is not there."""

import re
from functools import partial
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.config import find_config, read_config
from braindecode_vis.pipeline import recording_figures
from braindecode_vis.pipeline.recording_figures import (
    MAX_LINES,
    _describe_ceiling,
    _describe_evoked,
    _describe_mask,
    _describe_training,
    describe_publication,
)

NAMES = r"\b[a-z][0-9a-f]{10}\b"  # of parts of a figure: digests of their colours too


def make_trials(n):
    return pd.DataFrame(
        {
            "subject": "01",
            "session": "01",
            "run": "01",
            "stimulus_id": "a",
            "repetition": 0,
            "split": "train",
        },
        index=range(n),
    )


def make_epochs(n_channels=8, n=30, unit="V", **coords):
    times = np.linspace(-0.1, 0.5, 61)
    bump = np.exp(-(((times - 0.17) / 0.02) ** 2))
    data = np.zeros((n, n_channels, 61), np.float32)
    data[:, 0] = 5e-6 * bump
    known = {"times": times, "ch_names": [f"E{c}" for c in range(n_channels)], "modality": "eeg"}
    return Responses(data, ("trial", "channel", "time"), make_trials(n), unit, known | coords)


def test_the_evoked_response_finds_its_peak_and_says_its_unit(tmp_path):
    section = _describe_evoked(make_epochs(), tmp_path)
    (figure,) = section.figures
    assert "largest spread at 170 ms" in figure.alt
    assert "a line for each of 8 channels" in figure.caption
    assert "µV" in figure.figure
    assert "time after the picture appears (ms)" in figure.figure
    assert "No map is drawn" in section.caption


def test_axes_of_own_arrays_stand_in_any_order(tmp_path):
    """Arrays with times before channels, which decode takes, ended the report with an error of shapes."""
    usual = make_epochs()
    data = np.ascontiguousarray(usual.data.transpose(0, 2, 1))
    turned = Responses(data, ("trial", "time", "channel"), usual.trials, usual.unit, usual.coords)
    sections = [_describe_evoked(responses, tmp_path) for responses in (usual, turned)]
    assert sections[0] == sections[1]


def test_responses_with_a_further_axis_are_named_and_not_drawn(tmp_path, monkeypatch):
    """The evoked response of time and frequency ended the report: an index was out of bounds."""
    usual = make_epochs()
    data = np.repeat(usual.data[:, :, None], 3, axis=2)
    axes = ("trial", "channel", "frequency", "time")
    powers = Responses(data, axes, usual.trials, usual.unit, usual.coords)
    prepared = SimpleNamespace(
        responses=powers, artifact=SimpleNamespace(path=tmp_path), folds=[SimpleNamespace(test=np.arange(5))]
    )
    monkeypatch.setattr(recording_figures, "preprocess", lambda run: prepared)
    monkeypatch.setattr(recording_figures, "train", lambda run: [])
    config = SimpleNamespace(repeats=SimpleNamespace(test="single"), decodes_categories=False)
    (section,) = recording_figures.describe_recording(SimpleNamespace(config=config))
    assert section.title == "Responses"
    assert not section.figures


def place_on_a_ring(n):
    angles = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return 0.09 * np.stack([np.cos(angles), np.sin(angles), 0.5 * np.ones(n)], axis=1)


def test_sensors_that_span_no_map_get_none(tmp_path):
    """Qhull ends with an error where all sensors lie on one circle, which must not end the report."""
    section = _describe_evoked(make_epochs(ch_pos=place_on_a_ring(8)), tmp_path)
    assert "No map is drawn" in section.caption


def test_sensors_with_positions_get_a_map_of_the_head(tmp_path):
    places = np.concatenate([place_on_a_ring(6), 0.5 * place_on_a_ring(2) + [0, 0.01, 0.08]])
    section = _describe_evoked(make_epochs(ch_pos=places, unit="whitened"), tmp_path)
    _, head = section.figures
    assert "Map of the head" in head.alt
    assert "image/png" in head.figure
    assert "No map" not in section.caption
    assert "Noise was normalised" in section.caption


def test_dark_figures_are_those_that_dark_colours_draw(tmp_path, monkeypatch):
    places = np.concatenate([place_on_a_ring(6), 0.5 * place_on_a_ring(2) + [0, 0.01, 0.08]])
    epochs = make_epochs(ch_pos=places)
    figures = _describe_evoked(epochs, tmp_path).figures
    monkeypatch.setattr(recording_figures, "draw", partial(recording_figures.draw, own_colours=True))
    for figure, drawn in zip(figures, _describe_evoked(epochs, tmp_path).figures, strict=True):
        assert re.sub(NAMES, "", figure.figure_dark) == re.sub(NAMES, "", drawn.figure_dark) != drawn.figure


def test_many_channels_and_times_do_not_fill_the_page(tmp_path):
    rng = np.random.default_rng(0)
    times = np.linspace(0, 1, 1000)
    data = rng.normal(size=(20, 200, 1000)).astype(np.float32)
    responses = Responses(data, ("trial", "channel", "time"), make_trials(20), "T", {"times": times})
    section = _describe_evoked(responses, tmp_path)
    assert f"a line for {MAX_LINES} of the 200 channels" in section.figures[0].caption
    assert len(section.figures[0].figure) < 100_000


def test_only_as_many_trials_are_read_as_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(recording_figures, "MAX_BYTES", 10 * 8 * 61 * 4)
    section = _describe_evoked(make_epochs(), tmp_path)
    assert "Mean of 10 of the 30 kept trials" in section.figures[0].caption


def test_the_ceiling_of_repeated_test_images_is_drawn(tmp_path):
    share = np.full((1, 8, 61), 0.16, np.float32)
    share[0, :4] -= 0.2  # unclipped: the mean share is .06, and its root is taken last
    low, high = np.full((2, 1, 61), [[[0.01]], [[0.11]]], np.float32)
    np.savez(tmp_path / "signal_share.npz", share=share, low=low, high=high)
    entry = {"subject": "01", "split": "test", "n_images": 12, "n_repetitions": 5.0}
    store.write_json(tmp_path / "signal_share.json", {"dims": [], "entries": [entry]})
    _, ceiling = _describe_evoked(make_epochs(), tmp_path).figures
    assert "at most 0.24 (0.10 to 0.33)" in ceiling.alt
    assert "12 images, 5 repetitions averaged" in ceiling.caption


def make_voxels(**coords):
    return Responses(np.ones((3, 4), np.float32), ("trial", "voxel"), make_trials(3), "z", coords)


@pytest.mark.parametrize("in_template", [False, True])
def test_voxels_of_known_place_are_drawn(tmp_path, monkeypatch, in_template):
    """nilearn places its axes itself, at which a layout engine of the figure warned, which ended the test of a run."""
    from nilearn import plotting

    drawn, real = [], plotting.plot_glass_brain

    def draw_and_note(image, **about):
        drawn.append(image)
        return real(image, **about)

    monkeypatch.setattr(plotting, "plot_glass_brain", draw_and_note)
    mask = np.zeros((4, 5, 6), bool)
    mask[1:3, 2, 3:5] = True
    store.write_json(tmp_path / "meta.json", {"files": ["x_space-MNI152_bold.nii.gz"] if in_template else []})
    section = _describe_mask(
        make_voxels(mask=mask, affine=np.diag([3, 3, 3, 1.0]), voxel_id=np.flatnonzero(mask)), tmp_path
    )
    assert section.caption == "4 voxels."
    assert ("MNI" in section.figures[0].caption) == in_template
    assert len(drawn) == 2 * in_template  # in both appearances
    assert all(isinstance(image, nibabel.Nifti1Image) for image in drawn)


def test_voxels_of_unknown_place_are_said_to_be_so(tmp_path):
    section = _describe_mask(make_voxels(), tmp_path)
    assert "the data hold no positions of them" in section.caption
    assert not section.figures


def test_repeated_test_images_of_voxels_have_a_ceiling():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(12), 6)
    signal = rng.normal(size=(12, 5))[images]
    data = (signal + rng.normal(size=signal.shape)).astype(np.float32)
    trials = make_trials(72).assign(stimulus_id=[f"s{n}" for n in images], split="test")
    responses = Responses(data, ("trial", "voxel"), trials, "z", {})
    said = _describe_ceiling(responses, np.arange(72), averaged=True)
    found = re.search(
        r"to be above (0\.\d+) \((0\.\d+) to (0\.\d+)\) over the 12 test images, root mean square over voxels",
        said,
    )
    value, low, high = map(float, found.groups())
    assert low < value < high
    assert value == pytest.approx(np.sqrt(6 / 7), abs=0.08)  # signal and noise have the variance 1
    assert (
        float(re.search(r"above (0\.\d\d)", _describe_ceiling(responses, np.arange(72), averaged=False))[1])
        < value
    )
    assert _describe_ceiling(responses, np.arange(0, 72, 6), averaged=True) == ""


def test_losses_of_every_fold_are_drawn(tmp_path, monkeypatch):
    folds = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        history = [{"epoch": e, "loss": 4.0 / (e + 1)} for e in range(3)]
        store.write_json(folder / "network.json", {"history": history})
        store.write_json(folder / "provenance.json", ["no mapping"])
        folds.append(SimpleNamespace(artifact=SimpleNamespace(path=folder)))
    monkeypatch.setattr(recording_figures, "train", lambda run: folds)
    section = _describe_training(None)
    assert section.figures[0].caption == "Loss over 3 epochs, a line for each of 2 folds."
    assert "from 4 to 1.33" in section.figures[0].alt
    for fold in folds:  # ridge has no history
        store.write_json(fold.artifact.path / "network.json", {"alpha": 1.0})
    assert _describe_training(None) is None


def make_rows():
    row = {
        "method": "decoded",
        "split": "test",
        "subject": "08",
        "metric": "top1",
        "value": 0.2,
        "ci_low": 0.1,
    }
    row |= {"ci_high": 0.3, "chance": 0.005, "gallery_size": 200}
    return [row, row | {"method": "shuffled"}, row | {"metric": "mse"}]


def test_a_run_that_follows_a_paper_stands_beside_its_number():
    config = read_config("things_eeg2_atm_vith", ["encoder.epochs=3"])
    (section,) = describe_publication(SimpleNamespace(config=config), make_rows())
    assert "arXiv:2403.07721" in section.caption
    assert "top-1 25.50" in section.caption
    assert "encoder.epochs (40, now 3)" in section.caption
    assert "Known differences" in section.caption
    assert [row["this run"] for row in section.table] == [0.2]


@pytest.mark.parametrize("name", ["my_own", "digits69_ridge"])
def test_a_run_of_its_own_has_no_published_number(name):
    config = read_config("digits69_ridge", [f"name={name}"])
    assert find_config("digits69_ridge").stem == "digits69_ridge"
    assert describe_publication(SimpleNamespace(config=config), make_rows()) == []


def test_nothing_in_a_figure_leads_out_of_the_page(tmp_path):
    for figure in _describe_evoked(make_epochs(), tmp_path).figures:
        for text in (figure.figure, figure.figure_dark):
            assert not re.search(r"(?:href|src)=[\"'](?!#|data:)", text)
