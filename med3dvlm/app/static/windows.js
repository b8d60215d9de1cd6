/* Grey-scale windows: [level, width]. The CT ones are in Hounsfield units and only offered for scans that have them. */

const CT_WINDOWS = {
  "Soft tissue": [40, 400],
  Mediastinum: [50, 350],
  Lung: [-600, 1500],
  Bone: [400, 1800],
  Liver: [60, 160],
  Brain: [40, 80],
};

/* The presets of a scan, in the order in which W goes through them. */
export function presetsOf(scan, hounsfield) {
  const around = (low, high) => [(low + high) / 2, Math.max(high - low, Math.abs(scan.slope))];
  const [lowest, low, high, highest] = scan.percentiles([0, 0.005, 0.995, 1]);
  const own = { Automatic: around(low, high), "Full range": around(lowest, highest) };
  return hounsfield ? { ...CT_WINDOWS, ...own } : own;
}
