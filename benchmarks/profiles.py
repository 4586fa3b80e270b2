"""Where the time goes: a training step and some decoding under PyTorch's profiler, as tables.

`python -m ponder.benchmarks.profiles`: the model of train_step.py. Nothing is kept but the output.
"""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from ponder.benchmarks.measure import DEVICE, synchronize
from ponder.benchmarks.train_step import BATCH, CONFIG, CONTEXT, stepper
from ponder.inference.engine import LocalEngine, Request, SamplingParams
from ponder.models import GPT

ROWS = 25


def table(title: str, work: Callable[[], object]) -> None:
    """The operations or kernels that took the most time of the device itself."""
    for _ in range(2):
        work()
    activities = [ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        work()
        synchronize()
    print(f"\n{title}")
    by = f"self_{DEVICE}_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60))


def main() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG).to(DEVICE)
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, CONTEXT), device=DEVICE)
    targets = torch.roll(tokens, -1, 1)
    for label, call in (("eager", model), ("torch.compile", torch.compile(model))):
        step = stepper(lambda call=call: call(tokens, targets), model.parameters(), torch.bfloat16)
        table(f"training step, {BATCH} x {CONTEXT} tokens, bf16, {label}", step)
    slots, new = (64, 8) if DEVICE == "cpu" else (1024, 64)
    engine = LocalEngine(
        model.eval().to(torch.bfloat16 if DEVICE == "cuda" else torch.float32),
        slots=slots,
        eos=CONFIG.vocab_size - 1,
    )
    params = SamplingParams(max_tokens=new)
    requests = [Request(tuple(range(1, 65)), params, seed=0, index=i) for i in range(slots)]
    table(f"{slots} samples of one prompt, {new} tokens", lambda: list(engine.generate(requests)))


if __name__ == "__main__":
    main()
