"""Attention kernels behind two signatures, chosen by name in one place."""

from models.kernels.kernel_set import (
    KernelSet,
    LinearAttention,
    SoftmaxAttention,
    default_kernels,
    kernel_set,
)

__all__ = ["KernelSet", "LinearAttention", "SoftmaxAttention", "default_kernels", "kernel_set"]
