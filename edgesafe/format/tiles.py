"""Pictures in tiles: the manifest's ``tiles`` table, and the arithmetic of cutting. BUNDLE.md explains each key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgesafe.errors import BundleError
from edgesafe.format.fields import Fields
from edgesafe.format.graph_io import MAX_SIDE

CUTS = ("never", "grid", "canvas")
# Far above any model here (37), and low enough that a picture's tiles and their states fit a device's memory.
MAX_TILES = 256
Size = tuple[int, int]  # height, width
PICTURE: Size = (480, 640)  # the picture that times are told for, before there is one


@dataclass(frozen=True)
class TileTexts:
    """What stands in the prompt for a tile, the end of a row of tiles, the whole picture behind them, and an uncut picture.

    All but ``row_end`` hold the image token once; ``{row}`` and ``{col}`` in ``tile`` count from 1.
    """

    tile: str
    row_end: str
    whole: str
    alone: str


@dataclass(frozen=True)
class TilesSpec:
    """How a picture is cut into tiles of the tower's size, and how the tiles' features become one sequence.

    ``never`` and ``grid`` make the longer side ``longest_edge`` first; ``grid`` then fills a grid of whole tiles and looks at
    them row by row and at the whole picture last. ``canvas`` puts the picture in the middle of the best of ``canvases`` and
    looks at the whole picture first; the tiles' features become one map, cut to the picture, each row ended by the
    newline that the head gives behind the features (where ``newline``), and made smaller where it is much larger than
    ``limit`` tiles. ``texts`` is None where the features follow each other without text.
    """

    cut: str
    longest_edge: int
    canvases: tuple[Size, ...]
    limit: int | None
    newline: bool
    texts: TileTexts | None

    @staticmethod
    def read(fields: Fields) -> TilesSpec:
        """Read the manifest's ``tiles`` table strictly."""
        cut = fields.choice("cut", CUTS)
        canvases = [tuple(size) if isinstance(size, list | tuple) else () for size in fields.items("canvases")]
        fine = all(len(size) == 2 and all(_is_side(n) for n in size) for size in canvases)
        if not fine or bool(canvases) != (cut == "canvas"):
            raise BundleError(
                "canvases are wrong", where=fields.where, expected="[height, width] each, and none but for the cut 'canvas'"
            )
        texts = fields.child("texts") if fields.has("texts") else None
        spec = TilesSpec(
            cut=cut,
            longest_edge=fields.integer("longest_edge", int(cut != "canvas"), MAX_SIDE),
            canvases=tuple((size[0], size[1]) for size in canvases),
            limit=fields.integer("limit", 1, MAX_SIDE) if fields.has("limit") else None,
            newline=fields.flag("newline"),
            texts=TileTexts(*(texts.text(key) for key in ("tile", "row_end", "whole", "alone"))) if texts else None,
        )
        if cut != "canvas" and (spec.newline or spec.limit is not None):
            raise BundleError("newline and limit belong to the cut 'canvas'", where=fields.where)
        for table in [fields, *([texts] if texts else [])]:
            table.done()
        return spec

    def check(self, image_token: str, image_tokens: int, tile: Size, where: str) -> None:
        """Refuse a table that does not fit the rest of its manifest."""
        side = tile[0]
        if tile[0] != tile[1] or any(n % side for size in self.canvases for n in size):
            raise BundleError("tiles are square, and canvases are whole tiles", where=where)
        sides = self.canvases or ((self.longest_edge, self.longest_edge),)
        if max(math.ceil(h / side) * math.ceil(w / side) for h, w in sides) > MAX_TILES:
            raise BundleError("a picture would be cut into too many tiles", where=where, expected=f"at most {MAX_TILES}")
        if self.cut == "canvas" and math.isqrt(image_tokens) ** 2 != image_tokens:
            raise BundleError(f"a tile's {image_tokens} features don't form a square", where=where)
        texts = self.texts
        if (texts is None) != (self.cut == "canvas"):
            raise BundleError("texts belong to the cuts 'never' and 'grid'", where=where)
        if texts is not None:
            counts = [text.count(image_token) for text in (texts.tile, texts.row_end, texts.whole, texts.alone)]
            if counts != [1, 0, 1, 1]:
                raise BundleError(f"the texts hold the image token {counts} times", where=where, expected="[1, 0, 1, 1]")


