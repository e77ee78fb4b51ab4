"""CLIP-L/14-336 blocks with random weights: our float32 and int8-dynamic graphs, and the same module in torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# Of the tower's 24 blocks, which are all alike: a ratio over 8 is that over 24.
blocks = 8
WIDTH, SIDE, TOKENS = 1024, 336, 577


def _module():
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from edgesafe_export.modules import Segment

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=14,
        projection_dim=768,
    )
    tower = CLIPVisionModel(config).eval()
    tower = getattr(tower, "vision_model", tower)
    return Segment(list(tower.encoder.layers), tower.embeddings, tower.pre_layrnorm).eval()


def _graphs(work: Path) -> dict[str, Path]:
    """Paths of the graphs by scheme, made once."""
    import onnx

    from edgesafe_export import graphs
    from edgesafe_export.quantize import quantize

    folder = work / "clip"
    paths = {scheme: folder / f"{scheme}.onnx" for scheme in ("fp32", "int8-dynamic")}
    if not (folder / "about.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        module = _module()
        geometry = SimpleNamespace(tokens=TOKENS, vision_width=WIDTH, image_size=SIDE)
        family = SimpleNamespace(geometry=geometry, segment=lambda *_: module)
        model, spec = graphs.segment(family, 0, blocks)
        for scheme, path in paths.items():
            onnx.save(quantize(model, scheme), path)
        (folder / "about.json").write_text(json.dumps(asdict(spec)))
    return paths


def _opened(work: Path, threads: int):
    from edgesafe.format.graph_io import TensorSpec
    from edgesafe.format.specs import GraphSpec
    from edgesafe.runtime.ort import OrtGraph

    paths = _graphs(work)
    about = json.loads((work / "clip" / "about.json").read_text())
    ends = [tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in about[k]) for k in ("inputs", "outputs")]
    return {scheme: OrtGraph(str(path), GraphSpec(ends[0], ends[1], None, 0), threads) for scheme, path in paths.items()}


def _picture() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)


def vision_runs(work: Path, threads: int) -> dict[str, Callable[[], dict[str, float]]]:
    """One picture through each; the float32 graph comes first, so that the others' ratios are against it."""
    import torch

    torch.set_num_threads(threads)
    opened, picture, module = _opened(work, threads), _picture(), _module()

    def timed(run: Callable[[], object]) -> dict[str, float]:
        begin = time.perf_counter()
        run()
        return {"picture_ms": (time.perf_counter() - begin) * 1e3}

    def by_torch() -> object:
        with torch.inference_mode():
            return module(torch.from_numpy(picture))

    runs: dict[str, Callable[[], object]] = {name: lambda g=graph: g.advance(picture) for name, graph in opened.items()}
    runs["torch float32"] = by_torch
    return {name: lambda r=run: timed(r) for name, run in runs.items()}


def feature_agreement(work: Path, threads: int) -> dict[str, float]:
    """int8 against float32 on noise: the least cosine of any state, and the largest difference over the largest value."""
    states = {name: graph.advance(_picture()).numpy()[0].astype(np.float64) for name, graph in _opened(work, threads).items()}
    a, b = states["fp32"], states["int8-dynamic"]
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"least_cosine": round(float(cosines.min()), 5), "relative": round(float(np.abs(a - b).max() / np.abs(a).max()), 5)}
