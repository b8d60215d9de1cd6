import pytest
import torch

from med3dvlm.inference import QuantizationError, load_model
from med3dvlm.inference.quantize import FEW_ROWS, Int8Linear, Int8Quantizer, blocks_to_4bit, to_int8
from med3dvlm.model.vlm import lora_target_modules
from med3dvlm.model.weights import write_tensors
from tests.helpers.tiny_model import TINY_SIZE, write_tiny_vlm

QUESTION = "Which plane is shown?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm")


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def small(folder):
    return load_model(folder, device="cpu", quantization="int8")


def prompt_logits(model) -> torch.Tensor:
    image = torch.rand(1, 1, *TINY_SIZE, generator=torch.Generator().manual_seed(0))
    ids = model.processor.encode(model.processor.prompt(QUESTION))["input_ids"][None]
    with torch.inference_mode():
        output = model.model(input_ids=ids.to(model.device), images=image.to(model.device, model.dtype))
    return output.logits.float().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_off_by_half_a_step_at_most(dtype):
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 12)[:, None]
    weight[3] = 0
    quantized, scale = to_int8(weight, dtype)
    assert quantized.dtype == torch.int8 and scale.dtype == dtype
    error = (quantized * scale.float()[:, None] - weight).abs()
    slack = 1.001 if dtype == torch.float32 else 2  # a scale that was rounded down cuts the largest value of its row
    assert (error <= slack * scale.float()[:, None] / 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 30])
def test_layer_computes_what_its_weights_say(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    quantized, scale = to_int8(torch.randn(24, 64, generator=generator), dtype)
    bias = torch.randn(24, generator=generator).to(dtype)
    x = torch.randn(2, rows, 64, generator=generator).to(dtype)
    x[..., 5] *= 1000  # as some channels of Qwen are
    expected = x.float() @ (quantized * scale.float()[:, None]).T + bias.float()
    got = Int8Linear(quantized, scale, bias)(x)
    assert got.dtype == dtype and got.shape == (2, rows, 24)
    torch.testing.assert_close(got.float(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_only_the_blocks_of_the_language_model_are_quantized(plain, small):
    names = lora_target_modules(plain.model)
    assert all(isinstance(small.model.get_submodule(name), Int8Linear) for name in names)
    changed = {f"{name}.{part}" for name in names for part in ("weight", "scale")}
    before, after = plain.model.state_dict(), small.model.state_dict()
    assert set(before) == set(after) - {f"{name}.scale" for name in names}
    assert all(torch.equal(before[key], after[key]) for key in set(before) - changed)
    assert sum(m.weight.nbytes for m in small.model.modules() if isinstance(m, Int8Linear)) == sum(
        plain.model.get_submodule(name).weight.numel() for name in names
    )


def test_quantized_model_says_nearly_the_same(plain, small):
    expected, found = prompt_logits(plain), prompt_logits(small)
    assert 0 < (found - expected).norm() / expected.norm() < 0.02


def test_other_dtype(folder, plain):
    small = load_model(folder, device="cpu", dtype="bfloat16", quantization="int8")
    assert small.dtype == torch.bfloat16
    floating = {t.dtype for t in small.model.state_dict().values() if t.is_floating_point()}
    assert floating == {torch.bfloat16}
    expected, found = prompt_logits(plain), prompt_logits(small)
    assert (found - expected).norm() / expected.norm() < 0.05
    assert small.answer(torch.rand(1, *TINY_SIZE), QUESTION, max_new_tokens=4).tokens <= 4


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_converted_weights_are_not_copied_again(folder, monkeypatch, dtype):
    """A copy of all of them would take their memory twice."""
    converted, convert = {}, Int8Quantizer.convert

    def recorded(self, key, tensor):
        kept = convert(self, key, tensor)
        converted.update(kept)
        return kept

    monkeypatch.setattr(Int8Quantizer, "convert", recorded)
    state = load_model(folder, device="cpu", dtype=dtype, quantization="int8").model.state_dict()
    assert {key for key in state if state[key].data_ptr() != converted[key].data_ptr()} == set()


def test_every_form_of_weight_file(tmp_path, small):
    tied = write_tiny_vlm(tmp_path / "tied", tie_word_embeddings=True)
    load_model(tied, device="cpu", quantization="int8")
    folder = write_tiny_vlm(tmp_path / "vlm")
    tensors = load_model(folder, device="cpu").model.state_dict()
    (folder / "model.safetensors").unlink()
    write_tensors(tensors, folder / "pytorch_model.bin")
    from_bin = load_model(folder, device="cpu", quantization="int8").model.state_dict()
    expected = small.model.state_dict()
    assert set(from_bin) == set(expected) and all(torch.equal(from_bin[key], expected[key]) for key in expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_four_bits(folder, plain, device):
    pytest.importorskip("bitsandbytes", reason="4bit needs bitsandbytes (pip install bitsandbytes)")
    small = load_model(folder, device=device)
    blocks_to_4bit(small.model, torch.device(device)).to(device)
    weights = [small.model.get_submodule(name).weight for name in lora_target_modules(plain.model)]
    assert weights and all(weight.dtype == torch.uint8 for weight in weights)
    expected, found = prompt_logits(plain), prompt_logits(small)
    assert 0 < (found - expected).norm() / expected.norm() < 0.2


def test_what_cannot_be_done_is_said(folder):
    if torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    with pytest.raises(QuantizationError, match="4bit needs a CUDA device and bitsandbytes"):
        load_model(folder, quantization="4bit")
    with pytest.raises(ValueError, match="quantization must be one of None, int8, 4bit, not 'int3'"):
        load_model(folder, quantization="int3")
