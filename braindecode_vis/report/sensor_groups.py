"""The region of the head of each sensor: frontal, temporal, central, parietal or occipital.

Owns the five regions of ATM's region analysis, from names of the 10-20 system and of CTF magnetometers, else from the
direction of the sensor seen from the middle of the head, compared with the standard electrodes. That FC counts as
central and PO as occipital is a choice of ours: ATM's text does not list its electrodes.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721; Jurcak et al. (2007), doi:10.1016/j.neuroimage.2006.09.024 (10-5 system).
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from braindecode_vis.base.arrays import Responses, normalise_rows
from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.sources.meeg_source import make_template_montage
from braindecode_vis.report.drawing import fit_sphere

REGIONS = ("frontal", "temporal", "central", "parietal", "occipital")
_BY_PREFIX = {
    "FP": "frontal", "AF": "frontal", "F": "frontal", "FT": "temporal", "T": "temporal", "TP": "temporal",
    "FC": "central", "C": "central", "CP": "parietal", "P": "parietal", "PO": "occipital", "O": "occipital",
    "I": "occipital",
}  # fmt: skip
# Longer prefixes first, so that FP1 is not read as F; z is the midline, h half a step of the 10-5 system.
_TEN_TWENTY = re.compile(r"^(FP|AF|FT|FC|F|TP|T|CP|C|PO|P|O|I)(Z|\d{1,2})(H?)$")
_CTF = re.compile(r"^M[LRZ]([CFOPT])\d+")
_CTF_REGIONS = {"C": "central", "F": "frontal", "O": "occipital", "P": "parietal", "T": "temporal"}


def find_region(name: str) -> str | None:
    """Return the region in a sensor's name, or None.

    Examples
    --------
    >>> find_region("PO7"), find_region("Fpz"), find_region("MLT12-4408"), find_region("E12")
    ('occipital', 'frontal', 'temporal', None)
    """
    plain = name.strip().upper()
    if found := _TEN_TWENTY.match(plain):
        return _BY_PREFIX[found.group(1)]
    if found := _CTF.match(plain):
        return _CTF_REGIONS[found.group(1)]
    return None


def assign_regions(responses: Responses) -> list[str]:
    """Return the region of each channel, by name, else by position.

    Raises
    ------
    DataError
        If there are no channels, or one has neither a known name nor a position.
    """
    if "channel" not in responses.dims or "ch_names" not in responses.coords:
        raise DataError(
            f"regions of sensors need channels with names, but these trials have {', '.join(responses.dims[1:])}."
        )
    names = [str(name) for name in responses.coords["ch_names"]]
    regions = [find_region(name) for name in names]
    unknown = [n for n, region in enumerate(regions) if region is None]
    if unknown:
        positions = responses.coords.get("ch_pos")
        # A position at the origin is how some files say that there is none.
        places = np.zeros((len(names), 3)) if positions is None else np.asarray(positions, float)
        for n in unknown:
            if not np.isfinite(places[n]).all() or not places[n].any():
                raise DataError(
                    f"the channel {names[n]!r} has neither a name of the 10-20 system nor a position, so "
                    "its region is unknown; leave it out with dataset.channels."
                )
        found = place_regions(places[unknown], places[np.isfinite(places).all(axis=1)])
        for n, region in zip(unknown, found, strict=True):
            regions[n] = region
    return [str(region) for region in regions]


def place_regions(positions: np.ndarray, everyone: np.ndarray) -> list[str]:
    """Return the region of the standard electrode nearest in direction.

    Parameters
    ----------
    positions : array of shape (n, 3)
        In m, x to the right, y to the nose.
    everyone : array of shape (n_all, 3)
        All sensors, around whose sphere directions are measured.
    """
    directions, regions = _read_standard()
    # Few points fit many spheres; then the middle of the head of MNE's montages, 4 cm above the ears.
    centre = fit_sphere(everyone) if len(everyone) >= 8 else np.array([0.0, 0.0, 0.04])
    seen = normalise_rows(positions - centre)
    return [regions[i] for i in (seen @ directions.T).argmax(axis=1)]


@lru_cache(maxsize=1)
def _read_standard() -> tuple[np.ndarray, tuple[str, ...]]:
    places = make_template_montage().get_positions()["ch_pos"]
    known = {name: place for name, place in places.items() if find_region(name)}
    points = np.stack(list(known.values()))
    directions = points - fit_sphere(points)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions, tuple(str(find_region(name)) for name in known)
