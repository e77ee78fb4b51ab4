"""A Debian of 64-bit Arm in a folder: fetched from apt's own mirror and unpacked, whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from edgesafe.errors import DeviceError
from edgesafe.format.files import replacing
from edgesafe.progress import bar

SUITE = "bookworm"  # its Python 3.11 is the oldest that edgesafe runs on, and many Raspberry Pis have it
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
USER, USER_ID = "pi", 1000
# What the packages' own scripts would write; those are programs of the other processor, and slow ones.
_FILES = {
    "etc/passwd": f"root:x:0:0::/root:/bin/sh\n{USER}:x:{USER_ID}:{USER_ID}::/home/{USER}:/bin/sh\n",
    "etc/group": f"root:x:0:\n{USER}:x:{USER_ID}:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
}
_PACKAGES = "python3-minimal,python3-venv"
_MARK, _KEY = "made-by-edgesafe", f"{SUITE} {_PACKAGES} 1"


def arm64_root(root: Path) -> Path:
    """The folder with the system, made where it is not there or is another edition's.

    What was fetched before an interruption is not fetched again; what was unpacked is.

    Raises:
        DeviceError: Debian's packages can't be fetched.
        InputError, ConfigError: The folder can't be written, or holds something else.
    """
    mark = root / _MARK
    if mark.is_file() and mark.read_text(encoding="ascii") == _KEY:
        return root
    fetched = root.with_name(f"{root.name}.fetched").absolute()
    fetched.mkdir(parents=True, exist_ok=True)
    with replacing(root, "Debian that edgesafe made", lambda folder: (folder / _MARK).is_file()) as work:
        new = work.absolute() / "new"
        _fetch(new, fetched)
        archives = new / "var" / "cache" / "apt" / "archives"
        for archive in bar(sorted(archives.glob("*.deb")), label="unpacking"):
            subprocess.run(["dpkg-deb", "-x", archive, new], check=True)
            archive.unlink()
        _finish(new)
        (new / _MARK).write_text(_KEY, encoding="ascii")
    shutil.rmtree(fetched)
    return root


def mirror() -> str:
    """The mirror of Debian that apt is set to; empty where it has none, and debootstrap takes its own."""
    words = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""
    return mirror_of(listed)


def mirror_of(listed: str) -> str:
    r"""The first mirror that serves a whole Debian, among lines of origin, codename and address.

    Before the first ``apt-get update`` apt knows no origins; there the address alone tells.

    >>> mirror_of("Debian bookworm-security http://a.example/debian-security/\nDebian trixie http://b.example/debian/")
    'http://b.example/debian/'
    >>> mirror_of("  http://c.example/debian/\nnodistro nodistro https://d.example/"), mirror_of("")
    ('http://c.example/debian/', '')
    """
    rows = [line.split(" ") for line in listed.splitlines() if line.count(" ") == 2]
    known = [uri for origin, codename, uri in rows if origin == "Debian" and "-" not in codename]
    alike = [uri for origin, _, uri in rows if not origin and uri.rstrip("/").endswith("/debian")]
    return next(iter(known + alike), "")


def _fetch(new: Path, fetched: Path) -> None:
    words = ["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", f"--include={_PACKAGES}", f"--keyring={KEYRING}"]
    words += [f"--cache-dir={fetched}", SUITE, str(new), *filter(None, [mirror()])]
    env = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env, check=False
    )
    if done.returncode:
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no message")
        raise DeviceError(
            f"debootstrap can't fetch a Debian of arm64: {last}",
            where=mirror() or "debootstrap's own mirror",
            expected=f"a mirror with {SUITE} of arm64, and room on the disk",
            todo="look at the network, the disk and apt's sources, then run it again: it continues",
        )


def _finish(new: Path) -> None:
    """What the packages' scripts would do, as far as it is needed."""
    for name, text in _FILES.items():
        (new / name).write_text(text, encoding="ascii")
    home = new / "home" / USER
    home.mkdir(parents=True)
    os.chown(home, USER_ID, USER_ID)
    (new / "tmp").chmod(0o1777)
    (new / "usr" / "local" / "bin").mkdir(parents=True, exist_ok=True)
    # Modules are compiled where they are first imported, by the user, so that only what is needed is.
    for folder in [path for path in (new / "usr" / "lib" / "python3.11").rglob("*") if path.is_dir()]:
        folder.chmod(0o777)
    (new / "usr" / "lib" / "python3.11").chmod(0o777)
