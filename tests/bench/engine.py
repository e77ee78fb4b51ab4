"""One engine in a process of its own, so that engines that are kept apart can take turns.

Each line on stdin `PROMPT ANSWER` (tokens) is one run. The answer is a JSON line {prefill_ms, decode_ms: [one per token]} and
the same in `_cpu_ms`.

Needs only what its engine needs, so that the peers run in their own environment.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# Reads a prompt's ids from an empty cache, then one token at a time.
Start, Step = Callable[[Sequence[int]], object], Callable[[int], object]


def edgesafe(model: Path, threads: int) -> tuple[Start, Step]:
    """The shipped reader, with the sampling that an answer pays for."""
    from edgesafe.format.graph_io import TensorSpec
    from edgesafe.format.specs import GraphSpec, TextSpec
    from edgesafe.runtime import decode
    from edgesafe.runtime.engine import Reader
    from edgesafe.runtime.ort import OrtGraph

    about = json.loads((model / "about.json").read_text())
    text = TextSpec(**about["text"])

    def opened(name: str) -> OrtGraph:
        spec = about[name]
        ends = [tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in spec[k]) for k in ("inputs", "outputs")]
        return OrtGraph(str(model / f"{name}.onnx"), GraphSpec(ends[0], ends[1], None, 0), threads)

    embed, decoder = opened("embed"), opened("decoder")
    readers: list[Reader] = []

    def start(ids: Sequence[int]) -> object:
        readers[:] = [decode.open_reader(embed, decoder, text, len(ids) + 64)]
        return decode.argmax_token(readers[0].read(decode.embed_ids(embed, np.array([ids], np.int64))))

    return start, lambda token: decode.argmax_token(readers[0].read_token(token))


def bundle(model: Path, threads: int) -> tuple[Start, Step]:
    """The text side of a finished bundle, as a session reads and answers with it."""
    from edgesafe.format.bundle import Bundle
    from edgesafe.runtime import decode
    from edgesafe.runtime.opened import OpenedBundle

    opened = OpenedBundle(Bundle.open(model), None, threads=threads, allow_uncertified=True)
    embed = opened.graph(opened.manifest.text.embed_tokens)
    readers = []

    def start(ids: Sequence[int]) -> object:
        readers[:] = [opened.reader(len(ids) + 64)]
        return decode.argmax_token(readers[0].read(decode.embed_ids(embed, np.array([ids], np.int64))))

    return start, lambda token: decode.argmax_token(readers[0].read_token(token))


def llama_cpp(model: Path, threads: int) -> tuple[Start, Step]:
    """llama.cpp through its binding's plain C functions; greedy by its own argmax over the same logits."""
    import llama_cpp as api

    api.llama_backend_init()
    loaded = api.llama_model_load_from_file(str(model).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 1024, 1024
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(loaded, params)
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))

    def read(ids: Sequence[int]) -> object:
        tokens = (api.llama_token * len(ids))(*ids)  # the batch only points at it
        if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (size,)).argmax())

    def start(ids: Sequence[int]) -> object:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        return read(ids)

    return start, lambda token: read([token])


def genai(model: Path, threads: int) -> tuple[Start, Step]:
    """onnxruntime-genai's generator, greedy."""
    import onnxruntime_genai as og

    config = json.loads((model / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    options["intra_op_num_threads"] = threads
    (model / "genai_config.json").write_text(json.dumps(config))
    loaded = og.Model(str(model))
    running: list[object] = []

    def start(ids: Sequence[int]) -> object:
        params = og.GeneratorParams(loaded)
        params.set_search_options(max_length=1024, do_sample=False)
        running[:] = [og.Generator(loaded, params)]
        running[0].append_tokens(np.array([ids], np.int32))
        return running[0].generate_next_token()

    return start, lambda token: running[0].generate_next_token()


ENGINES = {"edgesafe": edgesafe, "bundle": bundle, "llama.cpp": llama_cpp, "onnxruntime-genai": genai}


def main(name: str, model: Path, threads: int) -> None:
    begin = time.perf_counter()
    start, step = ENGINES[name](model, threads)
    print(json.dumps({"open_ms": (time.perf_counter() - begin) * 1e3}), flush=True)
    for line in sys.stdin:
        prompt, answer = map(int, line.split())
        ids = np.random.default_rng(prompt).integers(10, 30_000, prompt).tolist()
        prefill = timed(lambda p=ids: start(p))
        steps = [timed(lambda t=token: step(t)) for token in ids[:answer]]
        times = {"prefill_ms": prefill[0], "prefill_cpu_ms": prefill[1]}
        times |= {"decode_ms": [s[0] for s in steps], "decode_cpu_ms": [s[1] for s in steps]}
        print(json.dumps(times), flush=True)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds by the clock, and of all this process's threads on the processor: the second hardly sees other work."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path, help="what the engine opens")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    main(options.engine, options.model, options.threads)
