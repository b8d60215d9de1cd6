"""The results as a page: counts, histograms, findings, pictures of the suspects. One file, nothing from elsewhere."""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from med3dvlm.data.checks.findings import KINDS, Finding

SHOWN = 100  # findings of a kind on the page; verify.json has them all
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:left;
vertical-align:top;overflow-wrap:anywhere}.error{color:#a40000}.warning{color:#8a5a00}img{max-width:100%}
figure{display:inline-block;margin:.5rem 1rem .5rem 0;max-width:26rem}figcaption{font-size:13px;overflow-wrap:anywhere}
section{border-top:1px solid #ccc;padding:.7rem 0}p.text{white-space:pre-wrap;overflow-wrap:anywhere}"""


def document(title: str, body: Iterable[str]) -> str:
    """A page that loads nothing: pictures are embedded, scripts and links can't do anything. body: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def table(rows: Iterable[Sequence]) -> str:
    """An HTML table, its header the first row; cells are escaped."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def picture(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def three_planes(array: np.ndarray, side: int) -> bytes:
    """PNG of the middle slices across D, H and W of a volume `[D, H, W]`, each `side` pixels high, side by side.

    Values 0..255 where they are uint8, else 0..1; what lies outside is clipped.
    """
    middles = [array[len(array) // 2], array[:, array.shape[1] // 2], array[:, :, array.shape[2] // 2]]
    if array.dtype != np.uint8:
        middles = [np.rint(np.clip(plane, 0, 1) * 255).astype(np.uint8) for plane in middles]
    planes = [np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((side, side))) for plane in middles]
    buffer = io.BytesIO()
    Image.fromarray(np.hstack(planes)).save(buffer, format="png")
    return buffer.getvalue()


def histograms(values: dict[str, Sequence[float]]) -> str:
    """One row of histograms, a title each; those without values are left out."""
    values = {title: numbers for title, numbers in values.items() if len(numbers)}
    if not values:
        return ""
    figure = Figure(figsize=(3.2 * len(values), 2.6), layout="constrained")
    for axes, (title, numbers) in zip(np.ravel(figure.subplots(1, len(values))), values.items(), strict=True):
        axes.hist(numbers, bins=30, color="#3b6ea5")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return picture(buffer.getvalue(), ", ".join(values))


def results_page(
    title: str,
    findings: Sequence[Finding],
    statistics: dict,
    values: dict[str, Sequence[float]],
    thumbnails: Sequence[tuple[str, str, bytes]],
) -> str:
    """The page of `verify`.

    statistics: name -> figure or dict of figures. values: of the histograms. thumbnails: file, what is suspected, PNG.
    """
    counts = Counter(finding.kind for finding in findings)
    by_kind = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    rows = [("kind", "", "count", "meaning"), *((k, s, counts[k], m) for k, (s, m) in KINDS.items() if counts[k])]
    body = [table(rows) if findings else "<p>No problem was found.</p>", "<h2>Statistics</h2>"]
    figures = [("", ""), *((name, value) for name, value in statistics.items() if not isinstance(value, dict))]
    body += [table(figures), histograms(values)]
    for name, value in statistics.items():
        if isinstance(value, dict) and value:
            body += [f"<h3>{escape(name)}</h3>", table([("", "count"), *value.items()])]
    if thumbnails:
        body.append("<h2>Suspects</h2><p>Middle slices across D, H and W.</p>")
        body += [f"<figure>{picture(png, name)}<figcaption>{escape(name)}<br>{escape(why)}</figcaption></figure>"
                 for name, why, png in thumbnails]  # fmt: skip
    for kind, (severity, meaning) in KINDS.items():
        if by_kind[kind]:
            more = f", {SHOWN} of {counts[kind]} shown" if counts[kind] > SHOWN else ""
            body.append(f"<h2 class={severity}>{kind}</h2><p>{severity}: {escape(meaning)}{more}</p>")
            body.append(table([("file", "row", "detail"), *((f.file, f.row, f.detail) for f in by_kind[kind][:SHOWN])]))
    return document(title, body)
