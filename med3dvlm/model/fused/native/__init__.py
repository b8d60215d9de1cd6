"""Kernels in C++ for the encoder on CPUs: `build` compiles and loads them, `kernels` calls them on tensors.

They are plain loops that the compiler vectorises for the processor at hand. Where there is no compiler, and for dtypes
and widths that they do not take, `med3dvlm.model.fused` computes the same in torch.
"""
