"""The data card: what a data set of ours holds, how it was divided, what was checked, and what its owner has to add."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from med3dvlm.data.files import write_bytes
from med3dvlm.data.manifest import CHOICE_LETTERS, read_json
from med3dvlm.data.profile import DataProfile
from med3dvlm.data.sources.base import SPLITS, Case, Collection, Question, SourceError, draw_split

CARD = "data_card.md"
BY_HAND = "## Licence and consent\n"  # what follows it is the owner's, and stays when the card is written again
TO_FILL_IN = """
To be filled in by whoever passes this data set on: where the images and texts come from, under which licence or
consent they may be used and by whom, what was done against identification of patients, and whom to ask. This part stays
when the card is written again.
"""
SHOWN_TYPES = 10


@dataclass
class Written:
    """What lies in an output folder.

    splits: case -> split. volumes: case -> its volumes, relative to the output. images: image, as in `Question` -> its
    path in manifests. cases: image -> case.
    """

    output: Path
    splits: dict[str, str]
    volumes: dict[str, list[str]] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    cases: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, image: str, volume: str) -> None:
        self.volumes.setdefault(case, []).append(volume)
        self.images[image] = f"{self.output.name}/{volume}"
        self.cases[image] = case


def draw_splits(collection: Collection, fractions: tuple[float, float, float]) -> dict[str, str]:
    """The split of each case: that of its source, else drawn by patient; "" where a manifest leaves the case out."""
    if collection.manifest is None:
        return {c.folder: c.split or draw_split(c.group or c.folder, fractions) for c in collection.cases}
    try:
        listed = read_json(collection.manifest)
        found = {"/".join(Path(e["image"]).parts[-3:-1]): split for split, entries in listed.items() for e in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{collection.manifest}: is no manifest of images and texts ({error!r})") from error
    return {case.folder: found.get(case.folder, "") for case in collection.cases}


def split_rule(collection: Collection) -> str:
    if collection.manifest is not None:
        return f"the {collection.manifest.name} of the source"
    return "source" if all(case.split for case in collection.cases) else "hash of the patient or case"


def write_data_card(
    collection: Collection,
    written: Written,
    profile: DataProfile,
    fractions: tuple[float, float, float],
    checks: Iterable[str],
    notes: Iterable[str],
) -> None:
    """Write `data_card.md`. checks, notes: sentences about this run; those of the collection are added.

    Report texts themselves are not quoted, and nothing names a patient of a DICOM tree.
    """
    cases = [case for case in collection.cases if case.folder in written.volumes]
    texts = {case.folder: _text(written.output / case.folder / "text.txt") for case in cases}
    parts = [
        f"# Data card: {written.output.name}\n\nWritten by `med3dvlm.data`; form of the input: `{collection.kind}`.",
        "## What it holds\n\n" + _counts(cases, collection, written, texts),
        f"## Images\n\n{profile}." if profile.cases else "",
        "## Texts\n\n" + _about_texts([text for text in texts.values() if text]),
        _about_questions(collection, written),
        _about_labels(collection, written),
        "## Splits\n\n" + _about_splits(collection, fractions),
        "## Checks\n\n" + _bullets([*checks, *(CHECKS if collection.manifest is None else CHECKS_OF_OTHERS)]),
        "## Left out, and notes\n\n" + _bullets([*_left_out(collection), *collection.notes, *notes] or ["nothing"]),
    ]
    path = written.output / CARD
    by_hand = path.read_text(encoding="utf-8").partition(BY_HAND)[2] if path.is_file() else ""
    text = "\n\n".join(part for part in parts if part) + f"\n\n{BY_HAND}{by_hand or TO_FILL_IN}"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_bytes(path, text.encode("utf-8"))


CHECKS = (
    "no patient has cases in two splits, and no file belongs to two patients (an error otherwise)",
    "no training question is about an image of another split, nor the other way round (left out otherwise)",
    "the columns that are needed are there, and the files that a list names exist (an error otherwise)",
)


CHECKS_OF_OTHERS = (
    "the splits are those of the manifest that came with the data, which were not checked; "
    "`python -m med3dvlm.data.verify` finds cases that are in several",
)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _counts(cases: list[Case], collection: Collection, written: Written, texts: dict[str, str]) -> str:
    """Patients, cases, volumes, reports and questions of each split."""

    def count(measure: Callable[[Case], int]) -> Counter:
        counter = Counter()
        for case in cases:
            counter[written.splits[case.folder]] += measure(case)
        return counter

    patients = Counter(
        split for split, _ in {(written.splits[case.folder], case.group or case.folder) for case in cases}
    )
    questions = Counter(_split_of(split, question, written) for split, question in _asked(collection, written))
    rows = {
        "patients": patients,
        "cases": count(lambda case: 1),
        "volumes": count(lambda case: len(written.volumes[case.folder])),
        "cases with a report": count(lambda case: bool(texts[case.folder])),
        "questions": questions,
    }
    splits = [*SPLITS, *([""] if "" in patients else [])]
    table = [["", *(split or "in none" for split in splits), "all"]]
    table += [[name, *(counts[split] for split in splits), sum(counts.values())] for name, counts in rows.items()]
    return _table(table)


def _asked(collection: Collection, written: Written) -> list[tuple[str, Question]]:
    """(split or "", question) of the questions whose image is there."""
    return [(s, q) for s, questions in collection.questions.items() for q in questions if q.image in written.images]


def _split_of(split: str, question: Question, written: Written) -> str:
    return split or written.splits[written.cases[question.image]]


def _about_texts(texts: list[str]) -> str:
    if not texts:
        return "No case has a report."
    words = [len(text.split()) for text in texts]
    again = len(texts) - len(set(texts))
    return (
        f"{len(texts)} reports of {min(words)} to {max(words)} words, median {statistics.median(words):g}; "
        f"{again} of them are identical to another one."
    )


def _about_questions(collection: Collection, written: Written) -> str:
    asked = [question for _, question in _asked(collection, written)]
    if not asked:
        return ""
    letters = Counter(question.answer_choice for question in asked if question.choices)
    types = Counter(question.question_type or "not named" for question in asked)
    lines = [
        f"{sum(letters.values())} with choices, {len(asked) - sum(letters.values())} open",
        f"types: {_listed(types)}",
        f"words of an answer: median {statistics.median(len(question.answer.split()) for question in asked):g}",
    ]
    if letters:
        wrong = sum(bool(question.choices) and not _letter_fits(question) for question in asked)
        lines.append(f"letters of the right choice: {_listed(letters)}")
        lines.append(f"{wrong} whose letter does not stand for the answer")
    return "## Questions\n\n" + _bullets(lines)


def _letter_fits(question: Question) -> bool:
    return dict(zip(CHOICE_LETTERS, question.choices, strict=False)).get(question.answer_choice) == question.answer


def _about_labels(collection: Collection, written: Written) -> str:
    """How many volumes of each split have each label."""
    positive, labelled = {}, Counter()
    for image, labels in collection.labels.items():
        if image in written.cases:
            split = written.splits[written.cases[image]]
            labelled[split] += 1
            for label, value in labels.items():
                positive.setdefault(label, Counter())[split] += value
    if not labelled:
        return ""
    rows = [[label, *(counts[split] for split in SPLITS)] for label, counts in positive.items()]
    heading = ["volumes with", *(f"{split} (of {labelled[split]})" for split in SPLITS)]
    return "## Labels\n\n`labels.csv`, one row a volume.\n\n" + _table([heading, *rows])


def _about_splits(collection: Collection, fractions: tuple[float, float, float]) -> str:
    rule = split_rule(collection)
    if not rule.startswith("hash"):
        return f"By {rule if collection.manifest else 'the source'}."
    shares = " / ".join(f"{share:g}" for share in fractions)
    drawn = sum(not case.split for case in collection.cases)
    return (
        f"Shares train / validation / test: {shares}, for {drawn} of {len(collection.cases)} cases. A patient's place "
        '(the first 64 bits of SHA-256 of "split|" and its name or keyed hash, as a fraction of 2^64) decides alone, '
        "so that more data never move a patient to another split."
    )


def _left_out(collection: Collection) -> list[str]:
    reasons = Counter(reason.partition(":")[0] for _, reason in collection.left_out)
    lines = [f"{count} files left out: {reason}" for reason, count in reasons.most_common()]
    listed = bool(collection.unmatched or collection.left_out)
    return lines + ["`unmatched.csv` lists every name that was left out or belongs to nothing here"] * listed


def _listed(counts: Counter) -> str:
    more = len(counts) - SHOWN_TYPES
    shown = ", ".join(f"{name} {count}" for name, count in counts.most_common(SHOWN_TYPES))
    return shown + (f" and {more} more" if more > 0 else "")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(rows: list[list]) -> str:
    heading, *others = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])
