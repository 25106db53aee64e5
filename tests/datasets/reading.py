"""What tests of readers share: a data set prepared as a run prepares it, and the sentences of what is refused."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base.store import read_responses, read_stimuli
from braindecode_vis.config import read_config
from braindecode_vis.pipeline.reporting import run_all
from braindecode_vis.pipeline.runs import open_run, read_scores
from braindecode_vis.preprocessing.bold import write_bold
from braindecode_vis.preprocessing.meeg import write_meeg


def prepare(config, folder):
    """Return responses and stimuli of a data set, written below `folder` as a run writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(config, "write"):
        config.write(folder, seed=0)
    else:
        write_meeg(config, folder)
    return read_responses(folder / "responses"), read_stimuli(folder / "stimuli")


def check_and_prepare(config, folder):
    """Return responses and stimuli of a data set with which `check` finds nothing wrong."""
    assert [finding for finding in config.check() if not finding.ok] == []
    return prepare(config, folder)


def demand_change(kind, settings, folder, *changes):
    """Demand that each change of settings gives as many other trials, and another fingerprint."""
    plain, _ = prepare(kind(**settings), folder / "plain")
    for number, change in enumerate(changes):
        config = kind(**{**settings, **change})
        assert config.hashed_fields() != kind(**settings).hashed_fields()
        changed, _ = prepare(config, folder / f"change{number}")
        assert changed.n_trials == plain.n_trials
        # Volts and tesla are small, so that no absolute tolerance can be asked for.
        same_shape = changed.data.shape == plain.data.shape
        assert same_shape != ("bad_channels" in change)
        assert not same_shape or not np.allclose(changed.data, plain.data, rtol=1e-3, atol=0)


def save_images(folder, images):
    """Write images as files that keep every pixel, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def read_in_parcels(kind, root, n_trials):
    """Demand that volumes of 2 x 2 x 2 around the onset are averaged over three parcels."""
    labels = np.array([[[1, 2], [1, 2]], [[3, 3], [0, 3]]], np.int16)
    nib.Nifti1Image(labels, np.eye(4)).to_filename(root / "atlas.nii.gz")
    names = ("7Networks_LH_Vis_1", "7Networks_RH_Limbic_OFC_1", "7Networks_RH_Default_PFC_3")
    (root / "atlas.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(names, start=1)))
    model = {"kind": "window", "start": 0, "stop": 10, "keep": "times"}
    atlas = {"files": (root / "atlas.nii.gz",), "labels": root / "atlas.txt"}
    (root / "phantom_truth").mkdir()  # simulated, and smaller than the published set
    write_bold(kind(root=root, mask="varying", model=model, atlas=atlas, zscore="none"), root / "out")
    responses = read_responses(root / "out/responses")
    assert responses.dims == ("trial", "parcel", "time")
    assert responses.data.shape == (n_trials, 3, 5)
    assert responses.coords["parcel_names"] == list(names)
    assert responses.coords["parcel_networks"] == ["Vis", "Limbic", "Default"]
    assert list(responses.coords["times"]) == [0, 2, 4, 6, 8]


def refuse(kind, root, *cases):
    """Demand that opening a data set fails as each case says: error, sentence, and settings of the data set."""
    for error, sentence, settings in cases:
        config = kind(root=root, **settings)
        with pytest.raises(error, match=sentence):
            open_any(config)


def refusals(kind, **fixed):
    """Return a function that demands an error, in a sentence, of opening a data set with these settings and others."""

    def refuse(error, sentence, **settings):
        config = kind(**fixed, **settings)
        with pytest.raises(error, match=sentence):
            open_any(config)

    return refuse


def open_any(config):
    """Return what a data set is opened as."""
    names = ("open_epochs", "open_betas", "open_bold", "read")
    return next(getattr(config, name) for name in names if hasattr(config, name))()


def refuse_changes(config, *cases):
    """Demand that opening a data set fails after one change after the other: error, sentence, and the change."""
    for error, sentence, change in cases:
        change()
        with pytest.raises(error, match=sentence):
            open_any(config)


def run_to_report(name, root, folder, words, *overrides):
    """Run a shipped configuration from files to a report, and find words in the protocol of its scores."""
    few = ("target={kind: pixels, size: 8}", "evaluation={n_bootstrap: 100, n_permutations: 100}")
    run = open_run(read_config(name, [*few, *overrides], root=root), folder)
    run_all(run)
    assert (run.folder.path / "report.html").is_file()
    assert any(words in str(row["protocol"]) for row in read_scores(run.folder.path))
