"""llama.cpp beside the bundles: a GGUF file in another scheme, and its logits in every place. Runs in the peers' environment.

    python llama_logits.py quantize IN.gguf OUT.gguf Q4_K_M
    python llama_logits.py serve MODEL.gguf THREADS

`serve` reads lines `IDS.npy OUT.npy` (tokens [S], one window) and writes the logits [S,V], float32, from an empty cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np


def quantize(source: str, target: str, scheme: str) -> None:
    """Write a GGUF file in another scheme, by llama.cpp's own choice of matrices."""
    import llama_cpp as api  # the peers' environment has it, edgesafe's has not

    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{scheme}")
    params.nthread = 1
    params.allow_requantize = True  # SmolLM2's wheel holds Q4_1
    if api.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"llama_model_quantize failed: {source} to {scheme}")


def serve(model: str, threads: int) -> None:
    """Logits of one window after another."""
    import llama_cpp as api

    api.llama_backend_init()
    loaded = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(loaded, params)
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    for line in sys.stdin:
        source, target = line.split()
        ids = np.load(source)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids.tolist()):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        api.llama_memory_clear(api.llama_get_memory(context), True)
        if api.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        np.save(target, np.ctypeslib.as_array(api.llama_get_logits(context), (len(ids), size)))
        api.llama_batch_free(batch)
        print("done", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("quantize")
    one.add_argument("source")
    one.add_argument("target")
    one.add_argument("scheme")
    one.set_defaults(run=quantize)
    one = commands.add_parser("serve")
    one.add_argument("model")
    one.add_argument("threads", type=int)
    one.set_defaults(run=serve)
    words = vars(parser.parse_args())
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        words.pop("run")(**words)
