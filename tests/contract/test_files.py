"""Files and folders of a result: put in place whole, refused before any work, and nothing of anybody else's lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from chaos import small_suite

from edgesafe.errors import ConfigError, InputError
from edgesafe.format import files, targets
from edgesafe.format.bundle import is_bundle
from edgesafe.format.files import digest_folder, held, replacing, write_atomically
from edgesafe.format.suite import read_suite
from edgesafe.format.targets import KEY, NEW, OLDER, check_target, check_writable, free_bytes, work_folder
from handmade import make_bundle

LATIN = os.fsdecode(b"caf\xe9")


def _has_thing(folder: Path) -> bool:
    return [p.name for p in folder.iterdir()] == ["thing"]


def _thing(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "thing").write_text(text)
    return folder


def _export(out: Path, text: str = "new", **options) -> None:
    with replacing(out, "thing", _has_thing, **options) as work:
        _thing(work / NEW, text)


def _tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two renames, as on FAT"])
@pytest.mark.parametrize("before", [None, "empty", "older", "older, with a trailing slash"])
def test_a_folder_gets_its_name_and_nothing_else_is_left(tmp_path, monkeypatch, before, swaps):
    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda new, out: False)
    if before == "empty":
        (tmp_path / "b").mkdir()
    elif before:
        _thing(tmp_path / "b", "old")
    _export(Path(f"{tmp_path}/b/" if before and "slash" in before else f"{tmp_path}/b"))
    assert _tree(tmp_path) == ["b", "b/thing"] and (tmp_path / "b" / "thing").read_text() == "new"


def test_a_failed_exchange_puts_the_older_folder_back(tmp_path, monkeypatch):
    out, real = _thing(tmp_path / "b", "old"), os.replace

    def fail(source, target):
        if Path(source).name == NEW:
            raise OSError(5, "the disk gave up")
        real(source, target)

    monkeypatch.setattr(files, "exchange", lambda new, out: False)
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="gave up"):
        _export(out)
    assert (out / "thing").read_text() == "old" and _tree(tmp_path) == ["b", "b/thing"]


def test_a_power_cut_between_the_two_renames_loses_nothing(tmp_path):
    # The older folder is in the work folder then; the next run, even one that fails, puts it back.
    _thing(tmp_path / "b.partial" / OLDER, "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "b"):
        raise RuntimeError
    assert _tree(tmp_path) == ["b", "b/thing"]


def test_pieces_stay_for_a_run_of_the_same_key_alone(tmp_path):
    out = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt), replacing(out, key="one") as work:
        (work / "piece").write_text("dear")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), replacing(out, key="one") as work:
        assert (work / "piece").read_text() == "dear"
        raise KeyboardInterrupt
    with replacing(out, key="two") as work:
        assert not (work / "piece").exists()
        _thing(work / NEW, "new")
    assert _tree(tmp_path) == ["b", "b/thing"]
    with pytest.raises(InputError, match="in vain"), replacing(tmp_path / "c", key="one"):
        raise InputError("in vain")
    assert not (tmp_path / "c.partial").exists()


def test_what_a_killed_run_left_is_cleared(tmp_path):
    # Killed at any moment: before its mark was written, with its mark half written, or with everything there.
    for number, names in enumerate([[], [KEY + ".partial"], [KEY, "half"], [NEW]]):
        work = tmp_path / f"{number}.partial"
        work.mkdir()
        for name in names:
            (work / name).write_text("x")
        _export(tmp_path / str(number))
        assert _tree(tmp_path / str(number)) == ["thing"] and not work.exists()


def test_neighbours_of_like_names_are_kept(tmp_path):
    # Both names were once this step's own for a moment: what lay there was deleted.
    out = _thing(tmp_path / "b", "old")
    _thing(tmp_path / "b.old", "a backup of mine")
    _export(out)
    assert (tmp_path / "b.old" / "thing").read_text() == "a backup of mine"
    _thing(tmp_path / "b.partial", "a draft of mine")
    with pytest.raises(InputError, match="taken by something else"):
        _export(out, "newer")
    assert (tmp_path / "b.partial" / "thing").read_text() == "a draft of mine" and (out / "thing").read_text() == "new"


@pytest.mark.parametrize("there", [True, False], ids=["link to an older one", "link to nowhere"])
def test_a_link_stays_one_and_what_it_names_is_written(tmp_path, there):
    real = tmp_path / "disk" / "real"
    if there:
        _thing(real, "old")
    (tmp_path / "link").symlink_to(real)
    _export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (real / "thing").read_text() == "new"
    assert _tree(tmp_path) == ["disk", "disk/real", "disk/real/thing", "link"]
    (tmp_path / "inside").symlink_to(tmp_path / "disk")
    _export(tmp_path / "inside" / "second")
    assert (tmp_path / "disk" / "second" / "thing").read_text() == "new"


def _lay(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    _thing(tmp_path / "model" / "inner", "dear")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "taken.partial").write_text("dear")
    (tmp_path / "here").mkdir()
    (tmp_path / "linked.partial").symlink_to(tmp_path / "here")


REFUSED = {
    "file": "isn't a thing",
    "others": "isn't a thing",
    "to-file": "isn't a thing",
    "file/below": "Not a directory",
    "loop": "leads to itself",
    "taken": "taken by something else",
    "linked": "taken by something else",
    "mine.partial": "those of work folders",
    ".": "the working folder",
    "..": "the working folder",
    "/": "the working folder",
    "x" * 250: "File name too long",
    "x" * 256: "File name too long",
    LATIN: "not UTF-8",
    f"{LATIN}/below": "not UTF-8",
    "model": "lie in each other",
    "model/inner/new": "lie in each other",
    "MODEL-BY-LINK/new": "lie in each other",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_put_in_place_is_refused_before_any_work(tmp_path, monkeypatch, name):
    _lay(tmp_path)
    (tmp_path / "MODEL-BY-LINK").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "linked.partial")
    before = _tree(tmp_path)
    out = Path(name) if name in (".", "..", "/") else tmp_path / name
    with pytest.raises((ConfigError, InputError), match=REFUSED[name]):
        check_target(out, "thing", lambda folder: folder.name == "model", model=tmp_path / "model")
    with pytest.raises((ConfigError, InputError)), replacing(out, "thing", _has_thing, model=tmp_path / "model"):
        raise AssertionError("the work began")
    assert _tree(tmp_path) == before


def test_a_folder_that_holds_the_model_is_not_replaced(tmp_path):
    model = _thing(tmp_path / "b" / "model", "dear")
    for out in (tmp_path / "b", tmp_path / "b" / "..", tmp_path / "c"):
        (tmp_path / "c").exists() or (tmp_path / "c").symlink_to(tmp_path / "b")
        with pytest.raises(InputError, match="lie in each other"):
            check_target(out, "thing", lambda folder: True, model=model)
    check_target(tmp_path / "modelled", model=model)
    check_target(tmp_path / "b" / "model2", model=model)
    check_target(tmp_path / "d", model="org/name-on-the-hub")


def test_a_new_folder_has_to_be_new(tmp_path):
    for there in (_thing(tmp_path / "full", "old"), tmp_path / "empty"):
        there.mkdir(exist_ok=True)
        with pytest.raises(InputError, match="exists already"):
            check_target(there)
    (tmp_path / "e.partial").mkdir()
    (tmp_path / "e.partial" / "checkpoint.pt").write_text("dear")
    assert check_target(tmp_path / "e", known=("checkpoint.pt",)) == tmp_path / "e"
    with pytest.raises(InputError, match="taken"):
        check_target(tmp_path / "e")
    assert (tmp_path / "e.partial" / "checkpoint.pt").exists()


def test_checking_leaves_no_trace(tmp_path):
    assert check_target(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    check_writable(tmp_path / "report.xml")
    assert _tree(tmp_path) == []


@pytest.mark.parametrize("error", [30, 13, 28], ids=["EROFS", "EACCES", "ENOSPC"])
def test_a_folder_that_the_system_refuses_is_refused_before_any_work(tmp_path, monkeypatch, error):
    def refuse(self, *_, **__):
        raise OSError(error, os.strerror(error), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=os.strerror(error)):
        check_target(tmp_path / "b")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=os.strerror(error)):
        check_writable(tmp_path / "b")


_MOUNTS = """
import subprocess, sys
from pathlib import Path
from edgesafe.errors import InputError
from edgesafe.format.files import replacing
from edgesafe.format.targets import NEW, check_target, check_writable
root = Path(sys.argv[1])
def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)
def refused(check, *words):
    try:
        check(*words)
    except InputError as error:
        return str(error)
    raise SystemExit(f"not refused: {words}")
