"""A LLaMA checkpoint as a GGUF file, every matrix in Q4_0 or in float32. Runs in the peers' environment."""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(path: Path):
    """Names and float32 arrays of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "F32", f"{name} is {entry['dtype']}"
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            yield name, np.frombuffer(file.read(end - begin), np.float32).reshape(entry["shape"])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in the order of llama.cpp's rotary embedding: halves become pairs."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def main(checkpoint: Path, out: Path, kind: str = "Q4_0") -> None:
    import gguf  # the peers' environment has it, edgesafe's has not

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    if "rope_parameters" in config:
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    matrix = gguf.GGMLQuantizationType[kind]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if kind == "Q4_0" else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in tensors(checkpoint / "model.safetensors"):
        stem = name.removesuffix(".weight")
        if stem in ENDS:
            target = ENDS[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{NAMES[rest]}"
            if rest.endswith(("q_proj", "k_proj")):
                heads = config["num_attention_heads" if rest.endswith("q_proj") else "num_key_value_heads"]
                weight = interleaved(weight, heads)
        as_type = matrix if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(weight), as_type)
        writer.add_tensor(f"{target}.weight", data, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and model.safetensors in float32")
    parser.add_argument("out", type=Path, help="the GGUF file")
    parser.add_argument("--kind", choices=("Q4_0", "F32"), default="Q4_0", help="type of every matrix")
    options = parser.parse_args()
    main(options.checkpoint, options.out, options.kind)
