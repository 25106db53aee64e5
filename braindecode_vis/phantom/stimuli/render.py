"""Paint one shaded object on one background.

Owns the drawing language of the phantom stimuli: a table of objects built from signed distance functions,
their surface textures, the backgrounds, and the shading that joins them. Everything is a function of
continuous coordinates (x to the right, y down, the image spans -1 to 1), so a scene is the same at every
size; an edge is as soft as one pixel, and noise finer than two pixels is left out. Knows nothing of
concepts, splits or files.

References
----------
.. [1] Hart, J. C. (1996). Sphere tracing: a geometric method for the antialiased ray tracing of implicit
   surfaces. The Visual Computer 12, 527-545. https://doi.org/10.1007/s003710050084
.. [2] Perlin, K. (1985). An image synthesizer. SIGGRAPH Computer Graphics 19, 287-296.
   https://doi.org/10.1145/325165.325247
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Array = np.ndarray

# One object a block: its superordinate and name, then its parts from back to front. A part is
# `paint primitive numbers`. After the paint, `|` mirrors the part about x = 0 and `*n` repeats it n times
# around the origin. The object fills about -1 to 1. Units of the last number of most primitives: degrees.
_OBJECTS = """
solid ball: main ellipse 0 0 .82 .82 0
solid cube: main face -.25 .9 0 -.95 .85 -.5 0 -.05 -.85 -.5; main face -.75 -.1 -.85 -.5 0 -.05 0 .95 -.85 .5;
  main face .95 -.1 0 -.05 .85 -.5 .85 .5 0 .95
solid torus: main ring 0 0 .62 .3
solid cylinder: main ellipse 0 .68 .6 .24 0; main taper 0 -.68 .68 .6 .6; plain disc 0 -.68 .6 .24 0
solid cone: main ellipse 0 .7 .75 .22 0; main taper 0 -.95 .72 .01 .75
solid cushion: main squircle 0 0 .85 .68
solid pyramid: main face -.8 -.5 0 -.9 -.95 .5 -.15 .85; main face .9 -.4 0 -.9 -.15 .85 .95 .45
sign star: main star 0 0 .98 .42 5
sign heart: main| capsule .42 -.32 0 .72 .46 .04
sign crescent: main crescent 0 0 .9 .42 -.18 .72
sign arrow: main polygon -.95 -.25 .1 -.25 .1 -.65 .95 0 .1 .65 .1 .25 -.95 .25
sign gear: main gear 0 0 .74 .13 8; dark ellipse 0 0 .26 .26 0
sign letter_e: main polygon -.6 -.9 .6 -.9 .6 -.5 -.15 -.5 -.15 -.2 .4 -.2 .4 .2 -.15 .2 -.15 .5 .6 .5 .6 .9 -.6 .9
sign letter_x: main box 0 0 .24 1.05 .04 38; main box 0 0 .24 1.05 .04 -38
animal fish: accent polygon .4 0 .98 -.5 .82 0 .98 .5; accent polygon -.3 -.3 .2 -.72 .3 -.2;
  main ellipse -.15 0 .75 .44 0; accent ellipse .05 .1 .2 .12 30; eye -.55 -.1 .11
animal bird: accent polygon .3 .1 .98 .15 .95 .45 .3 .4; wood capsule -.08 .5 -.1 .95 .04 .04;
  wood capsule .12 .5 .14 .95 .04 .04; main ellipse .05 .2 .58 .42 15; main ellipse -.42 -.38 .33 .33 0;
  orange polygon -.7 -.48 -.98 -.32 -.68 -.25; accent ellipse .2 .15 .38 .22 25; eye -.5 -.45 .09
animal cat: main capsule .45 .6 .85 -.1 .1 .08; main ellipse 0 .45 .5 .52 0; main| polygon .12 -.5 .52 -1 .55 -.35;
  main ellipse 0 -.3 .56 .46 0; eye| .22 -.35 .12; dark ellipse 0 -.12 .08 .06 0; white| ellipse .2 .9 .2 .11 0
animal rabbit: main| ellipse .24 -.68 .14 .4 12; pink| ellipse .24 -.66 .06 .28 12; white ellipse .5 .62 .18 .18 0;
  main ellipse 0 .5 .52 .46 0; main ellipse 0 -.1 .42 .38 0; eye| .17 -.16 .08; pink ellipse 0 0 .07 .05 0;
  white| ellipse .22 .9 .2 .1 0
animal caterpillar: dark capsule -.72 -.3 -.85 -.75 .03 .04; dark capsule -.5 -.3 -.45 -.78 .03 .04;
  main ellipse .75 .25 .24 .3 0; accent ellipse .45 .12 .26 .33 0; main ellipse .12 .22 .27 .35 0;
  accent ellipse -.22 .12 .27 .36 0; main ellipse -.6 0 .36 .38 0; eye -.72 -.08 .09; eye -.48 -.08 .09
animal octopus: main| capsule .1 .2 .9 .45 .16 .07; main| capsule .1 .2 .62 .85 .16 .07;
  main| capsule .05 .2 .2 .95 .15 .08; main ellipse 0 -.3 .6 .62 0; eye| .22 -.2 .15
animal turtle: skin ellipse -.78 .2 .24 .2 0; skin capsule -.4 .4 -.48 .72 .15 .12; skin capsule .4 .4 .5 .72 .15 .12;
  skin polygon .6 .3 .95 .5 .6 .5; main dome 0 .42 .72 .78; accent box 0 .42 .74 .08 .06 0; eye -.83 .14 .07
animal butterfly: main| ellipse .5 -.38 .5 .4 -35; accent| ellipse .42 .45 .4 .34 40; white| ellipse .62 -.45 .13 .13 0;
  dark| capsule .03 -.5 .25 -.9 .03 .03; dark capsule 0 -.55 0 .6 .1 .07