for name in ("disk", "bound to", "source", "below", "fixed", "c.partial"):
    (root / name).mkdir()
(root / "file").write_text(""); (root / "bound-file").write_text("")
mount("-t", "tmpfs", "t", root / "disk")
mount("--bind", root / "source", root / "bound to")
mount("--bind", root / "file", root / "bound-file")
mount("--bind", root / "source", root / "c.partial")
mount("-t", "tmpfs", "-o", "ro", "t", root / "fixed")
(root / "link").symlink_to(root / "disk")
for name in ("disk", "bound to", "link"):
    assert "mount point" in refused(check_target, root / name), name
assert "taken by something else" in refused(check_target, root / "c")
assert "Read-only" in refused(check_target, root / "fixed" / "b")
assert "Read-only" in refused(check_writable, root / "fixed" / "b")
assert "mount point" in refused(check_writable, root / "bound-file")
(root / "full").mkdir()
mount("-t", "tmpfs", "-o", "size=64k", "t", root / "full")
try:
    (root / "full" / "filler").write_bytes(bytes(1 << 20))
except OSError:
    pass
assert "No space left" in refused(check_writable, root / "full" / "b")
assert "No space left" in refused(check_target, root / "full" / "b")
assert [path.name for path in (root / "full").iterdir()] == ["filler"]
with replacing(root / "link" / "b") as work:
    assert work == root / "disk" / "b.partial"
    (work / NEW).mkdir()
