"""Start the local page.

    python app.py --model_name_or_path models/Med3DVLM-Qwen-2.5-7B

It is bound to 127.0.0.1 and not shared; scans come in by upload only, stay on this machine, and are removed when their
tab is closed. Without a model the one of the quickstart is taken, or else random weights, which every answer then says.
For research only, not a medical device. Exit codes: 0 ended, 1 the model cannot be used, the port is taken or Gradio is
missing (one line on standard error says why), 2 wrong arguments.
"""

import argparse
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from med3dvlm.app.sessions import Sessions
from med3dvlm.inference import BAD_INPUT, DTYPES, QUANTIZATIONS, CheckpointError, Med3DVLM, load_model

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "output/quickstart"  # as scripts/quickstart.sh writes it
SAMPLES = ROOT / "data/samples"
PASSWORD_VARIABLE = "MED3DVLM_APP_PASSWORD"
RANDOM = "Random weights: answers mean nothing."
GET_A_MODEL = (
    "no model was given: these are random weights, and every answer says so. Run `sh scripts/quickstart.sh` to train a "
    "small one, or name a model with --model_name_or_path."
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="folder or hub name of a merged model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto", help="auto: as stored")
    parser.add_argument("--quantization", choices=[q for q in QUANTIZATIONS if q], help="default: none")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, or the first free port from 7860")
    parser.add_argument("--max_upload_gb", type=float, default=4.0, help="largest upload, in gigabytes")
    parser.add_argument(
        "--share", action="store_true", help="also reachable through a public address of Gradio's; needs a password"
    )
    parser.add_argument("--password", help=f"asked for by the page; better given as {PASSWORD_VARIABLE}")
    args = parser.parse_args(argv)
    args.password = args.password or os.environ.get(PASSWORD_VARIABLE)
    if args.share and not args.password:
        parser.error(f"--share makes the page reachable for everybody: give a password too ({PASSWORD_VARIABLE})")
    if args.max_upload_gb <= 0:
        parser.error("--max_upload_gb must be positive")
    if args.port is None and os.environ.get("GRADIO_SERVER_PORT"):
        try:
            args.port = int(os.environ["GRADIO_SERVER_PORT"])
        except ValueError:
            parser.error(f"GRADIO_SERVER_PORT is not a port: {os.environ['GRADIO_SERVER_PORT']!r}")
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"a port is a number from 1 to 65535, found {args.port}")
    return args


def choose_model(args: argparse.Namespace) -> tuple[Med3DVLM, str, str]:
    """The model, its name, and "" or what every answer says about it. Raises as `load_model`."""
    options = {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
    if args.model_name_or_path:
        return load_model(args.model_name_or_path, **options), "/".join(Path(args.model_name_or_path).parts[-2:]), ""
    if (QUICKSTART / "model/config.json").is_file():
        try:
            return load_model(QUICKSTART / "model", **options), "quickstart (trained on phantoms)", ""
        except CheckpointError as error:
            print(f"the quickstart's model is left out: {error}", file=sys.stderr)
    from med3dvlm.app.random_weights import write_random_model

    print(GET_A_MODEL, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder))
        return load_model(folder, **options), "random weights", RANDOM


def serve(args: argparse.Namespace, model: Med3DVLM, name: str, random: str) -> None:
    """Serve the page until interrupted. Raises OSError where the port is taken."""
    # SIGTERM ends it as Ctrl-C does, so that the scans are removed then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sessions = Sessions(model)
    try:
        launch(args, sessions, name, random).block_thread()
    finally:
        sessions.close()


def launch(args: argparse.Namespace, sessions: Sessions, name: str, random: str):
    """Build the page and start the server beside the caller; returns Gradio's `Blocks`. Raises as `serve`."""
    # Before Gradio is imported: no call home, nothing in folders that others share, no settings from outside.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(sessions.folder / "gradio")}
    for variable in ("GRADIO_SERVER_PORT", "GRADIO_ALLOWED_PATHS", "GRADIO_NUM_WORKERS", "GRADIO_ROOT_PATH"):
        os.environ.pop(variable, None)
    from starlette.middleware import Middleware

    from med3dvlm.app.look import theme
    from med3dvlm.app.opening import find_examples
    from med3dvlm.app.page import STATIC, Page
    from med3dvlm.app.routes import Guard, routes

    limit = int(args.max_upload_gb * 1e9)
    page = Page(sessions.model, sessions, name, random, find_examples(SAMPLES, QUICKSTART), limit).build()
    hosts = None if args.share else ("127.0.0.1", "localhost")
    if args.port is not None and not _is_free(args.port):
        raise OSError(f"port {args.port} is taken by another program: give another --port")
    auth = (lambda _, given: secrets.compare_digest(given.encode(), args.password.encode())) if args.password else None
    page.launch(
        server_name="127.0.0.1",
        server_port=args.port,
        share=args.share,
        auth=auth,
        auth_message="Any user name, and the password that the app was started with.",
        app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)], "routes": routes(sessions, limit, name)},
        theme=theme(),
        css_paths=STATIC / "style.css",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    print(f"Open {page.local_url}", flush=True)
    if page.share_url:
        print(f"Shared as {page.share_url}, with the password", flush=True)
    return page


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def main(argv: Sequence[str] | None = None) -> None:
    """Choose the model and serve the page until interrupted.

    Raises:
        CheckpointError: the model cannot be used.
        OSError: the port is taken, or a hub name cannot be fetched.
    """
    args = parse_arguments(argv)
    serve(args, *choose_model(args))


def run(argv: Sequence[str] | None = None) -> int:
    """The command: `main` with bad input as one line and an exit code."""
    if find_spec("gradio") is None:
        print("error: the page needs Gradio: pip install gradio", file=sys.stderr)
        return 1
    try:
        main(argv)
    except (*BAD_INPUT, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0
