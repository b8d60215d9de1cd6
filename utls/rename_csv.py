"""Let the image paths of manifests end in .nii.gz, as the prepared files do.

`python utls/rename_csv.py data/M3D-VQA data/M3D_Cap_npy/M3D_Cap.json`, or the same after `--csv_path`. A folder stands
for the .csv and .json files directly in it that name images. A file that is changed is kept as `<name>.bak`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without PYTHONPATH and without installing

from med3dvlm.data.manifest import ManifestError, image_paths, rename_manifest  # noqa: E402


def files_of(path: Path) -> list[Path]:
    """The file itself, or the .csv and .json files of the folder."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in (".csv", ".json"))
    return [path]


def rename(file: Path, data_root: Path | None) -> None:
    """Rename in one manifest, and say how many paths changed and how many point to nothing. Raises ManifestError."""
    changed = rename_manifest(file)
    images = image_paths(file)
    root = data_root or file.resolve().parent.parent
    there = {image: (root / image).is_file() for image in set(images)}
    missing = sum(not there[image] for image in images)
    print(f"{file}: {changed} paths changed, {missing} of {len(images)} point to no file below {root}")


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0 where all were renamed, 1 where one could not be."""
    parser = argparse.ArgumentParser(description="Change .npy to .nii.gz in the image paths of M3D manifests.")
    parser.add_argument("paths", nargs="*", type=Path, help=".csv or .json manifests, or folders of them")
    parser.add_argument("--csv_path", nargs="+", action="extend", type=Path, default=[], help="the same, by name")
    root = "folder that the paths are relative to (default: the one above that of the manifest)"
    parser.add_argument("--data_root", type=Path, help=root)
    arguments = parser.parse_args(argv)
    paths = arguments.paths + arguments.csv_path
    if not paths:
        parser.error("name at least one manifest, or a folder of them")
    files = [(path, file) for path in paths for file in files_of(path)]
    if not files:
        parser.error(f"no .csv or .json file in {', '.join(map(str, paths))}")
    failed = False
    for path, file in files:
        try:
            if file == path or image_paths(file):  # other tables may lie beside the manifests
                rename(file, arguments.data_root)
        except ManifestError as error:
            print(error, file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
