"""Training: data → batches → the loop (accelerate) → checkpoints.

`TrainConfig` and the presets import no torch, so that `ponder train --help` is quick.
"""

from .config import PRESETS, TrainConfig, preset

__all__ = ["PRESETS", "TrainConfig", "preset"]
