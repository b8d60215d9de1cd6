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
  }

  /* Draws the scan, unless there is no WebGL 2 or the section is hidden (it is then drawn when it is shown). */
  async show(scan, voxel, level, width) {
    if (!hasWebGL2()) {
      this.note.textContent = "The rendered view needs WebGL 2, which this browser does not offer. The planes work without.";
      return;
    }
    this.scan = scan;
    if (!this.stage.clientWidth) return;
    await loadNiivue();
    if (!this.viewer) {
      const canvas = this.stage.querySelector("canvas");
      this.viewer = new window.niivue.Niivue({
        backColor: [0, 0, 0, 1],
        crosshairColor: [0.3, 0.76, 1, 0.8],
        show3Dcrosshair: true,
        isOrientCube: false,
        dragAndDropEnabled: false,
        logLevel: "silent",
      });
      await this.viewer.attachToCanvas(canvas);
      this.viewer.setSliceType(this.viewer.sliceTypeRender);
    }
    if (this.drawn !== scan) {
      this.drawn = scan;
      this.note.textContent = "";
      while (this.viewer.volumes.length) this.viewer.removeVolume(this.viewer.volumes[0]);
      await this.viewer.loadFromArrayBuffer(scan.thinned(LARGEST), "scan.nii");
      this.viewer.setRenderAzimuthElevation(160, 15);
    }
    this.window(level, width);
    this.move(voxel);
  }

  window(level, width) {
    if (!this.viewer || !this.viewer.volumes.length) return;
    clearTimeout(this.timer); // new colours for every voxel: not at each step of a drag
    this.timer = setTimeout(() => {
      const [volume] = this.viewer.volumes;
      volume.cal_min = level - width / 2;
      volume.cal_max = level + width / 2;
      this.viewer.updateGLVolume();
    }, 120);
  }

  move(voxel) {
    if (!this.viewer || !this.viewer.volumes.length) return;
    // NiiVue's fractions run to the right, to anterior and to superior: opposite to our three axes.
    this.viewer.scene.crosshairPos = voxel.map((index, axis) => 1 - (index + 0.5) / this.scan.size[axis]);
    this.viewer.drawScene();
  }
}
