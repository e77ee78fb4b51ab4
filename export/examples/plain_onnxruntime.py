"""A bundle without edgesafe: python plain_onnxruntime.py BUNDLE PICTURE QUESTION EXIT. README.md says what it leaves out."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps
from tokenizers import Tokenizer

root, m = Path(sys.argv[1]), json.loads(Path(sys.argv[1], "manifest.json").read_text(encoding="utf-8"))
assert m["format_version"] == 3 and m["tiles"] is None, "this example reads bundles of format 3 without tiles"
text, chat, spec, edge, size = m["text"], m["chat"], m["image"], m["image"]["resize_to"], m["image"]["size"]
# The picture: upright, resized, its middle, normalised to [1,3,H,W].
img = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
shortest = tuple(int(edge[0] * side / min(img.size)) for side in img.size)
to = {"shortest_edge": shortest, "exact": (edge[1], edge[0]), "none": img.size}[spec["resize"]]
img = img.resize(to, Image.Resampling[spec["resample"].upper()])
x, y = (img.width - size["width"]) // 2, (img.height - size["height"]) // 2
pixels = (np.asarray(img.crop((x, y, x + size["width"], y + size["height"]))) * spec["rescale_factor"]).astype(np.float32)
state = ((pixels - np.float32(spec["mean"])) / np.float32(spec["std"])).transpose(2, 0, 1)[None]
# The exit's graphs one after the other; the last one gives the image features.
for path in {e["exit"]: e["graphs"] for e in m["exits"]}[sys.argv[4]]:
    graph = ort.InferenceSession(root / path)
    (state,) = graph.run(None, {graph.get_inputs()[0].name: state})
# The prompt: the image token once per feature, and the features in their places.
tokenizer, image_id = Tokenizer.from_file(str(root / m["tokenizer"])), m["image_token_id"]
ids = tokenizer.encode(chat["prefix"] + sys.argv[3] + chat["suffix"], add_special_tokens=chat["add_special_tokens"]).ids
ids = np.array([[i for token in ids for i in [token] * (len(state) if token == image_id else 1)]], np.int64)
embed, decoder = (ort.InferenceSession(root / text[name]) for name in ("embed_tokens", "decoder"))
(embeds,) = embed.run(None, {"input_ids": np.where(ids == image_id, 0, ids)})
embeds[ids == image_id] = state
# Greedy answer: the cache goes in and comes out longer.
names, wants, answer = [o.name for o in decoder.get_outputs()], {i.name for i in decoder.get_inputs()}, []
past = {n: np.zeros((1, text["num_kv_heads"], 0, text["head_dim"]), np.float32) for n in wants if n.startswith("past")}
for read in range(ids.shape[1], min(ids.shape[1] + 48, text["context_length"])):
    places = np.arange(read - embeds.shape[1], read, dtype=np.int64)[None]
    feeds = {**past, "inputs_embeds": embeds, "attention_mask": np.ones((1, read), np.int64), "position_ids": places}
    out = dict(zip(names, decoder.run(None, {n: feeds[n] for n in wants}), strict=True))
    past = {n: out[n.replace("past_key_values", "present")] for n in past}
    answer.append(int(out["logits"][0, -1].argmax()))
    if answer[-1] in text["eos_token_ids"]:
        break
    (embeds,) = embed.run(None, {"input_ids": np.array([answer[-1:]], np.int64)})
print(json.dumps({"text": tokenizer.decode(answer).strip(), "tokens": answer}))
