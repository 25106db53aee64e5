"""The smallest phantom of a format, and synthetic volumes, for tests of whoever reads them."""

import numpy as np

from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom
from braindecode_vis.parts.phantom.formats.file_writers import write_volumes


def embed(stimuli):
    """A few pixels of each image stand in for a network."""
    return np.stack([image[::8, ::8].ravel() / 255.0 for image in stimuli.iterate_images()])


def make_tiny(form, root, snr=0.3, **changes):
    """Write the smallest phantom of a format, or one of another size, and return its folder."""
    size = SIZES[form]["tiny"].replace(**changes)
    make_phantom(form, root, size=size, config=PhantomConfig(snr=snr), embed=embed)
    return root


def write_noise(path, n_volumes, shape=(2, 2, 2), t_r=2.0, affine=None, seed=0):
    """Write synthetic volumes: noise around a hundred, nothing recorded from anyone."""
    rng = np.random.default_rng(seed)
    volumes = (100 + rng.standard_normal(shape) for _ in range(n_volumes))
    affine = np.eye(4) if affine is None else affine
    return write_volumes(path, volumes, shape=shape, n_volumes=n_volumes, affine=affine, t_r=t_r)
