"""A training run of GPT-2's size beside nanoGPT's own train.py, on the same tokens.

`python -m ponder.benchmarks.train_124m [--nanogpt CHECKOUT] [--text PATH] [--steps N]`, on a GPU:
tokens/s, MFU, memory and losses of `ponder train gpt2` and of nanoGPT, each a process of its own,
in bf16 with 32 x 1024 tokens a step. With AdamW ours has nanoGPT's rates, schedule and weight
decay; with Muon its preset's. Without torch.compile ours runs for its speed alone, 50 steps.

The text, by default 15.7 million characters of PyTorch's own source, is a token a character, and
the vocabulary filled up to GPT-2's size, so that a step costs what GPT-2's does. Both sides draw
random windows of it; their validation loss is that of its last tenth, each token once.

Times are of ten steps, without those that compile; MFU is of the data sheet's bf16 FLOP/s, FLOPs
counted as in training. Rows come as each run ends; with --resume those that --out has are left out.
The losses (train_124m_curves.csv) are means of ten steps, by steps and by seconds of training.
"""

import argparse
import json
import os
import re
import runpy
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ponder.benchmarks.comparison import matmul_ceiling
from ponder.benchmarks.figures import COMPILED, CURVES
from ponder.benchmarks.measure import (
    DEVICE,
    RESULTS,
    Row,
    left_out,
    machine,
    merge,
    read,
    row,
    write,
)
from ponder.training import TrainConfig, preset
from ponder.training.batch import IGNORE
from ponder.training.data import load_data
from ponder.training.hardware import peak_flops
from ponder.training.journal import read_rows
from ponder.training.loop import model_config, train
from ponder.training.text import Windows
from ponder.training.tokenizer import character_tokenizer

VOCABULARY = 50304  # GPT-2's, rounded up by nanoGPT
# Of the default text. A tenth fills 192 batches of validation: no rest that is compiled for.
CHARACTERS = 15 << 20
BLOCK = 10  # steps, whose times and losses are one number
SHORT = 50  # steps of a run for its speed alone
NANOGPT = "nanoGPT"
ADAMW: dict[str, Any] = dict(
    optimizer="adamw", lr=6e-4, weight_decay=0.1, schedule="cosine", floor=0.1
)
OURS: dict[str, dict[str, Any]] = {"ponder": ADAMW, "ponder Muon": {}}
TINY: dict[str, Any] = dict(context=64, n_layer=2, n_head=2, n_kv_head=2, head_dim=16, n_embd=32)
TINY |= dict(n_inner=128, batch_size=4, compile=False, precision="fp32")


@dataclass(frozen=True)
class Run:
    """What a run of either side gave, block by block, and over the validation split."""

    ms: list[float]  # of a step
    losses: list[float]
    val_loss: float
    peak_mib: float | str  # empty on a CPU


def sources(smoke: bool) -> str:
    """PyTorch's own source: a text that is wherever this runs, and is large enough."""
    characters = 100_000 if smoke else CHARACTERS
    text = ""
    for path in sorted(Path(torch.__file__).parent.rglob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= characters:
            break
    return text[:characters]


def recipe(text: str, folder: Path, steps: int, smoke: bool) -> TrainConfig:
    """The gpt2 preset on this text, its characters the tokens; `folder` gets the files of it."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    said = json.loads(character_tokenizer(text).to_str())
    vocabulary = said["model"]["vocab"]
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps(said), encoding="utf-8")
    config = preset(
        "gpt2",
        data=f"text:{folder / 'text.txt'}",
        tokenizer=str(folder / "tokenizer.json"),
        steps=steps,
        warmup=steps // 10,
        batch_size=32,
        accumulation=1,
        log_every=BLOCK,
        eval_every=0,
        save_every=0,
        samples=0,
    )
    return replace(config, **TINY) if smoke else config


def write_tokens(config: TrainConfig, folder: Path) -> None:
    """The tokens that `ponder train` sees, as nanoGPT reads them: train.bin and val.bin."""
    [windows] = load_data(config).sources
    assert isinstance(windows, Windows)
    for name, tokens in (("train", windows.train), ("val", windows.held_out)):
        tokens.astype(np.uint16).tofile(folder / f"{name}.bin")


def peak_mib() -> float | str:
    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if DEVICE == "cuda" else ""


def ours(config: TrainConfig) -> Run:
    """A run of `ponder train`."""
    train(config)
    rows = read_rows(config.out / "train" / "metrics.jsonl")
    tokens = config.batch_size * config.context
    return Run(
        [1e3 * tokens / r["tokens_per_second"] for r in rows],
        [r["train_loss"] for r in rows],
        rows[-1]["val_loss"],
        peak_mib(),
    )


def nanogpt(checkout: Path, folder: Path, config: TrainConfig) -> Run:
    """A run of nanoGPT's train.py as it is, then the loss over all of val.bin."""
    c = config
    words = dict(dataset=folder, out_dir=folder / "nanogpt", device=DEVICE, compile=c.compile)
    words |= dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.context)
    words |= dict(batch_size=c.batch_size, gradient_accumulation_steps=1, max_iters=c.steps - 1)
    words |= dict(learning_rate=c.lr, min_lr=c.floor * c.lr, weight_decay=c.weight_decay)
    words |= dict(warmup_iters=c.warmup, lr_decay_iters=c.steps, grad_clip=c.clip)
    words |= dict(dtype="bfloat16" if DEVICE == "cuda" else "float32")
    words |= dict(eval_interval=c.steps + 1, eval_iters=1)  # one before the first step
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in words.items())]
    sys.path.insert(0, str(checkout))
    sys.dont_write_bytecode = True
    os.chdir(checkout)
    log = folder / "nanogpt.log"
    with open(log, "w") as file, redirect_stdout(file):
        left = runpy.run_path("train.py", run_name="__main__")
    peak = peak_mib()
    model = left["unoptimized_model" if c.compile else "model"].eval()
    files = (np.fromfile(folder / f"{name}.bin", dtype=np.uint16) for name in ("train", "val"))
    windows = Windows(c, NANOGPT, *files, fingerprint="")
    total = count = 0.0
    with torch.no_grad(), left["ctx"]:
        for batch in windows.validation():
            x, y = batch.tokens.to(DEVICE), batch.targets.to(DEVICE)
            number = (y != IGNORE).sum().item()
            total += model(x, y.masked_fill(y == IGNORE, -1))[1].item() * number
            count += number
    return Run(*printed(log.read_text()), total / count, peak)


