"""A conversation as one HTML file that needs nothing else: pictures inside, no script, every text escaped."""

import re
from collections.abc import Sequence
from datetime import datetime
from html import escape

from med3dvlm.inference import NOTICE

PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")
MAX_PICTURES = 4

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b2128; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } figure { display: inline-block; margin: 0 .5rem .5rem 0; vertical-align: top }
figure img { max-height: 16rem; max-width: 100%; display: block }
figcaption, .facts { color: #5a6672; font-size: .85rem }
.notice { border-left: 4px solid #b4530a; padding: .3rem .8rem; background: #fdf3e7 }
.user { font-weight: 600; margin: 1.5rem 0 .3rem } p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 }
"""


def check_pictures(pictures) -> list[dict[str, str]]:
    """The pictures that a browser sent: a list of {title, data}, data a PNG as a data URL.

    Raises:
        ValueError: anything else, which would end up in the page.
    """
    if not isinstance(pictures, list) or len(pictures) > MAX_PICTURES:
        raise ValueError("expected a list of at most 4 pictures")
    for picture in pictures:
        if not isinstance(picture, dict) or not PICTURE.fullmatch(str(picture.get("data"))):
            raise ValueError("a picture is not a PNG data URL")
    return pictures


def conversation_page(messages: Sequence[dict], scan: dict | None, model: str, pictures: Sequence[dict]) -> str:
    """The page. messages and scan: as the app's page shows them; model: its name; pictures: see `check_pictures`."""
    figures = "".join(
        f'<figure><img src="{picture["data"]}" alt="{escape(str(picture.get("title")))}">'
        f"<figcaption>{escape(str(picture.get('title')))}</figcaption></figure>"
        for picture in pictures
    )
    about = []
    if scan is not None:
        about = [f"Scan: {scan['name']}, {scan['about']}", *(f"Warning: {text}" for text in scan["warnings"])]
        about.append(f"Preprocessing: {scan['preprocessing']}")
    facts = "".join(f"<p class=facts>{escape(line)}</p>" for line in [*about, f"Model: {model}"])
    turns = "".join(_turn(message) for message in messages)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Conversation about a scan</title><style>{_STYLE}</style></head><body>"
        f"<h1>Conversation about a scan, {written}</h1><p class=notice>{escape(NOTICE)}</p>"
        f"{facts}<div>{figures}</div>{turns}</body></html>"
    )


def _turn(message: dict) -> str:
    below = "".join(f"<p class=facts>{escape(line)}</p>" for line in [*message["notes"], message["facts"]] if line)
    return f"<div><p class={message['role']}>{escape(message['text'])}</p>{below}</div>"
