"""Fused operations with hand-written Triton kernels; on CPU tensors, PyTorch's best, or C."""

from ._activations import ACTIVATIONS as ACTIVATIONS  # by name, for models
from ._runtime import use_triton as use_triton  # likewise: what pays with a kernel alone
from .attention import attention
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention
from .linear_cross_entropy import linear_cross_entropy
from .mlp import gated_mlp, mlp
from .mse_loss import mse_loss
from .norm import layer_norm, rms_norm
from .rotary import rotary
from .sample_tokens import sample_tokens
from .softmax import softmax

__all__ = [
    "attention",
    "cross_entropy",
    "decode_attention",
    "gated_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "mlp",
    "mse_loss",
    "rms_norm",
    "rotary",
    "sample_tokens",
    "softmax",
]
