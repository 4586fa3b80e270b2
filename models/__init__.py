"""Models built on `ponder.kernels`, Hugging Face checkpoints in and out, and the kernels under
Transformers' own models.

What reads and writes checkpoints is imported when it is first used, so that the modules and `patch`
need PyTorch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .cache import KVCache, Prefix
from .gpt import GPT, GPTConfig
from .patch import patch, unpatch

if TYPE_CHECKING:
    from .hub import load, load_config, load_tokenizer, register, save

__all__ = [
    "GPT",
    "GPTConfig",
    "KVCache",
    "Prefix",
    "load",
    "load_config",
    "load_tokenizer",
    "patch",
    "register",
    "save",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in (*__all__, "hub"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        hub = importlib.import_module(".hub", __name__)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"checkpoints need the package {error.name}: pip install ponder[inference]"
        ) from None
    return hub if name == "hub" else getattr(hub, name)
