"""Pictures and prompts that are broken, absurd or merely odd; each takes its randomness from the caller."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mutations import cut, flip, grow


def picture(rng: random.Random, work: Path) -> tuple[str, Any]:
    """A picture argument that is broken, absurd or merely odd."""
    name, make = rng.choice(_PICTURES)
    made = make(rng)
    if isinstance(made, bytes) and rng.random() < 0.5:
        path = work / ("picture" + rng.choice([".png", ".jpg", ".webp", ".txt", ""]))
        path.write_bytes(made)
        return name, path
    return name, made


def _drawn(rng: random.Random) -> Image.Image:
    size = (rng.randint(1, 40), rng.randint(1, 40))
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    return Image.fromarray(noise).convert(rng.choice(["RGB", "RGBA", "L", "P", "LA", "1", "CMYK", "I;16"]))


def _encoded(rng: random.Random) -> bytes:
    image, out = _drawn(rng), io.BytesIO()
    kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "EPS"])
    try:
        image.save(out, kind)
    except Exception:
        image.convert("RGB").save(out := io.BytesIO(), "PNG" if kind == "EPS" else kind)
    return out.getvalue()


def _sized(rng: random.Random) -> bytes:
    """A header that claims absurd sizes, with a right checksum where the format has one."""
    sides = (0, 1, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**32 - 1)
    width, height = rng.choice(sides), rng.choice(sides)
    data = bytearray(encoded_as("PNG", Image.new("RGB", (4, 4))))
    kind = rng.choice(["png", "gif", "bmp"])
    if kind == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    elif kind == "gif":
        data = bytearray(encoded_as("GIF", Image.new("P", (4, 4))))
        data[6:10] = struct.pack("<HH", width % 65536, height % 65536)
    else:
        data = bytearray(encoded_as("BMP", Image.new("RGB", (4, 4))))
        data[18:26] = struct.pack("<II", width, height)
    return bytes(data)


def encoded_as(kind: str, image: Image.Image) -> bytes:
    image.save(out := io.BytesIO(), kind)
    return out.getvalue()


def _large(rng: random.Random) -> bytes:
    """A small file of up to 60 megapixels; 50 are allowed."""
    mode = rng.choice(["L", "P", "RGBA", "LA", "1"])
    return encoded_as("PNG", Image.new(mode, (rng.choice([100, 7000, 10_000]), rng.choice([5000, 6000, 7000]))))


def _array(rng: random.Random) -> Any:
    shape = rng.choice([(0, 4, 3), (4, 0, 3), (4, 4), (4, 4, 1), (4, 4, 2), (4, 4, 5), (1, 4, 4, 3), (), (7,)])
    kind = rng.choice([np.uint8, np.float32, np.int64, np.bool_, object, "U3"])
    return rng.choice(
        [
            lambda: np.zeros(shape, kind),
            lambda: np.broadcast_to(np.zeros(3, np.uint8), (10**5, 10**5, 3)),
            lambda: np.zeros((9, 9, 3), np.uint8)[::-2, ::3],
            lambda: np.full((4, 4, 3), np.nan),
        ]
    )()


def _odd(rng: random.Random) -> Any:
    values = [None, 3, 1.5, {}, [], object(), "", "/", ".", "/dev/zero", "/no/such", "\0", "a" * 5000, "x\ud800", b""]
    return rng.choice([*values, Path(), Image.new("RGB", (0, 0)), Image.new("RGB", (0, 5)), Image.new("F", (3, 3))])


_PICTURES: list[tuple[str, Callable[[random.Random], Any]]] = [
    ("whole", _encoded),
    *[("flip", lambda rng: flip(_encoded(rng), rng))] * 4,
    *[("cut", lambda rng: cut(_encoded(rng), rng))] * 2,
    ("grow", lambda rng: grow(_encoded(rng), rng)),
    ("noise", lambda rng: rng.randbytes(rng.randint(0, 300))),
    ("noise after a header", lambda rng: _encoded(rng)[:16] + rng.randbytes(200)),
    *[("absurd size", _sized)] * 2,
    ("array", _array),
    ("odd", _odd),
]
_PICTURES = [*_PICTURES * 6, ("large", _large)]  # a large one takes a second


def prompt(rng: random.Random) -> tuple[str, Any]:
    """A prompt that is broken, hostile or merely odd."""
    name, make = rng.choice(_PROMPTS)
    return name, make(rng)


def _unicode(rng: random.Random) -> str:
    ranges = ((0, 31), (32, 126), (0x80, 0x2FF), (0x300, 0x36F), (0x200B, 0x206F), (0x4E00, 0x4EFF), (0x1F300, 0x1F6FF))
    ranges = (*ranges, (0xD800, 0xDFFF), (0xE000, 0xE0FF), (0x10FF00, 0x10FFFF), (0xFFF0, 0xFFFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 30)))


def _special_token(rng: random.Random) -> str:
    token = rng.choice(["<image>", "</s>", "<s>", "<unk>", "<|im_end|>", "[INST]"])
    return "what " + rng.choice([token, token.upper(), "\u200b".join(token), token.replace("<", "＜"), token * 40]) + "?"


_PROMPTS: list[tuple[str, Callable[[random.Random], Any]]] = [
    ("unicode", _unicode),
    ("unicode", _unicode),
    ("special token", _special_token),
    ("long", lambda rng: rng.choice("ab é\n") * rng.choice([40, 60, 1000, 10**6])),
    ("blank", lambda rng: rng.choice(["", " ", "\n\t", "\u3000", "\0"])),
    ("chat text", lambda rng: "x A: yes U y" + _unicode(rng)),
    ("odd", lambda rng: rng.choice([None, 3, b"what?", ["what?"], {"a": 1}, 1.5, True])),
]
