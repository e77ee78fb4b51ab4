"""The examples that run a bundle without edgesafe, in Python and in Node, on a real bundle: token-equal to the session.

`make node` runs it on build/DEVICE/bundle. Each asked row of the suite is one question at the deepest and one at the shallowest
certified exit, by a new process. Node's packages are installed under --node; without Node, only Python answers.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from edgesafe import Session
from edgesafe.format.bundle import Bundle
from edgesafe.format.suite import Row, read_suite
from edgesafe.progress import table
from examples import FOLDER, NODE, ROOT, asked, python, wanted
from results import write_result


def node(folder: Path) -> list[str]:
    """Node's command line, its packages installed in a folder beside a copy of the example."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", NODE.name):
        shutil.copyfile(FOLDER / name, folder / name)
    # No scripts: onnxruntime-node's own fetches a build for graphics cards, which nothing here uses.
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
    return ["node", str(folder / NODE.name)]


def spread(rows: tuple[Row, ...], count: int) -> list[Row]:
    """So many rows, of every family as equally as it goes."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    ordered = [(place, family, row) for family, members in families.items() for place, row in enumerate(members)]
    return [row for _, _, row in sorted(ordered, key=lambda one: one[:2])[:count]]


def main() -> int:
    """Ask, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=32, help="rows of the suite (32)")
    parser.add_argument("--node", type=Path, default=ROOT / "build" / "node", help="folder of Node's packages (build/node)")
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    args = parser.parse_args()
    lines = {"python": python()}
    if shutil.which("node") and shutil.which("npm"):
        lines["node"] = node(args.node.resolve())
    else:
        print("NOT RUN: the example in Node, because node or npm is not on this machine")
    bundle = Bundle.open(args.bundle.resolve())
    suite = read_suite(bundle.root / (bundle.manifest.suite.path if bundle.manifest.suite else "suite"))
    same: Counter[str] = Counter()
    different: list[list[str]] = []
    with Session.open(bundle.root) as session:
        for row in spread(suite.smoke_rows(), args.rows):
            for exit in {session.certified[0], session.certified[-1]}:
                right = wanted(session, suite.image_path(row), row.prompt, exit)
                for name, line in lines.items():
                    got = asked(line, bundle.root, suite.image_path(row), row.prompt, exit)
                    same[name] += got == right
                    different += [[name, row.id, str(exit), right["text"], got["text"]]] * (got != right)
    shown = [[name, same[name], sum(one[0] == name for one in different)] for name in lines]
    print(table(shown, ["example", "token-equal", "different"]))
    for one in different:
        print(*one, sep=" | ")
    if args.out:
        write_result(args.out, {"bundle": bundle.digest, "rows": args.rows, "same": dict(same), "different": different})
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
