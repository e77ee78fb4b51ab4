// A bundle in Node: node plain_onnxruntime.mjs BUNDLE PICTURE.png QUESTION EXIT. README.md says what this leaves out.
import { readFileSync } from 'node:fs'
import { Tokenizer } from '@huggingface/tokenizers'
import ort from 'onnxruntime-node'
import { PNG } from 'pngjs'

const [root, picture, question, exit] = process.argv.slice(2)
const json = (name) => JSON.parse(readFileSync(`${root}/${name}`, 'utf8'))
const { image, text, chat, exits, tiles, format_version, image_token_id: imageId, tokenizer: file } = json('manifest.json')
if (format_version !== 3 || tiles) throw Error('this example reads bundles of format 3 without tiles')
const open = (path) => ort.InferenceSession.create(`${root}/${path}`)
const ints = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length])
// The picture: it has the model's size already, since no two libraries resize alike. Normalised to [1,3,H,W].
const { width, height, data } = PNG.sync.read(readFileSync(picture))
const { width: w, height: h } = image.size, plane = w * h, pixels = new Float32Array(3 * plane)
if (width !== w || height !== h) throw Error(`the picture is ${width} x ${height}; resize it to ${w} x ${h} first`)
for (let i = 0; i < 3 * plane; i++) { // each step is rounded to float32, as numpy does
  const c = Math.floor(i / plane), value = Math.fround(data[4 * (i % plane) + c] * image.rescale_factor)
  pixels[i] = Math.fround(value - Math.fround(image.mean[c])) / Math.fround(image.std[c])
}
// The exit's graphs one after the other; the last one gives the image features.
let state = new ort.Tensor('float32', pixels, [1, 3, h, w])
for (const path of exits.find((one) => one.exit === exit).graphs) {
  const graph = await open(path)
  state = (await graph.run({ [graph.inputNames[0]]: state }))[graph.outputNames[0]]
}
// The prompt: the image token once per feature, and the features in their places.
const tokenizer = new Tokenizer(json(file), {}), [features, D] = state.dims
let { ids } = tokenizer.encode(chat.prefix + question + chat.suffix, { add_special_tokens: chat.add_special_tokens })
ids = ids.flatMap((id) => Array(id === imageId ? features : 1).fill(id))
const embed = await open(text.embed_tokens), decoder = await open(text.decoder)
let { inputs_embeds } = await embed.run({ input_ids: ints(ids.map((id) => (id === imageId ? 0 : id))) })
inputs_embeds.data.set(state.data, ids.indexOf(imageId) * D)
// Greedy answer: the cache goes in and comes out longer.
const empty = () => new ort.Tensor('float32', [], [1, text.num_kv_heads, 0, text.head_dim]), answer = []
let past = Object.fromEntries(decoder.inputNames.filter((n) => n.startsWith('past')).map((n) => [n, empty()]))
for (let read = ids.length; read < Math.min(ids.length + 48, text.context_length); read++) {
  const places = Array.from({ length: inputs_embeds.dims[1] }, (_, i) => read - inputs_embeds.dims[1] + i)
  const all = { ...past, inputs_embeds, attention_mask: ints(Array(read).fill(1)), position_ids: ints(places) }
  const out = await decoder.run(Object.fromEntries(decoder.inputNames.map((n) => [n, all[n]])))
  past = Object.fromEntries(Object.keys(past).map((n) => [n, out[n.replace('past_key_values', 'present')]]))
  const logits = out.logits.data.slice(-text.vocab_size)
  answer.push(logits.indexOf(logits.reduce((a, b) => Math.max(a, b))))
  if (text.eos_token_ids.includes(answer.at(-1))) break
  inputs_embeds = (await embed.run({ input_ids: ints(answer.slice(-1)) })).inputs_embeds
}
console.log(JSON.stringify({ text: tokenizer.decode(answer, { skip_special_tokens: true }).trim(), tokens: answer }))
