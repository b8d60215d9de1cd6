"""The C++ kernels compute what torch does, and the encoder runs without them where they cannot be had."""

import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from med3dvlm.model.dcformer import DCFormer
from med3dvlm.model.fused import branches, feed_forward
from med3dvlm.model.fused.axes import AXES, as_2d, images
from med3dvlm.model.fused.native import build, kernels, mlp
from tests.helpers.golden import fill_by_rule, relative_deviation, rule_volume

needs_kernels = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler (g++) to compile the kernels with"
)
SHAPES = [(2, 5, 6, 7), (1, 1, 9, 3), (3, 4, 1, 1), (1, 13, 2, 17)]  # of B, D, H, W: odd, below and above a block
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


def expected(x: torch.Tensor, kernel: torch.Tensor, axis: str) -> torch.Tensor:
    """The convolution by torch, in float64: [B, D, H, W, C] -> [B, D, H, W, C']."""
    weight = as_2d(kernel.double(), axis)
    padding, groups = (weight.shape[2] // 2, weight.shape[3] // 2), x.shape[-1] // kernel.shape[1]
    y = F.conv2d(images(x.double(), axis).movedim(-1, 1), weight, None, 1, padding, 1, groups)
    return y.movedim(1, -1).reshape(*x.shape[:-1], len(kernel))


def near(found: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return relative_deviation(found.double(), reference) <= TOLERANCE[dtype]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@needs_kernels
@pytest.mark.parametrize("axis", ["h", "w", "d"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 2, 70)])
@pytest.mark.parametrize("sizes", [(20, 32, 3, 1), (32, 16, 3, 3), (48, 1, 3, 1), (16, 1, 13, 3)], ids=str)
def test_a_convolution(dtype, sizes, shape, axis):
    channels, second, length, threads = sizes
    depthwise = second == 1
    kernel = torch.randn(channels if depthwise else second, 1 if depthwise else channels, length).to(dtype)
    x = torch.randn(*shape, channels).to(dtype)
    y, places = expected(x, kernel, axis), (0, 1, 2, 3)
    assert kernels.take(dtype, kernel, channels if depthwise else 1)
    with on_threads(threads):
        found, sums = kernels.convolve(x, kernel, axis)
    assert relative_deviation(found.double(), y) < (5e-7 if dtype == torch.float32 else 4e-3)
    if dtype == torch.bfloat16:  # rounded once: as the reference, but for near ties
        assert (found != y.to(dtype)).float().mean() <= 0.01
    assert ((sums[0] - y.sum(places)).abs() <= 3e-6 * y.abs().sum(places)).all()
    torch.testing.assert_close(sums[1], y.square().sum(places), rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize("axis", ["h", "w", "d"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 6, 25)])
@pytest.mark.parametrize("sizes", [(16, 32, 3), (48, 16, 3), (48, 1, 3), (16, 1, 7), (32, 1, 13)], ids=str)
def test_gradients_of_a_convolution(dtype, sizes, shape, axis):
    """Of the input, added to what is there, and of the kernel, from a combination that is 0 beyond the border."""
    channels, second, length = sizes
    depthwise = second == 1
    in_pairs = kernels.in_pairs(dtype) and not depthwise
    kernel = torch.randn(channels if depthwise else second, 1 if depthwise else channels, length, requires_grad=True)

    def agree(found, reference, dtype=torch.float32):  # of values that Winograd spreads, pairs round all
        return (found - reference).norm() <= 1e-2 * reference.norm() if in_pairs else near(found, reference, dtype)

    dy, z = (torch.randn(*shape, len(kernel)).to(dtype) for _ in range(2))
    x, before = (torch.randn(*shape, channels).to(dtype) for _ in range(2))
    scale, given = torch.randn(3, len(kernel)), x.double().requires_grad_()
    combination = scale[0] * dy.double() + scale[1] * z.double() + scale[2]
    of_input, of_kernel = torch.autograd.grad(expected(given, kernel, axis), (given, kernel), combination)
    back = kernels.prepare(branches.transposed(kernel.detach(), channels if depthwise else 1))
    for threads, into in ((1, None), (3, before.clone())):
        with on_threads(threads):
            d_input, d_kernel = kernels.gradients(x, dy, (z, scale), kernel.detach(), back, axis, into)
        assert agree(d_input, of_input if into is None else before.double() + of_input, dtype)
        assert agree(d_kernel, of_kernel) and (into is None or d_input is into)
    if not depthwise:
        (alone,) = torch.autograd.grad(expected(given, kernel, axis), kernel, dy.double())
        assert agree(kernels.kernel_gradient(x, dy, kernel.detach(), axis), alone)


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 70, 2)])
@pytest.mark.parametrize("length", kernels.LENGTHS)
@pytest.mark.parametrize("channels", [16, 48])
def test_the_sum_of_three_depthwise_convolutions(dtype, channels, length, shape):
    x, bias = torch.randn(*shape, channels).to(dtype), torch.randn(channels)
    three = {axis: torch.randn(channels, 1, length) for axis in AXES}
    found = kernels.depthwise_sum(x, torch.stack([kernels.prepare(kernel) for kernel in three.values()]), bias)
    reference = bias + sum(expected(x, kernel, axis) for axis, kernel in three.items())
    assert near(found, reference, dtype)
    if dtype == torch.bfloat16:  # rounded once: as the reference, but for near ties
        assert (found != reference.to(dtype)).float().mean() <= 0.01


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4, 6, 8)])
def test_max_pooling(dtype, shape):
    x = torch.randn(*shape, 20).to(dtype)
    x[:, -1, 0] = -torch.inf
    x.view(-1)[::1003], x.view(-1)[7::2001] = torch.nan, -torch.nan
    reference = F.max_pool3d(x.movedim(-1, 1), 3, stride=2, padding=1).movedim(1, -1)
    assert kernels.take_dtype(dtype) and not kernels.take_dtype(torch.float64)
    for found in (kernels.max_pool(x), kernels.max_pool_with_places(x)[0]):
        torch.testing.assert_close(found, reference, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4, 6, 8), (2, 3, 4, 1)])
