"""Compiles every kernel for a GPU, which need not be there: the interpreter accepts more than the compiler does.

    python -m tests.helpers.triton_compile 80      # compute capability 8.0

Must run without TRITON_INTERPRET. Once with all sizes open, once with all that can be 1, which Triton makes constants.
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from med3dvlm.model.fused import triton_kernels as kernels

SHARED = [kernels.sum_kernel, kernels.statistics_kernel, kernels.correlation_kernel, kernels.branch_gradient_kernel]
DEPTH_WISE = {"BI": 0, "BD": 2, "BH": 4, "BW": 8, "BC": 32, "K": 7, "KP": 8}
DENSE = {"BI": 32, "BD": 2, "BH": 4, "BW": 8, "BC": 64, "K": 3, "KP": 4}  # of the stem's columns
POINT_WISE = {"BP": 64, "BC": 128, "BR": 32}
KERNELS = [
    *((kernel, DEPTH_WISE) for kernel in SHARED),
    *((kernel, DENSE) for kernel in [*SHARED, kernels.dense_taps_kernel]),
    (kernels.feed_forward_kernel, POINT_WISE),
]
DTYPES = {"*bf16": tl.bfloat16, "*fp32": tl.float32}
VOLUMES = {"x", "x_h", "x_w", "x_d", "dy", "dz", "y", "out", "expand", "expand_bias", "contract", "contract_bias"}
SUMS = {"taps", "bias", "mean", "factors", "partial", "scale"}


def compile_kernel(kernel, sizes: dict[str, int], capability: int, pointer: str, ones: tuple[str, ...]) -> None:
    """Compile for volumes of a dtype, named as Triton names pointers to it."""
    constants = sizes | dict.fromkeys(ones, 1)
    constants |= {"ACC": tl.float32, "DOT": DTYPES[pointer], "CENTRES": False}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in VOLUMES or name == "taps" and sizes["BI"]:
            return pointer
        return "*fp32" if name in SUMS else "i32"

    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    print(kernel.__name__, capability, pointer, sizes, ones, flush=True)


def main(capability: int) -> None:
    for pointer in DTYPES:
        for ones in ((), ("D", "H", "W", "B", "P", "tiles")):
            for kernel, sizes in KERNELS:
                compile_kernel(kernel, sizes, capability, pointer, ones)


if __name__ == "__main__":
    main(int(sys.argv[1]))
