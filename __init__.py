"""ponder: small GPT-style models on fused Triton kernels, and what thinking longer buys them."""

import sys
from pathlib import Path

__version__ = "0.1.0"

# `python -m` and test runners put the current folder on the path. In the repository's root our
# kernels/ would then pass for the package of that name that Transformers imports, and be loaded a
# second time under it.
_ROOT = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _ROOT]
