"""A finished bundle's logits in every place of a text, by its own graphs in onnxruntime, not in the last place alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx

from edgesafe.format import graph_io
from edgesafe.format.bundle import Bundle
from edgesafe.runtime import decode
from edgesafe.runtime.engine import Graph
from edgesafe.runtime.ort import OnnxRuntime

# Of the range of a window's logits: the head computes one row or 512, in another order of additions.
_SAME = 1e-3


class EveryLogit:
    """The text side of a bundle, opened with a decoder that keeps every place.

    Args:
        root: The bundle.
        work: A folder for the changed decoder; what its graph names beside itself is there too.
        threads: Of the graphs.
    """

    def __init__(self, root: Path, work: Path, threads: int) -> None:
        self.bundle = Bundle.open(root)
        self.text = self.bundle.manifest.text
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root / Path(self.text.decoder).parent, work / Path(self.text.decoder).parent)
        keep_every_place(work / self.text.decoder)
        self._embed = self._open(root / self.text.embed_tokens, self.text.embed_tokens, threads)
        self._decoder = self._open(work / self.text.decoder, self.text.decoder, threads)

    def _open(self, path: Path, name: str, threads: int) -> Graph:
        return OnnxRuntime().open(str(path), self.bundle.manifest.graphs[name], threads)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits [S,V] of tokens [S], from an empty cache."""
        return self._step(self._decoder, ids)

    def check(self, ids: np.ndarray) -> None:
        """Hold the changed decoder to the shipped one, which gives the last place's logits.

        Raises:
            ValueError: They differ.
        """
        shipped = self._open(self.bundle.root / self.text.decoder, self.text.decoder, 1)
        want, got = self._step(shipped, ids)[-1], self.read(ids)[-1]
        if (apart := float(np.abs(want - got).max())) > _SAME * float(np.ptp(want)):
            raise ValueError(f"{self.bundle.root}: the changed decoder's last logits are off by {apart}")

    def _step(self, decoder: Graph, ids: np.ndarray) -> np.ndarray:
        embeds = decode.embed_ids(self._embed, ids[None])
        return np.asarray(decode.step(decoder, self.text, embeds, decode.empty_cache(self.text))[0][0])


def keep_every_place(path: Path) -> None:
    """Take the Slice out of a decoder's graph that leaves the last place alone in front of the head."""
    model = onnx.load(path, load_external_data=False)
    made = {name: node for node in model.graph.node for name in node.output}
    node = made[graph_io.LOGITS]
    while node.op_type != "Slice":  # the head is one product, perhaps with a cast or a scale in front
        node = made[node.input[0]]
    before, behind = node.input[0], node.output[0]
    for other in model.graph.node:
        other.input[:] = [before if name == behind else name for name in other.input]
    model.graph.node.remove(node)
    for value in model.graph.output:
        if value.name == graph_io.LOGITS:
            value.type.tensor_type.shape.dim[1].dim_param = "every"
    onnx.save(model, path)
