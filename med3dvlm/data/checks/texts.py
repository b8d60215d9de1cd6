"""Checks of reports and of tables of questions. No finding holds a word of them."""

import re
from collections import defaultdict

from med3dvlm.data.checks.findings import Finding
from med3dvlm.data.choices import CHOICE_LETTERS, plain
from med3dvlm.data.manifest import VQARecord

_MONTH = r"(?:Jan|Feb|M(?:ar|är)|Apr|Ma[yi]|Jun|Jul|Aug|Sep|O[ck]t|Nov|De[cz])[a-zä]*\.?"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?:19|20)\d\d"
_CAPITAL = r"[A-ZÀ-ÖØ-Þ]"
IDENTIFIERS = {
    "date": re.compile(
        rf"(?<!\d){_DAY}[./-]{_DAY}[./-](?:{_YEAR}|\d\d)(?!\d)|(?<!\d){_YEAR}[./-]{_DAY}[./-]{_DAY}(?!\d)"
        rf"|(?<!\d){_DAY}(?:st|nd|rd|th|\.)?[\s-]+(?:of\s+)?{_MONTH},?[\s-]+{_YEAR}(?!\d)"
        rf"|\b{_MONTH}\s+{_DAY}(?:st|nd|rd|th)?,?\s+{_YEAR}(?!\d)",
        re.IGNORECASE,
    ),
    "long number": re.compile(r"(?<!\d)(?<!\d\.)\d{6,}(?!\.?\d)|\b\d{3}-\d\d-\d{4}\b"),
    "telephone number": re.compile(r"\+\d[\d ()/-]{7,}\d|\(?\b\d{3}\)?[ -]\d{3}-\d{4}\b"),
    "name after a title": re.compile(  # MR and DR without a full stop are methods of imaging
        r"\b(?:(?:Mr|Mrs|Ms|Miss|Dr|Prof|Professor|Doctor|Herr|Frau)(?:\.\s*|\s+)|(?:MR|MRS|MS|DR|PROF)\.\s*)"
        rf"(?:(?:Dr|med|van|von|de|der|den|del|di|da|la|le|el|al)\b\.?\s*)*(?:{_CAPITAL}\.\s*)*{_CAPITAL}[\w'’-]+"
    ),
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "labelled field": re.compile(
        r"\b(?:MRN|DOB|SSN|accession(?:\s+(?:number|no\.?))?|patient(?:'s)?\s+(?:name|id)|date\s+of\s+birth)\s*[:#]\s*\w",
        re.IGNORECASE,
    ),
}


def identifiers(text: str) -> str:
    """What in a text looks as if it identified a person, as kinds and counts: "2 date, 1 long number"; "" for none."""
    counts = {name: len(pattern.findall(text)) for name, pattern in IDENTIFIERS.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def check_report(text: str, name: str) -> list[Finding]:
    """Findings about one report. name: what they call its file."""
    if _letters(text) < 2:
        return [Finding("empty_text", name)]
    found = identifiers(text)
    return [Finding("identifier", name, found)] if found else []


def repeated_reports(texts: dict[str, bytes]) -> list[Finding]:
    """A finding for each report that several cases share. texts: file -> hash of its text."""
    groups = defaultdict(list)
    for name, digest in sorted(texts.items()):
        groups[digest].append(name)
    return [
        Finding("text_repeated", names[0], f"{len(names)} files, for example {names[1]}")
        for names in groups.values()
        if len(names) > 1
    ]


def check_question(record: VQARecord, name: str) -> list[Finding]:
    """Findings about one row of a table. name: what they call the table."""
    findings = []

    def add(kind: str, detail: str) -> None:
        findings.append(Finding(kind, name, detail, record.row))

    empty = [part for part, text, least in (("question", record.question, 2), ("answer", record.answer, 1))
             if _letters(text) < least]  # fmt: skip
    if empty:
        add("empty_text", " and ".join(empty))
    found = identifiers(f"{record.question}\n{record.answer}")
    if found:
        add("identifier", found)
    choices = {letter: plain(choice) for letter, choice in zip(CHOICE_LETTERS, record.choices, strict=False) if choice}
    if not choices:
        return findings
    if len(set(choices.values())) < len(choices):
        add("same_choices", f"{len(choices)} choices, {len(set(choices.values()))} different")
    chosen = record.answer_choice
    if chosen not in choices:
        shown = f"{chosen!r} is" if len(chosen) <= 2 else "no letter,"
        add("answer_letter", f"{shown} none of {', '.join(choices)}")
    elif choices[chosen] != plain(record.answer):
        add("answer_text", f"differs from choice {chosen}")
    return findings


def _letters(text: str) -> int:
    return sum(character.isalnum() for character in text)
