"""Pictures of the reference world, drawn with Pillow from a seed.

A picture is either a scene (one to four objects on a textured, cluttered ground), typographic (a word or a two-word request
in one of several fonts), or shows nothing that has a name. Everything that makes two pictures of the same thing differ (pose,
scale, shear, outline, colour, ground, clutter, noise, blur) comes from the random generator that is passed in, so a picture
is a function of its `Scene` and a seed.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edgesafe.reference.kinds import BY_NAME, HUE, Kind, Part

SIZE = 72  # picture side, pixels
_OVER = 2  # supersampling while drawing

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 215, 50),
    "green": (50, 160, 65),
    "blue": (45, 95, 215),
    "purple": (130, 60, 175),
    "pink": (240, 145, 190),
    "grey": (135, 135, 140),
}
POSITIONS = ("only", "left", "right", "top", "bottom")
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Oblique.ttf")
# Looks that no training picture has: other fonts, half of them in capitals, inked in colour; pictures that something spoilt.
OTHER_FONTS = ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmr10.ttf", "cmss10.ttf", "cmtt10.ttf")
FONT, SPOILT = "font", "spoilt"
# Pictures of nothing, by the split that they are drawn in.
NOTHING = {
    "align": (
        "noise", "flat", "stripes", "ground", "checks", "dots", "haze", "speckles", "boxes", "bands", "weave", "clouds",
        "tiles", "corner", "waves",
    ),
    "val": ("rings",),
    "cert": ("white", "static", "blobs"),
    "test": ("black", "ramp", "scribble"),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One object of a scene: what it is, its colour, and where it stands (one of `POSITIONS` or "free")."""

    kind: str
    colour: str
    position: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: objects, or else `text` (lines separated by a newline), or else nothing.

    ``look`` is `FONT` or `SPOILT` where it is drawn in a way of its own, and one of `NOTHING` where it shows nothing.
    """

    items: tuple[Item, ...] = ()
    text: str = ""
    look: str = ""


@dataclass(frozen=True)
class Placed:
    """Where an object (or a line of text) ended up: centre and half side (half height) in pixels of the finished picture."""

    index: int
    x: float
    y: float
    half: float


def draw(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, tuple[Placed, ...]]:
    """Draw a scene.

    Args:
        scene: what to show.
        rng: source of every variation.

    Returns:
        An RGB picture of `SIZE` x `SIZE` pixels, and where each item (or line of text) was placed.
    """
    side = SIZE * _OVER
    if not scene.items and not scene.text:
        return _nothing(scene.look, rng), ()
    picture = _ground(rng, side)
    canvas = ImageDraw.Draw(picture)
    _clutter(canvas, rng, side, count=int(rng.integers(1, 5)))
    if scene.text:
        placed = _write(picture, scene, rng, side)
    else:
        places = _places(scene, rng)
        for item, place in zip(scene.items, places, strict=True):
            _object(canvas, BY_NAME[item.kind], COLOURS[item.colour], place, rng)
        placed = tuple(Placed(i, p[0] / _OVER, p[1] / _OVER, p[2] / _OVER) for i, p in enumerate(places))
    _clutter(canvas, rng, side, count=int(rng.integers(0, 2)), thin=True)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.0))))
    small = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    if scene.look == SPOILT:
        small = _spoil(small, rng)
    noise = rng.normal(0.0, float(rng.uniform(1.0, 6.0)), (SIZE, SIZE, 3))
    pixels = np.clip(np.asarray(small, np.float32) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), placed


def _nothing(look: str, rng: np.random.Generator) -> Image.Image:
    """A picture in which there is nothing to name."""
    if look in ("white", "black"):
        return Image.new("RGB", (SIZE, SIZE), look)
    if look in ("noise", "static"):
        cells = SIZE if look == "noise" else int(rng.integers(9, 37))
        shades = rng.integers(0, 256, (cells, cells, 3 if look == "noise" else 1), dtype=np.uint8)
        return Image.fromarray(np.broadcast_to(shades, (cells, cells, 3)).copy()).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    if look in ("clouds", "tiles"):
        cells = int(rng.integers(3, 9))
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        way = Image.Resampling.BICUBIC if look == "clouds" else Image.Resampling.NEAREST
        return small.resize((SIZE, SIZE), way)
    if look == "ground":
        picture = _ground(rng, SIZE)
        _clutter(ImageDraw.Draw(picture), rng, SIZE, count=int(rng.integers(1, 6)))
        return picture
    yy, xx = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    colours = rng.uniform(0, 255, (2, 3))
    angle, waves = rng.uniform(0, 2 * math.pi), rng.uniform(8, 40)
    across = xx * math.cos(angle) + yy * math.sin(angle)
    share = {
        "flat": np.zeros_like(xx),
        "stripes": (np.sin(across * waves) > 0).astype(float),
        "rings": (np.sin(np.hypot(xx - 0.5, yy - 0.5) * waves * 2) > 0).astype(float),
        "ramp": (across + 1.5) / 3,
        "checks": (np.sin(xx * waves) * np.sin(yy * waves) > 0).astype(float),
        "dots": (np.sin(xx * waves) * np.sin(yy * waves) > 0.7).astype(float),
        "haze": (np.sin(xx * waves / 4 + yy * 3) + np.cos(yy * waves / 5) + 2) / 4,
        "bands": np.round((np.sin(across * waves / 3) + 1) * 2) / 4,
        "corner": (yy > xx * waves / 20).astype(float),
        "waves": (np.sin(yy * waves + 3 * np.sin(xx * waves / 3)) + 1) / 2,
        "weave": (np.sin(xx * waves) + np.sin(yy * waves) + 2) / 4,
        "speckles": (rng.random((SIZE, SIZE)) < 0.1).astype(float),
    }.get(look, np.zeros_like(xx))
    picture = Image.fromarray((colours[0] + (colours[1] - colours[0]) * share[..., None]).astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(6, 16)) if look in ("blobs", "boxes", "scribble") else 0):
        x, y, dx, dy = rng.uniform(0, SIZE, 4)
        fill = tuple(int(c) for c in rng.uniform(0, 255, 3))
        if look == "blobs":
            canvas.ellipse((x - dx / 4, y - dy / 4, x + dx / 4, y + dy / 4), fill=fill)
        elif look == "boxes":
            canvas.rectangle((x - dx / 3, y - dy / 5, x + dx / 3, y + dy / 5), fill=fill)
        else:
            canvas.line((x, y, dx, dy), fill=fill, width=int(rng.integers(1, 4)))
    return picture


def _spoil(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A picture that is too dark or too bright, out of focus, without its colours, or partly hidden."""
    match int(rng.integers(5)):
        case 0:
            return picture.point(lambda v: int(v * 0.3))
        case 1:
            return picture.point(lambda v: int(140 + v * 0.45))
        case 2:
            return picture.filter(ImageFilter.GaussianBlur(2))
        case 3:
            return picture.convert("L").convert("RGB")
    x, y = (int(v) for v in rng.uniform(0.1, 0.6, 2) * SIZE)
    hidden = picture.copy()
    hidden.paste(tuple(int(c) for c in rng.uniform(30, 235, 3)), (x, y, x + SIZE // 3, y + SIZE // 3))
    return hidden


def _ground(rng: np.random.Generator, side: int) -> Image.Image:
    """A textured ground: a gradient between two pale or dim colours, sometimes with stripes or checks."""
    base = rng.uniform(150, 250, 3) if rng.random() < 0.85 else rng.uniform(20, 90, 3)
    other = np.clip(base + rng.normal(0, 25, 3), 0, 255)
    yy, xx = _grid(side)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (xx * math.cos(angle) + yy * math.sin(angle) + 1.5) / 3.0
    kind = rng.random()
    if kind < 0.25:
        ramp = ramp + 0.25 * np.sign(np.sin((xx * math.cos(angle) - yy * math.sin(angle)) * rng.uniform(15, 50)))
    elif kind < 0.4:
        f = rng.uniform(10, 35)
        ramp = ramp + 0.25 * np.sign(np.sin(xx * f) * np.sin(yy * f))
    ground = (other - base)[:, None, None] * ramp  # channels first: numpy is slow along an axis of three
    ground += base[:, None, None]
    np.clip(ground, 0, 255, out=ground)
    return Image.fromarray(np.ascontiguousarray(ground.astype(np.uint8).transpose(1, 2, 0)))


@cache
def _grid(side: int) -> np.ndarray:
    """Rows and columns of a square's pixels, from 0 to 1: [2, side, side]."""
    return np.mgrid[0:side, 0:side].astype(np.float32) / side


def _clutter(canvas: ImageDraw.ImageDraw, rng: np.random.Generator, side: int, count: int, thin: bool = False) -> None:
    """Strokes and specks that belong to nothing; `thin` ones may cross an object."""
    for _ in range(count):
        x, y = rng.uniform(0, side, 2)
        colour = tuple(int(c) for c in rng.uniform(30, 235, 3))
        if thin or rng.random() < 0.5:
            dx, dy = rng.normal(0, side / 5, 2)
            canvas.line((x, y, x + dx, y + dy), fill=colour, width=1 if thin else int(rng.integers(1, 4)))
        else:
            r = rng.uniform(1, side / 20)
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _places(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and half side of every item, in supersampled pixels."""
    side = SIZE * _OVER
    if scene.items[0].position == "free":
        cells = rng.permutation(4)[: len(scene.items)]
        return [
            (
                side * (0.26 + 0.48 * (c % 2)) + rng.normal(0, 2),
                side * (0.26 + 0.48 * (c // 2)) + rng.normal(0, 2),
                side * float(rng.uniform(0.19, 0.22)),
            )
            for c in cells
        ]
    centre = {"only": (0.5, 0.5), "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
    out = []
    for item in scene.items:
        cx, cy = centre[item.position]
        alone = item.position == "only"
        half = float(rng.uniform(0.30, 0.44) if alone else rng.uniform(0.21, 0.25))
        slack = min(0.5 - half, 0.1) if alone else 0.03
        across = slack if item.position in ("top", "bottom") else 0.03
        if alone:
            across = slack
        elif item.position in ("left", "right"):
            slack, across = 0.1, 0.02  # freer along the other axis
        else:
            slack, across = 0.02, 0.1
        out.append(
            (side * (cx + float(rng.uniform(-across, across))), side * (cy + float(rng.uniform(-slack, slack))), side * half)
        )
    return out


def _outline(part: Part) -> np.ndarray:
    """A part's vertices, [n, 2] in the unit square; curves become polygons so that one transform serves all."""
    if part.shape in ("polygon", "line"):
        return np.asarray(part.points, np.float64)
    (cx, cy), (rx, ry) = part.points[0], part.points[1]
    start, end = part.points[2] if part.shape == "arc" else (0.0, 360.0)
    angles = np.radians(np.linspace(start, end, 20))
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], 1)


def _tint(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255.0 * np.asarray(colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def _object(
    canvas: ImageDraw.ImageDraw,
    kind: Kind,
    colour: tuple[int, int, int],
    place: tuple[float, float, float],
    rng: np.random.Generator,
) -> None:
    """Draw one object with its own pose, outline wobble and shades."""
    x, y, half = place
    turn = math.radians(float(rng.normal(0, 8)))
    shear, stretch = float(rng.normal(0, 0.06)), float(rng.uniform(0.85, 1.12))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    rotate = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    transform = rotate @ np.array([[mirror * stretch, shear], [0.0, 1.0]]) * half
    main = np.clip(np.asarray(colour) + rng.normal(0, 14, 3), 0, 255)
    hue = HUE[kind.name] + float(rng.normal(0, 0.012))
    fills = {
        "main": main,
        "shade": main * float(rng.uniform(0.5, 0.7)),
        "accent": _tint(hue, 0.9, float(rng.uniform(0.75, 1.0))),
        "dark": _tint(hue, 0.9, float(rng.uniform(0.2, 0.35))),
        "light": _tint(hue, 0.35, float(rng.uniform(0.9, 1.0))),
    }
    for part in kind.parts:
        points = _outline(part)
        points = points + rng.normal(0, 0.012, points.shape)
        pixels = [(float(px), float(py)) for px, py in points @ transform.T + (x, y)]
        fill = tuple(int(c) for c in fills[part.fill])
        if part.shape in ("polygon", "ellipse"):
            canvas.polygon(pixels, fill=fill)
        else:
            width = max(1, round(part.width * half * float(rng.uniform(0.8, 1.2))))
            canvas.line(pixels, fill=fill, width=width, joint="curve")


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # DejaVu, the fonts that matplotlib carries, are the same on every machine

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _write(picture: Image.Image, scene: Scene, rng: np.random.Generator, side: int) -> tuple[Placed, ...]:
    """Write one or two lines of text across the picture, as wide as they go; where each line stands."""
    other = scene.look == FONT
    fonts = OTHER_FONTS if other else FONTS
    name = fonts[int(rng.integers(len(fonts)))]
    lines = (scene.text.upper() if other and rng.random() < 0.5 else scene.text).split("\n")
    longest = max(lines, key=len)
    size = 44
    room = side * float(rng.uniform(0.86, 0.97))
    while size > 8 and _font(name, size).getlength(longest) > room:
        size -= 1
    font = _font(name, size)
    corner = np.asarray(picture.getpixel((side // 2, side // 2)), np.float64)
    ink = rng.uniform(0, 60, 3) if corner.mean() > 120 else rng.uniform(200, 255, 3)
    if other:
        ink = np.asarray(list(COLOURS.values())[int(rng.integers(len(COLOURS)))])
    layer = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(layer)
    height = size * 1.15
    top = side / 2 - height * len(lines) / 2 + float(rng.uniform(-0.05, 0.05)) * side
    for i, line in enumerate(lines):
        width = font.getlength(line)
        pen.text(((side - width) * float(rng.uniform(0.4, 0.6)), top + i * height), line, fill=255, font=font)
    layer = layer.rotate(float(rng.normal(0, 3)), resample=Image.Resampling.BILINEAR)
    picture.paste(tuple(int(c) for c in ink), mask=layer)
    return tuple(Placed(i, SIZE / 2, (top + height * (i + 0.5)) / _OVER, height / 2 / _OVER) for i in range(len(lines)))
