"""The reference model's own tokenizer and processor files, in the layout that LLaVA-1.5 ships on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgesafe.reference.draw import SIZE
from edgesafe.reference.wordings import COMMON
from edgesafe.reference.world import corpus

PATCH = 12
VOCAB_LIMIT = 1536
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
# LLaVA-1.5's chat layout: the picture first, then the text, one space before ASSISTANT.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train_tokenizer() -> Any:
    """A byte-fallback BPE in Llama's manner, trained on the world's own sentences.

    Returns:
        tokenizers.Tokenizer whose first ids are `SPECIAL`, then the 256 bytes, then characters and merges.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Words are trained apart so that no token spans two of them: the corpus is split at spaces, as "▁word".
    words = sorted({w for line in corpus() for w in _pieces(line)})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT,
        special_tokens=[*SPECIAL[:3], *[f"<0x{b:02X}>" for b in range(256)], *SPECIAL[3:]],
        initial_alphabet=[chr(c) for c in range(32, 127)],
        show_progress=False,
    )
    # A word trained without a normalizer keeps its own "▁"; the byte tokens must not be special in the finished file.
    plain = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    plain.train_from_iterator(words, trainer)
    state = json.loads(plain.to_str())
    vocab = state["model"]["vocab"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["model"]["merges"]]
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _pieces(line: str) -> list[str]:
    r"""The words of a line as the tokenizer will meet them: "▁word", and the first one bare (it follows "<image>\n")."""
    out = ["▁USER:", "▁ASSISTANT:", line.split(" ")[0].rstrip(".?!,")]
    for word in [*line.split(" "), *COMMON.split()]:
        core = word.rstrip(".?!,")
        out += ["▁" + core, *word[len(core) :]]
    return out


def write_processor(folder: Path) -> Any:
    """Write tokenizer, image processor, processor and chat template files; return the `LlavaProcessor`."""
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=train_tokenizer(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
        padding_side="left",
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, resample=3, do_convert_rgb=True
    )
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]  # as above
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return processor
