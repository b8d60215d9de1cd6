"""The feed-forward part on a GPU equals the plain one: in Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.triton_device import DEVICE, EXACT, assert_close

from med3dvlm.model.fused import triton_feed_forward as ff  # isort: skip
from med3dvlm.model.fused import triton_tuning  # isort: skip

# [.., C], R: whole tiles, something left over, less than one tile; every width that the variants have up to 256.
SIZES = [((2, 1, 3, 5, 16), 32), ((1, 2, 3, 3, 20), 52), ((1, 1, 1, 1, 3), 12), ((1, 1, 2, 2, 96), 384),
         ((1, 1, 1, 2, 32), 128), ((1, 1, 1, 2, 64), 128), ((1, 1, 1, 2, 128), 512), ((1, 1, 1, 2, 192), 768),
         ((1, 1, 1, 2, 256), 1024)]  # fmt: skip


@pytest.fixture(params=[ff.Tile(16, 16, 4, 2), ff.Tile(16, 128, 4, 2), None], ids=["small", "large", "libraries"])
def way(request, monkeypatch):
    monkeypatch.setattr(ff, "WAYS", [request.param])


def inputs_of(shape, inner, dtype=EXACT, residual=EXACT, scale=1.0):
    torch.manual_seed(0)
    width = shape[-1]
    x, y = torch.randn(shape).to(DEVICE, residual), torch.randn(shape).to(DEVICE, dtype)
    sizes = [(inner, width), (inner,), (width, inner), (width,)]
    weights = [(torch.randn(*size) / size[-1] ** 0.5).to(DEVICE, dtype) for size in sizes]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    scale = scale * torch.rand(width).to(DEVICE, sums)
    return [tensor.requires_grad_() for tensor in (x, y, *weights, scale)]


def detached(shape, inner):
    return [leaf.detach() for leaf in inputs_of(shape, inner, torch.float32, torch.float32)]


def plain(x, y, expand, expand_bias, contract, contract_bias, scale):
    return x + scale * F.linear(F.gelu(F.linear(y, expand, expand_bias)), contract, contract_bias)


def both(leaves):
    """(result and gradients, the same by the plain code in float64)"""
    x, y, *mlp = leaves
    out = ff.feed_forward(x, y, ff.Mlp(*mlp))
    d_out = torch.sin(torch.arange(out.numel(), device=DEVICE)).view_as(out).to(out.dtype)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = plain(*doubles)
    return ([out, *torch.autograd.grad(out, leaves, d_out)],
            [expected, *torch.autograd.grad(expected, doubles, d_out.double())])  # fmt: skip


@pytest.mark.parametrize("shape, inner", SIZES, ids=str)
def test_it_equals_the_plain_one(shape, inner, way):
    assert_close(*both(inputs_of(shape, inner)))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, residual, way):
    leaves = inputs_of((1, 2, 2, 3, 16), 64, dtype, residual)
    found, expected = both(leaves)
    assert [tensor.dtype for tensor in found] == [residual, *(leaf.dtype for leaf in leaves)]
    coarse = max(torch.finfo(dtype).eps, torch.finfo(residual).eps)
    assert_close(found, expected, 10 * coarse)


def test_a_published_layer_scale_survives_half_precision(way):
    """1e-6 times a weight is below what float16 can say: the scale must not be folded into the weights."""
    leaves = inputs_of((1, 2, 2, 3, 16), 64, torch.float16, torch.float32, scale=1e-6)
    x = leaves[0].detach().zero_()
    found, expected = both(leaves)
    assert not x.any()
    assert_close(found[:1] + found[-1:], expected[:1] + expected[-1:], 5e-3)


@pytest.mark.skipif(DEVICE != "cpu", reason="finite differences need float64")
def test_gradients_by_finite_differences(way):
    leaves = inputs_of((1, 1, 1, 2, 3), 5)
    assert torch.autograd.gradcheck(lambda x, y, *mlp: ff.feed_forward(x, y, ff.Mlp(*mlp)), leaves)


def test_inputs_that_are_not_contiguous(way):
    x, y, *mlp = inputs_of((1, 2, 3, 4, 8), 16)
    turned = [tensor.detach().movedim(-1, 1).contiguous().movedim(1, -1) for tensor in (x, y)]
    assert not turned[0].is_contiguous()
    assert_close([ff.feed_forward(*turned, ff.Mlp(*mlp))], [plain(x, y, *mlp)])


def test_wide_levels_stay_with_libraries(monkeypatch):
    monkeypatch.setattr(ff, "WAYS", [])
    leaves = inputs_of((1, 1, 1, 2, ff.WIDEST + 8), 16)
    assert_close(*both(leaves))


def test_what_training_keeps(way):
    """Nothing of the inner width but the weights."""
    x, y, *mlp = inputs_of((2, 4, 4, 4, 8), 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        ff.feed_forward(x, y, ff.Mlp(*mlp))
    assert kept == [torch.Size([128, 8]), *(tensor.shape for tensor in mlp)]


# How functions run.


def test_the_fastest_way_that_fits_is_taken(monkeypatch):
    timed = []

    def time(call, **_):
        call()
        if timed[-1] == "too large":
            raise triton_tuning.OutOfResources(300_000, 200_000, "shared memory")
        return {"slow": 0.7, "fast": 0.5}[timed[-1]]

    monkeypatch.setattr(triton_tuning.triton.testing, "do_bench", time)
    assert triton_tuning.fastest(["too large", "slow", "fast"], timed.append) == "fast"
    assert timed == ["too large", "slow", "fast"]


def test_ways_are_timed_once_for_each_kind_of_call(monkeypatch):
    monkeypatch.setattr(triton_tuning, "INTERPRETED", False)
    monkeypatch.setattr(triton_tuning, "_chosen", {})
    timed = []
    monkeypatch.setattr(triton_tuning, "fastest", lambda ways, run: timed.append(ways) or ways[-1])

    def call(shape=(8, 4), dtype=torch.float32, width=4):
        return triton_tuning.tuned("sum", torch.zeros(shape, dtype=dtype), torch.zeros(3, width), ["a", "b"], str)

    assert [call(), call(), call((9, 4))] == ["b"] * 3 and len(timed) == 1
    call(dtype=torch.bfloat16), call(width=5), call((16, 4))
    assert len(timed) == 4
    assert triton_tuning.tuned("sum", torch.zeros(2, 3), torch.zeros(7), ["only"], str) == "only" and len(timed) == 4


def test_no_stopwatch_where_results_must_repeat(monkeypatch):
    monkeypatch.setattr(triton_tuning, "INTERPRETED", False)
    monkeypatch.setattr(triton_tuning, "fastest", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert triton_tuning.tuned("sum", torch.zeros(2, 3), torch.zeros(3), ["first", "second"], str) == "first"


def test_each_width_is_compiled_for_itself(monkeypatch):
    """torch compiles a function eight times, then never again; a second size in one place makes it a variable."""
    graphs = []

    def backend(graph, examples):
        graphs.append([size for tensor in examples if isinstance(tensor, torch.Tensor) for size in tensor.shape])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, compile=torch.compile: compile(function, backend=backend))
    triton_tuning._compiled.cache_clear()
    widths = range(4, 26, 2)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for width in widths:
            compiled = triton_tuning._compiled(ff.by_libraries, (width,))
            for positions in (6, 10, 12):
                leaves = detached((positions, width), 3 * width)
                torch.testing.assert_close(compiled(*leaves), plain(*leaves))
    triton_tuning._compiled.cache_clear()
    assert len(graphs) == 2 * len(widths)  # for one number of positions, then for any
    assert all(isinstance(sizes[1], int) for sizes in graphs), "the width became a variable"


def test_the_trial_runs_and_notices_a_kernel_that_does_nothing(monkeypatch):
    assert triton_tuning.try_out(torch.device(DEVICE)) is None
    monkeypatch.setattr(triton_tuning.triton_kernels, "trial_kernel", {(1,): lambda one: None})
    with pytest.raises(RuntimeError, match="did not"):
        triton_tuning.try_out(torch.device(DEVICE))


@pytest.mark.slow
def test_point_wise_parts_compile():
    """What a GPU runs compiled, compiled for this device."""
    from med3dvlm.model.fused import stem

    leaves = detached((30, 8), 16)
    expected = ff.by_libraries(*leaves)
    torch.testing.assert_close(triton_tuning._compiled(ff.by_libraries, (8,))(*leaves), expected)
    found = triton_tuning._compiled(ff.gradients, (8,))(expected, *leaves[1:])
    torch.testing.assert_close(found, ff.gradients(expected, *leaves[1:]))
    volume = torch.rand(2, 1, 9, 10, 11, device=DEVICE)
    columns = triton_tuning._compiled(stem.columns, ())
    torch.testing.assert_close(columns(volume, torch.float32), stem.columns(volume, torch.float32))
