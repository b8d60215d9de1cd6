"""A metric as the `evaluate` library loads it from a folder."""

from textwrap import indent


def metric_script(name: str, compute: str) -> str:
    """The source of `<name>.py`; `compute` are the lines that make a result of `predictions` and `references`."""
    return f"""
import datasets
import evaluate

class {name.title().replace("_", "")}(evaluate.Metric):
    def _info(self):
        texts = {{name: datasets.Value("string") for name in ("predictions", "references")}}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(texts))

    def _compute(self, predictions, references):
{indent(compute, 8 * ' ')}
"""
