// The script of `mitoseg_lib.meshes.MeshFigure`: WebGL 1, no library, and no name outside of the function around it.
// Lengths are in radii of the box, from its centre; y points down and z into the page until HOME turns them.

const VERTEX_SHADER = `
  attribute vec3 position, normal;
  uniform mat3 turn;
  uniform vec2 scale, shift;
  uniform float eye;
  varying vec3 towards;
  void main() {
    vec3 p = turn * position;
    float ahead = eye - p.z, near = eye - 1.2, far = eye + 1.2;
    gl_Position = vec4(p.xy * scale + shift * ahead, ((far + near) * ahead - 2.0 * far * near) / (far - near), ahead);
    towards = normalize(turn * normal);
  }`;
const FRAGMENT_SHADER = `
  precision mediump float;
  uniform vec3 colour;
  uniform bool lit;
  varying vec3 towards;
  void main() {
    vec3 n = lit ? normalize(towards) : vec3(0.0);
    float light = 0.42 + 0.18 * n.z + 0.48 * max(dot(n, vec3(-0.42, 0.57, 0.71)), 0.0);
    float gleam = 0.14 * pow(max(dot(n, vec3(-0.23, 0.31, 0.92)), 0.0), 24.0);
    gl_FragColor = vec4(lit ? colour * light + gleam : colour, 1.0);
  }`;

const ASPECT = 4 / 3;
const EYE = 3.2; // how far away it is
const GREY = 0.53; // of the lines: seen on a white page and on a dark one
const FADE = 0.7; // share of grey in the other objects' colours while one is chosen

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const columns = (m) => [0, 1, 2].map((k) => m.map((row) => row[k]));
const product = (a, b) => a.map((row) => columns(b).map((column) => dot(row, column)));
const aboutX = (t) => [[1, 0, 0], [0, Math.cos(t), -Math.sin(t)], [0, Math.sin(t), Math.cos(t)]];
const aboutY = (t) => [[Math.cos(t), 0, Math.sin(t)], [0, 1, 0], [-Math.sin(t), 0, Math.cos(t)]];
const HOME = product(aboutX(0.5), product(aboutY(-0.5), [[1, 0, 0], [0, -1, 0], [0, 0, -1]]));

/** Whole numbers from base64: 7 bits a byte, the lowest first. */
function decode(base64) {
  const numbers = [];
  let value = 0, bits = 0;
  for (const letter of atob(base64)) {
    value |= (letter.charCodeAt(0) & 127) << bits;
    bits += 7;
    if (letter.charCodeAt(0) < 128) {
      numbers.push(value);
      value = bits = 0;
    }
  }
  return numbers;
}

/** Vertices, their normals, faces, and the box's 4 edges along each axis, each as its two ends. */
function readShape(data) {
  const radius = Math.hypot(...data.edges) / 2;
  const steps = [0, 0, 0];
  const vertices = decode(data.positions).map((move, i) => {
    steps[i % 3] += move & 1 ? -(move + 1) / 2 : move / 2;
    return (steps[i % 3] * data.step - data.centre[i % 3]) / radius;
  });
  let seen = 0;
  const faces = decode(data.corners).map((back) => (back ? seen - back : seen++));
  const normals = new Array(vertices.length).fill(0);
  for (let i = 0; i < faces.length; i += 3) {
    const [a, b, c] = [3 * faces[i], 3 * faces[i + 1], 3 * faces[i + 2]];
    const [u, v] = [b, c].map((to) => [0, 1, 2].map((k) => vertices[to + k] - vertices[a + k]));
    const cross = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
    for (const vertex of [a, b, c]) cross.forEach((part, k) => (normals[vertex + k] += part));
  }
  const corner = (axis, k, end) => {
    const sides = [];
    [sides[axis], sides[(axis + 1) % 3], sides[(axis + 2) % 3]] = [end, k & 1 ? 1 : -1, k & 2 ? 1 : -1];
    return sides.map((side, i) => (side * data.edges[i]) / 2 / radius);
  };
  const edges = [0, 1, 2].map((axis) => [0, 1, 2, 3].map((k) => [-1, 1].map((end) => corner(axis, k, end))));
  return { vertices, normals, faces, edges };
}

