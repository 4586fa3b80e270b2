"""Fused operations with hand-written Triton kernels; on CPU tensors, PyTorch's best operations."""

from .norm import rms_norm

__all__ = ["rms_norm"]
