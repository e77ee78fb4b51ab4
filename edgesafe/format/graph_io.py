"""The name, dtype and shape of every graph input and output, used by the exporter and the runtime alike.

Shapes: T vision tokens with CLS, C vision width, N image tokens (of a tile, where there are tiles, and
then a row more where there is a newline), D text width, S new tokens, P cached tokens, V vocabulary, KVH key-value heads,
HD head size. Batch is always 1.

    first segment   pixel_values f32 [1,3,H,W]        -> hidden_states_out f32 [1,T,C]
    next segments   hidden_states f32 [1,T,C]         -> hidden_states_out f32 [1,T,C]
    map             hidden_states f32 [1,T,C]         -> hidden_states_out f32 [1,T,C]: one exit's own, in front of the head
    head            hidden_states f32 [1,T,C]         -> image_features f32 [N,D]
    standalone exit pixel_values f32 [1,3,H,W]        -> image_features f32 [N,D]
    fewer tokens    image_features f32 [N,D]          -> image_features_out f32 [n,D]: behind head or standalone exit
    embed_tokens    input_ids i64 [1,S]               -> inputs_embeds f32 [1,S,D]
    decoder         inputs_embeds f32 [1,S,D], attention_mask i64 [1,P+S] (1 = may be read),
                    position_ids i64 [1,S], past_key_values.* f32 [1,KVH,P,HD]
                                                      -> logits f32 [1,S or 1,V], present.* f32 [1,KVH,P+S,HD]
    decoder that shares its cache: the same without position_ids; past_key_values.* and present.* f32 [1,KVH,L,HD] may be
                    one buffer, L >= P+S, since its lengths come from attention_mask; logits f32 [1,1,V]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PIXEL_VALUES = "pixel_values"
HIDDEN_STATES = "hidden_states"
HIDDEN_STATES_OUT = "hidden_states_out"
IMAGE_FEATURES = "image_features"
IMAGE_FEATURES_OUT = "image_features_out"
INPUT_IDS = "input_ids"
INPUTS_EMBEDS = "inputs_embeds"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS = "logits"

HEAD_PATH = "vision/head.onnx"
TOKENS = "vision/tokens_"  # what each graph's path begins with that leaves visual tokens out
EMBED_PATH = "text/embed_tokens.onnx"
DECODER_PATH = "text/decoder_model_merged.onnx"
# Far above any model here, and low enough that what they are multiplied to fits a device's memory.
MAX_SIDE = 4096
MAX_CONTEXT = 2**20


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; a text in ``shape`` names a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def past_key(layer: int) -> str:
    """The input that holds a layer's cached keys, f32 [1,KVH,P,HD]."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    """The input that holds a layer's cached values, f32 [1,KVH,P,HD]."""
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    """The output that holds a layer's keys with the new ones, f32 [1,KVH,P+S,HD]."""
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    """The output that holds a layer's values with the new ones, f32 [1,KVH,P+S,HD]."""
    return f"present.{layer}.value"


def segment_path(first: int, last: int) -> str:
    """The graph that runs blocks ``first + 1`` to ``last``, so that a chain's names read 00-06, 06-12.

    >>> segment_path(0, 6)
    'vision/blocks_00-06.onnx'
    """
    return f"vision/blocks_{first:02d}-{last:02d}.onnx"


def blocks_of(path: str) -> int:
    """How many blocks a segment runs, by its path; 0 where the path is another graph's.

    >>> blocks_of(segment_path(6, 12)), blocks_of(HEAD_PATH)
    (6, 0)
    """
    found = re.fullmatch(r"vision/blocks_(\d+)-(\d+)\.onnx", path)
    return int(found[2]) - int(found[1]) if found else 0


def map_path(depth: int) -> str:
    """The graph that one exit runs between its blocks and the chain's head.

    >>> map_path(6)
    'vision/map_06.onnx'
    """
    return f"vision/map_{depth:02d}.onnx"


def tokens_path(visual_tokens: int) -> str:
    """The graph that keeps so many of a picture's image features; every depth shares it.

    >>> tokens_path(9)
    'vision/tokens_9.onnx'
    """
    return f"{TOKENS}{visual_tokens}.onnx"


def standalone_path(depth: int) -> str:
    """The whole graph of one exit in the standalone layout.

    >>> standalone_path(6)
    'vision/exit_06.onnx'
    """
    return f"vision/exit_{depth:02d}.onnx"
