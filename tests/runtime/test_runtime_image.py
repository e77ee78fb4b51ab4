"""Preprocessing against transformers' own CLIP image processor on the pictures that people really have."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from edgesafe.errors import InputError
from edgesafe.format import pictures
from edgesafe.format.pictures import MAX_PIXELS
from edgesafe.format.specs import ImageSpec
from edgesafe.runtime.image import center_crop, preprocess

# The same Pillow does the resizing and the arithmetic is in the same order, so only the last float32 bit may differ.
ATOL = 1e-6
CONFIGS = {
    "llava-1.5": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "tiny": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    "odd crop": {"size": {"shortest_edge": 61}, "crop_size": {"height": 48, "width": 37}},
    "crop beyond the picture": {"size": {"shortest_edge": 31}, "crop_size": {"height": 40, "width": 48}},
    "exact, bilinear": {"size": {"height": 50, "width": 70}, "do_center_crop": False, "resample": 2},
    "no normalisation": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False},
    "no rescaling": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_rescale": False},
}
SIZES = [(64, 64), (63, 97), (97, 63), (1, 1), (1, 9), (9, 1), (337, 335), (640, 480), (17, 400)]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), np.uint8)


def both(picture: Image.Image, name: str = "tiny") -> tuple[np.ndarray, np.ndarray]:
    """Ours and transformers' ``pixel_values`` of an upright picture."""
    processor = CLIPImageProcessorPil(**CONFIGS[name])
    ours = preprocess(picture, ImageSpec.from_hf(processor.to_dict()))
    return ours, np.asarray(processor(picture, return_tensors="np")["pixel_values"])


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_odd_sizes(size, name):
    check(*both(Image.fromarray(noise(*size)), name))


# Published DINOv2 cuts a margin off; the second reference does not.
@pytest.mark.parametrize(("edge", "side"), [(256, 224), (112, 112)])
def test_dinov2_s_processor_bit_by_bit(edge, side):
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": side, "width": side}}
    processor = BitImageProcessorPil(**sizes, **imagenet, resample=3, do_convert_rgb=True)
    spec = ImageSpec.from_hf(processor.to_dict())
    for size in SIZES:
        picture = Image.fromarray(noise(*size))
        np.testing.assert_array_equal(
            preprocess(picture, spec), np.asarray(processor(picture, return_tensors="np")["pixel_values"])
        )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "PA", "HSV"])
def test_grey_alpha_and_other_modes(mode):
    rgba = Image.fromarray(noise(70, 50, 4), "RGBA")
    # Of a palette with alpha of its own transformers reads the colours alone: test_pictures.py has what is right there.
    if mode in ("P", "PA", "HSV", "CMYK", "YCbCr"):
        picture = rgba.convert("RGB").convert({"PA": "P"}.get(mode, mode)).convert(mode)
    else:
        picture = rgba.convert(mode)
    assert picture.mode == mode
    check(*both(picture))


