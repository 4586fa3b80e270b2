"""The demonstration: train a small reasoning model, then measure what thinking longer buys it."""

from pathlib import Path

BUDGETS = (0, 2, 4, 6, 8, 10)


def demo(out: Path) -> Path:
    """Train on `last_digit`, sweep budgets × samples, write the report; returns its page.

    What is there already is kept: a demo that was stopped goes on where it was. KeyboardInterrupt
    where the training was asked to stop: a model half trained is not worth measuring.
    """
    import torch

    from .inference.config import SweepConfig
    from .inference.sweep import sweep
    from .training import preset
    from .training.journal import read_rows
    from .training.loop import train

    config = preset("demo", out=out, resume=True)
    model = train(config, model_folder=out / "model")
    rows = read_rows(out / "train" / "metrics.jsonl")
    if not rows or rows[-1]["step"] < config.steps:  # Ctrl-C: it saved and returned
        raise KeyboardInterrupt
    return sweep(
        SweepConfig(
            model=str(model),
            task="last_digit",
            out=out,
            samples=(1, 4, 16),
            budgets=BUDGETS,
            problems=500,
            # On a CPU bf16 gains little for so small a model, and measured each time it would be
            # chosen in one run and not in another.
            precision="auto" if torch.cuda.is_available() else "fp32",
            resume=True,
        )
    )
