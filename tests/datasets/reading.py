"""What tests of readers share: the tiny phantom of a format, a data set prepared as a run does, refusals in a table."""

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base.store import read_responses, read_stimuli
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom
from braindecode_vis.preprocessing.meeg import write_meeg


def embed(stimuli):
    """A few pixels of each image stand in for a network."""
    return np.stack([image[::8, ::8].ravel() / 255.0 for image in stimuli.iterate_images()])


def make_tiny(form, root, snr=0.3):
    """Write the smallest phantom of a format, and return its folder."""
    make_phantom(form, root, size=SIZES[form]["tiny"], config=PhantomConfig(snr=snr), embed=embed)
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


def refuse(kind, root, *cases):
    """Demand that opening a data set fails as each case says: error, sentence, and settings of the data set."""
    for error, sentence, settings in cases:
        config = kind(root=root, **settings)
        with pytest.raises(error, match=sentence):
            config.open_epochs() if hasattr(config, "open_epochs") else config.read()
