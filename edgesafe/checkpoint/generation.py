"""What a checkpoint's generation_config asks of greedy decoding: end tokens are honoured, anything else is refused.

The runtime and `exit_model.generate` take the likeliest token at each step. Settings of sampling (`do_sample`, `temperature`,
`top_p` and the like) and lengths are ignored: transformers' `generate(do_sample=False, max_new_tokens=N)` ignores them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgesafe.errors import InputError, UnsupportedModelError

# Values that leave transformers' greedy answer as it is; None always does.
# Source: transformers 5.23 `GenerationMixin._get_logits_processor`, `_get_stopping_criteria` and `get_generation_mode`.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "stop_strings": (),
    "max_time": (),
    "token_healing": (False,),
    # Other ways to the same answer, where transformers' own fail on pictures; and a cache of fewer bits, which changes it.
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static"),
}


def read_generation(folder: Path) -> Any:
    """A checkpoint's generation_config, or else the one that its config.json holds, as transformers' loader takes them.

    Raises:
        InputError: The file is damaged.

    Source: transformers 5.23 `GenerationMixin.adjust_generation_fn`.
    """
    from transformers import GenerationConfig

    named = (folder / "generation_config.json").is_file()
    other: dict[str, Any] = {} if named else {"config_file_name": "config.json", "_from_model_config": True}
    try:
        return GenerationConfig.from_pretrained(folder, **other)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"the generation settings can't be read: {error}",
            where=str(folder / ("generation_config.json" if named else "config.json")),
            expected="a JSON table",
            todo="use an intact Hugging Face checkpoint folder",
        ) from error


def check_generation(config: Any) -> None:
    """Refuse settings with which transformers' greedy answer is another than ours.

    Args:
        config: The model's `generation_config`.

    Raises:
        UnsupportedModelError: One is set.
    """
    for key, neutral in _NEUTRAL.items():
        value = getattr(config, key, None)
        if value is not None and value not in neutral:
            raise UnsupportedModelError(
                f"{key} is {value!r}, which changes greedy answers and is not supported",
                where="generation_config.json",
                expected=f"{key} " + " or ".join(["left out", *map(repr, neutral)]),
                todo=f"remove {key!r} from generation_config.json (or config.json, where it stands there)",
            )


def end_tokens(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer, the tokenizer's own first where it is among them.

    Args:
        config: The model's `generation_config`.
        tokenizer: The model's.

    Raises:
        InputError: Neither names one, or what is named is no token's number.
    """
    own, named = tokenizer.eos_token_id, config.eos_token_id
    named = own if named is None else named
    if named is None or named == []:
        raise InputError(
            "neither generation_config.json nor the tokenizer names an end token",
            where="eos_token_id",
            expected="a token that ends an answer",
            todo="set eos_token_id in generation_config.json",
        )
    ids = tuple(named) if isinstance(named, list | tuple) else (named,)
    if wrong := [one for one in ids if not isinstance(one, int) or isinstance(one, bool)]:
        raise InputError(
            f"the end token {wrong[0]!r} is not a token's number",
            where="eos_token_id",
            expected="a whole number, or a list of them",
            todo="correct eos_token_id in generation_config.json",
        )
    return tuple(sorted(ids, key=lambda number: number != own))
