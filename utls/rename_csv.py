"""Let the image paths of manifests end in .nii.gz, as the prepared files do.

`python utls/rename_csv.py data/M3D-VQA data/M3D_Cap_npy/M3D_Cap.json`, or the same after `--csv_path`. A folder stands
for the .csv and .json files directly in it that are manifests. A file that is changed is kept as `<name>.bak`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without PYTHONPATH and without installing

from med3dvlm.data.manifest import ManifestError, image_paths, rename_manifest  # noqa: E402


def manifests(path: Path) -> list[Path]:
    """The file itself, or the .csv and .json files of the folder."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in (".csv", ".json"))
    return [path]


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0 where all were renamed, 1 where one could not be."""
    parser = argparse.ArgumentParser(description="Change .npy to .nii.gz in the image paths of M3D manifests.")
    parser.add_argument("paths", nargs="*", type=Path, help=".csv or .json manifests, or folders of them")
    parser.add_argument("--csv_path", nargs="+", type=Path, default=[], help="the same, by name")
    root = "folder that the paths are relative to (default: the one above that of the manifest)"
    parser.add_argument("--data_root", type=Path, help=root)
    arguments = parser.parse_args(argv)
    files = [file for path in arguments.paths + arguments.csv_path for file in manifests(path)]
    if not files:
        parser.error("name at least one manifest, or a folder with .csv or .json files")
    failed = False
    for file in files:
        try:
            changed = rename_manifest(file)
            images = image_paths(file)
            root = arguments.data_root or file.resolve().parent.parent
            there = {image: (root / image).is_file() for image in set(images)}
            missing = sum(not there[image] for image in images)
            print(f"{file}: {changed} paths changed, {missing} of {len(images)} point to no file below {root}")
        except ManifestError as error:
            print(error, file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
