"""Small files of the kinds that `edgesafe reference smol` reads: a GGUF decoder, DINOv2 as an ONNX file, and wheels of them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from edgesafe.format.files import sha256_file
from edgesafe.reference.smol.decoder import GIVEN
from edgesafe.reference.smol.wheels import Wheel

WIDTH, BLOCKS, SIDE, PATCH, HEADS = 24, 3, 224, 14, 6


def write_gguf(path: Path) -> Path:
    """A LLaMA of two layers in Q4_1 with its embedding in Q8_0 and GPT-2's kind of tokens, as SmolLM2's file is."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (("block_count", 2), ("context_length", 128), ("embedding_length", 64), ("feed_forward_length", 96)):
        getattr(writer, f"add_{add}")(value)
    for add, value in (("head_count", 4), ("head_count_kv", 2), ("vocab_size", 320), ("rope_dimension_count", 16)):
        getattr(writer, f"add_{add}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))][:256]
    tokens = [*(f"<|{i}|>" for i in range(17)), *letters, "ab", *(f"x{i}" for i in range(320 - 18 - 256))]
    tokens[:3], tokens[16] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], GIVEN
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 17 + [1] * (320 - 17))
    writer.add_token_merges(["a b"])
    for name, number in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    shapes = {"token_embd": (320, 64), "output_norm": (64,)}
    layer = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "attn_norm": (64,)}
    layer |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "ffn_norm": (64,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[{1: "F32"}.get(len(shape), "Q8_0" if name == "token_embd" else "Q4_1")]
        data = gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Graph:
    """Nodes and random weights of a graph that is written down step by step."""

    def __init__(self) -> None:
        self.nodes, self.weights, self._rng = [], {}, np.random.default_rng(0)

    def weight(self, name: str, *shape: int, scale: float = 0.3) -> str:
        self.weights[name] = self._rng.standard_normal(shape, np.float32) * np.float32(scale)
        return name

    def constant(self, value: object, dtype: type = np.int64) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype)
        return name

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: object) -> str:
        import onnx

        name = name or f"/n{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [f"{name}_output_0"], name, **attributes))
        return f"{name}_output_0"

    def norm(self, x: str, path: str, name: str = "") -> str:
        ends = [self.weight(f"{path}.weight", WIDTH, scale=1), self.weight(f"{path}.bias", WIDTH)]
        return self.node("LayerNormalization", x, *ends, name=name, epsilon=1e-6)


def _block(g: _Graph, x: str, block: int) -> str:
    path, at = f"backbone.encoder.layer.{block}", 1000 + 10 * block
    place = f"backbone/encoder/layer.{block}"

    def linear(x: str, name: str, number: int, rows: int, columns: int) -> str:
        weight = g.weight(f"onnx::MatMul_{at + number}", columns, rows)
        y = g.node("MatMul", x, weight, name=f"/{place}/{name.replace('.', '/')}/MatMul")
        return g.node("Add", g.weight(f"{path}.{name}.bias", rows), y)

    def heads(x: str, *order: int) -> str:
        return g.node("Transpose", g.node("Reshape", x, g.constant([1, -1, HEADS, WIDTH // HEADS])), perm=order)

    normed = g.norm(x, f"{path}.norm1")
    q, k, v = (linear(normed, f"attention.attention.{n}", i, WIDTH, WIDTH) for i, n in enumerate(("query", "key", "value")))
    scores = g.node("MatMul", heads(q, 0, 2, 1, 3), heads(k, 0, 2, 3, 1))
    scores = g.node("Mul", scores, g.constant((WIDTH // HEADS) ** -0.5, np.float32))
    seen = g.node("MatMul", g.node("Softmax", scores, axis=-1), heads(v, 0, 2, 1, 3))
    seen = g.node("Reshape", g.node("Transpose", seen, perm=(0, 2, 1, 3)), g.constant([1, -1, WIDTH]))
    out = linear(seen, "attention.output.dense", 3, WIDTH, WIDTH)
    x = g.node("Add", g.node("Mul", out, g.weight(f"{path}.layer_scale1.lambda1", WIDTH)), x)
    out = linear(g.norm(x, f"{path}.norm2"), "mlp.fc1", 4, 4 * WIDTH, WIDTH)
    out = linear(g.node("Gelu", out), "mlp.fc2", 5, WIDTH, 4 * WIDTH)
    return g.node("Add", g.node("Mul", out, g.weight(f"{path}.layer_scale2.lambda1", WIDTH)), x)


def write_onnx(path: Path) -> Path:
    """DINOv2 of three blocks with torch.onnx's names and a saliency head, written down by hand."""
    import onnx

    g, patches = _Graph(), (SIDE // PATCH) ** 2
    name = "backbone.embeddings.patch_embeddings.projection"
    weights = g.weight(f"{name}.weight", WIDTH, 3, PATCH, PATCH, scale=0.05), g.weight(f"{name}.bias", WIDTH)
    x = g.node("Conv", "input_image", *weights, strides=[PATCH, PATCH])
    x = g.node("Transpose", g.node("Reshape", x, g.constant([1, WIDTH, -1])), perm=(0, 2, 1))
    x = g.node("Concat", g.weight("backbone.embeddings.cls_token", 1, 1, WIDTH), x, axis=1)
    tables = g.weight("onnx::Concat_7", 1, 1, WIDTH), g.weight("onnx::Reshape_8", 1, patches, WIDTH)
    x = g.node("Add", x, g.node("Concat", *tables, axis=1))
    for block in range(BLOCKS):
        x = _block(g, x, block)
    x = g.norm(x, "backbone.layernorm", name="/backbone/layernorm/Add_1")
    out = g.node("Sigmoid", g.node("MatMul", x, g.weight("decoder.final_conv.weight", WIDTH, 1)))
    f32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        g.nodes,
        "tiny",
        [onnx.helper.make_tensor_value_info("input_image", f32, ["batch", 3, SIDE, SIDE])],
        [onnx.helper.make_tensor_value_info(out, f32, None)],
        [onnx.numpy_helper.from_array(value, key) for key, value in g.weights.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def make_wheel(file: Path, folder: Path) -> Wheel:
    """A wheel with one file in it."""
    folder.mkdir(exist_ok=True)
    packed = folder / f"{file.stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(file, f"pack/{file.name}")
    return Wheel(f"{file.stem}==1.0", packed.name, sha256_file(packed), f"pack/{file.name}", sha256_file(file), 1)
