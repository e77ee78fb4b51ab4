"""A checkpoint of random weights of any published config, in bfloat16 shards, with the memory of one weight.

    python tests/tools/random_checkpoint.py CONFIG OUT [--seed N] [--shard-gb N] [--layers N] [--blocks N]

CONFIG is a folder with config.json and the processor's files, which are copied, or the name of one of `configs/`. Where
tokenizer.json is not among them LLaVA-1.5 shapes get the reference world's tokenizer and the others a token a byte: the rest of
the vocabulary has weights and no text. The weights lie under the names that the model's checkpoints have on the hub.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONFIGS = Path(__file__).parent / "configs"
GRID = 6  # rows and columns of tiles that the published tokenizers have tokens for
_TOGETHER = 2**25  # numbers drawn at a time


def find_config(name: str) -> Path:
    """A config.json by the name of a folder, a file or one of `configs/`."""
    path = Path(name)
    if path.is_dir():
        return path / "config.json"
    return path if path.is_file() else CONFIGS / name / "config.json"


def make_checkpoint(
    config: Path,
    out: Path,
    *,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    layers: int | None = None,
    blocks: int | None = None,
    empty: bool = False,
    **text: int,
) -> Path:
    """Write the checkpoint.

    Args:
        config: config.json; files beside it that belong to a processor are copied.
        out: new folder.
        seed: of the weights.
        shard_bytes: largest shard, unless a single weight is larger.
        layers: another number of decoder layers than the config's.
        blocks: another number of vision blocks than the config's.
        empty: headers alone are written, and files of the right length without blocks on the disk: enough for `edgesafe plan`.
        text: other values of its text_config.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    out.mkdir(parents=True)
    obj = json.loads(config.read_text(encoding="utf-8"))
    obj["text_config"] |= text | ({"num_hidden_layers": layers} if layers else {})
    obj["vision_config"] |= {"num_hidden_layers": blocks} if blocks else {}
    _write_processor(config.parent, out, obj)
    (out / "config.json").write_text(json.dumps(obj, indent=1) + "\n", encoding="utf-8")
    shaped = AutoConfig.from_pretrained(out)
    model = _on_meta(AutoModelForImageTextToText, shaped)
    names = {id(weight): name for name, weight in model.named_parameters()}
    saved = revert_weight_conversion(model, dict(model.named_parameters()))
    shapes = {key: (names.get(id(weight), key), tuple(weight.shape)) for key, weight in saved.items()}
    write_shards(out, shapes, None if empty else seed, shard_bytes)
    return out


def count_weights(config: Path) -> int:
    """How many weights a config's model has."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    obj = json.loads(config.read_text(encoding="utf-8"))
    shaped = AutoConfig.for_model(**obj)
    return sum(weight.numel() for weight in _on_meta(AutoModelForImageTextToText, shaped).parameters())


def _on_meta(auto: Any, config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16)


def _write_processor(source: Path, out: Path, obj: dict[str, Any]) -> None:
    """Tokenizer and processor files; where the tokenizer is ours, the config gets its ids."""
    files = [path for path in source.iterdir() if path.suffix in (".json", ".jinja", ".model") and path.name != "config.json"]
    for path in files:
        if "safetensors" not in path.name:
            shutil.copyfile(path, out / path.name)
    if any(path.name == "tokenizer.json" for path in files):
        return
    text = obj["text_config"]
    tokenizer = _llava_text(out, obj) if obj["model_type"] == "llava" else _bytes_text(out, obj)
    names = {"bos_token_id": tokenizer.bos_token, "eos_token_id": tokenizer.eos_token, "pad_token_id": tokenizer.pad_token}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items() if token}
    (out / "generation_config.json").write_text(json.dumps(ids))
    text |= ids
    obj |= {key: value for key, value in ids.items() if key in obj}
    kinds = {"image": "<image>", "video": "<video>"}
    obj |= {key: tokenizer.convert_tokens_to_ids(kinds[kind]) for key in obj if (kind := key.partition("_token_")[0]) in kinds}


def _llava_text(out: Path, obj: dict[str, Any]) -> Any:
    from edgesafe.reference.tokenizer import write_processor

    vision = obj["vision_config"]
    processor = write_processor(out)
    processor.patch_size = vision["patch_size"]
    processor.image_processor.size = {"shortest_edge": vision["image_size"]}
    processor.image_processor.crop_size = {"height": vision["image_size"], "width": vision["image_size"]}
    processor.tokenizer.model_max_length = obj["text_config"]["max_position_embeddings"]
    processor.save_pretrained(out)
    return processor.tokenizer


def _bytes_text(out: Path, obj: dict[str, Any]) -> Any:
    from tiny_families import write_text

    name = obj["model_type"] + (" mistral" if obj["text_config"]["model_type"] == "mistral" else "")
    return write_text(name, out, GRID)


def write_shards(out: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], seed: int | None, shard_bytes: int) -> None:
    """Write `model-00001-of-...safetensors` and their index, one weight at a time.

    Args:
        out: folder.
        shapes: (transformers' own name, which says how the weight is drawn; shape) by the name on disk.
        seed: of the weights; None writes files without them.
        shard_bytes: largest shard, unless a single weight is larger.
    """
    shards: list[list[str]] = [[]]
    for name, (_, shape) in shapes.items():
        room = shard_bytes - sum(2 * math.prod(shapes[other][1]) for other in shards[-1])
        if shards[-1] and 2 * math.prod(shape) > room:
            shards.append([])
        shards[-1].append(name)
    index = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / file, {name: shapes[name] for name in names}, None if seed is None else seed + i)
        index |= dict.fromkeys(names, file)
    total = sum(2 * math.prod(shape) for _, shape in shapes.values())
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def _write_shard(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], seed: int | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (_, shape) in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            file.truncate(file.tell() + at)
            return
        rng = np.random.default_rng(seed)
        for own, shape in shapes.values():
            for part in _draw(rng, own, shape):
                part.tofile(file)
            print(".", end="", file=sys.stderr, flush=True)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A weight's bfloat16 bits, some rows at a time: norms near 1, biases near 0, rows of a matrix of length 1."""
    count, norm = math.prod(shape), "norm" in name.rpartition(".")[0].rpartition(".")[2]
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
    scale = 0.1 if norm or len(shape) < 2 else 1 / math.sqrt(fan_in)
    middle = 1.0 if norm and name.endswith("weight") else 0.0
    for start in range(0, count, _TOGETHER):
        drawn = rng.standard_normal(min(_TOGETHER, count - start), np.float32)
        drawn *= scale
        drawn += middle
        bits = drawn.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
        yield (bits >> 16).astype(np.uint16)


def main() -> int:
    """Make one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="folder with config.json, config.json itself, or a name of tests/tools/configs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--layers", type=int, help="decoder layers, where not the config's")
    parser.add_argument("--blocks", type=int, help="vision blocks, where not the config's")
    options = parser.parse_args()
    shard = int(options.shard_gb * 10**9)
    config = find_config(options.config)
    make_checkpoint(config, options.out, seed=options.seed, shard_bytes=shard, layers=options.layers, blocks=options.blocks)
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    sys.exit(main())