/** Give WebGL the shape; return where the shaders' variables are, and a framebuffer of one pixel for picking. */
function load(gl, shape) {
  gl.getExtension("OES_element_index_uint");
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX_SHADER], [gl.FRAGMENT_SHADER, FRAGMENT_SHADER]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  const lines = shape.edges.flat(3); // follow the vertices; their normals aren't used
  [["position", shape.vertices], ["normal", shape.normals]].forEach(([name, values], i) => {
    gl.bindAttribLocation(program, i, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, Float32Array.from(values.concat(lines)), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(i);
    gl.vertexAttribPointer(i, 3, gl.FLOAT, false, 0, 0);
  });
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, Uint32Array.from(shape.faces), gl.STATIC_DRAW);
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);
  const [onePixel, texture, depth] = [gl.createFramebuffer(), gl.createTexture(), gl.createRenderbuffer()];
  gl.bindFramebuffer(gl.FRAMEBUFFER, onePixel);
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 1, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, null);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  gl.bindRenderbuffer(gl.RENDERBUFFER, depth);
  gl.renderbufferStorage(gl.RENDERBUFFER, gl.DEPTH_COMPONENT16, 1, 1);
  gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.DEPTH_ATTACHMENT, gl.RENDERBUFFER, depth);
  return { onePixel, variable: (name) => gl.getUniformLocation(program, name) };
}

