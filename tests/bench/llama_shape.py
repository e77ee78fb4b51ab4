"""One LLaMA shape with random weights, for each engine: our two text graphs, a GGUF file, an onnxruntime-genai folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import edgesafe
from edgesafe.format.specs import TextSpec

LAYERS, WIDTH, MIDDLE, HEADS, KV_HEADS, VOCAB, CONTEXT = 16, 960, 2560, 15, 5, 32_064, 1024
TOKENIZER = Path(edgesafe.__file__).parent / "reference" / "weights"


def write_checkpoint(folder: Path) -> Path:
    """The checkpoint in transformers' layout, with some tokenizer, which onnxruntime-genai's builder asks for."""
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=MIDDLE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def float_decoder(checkpoint: Path):
    """The exporter's float graphs of it: embed_tokens and decoder, each (model, spec)."""
    import torch
    from transformers import LlamaForCausalLM

    from edgesafe_export import graphs

    causal = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    family = SimpleNamespace(
        text_config=causal.config,
        head_dim=causal.config.hidden_size // causal.config.num_attention_heads,
        decoder=lambda: causal,
        embed_tokens=lambda: causal.get_input_embeddings(),
    )
    return graphs.embed_tokens(family), graphs.decoder(family)


def write_ours(folder: Path, parts, quantize) -> Path:
    """`embed.onnx`, `decoder.onnx` and what the runtime must know of them.

    Args:
        folder: where to.
        parts: from `float_decoder`.
        quantize: the decoder's model to its quantized one.
    """
    import onnx

    from edgesafe_export.quantize import EMBED_SCHEME
    from edgesafe_export.quantize import quantize as by_scheme

    folder.mkdir(parents=True, exist_ok=True)
    (embed, embed_spec), (decoder, decoder_spec) = parts
    onnx.save(by_scheme(embed, EMBED_SCHEME), folder / "embed.onnx")
    onnx.save(quantize(decoder), folder / "decoder.onnx")
    text = TextSpec("embed.onnx", "decoder.onnx", LAYERS, KV_HEADS, WIDTH // HEADS, WIDTH, VOCAB, CONTEXT, (VOCAB - 1,))
    about = {"text": asdict(text), "embed": asdict(embed_spec), "decoder": asdict(decoder_spec)}
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def write_gguf(checkpoint: Path, out: Path, python: Path) -> Path:
    """Q4_0 in every matrix (llama.cpp's own default keeps the head in Q6_K, which would be more bits than ours)."""
    if not out.exists():
        subprocess.run([python, Path(__file__).with_name("gguf_file.py"), checkpoint, out], check=True)
    return out


def write_genai(checkpoint: Path, out: Path, python: Path) -> Path:
    """onnxruntime-genai's own builder at int4, accuracy level 4; it runs here, because it wants torch and transformers."""
    if not (out / "genai_config.json").exists():
        site = next((python.parent.parent / "lib").glob("python*/site-packages"))
        code = (
            f"import sys, runpy; sys.path.append({str(site)!r}); "
            f"sys.path.insert(0, {str(site / 'onnxruntime_genai' / 'models')!r}); "
            "sys.argv[0] = 'builder.py'; runpy.run_module('builder', run_name='__main__')"
        )
        words = ["-i", checkpoint, "-o", out, "-p", "int4", "-e", "cpu", "-c", out.parent / "cache"]
        words += ["--extra_options", "int4_accuracy_level=4"]
        subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return out
