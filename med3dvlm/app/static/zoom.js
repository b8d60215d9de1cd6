/* Which part of a plane is shown: all of it at factor 1. */

const LARGEST = 16;

export class Zoom {
  constructor() {
    this.reset();
  }

  reset() {
    this.factor = 1;
    this.centre = [0.5, 0.5]; // what lies in the middle of the stage, as fractions of the plane, across and down
  }

  /* Where the whole plane lies on a stage, in pixels; [width, height]: its size there at factor 1. */
  frame([width, height], [stageWidth, stageHeight]) {
    const margin = 0.5 / this.factor; // what is shown at factor 1 can't be dragged away
    const [across, down] = (this.centre = this.centre.map((at) => Math.min(1 - margin, Math.max(margin, at))));
    const shown = { width: width * this.factor, height: height * this.factor };
    return { ...shown, left: stageWidth / 2 - across * shown.width, top: stageHeight / 2 - down * shown.height };
  }

  /* Zooms by a factor; what lies at [x, y] of the stage stays there. */
  by(factor, [x, y], frame) {
    const before = this.factor;
    this.factor = Math.min(LARGEST, Math.max(1, before * factor));
    const grown = this.factor / before;
    // The point's distance from the middle of the stage stays; as a fraction of the larger plane it is smaller.
    const at = [(x - frame.left) / frame.width, (y - frame.top) / frame.height];
    this.centre = this.centre.map((centre, axis) => at[axis] + (centre - at[axis]) / grown);
  }

  /* Drags the plane by pixels. */
  pan([dx, dy], frame) {
    this.centre = [this.centre[0] - dx / frame.width, this.centre[1] - dy / frame.height];
  }
}