def printed(log: str) -> tuple[list[float], list[float]]:
    """(ms of a step, loss) of each block, from what train.py prints."""
    found = re.findall(r"^iter \d+: loss (\S+), time (\S+)ms", log, re.MULTILINE)
    losses, ms = np.array(found, dtype=float).reshape(-1, 2)[: len(found) // BLOCK * BLOCK].T
    return ms.reshape(-1, BLOCK).mean(1).tolist(), losses.reshape(-1, BLOCK).mean(1).tolist()


def alone(work: Callable[..., Run], *arguments) -> Run:
    """In a process of its own: memory, compiled code and what train.py sets are its alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def runs(config: TrainConfig, checkout: Path | None, folder: Path) -> dict[str, tuple]:
    """{name: (function, arguments)} of each run; what is to be compared first comes first."""
    compiled, found = COMPILED * config.compile, {}
    if checkout:
        peer = replace(config, **ADAMW)
        found[NANOGPT + compiled] = nanogpt, checkout.resolve(), folder, peer
    for name, own in OURS.items():
        found[name + compiled] = ours, replace(config, out=folder / name, **own)
    if config.compile:
        for name, own in OURS.items():
            steps = min(SHORT, config.steps)
            short = replace(config, out=folder / f"{name} short", compile=False, steps=steps, **own)
            found[name] = ours, short
    return found


def keep_curve(name: str, gpu: str, run: Run, path: Path) -> None:
    """The losses of a run into the file of curves, in place of this machine's older ones."""
    # The first block compiles; it is counted as a usual one.
    seconds = np.cumsum([statistics.median(run.ms), *run.ms[1:]]) * BLOCK / 1e3
    steps = BLOCK * np.arange(1, len(seconds) + 1)
    held_out = [""] * (len(steps) - 1) + [round(run.val_loss, 4)]
    losses = np.round(run.losses, 4)
    new = [
        dict(zip(CURVES, (gpu, name, *values), strict=True))
        for values in zip(steps, seconds.round(3), losses, held_out, strict=True)
    ]
    merge(path, CURVES, new, ("gpu", "implementation"))


def result(name: str, run: Run, config: TrainConfig, case: str) -> Row:
    """The row of a run, whose figures are printed too."""
    tokens = config.batch_size * config.context
    flops = 3 * model_config(config, VOCABULARY).flops_per_token(config.context) * tokens
    ms = run.ms[2:] or run.ms  # the first block compiles
    rate = flops / statistics.median(ms) * 1e3
    mfu = rate / peak_flops(torch.device(DEVICE), torch.bfloat16)
    print(
        f"{name}: {rate / flops * tokens:,.0f} tokens/s, MFU {mfu:.1%}, {run.peak_mib or '?'} MiB; "
        f"step {len(run.losses) * BLOCK}: loss {run.losses[-1]:.4f}, validation {run.val_loss:.4f}",
        flush=True,
    )
    return row(
        "train_124m",
        case,
        "bf16" if DEVICE == "cuda" else "fp32",
        name,
        ms,
        tflops=round(rate / 1e12, 4),
        roofline=round(rate / matmul_ceiling(), 4),
        peak_mib=run.peak_mib,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nanogpt", type=Path, help="a checkout of it; default: PONDER_NANOGPT")
    parser.add_argument("--text", type=Path, help="to train on; default: PyTorch's source")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV files")
    parser.add_argument("--resume", action="store_true", help="leave out runs that --out has")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.smoke:
        print("train_124m: no GPU here, so there is nothing to compare")
        return 0
    checkout = args.nanogpt or Path(os.environ.get("PONDER_NANOGPT", "nanoGPT"))
    if not (checkout / "train.py").is_file():
        print(f"there is no {checkout / 'train.py'}: nanoGPT is left out", flush=True)
        checkout = None
    text = args.text.read_text(encoding="utf-8") if args.text else sources(args.smoke)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["PONDER_CACHE"] = str(folder / "cache")
        config = recipe(text, folder, 2 * BLOCK if args.smoke else args.steps, args.smoke)
        write_tokens(config, folder)
        case = f"{config.n_layer} layers of {config.n_embd}, "
        case += f"{config.batch_size}x{config.context} tokens a step"
        table = args.out / "train_124m.csv"
        there = read(table) or [] if args.resume and table.exists() else []
        measured = [r for r in there if (r.case, r.gpu) == (case, machine()["gpu"])]
        done = {r.implementation for r in measured}
        for name, (work, *arguments) in runs(config, checkout, folder).items():
            if name in done:
                continue
            try:
                run = alone(work, *arguments)
            except Exception as error:  # of one side, which must not end the others
                traceback.print_exception(error)
                left_out(name, f"{name} fails: {type(error).__name__}")
                failed = True
                continue
            measured.append(result(name, run, config, case))
            write(measured, args.out)
            if arguments[-1].steps == config.steps:
                keep_curve(name, measured[-1].gpu, run, args.out / "train_124m_curves.csv")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