animal spider: dark| capsule .2 0 .75 -.6 .06 .05; dark| capsule .75 -.6 .98 -.15 .05 .03;
  dark| capsule .2 .1 .8 .15 .06 .05; dark| capsule .8 .15 .95 .75 .05 .03; dark| capsule .1 .2 .5 .55 .06 .05;
  dark| capsule .5 .55 .5 .98 .05 .03; main ellipse 0 -.25 .5 .52 0; main ellipse 0 .4 .32 .28 0; eye| .13 .42 .09
animal snail: skin capsule -.7 .75 .7 .8 .16 .08; skin capsule -.72 .75 -.75 .2 .15 .14;
  skin capsule -.75 .2 -.9 -.2 .04 .06; skin capsule -.7 .2 -.58 -.2 .04 .06; main ellipse .12 .12 .64 .62 0;
  accent ring .16 .12 .36 .07; accent ellipse .16 .12 .12 .12 0
animal elephant: main box -.3 .65 .13 .3 .08 0; main box .55 .65 .13 .3 .08 0; main ellipse .2 .1 .7 .5 0;
  main capsule -.8 0 -.85 .8 .16 .08; main ellipse -.55 -.22 .38 .4 0; accent ellipse -.28 -.2 .24 .36 0;
  eye -.72 -.28 .08; white capsule -.66 .1 -.6 .35 .06 .03
plant leaf: green capsule 0 .5 .08 .98 .05 .06; main lens 0 -.1 .95 .55 0; green capsule 0 -.7 0 .7 .015 .04;
  green| capsule 0 .2 .32 -.1 .025 .01; green| capsule 0 -.15 .28 -.45 .025 .01
plant tree: wood taper 0 .1 .98 .11 .18; main ellipse -.42 -.05 .45 .38 0; main ellipse .42 -.05 .45 .38 0;
  main ellipse 0 -.42 .56 .5 0
plant pine: wood taper 0 .6 .98 .1 .12; main taper 0 .05 .72 .3 .8; main taper 0 -.4 .3 .12 .62;
  main taper 0 -.98 -.15 .01 .45
plant flower: green capsule 0 .1 .05 1 .05 .05; green lens .3 .75 .32 .13 50; main*6 ellipse 0 -.52 .24 .34 0;
  yellow ellipse 0 0 .26 .26 0
plant tulip: green capsule 0 .2 0 1 .05 .05; green lens -.28 .6 .42 .12 -25; green lens .28 .6 .42 .12 25;
  main| lens .28 -.35 .58 .26 12; main lens 0 -.25 .55 .3 0
plant mushroom: white taper 0 0 .95 .2 .3; main dome 0 .1 .95 .95; white| ellipse .5 -.2 .13 .1 0;
  white ellipse 0 -.5 .17 .13 0
plant cactus: wood taper 0 .62 .98 .45 .34; main capsule 0 -.65 0 .62 .26 .26; main capsule .2 .2 .65 .1 .12 .13;
  main capsule .65 .1 .65 -.3 .13 .13; main capsule -.2 .35 -.62 .2 .12 .12; main capsule -.62 .2 -.62 -.05 .12 .12;
  pink ellipse 0 -.93 .13 .1 0; pink ellipse -.66 -.18 .08 .07 0
food apple: wood capsule 0 -.5 .12 -.92 .05 .06; green lens .38 -.78 .3 .12 60; main| ellipse .26 .1 .56 .7 0
food pear: wood capsule 0 -.6 .08 -.98 .05 .05; main capsule 0 .38 0 -.42 .56 .28
food carrot: green lens -.2 -.72 .34 .1 -28; green lens .2 -.72 .34 .1 28; green lens 0 -.75 .3 .1 0;
  main capsule 0 -.22 0 .95 .36 .03
food ice_cream: wood taper 0 -.05 .98 .48 .02; main ellipse -.26 -.18 .34 .32 0; accent ellipse .26 -.18 .34 .32 0;
  main ellipse 0 -.55 .36 .36 0; red ellipse .05 -.9 .12 .12 0
food cake: white box 0 .82 .95 .07 .05 0; main box 0 .45 .75 .32 .08 0; accent box 0 .1 .77 .1 .09 0;
  main box 0 -.15 .5 .22 .06 0; white box 0 -.38 .52 .09 .08 0; red ellipse 0 -.6 .13 .13 0
vehicle car: main polygon -.62 -.02 -.42 -.48 .3 -.48 .58 -.02; glass polygon -.48 -.04 -.34 -.38 -.08 -.38 -.08 -.04;
  glass polygon .02 -.04 .02 -.38 .24 -.38 .42 -.04; main box 0 .17 .95 .22 .13 0; dark ellipse -.52 .4 .25 .25 0;
  dark ellipse .52 .4 .25 .25 0; white ellipse -.52 .4 .11 .11 0; white ellipse .52 .4 .11 .11 0
vehicle sailboat: wood capsule 0 -.95 0 .5 .04 .05; main polygon .08 -.92 .08 .3 .82 .3;
  accent polygon -.08 -.7 -.08 .3 -.62 .3; shade polygon -.95 .42 .95 .42 .6 .88 -.6 .88
vehicle rocket: red polygon -.14 .6 .14 .6 0 1; accent| polygon .2 .2 .62 .8 .2 .65; main lens 0 -.1 .85 .38 0;
  glass ellipse 0 -.25 .18 .18 0
vehicle airplane: accent| polygon .1 -.1 .98 .25 .98 .42 .1 .25; accent| polygon .05 .6 .4 .82 .4 .92 .05 .85;
  main lens 0 0 .98 .24 0; glass ellipse 0 -.62 .08 .12 0
