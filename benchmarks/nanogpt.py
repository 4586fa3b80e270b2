"""Time to a validation loss on tinyshakespeare, beside nanoGPT's own train.py.

`python -m ponder.benchmarks.nanogpt --text tinyshakespeare.txt --peer PATH` with PATH a checkout of
nanoGPT. The peer runs its published CPU recipe (4 layers, 128 wide, batch 12 × 64, 2000 steps); its
validation loss is then taken over the whole split, each token once, as ours is. Times are training
time: neither side's start, evaluation or saving is counted. (Compiling happens in the first step,
so ours holds it.) With `--steps`, tokens/s of both at that recipe instead, ours with its AdamW and
with Muon, each with and without torch.compile: some short runs of each, in turn.
"""

import argparse
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from ponder.benchmarks.measure import Row, row, write
from ponder.training import preset
from ponder.training.checkpoint import Checkpoints
from ponder.training.journal import read_rows
from ponder.training.loop import train

RUNS: dict[str, dict] = {
    "shakespeare": {"eval_every": 80, "log_every": 80},
    "shakespeare_long": {},
}


TURNS = 5  # of each: a virtual machine's cores may come to share a cache, or cease to
RECIPE = dict(context=64, batch_size=12, n_layer=4, n_head=4, n_embd=128)  # nanoGPT's, on a CPU


def peer_copy(checkout: Path, text: str, folder: Path) -> Path:
    """A copy of nanoGPT with the text as its data."""
    copy = folder / "nanogpt"
    subprocess.run(["git", "clone", "-q", checkout, copy], check=True)
    data = copy / "data" / "shakespeare_char"
    data.mkdir(parents=True, exist_ok=True)
    letters = sorted(set(text))
    code = {c: i for i, c in enumerate(letters)}
    ids = np.array([code[c] for c in text], dtype=np.uint16)
    cut = int(0.9 * len(text))
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    meta = {"vocab_size": len(letters), "stoi": code, "itos": dict(enumerate(letters))}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    return copy


def peer_times(copy: Path, steps: int = 2000) -> list[float]:
    """Milliseconds of every step of nanoGPT's CPU recipe."""
    words = (
        "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 "
        f"--eval_interval={steps} --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
        f"--n_head=4 --n_embd=128 --max_iters={steps} --lr_decay_iters={steps} --dropout=0.0 "
        f"--warmup_iters={min(100, steps // 10)}"  # its 100, which 100 steps do not take
    )
    run = subprocess.run([sys.executable, *words.split()], cwd=copy, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return [float(t) for t in re.findall(r"time ([\d.]+)ms", run.stdout)]


def peer_loss(copy: Path) -> float:
    """The loss of what nanoGPT saved over its whole validation split, each token once."""
    sys.path.insert(0, str(copy))
    from model import GPT, GPTConfig  # type: ignore

    saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    file = copy / "data" / "shakespeare_char" / "val.bin"
    held_out = torch.from_numpy(np.fromfile(file, dtype=np.uint16).astype(np.int64))
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(held_out) - 1, 64):
            x = held_out[start : start + 64][None]
            y = held_out[start + 1 : start + 65][None]
            x = x[:, : y.shape[1]]
            total += model(x, y)[1].item() * y.numel()
            count += y.numel()
    return total / count


def our_times(text: Path, out: Path, steps: int, **changes) -> tuple[str, list[float]]:
    """A run's precision, and milliseconds of every step of `ponder train` at nanoGPT's recipe."""
    quiet = dict(log_every=1, eval_every=0, save_every=0, samples=0, steps=steps, **RECIPE)
    train(preset("shakespeare", data=f"text:{text}", out=out, **quiet, **changes))
    tokens = RECIPE["context"] * RECIPE["batch_size"]
    rates = [r["tokens_per_second"] for r in read_rows(out / "train" / "metrics.jsonl")]
    return _precision(out), [1e3 * tokens / rate for rate in rates]


