// Pans and zooms in a slide: asks the kernel for the tiles that are in view, as JPEG files.

const HEIGHT = 560; // of the view in the page, in pixels
const KEPT_TILES = 800; // decoded, 256 KiB each
const SOFTEST = 1.42; // so much is a level enlarged before a finer one is taken
const QUESTIONS = 2; // on their way at a time: the next one is for where the view is by then
const MOST_ZOOM = 4; // pixels of the screen to one of the slide

async function decoded(bytes) {
  // A Blob goes to the browser's main process and back. The other way needs a secure page.
  if (!window.ImageDecoder) return createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
  const { image } = await new ImageDecoder({ data: bytes, type: "image/jpeg" }).decode();
  const picture = await createImageBitmap(image);
  image.close();
  return picture;
}

function render({ model, el }) {
  const about = model.get("about");
  const { width: slideWidth, height: slideHeight } = about.levels[0];
  const levels = about.levels.map(({ width, height, tile }) => ({
    width, height, tile,
    columns: Math.ceil(width / tile[0]),
    rows: Math.ceil(height / tile[1]),
    shrink: slideWidth / width,
  }));
  const kept = new Map(); // by level and number, pictures; null for a tile that is left out
  const asked = new Set();
  const questions = []; // when each that is on its way was asked
  let failed = "";
  let wantedSince = performance.now();
  let complete = false;
  const sum = { bytes: about.bytes, roundTrips: about.roundTrips };
  // The point of the slide in the view's middle, and pixels of the screen to one of the slide.
  let x = slideWidth / 2, y = slideHeight / 2, zoom = 0;
  let heading = [0, 0]; // of the last pan, to the right and down

  // --- what is seen ---

  const { root, canvas, controls, state, costs, error } = frame(el, "slide");
  const drawSoon = onceAFrame(draw);
  Object.assign(canvas.style, { width: "100%", height: `${HEIGHT}px` });
  const context = canvas.getContext("2d", { alpha: false });
  for (const [label, title, action] of [
    ["+", "closer (+)", () => zoomBy(2)],
    ["−", "further away (−)", () => zoomBy(1 / 2)],
    ["whole slide", "(0)", () => fit()],
    ["full size", "one pixel to one (1)", () => zoomBy(1 / zoom)],
  ]) element("button", controls, { textContent: label, title, onclick: action });
  costs.textContent =
    `index of ${(about.size / 1e6).toFixed(0)} MB read in ${about.ms.toFixed(0)} ms, ` +
    `${about.roundTrips} round trips`;

  const fitting = () => Math.min(canvas.width / slideWidth, canvas.height / slideHeight);

  // The coarsest level that has nearly as many pixels as the screen, or more.
  function levelInView() {
    const enough = levels.filter((level) => level.shrink * zoom <= SOFTEST);
    return levels.indexOf(enough.at(-1) ?? levels[0]);
  }

  function tilesInView(n, x, y) {
    const level = levels[n], scale = zoom * level.shrink;
    const first = (middle, size, tile) =>
      Math.max(0, Math.floor((middle * zoom - size / 2) / (scale * tile)));
    const end = (middle, size, tile, most) =>
      Math.min(most, Math.ceil((middle * zoom + size / 2) / (scale * tile)));
    const found = [];
    for (let row = first(y, canvas.height, level.tile[1]);
      row < end(y, canvas.height, level.tile[1], level.rows); row += 1) {
      for (let column = first(x, canvas.width, level.tile[0]);
        column < end(x, canvas.width, level.tile[0], level.columns); column += 1) {
        found.push({ n, row, column, number: row * level.columns + column });
      }
    }
    return found;
  }

  const keyOf = ({ n, number }) => `${n}/${number}`;
  const missingOf = (tiles) => tiles.filter((tile) => !kept.has(keyOf(tile)));

  // Where a tile is drawn, and how much of it is no padding.
  function placeOf(tile) {
    const level = levels[tile.n], scale = zoom * level.shrink;
    // Whole pixels: else seams show between the tiles.
    const left = Math.round((tile.column * level.tile[0]) * scale - x * zoom + canvas.width / 2);
    const top = Math.round((tile.row * level.tile[1]) * scale - y * zoom + canvas.height / 2);
    const wide = Math.min(level.tile[0], level.width - tile.column * level.tile[0]);
    const high = Math.min(level.tile[1], level.height - tile.row * level.tile[1]);
    const right = Math.round(
      (tile.column * level.tile[0] + wide) * scale - x * zoom + canvas.width / 2);
    const bottom = Math.round(
      (tile.row * level.tile[1] + high) * scale - y * zoom + canvas.height / 2);
    return { wide, high, box: [left, top, right - left, bottom - top] };
  }

  function drawTile(tile) {
    const picture = kept.get(keyOf(tile));
    if (!picture) return;
    const { wide, high, box } = placeOf(tile);
    context.drawImage(picture, 0, 0, wide, high, ...box);
  }

  // Coarse tiles stand where finer ones are not there yet, and are drawn nowhere else.
  function drawInPlaceOf(missing, finest) {
    context.save();
    context.beginPath();
    for (const tile of missing) context.rect(...placeOf(tile).box);
    context.clip();
    for (let n = levels.length - 1; n > finest; n -= 1) tilesInView(n, x, y).forEach(drawTile);
    context.restore();
  }

  // What comes into view if the last pan goes on for half a view.
  function tilesAhead(n) {
    const most = Math.max(...heading.map(Math.abs));
    if (!most) return [];
    const [right, down] = heading.map((by) => by / most / 2 / zoom);
    return missingOf(tilesInView(n, x + right * canvas.width, y + down * canvas.height));
  }

  function draw() {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const finest = levelInView();
    const wanted = tilesInView(finest, x, y);
    const missing = missingOf(wanted);
    if (missing.length) drawInPlaceOf(missing, finest);
    wanted.forEach(drawTile);
    // Those in view become the latest used.
    for (const key of wanted.map(keyOf)) {
      if (!kept.has(key)) continue;
      const picture = kept.get(key);
      kept.delete(key);
      kept.set(key, picture);
    }
    say(finest);
    if (!missing.length && !complete) {
      complete = true;
      const delay = performance.now() - wantedSince;
      root.dataset.complete = "true";
      root.dispatchEvent(new CustomEvent("shown", { detail: { tiles: wanted.length, delay } }));
    }
    ask(missing.length ? missing : tilesAhead(finest));
  }

  function say(n) {
    state.textContent =
      `level ${n} of ${levels.length} · ${(zoom * 100).toPrecision(3)} % · ` +
      `${Math.round(x).toLocaleString("en")}, ${Math.round(y).toLocaleString("en")} of ` +
      `${slideWidth.toLocaleString("en")} × ${slideHeight.toLocaleString("en")}`;
    canvas.setAttribute("aria-label", state.textContent);
  }

  function move(newX, newY, newZoom) {
    heading = newZoom === zoom ? [newX - x, newY - y] : [0, 0];
    zoom = Math.min(Math.max(newZoom, Math.min(fitting(), 1) / 2), MOST_ZOOM);
    x = Math.min(Math.max(newX, 0), slideWidth);
    y = Math.min(Math.max(newY, 0), slideHeight);
    wantedSince = performance.now();
    complete = false;
    root.dataset.complete = "false";
    drawSoon();
  }

  const fit = () => move(slideWidth / 2, slideHeight / 2, fitting());

  // Zooms so that the point of the slide under a point of the view stays there.
  function zoomBy(factor, viewX = canvas.width / 2, viewY = canvas.height / 2) {
    const next = Math.min(Math.max(zoom * factor, Math.min(fitting(), 1) / 2), MOST_ZOOM);
    const by = 1 / zoom - 1 / next;
    move(x + (viewX - canvas.width / 2) * by, y + (viewY - canvas.height / 2) * by, next);
  }

  // --- what is fetched ---

  function ask(missing) {
    const wanted = missing.filter((tile) => !asked.has(keyOf(tile)));
    if (!wanted.length || questions.length >= QUESTIONS || failed) return;
    wanted.forEach((tile) => asked.add(keyOf(tile)));
    root.dataset.asked = asked.size;
    questions.push(performance.now());
    model.send({ ask: wanted.map(({ n, number }) => [n, number]) });
  }

  async function receive(message, buffers) {
    if (message.error) {
      failed = error.textContent = message.error;
      return;
    }
    const pictures = await Promise.all(
      buffers.map((bytes) => (bytes.byteLength ? decoded(bytes) : null)));
    message.places.forEach(([n, number], at) => {
      kept.set(`${n}/${number}`, pictures[at]);
      asked.delete(`${n}/${number}`);
    });
    root.dataset.asked = asked.size;
    for (const [key, picture] of kept) {
      if (kept.size <= KEPT_TILES) break;
      kept.delete(key);
      picture?.close();
    }
    sum.bytes += message.bytes;
    sum.roundTrips += message.roundTrips;
    // Without a question of this view's own, it was the same viewer in a different cell.
    const took = performance.now() - (questions.shift() ?? performance.now());
    costs.textContent =
      `${message.places.length} tiles, ${(message.bytes / 1e6).toFixed(1)} MB in ` +
      `${message.roundTrips} round trip${message.roundTrips === 1 ? "" : "s"}: ` +
      `kernel ${message.ms.toFixed(0)} ms, in the browser after ${took.toFixed(0)} ms · in all ` +
      `${(sum.bytes / 1e6).toFixed(1)} of ${(about.size / 1e6).toFixed(0)} MB in ` +
      `${sum.roundTrips} round trips`;
    drawSoon();
  }

  // --- what is done ---

  const pan = (dx, dy) => move(x + dx / zoom, y + dy / zoom, zoom);
  const keys = {
    ArrowLeft: () => pan(-canvas.width / 4, 0), ArrowRight: () => pan(canvas.width / 4, 0),
    ArrowUp: () => pan(0, -canvas.height / 4), ArrowDown: () => pan(0, canvas.height / 4),
    "+": () => zoomBy(2), "=": () => zoomBy(2), "-": () => zoomBy(1 / 2),
    0: fit, Home: fit, 1: () => zoomBy(1 / zoom),
  };
  root.onkeydown = (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey) return;
    keys[event.key]();
    event.preventDefault();
  };
  const ratio = () => canvas.width / canvas.clientWidth;
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const turns = event.deltaMode === 0 ? event.deltaY / 300 : event.deltaY / 3;
    zoomBy(2 ** -turns, event.offsetX * ratio(), event.offsetY * ratio());
  }, { passive: false });
  onDrag(canvas, (right, down) => pan(-right * ratio(), -down * ratio()));

  const resized = new ResizeObserver(() => {
    if (!canvas.clientWidth) return; // the cell is hidden
    const before = zoom && zoom / fitting();
    canvas.width = canvas.clientWidth * devicePixelRatio;
    canvas.height = canvas.clientHeight * devicePixelRatio;
    move(x, y, before === 0 || before === 1 ? fitting() : zoom);
  });
  resized.observe(canvas);
  model.on("msg:custom", receive);
  return () => {
    resized.disconnect();
    model.off("msg:custom", receive);
  };
}

export default { render };