def test_gradients_of_max_pooling_go_to_the_first_of_equal_values(dtype, shape):
    x = (torch.randint(3, (*shape, 20)) * torch.randn(*shape, 20).sign()).to(dtype)  # many are equal, 0 and -0 as well
    x[..., 7] = -torch.inf
    given = x.clone().requires_grad_()
    y = F.max_pool3d(given.movedim(-1, 1), 3, stride=2, padding=1).movedim(1, -1)
    dy = torch.randint(-4, 5, y.shape).to(dtype)  # sums are exact
    y.backward(dy)
    _, places = kernels.max_pool_with_places(x)
    assert torch.equal(kernels.max_pool_gradient(dy, places, x.shape), given.grad)


@needs_kernels
def test_a_nan_of_any_bits_stays_one(dtype):
    all_ones = torch.full((16,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as on GPUs
    for shift in (all_ones, -all_ones):
        x = torch.randn(1, 3, 4, 5, 16).to(dtype)
        assert kernels.normalised_sum([x, x, x], torch.ones(3, 16), shift).isnan().all()
        y = torch.empty_like(x)
        mlp.feed_forward(x, x, *[(mlp.panels(torch.eye(16), dtype), shift)] * 2, torch.ones(16), out=y)
        assert y.isnan().all()


@needs_kernels
def test_the_gradient_of_a_depthwise_kernel_keeps_its_digits_over_many_places(dtype):
    x, dy = ((1 + torch.rand(1, 32, 64, 64, 16)).to(dtype) for _ in range(2))
    kernel = torch.randn(16, 1, 3)
    one = torch.tensor([1.0, 0, 0])[:, None].expand(3, 16).contiguous()
    with on_threads(1):
        _, found = kernels.gradients(x, dy, (dy, one), kernel, kernels.prepare(kernel), "w")
    middle = (x.double() * dy.double()).sum((0, 1, 2, 3))
    torch.testing.assert_close(found[:, 0, 1].double(), middle, rtol=4e-6, atol=0)  # 1.2e-5 in one float32 sum


@needs_kernels
def test_sums_over_places_keep_their_digits(dtype):
    x = (torch.randn(1, 9, 31, 33, 16) + 50 * torch.randn(16)).to(dtype)
    kernel = torch.eye(16)[:, :, None] * torch.tensor([0.0, 1.0, 0.0])
    mean, square = kernels.convolve(x, kernel, "w")[1] / x[..., 0].numel()
    flat = x.double().flatten(0, 3)
    torch.testing.assert_close(mean, flat.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(square - mean.square(), flat.var(0, correction=0), rtol=2e-4, atol=0)
    for channels in (16, 20, 3):  # registers do not end with rows
        a, b = (x.flatten()[start : start + 999 * channels].view(999, channels) for start in (0, 7))
        found = kernels.second_moments(a, b)
        torch.testing.assert_close(found, a.double().T @ b.double(), rtol=1e-12, atol=1e-9)


SIZES = [
    (1, 16, 16),
    (7, 48, 144),
    (300, 96, 384),
    (1011, 80, 336),
    (5, 80, 336),
    (193, 32, 80),
]  # places, channels, wide


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("places, channels, wide", SIZES)
def test_the_feed_forward_part(dtype, places, channels, wide, threads):
    x, y = torch.randn(places, channels).to(dtype), torch.randn(places, channels).to(dtype)
    expand, contract = torch.randn(wide, channels).to(dtype), (torch.randn(channels, wide) / wide**0.5).to(dtype)
    biases, scale = (torch.randn(wide), torch.randn(channels)), torch.randn(channels)
    out, inner = torch.empty_like(x), torch.empty(places, wide, dtype=dtype)
    packed = (mlp.panels(expand, dtype), biases[0]), (mlp.panels(contract, dtype), biases[1])
    with on_threads(threads):
        mlp.feed_forward(x, y, *packed, scale, out, inner)

    before = F.linear(y.double(), expand.double(), biases[0].double())
    active = F.gelu(before)
    reference = x + scale * F.linear(active, contract.double(), biases[1].double())
    if dtype == torch.float32:
        assert near(inner, before) and near(out, reference)
    else:  # off by rounding only
        assert ((inner - before).abs() <= 2**-8 * before.abs() + 1e-5).all()
        of_active = 2**-8 * F.linear(active.abs(), contract.double().abs()) * scale.abs()  # the most that rounding does
        assert ((out - reference).abs() <= of_active + 2**-8 * reference.abs() + 1e-4).all()
    again, wider = x.clone(), torch.empty(places, channels)
    with on_threads(threads):
        mlp.feed_forward(again, y, *packed, scale, again)
        mlp.feed_forward(x.float(), y, *packed, scale, wider)  # the residual connection in float32
    assert torch.equal(again, out) and torch.equal(wider.to(dtype), out)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("places, channels, wide", SIZES)
def test_the_gradients_of_the_feed_forward_part(dtype, places, channels, wide, threads):
    y, before = torch.randn(places, channels).to(dtype), torch.randn(places, wide).to(dtype)
    expand, contract = torch.randn(wide, channels) / channels**0.5, torch.randn(channels, wide) / wide**0.5
    scale, dy = torch.randn(channels), torch.randn(places, channels)
    inner, weight, factor = (tensor.double().requires_grad_() for tensor in (before, contract, scale))
    reference = factor * F.linear(F.gelu(inner), weight)
    d_inner, *gradients = torch.autograd.grad(reference, (inner, weight, factor), dy.double())
    gradients = [d_inner @ expand.double(), d_inner.T @ y.double(), d_inner.sum(0), *gradients]
    with on_threads(threads):
        found = mlp.feed_forward_gradients(dy, y, before, expand, contract, scale)
    in_pairs = dtype == torch.bfloat16 and kernels.build.library().bfloat16_products() == 1
    distance = 1e-2 if in_pairs else 1e-6  # factors are rounded by up to 2^-8
    assert all(relative_l2(*pair) <= distance for pair in zip(found, gradients, strict=True))
    assert in_pairs or all(map(near, found, gradients))


def relative_l2(found: torch.Tensor, reference: torch.Tensor) -> float:
    return ((found.double() - reference).norm() / reference.norm()).item()


@needs_kernels
@pytest.mark.parametrize("places, channels, wide", [(301, 48, 144), (37, 80, 336)])
def test_training_of_the_feed_forward_part_is_as_exact_as_by_torch(monkeypatch, dtype, places, channels, wide):
    x, y, dy = torch.randn(places, channels), torch.randn(places, channels).to(dtype), torch.randn(places, channels)
    layers = [torch.randn(wide, channels) / channels**0.5, torch.randn(wide), torch.randn(channels, wide) / wide**0.5]
    layers, scale = [*layers, torch.randn(channels)], torch.rand(channels)
    leaves = [tensor.double().requires_grad_() for tensor in (y, scale, *layers)]
    inner = F.linear(leaves[0], *leaves[2:4])
    reference = x + leaves[1] * F.linear(F.gelu(inner), *leaves[4:])
    gradients = torch.autograd.grad(reference, leaves, dy.double())
    distances = {}
    for value in ("", "torch"):
        monkeypatch.setenv("MED3DVLM_FUSED", value)
        out, kept = feed_forward.forward(x, y, scale, layers)
        d_y, d_scale, d_layers = feed_forward.backward(dy, y, kept, scale, layers)
        assert (out.dtype, kept.dtype, d_y.dtype) == (torch.float32, dtype, dtype)
        found = (out, kept, d_y, d_scale, *d_layers)
        distances[value] = [relative_l2(*pair) for pair in zip(found, (reference, inner, *gradients), strict=True)]
    limits = [1.1 * distance + 1e-6 for distance in distances["torch"]]
    assert all(ours <= limit for ours, limit in zip(distances[""], limits, strict=True)), distances


@needs_kernels
def test_a_linear_layer_and_its_gradients_keep_the_dtype(dtype):
    x, weight, dy = torch.randn(2, 3, 4, 5, 20).to(dtype), torch.randn(24, 20), torch.randn(2, 3, 4, 5, 24).to(dtype)
    exact_x, exact_weight = x.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    reference = F.linear(exact_x, exact_weight)
    gradients = torch.autograd.grad(reference, (exact_x, exact_weight), dy.double())
    layer = feed_forward.pointwise(weight, None, dtype)
    found = [feed_forward.linear(x, weight.to(dtype)), layer(x.flatten(1, 2)).view(dy.shape)]
    found += feed_forward.linear_gradients(dy, x, weight.to(dtype))
    assert all(tensor.dtype == dtype for tensor in found)
    assert all(near(*pair, dtype) for pair in zip(found, (reference, reference, *gradients), strict=True))


@contextmanager
def on_threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_gelu_is_exact_up_to_rounding_everywhere():
    x = torch.linspace(-30, 30, 16 * 2048).view(-1, 16)
    identity, zeros = mlp.panels(torch.eye(16), torch.float32), torch.zeros(16)
    found = torch.empty_like(x)
    mlp.feed_forward(torch.zeros_like(x), x, (identity, zeros), (identity, zeros), torch.ones(16), found)
    assert ((found - F.gelu(x.double())).abs() <= 5e-7 + 1e-7 * x.abs()).all()


@needs_kernels
def test_the_kernels_are_taken_and_can_be_declined(monkeypatch):
    volume, found = rule_volume("fused", (2, 1, 32, 64, 64)), {}
    for value in ("", "torch"):
        monkeypatch.setenv("MED3DVLM_FUSED", value)
        encoder = fill_by_rule(DCFormer.from_variant("phantom"), "fused").train()
        layer = encoder.encoder["s0"][0][2]
        kind = branches.NativeBranches if value == "" else branches.Branches
        assert type(branches.branches_of(1, tuple(branches.parameters_of(layer, torch.float32)))) is kind
        encoder(volume)[-1].sum().backward()
        with torch.no_grad():
            found[value] = [*encoder.eval()(volume), layer.c3[0].weight.grad]
    for native, by_torch in zip(found[""], found["torch"], strict=True):
        assert not torch.equal(native, by_torch), "both are the same path"
        assert relative_deviation(native, by_torch) <= 1e-4


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program that stands for the compiler: a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "script, reason",
    [
        (None, r"no C\+\+ compiler \(/no/such/compiler\) on PATH"),
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", r"compiler failed \(1\): x.cpp:1: error: no such thing"),
        ("kill -9 $$", r"compiler failed \(-9\): no message"),
        ('while [ "$1" != -o ]; do shift; done; echo nonsense >"$2"', "nonsense|too short|invalid ELF|slice"),
    ],
)
def test_without_a_working_compiler_one_line_is_logged_and_torch_computes(fresh, monkeypatch, caplog, script, reason):
    monkeypatch.setenv("CXX", "/no/such/compiler" if script is None else compiler(fresh, script))
    encoder, volume = fill_by_rule(DCFormer.from_variant("phantom"), "fused"), rule_volume("fused", (1, 1, 16, 32, 32))
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="med3dvlm"):
        found, again = encoder.eval()(volume), encoder(volume)
        assert encoder.fused_cache
        encoder.fused = "off"
        for state, other, expected_state in zip(found, again, encoder(volume), strict=True):
            assert torch.equal(state, other) and relative_deviation(state, expected_state) <= 5e-6
    assert len(caplog.records) == 1 and "DCFormer runs without compiled kernels" in caplog.text
    assert caplog.records[0].getMessage().count("\n") == 0
    assert re.search(reason, caplog.text)


def test_an_unwritable_cache_folder_is_no_error(fresh, monkeypatch, caplog):
    (fresh / "med3dvlm").write_text("a file in the folder's place")
    monkeypatch.setenv("CXX", compiler(fresh, "exit 0"))
    assert build.library() is None
    assert len(caplog.records) == 1 and str(fresh) in caplog.text


def test_a_user_without_a_home_folder_is_no_error(fresh, monkeypatch, caplog):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    assert build.library() is None
    assert len(caplog.records) == 1 and "no home folder" in caplog.text


def test_the_compiler_may_come_with_options(fresh, monkeypatch):
    script = 'echo "$1" "$2" >"$(dirname "$0")/options"; while [ "$1" != -o ]; do shift; done; echo library >"$2"'
    monkeypatch.setenv("CXX", f"{compiler(fresh, script)} -fuse-ld=gold -pipe")
    assert build.built().read_text() == "library\n"
    assert (fresh / "options").read_text() == "-fuse-ld=gold -pipe\n"


@pytest.mark.parametrize("wish", ["g++ 'x", "   "])
def test_a_compiler_that_is_none_is_no_error(fresh, monkeypatch, caplog, wish):
    monkeypatch.setenv("CXX", wish)
    assert build.library() is None and len(caplog.records) == 1


def test_workers_of_a_data_loader_do_not_compile(fresh, monkeypatch):
    monkeypatch.setenv("CXX", compiler(fresh, "exit 0"))
    monkeypatch.setattr(build, "get_worker_info", lambda: object())
    with pytest.raises(build.CannotBuild, match="workers of a data loader do not compile them"):
        build.built()


def test_those_who_start_together_compile_once(fresh, monkeypatch):
    log = fresh / "calls"
    script = f'echo called >>{log}; sleep 0.5; while [ "$1" != -o ]; do shift; done; echo library >"$2"'
    monkeypatch.setenv("CXX", compiler(fresh, script))
    with ThreadPoolExecutor(3) as threads:  # the lock belongs to the open file: threads are kept apart as processes are
        paths = {future.result() for future in [threads.submit(build.built) for _ in range(3)]}
    assert len(paths) == 1 and paths.pop().read_text() == "library\n"
    assert log.read_text() == "called\n"


@pytest.mark.parametrize("damage", [b"", b"libr", b"other"])
def test_a_damaged_library_is_compiled_again(fresh, monkeypatch, damage):
    """Half of one, loaded, would end the process."""
    monkeypatch.setenv("CXX", compiler(fresh, 'while [ "$1" != -o ]; do shift; done; echo library >"$2"'))
    path = build.built()
    path.write_bytes(damage)
    assert build.built() == path and path.read_text() == "library\n"


def test_the_file_is_another_for_other_sources(monkeypatch, tmp_path):
    before = build.fingerprint()
    for source in build.FOLDER.glob("*.[ch]*"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.fingerprint() == before
    (tmp_path / "norms.cpp").write_text("// changed")
    assert build.fingerprint() != before
