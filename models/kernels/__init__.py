"""Attention kernels behind two signatures, chosen by name in one place."""

from models.kernels.kernel_set import (
    KernelSet,
    LinearAttention,
    SoftmaxAttention,
    default_kernels,
    kernel_set,
)
from models.kernels.sinks import SinkKeys, sink_attention

__all__ = [
    "KernelSet",
    "LinearAttention",
    "SinkKeys",
    "SoftmaxAttention",
    "default_kernels",
    "kernel_set",
    "sink_attention",
]