@dataclass(frozen=True)
class Cut:
    """How one picture is cut: rows and columns of tiles (0 and 0: not at all), and its size."""

    rows: int = 0
    cols: int = 0
    height: int = 1
    width: int = 1

    @property
    def tiles(self) -> int:
        """How often the tower runs: once for each tile and once for the whole picture."""
        return self.rows * self.cols + 1


ALONE = Cut()


def cut_of(spec: TilesSpec, tile: int, size: Size) -> Cut:
    """How a picture of that size is cut.

    >>> cut_of(TilesSpec("grid", 2048, (), None, False, None), 512, (600, 800))
    Cut(rows=3, cols=4, height=600, width=800)
    >>> cut_of(TilesSpec("canvas", 0, ((336, 672), (672, 336), (672, 672)), None, True, None), 336, (100, 300))
    Cut(rows=1, cols=2, height=100, width=300)
    """
    if spec.cut == "never" or (spec.cut == "canvas" and not spec.canvases):
        return Cut(0, 0, *size)
    if spec.cut == "canvas":
        height, width = best_canvas(spec.canvases, size)
    else:
        height, width = grid_size(long_size(size, spec.longest_edge), tile)
        if height == width == tile:
            return Cut(0, 0, *size)
    return Cut(height // tile, width // tile, *size)


def most_tiles(spec: TilesSpec, tile: int) -> int:
    """How often the tower runs at most for a picture.

    >>> most_tiles(TilesSpec("grid", 2048, (), None, False, None), 512)
    17
    """
    if spec.cut == "grid":
        side = math.ceil(spec.longest_edge / tile)
        return side**2 + 1 if side > 1 else 1
    return 1 + max((height * width // tile**2 for height, width in spec.canvases), default=0)


def caps(spec: TilesSpec, tile: int) -> list[int]:
    """The numbers of tiles that an exit may set as its most, ascending: those of smaller pictures, as ``at_most`` cuts them.

    >>> caps(TilesSpec("grid", 2048, (), None, False, None), 512)
    [1, 5, 10]
    >>> caps(TilesSpec("canvas", 0, ((336, 672), (672, 672)), None, True, None), 336)
    [1, 3]
    """
    if spec.cut == "grid":
        found = {side**2 + 1 if side > 1 else 1 for side in range(1, math.ceil(spec.longest_edge / tile))}
    else:
        found = {1, *(1 + height * width // tile**2 for height, width in spec.canvases)}
    return sorted(count for count in found if count < most_tiles(spec, tile))


def at_most(spec: TilesSpec, tile: int, tiles: int) -> TilesSpec:
    """How a picture is cut at an exit with so many tiles at most, one of ``caps``: as the family cuts a smaller picture.

    A grid has a shorter longest edge, of n tiles where n x n of them and the whole picture are as many. A canvas is one of
    those with no more tiles; where there is none the whole picture is looked at alone.

    >>> at_most(TilesSpec("grid", 2048, (), None, False, None), 512, 5).longest_edge
    1024
    >>> at_most(TilesSpec("canvas", 0, ((336, 672), (672, 672)), None, True, None), 336, 3).canvases
    ((336, 672),)
    """
    if spec.cut == "grid":
        return replace(spec, longest_edge=max(1, math.isqrt(tiles - 1)) * tile)
    return replace(spec, canvases=tuple(size for size in spec.canvases if size[0] * size[1] // tile**2 < tiles))


def long_size(size: Size, longest_edge: int) -> Size:
    """The size whose longer side is ``longest_edge``, the other one an even number.

    Source: transformers 5.23 ``image_processing_pil_idefics3.get_resize_output_image_size``.

    >>> long_size((600, 800), 2048), long_size((12, 1000), 100)
    ((1536, 2048), (2, 100))
    """
    height, width = size
    ratio = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / ratio)
        height += height % 2
    else:
        height, width = longest_edge, int(longest_edge * ratio)
        width += width % 2
    return max(height, 1), max(width, 1)


def grid_size(size: Size, tile: int) -> Size:
    """The size in whole tiles, about as wide for its height.

    Source: transformers 5.23 ``image_processing_pil_idefics3.resize_for_vision_encoder``.

    >>> grid_size((1300, 2048), 512)
    (1536, 2048)
    """
    height, width = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / ratio) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * ratio) / tile) * tile


def best_canvas(canvases: Sequence[Size], size: Size) -> Size:
    """The canvas that shows most of a picture's pixels, and of those the one that wastes least.

    Source: transformers 5.23 ``image_processing_utils.select_best_resolution``.

    >>> best_canvas(((336, 672), (672, 336)), (100, 300))
    (336, 672)
    """
    best, most, least = canvases[0], 0, math.inf
    for height, width in canvases:
        scale = min(width / size[1], height / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        wasted = height * width - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (height, width), shown, wasted
    return best


def fitted(size: Size, canvas: Size) -> Size:
    """The largest size of a picture on a canvas, rounded up.

    Source: transformers 5.23 ``image_processing_utils.get_patch_output_size``.

    >>> fitted((100, 400), (336, 672))
    (168, 672)
    """
    wide, high = canvas[1] / size[1], canvas[0] / size[0]
    if wide < high:
        return min(math.ceil(size[0] * wide), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * high), canvas[1])


def map_rows(cut: Cut, side: int) -> tuple[slice, slice]:
    """The part of the tiles' feature map [rows x side, columns x side] that shows the picture and no padding.

    Source: transformers 5.23 ``modeling_llava_next.unpad_image``.

    >>> map_rows(Cut(1, 2, 100, 300), 24)
    (slice(4, 20, None), slice(0, 48, None))
    """
    height, width = cut.rows * side, cut.cols * side
    if cut.width / cut.height > width / height:
        out = (height - int(round(cut.height * (width / cut.width), 7))) // 2
        return slice(out, height - out), slice(0, width)
    out = (width - int(round(cut.width * (height / cut.height), 7))) // 2
    return slice(0, height), slice(out, width - out)


def smaller(size: Size, side: int, limit: int | None) -> Size:
    """The size of a feature map, made smaller where it is much larger than ``limit`` tiles.

    Source: transformers 5.23 ``modeling_llava_onevision.pack_image_features``.

    >>> smaller((81, 81), 27, 9), smaller((108, 162), 27, 9)
    ((81, 81), (66, 99))
    """
    ratio = math.sqrt(size[0] * size[1] / (limit * side**2)) if limit else 0.0
    return (int(size[0] // ratio), int(size[1] // ratio)) if ratio > 1.1 else size


def prompt_runs(spec: TilesSpec | None, cut: Cut, image_token: str, image_tokens: int) -> tuple[str, list[int]]:
    """What the image token in the chat text becomes for a picture, and how often each image token in that is repeated.

    >>> texts = TileTexts("[{row},{col}]<i>", "|", "[all]<i>", "[one]<i>")
    >>> spec = TilesSpec("grid", 99, (), None, False, texts)
    >>> prompt_runs(spec, Cut(2, 1), "<i>", 9), prompt_runs(spec, ALONE, "<i>", 9)
    (('[1,1]<i>|[2,1]<i>|[all]<i>', [9, 9, 9]), ('[one]<i>', [9]))
    >>> prompt_runs(TilesSpec("canvas", 0, ((24, 48),), None, True, None), Cut(1, 2, 24, 48), "<i>", 9)
    ('<i>', [30])
    """
    if spec is None:
        return image_token, [image_tokens]
    if spec.texts is None:
        return image_token, [canvas_tokens(spec, cut, image_tokens)]
    if not cut.rows:
        return spec.texts.alone, [image_tokens]
    text = ""
    for row in range(1, cut.rows + 1):
        for col in range(1, cut.cols + 1):
            text += spec.texts.tile.replace("{row}", str(row)).replace("{col}", str(col))
        text += spec.texts.row_end
    return text + spec.texts.whole, [image_tokens] * cut.tiles


def canvas_tokens(spec: TilesSpec, cut: Cut, image_tokens: int) -> int:
    """How many features a picture on a canvas has: the whole picture's, the map's, and one newline per row."""
    if not cut.rows:
        return image_tokens + spec.newline
    side = math.isqrt(image_tokens)
    down, across = map_rows(cut, side)
    rows, cols = smaller((down.stop - down.start, across.stop - across.start), side, spec.limit)
    return image_tokens + rows * (cols + spec.newline)


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE
