"""Make the manifests of your own data, or of CT-RATE with 3D-RAD, or AMOS-MM, without preparing the volumes first.

    python -m med3dvlm.data.convert --input_dir list.csv --output_dir data/own --columns image=Path text=Report

Takes the inputs and flags of `med3dvlm.data.prepare` and leaves the same folder: texts, `M3D_Cap.json`,
`M3D_VQA_*.csv`, `preparation.json`, `data_card.md`. Its volumes are links to the original files, which training reads
and puts through the pipeline each time. That takes seconds and no space, and is right for a look, an evaluation or a
small data set; for long training, `prepare` with the same flags puts prepared volumes in the places of the links.

Where a link would not do (DICOM, whose names are to be hidden; folders of slices; values that are not HU yet; options
of reading such as --flip) the volumes are prepared here and now.
"""

import argparse
import sys
from pathlib import Path

from med3dvlm.data import prepare
from med3dvlm.data.command import run_command
from med3dvlm.data.data_card import Written, draw_splits, split_rule, write_data_card
from med3dvlm.data.outputs import VERSION, write_manifests, write_mapping
from med3dvlm.data.prepare_arguments import parse_arguments
from med3dvlm.data.profile import DataProfile, summarize, write_preparation
from med3dvlm.data.sources import Collection, SourceError
from med3dvlm.data.sources.base import Case
from med3dvlm.data.volume import load_volume
from med3dvlm.data.work import Options

LINKED = (".nii.gz", ".nii", ".nrrd", ".mha", ".npy", ".npz")  # formats whose volume is one file
OPENED = 20  # volumes that are read, for the profile of the data
PURPOSE = "Make manifests, texts and a data card for a data set; volumes become links, or are prepared where they must."


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0 where all went well, 1 where the input cannot be used."""
    return prepare.carry_out(parse_arguments(argv, PURPOSE), run)


def run(arguments: argparse.Namespace, collection: Collection, options: Options) -> int:
    """Link what was found, or prepare it, and write what belongs to it. Returns the exit code.

    Raises SourceError: a report cannot be read, or a prepared volume is in the place of a link. VolumeError: one of the
    volumes that are opened cannot be read.
    """
    reason = why_not_linked(collection, options)
    if reason:
        print(f"the volumes are prepared, not linked: {reason}")
        return prepare.run(arguments, collection, options)
    if arguments.shard is not None:
        raise SourceError("--shard shares the work of preparation; links are made in one run, without it")
    cases = prepare.chosen(collection, None, arguments.limit)
    count = sum(len(case.items) for case in cases)
    if arguments.dry_run:
        print(f"{options.output}: would link {count} volumes of {len(cases)} cases ({collection.kind})")
        return 0
    profile = _profile(cases)
    written = Written(options.output, draw_splits(collection, tuple(arguments.split)))
    for case in cases:
        _write_report(case, options.output)
        for item in case.items:
            volume = f"{case.folder}/{item.name}{_ending(item.path)}"
            _link(item.path, options.output / volume)
            written.add(case.folder, f"{case.folder}/{item.name}", volume)
    if arguments.mapping_file is not None:
        write_mapping(collection, arguments.mapping_file)
    notes = write_manifests(collection, written)
    facts = {"source": collection.kind, "cases": len(cases), "volumes": count, "split_by": split_rule(collection)}
    write_preparation(options.output, options.config, profile, version=VERSION, dtype="original", **facts)
    checks = (
        f"{profile.cases} volumes, evenly chosen, were read whole; all are links to the original files",
        f"training puts them through this pipeline: {options.config}",
    )
    write_data_card(collection, written, profile, tuple(arguments.split), checks, notes)
    for note in collection.notes + notes:
        print(f"note: {note}")
    print(f"{count} volumes of {len(cases)} cases linked, {profile.cases} of them opened: {options.output}")
    return 0


def why_not_linked(collection: Collection, options: Options) -> str:
    """Why the original volumes would not do as they are; "" where they do."""
    if options.changed_reading:
        return f"training reads files without {', '.join(f'--{name}' for name in options.changed_reading)}"
    for case in collection.cases:
        if case.hidden:
            return "paths may name patients, and links would show them"
        if case.raw is not None or any(item.path.is_dir() for item in case.items):
            return "training reads files, and this input has folders"
        for item in case.items:
            if item.dicom or _ending(item.path) is None:
                return f"{item.path.name} is not one file with one volume ({', '.join(LINKED)})"
            if item.rescale is not None:
                return f"the values of {item.path.name} are HU only after rescaling by the metadata"
    return ""


def _ending(path: Path) -> str | None:
    return next((ending for ending in LINKED if path.name.lower().endswith(ending)), None)


def _profile(cases: list[Case]) -> DataProfile:
    """What some volumes look like; so they are known to open, too."""
    paths = [item.path for case in cases for item in case.items]
    some = paths[:: -(-len(paths) // OPENED)] if paths else []
    return DataProfile.from_summaries(summarize(load_volume(path)) for path in some)


def _write_report(case: Case, output: Path) -> None:
    try:
        case.write_report(output)
    except UnicodeDecodeError as error:
        reason = f"the report is not UTF-8 text ({error.reason}); save it as UTF-8"
        raise SourceError(f"{case.text_file}: {reason}") from error


def _link(source: Path, target: Path) -> None:
    """Make, or renew, a link to a file. Raises SourceError where something else has its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        raise SourceError(f"{target}: is a file, not a link; was this prepared before? Choose another --output_dir")
    target.symlink_to(source.resolve())


if __name__ == "__main__":
    sys.exit(run_command(main))
