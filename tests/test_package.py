"""What `import med3dvlm` does in a fresh process: nothing heavy, and transformers' Auto classes know the models."""

import subprocess
import sys

import pytest

ASK = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("vlm_qwen", hidden_size=8)
print(type(config).__name__, config.hidden_size, AutoModelForCausalLM._model_mapping[type(config)].__name__)
config = AutoConfig.from_pretrained(folder)
print(type(config).__name__, config.loss_type, AutoModel._model_mapping[type(config)].__name__)
"""


def outcome_of(code: str) -> list[str]:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.parametrize(
    "first",
    ["import med3dvlm", "from transformers import AutoConfig; import med3dvlm", "from med3dvlm import VLMConfig",
     "import med3dvlm; from transformers import Qwen2ForCausalLM",
     "import med3dvlm, importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto')"],
)  # fmt: skip
def test_the_auto_classes_know_the_models_after_the_import(first, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dec_clip", "loss_type": "nce"}')
    lines = outcome_of(f"{first}\nfolder = {str(tmp_path)!r}\n{ASK}")
    assert lines == ["VLMConfig 8 VLMForCausalLM", "CLIPConfig nce CLIPModel"]


def test_what_stands_for_a_configuration_answers_as_it():
    lines = outcome_of(
        "import med3dvlm; from transformers import CONFIG_MAPPING; stand_in = CONFIG_MAPPING['vlm_qwen']; "
        "print(stand_in.model_type, stand_in.from_dict({'hidden_size': 8}).hidden_size)"
    )
    assert lines == ["vlm_qwen 8"]


def test_the_import_is_light():
    loaded = outcome_of("import med3dvlm, sys; print(*{name.partition('.')[0] for name in sys.modules})")[0].split()
    assert not {"torch", "transformers", "numpy", "monai"} & set(loaded)
