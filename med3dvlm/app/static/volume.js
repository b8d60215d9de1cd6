/* A scan in the browser: a NIfTI file of 16-bit integers, as `med3dvlm.app.volumes` writes it.

   Axes: i (W) fastest, then j (H), k (D). Canonical scans run from the patient's right to left along i, from anterior
   to posterior along j and from superior to inferior along k, so every plane below is in radiological convention. */

const HEADER_BYTES = 352;

/* across and down: the axes (0: i, 1: j, 2: k) that a plane shows; along: the one it is moved by.
   letters: left, right, top and bottom of a plane whose anatomy is known. names: what the plane is called when the
   anatomy is known, and when it is not. */
export const PLANES = {
  axial: { across: 0, down: 1, along: 2, letters: ["R", "L", "A", "P"], names: ["Axial", "Slices"] },
  coronal: { across: 0, down: 2, along: 1, letters: ["R", "L", "S", "I"], names: ["Coronal", "Rows"] },
  sagittal: { across: 1, down: 2, along: 0, letters: ["A", "P", "S", "I"], names: ["Sagittal", "Columns"] },
};

export class Scan {
  /* buffer: the whole file; kept, because NiiVue takes it as it is. */
  constructor(buffer) {
    const header = new DataView(buffer, 0, HEADER_BYTES);
    this.buffer = buffer;
    this.size = [1, 2, 3].map((axis) => header.getInt16(40 + 2 * axis, true));
    this.spacing = [1, 2, 3].map((axis) => header.getFloat32(76 + 4 * axis, true)); // mm
    this.slope = header.getFloat32(112, true);
    this.intercept = header.getFloat32(116, true);
    this.voxels = new Int16Array(buffer, HEADER_BYTES);
    const [columns, rows] = this.size;
    this.step = [1, columns, columns * rows];
  }

  middle() {
    return this.size.map((count) => Math.floor(count / 2));
  }

  value([i, j, k]) {
    return this.voxels[i + j * this.step[1] + k * this.step[2]] * this.slope + this.intercept;
  }

  /* Grey values 0..255 of all 65536 possible voxels: black at level - width / 2, white at level + width / 2. */
  greyTable(level, width) {
    const table = new Uint8ClampedArray(65536);
    const scale = 255 / Math.max(width, 1e-6);
    const low = level - width / 2;
    for (let stored = -32768; stored < 32768; stored++) {
      table[stored + 32768] = (stored * this.slope + this.intercept - low) * scale;
    }
    return table;
  }

  /* One plane as an ImageData, a pixel for each voxel. */
  plane(name, index, table) {
    const { across, down, along } = PLANES[name];
    const width = this.size[across], height = this.size[down];
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const stepAcross = this.step[across], stepDown = this.step[down];
    const start = index * this.step[along];
    for (let y = 0, pixel = 0; y < height; y++) {
      let voxel = start + y * stepDown;
      for (let x = 0; x < width; x++, voxel += stepAcross) {
        pixels[pixel++] = 0xff000000 | (table[this.voxels[voxel] + 32768] * 0x010101);
      }
    }
    return image;
  }

  /* The file with every n-th voxel along axes that have more than `limit`; the file itself where none has. */
  thinned(limit) {
    const every = this.size.map((count) => Math.ceil(count / limit));
    if (Math.max(...every) === 1) return this.buffer;
    const size = this.size.map((count, axis) => Math.ceil(count / every[axis]));
    const buffer = new ArrayBuffer(HEADER_BYTES + 2 * size[0] * size[1] * size[2]);
    new Uint8Array(buffer).set(new Uint8Array(this.buffer, 0, HEADER_BYTES));
    const header = new DataView(buffer), voxels = new Int16Array(buffer, HEADER_BYTES);
    size.forEach((count, axis) => {
      header.setInt16(42 + 2 * axis, count, true);
      header.setFloat32(80 + 4 * axis, this.spacing[axis] * every[axis], true);
      header.setFloat32(280 + 20 * axis, -this.spacing[axis] * every[axis], true); // the diagonal of the affine
    });
    let target = 0;
    for (let k = 0; k < this.size[2]; k += every[2]) {
      for (let j = 0; j < this.size[1]; j += every[1]) {
        const row = j * this.step[1] + k * this.step[2];
        for (let i = 0; i < this.size[0]; i += every[0]) voxels[target++] = this.voxels[row + i];
      }
    }
    return buffer;
  }

  /* Values below which the given fractions of a sample of the voxels lie, without air at the lowest value. */
  percentiles(fractions) {
    const stride = Math.max(1, Math.floor(this.voxels.length / 200000));
    const sample = [];
    for (let voxel = 0; voxel < this.voxels.length; voxel += stride) sample.push(this.voxels[voxel]);
    sample.sort((a, b) => a - b);
    const inside = sample.filter((stored) => stored > sample[0]);
    const counted = inside.length ? inside : sample;
    return fractions.map((f) => counted[Math.round(f * (counted.length - 1))] * this.slope + this.intercept);
  }
}

export async function fetchScan(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`The scan could not be fetched (status ${answer.status}). Open it again.`);
  return new Scan(await answer.arrayBuffer());
}
