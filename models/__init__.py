"""Models built on `ponder.kernels`, and Hugging Face checkpoint folders in and out."""

from .gpt import GPT, GPTConfig, KVCache

__all__ = ["GPT", "GPTConfig", "KVCache"]