def _precision(out: Path) -> str:
    checkpoints = Checkpoints(out / "train" / "checkpoints")
    return checkpoints.load(checkpoints.steps()[-1])["precision"]


def rates(copy: Path, text: Path, folder: Path, steps: int) -> list[Row]:
    """Milliseconds of a step of nanoGPT's CPU recipe: its train.py's, and `ponder train`'s."""
    kinds = {
        f"ponder train --optimizer {optimizer}{' --compile' * compiled}": dict(
            optimizer=optimizer, compile=compiled
        )
        for compiled in (False, True)
        for optimizer in ("adamw", "muon")
    }
    times: dict[str, list[float]] = {}
    dtypes = {"nanoGPT": "fp32"}
    for turn in range(TURNS):
        # A step that holds an evaluation, and the first ones, are left out on both sides.
        times.setdefault("nanoGPT", []).extend(peer_times(copy, steps)[10:-1])
        for i, (name, changes) in enumerate(kinds.items()):
            dtypes[name], own = our_times(text, folder / f"{turn}-{i}", steps, **changes)
            times.setdefault(name, []).extend(own[10:])
    tokens = RECIPE["context"] * RECIPE["batch_size"]
    case = (
        f"a step of {RECIPE['batch_size']} x {RECIPE['context']} tokens, "
        f"{torch.get_num_threads()} thread(s)"  # nanoGPT's process takes as many
    )
    measured = [row("nanogpt", case, dtypes[name], name, ms) for name, ms in times.items()]
    for found in measured:
        ratio = measured[0].ms_p50 / found.ms_p50
        print(
            f"{found.implementation} ({found.dtype}): {found.ms_p50:.1f} ms, "
            f"{1e3 * tokens / found.ms_p50:,.0f} tokens/s, {ratio:.2f}× nanoGPT"
        )
    return measured


def our_losses(name: str, text: Path, out: Path, changes: dict) -> tuple[str, list]:
    """A run's precision, and (training seconds, validation loss) at every evaluation."""
    train(preset(name, data=f"text:{text}", out=out, **changes))
    found = [(r["seconds"], r["val_loss"]) for r in read_rows(out / "train" / "metrics.jsonl")]
    return _precision(out), [(seconds, loss) for seconds, loss in found if loss is not None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--steps", type=int, help="compare tokens/s alone, over so many steps")
    parser.add_argument("--presets", nargs="*", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    if args.steps and not args.peer:
        parser.error("--steps compares with a checkout of nanoGPT; say --peer PATH")
    # nanoGPT's published losses, of its CPU recipe and of its GPU recipe, and one between.
    marks = [1.88, 1.55, 1.4697]
    measured: list[Row] = []

    def add(loss: float, who: str, seconds: float, dtype: str) -> None:
        case = f"tinyshakespeare to a validation loss of {loss:.5g}"
        measured.append(row("nanogpt", case, dtype, who, [1e3 * seconds]))
        print(f"{case}: {who} {seconds:.1f} s")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.steps:
            copy = peer_copy(args.peer, args.text.read_text(), folder)
            return write(rates(copy, args.text.resolve(), folder, args.steps))
        if args.peer:
            copy = peer_copy(args.peer, args.text.read_text(), folder)
            times, loss = peer_times(copy), peer_loss(copy)
            # A step that holds an evaluation is left out: the median's worth.
            seconds = float(np.median(times)) * len(times) / 1e3
            add(loss, "nanoGPT", seconds, "fp32")
            marks.insert(0, loss)
        for name in args.presets:
            precision, losses = our_losses(name, args.text, folder / name, RUNS[name])
            for mark in marks:
                reached = [seconds for seconds, loss in losses if loss <= mark]
                if reached:
                    add(mark, f"ponder train {name}", reached[0], precision)
    write(measured, whole_cases=bool(args.peer) and set(args.presets) == set(RUNS))


if __name__ == "__main__":
    main()
