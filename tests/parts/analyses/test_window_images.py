from dataclasses import replace

import numpy as np
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.analyses.study import fit_picked
from braindecode_vis.parts.analyses.window_images import WindowReconstructionsConfig, describe_pixels
from braindecode_vis.report.figures import render_plot
from tests.constants import replace_constants
from tests.parts.analyses.planted import make_epochs_study

QUICK = {"width": 0.1, "step": 0.1, "tmin": 0.0, "images": 12}
Few = replace_constants(WindowReconstructionsConfig, shown=3)


def make_drawing_study():
    """A study whose generator shows the tested picture whose embedding is nearest to the prediction by cosine."""
    study = make_epochs_study(onset=0.1, noise=0.3, n_permutations=100, n_bootstrap=60)

    def draw(own, number, train, test, change):
        encoder = fit_picked(own, number, change(train), change)
        predicted = encoder.predict(change(test)).vectors
        bank = own.banks[number].select(sorted(set(test.stimulus_ids)))
        cosines = predicted @ (bank.vectors / np.linalg.norm(bank.vectors, axis=1, keepdims=True)).T
        return np.stack([own.stimuli.read_image(bank.ids[row]) for row in cosines.argmax(axis=1)])

    return replace(study, reconstruct_changed=draw)


def test_images_of_windows_tell_the_seen_one_from_the_onset_on(tmp_path):
    study = make_drawing_study()
    found = Few(**QUICK).compute(study)
    table = found.table
    before, after = table[table["stop"] <= 0.1 + 1e-9], table[table["start"] >= 0.1 - 1e-9]
    assert before["value"].mean() == pytest.approx(0.5, abs=0.2)
    assert after["value"].min() > 0.75
    assert set(table["n"]) == {12}
    assert (table["ci_low"] <= table["value"]).all()
    assert table["chance"].iloc[0] == 0.5
    assert 0.1 - 1e-9 <= table["onset"].iloc[0] <= 0.2 + 1e-9
    assert [plot.name for plot in found.plots] == ["window_images", "window_reconstructions"]
    assert render_plot(found.plots[0].draw)  # three rows of what was seen and three windows
    assert found.scores[0].metric == "two_way@window_reconstructions_peak"


def test_windows_may_grow_from_the_onset():
    config = replace_constants(WindowReconstructionsConfig, shown=1)(growing=True, step=0.15, images=4)
    table = config.compute(make_drawing_study()).table
    assert (table["start"].round(6) == 0).all()
    assert table["stop"].is_monotonic_increasing
    assert len(table) > 1
    assert "growing" not in WindowReconstructionsConfig().hashed_fields()


def test_a_stimulus_of_several_trials_has_a_strip_for_each():
    """Images of all trials of a stimulus once went into one row of the figure, which had no room for them."""
    study = make_drawing_study()
    study = replace(study, folds=[replace(fold, test=np.repeat(fold.test, 2)) for fold in study.folds])
    found = Few(**{**QUICK, "images": 4}).compute(study)
    assert "3 trials" in found.plots[0].alt
    assert render_plot(found.plots[0].draw)


def test_without_a_generator_or_an_image_it_says_so():
    with pytest.raises(DataError, match="needs a run that makes images"):
        WindowReconstructionsConfig().compute(make_epochs_study())


def test_pixels_are_compared_by_their_correlation():
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images[2] = 7  # one colour
    rows = describe_pixels(images, np.array(["a", "b", "c"], object)).vectors
    assert np.isfinite(rows).all()
    cosine = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert cosine == pytest.approx(np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1], abs=1e-4)
