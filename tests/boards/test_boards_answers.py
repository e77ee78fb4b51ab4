"""The script that answers on a board, here: smoke's own answers, and the same ones by another process."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product

from PIL import Image

from edgesafe.format.suite import CLASSES, Row, write_suite
from edgesafe_boards import answers
from edgesafe_boards.differences import differences
from handmade import SMALL_LIMITS, agree, make_bundle

ROWS = [
    Row(f"{cls}{i}", cls, cls, "images/a.png", f"what {i}?", "t", () if cls == "harmful" else ("pen",), "t", True)
    for cls in CLASSES
    for i in range(7)
]


def ran(way, bundle, file, every=1):
    words = [sys.executable, answers.__file__, way, str(bundle), str(file), str(every)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_smokes_own_answers_are_the_same_in_any_process(tmp_path):
    write_suite(tmp_path / "suite", ROWS, {"images/a.png": Image.new("RGB", (8, 8))}, "by-hand", "cert", SMALL_LIMITS, [])
    bundle = agree(make_bundle(tmp_path / "bundle", suite_from=tmp_path / "suite", certified=(1, 2, 3))).root
    smoked = ran("smoke", bundle, tmp_path / "smoke.jsonl")
    assert smoked.returncode == 0 and "answered by: " in smoked.stdout, smoked.stderr
    assert "(21 rows)" in smoked.stdout and list(tmp_path.glob("bundle.smoke/*.json"))
    assert ran("ask", bundle, tmp_path / "ask").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    asked = {(line["exit"], line["id"]) for line in lines}
    assert len(lines) == len(asked) == 63 and asked == set(product("123", (row.id for row in ROWS)))
    assert differences((tmp_path / "ask").read_text(), (tmp_path / "smoke.jsonl").read_text()) == (63, [])
    assert ran("ask", bundle, tmp_path / "third", 3).returncode == 0
    some = {json.loads(line)["id"] for line in (tmp_path / "third").read_text().splitlines()}
    assert some == {row.id for row in ROWS[::3]}
    assert {path.name for path in tmp_path.glob("*smoke*")} == {"smoke.jsonl", "bundle.smoke"}  # the helper's part is gone
