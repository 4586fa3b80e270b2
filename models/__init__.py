"""Models built on `ponder.kernels`, and Hugging Face checkpoint folders in and out."""

from .gpt import GPT, GPTConfig, KVCache, Prefix
from .hub import load, load_config, load_tokenizer, save

__all__ = ["GPT", "GPTConfig", "KVCache", "Prefix", "load", "load_config", "load_tokenizer", "save"]
