"""Ask a model about a scan, in the terminal.

    python -m med3dvlm.demo --model_name_or_path models/Med3DVLM-Qwen-2.5-7B --image_path scan.nii.gz \\
        --question "Which organ is abnormal?"

The scan goes through the preprocessing that is stored beside the model. Exit codes: 0 answered, 1 the scan or the model
cannot be used (one line on standard error says why), 2 wrong arguments. For research only, not a medical device.
"""

import argparse
import sys

from transformers import TextStreamer

from med3dvlm.data.prompts import CAPTION_PROMPTS
from med3dvlm.data.volume import load_volume
from med3dvlm.inference import BAD_INPUT, DTYPES, NOTICE, Answer, load_model


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="local folder or hub name")
    parser.add_argument("--image_path", required=True, help="volume file (.nii, .nii.gz, .npy) or folder of slices")
    parser.add_argument("--question", help="without one, a report is asked for")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto", help="auto: as stored")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Answer:
    """Print the answer word by word as it is generated, then how it came about; returns it.

    Raises:
        VolumeError, CheckpointError: the scan or the model cannot be used (`BAD_INPUT`).
    """
    args = parse_arguments(argv)
    question, kind = (args.question, "vqa") if args.question else (CAPTION_PROMPTS[0], "caption")
    scan = load_volume(args.image_path)  # first: it fails sooner than a large model loads
    model = load_model(args.model_name_or_path, args.device, args.dtype)
    print(f"question: {question}\nanswer:", end="", flush=True)
    streamer = TextStreamer(model.processor.tokenizer, skip_special_tokens=True)
    answer = model.answer(scan, question, kind, args.max_new_tokens, streamer)
    for warning in answer.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"preprocessing: {model.processor.preprocess}")
    print(f"{answer.tokens} tokens in {answer.seconds:.1f} s\n{NOTICE}")
    return answer


def run(argv: list[str] | None = None) -> int:
    """The command: `main` with bad input as one line and an exit code."""
    try:
        main(argv)
    except (*BAD_INPUT, OSError) as error:  # OSError: a hub name that cannot be fetched
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
