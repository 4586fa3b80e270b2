"""Fused operations with hand-written Triton kernels; on CPU tensors, PyTorch's best operations."""

from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .norm import rms_norm
from .rotary import rotary

__all__ = ["cross_entropy", "linear_cross_entropy", "rms_norm", "rotary"]
