"""A metric as the `evaluate` library loads it from a folder."""

from textwrap import indent


def metric_script(name: str, compute: str) -> str:
    """The source of `<name>.py`; `compute` are the lines that make a result of `predictions` and `references`."""
    return f"""
import datasets
import evaluate

class {name.title().replace("_", "")}(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": datasets.Value("string"), "references": datasets.Value("string")}})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
{indent(compute, 8 * ' ')}
"""