assert (root / "disk" / "b").is_dir()
"""


def test_real_mount_points_are_refused_and_folders_inside_them_written(tmp_path):
    try:
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "t", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", _MOUNTS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_mount_point_by_the_kernels_list_is_refused(tmp_path, monkeypatch):
    _thing(tmp_path / "b", "old")
    monkeypatch.setattr(targets, "is_mount", lambda path: path == tmp_path / "b")
    with pytest.raises(InputError, match=f"--out {tmp_path}/b/new"):
        _export(tmp_path / "b")


def test_free_space_is_that_of_the_disk_that_is_written_to(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 if "disk" in str(path) else 7))
    assert free_bytes(work_folder(check_target(tmp_path / "link"))) == 3
    assert free_bytes(work_folder(check_target(tmp_path / "new" / "b"))) == 7


def test_two_runs_in_one_folder_are_kept_apart(tmp_path):
    with replacing(tmp_path / "b") as work:
        _thing(work / NEW, "mine")
        with pytest.raises(InputError, match="another run"), replacing(tmp_path / "b"):
            raise AssertionError("the work began")
    assert (tmp_path / "b" / "thing").read_text() == "mine"


def test_who_waits_gets_the_folder_that_is_there_then(tmp_path):
    """A child holds the folder, deletes it and ends; the parent waits, and what it then holds has the name."""
    folder, (read, write) = tmp_path / "f", os.pipe()
    child = os.fork()
    if child == 0:
        with held(folder):
            os.write(write, b"x")
            subprocess.run(["sleep", "0.3"], check=True)
            folder.rmdir()
        os._exit(0)
    os.read(read, 1)
    with held(folder, wait=True):
        os.waitpid(child, 0)
        (folder / "mine").write_text("x")
        with pytest.raises(InputError, match="another run"), held(folder):
            pass


def test_a_file_is_written_through_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    handle = os.open(tmp_path / "pipe", os.O_RDWR)
    with contextlib.closing(os.fdopen(handle, "rb", buffering=0)) as reader:
        check_writable(tmp_path / "pipe")
        write_atomically(tmp_path / "pipe", b"new")
        assert reader.read(3) == b"new" and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("folder", "a folder is where"),
        ("none/file", "none doesn't exist"),
        ("file/below", "file is not a folder"),
        ("x" * 250, "File name too long"),
    ],
)
def test_a_file_that_can_not_be_written_is_refused_before_any_work(tmp_path, name, shown):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("dear")
    with pytest.raises(InputError, match=shown):
        check_writable(tmp_path / name)
    for fine in ("file", "new", LATIN):
        check_writable(tmp_path / fine)
    assert _tree(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "dear"


def test_a_folder_with_a_name_that_is_not_utf8_has_a_digest(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    # printf 'a.txt\\0%s\\n' $(printf x | sha256sum | cut -d" " -f1) | sha256sum
    assert digest_folder(tmp_path) == "d7a8ccc671c6d8c5c95aa4302fc55bc334152340b9b41f288e5e4df504cd8224"
    (tmp_path / LATIN).write_text("x")
    assert digest_folder(tmp_path) != "d7a8ccc671c6d8c5c95aa4302fc55bc334152340b9b41f288e5e4df504cd8224"


def test_only_a_whole_bundle_and_nothing_more_may_be_replaced_by_one(tmp_path):
    bundle = make_bundle(tmp_path / "b").root
    assert is_bundle(bundle)
    (bundle / "latency.json.partial").write_text("cut off")
    (bundle / "vision" / "head.onnx").write_bytes(b"damaged")
    assert is_bundle(bundle)
    (bundle / "notes.txt").write_text("mine")
    assert not is_bundle(bundle)
    (web := tmp_path / "web").mkdir()
    (web / "manifest.json").write_text('{"name": "a web page"}')
    assert not is_bundle(web) and not is_bundle(tmp_path / "none")


def test_a_suite_is_not_written_over_anything_but_a_suite(tmp_path):
    suite = small_suite(tmp_path / "s", "older")
    assert read_suite(small_suite(suite, "newer")).name == "newer"
    (suite / "notes.txt").write_text("mine")
    _thing(tmp_path / "t", "dear")
    for there in (suite, tmp_path / "t"):
        with pytest.raises(ConfigError, match="isn't a suite"):
            small_suite(there, "newest")
    assert (suite / "notes.txt").read_text() == "mine" and (tmp_path / "t" / "thing").read_text() == "dear"
