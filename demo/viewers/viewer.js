// What both viewers share; stands before each one's own lines, in one module.

function element(tag, parent, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  parent.append(made);
  return made;
}

// A canvas, a row for controls, and the lines below it.
function frame(el, name) {
  const root = element("div", el, { className: `dicom-viewer ${name}` });
  // JupyterLab leaves the keys alone that are pressed in here.
  root.dataset.lmSuppressShortcuts = "true";
  const canvas = element("canvas", root, { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  const controls = element("div", root, { className: "row" });
  const state = element("div", root, { className: "state" });
  const costs = element("div", root, { className: "state costs" });
  const error = element("div", root, { className: "error" });
  error.setAttribute("role", "alert");
  return { root, canvas, controls, state, costs, error };
}

// Returns what has `draw` called in the next animation frame, once, however often it is asked.
function onceAFrame(draw) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      draw();
    });
  };
}

function onDrag(canvas, action) {
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({ preventScroll: true });
  };
  canvas.onpointermove = (event) => {
    if (canvas.hasPointerCapture(event.pointerId)) action(event.movementX, event.movementY);
  };
}
