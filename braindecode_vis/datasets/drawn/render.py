"""Paints one shaded object on one background.

Owns the surface textures, the backgrounds, and the shading that joins them with the objects of `shapes`. Everything
is a function of continuous coordinates (x to the right, y down, the image spans -1 to 1), so a scene is the same at
every size; an edge is blurred over one pixel, and noise finer than two pixels is left out. Concepts, splits and files
are those of `images`.

References
----------
.. [1] Perlin, K. (1985). An image synthesizer. SIGGRAPH Computer Graphics 19, 287-296.
   https://doi.org/10.1145/325165.325247
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from braindecode_vis.datasets.drawn.shapes import measure_part, read_objects

Array = np.ndarray


# Fixed colours of parts, RGB; `main`, `accent`, `plain` and `shade` are set by the look.
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
    """The appearance that an object has in all of its scenes.

    Parameters
    ----------
    shape, texture, background
        Names from `list_shapes`, `TEXTURES` and `BACKGROUNDS`; `background` is the usual one of the object.
    colour, accent : tuple of three floats in 0 to 1
        Colour of the surface and of the pattern on it.
    stretch
        Width of the object over its height, relative to the drawn shape.
    grain
        Size of the texture relative to its default.
    tilt
        Direction of the texture, in radians.
    hue
        Hue of the usual background, 0 to 1.
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


@dataclass(frozen=True)
class Scene:
    """Properties of one picture of an object beside its `Look`: place, size, light and background.

    Parameters
    ----------
    background
        The drawn background, the usual or another one.
    hue
        Hue of the background, 0 to 1 or slightly more.
    scale
        Half the object's extent divided by half the image.
    angle
        Rotation in radians.
    flip
        Mirrored.
    centre : tuple of two floats
        Place of the object, x to the right and y down; the image spans -1 to 1.
    light : tuple of three floats
        Direction of the lamp.
    exposure, cast
        Brightness, and warmth of the light.
    jitter : array of shape (3,)
        Shift of the object's colours.
    """

    background: str
    hue: float
    scale: float
    angle: float
    flip: bool
    centre: tuple[float, float]
    light: tuple[float, float, float]
    exposure: float
    cast: float
    jitter: Array


def draw_scene(look: Look, rng: np.random.Generator, elsewhere: tuple[str, ...]) -> Scene:
    """Draw the scene of an object: the first numbers that `render_look` takes from `rng`."""
    # Every number is drawn even if it is not used, so that one choice does not shift the next ones.
    background, hue = look.background, look.hue + rng.normal(0, 0.03)
    away, place, any_hue = rng.random(), rng.integers(len(elsewhere)), rng.random()
    if away > HOME_SHARE:
        background, hue = elsewhere[place], any_hue
    scale, angle, flip = (
        rng.uniform(*SCALE_RANGE),
        math.radians(rng.uniform(-MAX_TURN, MAX_TURN)),
        rng.random() < 0.5,
    )
    # A mirrored letter is another sign, not another view of the same.
    flip = bool(flip and not look.shape.startswith("letter"))
    centre = (rng.uniform(-0.9, 0.9) * (0.95 - scale), rng.uniform(-0.7, 0.9) * (0.95 - scale))
    azimuth, height = rng.uniform(-1.1, 1.1), rng.uniform(0.75, 1.3)
    # A lamp above and in front, at most 63 degrees to a side: the light of most photographs.
    far = math.hypot(1, height)
    light = (math.sin(azimuth) / far, -math.cos(azimuth) / far, height / far)
    exposure, cast = rng.uniform(0.9, 1.1), rng.normal(0, 0.03)
    return Scene(
        background, float(hue), scale, angle, flip, centre, light, exposure, cast, rng.normal(0, 0.025, 3)
    )