function startFigure(root, data) {
  const canvas = root.querySelector("canvas");
  const said = root.querySelector("[aria-live]");
  const gl = canvas.getContext("webgl", { preserveDrawingBuffer: true }); // kept so that it can be printed
  if (!gl || !gl.getExtension("OES_element_index_uint")) return; // the sentence that says so stays
  const shape = readShape(data);
  const labels = data.lengths.map(() => canvas.parentElement.appendChild(document.createElement("span")));
  let { onePixel, variable } = load(gl, shape);
  let turn = HOME, zoom = 1, shift = [0, 0], chosen = -1, due = 0;

  const flat = (point) => { // on the screen, from -1 to 1 once it is scaled
    const [x, y, z] = turn.map((row) => dot(row, point));
    return [x / (EYE - z) / ASPECT, y / (EYE - z)];
  };
  const fit = 0.86 / Math.max(...shape.edges.flat(2).flatMap(flat).map(Math.abs));

  /** Draw the figure or, into the one pixel, the number of the object at a place (from the lower left) as a colour. */
  function draw(place) {
    gl.bindFramebuffer(gl.FRAMEBUFFER, place ? onePixel : null);
    gl.viewport(place ? -place[0] : 0, place ? -place[1] : 0, canvas.width, canvas.height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.uniformMatrix3fv(variable("turn"), false, columns(turn).flat());
    gl.uniform2f(variable("scale"), (fit * zoom) / ASPECT, fit * zoom);
    gl.uniform2fv(variable("shift"), shift);
    gl.uniform1f(variable("eye"), EYE);
    gl.uniform1i(variable("lit"), place ? 0 : 1);
    let start = 0;
    data.faces.forEach((n, i) => {
      const grey = chosen < 0 || chosen === i ? 0 : FADE;
      const colour = data.colours[i].map((part) => (1 - grey) * (part / 255) + grey * GREY);
      gl.uniform3fv(variable("colour"), place ? [((i + 1) & 255) / 255, ((i + 1) >> 8) / 255, 0] : colour);
      gl.drawElements(gl.TRIANGLES, 3 * n, gl.UNSIGNED_INT, 12 * start);
      start += n;
    });
    if (place) return;
    gl.uniform1i(variable("lit"), 0);
    gl.uniform3f(variable("colour"), GREY, GREY, GREY);
    gl.drawArrays(gl.LINES, shape.vertices.length / 3, 24);
    labels.forEach(label);
  }

  /** Write an axis' length beside that one of its four edges which is farthest from the middle. */
  function label(span, axis) {
    const middles = shape.edges[axis].map(([a, b]) => flat(a.map((part, k) => (part + b[k]) / 2)));
    const length = ([x, y]) => Math.hypot(x * ASPECT, y);
    const [x, y] = middles.reduce((best, middle) => (length(middle) > length(best) + 1e-6 ? middle : best));
    const [right, up] = [(x * ASPECT) / length([x, y]), y / length([x, y])];
    span.textContent = data.lengths[axis];
    span.style.left = `${50 * (1 + fit * zoom * x + shift[0])}%`;
    span.style.top = `${50 * (1 - fit * zoom * y - shift[1])}%`;
    span.style.transform = `translate(${58 * right - 50}%, ${-70 * up - 50}%)`;
  }

  function redraw() {
    due ||= requestAnimationFrame(() => {
      due = 0;
      if (canvas.clientWidth) draw();
    });
  }
  function choose(i) {
    chosen = i;
    said.textContent = i < 0 ? "" : data.names[i];
    redraw();
  }
  function turnBy(right, down) {
    turn = product(aboutX(down), product(aboutY(right), turn));
    redraw();
  }
  function zoomBy(factor, at = [0, 0]) { // what lies at this place stays there
    const before = zoom;
    zoom = Math.min(12, Math.max(0.5, zoom * factor));
    shift = zoom > 1 ? shift.map((s, k) => at[k] - ((at[k] - s) * zoom) / before) : [0, 0];
    redraw();
  }
  function reset() {
    [turn, zoom, shift] = [HOME, 1, [0, 0]];
    choose(-1);
  }
  function placeOf(event) { // from -1 to 1
    const box = canvas.getBoundingClientRect();
    return [(2 * (event.clientX - box.left)) / box.width - 1, 1 - (2 * (event.clientY - box.top)) / box.height];
  }
  function pick(event) {
    const [x, y] = placeOf(event);
    draw([Math.floor(((x + 1) / 2) * canvas.width), Math.floor(((y + 1) / 2) * canvas.height)]);
    const found = new Uint8Array(4);
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, found);
    choose(found[0] + 256 * found[1] - 1);
  }

  const on = (name, react) => canvas.addEventListener(name, react);
  const down = new Map(); // the places of the mouse and of fingers
  let moved = 0; // pixels, since the first came down
  on("pointerdown", (event) => {
    if (event.button) return;
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    moved = down.size ? Infinity : 0;
    down.set(event.pointerId, [event.clientX, event.clientY]);
  });
  on("pointermove", (event) => {
    const [before, now] = [down.get(event.pointerId), [event.clientX, event.clientY]];
    if (before) moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (!before || moved < 4) return;
    down.set(event.pointerId, now);
    if (down.size === 1) return turnBy(0.01 * (now[0] - before[0]), 0.01 * (now[1] - before[1]));
    const [, other] = [...down].find(([id]) => id !== event.pointerId);
    const [near, far] = [before, now].map((place) => Math.hypot(place[0] - other[0], place[1] - other[1]) + 1);
    zoomBy(far / near);
  });
  on("pointerup", (event) => down.delete(event.pointerId) && moved < 4 && pick(event));
  on("pointercancel", (event) => down.delete(event.pointerId));
  on("dblclick", reset);
  on("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && !canvas.matches(":focus")) return; // the page scrolls
    event.preventDefault();
    zoomBy(Math.exp(-0.002 * event.deltaY * (event.deltaMode ? 30 : 1)), placeOf(event));
  });
  const keys = {
    ArrowLeft: () => turnBy(-0.1, 0), ArrowRight: () => turnBy(0.1, 0),
    ArrowUp: () => turnBy(0, -0.1), ArrowDown: () => turnBy(0, 0.1),
    "+": () => zoomBy(1.15), "=": () => zoomBy(1.15), "-": () => zoomBy(1 / 1.15),
    Enter: () => choose((chosen + 1) % data.names.length), Home: reset, Escape: () => canvas.blur(),
  };
  on("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  });
  on("webglcontextlost", (event) => event.preventDefault());
  on("webglcontextrestored", () => {
    ({ onePixel, variable } = load(gl, shape));
    redraw();
  });
  new ResizeObserver(() => {
    canvas.width = Math.round(canvas.clientWidth * Math.min(2, devicePixelRatio));
    canvas.height = Math.round(canvas.width / ASPECT);
    redraw();
  }).observe(canvas);
  root.querySelector("p").hidden = true;
  root.querySelector("p + div").hidden = false;
}

function startMeshFigures(key, data) {
  for (const root of document.querySelectorAll(`[data-mesh-figure="${key}"]`)) {
    if (root.started) continue; // the same figure can be in a page twice
    root.started = true;
    startFigure(root, data);
  }
}