vehicle balloon: wood box 0 .85 .2 .14 .03 0; dark| capsule .17 .72 .4 .2 .02 .02; main capsule 0 -.3 0 .4 .68 .2
tool hammer: wood capsule 0 -.4 0 .9 .12 .14; main box -.05 -.6 .6 .26 .06 0; main polygon .5 -.8 .98 -.55 .5 -.42
tool key: main ring -.55 0 .3 .14; main capsule -.2 0 .9 0 .11 .11; main box .55 .22 .1 .2 .03 0;
  main box .85 .2 .1 .18 .03 0
tool spoon: main capsule 0 -.1 0 .92 .09 .13; main ellipse 0 -.55 .34 .44 0; shade disc 0 -.55 .22 .3 0
tool umbrella: wood capsule 0 -.9 0 .75 .05 .05; wood ring .13 .78 .13 .05; main dome 0 .05 .98 .88
tool scissors: main capsule -.3 .4 .28 -.95 .13 .03; main capsule .3 .4 -.28 -.95 .13 .03; accent| ring .36 .62 .24 .1;
  dark ellipse 0 -.2 .07 .07 0
container mug: main ring .62 0 .28 .1; main ellipse 0 .7 .62 .18 0; main taper 0 -.62 .7 .62 .62;
  dark disc 0 -.62 .62 .18 0
container vase: main capsule 0 .35 0 .0 .6 .4; main taper 0 -.8 .1 .3 .26; main ellipse 0 -.8 .4 .12 0;
  dark disc 0 -.8 .3 .07 0
container bottle: main box 0 .35 .38 .6 .12 0; main taper 0 -.55 -.15 .14 .34; main taper 0 -.9 -.5 .14 .14;
  accent taper 0 -1 -.78 .18 .18; white box 0 .4 .4 .22 .02 0
container basket: wood ring 0 -.25 .62 .06; main taper 0 -.05 .85 .85 .6; accent box 0 -.05 .9 .11 .08 0
furniture chair: main box -.42 .0 .09 .98 .04 0; main box -.1 -.55 .38 .38 .05 0; main box .1 .2 .62 .12 .04 0;
  main box .58 .6 .09 .4 .04 0
furniture lamp: wood capsule 0 -.3 0 .8 .06 .06; wood dome 0 .98 .42 .25; main taper 0 -.95 .05 .36 .8
building house: wood box .4 -.7 .1 .25 .02 0; main box 0 .4 .68 .55 .02 0; accent polygon 0 -.95 .95 -.1 -.95 -.1;
  wood box 0 .65 .17 .3 .02 0; glass| box .42 .3 .14 .14 .02 0
building castle: main box 0 .4 .55 .5 .02 0; main| taper .66 -.4 .92 .26 .28; accent| taper .66 -.95 -.38 .01 .36;
  main box 0 -.12 .14 .12 .01 0; main| box .4 -.12 .1 .12 .01 0; dark dome 0 .9 .22 .5
