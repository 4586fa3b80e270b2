"""Fused operations with hand-written Triton kernels; on CPU tensors, PyTorch's best operations."""

from .norm import rms_norm
from .rotary import rotary

__all__ = ["rms_norm", "rotary"]
