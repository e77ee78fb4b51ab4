"""Whether two bundles hold the same graphs, byte for byte, but for the exporter's notes on where nodes come from.

`python tests/tools/same_graphs.py A B`; exit code 1 where a graph differs. Earlier exports still hold those notes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnx


def bare(path: Path) -> bytes:
    """A graph's bytes without its metadata."""
    model = onnx.load(path, load_external_data=False)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    return model.SerializeToString(deterministic=True)


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs=2, type=Path, help="two bundles")
    a, b = parser.parse_args().bundles
    names = {path.relative_to(root) for root in (a, b) for path in root.rglob("*.onnx")}
    other = sorted(str(n) for n in names if not ((a / n).is_file() and (b / n).is_file() and bare(a / n) == bare(b / n)))
    print(f"{len(names) - len(other)} of {len(names)} graphs are the same" + "".join(f"\n  differs: {name}" for name in other))
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
