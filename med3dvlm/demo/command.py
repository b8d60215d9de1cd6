"""What the command does: list series, one answer, a line of input an answer, a chat, or many scans."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from med3dvlm.data.presets import preprocess_config
from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.data.volume import describe_series, list_series, reading_options
from med3dvlm.demo.arguments import parse_arguments
from med3dvlm.demo.batch import answer_scans, find_jobs
from med3dvlm.demo.interactive import Conversation
from med3dvlm.demo.output import CommandError, record_of
from med3dvlm.demo.terminal import BOLD, Terminal, readable
from med3dvlm.inference import BAD_INPUT, NOTICE, Answer, Chat, Med3DVLM, QuestionError, load_model

USER_ERRORS = (*BAD_INPUT, CommandError, OSError)  # OSError: a file or a hub that cannot be reached


@dataclass
class Outcome:
    """answers: what was answered, in order (of many scans they are in the output only); failed: how many were not."""

    answers: list[Answer] = field(default_factory=list)
    failed: int = 0


def main(argv: list[str] | None = None) -> Outcome:
    """See `med3dvlm.demo.main`."""
    args = parse_arguments(argv)
    terminal = Terminal(args.json)
    if args.list_series:
        for series in list_series(args.image_path, args.max_voxels):
            terminal.line(describe_series(series))
        return Outcome()
    jobs = find_jobs(args)
    if jobs is not None:
        return Outcome(failed=answer_scans(jobs, lambda: load(args), args, terminal))
    asked = args.question is not None or args.report
    if not asked and not args.json and sys.stdin.isatty():
        if args.choices:
            raise QuestionError("a chat takes no --choices: give a --question with them, or pipe questions in")
        return Outcome(Conversation(load(args), args, terminal).run())
    if args.image_path is None:
        raise QuestionError("no scan to ask about: name one with --image_path")
    chat = load(args).chat(args.image_path, remember=args.remember, **reading_options(args))
    return answer_questions(chat, args, terminal)


def load(args: argparse.Namespace) -> Med3DVLM:
    """The model, with the preprocessing that the flags ask for in place of its own.

    Raises:
        CommandError: the flags don't fit the model's own. Otherwise as `load_model`.
    """
    model = load_model(args.model_name_or_path, args.device, args.dtype, args.quantization)
    try:
        model.processor.preprocess = preprocess_config(args, base=model.processor.preprocess)
    except ValueError as error:
        raise CommandError(f"the model is made for {model.processor.preprocess}: {error}") from error
    return model


def questions_of(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Questions and their kinds: the one of the flags, otherwise the lines of standard input, otherwise a report."""
    report = (CAPTION_PROMPTS[0], "caption")
    if args.question is not None or args.report:
        yield report if args.report else (args.question, "vqa")
        return
    empty = True
    for line in sys.stdin:
        if line.strip():
            empty = False
            yield readable(line.strip()), "vqa"
    if empty:
        if args.choices:
            raise QuestionError("--choices needs a question to choose the answer of")
        yield report


def answer_questions(chat: Chat, args: argparse.Namespace, terminal: Terminal) -> Outcome:
    """Print the answer to every question, and then how they came about.

    Of several questions, one that cannot be asked is reported and passed over.
    Raises:
        QuestionError: the only question cannot be asked.
    """
    outcome = Outcome()
    piped = args.question is None and not args.report
    for question, kind in questions_of(args):
        try:
            outcome.answers.append(answer_one(chat, question, kind, args, terminal))
        except QuestionError as error:
            if not piped:
                raise
            outcome.failed += 1
            terminal.say(f"error: {error}")
            if terminal.as_json:
                terminal.json(record_of(readable(args.image_path), question, error=str(error)))
    for warning in chat.seen.warnings:
        terminal.say(f"warning: {warning}")
    if not terminal.as_json:
        terminal.line(f"preprocessing: {chat.model.processor.preprocess}\n{NOTICE}")
    return outcome


def answer_one(chat: Chat, question: str, kind: str, args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Ask one question and print its answer, word by word where a person reads it."""
    if args.choices or terminal.as_json:
        answer = chat.ask(question, kind, args.max_new_tokens, choices=args.choices, sampling=args.sampling)
        if terminal.as_json:
            terminal.json(record_of(readable(args.image_path), question, answer))
        else:
            terminal.line(f"question: {question}\nanswer: {answer.text}")
    else:
        stream = chat.stream(question, kind, args.max_new_tokens, sampling=args.sampling)
        terminal.line(f"question: {question}")
        print(terminal.styled("answer:", BOLD), end=" ", flush=True)
        answer = terminal.pieces(stream)
    if not terminal.as_json:
        terminal.facts(answer)
    return answer
