"""The bundle made by hand with exits that see less: a picture is 2 x 2 features, one of which is left, or fewer tiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import helper

from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle, file_specs, write_manifest
from edgesafe.format.certificate import write_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.graph_io import IMAGE_FEATURES, IMAGE_FEATURES_OUT
from edgesafe.format.manifest import Manifest
from edgesafe.format.specs import ExitSpec
from handmade import _F, FEATURES, HIDDEN, _info, _save, make_certificate

ONE = graph_io.tokens_path(1)
# Of 2 x 2 the one token in row (2 * 0 + 1) * 2 // 2 = 1 and column 1 is kept: the last.
LEFT = np.array([3])


def with_rungs(root: Path, *exits: str, certified: Iterable[str] = (), flops: int | None = 0) -> Manifest:
    """Give a copy of the bundle the exits of these texts, those in `certified` with a passed verdict."""
    made, asked = Bundle.open(root).manifest, [Exit.parse(text) for text in exits]
    for name in ("certificate.json", "latency.json"):
        (root / name).unlink(missing_ok=True)
    nodes = [helper.make_node("Gather", [IMAGE_FEATURES, "left"], [IMAGE_FEATURES_OUT], axis=0)]
    ends = [_info(IMAGE_FEATURES, _F, [FEATURES, HIDDEN])], [_info(IMAGE_FEATURES_OUT, _F, [1, HIDDEN])]
    graphs = dict(made.graphs)
    if made.tiles is None:
        graphs[ONE] = _save(root / ONE, nodes, *ends, {"left": LEFT}, flops)
    ways = {spec.exit.depth: spec.graphs for spec in made.exits}
    specs = [ExitSpec(exit, (*ways[exit.depth], *([ONE] if exit.visual_tokens else []))) for exit in sorted(asked)]
    manifest = replace(made, exits=tuple(specs), graphs=graphs, files=file_specs(root))
    write_manifest(root, manifest)
    bundle = Bundle.open(root)
    if certified := set(certified):
        certificate = make_certificate(bundle, tuple(exit.depth for exit in asked))
        failed = {"verdict": "failed", "reasons": ["by hand"]}
        exits = tuple(one if str(one.exit) in certified else replace(one, **failed) for one in certificate.exits)
        write_certificate(bundle, replace(certificate, exits=exits))
    return bundle.manifest
