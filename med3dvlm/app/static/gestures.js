/* Mouse, touchpad and touch on a plane, as viewers of scans are used: drag for the crosshair, right button for the
   window, Shift or middle button to move a zoomed plane, wheel through the slices, Ctrl and wheel or two fingers to
   zoom, double click to enlarge. */

const NOTCH = 50; // pixels of the wheel for a slice: a mouse turns further at once, a touchpad less and often

const DRAGS = { 0: "point", 1: "pan", 2: "window" };

/* on: active(), step(slices), enlarge(), and with places and distances in CSS pixels of the canvas point([x, y]),
   window([dx, dy]), pan([dx, dy]), zoom(factor, [x, y]). */
export function listen(canvas, on) {
  const pointers = new Map(); // id -> place
  let drag = null, turned = 0;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const apart = ([x, y], [otherX, otherY]) => [x - otherX, y - otherY];

  canvas.addEventListener("dblclick", on.enlarge);
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("mousedown", (event) => event.button === 1 && event.preventDefault()); // no automatic scrolling
  canvas.addEventListener("focus", on.active);
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    on.active();
    const pixels = event.deltaMode ? Math.sign(event.deltaY) * NOTCH : event.deltaY;
    if (event.ctrlKey) return on.zoom(Math.exp(-Math.max(-NOTCH, Math.min(NOTCH, pixels)) / 200), place(event));
    turned += Math.max(-NOTCH, Math.min(NOTCH, pixels));
    const slices = Math.trunc(turned / NOTCH);
    turned -= slices * NOTCH;
    if (slices) on.step(slices);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    on.active();
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    drag = pointers.size > 1 ? "pinch" : event.shiftKey ? "pan" : DRAGS[event.button];
    if (drag === "point") on.point(place(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId), now = place(event);
    if (!before) return;
    pointers.set(event.pointerId, now);
    const moved = apart(now, before);
    if (drag === "point") on.point(now);
    else if (drag === "pan" || drag === "window") on[drag](moved);
    else if (drag === "pinch" && pointers.size > 1) {
      const [, other] = [...pointers].find(([id]) => id !== event.pointerId);
      on.zoom(Math.hypot(...apart(now, other)) / Math.max(1, Math.hypot(...apart(before, other))), other);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      pointers.delete(event.pointerId);
      if (!pointers.size) drag = null; // the last finger of a pinch moves nothing
    });
  }
}
