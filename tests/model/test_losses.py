"""The contrastive losses follow their papers, and don't depend on the number of processes."""

import math

import pytest
import torch

from med3dvlm.model.losses import info_nce_loss, siglip_loss
from tests.helpers.contrastive import all_gradients
from tests.helpers.distributed import run_processes


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=generator), dim=-1)


def test_siglip_is_the_papers_sum_over_pairs():
    images, texts = unit_rows(5, seed=0), unit_rows(5, seed=1)
    t_prime, bias = 0.7, -2.0
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = math.exp(t_prime) * torch.dot(images[i], texts[j]).item() + bias
            total += math.log1p(math.exp(-logit if i == j else logit))
    found = siglip_loss(images, texts, torch.tensor(t_prime), torch.tensor(bias))
    assert found.item() == pytest.approx(total / 5, rel=1e-5)


def test_info_nce_is_the_mean_of_both_directions():
    images, texts = unit_rows(5, seed=0), unit_rows(5, seed=1)
    scale = 1.3
    similarity = (math.exp(scale) * images @ texts.T).double()
    to_text = [-math.log(similarity[i].exp()[i] / similarity[i].exp().sum()) for i in range(5)]
    to_image = [-math.log(similarity[:, i].exp()[i] / similarity[:, i].exp().sum()) for i in range(5)]
    found = info_nce_loss(images, texts, torch.tensor(scale))
    assert found.item() == pytest.approx((sum(to_text) + sum(to_image)) / 10, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_are_float32_whatever_the_features_are(dtype):
    images, texts = unit_rows(4, seed=0).to(dtype), unit_rows(4, seed=1).to(dtype)
    for loss in (
        siglip_loss(images, texts, torch.tensor(1.0, dtype=torch.float64), torch.tensor(-1.0)),
        info_nce_loss(images, texts, torch.tensor(1.0, dtype=dtype)),
    ):
        assert loss.dtype == torch.float32 and loss.isfinite()


def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    expected = all_gradients()
    ranks = run_processes(all_gradients, 2, tmp_path)
    for kind, wanted in expected.items():
        for rank in ranks:
            torch.testing.assert_close(rank[kind].pop("loss"), wanted["loss"], rtol=1e-6, atol=1e-6, msg=kind)
        wanted.pop("loss")
        assert wanted.keys() == ranks[0][kind].keys()
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        for name, gradient in wanted.items():
            averaged = (ranks[0][kind][name] + ranks[1][kind][name]) / 2  # as DDP and DeepSpeed do
            scale = max(gradient.abs().max().item(), 1e-2 * largest)  # key biases: analytically 0, only noise
            torch.testing.assert_close(averaged, gradient, rtol=0, atol=1e-5 * scale, msg=f"{kind}: {name}")
