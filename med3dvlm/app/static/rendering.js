/* The scan as a rendered volume, drawn by NiiVue (vendored, see niivue/VERSION) where the browser has WebGL 2. */

const LARGEST = 256; // voxels along an axis; beyond, a texture takes hundreds of megabytes

const hasWebGL2 = () => Boolean(document.createElement("canvas").getContext("webgl2"));

function loadNiivue() {
  if (window.niivue) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("niivue/niivue.umd.js", import.meta.url);
    script.onload = resolve;
    script.onerror = () => reject(new Error("NiiVue could not be loaded."));
    document.head.append(script);
  });
}

export class Rendering {
  constructor(section) {
    this.stage = section.querySelector(".stage");
    this.note = section.querySelector(".note");
    this.drawing = Promise.resolve(); // one at a time
  }

  /* Draws the scan, unless there is no WebGL 2 or the section is hidden (it is then drawn when it is shown). */
  show(scan) {
    this.scan = scan;
    if (!hasWebGL2()) {
      this.note.textContent = "The rendered view needs WebGL 2, which this browser does not offer. The planes work without.";
    } else if (this.stage.clientWidth) {
      this.drawing = this.drawing.then(() => this.draw()).catch((error) => {
        this.note.textContent = `The volume could not be rendered (${error.message}). The planes work without.`;
      });
    }
  }

  async draw() {
    if (this.drawn === this.scan) return;
    const scan = this.scan;
    await loadNiivue();
    this.viewer ??= await this.start();
    this.ready = false;
    while (this.viewer.volumes.length) this.viewer.removeVolume(this.viewer.volumes[0]);
    await this.viewer.loadFromArrayBuffer(scan.thinned(LARGEST), "scan.nii");
    this.viewer.setRenderAzimuthElevation(160, 15);
    this.drawn = scan;
    this.note.textContent = "";
    this.ready = true;
    this.window(...this.range); // they may have changed meanwhile
    this.move(this.voxel);
  }

  async start() {
    const viewer = new window.niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.3, 0.76, 1, 0.8],
      crosshairWidthUnit: "percent", // else as thick as a voxel
      crosshairWidth: 0.5,
      show3Dcrosshair: true,
      isOrientCube: false,
      dragAndDropEnabled: false,
      logLevel: "silent",
    });
    await viewer.attachToCanvas(this.stage.querySelector("canvas"));
    viewer.setSliceType(viewer.sliceTypeRender);
    return viewer;
  }

  /* The values that are black and white. */
  window(low, high) {
    this.range = [low, high];
    if (!this.ready) return;
    clearTimeout(this.timer); // new colours for every voxel: not at each step of a drag
    this.timer = setTimeout(() => {
      const [volume] = this.viewer.volumes;
      if (!volume) return;
      [volume.cal_min, volume.cal_max] = this.range;
      this.viewer.updateGLVolume();
    }, 120);
  }

  move(voxel) {
    this.voxel = voxel;
    if (!this.ready) return;
    // NiiVue's fractions run to the right, to anterior and to superior: opposite to our three axes.
    this.viewer.scene.crosshairPos = voxel.map((index, axis) => 1 - (index + 0.5) / this.drawn.size[axis]);
    this.viewer.drawScene();
  }
}
