"""An evaluation as a clone of the repository carries it: its report, and its answers compressed."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from edgesafe.certify.earlier import ANSWERS, REPORT
from edgesafe.errors import IntegrityError
from edgesafe.format.exits import Exit, parse_exits
from edgesafe.format.files import replacing, sha256_file, write_atomically
from edgesafe.format.targets import NEW

MADE_OF, _PACKED = "made_of.json", f"{ANSWERS}.xz"


def is_carried(folder: Path) -> bool:
    """Whether `carry_evaluation` wrote a folder."""
    return (folder / MADE_OF).is_file() and (folder / _PACKED).is_file()


def evaluation_key(folder: Path) -> str:
    """The key that `carry_evaluation` was given; empty where there is no such folder."""
    return str(json.loads((folder / MADE_OF).read_text(encoding="utf-8"))["key"]) if is_carried(folder) else ""


def has_exits(folder: Path, exits: str) -> bool:
    """Whether a stored evaluation, which has every depth, has the exits that a text names; a text of none names every depth."""
    found = {Exit.parse(e["exit"]) for e in json.loads((folder / REPORT).read_text(encoding="utf-8"))["exits"]}
    return found.issuperset(parse_exits(exits or "all", max(exit.depth for exit in found), None))


def carry_evaluation(evaluation: Path, out: Path, key: str) -> None:
    """Store an evaluation.

    Args:
        evaluation: what `edgesafe evaluate` wrote.
        out: folder; an earlier one of this kind is replaced.
        key: what the evaluation is made of, to be read by `evaluation_key`.
    """
    digests = {name: sha256_file(evaluation / name) for name in (REPORT, ANSWERS)}
    with replacing(out, "stored evaluation", is_carried) as work:
        (new := work / NEW).mkdir()
        (new / REPORT).write_bytes((evaluation / REPORT).read_bytes())
        (new / _PACKED).write_bytes(lzma.compress((evaluation / ANSWERS).read_bytes()))
        write_atomically(new / MADE_OF, (json.dumps({"key": key, "files": digests}, indent=1) + "\n").encode())


def unpack_evaluation(carried: Path, out: Path) -> None:
    """Write report.json and answers.jsonl as they were; plots and pages are not stored.

    Raises:
        IntegrityError: a file does not come out as it was.
    """
    try:
        texts = {REPORT: (carried / REPORT).read_bytes(), ANSWERS: lzma.decompress((carried / _PACKED).read_bytes())}
    except (OSError, lzma.LZMAError) as error:
        raise _damaged(carried) from error
    with replacing(out) as work:
        (new := work / NEW).mkdir()
        for name, digest in json.loads((carried / MADE_OF).read_text(encoding="utf-8"))["files"].items():
            (new / name).write_bytes(texts[name])
            if sha256_file(new / name) != digest:
                raise _damaged(carried)


def _damaged(carried: Path) -> IntegrityError:
    return IntegrityError(
        "the stored evaluation is not what was stored",
        where=str(carried),
        expected="the files of the repository",
        todo=f"restore {carried.name} from the repository, or evaluate again: --retrain",
    )
