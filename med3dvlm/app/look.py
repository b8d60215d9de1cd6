"""The colours and fonts of the page, as a Gradio theme: dark in both of Gradio's modes, and no font from outside."""

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACED = ("ui-monospace", "Consolas", "monospace")

# The same names as in static/style.css.
_PAGE, _PANEL, _RAISED, _LINE, _TEXT, _MUTED, _ACCENT = (
    "#0b0e12", "#13171d", "#1c222a", "#2b333d", "#e6e9ed", "#9aa5b1", "#4cc2ff",
)  # fmt: skip

_VALUES = {
    "body_background_fill": _PAGE,
    "body_text_color": _TEXT,
    "body_text_color_subdued": _MUTED,
    "background_fill_primary": _PANEL,
    "background_fill_secondary": _PANEL,
    "border_color_primary": _LINE,
    "border_color_accent": _ACCENT,
    "color_accent_soft": _RAISED,
    "block_background_fill": _PANEL,
    "block_border_color": _LINE,
    "block_label_text_color": _MUTED,
    "block_label_background_fill": _PANEL,
    "block_title_text_color": _MUTED,
    "block_info_text_color": _MUTED,
    "input_background_fill": _RAISED,
    "input_border_color": _LINE,
    "input_border_color_focus": _ACCENT,
    "input_placeholder_color": "#7d8894",
    "slider_color": _ACCENT,
    "button_primary_background_fill": _ACCENT,
    "button_primary_background_fill_hover": "#7bd2ff",
    "button_primary_text_color": "#06121a",
    "button_secondary_background_fill": _RAISED,
    "button_secondary_background_fill_hover": _LINE,
    "button_secondary_text_color": _TEXT,
    "button_cancel_background_fill": "#7c2d2d",
    "button_cancel_background_fill_hover": "#994040",
    "button_cancel_text_color": "#ffffff",
}


def theme() -> gr.themes.Base:
    base = gr.themes.Base(font=FONT, font_mono=MONOSPACED, radius_size="sm", spacing_size="sm", text_size="md")
    return base.set(**_VALUES, **{f"{name}_dark": value for name, value in _VALUES.items()})
