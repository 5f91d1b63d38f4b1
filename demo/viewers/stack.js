// Scrolls through a stack of pictures: asks the kernel for raw values, keeps and windows them.

const ARRAYS = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array,
  float32: Float32Array,
};
const ASKED_BYTES = 4e6; // in one question, some 8 slices of a CT
const QUESTIONS = 2; // on their way at a time: one is answered while the next is read
const KEPT_BYTES = 512e6;
const HEIGHT = 512; // of the picture in the page, in pixels
const WIDEST = 900;

function render({ model, el }) {
  const about = model.get("about");
  const { count, rows, columns, samples, rescale: [slope, intercept] } = about;
  const names = Object.keys(about.windows);
  const pictureBytes = rows * columns * samples * ARRAYS[about.type].BYTES_PER_ELEMENT;
  const perQuestion = Math.max(1, Math.floor(ASKED_BYTES / pictureBytes));
  const mostKept = Math.max(perQuestion * (QUESTIONS + 1), Math.floor(KEPT_BYTES / pictureBytes));

  let current = about.first;
  let [centre, width] = about.windows[names[0]];
  let direction = 1;
  let wantedSince = performance.now();
  let playing = null;
  let failed = "";
  const kept = new Map(); // by number, values
  const asked = new Set();
  let questions = 0;
  const sum = { bytes: 0, roundTrips: 0, kernelMs: 0, pictures: 0 };

  // --- what is seen ---

  const { root, canvas, controls, state, costs, error } = frame(el, "stack");
  Object.assign(canvas, { width: columns, height: rows });
  const shape = columns / (rows * about.aspect);
  canvas.style.width = `${Math.min(HEIGHT * shape, WIDEST)}px`;
  canvas.style.aspectRatio = `${shape}`;
  const context = canvas.getContext("2d", { alpha: false });
  const image = context.createImageData(columns, rows);
  const levels = new Uint32Array(image.data.buffer);
  const cine = element("button", controls, { textContent: "▶", title: "cine (space)" });
  const slider = element("input", controls, { type: "range", min: 0, max: count - 1, step: 1 });
  slider.setAttribute("aria-label", about.what);
  if (samples === 1) {
    for (const name of names) {
      const button = element("button", controls, { textContent: name });
      button.onclick = () => setWindow(...about.windows[name]);
    }
  }
  const drawSoon = onceAFrame(draw);

  function paint(values) {
    if (samples === 3) {
      for (let to = 0, from = 0; to < levels.length; to += 1, from += 3) {
        levels[to] =
          0xff000000 | (values[from + 2] << 16) | (values[from + 1] << 8) | values[from];
      }
    } else {
      // PS3.3 C.11.2.1.2, with Rescale and 255 levels in the same two numbers.
      const factor = 255 / Math.max(width - 1, 1e-6);
      const sign = about.inverse ? -1 : 1;
      const gain = sign * slope * factor;
      const offset = sign * (intercept - (centre - 0.5)) * factor + 127.5 + 0.5;
      for (let n = 0; n < levels.length; n += 1) {
        const level = values[n] * gain + offset;
        levels[n] = 0xff000000 | ((level < 0 ? 0 : level > 255 ? 255 : level | 0) * 0x010101);
      }
    }
    context.putImageData(image, 0, 0);
  }

  function draw() {
    slider.value = current;
    const values = kept.get(current);
    if (values) {
      const start = performance.now();
      paint(values);
      const end = performance.now();
      const delay = end - wantedSince;
      root.dataset.shown = current;
      root.dispatchEvent(new CustomEvent("shown", { detail: { number: current, delay } }));
      say(end - start);
    }
    ask();
  }

  function say(drawMs) {
    const voi = `window ${Math.round(centre)} / ${Math.round(width)}`;
    const shown = `${about.what} ${current + 1} of ${count}`;
    state.textContent = samples === 1 ? `${shown} · ${voi}` : shown;
    canvas.setAttribute("aria-label", state.textContent);
    const parts = about.cost ? [about.cost] : [];
    if (sum.roundTrips) parts.push(`${sum.roundTrips} round trips`);
    parts.push(`${(sum.bytes / 1e6).toFixed(1)} MB to the browser`);
    parts.push(`kernel ${(sum.kernelMs / Math.max(1, sum.pictures)).toFixed(1)} ms a ${about.what}`);
    parts.push(`drawn in ${drawMs.toFixed(1)} ms`);
    costs.textContent = parts.join(" · ");
  }

  function show(number) {
    const next = Math.min(Math.max(number, 0), count - 1);
    if (next === current) return false;
    direction = next > current ? 1 : -1;
    current = next;
    wantedSince = performance.now();
    drawSoon();
    return true;
  }

  function setWindow(newCentre, newWidth) {
    [centre, width] = [newCentre, Math.max(1, newWidth)];
    wantedSince = performance.now();
    drawSoon();
  }

  // --- what is fetched ---

  // What is missing, nearest first; two of three ahead of where the scrolling goes.
  function missing() {
    const found = [];
    const look = (number) => {
      const wanted = number >= 0 && number < count && !kept.has(number) && !asked.has(number);
      if (wanted && found.length < perQuestion) found.push(number);
    };
    look(current);
    for (let step = 1; step < mostKept / 2 && found.length < perQuestion; step += 1) {
      look(current + direction * (2 * step - 1));
      look(current + direction * 2 * step);
      look(current - direction * step);
    }
    return found;
  }

  function ask() {
    while (questions < QUESTIONS && !failed) {
      const numbers = missing();
      if (!numbers.length) return;
      numbers.forEach((number) => asked.add(number));
      questions += 1;
      model.send({ ask: numbers });
    }
  }

  function receive(message, buffers) {
    questions = Math.max(0, questions - 1);
    if (message.error) {
      failed = error.textContent = message.error;
      stop();
      return;
    }
    message.numbers.forEach((number, n) => {
      const bytes = buffers[n];
      const at = bytes.byteOffset;
      const type = ARRAYS[about.type];
      // A typed array has to begin at a multiple of its element's size.
      const buffer = at % type.BYTES_PER_ELEMENT
        ? bytes.buffer.slice(at, at + bytes.byteLength) : bytes.buffer;
      const start = buffer === bytes.buffer ? at : 0;
      kept.set(number, new type(buffer, start, rows * columns * samples));
      asked.delete(number);
      sum.bytes += bytes.byteLength;
    });
    sum.roundTrips += message.roundTrips;
    sum.kernelMs += message.ms;
    sum.pictures += message.numbers.length;
    if (kept.size > mostKept) {
      const far = [...kept.keys()].sort((a, b) => Math.abs(b - current) - Math.abs(a - current));
      far.slice(0, kept.size - mostKept).forEach((number) => kept.delete(number));
    }
    if (message.numbers.includes(current)) drawSoon();
    else ask();
  }

  // --- what is done ---

  function stop() {
    clearInterval(playing);
    playing = null;
    cine.textContent = "▶";
  }

  function togglePlay() {
    if (playing) return stop();
    cine.textContent = "❚❚";
    playing = setInterval(() => {
      // A picture that is not shown yet is waited for, so that none is left out.
      if (root.dataset.shown === String(current)) show((current + 1) % count);
    }, 1000 / about.rate);
  }

  const steps = {
    ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1,
    PageUp: -10, PageDown: 10, Home: -count, End: count,
  };

  root.onkeydown = (event) => {
    if (event.target.tagName === "BUTTON" && (event.key === " " || event.key === "Enter")) return;
    if (event.key === " ") togglePlay();
    else if (event.key in steps) show(current + steps[event.key]);
    else return;
    event.preventDefault();
  };
  let turned = 0;
  canvas.addEventListener("wheel", (event) => {
    // A touchpad reports many small turns, a wheel few large ones.
    turned += event.deltaMode === 0 ? event.deltaY / 40 : event.deltaY;
    const step = Math.sign(turned) * Math.min(Math.floor(Math.abs(turned)), 3);
    if (step) turned = 0;
    // At either end the wheel moves the page again.
    if (!step || show(current + Math.sign(step))) event.preventDefault();
  }, { passive: false });
  slider.oninput = () => show(Number(slider.value));
  cine.onclick = togglePlay;
  onDrag(canvas, (right, down) => {
    const speed = Math.max(width, 10) / 300;
    if (samples === 1) setWindow(centre + down * speed, width + right * speed);
  });

  model.on("msg:custom", receive);
  drawSoon();
  return () => {
    stop();
    model.off("msg:custom", receive);
  };
}

export default { render };
