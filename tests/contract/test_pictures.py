"""What a picture file shows, by hand: EXIF's eight orientations, every mode, 16 bits, and what is refused.

No value here comes from Pillow's or transformers' own conversion: both clip 16-bit grey at 255.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edgesafe.checkpoint.exit_model import open_images
from edgesafe.errors import InputError
from edgesafe.format import pictures
from edgesafe.format.pictures import open_picture, picture_size
from edgesafe.format.specs import ImageSpec
from edgesafe.format.suite import Row, read_suite, write_suite
from edgesafe.requests.sources import Plan, Source
from edgesafe.requests.suite import import_suite
from edgesafe.runtime import Session
from edgesafe.runtime.image import load_picture, preprocess

# value * 255 / 65535 = value / 257: 128 / 257 = 0.498, 129 / 257 = 0.502, 385 / 257 = 1.498, 386 / 257 = 1.502,
# 32767 / 257 = 127.498, 32768 / 257 = 127.502, 0x1234 = 4660 / 257 = 18.13, 65406 / 257 = 254.498, 65407 / 257 = 254.502.
RAMP = {0: 0, 128: 0, 129: 1, 255: 1, 385: 1, 386: 2, 4660: 18, 32767: 127, 32768: 128, 65406: 254, 65407: 255, 65535: 255}
VALUES, WANTED = np.array([list(RAMP)], np.uint16), np.array([list(RAMP.values())], np.uint8)
# Three wide and two high, so that no two of the eight orientations look alike.
UPRIGHT = np.array([[[250, 0, 0], [9, 9, 9], [0, 250, 0]], [[0, 0, 250], [9, 9, 9], [250, 250, 0]]], np.uint8)
LYING = UPRIGHT.transpose(1, 0, 2)  # its rows are the upright picture's columns
# Where the stored rows and columns begin, by the EXIF specification's table: "row 0 is the visual right, column 0 the top".
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: LYING,  # left, top
    6: LYING[::-1],  # right, top
    7: LYING[::-1, ::-1],  # right, bottom
    8: LYING[:, ::-1],  # left, bottom
}


def png(samples: np.ndarray, *, clear: tuple[int, ...] = (), orientation: int = 1, bits: int = 16, lines: bytes = b"") -> bytes:
    """A PNG by the specification, without Pillow. samples: uint16 [H, W, C], C = 1, 2, 3 or 4; else: `lines`."""
    height, width, channels = samples.shape
    head = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = lines or b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = [(b"IHDR", head)]
    parts += [(b"tRNS", struct.pack(f">{channels}H", *clear))] if clear else []
    if orientation != 1:
        parts.append((b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">H", orientation) + bytes(6)))
    parts += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


# Every way that a picture file takes into the product, as the RGB values that arrive.
def by_ask(path: Path) -> np.ndarray:
    plain = ImageSpec(1, 1, "none", (), "bicubic", False, 1.0, (0.0,) * 3, (1.0,) * 3)
    return preprocess(path, plain)[0].transpose(1, 2, 0).astype(np.uint8)


def by_import(path: Path) -> np.ndarray:
    path.with_name("requests.csv").write_text(f"prompt,class,image\nWhat is it?,harmless,{path.name}\n")
    plan = Plan((Source(path.parent / "requests.csv"),))
    suite = import_suite(plan, path.parent / "imported", report_only=True).suite
    return stored(suite.image_path(suite.rows[0]))


def by_own_suite(path: Path) -> np.ndarray:
    row = Row("a", "harmless", "f", "images/a.png", "What is it?", "A pen.", (), "t", False)
    with Image.open(path) as picture:
        suite = write_suite(path.parent / "written", [row], {"images/a.png": picture}, "n", "train")
    return stored(suite.image_path(row))


def by_training_and_evaluation(path: Path) -> np.ndarray:
    return np.asarray(open_images([path])[0])


def by_export(path: Path) -> np.ndarray:
    from edgesafe_export.export import probes

    row = Row("a", "harmless", "f", "images/a.png", "What is it?", "A pen.", (), "t", False)
    write_suite(path.parent / "sealed", [row], {"images/a.png": path.read_bytes()}, "n", "cert")
    family = SimpleNamespace(geometry=SimpleNamespace(image_size=8))
    job = SimpleNamespace(suite=read_suite(path.parent / "sealed"), family=family)
    return np.asarray(probes(job)[0][0])


def stored(path: Path) -> np.ndarray:
    """The values of an 8-bit RGB PNG without anything that could change how it looks."""
    with Image.open(path) as picture:
        assert picture.mode == "RGB" and not picture.getexif() and "transparency" not in picture.info
        return np.asarray(picture)


WAYS = [by_ask, by_import, by_own_suite, by_training_and_evaluation, by_export]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("orientation", STORED)
def test_every_way_in_stands_a_picture_upright(tmp_path, orientation, way):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(tmp_path / "p.png", exif=exif)
    assert way(tmp_path / "p.png").tolist() == UPRIGHT.tolist()
    assert picture_size(tmp_path / "p.png") == (2, 3)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_scales_16_bit_grey(tmp_path, way):
    (tmp_path / "p.png").write_bytes(png(VALUES[:, :, None]))
    assert way(tmp_path / "p.png").tolist() == rgb(WANTED).tolist()


@pytest.mark.parametrize("orientation", STORED)
def test_16_bit_grey_that_lies_down_is_stood_upright(orientation):
    samples = STORED[orientation][:, :, :1].astype(np.uint16) * 257  # 257 v is v in 16 bits
    assert np.asarray(open_picture(png(samples, orientation=orientation))).tolist() == rgb(UPRIGHT[:, :, 0]).tolist()


def test_a_tall_ramp_of_all_16_bit_values():
    # More rows than a strip; every value, against arithmetic in floats that no half makes doubtful.
    values = np.arange(65536, dtype=np.uint16).reshape(1024, 64)
    wanted = np.rint(values.astype(np.float64) * 255 / 65535).astype(np.uint8)
    assert np.array_equal(np.asarray(open_picture(png(values[:, :, None]))), rgb(wanted))


@pytest.mark.parametrize(
    "table",
    [bytes(min(v, 255) for v in range(65536)), bytes(v >> 8 for v in range(65536)), bytes(v // 257 for v in range(65536))],
    ids=["clipped", "high byte", "rounded down"],
)
def test_a_wrong_scale_is_seen(monkeypatch, table):
    monkeypatch.setattr(pictures, "EIGHT_BITS", table)
    assert np.asarray(open_picture(png(VALUES[:, :, None]))).tolist() != rgb(WANTED).tolist()


def _in_memory(mode: str) -> Image.Image:
    if mode == "I":
        return Image.fromarray(VALUES.astype(np.int32))
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, VALUES.shape[::-1], VALUES.astype(order).tobytes())


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_pil_images_of_16_bit_grey(mode):
    picture = _in_memory(mode)
    assert picture.mode == mode
    assert np.asarray(open_picture(picture)).tolist() == rgb(WANTED).tolist()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_arrays_of_16_bits(order, channels):
    array = VALUES.astype(order) if not channels else np.repeat(VALUES[:, :, None], channels, axis=2).astype(order)
    assert np.asarray(load_picture(array)).tolist() == rgb(WANTED).tolist()


def test_16_bit_alpha_shows_white_where_it_is_clear():
    colour = np.array([[[0xFFFF, 0, 0, 0xFFFF], [0xFFFF, 0, 0, 0]]], np.uint16)
    assert np.asarray(open_picture(png(colour))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert np.asarray(load_picture(colour)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey = np.array([[[0x8080, 0xFFFF], [0x8080, 0]]], np.uint16)
    assert np.asarray(open_picture(png(grey))).tolist() == [[[128] * 3, [255] * 3]]


@pytest.mark.parametrize(("bits", "packed", "step"), [(1, b"\x40", 255), (2, b"\x10", 85), (4, b"\x01", 17), (8, b"\0\x01", 1)])
def test_a_transparent_value_of_few_bits_shows_white(bits, packed, step):
    # Two pixels, 0 and 1; one of them is the transparent value.
    for clear in (0, 1):
        file = png(np.zeros((1, 2, 1), np.uint16), clear=(clear,), bits=bits, lines=b"\0" + packed)
        wanted = [255 if value == clear else value * step for value in (0, 1)]
        assert np.asarray(open_picture(file)).tolist() == [[[value] * 3 for value in wanted]]


def test_16_bit_colour_is_right_to_within_one_level():
    shown = np.asarray(open_picture(png(np.repeat(VALUES[:, :, None], 3, axis=2)))).astype(int)
    assert np.abs(shown - rgb(WANTED)).max() <= 1
    whole = np.array([[[7 * 257, 100 * 257, 255 * 257]]], np.uint16)  # what a program writes that widens 8 bits
    assert np.asarray(open_picture(png(whole))).tolist() == [[[7, 100, 255]]]


def test_a_transparent_16_bit_value_shows_white():
    grey = np.array([[[40 * 257], [41 * 257]]], np.uint16)
    assert np.asarray(open_picture(png(grey, clear=(40 * 257,)))).tolist() == [[[255] * 3, [41] * 3]]
    colour = np.array([[[40 * 257, 0, 0], [0, 0, 0]]], np.uint16)
    assert np.asarray(open_picture(png(colour, clear=(40 * 257, 0, 0)))).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize(
    ("mode", "pixel", "shown"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),
        ("La", (77, 255), (77, 77, 77)),
        ("La", (0, 0), (255, 255, 255)),
        ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
        ("RGBa", (1, 2, 3, 255), (1, 2, 3)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (77, 128, 128), (77, 77, 77)),
        ("HSV", (0, 0, 77), (77, 77, 77)),
        ("I", 0, (0, 0, 0)),
    ],
)
def test_modes_of_pil_images(mode, pixel, shown):
    picture = open_picture(Image.new(mode, (3, 70), pixel))
    assert picture.mode == "RGB" and np.unique(np.asarray(picture).reshape(-1, 3), axis=0).tolist() == [list(shown)]


def test_a_palette_shows_its_colours_and_white_where_it_is_clear():
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 8, 7, 1, 2, 3])
    picture.putpixel((1, 0), 1)
    assert np.asarray(open_picture(picture)).tolist() == [[[9, 8, 7], [1, 2, 3]]]
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=b"\xff\x00")  # an alpha for each colour
    assert np.asarray(open_picture(file.getvalue())).tolist() == [[[9, 8, 7], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_palette_with_alpha_of_its_own_shows_white_where_it_is_clear(orientation):
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 200, 0))
    picture = picture.quantize(4)  # its palette has four channels, and its info says nothing of it
    picture.getexif()[0x0112] = orientation
    assert np.asarray(open_picture(picture)).reshape(-1, 3).tolist() == [[200, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("F", (2, 2), 0.5),
        Image.new("F", (2, 2), 200.0),
        Image.new("I", (2, 2), -1),
        Image.new("I", (2, 2), 65536),
        Image.new("L", (2, 2), 200).convert("I"),  # keeps 200, which in 16 bits would be nearly black
    ],
    ids=["F to 1", "F to 255", "below 0", "above 16 bits", "8 bits in I"],
)
def test_values_without_a_known_white_are_refused(picture):
    with pytest.raises(InputError, match="white is unknown") as caught:
        open_picture(picture)
    assert caught.value.expected and "mode L" in str(caught.value.todo)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.float32, np.float64, np.bool_])
def test_arrays_of_other_types_are_refused(dtype):
    with pytest.raises(InputError, match="the array is"):
        load_picture(np.ones((2, 2), dtype))


@pytest.mark.parametrize("way", [by_ask, by_import, by_training_and_evaluation, by_export])
@pytest.mark.parametrize("fault", ["cut", "empty", "text", "large", "tiff"])
def test_every_way_in_refuses_what_it_cannot_show(tmp_path, monkeypatch, way, fault):
    path, whole = tmp_path / "p.png", png(VALUES[:, :, None])
    path.write_bytes({"cut": whole[:-30], "empty": b"", "text": b"GIF is a format"}.get(fault, whole))
    if fault == "large":
        monkeypatch.setattr(pictures, "MAX_PIXELS", 8)
    elif fault == "tiff":
        Image.fromarray(UPRIGHT).save(path, "TIFF")
    with pytest.raises(InputError) as caught:
        way(path)
    assert caught.value.where and caught.value.expected


def test_an_answer_is_the_same_for_16_bits_as_for_8(tiny_bundle):
    grey = np.random.default_rng(3).integers(0, 256, (72, 72, 1), np.uint8)
    with Session.open(tiny_bundle, allow_uncertified=True) as session:
        wide = session.ask(png(grey.astype(np.uint16) * 257), "What is it?", max_new_tokens=6)
        assert wide.text == session.ask(grey, "What is it?", max_new_tokens=6).text
        assert wide.text != session.ask(np.full_like(grey, 255), "What is it?", max_new_tokens=6).text