def shows_accent(look: Look) -> bool:
    """Say whether the accent colour is visible: in the texture of the surface, or on a part of the shape."""
    return look.texture != "plain" or any(paint == "accent" for paint, _ in read_objects()[look.shape][1])


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
        Backgrounds to choose from in scenes without the usual background.
    """
    scene = draw_scene(look, rng, elsewhere)
    pixel = 2 / size
    axis = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(pixel)) - np.float32(1)
    x, y = axis[None, :], axis[:, None]
    canvas = np.empty((3, size, size), np.float32)
    canvas[:] = BACKGROUNDS[scene.background](x, y, pixel, scene.hue, rng)
    # A bright object gets a darker background and the reverse, as a photographer would choose.
    brightness = float(np.dot(look.colour, (0.3, 0.59, 0.11)))
    canvas *= 1.1 - 0.5 * brightness
    canvas += 0.16 * (1 - brightness)

    _paint_object(canvas, look, scene, axis)
    canvas *= 1.06 - 0.16 * (x * x + y * y)  # vignetting of a lens
    tint = np.array([1 + scene.cast, 1, 1 - scene.cast], np.float32)
    canvas *= (scene.exposure * tint)[:, None, None]
    np.clip(canvas, 0, 1, out=canvas)
    return (canvas * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def render_objects(
    looks: Sequence[Look], ground: tuple[float, float, float], size: int, rng: np.random.Generator
) -> Array:
    """Draw one object, or two beside each other, in front of a wall of one colour, as uint8 of shape (size, size, 3).

    The numbers drawn from `rng` do not depend on the looks: other objects get the same places and the same light.

    Parameters
    ----------
    looks
        The objects, from left to right; their `background` is not used.
    ground
        Colour of the wall, RGB from 0 to 1.
    size
        Height and width in pixels.
    rng
        Source of pose and light.
    """
    one = len(looks) == 1
    scale = float(rng.uniform(0.6, 0.75) if one else rng.uniform(0.4, 0.46))
    if one:
        centres = [(rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15))]
    else:
        centres = [(x, rng.uniform(-0.1, 0.1)) for x in (-0.48, 0.48)]
    angle, flip = math.radians(rng.uniform(-MAX_TURN, MAX_TURN)), bool(rng.random() < 0.5)
    azimuth, height = rng.uniform(-1.1, 1.1), rng.uniform(0.75, 1.3)
    far = math.hypot(1, height)
    light = (math.sin(azimuth) / far, -math.cos(azimuth) / far, height / far)
    exposure, jitter = rng.uniform(0.9, 1.1), rng.normal(0, 0.015, 3)
    glow_x, glow_y, floor = rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.0), rng.uniform(0.25, 0.6)

    axis = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size)) - np.float32(1)
    x, y = axis[None, :], axis[:, None]
    glow = np.exp(-0.8 * (np.square(x - glow_x) + np.square(y - glow_y)))
    wall = (0.75 + 0.25 * glow) * (1 - 0.15 * _ease(0.5 + (y - floor) / 0.3))
    canvas = np.empty((3, size, size), np.float32)
    canvas[:] = np.array(ground, np.float32)[:, None, None] * wall
    for look, (cx, cy) in zip(looks, centres, strict=True):
        scene = Scene("", 0, scale, angle, flip, (float(cx), float(cy)), light, exposure, 0, jitter)
        _paint_object(canvas, look, scene, axis)
    canvas *= exposure * (1.04 - 0.1 * (x * x + y * y))
    np.clip(canvas, 0, 1, out=canvas)
    return (canvas * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


# ---------------------------------------------------------------------------------------- the object


def _paint_object(canvas: Array, look: Look, scene: Scene, axis: Array) -> None:
    """Paint shadow and parts of an object over the background, in place."""
    # Objects fill -1 to 1; only shadows and stretched corners reach beyond.
    reach = scene.scale * 1.45
    columns, rows = (
        slice(*np.searchsorted(axis, (middle - reach, middle + reach)).tolist()) for middle in scene.centre
    )
    patch = canvas[:, rows, columns]
    x, y = axis[None, columns] - scene.centre[0], axis[rows, None] - scene.centre[1]
    pixel = float(axis[1] - axis[0]) / scene.scale
    cos, sin = math.cos(scene.angle) / scene.scale, math.sin(scene.angle) / scene.scale
    widen = math.sqrt(look.stretch)
    u = (x * cos + y * sin) * (-1 if scene.flip else 1) / widen
    v = (y * cos - x * sin) * widen

    parts = [(paint, *measure_part(part, u, v)) for paint, part in read_objects()[look.shape][1]]
    # The union of signed distances is their minimum.
    silhouette = np.minimum.reduce([distance for _, distance, _ in parts])
    # The side away from the light is darker, and so is the ground below the object. The shadow is the silhouette, moved
    # away from the light and blurred by its distance field.
    light = scene.light
    fallen = _move(silhouette, -0.16 * light[1] / pixel, -0.16 * light[0] / pixel)
    patch *= 1 - 0.42 * _ease(0.5 - fallen / 0.22)
    if scene.background in _GROUNDS:
        right, down = x / scene.scale + 0.3 * light[0], y / scene.scale - 0.97
        below = np.square(right / 0.85) + np.square(down / 0.2)
        patch *= 1 - 0.5 * np.exp(-1.5 * below)
    # Each of shape (3, 1, 1), over rows and columns of the patch.
    colours = {name: np.array(rgb, np.float32)[:, None, None] for name, rgb in _PAINTS.items()}
    shift = scene.jitter.astype(np.float32)[:, None, None]
    colours["main"] = colours["plain"] = np.array(look.colour, np.float32)[:, None, None] + shift
    colours["accent"] = np.array(look.accent, np.float32)[:, None, None] + shift
    colours["shade"] = colours["main"] * np.float32(0.6)
    cos, sin = math.cos(look.tilt), math.sin(look.tilt)
    for number, (paint, distance, relief) in enumerate(parts):
        # Only the rows and columns that the part and its dark edge touch are painted.
        touched = distance < 0.2
        high, wide = np.flatnonzero(touched.any(axis=1)), np.flatnonzero(touched.any(axis=0))
        if not len(high):
            continue
        window = slice(int(high[0]), int(high[-1]) + 1), slice(int(wide[0]), int(wide[-1]) + 1)
        d, height, under = distance[window], relief[window], patch[:, *window]
        if number:  # a soft dark edge around each part sets it off from the parts behind
            edge = np.exp(-np.square(np.maximum(d, 0) * 14))
            under *= 1 - 0.4 * edge * (silhouette[window] < 0)
        colour = colours[paint]
        if paint == "main":
            swell = (1.3 - 0.4 * height) / look.grain  # a pattern closes up where the surface turns away
            tu = (u[window] * cos + v[window] * sin) * swell
            tv = (v[window] * cos - u[window] * sin) * swell
            mix = TEXTURES[look.texture](tu, tv, pixel * 1.2 / look.grain)
            colour = colour + (colours["accent"] - colour) * mix
        diffuse, gloss = _shade(height, pixel, scene.light)
        colour = colour * diffuse
        colour += gloss
        # In place: under + cover * (colour - under).
        colour -= under
        colour *= _cover(d, pixel)
        under += colour


def _move(field: Array, down: float, right: float) -> Array:
    """Return a field moved by parts of a pixel, between pixels linear; at the edges its outermost values go on."""
    moved = field.astype(np.float64)  # in single precision, a rounded colour may change
    for axis, by in ((0, down), (1, right)):
        n = field.shape[axis]
        place = np.clip(np.arange(n) - by, 0, n - 1)
        left = np.minimum(place.astype(int), max(0, n - 2))
        share = np.expand_dims(place - left, 1 - axis)
        moved = (1 - share) * moved.take(left, axis) + share * moved.take(np.minimum(left + 1, n - 1), axis)
    return moved.astype(field.dtype)


def _shade(relief: Array, pixel: float, light: tuple[float, float, float]) -> tuple[Array, Array]:
    """Return diffuse and specular light of a relief seen from the front, each with the shape of the relief."""
    slope_x, slope_y = np.zeros_like(relief), np.zeros_like(relief)
    np.subtract(relief[:, 2:], relief[:, :-2], out=slope_x[:, 1:-1])
    np.subtract(relief[2:], relief[:-2], out=slope_y[1:-1])
    slope_x *= 0.5 / pixel
    slope_y *= 0.5 / pixel
    length = np.sqrt(slope_x * slope_x + slope_y * slope_y + 1)
    facing = (light[2] - light[0] * slope_x - light[1] * slope_y) / length
    np.maximum(facing, 0, out=facing)
    gloss = facing * facing  # squared four times below: a highlight of exponent 16, after Phong
    gloss *= gloss
    gloss *= gloss
    return 0.42 + 0.72 * facing, 0.2 * gloss * gloss


# --------------------------------------------------------------------------------------- the textures
# Each maps surface coordinates to the share of the accent colour, 0 to 1.


def _band(t: Array, period: float, share: float, pixel: float) -> Array:
    """Stripes along `t`: 1 on `share` of each period, with soft edges."""
    away = np.abs(t - np.round(t / period) * period)
    return _cover(away - 0.5 * share * period, pixel)


def _checks(u: Array, v: Array, pixel: float, period: float = 0.56) -> Array:
    a, b = (0.25 * period - np.abs(np.mod(t, period) - 0.5 * period) for t in (u, v))
    return 0.5 + 0.5 * np.clip(a * (2 / pixel), -1, 1) * np.clip(b * (2 / pixel), -1, 1)


def _dots(u: Array, v: Array, pixel: float, period: float = 0.44) -> Array:
    row = np.round(v / period)
    u = u + 0.5 * period * row
    du, dv = u - np.round(u / period) * period, v - row * period
    return _cover(np.sqrt(du * du + dv * dv) - 0.27 * period, pixel)


def _scales(u: Array, v: Array, pixel: float, period: float = 0.4) -> Array:
    row = np.floor(v / (0.6 * period))
    u = u + 0.5 * period * np.mod(row, 2)
    du, dv = u - np.round(u / period) * period, v - row * (0.6 * period)
    rim = np.sqrt(du * du + dv * dv) / (0.6 * period)
    return np.clip(1.6 * np.abs(rim - 0.45), 0, 1)


TEXTURES: dict[str, Callable[[Array, Array, float], Array]] = {
    "plain": lambda u, v, pixel: np.zeros((), np.float32),
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


def _hsv(hue: float, saturation: float, value: float) -> Array:
    """Return an RGB colour of shape (3, 1, 1)."""
    offset = np.array([5.0, 3.0, 1.0]) + (hue % 1) * 6
    k = np.mod(offset, 6)
    rgb = value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
    return rgb.astype(np.float32)[:, None, None]


def _lerp(a: Array, b: Array, t: Array | float) -> Array:
    mixed = (b - a) * t
    mixed += a
    return mixed


def _studio(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    cx, cy, floor = rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.0), rng.uniform(0.25, 0.6)
    glow = np.exp(-0.8 * (np.square(x - cx) + np.square(y - cy)))
    wall = _lerp(_hsv(hue, 0.55, 0.35), _hsv(hue, 0.35, 0.85), glow)
    return wall * (1 - 0.25 * _ease(0.5 + (y - floor) / 0.3))


def _meadow(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    ox, oy, horizon = rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(-0.25, 0.25)
    hills = horizon - 0.35 * (_fbm(1.5 * x + ox, 0 * y + oy, 1.5 * pixel, 2) - 0.4)
    sky = _lerp(_hsv(0.58, 0.45, 0.85), _hsv(0.56, 0.12, 0.95), _ease(0.5 + 0.5 * (y - horizon)))
    near = np.maximum(y - horizon, 0) + 0.1  # depth below the horizon; its logarithm foreshortens
    grass = _fbm(3 * x + ox, 5 * np.log(near) + oy, 5 * pixel / near.min(initial=0.3), 4)
    ground = _lerp(_hsv(0.2 + 0.14 * hue, 0.7, 0.3), _hsv(0.17 + 0.14 * hue, 0.65, 0.7), grass)
    far = _lerp(sky, _hsv(0.3 + 0.1 * hue, 0.45, 0.4), _cover(hills - y, max(pixel, 0.02)))
    return _lerp(far, ground, _cover(horizon - y, max(pixel, 0.02)))


def _clouds(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    ox, oy = rng.uniform(0, 64, 2).tolist()
    cloud = _fbm(1.3 * x + ox, 2 * y + oy, 2 * pixel, 5)
    sky = _lerp(_hsv(0.5 + 0.2 * hue, 0.7, 0.6), _hsv(0.5 + 0.2 * hue, 0.3, 0.9), 0.5 + 0.5 * y)
    return _lerp(sky, _hsv(0.1, 0.04, 0.97), _ease(3.2 * cloud - 1.2))


def _bokeh(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    scene = _lerp(_hsv(hue, 0.6, 0.3), _hsv(hue + 0.1, 0.6, 0.14), 0.5 + 0.5 * y) + 0 * x
    for cx, cy, radius, turn, glow in rng.uniform(size=(12, 5)).tolist():
        px, py, radius = 2.4 * cx - 1.2, 2.4 * cy - 1.2, 0.12 + 0.2 * radius
        # A disc is small: only its own square of the image is changed.
        columns = slice(*np.searchsorted(x[0], (px - radius, px + radius)).tolist())
        rows = slice(*np.searchsorted(y[:, 0], (py - radius, py + radius)).tolist())
        distance = np.sqrt(np.square(x[:, columns] - px) + np.square(y[rows] - py)) - radius + 0.04
        light = _hsv(hue + 0.3 * (turn - 0.5), 0.6, 0.2 + 0.4 * glow)
        scene[:, rows, columns] += light * _cover(distance, 0.04)
    return scene


def _brick(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    ox, oy = rng.uniform(0, 64, 2).tolist()
    period = rng.uniform(0.28, 0.4)
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


def _planks(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    ox, oy = rng.uniform(0, 64, 2).tolist()
    period = rng.uniform(0.35, 0.55)
    plank = np.floor((x + ox) / period)
    gap = np.abs(x + ox - (plank + 0.5) * period) - 0.5 * period
    grain = _fbm(9 * x + 3 * plank, 1.1 * y + oy + 7.3 * plank, 9 * pixel, 3)
    tone = 0.75 * grain + 0.25 * np.mod(np.sin(plank * 91.7) * 437.5, 1)
    colour = _lerp(_hsv(0.05 + 0.06 * hue, 0.6, 0.3), _hsv(0.07 + 0.06 * hue, 0.5, 0.85), tone)
    return colour * (0.45 + 0.55 * _cover(gap + 0.012, max(pixel, 0.02)))


def _sea(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    ox, oy, horizon = rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(-0.35, 0.1)
    sky = _lerp(_hsv(0.55 + 0.1 * hue, 0.5, 0.75), _hsv(0.08, 0.35, 0.98), _ease(1 + 0.9 * (y - horizon)))
    near = np.maximum(y - horizon, 0) + 0.12
    waves = _fbm(2.2 * x + ox, 9 * np.log(near) + oy, 5 * pixel, 3)
    water = _lerp(_hsv(0.48 + 0.14 * hue, 0.8, 0.3), _hsv(0.48 + 0.12 * hue, 0.4, 0.9), waves * waves * 1.4)
    return _lerp(sky, water, _cover(horizon - y, max(pixel, 0.015)))


def _dunes(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    scene = _lerp(_hsv(0.6, 0.25, 0.85), _hsv(0.1, 0.25, 0.97), _ease(0.9 + 0.8 * y)) + 0 * x
    base = rng.uniform(-0.35, -0.1)
    for layer, (phase, bend) in enumerate(rng.uniform(size=(4, 2)).tolist()):
        line = base + 0.34 * layer + 0.13 * np.sin((1.2 + 1.5 * bend) * x + 6.3 * phase)
        crest, foot = _hsv(0.06 + 0.07 * hue, 0.35, 0.92), _hsv(0.05 + 0.07 * hue, 0.55, 0.55)
        sand = _lerp(crest, foot, _ease((y - line) * 1.6))
        scene = _lerp(scene, sand, _cover(line - y, max(pixel, 0.02)))
    return scene


def _forest(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    ox, oy = rng.uniform(0, 64, 2).tolist()
    leaves = _fbm(2.5 * x + ox, 2.5 * y + oy, 2.5 * pixel, 4)
    dim, lit = _hsv(0.26 + 0.16 * hue, 0.75, 0.14), _hsv(0.2 + 0.16 * hue, 0.6, 0.75)
    scene = _lerp(dim, lit, _ease(2 * leaves - 0.55))
    for place, width, tone in rng.uniform(size=(5, 3)).tolist():
        distance = np.abs(x - 2.2 * place + 1.1 + 0.04 * np.sin(3 * y + 9 * place)) - 0.04 - 0.08 * width
        scene = _lerp(scene, _hsv(0.07, 0.45, 0.15 + 0.2 * tone), 0.9 * _cover(distance, 0.05))
    return scene


def _tiles(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    ox, oy, horizon = rng.uniform(0, 8), rng.uniform(0, 8), rng.uniform(-0.1, 0.25)
    depth = 0.55 / (np.maximum(y - horizon, 0) + 0.25)
    footprint = pixel * depth * depth * 2
    a, b = (0.25 - np.abs(np.mod(t, 1) - 0.5) for t in (1.4 * x * depth + ox, 2.6 * depth + oy))
    check = 0.5 + 0.5 * np.clip(a * 2 / footprint, -1, 1) * np.clip(b * 2 / footprint, -1, 1)
    floor = _lerp(_hsv(hue, 0.35, 0.35), _hsv(hue, 0.1, 0.85), check)
    wall = _hsv(hue + 0.5, 0.3, 0.75) * (0.85 - 0.25 * y)
    skirting = _cover(np.abs(y - horizon + 0.04) - 0.04, max(pixel, 0.02))
    return _lerp(_lerp(wall, floor, _cover(horizon - y, max(pixel, 0.02))), _hsv(hue, 0.1, 0.9), skirting)


def _city(x: Array, y: Array, pixel: float, hue: float, rng: np.random.Generator) -> Array:
    dusk, glow = _hsv(0.6 + 0.2 * hue, 0.75, 0.2), _hsv(0.9 + 0.15 * hue, 0.6, 0.7)
    scene = _lerp(dusk, glow, _ease(0.6 + 0.6 * y)) + 0 * x
    for place, width, top, phase in rng.uniform(size=(7, 4)).tolist():
        px, half, top = 2.2 * place - 1.1, 0.12 + 0.14 * width, -0.7 + 0.9 * top
        soft = max(pixel, 0.02)
        # Only the tower and its soft edge are changed.
        columns = slice(*np.searchsorted(x[0], (px - half - 2 * soft, px + half + 2 * soft)).tolist())
        rows = slice(int(np.searchsorted(y[:, 0], top - 2 * soft)), None)
        right, down, under = x[:, columns] - px, y[rows], scene[:, rows, columns]
        tower = _cover(np.maximum(np.abs(right) - half, top - down), soft)
        under[:] = _lerp(under, _hsv(0.62 + 0.1 * hue, 0.45, 0.12 + 0.1 * phase), tower)
        window = _band(right, 0.13, 0.4, pixel) * _band(down - top - 0.1, 0.15, 0.4, pixel)
        room = np.round(right / 0.13) * 12.9 + np.round((down - top - 0.1) / 0.15) * 78.2
        lit = np.mod(np.sin(room + 40 * phase) * 437, 1) > 0.45
        under[:] = _lerp(under, _hsv(0.12, 0.5, 0.95), 0.8 * tower * window * lit)
    return scene


BACKGROUNDS: dict[str, Callable[[Array, Array, float, float, np.random.Generator], Array]] = {
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
# The background has a floor below the object, so a contact shadow is drawn on it.
_GROUNDS = ("studio", "meadow", "dunes", "tiles", "sea")


# --------------------------------------------------------------------------------- edges and noise


def _cover(distance: Array, softness: float) -> Array:
    """Share of a pixel inside an edge: 1 at -softness, 0 at +softness, smooth between."""
    return _ease(0.5 - distance * (0.5 / softness))


def _ease(t: Array) -> Array:
    t = np.minimum(np.maximum(t, 0), 1)  # faster than np.clip on small arrays
    return t * t * (3 - 2 * t)


@lru_cache(maxsize=1)
def _noise_table() -> Array:
    """Random heights on a 64 x 64 lattice that repeats; the same in every scene, only shifted."""
    # The seed is the year of the paper [1]_.
    table = np.random.Generator(np.random.Philox(1985)).random((64, 64), dtype=np.float32)
    table.setflags(write=False)
    return table


def _noise(x: Array, y: Array) -> Array:
    """Value noise between 0 and 1 with one random height per unit; broadcasts `x` and `y`."""
    table = _noise_table()
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (t * t * (3 - 2 * t) for t in (x - x0, y - y0))
    ix, iy = x0.astype(np.int32), y0.astype(np.int32)
    ix1, iy1 = (ix + 1) & 63, (iy + 1) & 63
    ix, iy = ix & 63, iy & 63
    if len(x) == 1 and y.shape[1] == 1:
        # The heights between two columns of the lattice are the same in every row of pixels: (64, w).
        near = table[:, ix[0]]
        rows = near + (table[:, ix1[0]] - near) * fx
        near, far = rows[iy[:, 0]], rows[iy1[:, 0]]
    else:
        iy, iy1 = iy * 64, iy1 * 64  # rows of the flattened table
        near, far = table.take(iy + ix), table.take(iy1 + ix)
        near += (table.take(iy + ix1) - near) * fx
        far += (table.take(iy1 + ix1) - far) * fx
    far -= near
    far *= fy
    near += far
    return near


def _fbm(x: Array, y: Array, pixel: float, octaves: int) -> Array:
    """Sum of octaves of noise between 0 and 1; octaves finer than two pixels fade to their mean."""
    total: Array = np.zeros((), np.float32)
    weight = 0.5
    for octave in range(octaves):
        step = 2.0**octave
        # The sum of octaves of Perlin [1]_; detail finer than a pixel would appear as speckle.
        seen = float(np.clip(2 - 2.5 * step * pixel, 0, 1))
        if seen > 0:
            total = total + weight * (0.5 + seen * (_noise(x * step + 17.3 * octave, y * step) - 0.5))
        else:
            total = total + weight * 0.5
        weight *= 0.5
    return total + weight