def test_palette_transparency_shows_white():
    picture = Image.new("P", (40, 30), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.info["transparency"] = 0
    ours, theirs = both(picture, "no normalisation")
    check(ours, theirs)
    assert np.all(ours == 1.0)


def test_twelve_megapixels():
    check(*both(Image.fromarray(noise(4032, 3024)), "llava-1.5"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_the_screen_shows_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    Image.fromarray(noise(80, 60)).save(path, exif=exif, quality=95)
    processor = CLIPImageProcessorPil(**CONFIGS["tiny"])
    spec = ImageSpec.from_hf(processor.to_dict())
    with Image.open(path) as picture:
        raw = np.asarray(processor(picture, return_tensors="np")["pixel_values"])
        upright = np.asarray(processor(ImageOps.exif_transpose(picture), return_tensors="np")["pixel_values"])
    check(preprocess(path, spec), upright)
    # The documented difference: transformers leaves the picture lying down.
    assert (orientation == 1) == np.allclose(upright, raw, atol=ATOL)


def test_paths_arrays_and_pil_images_are_the_same(tmp_path):
    array = noise(70, 50)
    Image.fromarray(array).save(tmp_path / "a.png")
    spec = ImageSpec.from_hf(CLIPImageProcessorPil(**CONFIGS["tiny"]).to_dict())
    want = preprocess(Image.fromarray(array), spec)
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), array):
        np.testing.assert_array_equal(preprocess(picture, spec), want)
    grey = array[:, :, 0]
    np.testing.assert_array_equal(preprocess(grey, spec), preprocess(grey[:, :, None], spec))


TWINS = {
    "another filter": {"resample": "bilinear"},
    "no crop": {"resize": "exact", "resize_to": (64, 64), "center_crop": False},
    "scale dropped": {"rescale_factor": 1.0},
    "mean dropped": {"mean": (0.0, 0.0, 0.0)},
    "std dropped": {"std": (1.0, 1.0, 1.0)},
    "mean's channels turned": {"mean": (0.40821073, 0.4578275, 0.48145466)},
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_version_is_seen(twin):
    processor = CLIPImageProcessorPil(**CONFIGS["tiny"])
    spec = dataclasses.replace(ImageSpec.from_hf(processor.to_dict()), **TWINS[twin])
    picture = Image.fromarray(noise(97, 63))
    theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"])
    with pytest.raises(AssertionError):
        check(preprocess(picture, spec), theirs)


def test_center_crop_by_hand():
    # 5 rows to 2: (5 - 2) // 2 = 1 row off the top; 1 column to 3: ceil(2 / 2) = 1 zero before it.
    pixels = np.arange(1, 6)[:, None, None]
    assert center_crop(pixels, 2, 3)[:, :, 0].tolist() == [[0, 2, 0], [0, 3, 0]]


SPEC = ImageSpec.from_hf(CLIPImageProcessorPil(**CONFIGS["tiny"]).to_dict())


@pytest.mark.parametrize(
    "picture",
    [
        None,
        3,
        b"bytes",
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        Image.new("RGB", (0, 0)),
        "/no/such/picture.png",
        "/",
        "/dev/null",
    ],
    ids=lambda picture: repr(picture).split(" at ")[0],  # no address, which every process has its own of
)
def test_what_is_no_picture(picture):
    with pytest.raises(InputError) as caught:
        preprocess(picture, SPEC)
    assert caught.value.exit_code == 11


@pytest.mark.parametrize("cut", [0, 1, 20, 60, -40])
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp"])
def test_an_unreadable_file(tmp_path, kind, cut):
    path = tmp_path / f"cut.{kind}"
    Image.fromarray(noise(70, 50)).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="cut"):
        preprocess(path, SPEC)


def test_picture_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    # 1 bit a pixel: a small file whose RGB would take 150 MB.
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="pixels"):
        preprocess(path, SPEC)


@pytest.mark.parametrize("width", [10_000, 20_000])
def test_bombs_beyond_pillow_s_own_limits(tmp_path, width):
    # Pillow warns above 89 megapixels and raises above 179.
    path = tmp_path / "bomb.png"
    Image.new("1", (width, 10_000)).save(path)
    with pytest.raises(InputError, match="pixels"):
        preprocess(path, SPEC)


def test_a_thin_picture_that_grows_into_a_bomb_is_refused():
    # 1 x 1,000,000 resized to a shortest edge of 64 would be 64 x 64,000,000.
    with pytest.raises(InputError, match="resized"):
        preprocess(Image.new("RGB", (1, 1_000_000)), SPEC)


def test_exactly_the_limit_is_let_through(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64)
    assert preprocess(Image.new("RGB", (64, 64)), SPEC).shape == (1, 3, 64, 64)
    with pytest.raises(InputError):
        preprocess(Image.new("RGB", (64, 65)), SPEC)
