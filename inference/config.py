"""What a sweep and a generation are; no torch here, so that `ponder sweep --help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class SweepConfig:
    """Sample a model on a task at several budgets and temperatures, and evaluate what it bought."""

    model: str
    """a folder that `ponder train` left, or any Llama or Qwen3 checkpoint with <think> tokens"""
    task: str = "last_digit"
    out: Path = Path("runs/sweep")
    """the folder that gets sweep/, report/ and run.json"""
    samples: tuple[int, ...] = (1, 4, 16)
    """sizes of the votes; the largest is drawn, the smaller ones are subsets of it"""
    budgets: tuple[int, ...] = (0, 2, 4, 6, 8)
    """most thinking tokens before </think> is forced; unlimited thinking is always measured too"""
    problems: int = 500
    """held-out problems"""
    temperature: float = 1.0
    top_k: int = 0
    """0: off"""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    slots: int = 512
    """samples decoded at once"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, and on a CPU where decoding is measured to be faster in it; run.json
    says which it was"""
    resume: bool = False
    """go on with the samples that `out` holds"""

    def check(self) -> None:
        """Raise one ValueError that names every field that cannot be."""
        faults = []
        if not self.samples or min(self.samples) < 1:
            faults.append(f"samples is {list(self.samples)}; each must be at least 1")
        if min(self.budgets, default=0) < 0:
            faults.append(f"budgets is {list(self.budgets)}; each must be at least 0")
        for name in ("problems", "slots"):
            if getattr(self, name) < 1:
                faults.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperature > 0:
            faults.append(
                f"temperature is {self.temperature}; votes need one above 0 "
                "(greedy answers are always measured)"
            )
        faults += filter_faults(self)
        if faults:
            raise ValueError("; ".join(faults))


def filter_faults(config: "SweepConfig | GenerateConfig") -> list[str]:
    """What is wrong with top_k, top_p and min_p."""
    faults = []
    if config.top_k < 0:
        faults.append(f"top_k is {config.top_k}; it must be at least 0")
    if not 0 < config.top_p <= 1:
        faults.append(f"top_p is {config.top_p}; it must be above 0 and at most 1")
    if not 0 <= config.min_p <= 1:
        faults.append(f"min_p is {config.min_p}; it must be from 0 to 1")
    return faults


@dataclass(frozen=True)
class GenerateConfig:
    """Let a model answer one prompt, its thinking dimmed."""

    prompt: Annotated[str, tyro.conf.Positional]
    model: str
    """a folder that `ponder train` left, or any Llama or Qwen3 checkpoint"""
    samples: int = 1
    budget: int | None = None
    """most thinking tokens before </think> is forced"""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = None
    """most new tokens; None: what the context leaves"""
    seed: int = 0

    def check(self) -> None:
        """Raise one ValueError that names every field that cannot be."""
        faults = []
        if self.samples < 1:
            faults.append(f"samples is {self.samples}; it must be at least 1")
        if self.budget is not None and self.budget < 0:
            faults.append(f"budget is {self.budget}; it must be at least 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            faults.append(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not self.temperature >= 0:
            faults.append(f"temperature is {self.temperature}; it must be at least 0")
        faults += filter_faults(self)
        if faults:
            raise ValueError("; ".join(faults))
