"""Triton kernels for sums of three one-dimensional convolutions, along H, W and D, and for what training needs of them.

A program takes a tile of BD x BH x BW = P positions of one sample, and BC output channels. It convolves along one axis
after the other, so that only one or two [P, BC] sums live at a time and no branch's output reaches memory. Neighbours
of the tile come through the cache; kernels along single axes need no corners.

Layouts, all contiguous: volumes [B, D, H, W, C]; axes 0 (h), 1 (w), 2 (d); taps depth-wise [3, K, C] in ACC, dense
[3, K, CI, CO] in the volume's dtype. Addresses within a sample have 32 bits (`triton_sums` checks its size), those of
samples, and of partial sums, 64. D, H and W may be constants for the compiler (Triton makes one of every argument 1).

Fixed at compile time: BI (0 depth-wise; dense: CI rounded up to a power of two), BD, BH, BW, BC, K, ACC (dtype of sums)
and DOT (dtype of the factors in dense layers).
"""

import triton
import triton.language as tl


@triton.jit
def trial_kernel(x):
    """x [1] = 1."""
    tl.store(x, 1)


@triton.jit
def places_of(tile, D, H, W, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Tile number -> sample; d, h, w, place in the sample and whether it lies in the grid, of P positions each."""
    tiles_d, tiles_h, tiles_w = tl.cdiv(D, BD), tl.cdiv(H, BH), tl.cdiv(W, BW)
    p = tl.arange(0, BD * BH * BW)
    w = tile % tiles_w * BW + p % BW
    h = tile // tiles_w % tiles_h * BH + p // BW % BH
    d = tile // (tiles_w * tiles_h) % tiles_d * BD + p // (BW * BH)
    sample = (tile // (tiles_w * tiles_h * tiles_d)).to(tl.int64)
    return sample, d, h, w, (d * H + h) * W + w, (d < D) & (h < H) & (w < W)


@triton.jit
def along(axis, d, h, w, D, H, W):
    """The coordinate along an axis [P], its size, and how many positions lie between neighbours in memory."""
    at = tl.where(axis == 0, h, tl.where(axis == 1, w, d))
    size = tl.where(axis == 0, H, tl.where(axis == 1, W, D))
    distance = tl.where(axis == 0, W, tl.where(axis == 1, 1, H * W))
    return at, size, distance


@triton.jit
def load_rows(x, place, inside, channels, C):
    """x [.., C] at places [P] and channels [BC] -> [P, BC]; 0 where not inside, and beyond C."""
    mask = inside[:, None] & (channels < C)[None, :]
    return tl.load(x + place[:, None] * C + channels[None, :], mask=mask, other=0.0)


@triton.jit
def load_row(x, channels, C):
    """x [C] at channels [BC] -> [1, BC]; 0 beyond C."""
    return tl.load(x + channels, mask=channels < C, other=0.0)[None, :]


@triton.jit
def branch(
    x, taps, d, h, w, place, inside, channels, D, H, W, CI, CO, axis, CENTRE: tl.constexpr, BI: tl.constexpr,
    K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """x [D * H * W, CI] convolved along one axis -> [P, BC], 0 beyond the grid. CENTRE: with its centre tap."""
    at, size, distance = along(axis, d, h, w, D, H, W)
    z = tl.zeros([place.shape[0], channels.shape[0]], ACC)
    if BI:
        rows = tl.arange(0, BI)
        for number in range(K - 1 + CENTRE):  # not unrolled: float32 factors of all taps at once do not fit registers
            tap = tl.where(number >= K // 2, number + 1 - CENTRE, number)
            step = tap - K // 2
            seen = inside & (at + step >= 0) & (at + step < size)
            values = load_rows(x, place + step * distance, seen, rows, CI)  # [P, BI]
            kernel = load_rows(taps + (axis * K + tap) * CI * CO, rows, rows < CI, channels, CO)  # [BI, BC]
            z = tl.dot(values.to(DOT), kernel.to(DOT), z, input_precision="tf32x3", out_dtype=ACC)
    else:
        for tap in tl.static_range(K):
            if CENTRE or tap != K // 2:
                step = tap - K // 2
                seen = inside & (at + step >= 0) & (at + step < size)
                values = load_rows(x, place + step * distance, seen, channels, CO)  # [P, BC]
                z += values.to(ACC) * load_row(taps + (axis * K + tap) * CO, channels, CO)
    return z


@triton.jit
def sum_kernel(
    x_h, x_w, x_d, taps, bias, y, D, H, W, CI, CO, CENTRES: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y = bias + convolutions of x_h, x_w and x_d. CENTRES: all with centre taps, otherwise only the one along w."""
    sample, d, h, w, place, inside = places_of(tl.program_id(0), D, H, W, BD, BH, BW)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    first = sample * D * H * W
    x_h, x_w, x_d = x_h + first * CI, x_w + first * CI, x_d + first * CI
    total = branch(x_w, taps, d, h, w, place, inside, channels, D, H, W, CI, CO, 1, True, BI, K, ACC, DOT)
    total += branch(x_h, taps, d, h, w, place, inside, channels, D, H, W, CI, CO, 0, CENTRES, BI, K, ACC, DOT)
    total += branch(x_d, taps, d, h, w, place, inside, channels, D, H, W, CI, CO, 2, CENTRES, BI, K, ACC, DOT)
    total += load_row(bias, channels, CO)
    mask = inside[:, None] & (channels < CO)[None, :]
    tl.store(y + first * CO + place[:, None] * CO + channels[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def statistics_kernel(
    x, taps, partial, tiles, D, H, W, CI, CO, BI: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    BC: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """partial [parts, 3, 3, CO]: count, mean, and sum of squares about that mean, of every branch in every part."""
    axis, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    count, mean, squares = tl.zeros([BC], ACC), tl.zeros([BC], ACC), tl.zeros([BC], ACC)
    for tile in range(part, tiles, parts):
        sample, d, h, w, place, inside = places_of(tile, D, H, W, BD, BH, BW)
        values = x + sample * D * H * W * CI
        z = branch(values, taps, d, h, w, place, inside, channels, D, H, W, CI, CO, axis, True, BI, K, ACC, DOT)
        here = tl.sum(inside.to(ACC), 0)
        mean_here = tl.sum(z, 0) / here  # [BC]
        apart = tl.where(inside[:, None], z - mean_here[None, :], 0.0)  # [P, BC]
        both, gap = count + here, mean_here - mean
        squares += tl.sum(apart * apart, 0) + gap * gap * count * here / both
        mean += gap * here / both
        count = both
    row = partial + (part.to(tl.int64) * 3 + axis) * 3 * CO + channels
    tl.store(row, count, mask=channels < CO)
    tl.store(row + CO, mean, mask=channels < CO)
    tl.store(row + 2 * CO, squares, mask=channels < CO)


@triton.jit
def correlation_kernel(
    x, dy, taps, mean, partial, tiles, D, H, W, CI, CO, BI: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """partial [parts, 3, 2, CO]: sums over a part of dy (z - mean), z being a branch, and of dy. mean [3, CO]."""
    axis, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    middle = load_row(mean + axis * CO, channels, CO)  # [1, BC]
    products, total = tl.zeros([BC], ACC), tl.zeros([BC], ACC)
    for tile in range(part, tiles, parts):
        sample, d, h, w, place, inside = places_of(tile, D, H, W, BD, BH, BW)
        first = sample * D * H * W
        gradient = load_rows(dy + first * CO, place, inside, channels, CO).to(ACC)  # [P, BC], 0 beyond the grid
        values = x + first * CI
        z = branch(values, taps, d, h, w, place, inside, channels, D, H, W, CI, CO, axis, True, BI, K, ACC, DOT)
        products += tl.sum(gradient * (z - middle), 0)
        total += tl.sum(gradient, 0)
    row = partial + (part.to(tl.int64) * 3 + axis) * 2 * CO + channels
    tl.store(row, products, mask=channels < CO)
    tl.store(row + CO, total, mask=channels < CO)


@triton.jit
def branch_gradient_kernel(
    x, dy, taps, factors, dz, partial, B, tiles, D, H, W, CI, CO, KP: tl.constexpr, BI: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """dz [3, B, D, H, W, CO] = a dy + b z + c for the three branches z; factors [3, 3, CO] hold a, b, c of each.

    Depth-wise also partial [parts, 3, K, CO], the taps' gradients: sums over a part of dz times what a tap sees. KP is
    K rounded up to a power of two.
    """
    axis, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    row = factors + axis * 3 * CO
    a, b, c = load_row(row, channels, CO), load_row(row + CO, channels, CO), load_row(row + 2 * CO, channels, CO)
    number = tl.arange(0, KP)
    sums = tl.zeros([KP, BC], ACC)
    for tile in range(part, tiles, parts):
        sample, d, h, w, place, inside = places_of(tile, D, H, W, BD, BH, BW)
        first = sample * D * H * W
        gradient = load_rows(dy + first * CO, place, inside, channels, CO).to(ACC)  # [P, BC]
        mask = inside[:, None] & (channels < CO)[None, :]
        values = x + first * CI
        z = branch(values, taps, d, h, w, place, inside, channels, D, H, W, CI, CO, axis, True, BI, K, ACC, DOT)
        inner = tl.where(mask, a * gradient + b * z + c, 0.0)  # [P, BC]
        target = dz + (sample + axis * B) * D * H * W * CO
        tl.store(target + place[:, None] * CO + channels[None, :], inner.to(dz.dtype.element_ty), mask=mask)
        if not BI:
            at, size, distance = along(axis, d, h, w, D, H, W)
            for tap in range(K):  # not unrolled: K sums take ptxas many seconds
                step = tap - K // 2
                seen = inside & (at + step >= 0) & (at + step < size)
                product = inner * load_rows(values, place + step * distance, seen, channels, CO).to(ACC)
                sums += tl.where((number == tap)[:, None], tl.sum(product, 0)[None, :], 0.0)
    if not BI:
        rows = (part.to(tl.int64) * 3 + axis) * K + number
        mask = (number < K)[:, None] & (channels < CO)[None, :]
        tl.store(partial + rows[:, None] * CO + channels[None, :], sums, mask=mask)


@triton.jit
def dense_taps_kernel(
    x, dz, partial, B, tiles, D, H, W, CI, CO, BI: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    BC: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """partial [parts, 3, K, CI, CO]: sums over a part for the taps' gradients, from dz [3, B, D, H, W, CO]."""
    axis, tap = tl.program_id(0) // K, tl.program_id(0) % K
    part, parts = tl.program_id(2), tl.num_programs(2)
    step = tap - K // 2
    rows, channels = tl.arange(0, BI), tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BI, BC], ACC)
    for tile in range(part, tiles, parts):
        sample, d, h, w, place, inside = places_of(tile, D, H, W, BD, BH, BW)
        at, size, distance = along(axis, d, h, w, D, H, W)
        gradient = dz + (sample + axis * B) * D * H * W * CO
        inner = load_rows(gradient, place, inside, channels, CO)  # [P, BC]
        seen = inside & (at + step >= 0) & (at + step < size)
        values = load_rows(x + sample * D * H * W * CI, place + step * distance, seen, rows, CI)  # [P, BI]
        total = tl.dot(tl.trans(values.to(DOT)), inner.to(DOT), total, input_precision="tf32x3", out_dtype=ACC)
    mask = (rows < CI)[:, None] & (channels < CO)[None, :]
    target = partial + ((part.to(tl.int64) * 3 + axis) * K + tap) * CI * CO
    tl.store(target + rows[:, None] * CO + channels[None, :], total, mask=mask)


@triton.jit
def feed_forward_kernel(
    x, y, expand, expand_bias, contract, contract_bias, scale, out, P, C, R, BP: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out = x + scale (contract gelu(expand y + expand_bias) + contract_bias): x, y, out [P, C], expand [R, C],
    contract [C, R]. A program takes BP positions; of the R inner values BR at a time exist. BC is C rounded up.
    """
    place = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    channels, inside = tl.arange(0, BC), place < P
    rows = load_rows(y, place, inside, channels, C).to(DOT)  # [BP, BC]
    total = tl.zeros([BP, BC], ACC)
    for first in range(0, R, BR):
        number = first + tl.arange(0, BR)
        mask = (channels < C)[:, None] & (number < R)[None, :]
        into = tl.load(expand + number[None, :] * C + channels[:, None], mask=mask, other=0.0)  # [BC, BR]
        inner = tl.dot(rows, into.to(DOT), input_precision="tf32x3", out_dtype=ACC) + load_row(expand_bias, number, R)
        inner = 0.5 * inner * (1 + tl.erf(inner * 0.7071067811865476))  # [BP, BR]
        mask = (number < R)[:, None] & (channels < C)[None, :]
        back = tl.load(contract + channels[None, :] * R + number[:, None], mask=mask, other=0.0)  # [BR, BC]
        total = tl.dot(inner.to(DOT), back.to(DOT), total, input_precision="tf32x3", out_dtype=ACC)
    total = load_row(scale, channels, C) * (total + load_row(contract_bias, channels, C))
    total += load_rows(x, place, inside, channels, C)
    mask = inside[:, None] & (channels < C)[None, :]
    tl.store(out + place[:, None] * C + channels[None, :], total.to(out.dtype.element_ty), mask=mask)
