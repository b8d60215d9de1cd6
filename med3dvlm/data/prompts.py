"""The wording of questions: caption prompts, and how choices and their answers are written."""

from med3dvlm.data.manifest import CHOICE_LETTERS

QUESTION_TYPES = {1: "plane", 2: "phase", 3: "organ", 4: "abnormality", 5: "location"}

CAPTION_PROMPTS = (
    "Describe the findings of this scan.",
    "Write the findings section of the report for this scan.",
    "What does this scan show?",
    "Please report on this volume.",
    "Summarize what can be seen in this image.",
    "Give a radiology report for this scan.",
    "What are the findings in this study?",
    "Describe this medical image in detail.",
    "Provide a description of the findings.",
    "Report the normal and abnormal findings of this scan.",
    "Please write down what you see in this volume.",
    "How would a radiologist describe this image?",
    "Generate a report for the scan shown.",
    "Which findings does this volume contain?",
    "Dictate a report for this study.",
    "Give an account of the findings in this image.",
    "Read this scan and report what you find.",
    "Please interpret this image.",
    "Tell me what is visible in this scan.",
    "Draft the findings for this examination.",
)


def closed_question(question: str, choices) -> str:
    """The question followed by its choices: "... Choices: A. liver B. spleen". A choice that is None is left out."""
    listed = [f"{letter}. {text}" for letter, text in zip(CHOICE_LETTERS, choices, strict=False) if text is not None]
    return f"{question} Choices: {' '.join(listed)}"


def closed_answer(letter: str, text: str) -> str:
    """The answer to a closed question: "B. spleen"."""
    return f"{letter}. {text}"