"""

_PAINTS = {
    "dark": (0.10, 0.10, 0.12),
    "white": (0.93, 0.92, 0.88),
    "wood": (0.47, 0.30, 0.17),
    "green": (0.24, 0.50, 0.18),
    "orange": (0.95, 0.55, 0.10),
    "pink": (0.93, 0.62, 0.68),
    "yellow": (0.95, 0.78, 0.20),
    "red": (0.80, 0.14, 0.12),
    "glass": (0.60, 0.78, 0.88),
    "skin": (0.62, 0.62, 0.36),
}


HOME_SHARE = 0.75  # of the scenes show an object where it is at home, as photographs of one concept do
SCALE_RANGE = (0.72, 0.92)  # half the object's extent over half the image
MAX_TURN = 16  # degrees


@dataclass(frozen=True)
class Look:
    """What an object looks like in every one of its scenes.

    Parameters
    ----------
    shape, texture, background
        Names out of `list_shapes`, `TEXTURES` and `BACKGROUNDS`; `background` is where the object is at home.
    colour, accent : tuple of three floats in 0 to 1
        Colour of the surface and of the pattern on it.
    stretch
        Width of the object over its height, relative to the drawn shape.
    grain
        Size of the texture relative to its default.
    tilt
        Direction of the texture, in radians.
    hue
        Hue of the background at home, 0 to 1.
    """

    shape: str
    texture: str
    background: str
    colour: tuple[float, float, float]
    accent: tuple[float, float, float]
    stretch: float = 1.0
    grain: float = 1.0
    tilt: float = 0.0
    hue: float = 0.5


def render_look(look: Look, size: int, rng: np.random.Generator, *, elsewhere: tuple[str, ...]) -> Array:
    """Draw one random scene of an object as uint8 of shape (size, size, 3).

    Every random number is drawn from `rng` in an order that does not depend on `size`.

    Parameters
    ----------
    look
        The object.
    size
        Height and width in pixels.
    rng
        Source of the pose, the light and the background instance.
    elsewhere
        Backgrounds to choose from in the scenes that are not at home.
    """
    background, hue = look.background, look.hue + rng.normal(0, 0.03)
    away, place, any_hue = rng.random(), rng.integers(len(elsewhere)), rng.random()
    if away > HOME_SHARE:
        background, hue = elsewhere[place], any_hue
    scale, angle, flip = (
        rng.uniform(*SCALE_RANGE),
        math.radians(rng.uniform(-MAX_TURN, MAX_TURN)),
        rng.random() < 0.5,
    )
    flip = bool(flip and not look.shape.startswith("letter"))
    centre = (rng.uniform(-0.9, 0.9) * (0.95 - scale), rng.uniform(-0.7, 0.9) * (0.95 - scale))
    azimuth, height = rng.uniform(-1.1, 1.1), rng.uniform(0.75, 1.3)
    far = math.hypot(1, height)
    light = (math.sin(azimuth) / far, -math.cos(azimuth) / far, height / far)
    exposure, cast = rng.uniform(0.9, 1.1), rng.normal(0, 0.03)
    jitter = rng.normal(0, 0.025, 3)

    pixel = 2 / size
    axis = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(pixel)) - np.float32(1)
    x, y = axis[None, :], axis[:, None]
    canvas = np.empty((3, size, size), np.float32)
    canvas[:] = BACKGROUNDS[background](x, y, pixel, float(hue), rng)
    # A bright object meets a darker world and the reverse, as a photographer would arrange it.
    brightness = float(np.dot(look.colour, (0.3, 0.59, 0.11)))
    canvas *= 1.1 - 0.5 * brightness
    canvas += 0.16 * (1 - brightness)

    pose = _Pose(centre, scale, angle, flip, look.stretch)
    _paint_object(canvas, look, jitter, pose, light, axis, background in _GROUNDS)
    canvas *= 1.06 - 0.16 * (x * x + y * y)
    canvas *= (exposure * np.array([1 + cast, 1, 1 - cast], np.float32))[:, None, None]
    np.clip(canvas, 0, 1, out=canvas)
    return (canvas * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


# ---------------------------------------------------------------------------------------- the object


@dataclass(frozen=True)
class _Pose:
    centre: tuple[float, float]
    scale: float
    angle: float
    flip: bool
    stretch: float


def _paint_object(canvas, look, jitter, pose, light, axis, on_ground) -> None:
    """Paint shadow and parts of an object over the background, in place."""
    reach = pose.scale * 1.45
    columns, rows = (
        slice(*np.searchsorted(axis, (middle - reach, middle + reach)).tolist()) for middle in pose.centre
    )
    patch = canvas[:, rows, columns]
    x, y = axis[None, columns] - pose.centre[0], axis[rows, None] - pose.centre[1]
    pixel = float(axis[1] - axis[0]) / pose.scale
    cos, sin = math.cos(pose.angle) / pose.scale, math.sin(pose.angle) / pose.scale
    widen = math.sqrt(pose.stretch)
    u = (x * cos + y * sin) * (-1 if pose.flip else 1) / widen
    v = (y * cos - x * sin) * widen

    parts = [(paint, *_measure(part, u, v)) for paint, part in _read_objects()[look.shape][1]]
    silhouette = np.minimum.reduce([distance for _, distance, _ in parts])
    _cast_shadow(patch, silhouette, x / pose.scale, y / pose.scale, light, pixel, on_ground)
    colours = _mix_paints(look, jitter)
    cos, sin = math.cos(look.tilt), math.sin(look.tilt)
    for number, (paint, distance, relief) in enumerate(parts):
        window = _find_window(distance)
        d, height, under = distance[window], relief[window], patch[:, *window]
        if number:  # a soft dark seam around each part sets it off from the parts behind
            seam = np.exp(-np.square(np.maximum(d, 0) * 14))
            under *= 1 - 0.4 * seam * (silhouette[window] < 0)
        colour = colours[paint]
        if paint == "main":
            swell = (1.3 - 0.4 * height) / look.grain  # a pattern closes up where the surface turns away
            tu = (u[window] * cos + v[window] * sin) * swell
            tv = (v[window] * cos - u[window] * sin) * swell
            mix = TEXTURES[look.texture](tu, tv, pixel * 1.2 / look.grain)
            colour = colour + (colours["accent"] - colour) * mix
        diffuse, gloss = _shade(height, pixel, light)
        colour = colour * diffuse
        colour += gloss
        colour -= under
        colour *= _cover(d, pixel)
        under += colour


def _find_window(distance: Array) -> tuple[slice, slice]:
    """Return the rows and columns that a part and its seam touch."""
    touched = distance < 0.2
    rows, columns = np.flatnonzero(touched.any(axis=1)), np.flatnonzero(touched.any(axis=0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _mix_paints(look: Look, jitter: Array) -> dict[str, Array]:
    """Return each paint as an array of shape (3, 1, 1)."""
    paints = {name: np.array(rgb, np.float32)[:, None, None] for name, rgb in _PAINTS.items()}
    shift = jitter.astype(np.float32)[:, None, None]
    paints["main"] = paints["plain"] = np.array(look.colour, np.float32)[:, None, None] + shift
    paints["accent"] = np.array(look.accent, np.float32)[:, None, None] + shift
    paints["shade"] = paints["main"] * np.float32(0.6)
    return paints


def _cast_shadow(patch, silhouette, x, y, light, pixel, on_ground) -> None:
    """Darken what lies away from the light, and the ground below the object, in place."""
    from scipy.ndimage import shift

    offset = (-0.16 * light[1] / pixel, -0.16 * light[0] / pixel)
    fallen = shift(silhouette, offset, order=1, mode="nearest")
    patch *= 1 - 0.42 * _ease(0.5 - fallen / 0.22)
    if on_ground:
        below = np.square((x + 0.3 * light[0]) / 0.85) + np.square((y - 0.97) / 0.2)
        patch *= 1 - 0.5 * np.exp(-1.5 * below)


def _shade(relief: Array, pixel: float, light: Array) -> tuple[Array, Array]:
    """Return diffuse and specular light of a relief seen from the front, each of its shape."""
    slope_x, slope_y = np.zeros_like(relief), np.zeros_like(relief)
    np.subtract(relief[:, 2:], relief[:, :-2], out=slope_x[:, 1:-1])
    np.subtract(relief[2:], relief[:-2], out=slope_y[1:-1])
    slope_x *= 0.5 / pixel
    slope_y *= 0.5 / pixel
    length = np.sqrt(slope_x * slope_x + slope_y * slope_y + 1)
    facing = (light[2] - light[0] * slope_x - light[1] * slope_y) / length
    np.maximum(facing, 0, out=facing)
    gloss = facing * facing
    gloss *= gloss
    gloss *= gloss
    return 0.42 + 0.72 * facing, 0.2 * gloss * gloss


# ------------------------------------------------------------------------------------- the primitives


@lru_cache(maxsize=1)
def _read_objects() -> dict[str, tuple[str, tuple]]:
    """Parse `_OBJECTS` into shape name -> (superordinate, parts)."""
    objects = {}
    for block in _OBJECTS.strip().replace("\n  ", " ").split("\n"):
        title, body = block.split(":")
        kind, name = title.split()
        parts = []
        for text in body.split(";"):
            paint, *words = text.split()
            if paint.rstrip("|") == "eye":
                ex, ey, er = map(float, words)
                mirror = paint.endswith("|")
                parts.append(("white", (_ellipse, (ex, ey, er, er, 0.0), mirror, 0)))
                parts.append(("dark", (_ellipse, (ex, ey, er * 0.55, er * 0.6, 0.0), mirror, 0)))
                continue
            paint, _, times = paint.partition("*")
            numbers = tuple(map(float, words[1:]))
            part = (_PRIMITIVES[words[0]], numbers, paint.endswith("|"), int(times or 0))
            parts.append((paint.rstrip("|"), part))
        objects[name] = (kind, tuple(parts))
    return objects


def list_shapes() -> dict[str, str]:
    """Return every shape and its superordinate category."""
    return {name: kind for name, (kind, _) in _read_objects().items()}


def _measure(part, x: Array, y: Array) -> tuple[Array, Array]:
    """Return signed distance and relief of a part; both of the shape of `x`."""
    primitive, numbers, mirror, times = part
    if mirror:
        x = np.abs(x)
    if times:
        sector = 2 * np.pi / times
        angle = np.arctan2(x, -y)
        angle -= np.round(angle / sector) * sector
        radius = np.sqrt(x * x + y * y)
        x, y = radius * np.sin(angle), -radius * np.cos(angle)
    return primitive(x, y, *numbers)


def _turn(x, y, cx, cy, degrees):
    x, y = x - cx, y - cy
    if degrees == 0:
        return x, y
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x * cos + y * sin, y * cos - x * sin


def _bevel(distance, width=0.2):
    """Relief that rises from the edge over `width` like a quarter of a circle, and is flat within."""
    rest = 1 - np.clip(distance * (-1 / width), 0, 1)
    return 0.7 * width * np.sqrt(1 - rest * rest)


def _ellipse(x, y, cx, cy, rx, ry, degrees):
    x, y = _turn(x, y, cx, cy, degrees)
    x, y = x / rx, y / ry
    square = x * x + y * y
    k0 = np.sqrt(square)
    x, y = x / rx, y / ry
    k1 = np.sqrt(x * x + y * y) + np.float32(1e-6)
    return k0 * (k0 - 1) / k1, min(rx, ry) * np.sqrt(np.maximum(1 - square, 0))


def _disc(x, y, cx, cy, rx, ry, degrees):
    distance, relief = _ellipse(x, y, cx, cy, rx, ry, degrees)
    return distance, 0.45 * y + 0 * relief


def _box(x, y, cx, cy, hx, hy, corner, degrees):
    x, y = _turn(x, y, cx, cy, degrees)
    qx, qy = np.abs(x) - (hx - corner), np.abs(y) - (hy - corner)
    outer = np.sqrt(np.square(np.maximum(qx, 0)) + np.square(np.maximum(qy, 0)))
    distance = outer + np.minimum(np.maximum(qx, qy), 0) - corner
    return distance, _bevel(distance, 0.12)


def _capsule(x, y, x0, y0, x1, y1, r0, r1):
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    px, py = x - x0 - along * dx, y - y0 - along * dy
    radius = r0 + (r1 - r0) * along
    square = px * px + py * py
    return np.sqrt(square) - radius, np.sqrt(np.maximum(radius * radius - square, 0))


def _ring(x, y, cx, cy, radius, tube):
    off = np.sqrt(np.square(x - cx) + np.square(y - cy)) - radius
    return np.abs(off) - tube, np.sqrt(np.maximum(tube * tube - off * off, 0))


def _squircle(x, y, cx, cy, rx, ry):
    x, y = np.square((x - cx) / rx), np.square((y - cy) / ry)
    k = np.sqrt(np.sqrt(x * x + y * y))
    return (k - 1) * min(rx, ry), 0.6 * min(rx, ry) * np.sqrt(np.maximum(1 - k * k, 0))


def _taper(x, y, cx, top, bottom, w0, w1):
    """Side of an upright cylinder or cone whose half width goes from `w0` at the top to `w1`."""
    width = np.maximum(w0 + (w1 - w0) * (y - top) / (bottom - top), 0.005)
    x = x - cx
    steep = 1 / math.hypot(1, (w1 - w0) / (bottom - top))
    ends = np.abs(y - 0.5 * (top + bottom)) - 0.5 * (bottom - top)
    return np.maximum((np.abs(x) - width) * steep, ends), np.sqrt(np.maximum(width * width - x * x, 0))


def _dome(x, y, cx, base, rx, ry):
    distance, relief = _ellipse(x, y, cx, base, rx, ry, 0)
    return np.maximum(distance, y - base), relief


def _lens(x, y, cx, cy, half_length, half_width, degrees):
    """Two circular arcs that meet in points, upright."""
    x, y = _turn(x, y, cx, cy, degrees)
    radius = (half_length**2 + half_width**2) / (2 * half_width)
    distance = np.sqrt(np.square(np.abs(x) + radius - half_width) + y * y) - radius
    depth = np.clip(-distance / half_width, 0, 1)
    return distance, 0.8 * half_width * np.sqrt(depth * (2 - depth))


def _crescent(x, y, cx, cy, radius, hx, hy, hole):
    outer = np.sqrt(np.square(x - cx) + np.square(y - cy)) - radius
    inner = np.sqrt(np.square(x - hx) + np.square(y - hy)) - hole
    distance = np.maximum(outer, -inner)
    return distance, _bevel(distance, 0.3)


def _polygon(x, y, *corners):
    points = np.array(corners, np.float32).reshape(-1, 2)
    square, inside = np.float32(np.inf), np.float32(1)
    for (ax, ay), (bx, by) in zip(points.tolist(), np.roll(points, 1, axis=0).tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        qx, qy = wx - ex * along, wy - ey * along
        square = np.minimum(square, qx * qx + qy * qy)
        crosses = ((y >= ay) != (y >= by)) & ((ex * wy > ey * wx) == (ey > 0))
        inside = np.where(crosses, -inside, inside)
    distance = inside * np.sqrt(square)
    return distance, _bevel(distance)


def _face(x, y, gx, gy, *corners):
    distance, _ = _polygon(x, y, *corners)
    return distance, gx * x + gy * y


def _star(x, y, cx, cy, outer, inner, points):
    x, y = x - cx, y - cy
    sector = np.pi / points
    angle = np.arctan2(np.abs(x), -y)
    angle = np.abs(angle - np.round(angle / (2 * sector)) * (2 * sector))
    radius = np.sqrt(x * x + y * y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    nx, ny = inner * math.sin(sector), outer - inner * math.cos(sector)
    distance = ((px - outer) * nx + py * ny) / math.hypot(nx, ny)
    return distance, 0.6 * np.maximum(-distance, 0)


def _gear(x, y, cx, cy, radius, tooth, teeth):
    x, y = x - cx, y - cy
    wave = np.clip(2.5 * np.cos(teeth * np.arctan2(x, y)), -1, 1)
    distance = 0.75 * (np.sqrt(x * x + y * y) - radius - tooth * wave)
    return distance, _bevel(distance, 0.12)


_PRIMITIVES: dict[str, Callable] = {
    "ellipse": _ellipse,
    "disc": _disc,
    "box": _box,
    "capsule": _capsule,
    "ring": _ring,
    "squircle": _squircle,
    "taper": _taper,
    "dome": _dome,
    "lens": _lens,
    "crescent": _crescent,
    "polygon": _polygon,
    "face": _face,
    "star": _star,
    "gear": _gear,
}


# --------------------------------------------------------------------------------------- the textures
# Each maps surface coordinates to the share of the accent colour, 0 to 1.


def _band(t, period, share, pixel):
    """Stripes along `t`: 1 on `share` of each period, with soft edges."""
    away = np.abs(t - np.round(t / period) * period)
    return _cover(away - 0.5 * share * period, pixel)


def _checks(u, v, pixel, period=0.56):
    a, b = (0.25 * period - np.abs(np.mod(t, period) - 0.5 * period) for t in (u, v))
    return 0.5 + 0.5 * np.clip(a * (2 / pixel), -1, 1) * np.clip(b * (2 / pixel), -1, 1)


def _dots(u, v, pixel, period=0.44):
    row = np.round(v / period)
    u = u + 0.5 * period * row
    du, dv = u - np.round(u / period) * period, v - row * period
    return _cover(np.sqrt(du * du + dv * dv) - 0.27 * period, pixel)


def _scales(u, v, pixel, period=0.4):
    row = np.floor(v / (0.6 * period))
    u = u + 0.5 * period * np.mod(row, 2)
    du, dv = u - np.round(u / period) * period, v - row * (0.6 * period)
    rim = np.sqrt(du * du + dv * dv) / (0.6 * period)
    return np.clip(1.6 * np.abs(rim - 0.45), 0, 1)


TEXTURES: dict[str, Callable[[Array, Array, float], Array]] = {
    "plain": lambda u, v, pixel: np.float32(0),
    "striped": lambda u, v, pixel: _band(v, 0.4, 0.45, pixel),
    "checked": _checks,
    "dotted": _dots,
    "ringed": lambda u, v, pixel: _band(np.sqrt(u * u + v * v), 0.42, 0.45, pixel),
    "zigzag": lambda u, v, pixel: _band(
        v + 0.9 * np.abs(u - np.round(u / 0.5) * 0.5), 0.42, 0.45, pixel * 1.3
    ),
    "marbled": lambda u, v, pixel: np.square(
        0.5 + 0.5 * np.sin(7 * u + 3 * v + 9 * _fbm(2 * u, 2 * v, 2 * pixel, 3))
    ),
    "ombre": lambda u, v, pixel: _ease(0.5 + 0.75 * v),
    "scaly": _scales,
    "wooden": lambda u, v, pixel: _ease(2.6 * _fbm(1.3 * u, 9 * v, 9 * pixel, 2) - 0.75),
    "patched": lambda u, v, pixel: _ease(0.5 + 7 * (_fbm(2.3 * u + 5, 2.3 * v, 2.3 * pixel, 2) - 0.5)),
    "plaid": lambda u, v, pixel: 0.55 * _band(u, 0.5, 0.5, pixel) + 0.45 * _band(v, 0.5, 0.5, pixel),
}


# ------------------------------------------------------------------------------------ the backgrounds
# Each returns colours of shape (3, h, w) from x of shape (1, w) and y of shape (h, 1).


def _hsv(hue, saturation, value):
    """Return an RGB colour of shape (3, 1, 1)."""
    offset = np.array([5.0, 3.0, 1.0]) + (hue % 1) * 6
    k = np.mod(offset, 6)
    rgb = value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
    return rgb.astype(np.float32)[:, None, None]


def _lerp(a, b, t):
    return a + (b - a) * t


def _studio(x, y, pixel, hue, rng):
    cx, cy, floor = rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.0), rng.uniform(0.25, 0.6)
    glow = np.exp(-0.8 * (np.square(x - cx) + np.square(y - cy)))
    wall = _lerp(_hsv(hue, 0.55, 0.35), _hsv(hue, 0.35, 0.85), glow)
    return wall * (1 - 0.25 * _ease(0.5 + (y - floor) / 0.3))


def _meadow(x, y, pixel, hue, rng):
    ox, oy, horizon = rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(-0.25, 0.25)
    hills = horizon - 0.35 * (_fbm(1.5 * x + ox, 0 * y + oy, 1.5 * pixel, 2) - 0.4)
    sky = _lerp(_hsv(0.58, 0.45, 0.85), _hsv(0.56, 0.12, 0.95), _ease(0.5 + 0.5 * (y - horizon)))
    near = np.maximum(y - horizon, 0) + 0.1
    grass = _fbm(3 * x + ox, 5 * np.log(near) + oy, 5 * pixel / near.min(initial=0.3), 4)
    ground = _lerp(_hsv(0.2 + 0.14 * hue, 0.7, 0.3), _hsv(0.17 + 0.14 * hue, 0.65, 0.7), grass)
    far = _lerp(sky, _hsv(0.3 + 0.1 * hue, 0.45, 0.4), _cover(hills - y, max(pixel, 0.02)))
    return _lerp(far, ground, _cover(horizon - y, max(pixel, 0.02)))


def _clouds(x, y, pixel, hue, rng):
    ox, oy = rng.uniform(0, 64, 2).tolist()
    cloud = _fbm(1.3 * x + ox, 2 * y + oy, 2 * pixel, 5)
    sky = _lerp(_hsv(0.5 + 0.2 * hue, 0.7, 0.6), _hsv(0.5 + 0.2 * hue, 0.3, 0.9), 0.5 + 0.5 * y)
    return _lerp(sky, _hsv(0.1, 0.04, 0.97), _ease(3.2 * cloud - 1.2))


def _bokeh(x, y, pixel, hue, rng):
    scene = _lerp(_hsv(hue, 0.6, 0.3), _hsv(hue + 0.1, 0.6, 0.14), 0.5 + 0.5 * y) + 0 * x
    for cx, cy, radius, turn, glow in rng.uniform(size=(12, 5)).tolist():
        px, py, radius = 2.4 * cx - 1.2, 2.4 * cy - 1.2, 0.12 + 0.2 * radius
        # A disc is small: only its own square of the image is touched.
        columns = slice(*np.searchsorted(x[0], (px - radius, px + radius)).tolist())
        rows = slice(*np.searchsorted(y[:, 0], (py - radius, py + radius)).tolist())
        distance = np.sqrt(np.square(x[:, columns] - px) + np.square(y[rows] - py)) - radius + 0.04
        light = _hsv(hue + 0.3 * (turn - 0.5), 0.6, 0.2 + 0.4 * glow)
        scene[:, rows, columns] += light * _cover(distance, 0.04)
    return scene


def _brick(x, y, pixel, hue, rng):
    ox, oy, period = *rng.uniform(0, 64, 2).tolist(), rng.uniform(0.28, 0.4)
    row = np.floor((y + oy) / period)
    along = x + ox + np.mod(row, 2) * period
    column = np.floor(along / (2 * period))
    dx = np.abs(along - (column + 0.5) * 2 * period) - period
    dy = np.abs(y + oy - (row + 0.5) * period) - 0.5 * period
    brick = _cover(np.maximum(dx, dy) + 0.03, max(pixel, 0.02))
    tone = 0.7 * np.mod(np.sin(row * 12.99 + column * 78.23) * 437.5, 1) + 0.3 * _fbm(
        5 * x + ox, 5 * y + oy, 5 * pixel, 3
    )
    colour = _lerp(_hsv(hue, 0.5, 0.38), _hsv(hue + 0.03, 0.42, 0.62), tone)
    return _lerp(_hsv(hue, 0.12, 0.7), colour, brick)


def _planks(x, y, pixel, hue, rng):
    ox, oy, period = *rng.uniform(0, 64, 2).tolist(), rng.uniform(0.35, 0.55)
    plank = np.floor((x + ox) / period)
    gap = np.abs(x + ox - (plank + 0.5) * period) - 0.5 * period
    grain = _fbm(9 * x + 3 * plank, 1.1 * y + oy + 7.3 * plank, 9 * pixel, 3)
    tone = 0.75 * grain + 0.25 * np.mod(np.sin(plank * 91.7) * 437.5, 1)
    colour = _lerp(_hsv(0.05 + 0.06 * hue, 0.6, 0.3), _hsv(0.07 + 0.06 * hue, 0.5, 0.85), tone)
    return colour * (0.45 + 0.55 * _cover(gap + 0.012, max(pixel, 0.02)))


def _sea(x, y, pixel, hue, rng):
    ox, oy, horizon = rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(-0.35, 0.1)
    sky = _lerp(_hsv(0.55 + 0.1 * hue, 0.5, 0.75), _hsv(0.08, 0.35, 0.98), _ease(1 + 0.9 * (y - horizon)))
    near = np.maximum(y - horizon, 0) + 0.12
    waves = _fbm(2.2 * x + ox, 9 * np.log(near) + oy, 5 * pixel, 3)
    water = _lerp(_hsv(0.48 + 0.14 * hue, 0.8, 0.3), _hsv(0.48 + 0.12 * hue, 0.4, 0.9), waves * waves * 1.4)
    return _lerp(sky, water, _cover(horizon - y, max(pixel, 0.015)))


def _dunes(x, y, pixel, hue, rng):
    scene = _lerp(_hsv(0.6, 0.25, 0.85), _hsv(0.1, 0.25, 0.97), _ease(0.9 + 0.8 * y)) + 0 * x
    base = rng.uniform(-0.35, -0.1)
    for layer, (phase, bend) in enumerate(rng.uniform(size=(4, 2)).tolist()):
        line = base + 0.34 * layer + 0.13 * np.sin((1.2 + 1.5 * bend) * x + 6.3 * phase)
        crest, foot = _hsv(0.06 + 0.07 * hue, 0.35, 0.92), _hsv(0.05 + 0.07 * hue, 0.55, 0.55)
        sand = _lerp(crest, foot, _ease((y - line) * 1.6))
        scene = _lerp(scene, sand, _cover(line - y, max(pixel, 0.02)))
    return scene


def _forest(x, y, pixel, hue, rng):
    ox, oy = rng.uniform(0, 64, 2).tolist()
    leaves = _fbm(2.5 * x + ox, 2.5 * y + oy, 2.5 * pixel, 4)
    dim, lit = _hsv(0.26 + 0.16 * hue, 0.75, 0.14), _hsv(0.2 + 0.16 * hue, 0.6, 0.75)
    scene = _lerp(dim, lit, _ease(2 * leaves - 0.55))
    for place, width, tone in rng.uniform(size=(5, 3)).tolist():
        distance = np.abs(x - 2.2 * place + 1.1 + 0.04 * np.sin(3 * y + 9 * place)) - 0.04 - 0.08 * width
        scene = _lerp(scene, _hsv(0.07, 0.45, 0.15 + 0.2 * tone), 0.9 * _cover(distance, 0.05))
    return scene


def _tiles(x, y, pixel, hue, rng):
    ox, oy, horizon = rng.uniform(0, 8), rng.uniform(0, 8), rng.uniform(-0.1, 0.25)
    depth = 0.55 / (np.maximum(y - horizon, 0) + 0.25)
    footprint = pixel * depth * depth * 2
    a, b = (0.25 - np.abs(np.mod(t, 1) - 0.5) for t in (1.4 * x * depth + ox, 2.6 * depth + oy))
    check = 0.5 + 0.5 * np.clip(a * 2 / footprint, -1, 1) * np.clip(b * 2 / footprint, -1, 1)
    floor = _lerp(_hsv(hue, 0.35, 0.35), _hsv(hue, 0.1, 0.85), check)
    wall = _hsv(hue + 0.5, 0.3, 0.75) * (0.85 - 0.25 * y)
    skirting = _cover(np.abs(y - horizon + 0.04) - 0.04, max(pixel, 0.02))
    return _lerp(_lerp(wall, floor, _cover(horizon - y, max(pixel, 0.02))), _hsv(hue, 0.1, 0.9), skirting)


def _city(x, y, pixel, hue, rng):
    dusk, glow = _hsv(0.6 + 0.2 * hue, 0.75, 0.2), _hsv(0.9 + 0.15 * hue, 0.6, 0.7)
    scene = _lerp(dusk, glow, _ease(0.6 + 0.6 * y)) + 0 * x
    for place, width, top, phase in rng.uniform(size=(7, 4)).tolist():
        px, half, top = 2.2 * place - 1.1, 0.12 + 0.14 * width, -0.7 + 0.9 * top
        tower = _cover(np.maximum(np.abs(x - px) - half, top - y), max(pixel, 0.02))
        scene = _lerp(scene, _hsv(0.62 + 0.1 * hue, 0.45, 0.12 + 0.1 * phase), tower)
        window = _band(x - px, 0.13, 0.4, pixel) * _band(y - top - 0.1, 0.15, 0.4, pixel)
        room = np.round((x - px) / 0.13) * 12.9 + np.round((y - top - 0.1) / 0.15) * 78.2
        lit = np.mod(np.sin(room + 40 * phase) * 437, 1) > 0.45
        scene = _lerp(scene, _hsv(0.12, 0.5, 0.95), 0.8 * tower * window * lit)
    return scene


BACKGROUNDS: dict[str, Callable] = {
    "studio": _studio,
    "meadow": _meadow,
    "clouds": _clouds,
    "bokeh": _bokeh,
    "brick": _brick,
    "planks": _planks,
    "sea": _sea,
    "dunes": _dunes,
    "forest": _forest,
    "tiles": _tiles,
    "city": _city,
}
_GROUNDS = ("studio", "meadow", "dunes", "tiles", "sea")


# --------------------------------------------------------------------------------- edges and noise


def _cover(distance, softness):
    """Share of a pixel inside an edge: 1 at -softness, 0 at +softness, smooth between."""
    return _ease(0.5 - distance * (0.5 / softness))


def _ease(t):
    t = np.minimum(np.maximum(t, 0), 1)  # faster than np.clip on small arrays
    return t * t * (3 - 2 * t)


@lru_cache(maxsize=1)
def _noise_table() -> Array:
    """Random heights on a 64 x 64 lattice that repeats; the same in every scene, only shifted."""
    table = np.random.Generator(np.random.Philox(1985)).random((64, 64), dtype=np.float32)
    table.setflags(write=False)
    return table


def _noise(x, y):
    """Value noise between 0 and 1 with one random height per unit; broadcasts `x` and `y`."""
    table = _noise_table()
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (t * t * (3 - 2 * t) for t in (x - x0, y - y0))
    ix, iy = x0.astype(np.int32), y0.astype(np.int32)
    ix1, iy1 = (ix + 1) & 63, (iy + 1) & 63
    ix, iy = ix & 63, iy & 63
    near, far = table[iy, ix], table[iy1, ix]
    near = near + (table[iy, ix1] - near) * fx
    far = far + (table[iy1, ix1] - far) * fx
    return near + (far - near) * fy


def _fbm(x, y, pixel, octaves):
    """Sum of octaves of noise between 0 and 1; octaves finer than two pixels fade to their mean."""
    total, weight = np.float32(0), 0.5
    for octave in range(octaves):
        step = 2.0**octave
        seen = float(np.clip(2 - 2.5 * step * pixel, 0, 1))
        if seen > 0:
            total = total + weight * (0.5 + seen * (_noise(x * step + 17.3 * octave, y * step) - 0.5))
        else:
            total = total + weight * 0.5
        weight *= 0.5
    return total + weight
