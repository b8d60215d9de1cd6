"""What can be wrong with a data set: the kinds of findings, and which of them are errors."""

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"

# kind: (severity, what it means). Errors falsify training or figures; warnings are for a person to look at.
KINDS = {
    "manifest": (ERROR, "a manifest or table that cannot be used"),
    "missing_image": (ERROR, "a volume that is named and does not exist"),
    "unreadable_image": (ERROR, "a volume that does not open"),
    "shape": (ERROR, "a volume of another shape than the others"),
    "range": (ERROR, "values outside 0..1: not prepared, or damaged"),
    "constant": (ERROR, "one value in all voxels"),
    "near_empty": (ERROR, "fewer than 1 in 200 voxels are brighter than 5% of the range"),
    "slice_order": (ERROR, "slices out of order: each resembles a farther one more than its neighbour"),
    "missing_text": (ERROR, "a report that does not exist, or is no UTF-8 text"),
    "empty_text": (ERROR, "a report, question or answer of fewer than 2 letters or digits; answers may have 1"),
    "answer_letter": (ERROR, "the answer choice is none of the choices"),
    "answer_text": (ERROR, "the answer is not the text of its choice"),
    "case_leak": (ERROR, "a case in the training split and in another one"),
    "patient_leak": (ERROR, "a patient with one case in the training split and another one elsewhere"),
    "image_leak": (ERROR, "nearly the same image in the training split and in another one"),
    "case_shared": (WARNING, "a case in the validation and the test split"),
    "patient_shared": (WARNING, "a patient with one case in the validation and another one in the test split"),
    "image_shared": (WARNING, "nearly the same image in the validation and the test split"),
    "image_repeated": (WARNING, "the same image, or nearly so, twice in a split"),
    "slices_repeated": (WARNING, "the same slice more than once within a volume, its ends not counted"),
    "text_repeated": (WARNING, "cases with the same report, to the letter"),
    "same_choices": (WARNING, "a question two of whose choices are the same"),
    "identifier": (WARNING, "what looks like a date, number, name or address of a person in a text"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. It never holds words of a report, question or answer.

    kind: one of KINDS. file: the file, relative to the data root where it lies below it. row: where in a manifest or
    table, "" for a file as a whole. detail: what exactly, may be empty.
    """

    kind: str
    file: str
    detail: str = ""
    row: str = ""

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]
