"""What a decoder's matrices read on calibration tokens, layer by layer, as the quantized layers before leave them.

The tokens are requests with pictures and neutral English text. Between the layers all states lie on the disk; in memory are one
layer's weights, one sequence's state and the Hessians of the layer's matrices.
"""

from __future__ import annotations

import pydoc_data.topics
import random
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor

from edgesafe.format.tiles import ALONE, cut_of
from edgesafe_export import parity_pieces as compare
from edgesafe_export.parity_model import Probe, processed
from edgesafe_export.pieces import EMBED, LAYER, Piece
from edgesafe_export.quantize import matrices
from edgesafe_export.scoring import Answered, open_desk, see
from edgesafe_export.skeleton import Sketch
from edgesafe_export.tolerances import CALIBRATION_TOKENS, CALIBRATION_WINDOW

# Shorter paragraphs are headings and tables.
_LEAST_WORDS = 15


def neutral_text(seed: int) -> str:
    """English prose that every Python brings along: the reference's own pages, in an order of the seed's."""
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(seed).shuffle(pages)
    return "\n\n".join(pages)


@dataclass(frozen=True)
class Calibration:
    """The calibration tokens on their way through the decoder.

    Attributes:
        sketch: where the weights are.
        pieces: all of them, in order.
        requests: pictures and requests.
        seed: picks the text.
        folder: where the states lie.
    """

    sketch: Sketch
    pieces: Sequence[Piece]
    requests: Sequence[Probe]
    seed: int
    folder: Path

    def hessians(self, piece: Piece, constants: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Of each matrix of a layer the sum of x x^T over what it reads, float32 [inputs, inputs].

        Args:
            piece: the layer; the ones before it have been quantized.
            constants: its graph's weights.
        """
        layer = piece.at[0]
        if not layer:
            self._begin()
        else:  # not the state before it, which a layer that is done again needs
            shutil.rmtree(self._states(layer - 1), ignore_errors=True)
        read = {name: node.input[0] for name, node in matrices(piece.blueprint.proto).items()}
        session = compare.open_graph(_tapped(piece.blueprint.proto, read.values()), constants)
        sums: dict[str, Tensor] = {}
        for file in self._files(layer):
            outputs = compare.run_layer(piece, session, np.load(file))
            for name in set(read.values()):
                rows = torch.from_numpy(outputs[name][0])
                sums[name] = rows.T @ rows if name not in sums else sums[name].addmm_(rows.T, rows)
        return {name: sums[source] for name, source in read.items()}

    def advance(self, piece: Piece, quantized: onnx.ModelProto) -> None:
        """Read the tokens through a quantized layer."""
        session = compare.open_graph(quantized, {})
        folder = self._states(piece.at[1])
        folder.mkdir(parents=True, exist_ok=True)
        for file in self._files(piece.at[0]):
            np.save(folder / file.name, compare.next_state(compare.run_layer(piece, session, np.load(file))))

    def _states(self, layer: int) -> Path:
        return self.folder / f"before_{layer:03d}"

    def _files(self, layer: int) -> list[Path]:
        return sorted(self._states(layer).glob("*.npy"))

    def _begin(self) -> None:
        """The embeddings of all sequences, the pictures' features among them."""
        family, folder = self.sketch.family, self._states(0)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        asked = [self._asked(*request) for request in self.requests]
        desk = open_desk(self.sketch, asked, self.folder / "vision")
        for piece in self.pieces:
            if piece.kind == LAYER:
                break
            run = partial(compare.want, piece, self.sketch.load(sorted(set(piece.names.values()))))
            if piece.kind != EMBED:
                see(desk, piece, run)
                continue
            for number, ids in enumerate([*(one.prompt_ids for one in asked), *self._windows()]):
                row = np.array([ids], np.int64)
                places = row == family.geometry.image_token_id
                state = run(np.where(places, 0, row)).copy()
                if number < len(asked):
                    state[places] = desk.features(number)
                np.save(folder / f"{number:04d}.npy", state)
        shutil.rmtree(desk.folder)

    def _asked(self, image: Image.Image, prompt: str) -> Answered:
        """A request as its prompt's tokens, without an answer."""
        family = self.sketch.family
        cut = cut_of(family.tiles, family.geometry.image_size, (image.height, image.width)) if family.tiles else ALONE
        ids = processed(family, image, prompt)["input_ids"][0].tolist()
        return Answered(image, prompt, family.geometry.reference, cut, tuple(ids), (), "", np.empty(0))

    def _windows(self) -> list[list[int]]:
        """The text's tokens, cut into sequences: half of it plain, the other half as what a user and the model say."""
        family = self.sketch.family
        prefix, suffix = family.chat.prefix.replace(family.processor.image_token, ""), family.chat.suffix
        paragraphs = [part for part in neutral_text(self.seed).split("\n\n") if len(part.split()) > _LEAST_WORDS]
        plain, said = paragraphs[::2], [" ".join(part.split()).partition(". ") for part in paragraphs[1::2]]
        turns = [f"{prefix}{asked}.{suffix}{answer}" for asked, _, answer in said]
        size = min(CALIBRATION_WINDOW, family.text_config.max_position_embeddings)
        windows = []
        for text in ("\n\n".join(plain), "\n".join(turns)):
            ids = family.processor.tokenizer(text, add_special_tokens=False)["input_ids"][: CALIBRATION_TOKENS // 2]
            windows += [ids[at : at + size] for at in range(0, len(ids), size)]
        return windows


def _tapped(proto: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A layer's graph that also gives some of its inner values."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    tapped.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(set(names)))
    return tapped
