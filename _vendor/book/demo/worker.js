// The model, in a thread of its own so that the page stays alive. It is handed grey levels, and hands probabilities back.
import * as ort from "../../vendor/onnxruntime-web/ort.wasm.bundle.min.mjs";

const TILE = 32; // sides that the network takes are multiples of it
const [DARKEST, BRIGHTEST] = [0.001, 0.999]; // shares of pixels at or below the ends of the grey levels
const NEAR = 0.05; // as in mitoseg_lib/grey.py

let session = null;
let about = null;

async function download(url, bytes, onBytes) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} can't be had (${response.status})`);
  const whole = new Uint8Array(bytes);
  let place = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length > bytes) throw new Error(`${url} is longer than it should be`);
    whole.set(value, place);
    place += value.length;
    onBytes(value.length);
  }
  if (place !== bytes) throw new Error(`${url} ended early`);
  return whole;
}

async function load() {
  const here = (name) => new URL(name, import.meta.url).href;
  about = await (await fetch(here("model.json"))).json();
  let loaded = 0;
  const total = about.bytes + about.runtime_bytes;
  const tell = (n) => postMessage({ kind: "progress", loaded: (loaded += n), total });
  const runtime = here("../../vendor/onnxruntime-web/ort-wasm-simd-threaded.wasm");
  const [model, wasm] = await Promise.all([
    download(here("model.onnx"), about.bytes, tell),
    download(runtime, about.runtime_bytes, tell),
  ]);
  ort.env.wasm.numThreads = 1; // more need headers that a static site can't send
  ort.env.wasm.wasmBinary = wasm.buffer;
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  postMessage({ kind: "ready", threshold: about.threshold, nanometres: about.nanometres });
}

// The grey levels that a share of the pixels lie at or below.
function ends(grey) {
  const counts = new Float64Array(256);
  for (const level of grey) counts[level] += 1;
  const find = (share) => {
    let sum = 0;
    for (let level = 0; level < 256; level++) if ((sum += counts[level]) / grey.length >= share) return level;
    return 255;
  };
  return [find(DARKEST), find(BRIGHTEST)];
}

// Grey levels to those that the model saw, by the rule of `mitoseg predict`; a table with an entry for each level.
function transform(grey) {
  const [[dark, bright], [low, high]] = [ends(grey), about.grey_range];
  const farthest = Math.max(Math.abs(dark - low), Math.abs(bright - high));
  const stays = dark === bright || farthest <= NEAR * (high - low);
  const scale = stays ? 1 : (high - low) / (bright - dark);
  return Float32Array.from({ length: 256 }, (_, level) => {
    const moved = stays ? level : (level - dark) * scale + low;
    return Math.min(255, Math.max(0, Math.round(moved))) / 255;
  });
}

// A side continued by reflection, as far as the network needs: where each of its pixels comes from.
function reflected(side) {
  const period = Math.max(1, 2 * (side - 1));
  const padded = Math.ceil(side / TILE) * TILE;
  return Int32Array.from({ length: padded }, (_, i) => Math.min(i % period, period - (i % period)));
}

async function segment({ grey, height, width }) {
  const started = performance.now();
  const [table, rows, columns] = [transform(grey), reflected(height), reflected(width)];
  const slice = new Float32Array(rows.length * columns.length);
  let place = 0;
  for (const y of rows) for (const x of columns) slice[place++] = table[grey[y * width + x]];
  const input = new ort.Tensor("float32", slice, [1, 1, rows.length, columns.length]);
  const { logits } = await session.run({ slices: input });
  const probability = new Float32Array(height * width);
  for (let y = 0, i = 0; y < height; y++) {
    const row = y * columns.length;
    for (let x = 0; x < width; x++) probability[i++] = 1 / (1 + Math.exp(-logits.data[row + x]));
  }
  logits.dispose();
  const seconds = (performance.now() - started) / 1000;
  postMessage({ kind: "segmented", probability, seconds }, [probability.buffer]);
}

addEventListener("message", async ({ data }) => {
  try {
    await (data.kind === "load" ? load() : segment(data));
  } catch (error) {
    postMessage({ kind: "failed", during: data.kind, words: String(error.message || error) });
  }
});
