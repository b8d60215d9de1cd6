"""The choices of a closed question as a table gives them, and which of them is the right one."""

CHOICE_LETTERS = ("A", "B", "C", "D")


def read_choices(texts: list[str | None], answer: str, chosen: str) -> tuple[tuple[str | None, ...], str]:
    """The choices, None where there is none, and the letter of the right one; `chosen` as it is where that is unknown.

    texts: the cells of A to D, of which some may not be there. chosen: the cell `Answer Choice`.
    "NA" is a choice where it is the right one. A choice that is named by its text, as yes / no tables may do, gets its
    letter; what may be a letter in another spelling ("b") is no text.
    """
    cells = dict(zip(CHOICE_LETTERS, texts, strict=False))
    right = chosen if cells.get(chosen) == answer.strip() else None
    choices = {
        letter: None if text in ("", None) or (text == "NA" and letter != right) else text
        for letter, text in cells.items()
    }
    if choices.get(chosen) is None and plain(chosen) and chosen.upper() not in CHOICE_LETTERS:
        named = [letter for letter, text in choices.items() if text is not None and plain(text) == plain(chosen)]
        chosen = named[0] if len(named) == 1 else chosen
    return tuple(choices.values()), chosen


def plain(text: str) -> str:
    """Text as choices and answers are compared: case, spaces and a final full stop make no difference."""
    return " ".join(text.split()).casefold().removesuffix(".")
