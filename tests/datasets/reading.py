"""What tests of readers share: the tiny phantom of a format, a data set prepared as a run does, refusals in a table."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base.store import read_responses, read_stimuli
from braindecode_vis.config import read_config
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom
from braindecode_vis.parts.phantom.formats.file_writers import write_volumes
from braindecode_vis.pipeline.reporting import run_all
from braindecode_vis.pipeline.runs import open_run, read_scores
from braindecode_vis.preprocessing.bold import write_bold
from braindecode_vis.preprocessing.meeg import write_meeg


def embed(stimuli):
    """A few pixels of each image stand in for a network."""
    return np.stack([image[::8, ::8].ravel() / 255.0 for image in stimuli.iterate_images()])


def make_tiny(form, root, snr=0.3, **changes):
    """Write the smallest phantom of a format, or one of another size, and return its folder."""
    size = SIZES[form]["tiny"].replace(**changes)
    make_phantom(form, root, size=size, config=PhantomConfig(snr=snr), embed=embed)
    return root


def prepare(config, folder):
    """Return responses and stimuli of a data set, written below `folder` as a run writes them."""
    if hasattr(config, "write"):
        config.write(folder, seed=0)
    else:
        write_meeg(config, folder)
    return read_responses(folder / "responses"), read_stimuli(folder / "stimuli")


def check_and_prepare(config, folder):
    """Return responses and stimuli of a data set with which `check` finds nothing wrong."""
    assert [finding for finding in config.check() if not finding.ok] == []
    return prepare(config, folder)


def save_images(folder, images):
    """Write images as files that keep every pixel, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def write_noise(path, n_volumes, shape=(2, 2, 2), t_r=2.0, affine=None, seed=0):
    """Write synthetic volumes: noise around a hundred, nothing recorded from anyone."""
    rng = np.random.default_rng(seed)
    volumes = (100 + rng.standard_normal(shape) for _ in range(n_volumes))
    affine = np.eye(4) if affine is None else affine
    return write_volumes(path, volumes, shape=shape, n_volumes=n_volumes, affine=affine, t_r=t_r)


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
