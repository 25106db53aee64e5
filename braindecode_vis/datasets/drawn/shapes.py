"""The objects of the phantom stimuli: a table of parts, and the signed distance function of each kind of part.

Owns the drawing language. A part gives, at every point, the distance to its outline (negative inside, [1]_) and its
relief, the height of its surface above the picture plane, from which `render` shades it. Everything is a function of
continuous coordinates (x to the right, y down; the object fills about -1 to 1), so a shape is the same at every size.

References
----------
.. [1] Hart, J. C. (1996). Sphere tracing: a geometric method for the antialiased ray tracing of implicit
   surfaces. The Visual Computer 12, 527-545. https://doi.org/10.1007/s003710050084
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

Array = np.ndarray
Primitive = Callable[..., tuple[Array, Array]]
Part = tuple[Primitive, tuple[float, ...], bool, int]
"""Primitive, its numbers, whether it is mirrored about x = 0, and how often it is repeated around the origin."""

# One object per block: its superordinate and name, then its parts from back to front. A part is
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


def list_shapes() -> dict[str, str]:
    """Return every shape and its superordinate category."""
    return {name: kind for name, (kind, _) in read_objects().items()}


@lru_cache(maxsize=1)
def read_objects() -> dict[str, tuple[str, tuple[tuple[str, Part], ...]]]:
    """Parse `_OBJECTS` into shape name -> (superordinate, parts)."""
    objects: dict[str, tuple[str, tuple[tuple[str, Part], ...]]] = {}
    for block in _OBJECTS.strip().replace("\n  ", " ").split("\n"):
        title, body = block.split(":")
        kind, name = title.split()
        parts: list[tuple[str, Part]] = []
        for text in body.split(";"):
            paint, *words = text.split()
            if paint.rstrip("|") == "eye":
                # Short for a white circle with a dark pupil of about half its size.
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


def measure_part(part: Part, x: Array, y: Array) -> tuple[Array, Array]:
    """Return signed distance and relief of a part; both of the shape of `x`."""
    primitive, numbers, mirror, times = part
    if mirror:  # one side is measured for both: half the work, and exact symmetry
        x = np.abs(x)
    if times:
        sector = 2 * np.pi / times
        angle = np.arctan2(x, -y)
        angle -= np.round(angle / sector) * sector
        radius = np.sqrt(x * x + y * y)
        x, y = radius * np.sin(angle), -radius * np.cos(angle)
    return primitive(x, y, *numbers)


def _turn(x: Array, y: Array, cx: float, cy: float, degrees: float) -> tuple[Array, Array]:
    x, y = x - cx, y - cy
    if degrees == 0:
        return x, y
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x * cos + y * sin, y * cos - x * sin


def _bevel(distance: Array, width: float = 0.2) -> Array:
    """Relief that rises from the edge over `width` like a quarter of a circle, and is flat within."""
    rest = 1 - np.clip(distance * (-1 / width), 0, 1)
    return 0.7 * width * np.sqrt(1 - rest * rest)


def _ellipse(
    x: Array, y: Array, cx: float, cy: float, rx: float, ry: float, degrees: float
) -> tuple[Array, Array]:
    x, y = _turn(x, y, cx, cy, degrees)
    x, y = x / rx, y / ry
    square = x * x + y * y
    k0 = np.sqrt(square)
    x, y = x / rx, y / ry
    # First-order distance: the implicit function over the length of its gradient, as no closed form is fast [1]_.
    k1 = np.sqrt(x * x + y * y) + np.float32(1e-6)
    return k0 * (k0 - 1) / k1, min(rx, ry) * np.sqrt(np.maximum(1 - square, 0))


def _disc(
    x: Array, y: Array, cx: float, cy: float, rx: float, ry: float, degrees: float
) -> tuple[Array, Array]:
    distance, relief = _ellipse(x, y, cx, cy, rx, ry, degrees)
    return distance, 0.45 * y + 0 * relief


def _box(
    x: Array, y: Array, cx: float, cy: float, hx: float, hy: float, corner: float, degrees: float
) -> tuple[Array, Array]:
    x, y = _turn(x, y, cx, cy, degrees)
    qx, qy = np.abs(x) - (hx - corner), np.abs(y) - (hy - corner)
    outer = np.sqrt(np.square(np.maximum(qx, 0)) + np.square(np.maximum(qy, 0)))
    distance = outer + np.minimum(np.maximum(qx, qy), 0) - corner
    return distance, _bevel(distance, 0.12)


def _capsule(
    x: Array, y: Array, x0: float, y0: float, x1: float, y1: float, r0: float, r1: float
) -> tuple[Array, Array]:
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    px, py = x - x0 - along * dx, y - y0 - along * dy
    radius = r0 + (r1 - r0) * along
    square = px * px + py * py
    return np.sqrt(square) - radius, np.sqrt(np.maximum(radius * radius - square, 0))


def _ring(x: Array, y: Array, cx: float, cy: float, radius: float, tube: float) -> tuple[Array, Array]:
    off = np.sqrt(np.square(x - cx) + np.square(y - cy)) - radius
    return np.abs(off) - tube, np.sqrt(np.maximum(tube * tube - off * off, 0))


def _squircle(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> tuple[Array, Array]:
    x, y = np.square((x - cx) / rx), np.square((y - cy) / ry)
    k = np.sqrt(np.sqrt(x * x + y * y))
    return (k - 1) * min(rx, ry), 0.6 * min(rx, ry) * np.sqrt(np.maximum(1 - k * k, 0))


def _taper(
    x: Array, y: Array, cx: float, top: float, bottom: float, w0: float, w1: float
) -> tuple[Array, Array]:
    """Side of an upright cylinder or cone whose half width goes from `w0` at the top to `w1`."""
    width = np.maximum(w0 + (w1 - w0) * (y - top) / (bottom - top), 0.005)
    x = x - cx
    steep = 1 / math.hypot(1, (w1 - w0) / (bottom - top))
    ends = np.abs(y - 0.5 * (top + bottom)) - 0.5 * (bottom - top)
    return np.maximum((np.abs(x) - width) * steep, ends), np.sqrt(np.maximum(width * width - x * x, 0))


def _dome(x: Array, y: Array, cx: float, base: float, rx: float, ry: float) -> tuple[Array, Array]:
    distance, relief = _ellipse(x, y, cx, base, rx, ry, 0)
    return np.maximum(distance, y - base), relief


def _lens(
    x: Array, y: Array, cx: float, cy: float, half_length: float, half_width: float, degrees: float
) -> tuple[Array, Array]:
    """Two circular arcs that meet in points, upright."""
    x, y = _turn(x, y, cx, cy, degrees)
    radius = (half_length**2 + half_width**2) / (2 * half_width)
    distance = np.sqrt(np.square(np.abs(x) + radius - half_width) + y * y) - radius
    depth = np.clip(-distance / half_width, 0, 1)
    return distance, 0.8 * half_width * np.sqrt(depth * (2 - depth))


def _crescent(
    x: Array, y: Array, cx: float, cy: float, radius: float, hx: float, hy: float, hole: float
) -> tuple[Array, Array]:
    outer = np.sqrt(np.square(x - cx) + np.square(y - cy)) - radius
    inner = np.sqrt(np.square(x - hx) + np.square(y - hy)) - hole
    distance = np.maximum(outer, -inner)
    return distance, _bevel(distance, 0.3)


def _polygon(x: Array, y: Array, *corners: float) -> tuple[Array, Array]:
    points = np.array(corners, np.float32).reshape(-1, 2)  # (n_corners, xy)
    square: Array = np.array(np.inf, np.float32)
    inside: Array = np.array(1, np.float32)
    for (ax, ay), (bx, by) in zip(points.tolist(), np.roll(points, 1, axis=0).tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        qx, qy = wx - ex * along, wy - ey * along
        square = np.minimum(square, qx * qx + qy * qy)
        # Even-odd rule: a ray to the right that crosses an odd number of edges starts inside.
        crosses = ((y >= ay) != (y >= by)) & ((ex * wy > ey * wx) == (ey > 0))
        inside = np.where(crosses, -inside, inside)
    distance = inside * np.sqrt(square)
    return distance, _bevel(distance)


def _face(x: Array, y: Array, gx: float, gy: float, *corners: float) -> tuple[Array, Array]:
    distance, _ = _polygon(x, y, *corners)
    return distance, gx * x + gy * y


def _star(
    x: Array, y: Array, cx: float, cy: float, outer: float, inner: float, points: float
) -> tuple[Array, Array]:
    x, y = x - cx, y - cy
    sector = np.pi / points
    angle = np.arctan2(np.abs(x), -y)
    angle = np.abs(angle - np.round(angle / (2 * sector)) * (2 * sector))
    radius = np.sqrt(x * x + y * y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    nx, ny = inner * math.sin(sector), outer - inner * math.cos(sector)
    distance = ((px - outer) * nx + py * ny) / math.hypot(nx, ny)
    return distance, 0.6 * np.maximum(-distance, 0)


def _gear(
    x: Array, y: Array, cx: float, cy: float, radius: float, tooth: float, teeth: float
) -> tuple[Array, Array]:
    x, y = x - cx, y - cy
    wave = np.clip(2.5 * np.cos(teeth * np.arctan2(x, y)), -1, 1)
    distance = 0.75 * (np.sqrt(x * x + y * y) - radius - tooth * wave)
    return distance, _bevel(distance, 0.12)


_PRIMITIVES: dict[str, Primitive] = {
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
