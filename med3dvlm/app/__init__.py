"""The local page: a viewer for a scan and a conversation about it. Started by `app.py`; needs the extra `app` (Gradio).

- `main`: the command line, which model, the server's start and end;
- `page`: what is on the page and what its events do; `look`: its colours;
- `sessions`: one browser tab each: its files, its conversation;
- `routes`: the few addresses that Gradio doesn't have, and what of Gradio's is served at all;
- `opening`: from uploaded files to what the model and the browser get; `volumes`: scans as the browser gets them;
- `export`: a conversation as one file; `random_weights`: a model to try the page with;
- `static`: the viewer's JavaScript and style sheet, and NiiVue.
"""
