"""Pairs of scenes with the same parts in another combination: a red cube on a blue ground, a blue cube on a red ground.

Owns the list of pairs and their captions. A decoder that finds the colours and shapes, but not which colour belongs to
which shape, cannot distinguish the two scenes of a pair (Yuksekgonul et al. 2023, ARO, arXiv:2210.01936). The pose, the
light and everything else of the two are the same. The four kinds:

- ``ground``: the colours of the object and of the ground behind it are exchanged.
- ``pattern``: the colours of the object and of the dots on it are exchanged.
- ``objects``: two objects beside each other exchange their colours.
- ``places``: two objects with their colours are exchanged, left and right.

Composed scenes have concept numbers from `FIRST_COMPOSED` on, and two consecutive numbers are a pair, so functions that
list or draw images by the number of their concept work for them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.datasets.drawn.render import Look, render_objects
from braindecode_vis.datasets.drawn.shapes import list_shapes

KINDS = ("ground", "pattern", "objects", "places")
FIRST_COMPOSED = 1_000_000
# Nearly all of the image area has the colour in their name.
_SHAPES = (
    "ball", "cube", "torus", "cylinder", "cone", "cushion", "pyramid", "star", "heart", "crescent", "arrow", "gear",
    "leaf", "apple", "pear", "mug",
)  # fmt: skip
_GREY = (0.55, 0.55, 0.55)
_FAR = 0.6  # least distance of two colours of a scene, so that none is lost before the other


@dataclass(frozen=True)
class Composition:
    """Content of a composed scene.

    Parameters
    ----------
    kind
        One of `KINDS`.
    shape, colour
        The object; if there are two, the left one.
    other_shape
        The right object; empty if there is one object.
    other_colour
        Colour of the ground, of the dots, or of the right object.
    """

    kind: str
    shape: str
    colour: str
    other_shape: str
    other_colour: str

    @property
    def concept(self) -> str:
        """A readable name, such as ``red_cube_on_blue``."""
        if self.kind == "ground":
            return f"{self.colour}_{self.shape}_on_{self.other_colour}"
        if self.kind == "pattern":
            return f"{self.colour}_{self.shape}_with_{self.other_colour}"
        return f"{self.colour}_{self.shape}_beside_{self.other_colour}_{self.other_shape}"

    @property
    def caption(self) -> str:
        """One exact sentence."""
        thing = _name(self.colour, self.shape)
        if self.kind == "ground":
            return f"{thing} on {_name(self.other_colour, 'ground')}"
        if self.kind == "pattern":
            return f"{thing} with {self.other_colour} dots"
        return f"{thing} to the left of {_name(self.other_colour, self.other_shape)}"

    @property
    def attributes(self) -> tuple[str, str, str, str, str]:
        """Shape, colour, texture, accent (empty if none) and background of the (left) object."""
        dotted = self.kind == "pattern"
        ground = self.other_colour if self.kind == "ground" else "grey"
        texture, accent = ("dotted", self.other_colour) if dotted else ("plain", "")
        return self.shape, self.colour, texture, accent, f"{ground} ground"

    def swap(self) -> Composition:
        """Return the other scene of the pair; two swaps give the same scene again."""
        swapped = replace(self, colour=self.other_colour, other_colour=self.colour)
        if self.kind == "places":
            return replace(swapped, shape=self.other_shape, other_shape=self.shape)
        return swapped


def _name(colour: str, thing: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}"


def describe_composition(concept_index: int, seed: int, colours: Mapping[str, tuple]) -> Composition:
    """Return the content of the scene of a concept number from `FIRST_COMPOSED` on."""
    pair, swapped = divmod(concept_index - FIRST_COMPOSED, 2)
    kind = KINDS[pair % len(KINDS)]
    cells = _list_cells(kind, seed, tuple(colours.items()))
    shape, other_shape, colour, other_colour = cells[pair // len(KINDS)]
    scene = Composition(kind, shape, colour, other_shape, other_colour)
    return scene.swap() if swapped else scene


def count_composed(colours: Mapping[str, tuple]) -> int:
    """Return how many composed scenes a seed has."""
    fewest = min(len(_list_cells(kind, 0, tuple(colours.items()))) for kind in KINDS)
    return 2 * len(KINDS) * fewest


@lru_cache(maxsize=32)
def _list_cells(kind: str, seed: int, colours: tuple) -> tuple[tuple[str, str, str, str], ...]:
    """Return shape, other shape and two colours of every pair of a kind, in the order of a seed."""
    far = [
        (one, two) for (one, a), (two, b) in combinations(colours, 2) if math.dist(a, b) > _FAR
    ]  # unordered: the order is what the pair is about
    two_objects = kind in ("objects", "places")
    shapes = list(combinations(_SHAPES, 2)) if two_objects else [(shape, "") for shape in _SHAPES]
    cells = [(*shape, *pair) for shape in shapes for pair in far]
    name = "objects" if two_objects else kind
    order = make_generator(seed, "phantom_composition", name).permutation(len(cells))
    # The two kinds with two objects share the pairs between them, so no scene is in two pairs.
    if two_objects:
        order = order[("objects", "places").index(kind) :: 2]
    turned = make_generator(seed, "phantom_composition", "order", kind).random((len(order), 2)) < 0.5
    found = []
    for place, (flip_shapes, flip_colours) in zip(order, turned, strict=True):
        shape, other, colour, second = cells[place]
        if two_objects and flip_shapes:
            shape, other = other, shape
        if flip_colours:
            colour, second = second, colour
        found.append((shape, other, colour, second))
    return tuple(found)


def render_composition(
    concept_index: int, exemplar: int, *, size: int, seed: int, colours: Mapping[str, tuple]
) -> np.ndarray:
    """Draw one exemplar of a composed scene as uint8 of shape (size, size, 3).

    Exemplar k of one scene and exemplar k of the other scene of its pair differ only in the binding of their parts.
    """
    scene = describe_composition(concept_index, seed, colours)
    pair = (concept_index - FIRST_COMPOSED) // 2
    # The seed is of the pair, not of the scene: both scenes have the same pose and light.
    rng = make_generator(seed, "phantom_composed_scene", pair, exemplar)
    rgb, other = colours[scene.colour], colours[scene.other_colour]
    dotted = scene.kind == "pattern"
    look = Look(scene.shape, "dotted" if dotted else "plain", "", rgb, other if dotted else rgb)
    looks = [look]
    if scene.other_shape:
        looks.append(Look(scene.other_shape, "plain", "", other, other))
    ground = other if scene.kind == "ground" else _GREY
    return render_objects(looks, ground, size, rng)


def find_superordinate(scene: Composition) -> str:
    """Return the category of the (left) object."""
    return list_shapes()[scene.shape]
