"""Pictures for `smol`: found in makers' archives by code point or name, checked, and shown in many ways. No network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from edgesafe.errors import ConfigError, InputError
from edgesafe.reference.smol.pictures import ICONS, Maker, check, read_pictures, views


def _archive(folder: Path, names: list[str]) -> Path:
    with tarfile.open(folder / "a-1.tgz", "w:gz") as tar:
        for index, name in enumerate(names):
            buffer = io.BytesIO()
            Image.new("RGBA", (4, 4), (index, 9, 9, 255)).save(buffer, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return folder / "a-1.tgz"


def test_a_maker_s_pictures_are_found_by_emoji(tmp_path: Path) -> None:
    path = _archive(tmp_path, ["package/64/1f4a3.png", "package/32/1f4a3.png", "package/64/1f528.png"])
    maker = Maker("a@1", "", "package/64/{}.png", "")
    found = read_pictures(path, maker, ["1f528", "1f511"])
    assert list(found) == ["1f528"]
    assert found["1f528"].getpixel((0, 0)) == (2, 9, 9, 255)


def test_drawings_of_lines_are_found_under_other_spellings_and_under_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = '<rect width="{0}" height="{0}" fill="red"/>'
    icons = {"icons": {"dagger": {"body": red.format(32)}, "hammer": {"body": red.format(4)}}, "width": 64, "height": 64}
    icons["aliases"] = {"locked": {"parent": "dagger"}}
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">' + red.format(4) + "</svg>"
    for name, files in (("path", {"package/svg/1F5E1.svg": svg}), ("icons", {ICONS: json.dumps(icons)})):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "a-1.tgz", "w:gz") as tar:
            for path, text in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    by_path, by_name = (
        read_pictures(tmp_path / folder / "a-1.tgz", Maker("a@1", "", path, ""), ["1f5e1-fe0f", "1f512", "1f511"])
        for folder, path in (("path", "package/svg/{}.svg"), ("icons", ICONS))
    )
    assert list(by_path) == ["1f5e1-fe0f"]
    assert sorted(by_name) == ["1f512", "1f5e1-fe0f"]
    for picture in (*by_path.values(), *by_name.values()):
        assert picture.size == (112, 112)
        assert picture.getpixel((20, 20)) == (255, 0, 0, 255)
        assert picture.getpixel((90, 90))[3] == 0
    with pytest.raises(InputError, match="can't be read"):
        read_pictures(tmp_path / "path" / "a-1.tgz", Maker("a@1", "", ICONS, ""), ["1f511"])
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"resvg-py.*edgesafe\[smol\]"):
        read_pictures(tmp_path / "icons" / "a-1.tgz", Maker("a@1", "", ICONS, ""), ["1f512"])


def test_another_archive_than_the_noted_one_is_refused(tmp_path: Path) -> None:
    path = _archive(tmp_path, ["package/64/1f4a3.png"])
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    maker = Maker("a@1", digest, "", "")
    check(path, maker)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="not the one that was trained on"):
        check(path, maker)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="can't be read"):
        read_pictures(path, maker, ["1f4a3"])


def test_views_are_seeded_and_the_first_is_plain() -> None:
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    first, again, other = ([v.tobytes() for v in views(picture, 3, seed)] for seed in ("s", "s", "t"))
    assert first == again
    assert first[0] == other[0]
    assert first[1:] != other[1:]


def test_wild_views_come_last_and_have_other_colours() -> None:
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    tame, mixed = ([*views(picture, 3, "s", wild)] for wild in (0, 4))
    assert [one.tobytes() for one in mixed[:3]] == [one.tobytes() for one in tame]
    reds = [max(one.getcolors(112 * 112), key=lambda found: (found[1][0] - found[1][1], found[0]))[1] for one in mixed]
    assert all(red == (200, 0, 0) for red in reds[:3])
    assert not any(red == (200, 0, 0) for red in reds[3:])
