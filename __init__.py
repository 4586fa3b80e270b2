"""ponder: small GPT-style models on fused Triton kernels, and what thinking longer buys them."""

__version__ = "0.1.0"
