// The page "Try it in your browser": an image in, the model's mask over it. The model runs in worker.js.
const [SMALLEST, LARGEST] = [32, 2_500_000]; // pixels of a side, and of the whole image as the model is given it
const COLOUR = [213, 94, 0]; // of the mask: visible on all greys, and to colour-blind eyes

const root = document.getElementById("demo");
const part = (name) => root.querySelector(`[data-part="${name}"]`);
const say = (words) => (part("status").textContent = words);

let worker = null;
let image = null; // {grey, height, width, name}: as it was given
let found = null; // {probability, height, width, seconds}: on the model's grid

function load() {
  part("load").disabled = true;
  part("progress").hidden = false;
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }) => answers[data.kind](data));
  worker.addEventListener("error", () => answers.failed({ during: "load", words: "its script can't be had" }));
  worker.postMessage({ kind: "load" });
  say("Loading the model ...");
}

const answers = {
  progress({ loaded, total }) {
    part("progress").value = loaded / total;
  },
  ready({ threshold, nanometres }) {
    part("progress").hidden = part("loading").hidden = true;
    part("input").disabled = false;
    part("threshold").value = threshold;
    part("nanometres").value = nanometres;
    root.dataset.nanometres = nanometres;
    say("The model is ready. Give it an image.");
    part("file").focus();
  },
  segmented({ probability, seconds }) {
    found = { ...found, probability, seconds };
    part("input").disabled = false;
    part("result").hidden = false;
    draw();
  },
  failed({ during, words }) {
    if (during === "load") {
      worker?.terminate();
      part("load").disabled = false;
      part("progress").hidden = true;
      say(`The model wasn't loaded: ${words}. Check the connection, and try again.`);
    } else {
      part("input").disabled = false;
      say(`The image can't be segmented (${words}). If memory is short, cut out a part of it; then load this page again.`);
    }
  },
};

// The grey levels of a picture: the mean of its colours, as they are in EM images equal anyway.
async function read(file, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    const kind = /\.tiff?$/i.test(name) ? "a TIFF, which browsers can't show" : "not an image that this browser can show";
    return say(`${name} is ${kind}; a PNG, JPEG or WebP was expected. Save one slice as PNG.`);
  }
  const { width, height } = bitmap;
  const wanted = size(height, width);
  if (!wanted) return;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  image = { name, width, height, grey: greys(context.getImageData(0, 0, width, height)) };
  segment(bitmap, wanted);
}

function greys({ data }) {
  const grey = new Uint8Array(data.length / 4);
  for (let i = 0; i < grey.length; i++) grey[i] = Math.round((data[4 * i] + data[4 * i + 1] + data[4 * i + 2]) / 3);
  return grey;
}

// The size with which the image has the model's pixels; null, and a sentence, if it can't be segmented.
function size(height, width) {
  const scale = Number(part("nanometres").value) / Number(root.dataset.nanometres);
  if (!(scale > 0.05 && scale < 20)) return say("The edge of a pixel must be a number of nanometres, such as 5."), null;
  const wanted = [height, width].map((side) => Math.round(side * scale));
  const words = `The image has ${width} x ${height} pixels, ${wanted[1]} x ${wanted[0]} as the model sees it`;
  if (Math.min(...wanted) < SMALLEST) {
    return say(`${words}, but at least ${SMALLEST} a side were expected; give it a larger part of the slice.`), null;
  }
  if (wanted[0] * wanted[1] > LARGEST) {
    return say(`${words}, but at most ${LARGEST / 1e6} million were expected; cut out a part of it.`), null;
  }
  return wanted;
}

function segment(bitmap, [height, width]) {
  const isSame = height === image.height && width === image.width;
  let grey = image.grey;
  if (!isSame) {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    grey = greys(context.getImageData(0, 0, width, height));
  }
  found = { height, width };
  part("input").disabled = true;
  part("result").hidden = true;
  say(`Looking for mitochondria in ${image.name} ...`);
  worker.postMessage({ kind: "segment", grey: grey.slice(), height, width });
}

// Whether a pixel of the image as it was given is mitochondrion at this threshold.
function mask() {
  const threshold = Number(part("threshold").value);
  const inside = new Uint8Array(image.grey.length);
  for (let y = 0, i = 0; y < image.height; y++) {
    const row = Math.min(found.height - 1, Math.floor(((y + 0.5) * found.height) / image.height)) * found.width;
    for (let x = 0; x < image.width; x++, i++) {
      const column = Math.min(found.width - 1, Math.floor(((x + 0.5) * found.width) / image.width));
      inside[i] = found.probability[row + column] >= threshold;
    }
  }
  return inside;
}

function draw() {
  const [inside, canvas] = [mask(), part("canvas")];
  const shown = part("show").checked;
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(image.width, image.height);
  let n = 0;
  for (let i = 0; i < inside.length; i++) {
    n += inside[i];
    for (let c = 0; c < 3; c++) {
      pixels.data[4 * i + c] = inside[i] && shown ? 0.55 * image.grey[i] + 0.45 * COLOUR[c] : image.grey[i];
    }
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  const share = `${((100 * n) / inside.length).toFixed(1)} %`;
  part("shown-threshold").textContent = Number(part("threshold").value).toFixed(2);
  canvas.setAttribute("aria-label", `${image.name}, with ${share} of it marked as mitochondria`);
  say(`${share} of ${image.name} is called mitochondrion. It took ${found.seconds.toFixed(1)} s.`);
}

function save() {
  const [inside, canvas] = [mask(), new OffscreenCanvas(image.width, image.height)];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(image.width, image.height);
  for (let i = 0; i < inside.length; i++) pixels.data.set([255 * inside[i], 255 * inside[i], 255 * inside[i], 255], 4 * i);
  context.putImageData(pixels, 0, 0);
  canvas.convertToBlob({ type: "image/png" }).then((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob) });
    link.download = `${image.name.replace(/\.\w+$/, "")}-mask.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

async function example(button) {
  const name = button.dataset.example;
  part("nanometres").value = root.dataset.nanometres;
  const response = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (!response?.ok) return say(`${name} can't be had. Check the connection, and try again.`);
  await read(await response.blob(), button.textContent.trim());
}

part("load").addEventListener("click", load);
part("file").addEventListener("change", ({ target }) => {
  if (target.files.length) read(target.files[0], target.files[0].name);
  target.value = ""; // so that the same file can be chosen again
});
for (const button of root.querySelectorAll("[data-example]")) button.addEventListener("click", () => example(button));
for (const name of ["threshold", "show"]) part(name).addEventListener("input", draw);
part("save").addEventListener("click", save);
part("drop").addEventListener("dragover", (event) => event.preventDefault());
part("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  if (part("input").disabled) return say("Load the model first, and wait until it is ready.");
  const [file] = event.dataTransfer.files;
  if (file) read(file, file.name);
});
