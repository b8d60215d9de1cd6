"""A local page that asks a model about an uploaded scan.

    python app.py --model_name_or_path models/Med3DVLM-Qwen-2.5-7B

Bound to 127.0.0.1 and never shared; files come in by upload only. A thin view over `med3dvlm.inference`: what the model
sees and answers is what the evaluation and the terminal demo see and answer. For research only, not a medical device.
"""

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: no request leaves the machine

import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402

from med3dvlm.data.prompts import CAPTION_PROMPTS  # noqa: E402
from med3dvlm.data.volume import load_volume  # noqa: E402
from med3dvlm.inference import BAD_INPUT, NOTICE, Med3DVLM, load_model  # noqa: E402


def middle_slices(image) -> list[np.ndarray]:
    """uint8 pictures of the model's input `[1, D, H, W]`: its middle slice along D, H and W."""
    volume = (image[0].numpy() * 255).astype(np.uint8)  # [D, H, W]
    return [volume.take(size // 2, axis=axis) for axis, size in enumerate(volume.shape)]


def build_page(model: Med3DVLM) -> gr.Blocks:
    """The page: upload, question, answer, and what the model saw."""

    def ask(path: str | None, question: str):
        if not path:
            raise gr.Error("Upload a scan first.")
        question, kind = (question.strip(), "vqa") if question.strip() else (CAPTION_PROMPTS[0], "caption")
        try:
            volume = load_volume(path)
            image = model.processor.load_image(volume)  # [1, D, H, W]
            answer = model.answer(image, question, kind)
        except BAD_INPUT as error:
            raise gr.Error(str(error).replace(path, os.path.basename(path))) from error
        facts = [*volume.warnings, f"preprocessing: {model.processor.preprocess}", NOTICE]
        return answer.text, "\n".join(facts), *middle_slices(image)

    with gr.Blocks(title="Med3DVLM") as page:
        gr.Markdown("# Med3DVLM\nAsk about a 3D scan. " + NOTICE)
        with gr.Row():
            scan = gr.File(label="Scan (.nii, .nii.gz, .npy)", type="filepath")
            question = gr.Textbox(label="Question", placeholder="Left empty: a report is written")
        button = gr.Button("Ask", variant="primary")
        # Text boxes, not Markdown: what a file name or an answer holds is shown, never rendered.
        answer = gr.Textbox(label="Answer", lines=4, interactive=False)
        facts = gr.Textbox(label="How it came about", lines=3, interactive=False)
        with gr.Row():
            seen = [gr.Image(label=f"What the model sees, middle along {axis}", height=260) for axis in "DHW"]
        gr.on([button.click, question.submit], ask, [scan, question], [answer, facts, *seen])
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub name of a merged model")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, or the first free port from 7860")
    args = parser.parse_args(argv)
    page = build_page(load_model(args.model_name_or_path))
    page.launch(server_name="127.0.0.1", server_port=args.port, share=False, max_file_size="2gb")


if __name__ == "__main__":
    main()
