"""Time to a validation loss on tinyshakespeare, beside nanoGPT's own train.py.

`python -m ponder.benchmarks.nanogpt --text tinyshakespeare.txt --peer PATH` with PATH a checkout of
nanoGPT. The peer runs its published CPU recipe (4 layers, 128 wide, batch 12 × 64, 2000 steps); its
validation loss is then taken over the whole split, each token once, as ours is. Times are training
time: neither side's start, evaluation or saving is counted. (Compiling happens in the first step,
so ours holds it.)
"""

import argparse
import json
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
from ponder.training.loop import train

RUNS: dict[str, dict] = {
    "shakespeare": {"eval_every": 80, "log_every": 80},
    "shakespeare_long": {},
}


def peer_seconds(checkout: Path, text: str, folder: Path) -> tuple[float, float]:
    """(training seconds, validation loss over the whole split) of nanoGPT's CPU recipe."""
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
    words = (
        "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 "
        "--eval_interval=2000 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
        "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    )
    run = subprocess.run([sys.executable, *words.split()], cwd=copy, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    times = [float(t) for t in re.findall(r"time ([\d.]+)ms", run.stdout)]
    # The first step of every evaluation interval holds the evaluation too: take the median's worth.
    seconds = float(np.median(times)) * len(times) / 1e3
    sys.path.insert(0, str(copy))
    from model import GPT, GPTConfig  # type: ignore

    saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    held_out = torch.from_numpy(ids[cut:].astype(np.int64))
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(held_out) - 1, 64):
            x = held_out[start : start + 64][None]
            y = held_out[start + 1 : start + 65][None]
            x = x[:, : y.shape[1]]
            total += model(x, y)[1].item() * y.numel()
            count += y.numel()
    return seconds, total / count


def our_losses(name: str, text: Path, out: Path, changes: dict) -> tuple[str, list]:
    """A run's precision, and (training seconds, validation loss) at every evaluation."""
    train(preset(name, data=f"text:{text}", out=out, **changes))
    lines = (out / "train" / "metrics.jsonl").read_text().splitlines()
    found = [(row["seconds"], row["val_loss"]) for row in map(json.loads, lines)]
    checkpoints = Checkpoints(out / "train" / "checkpoints")
    precision = checkpoints.load(checkpoints.steps()[-1])["precision"]
    return precision, [(seconds, loss) for seconds, loss in found if loss is not None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--presets", nargs="*", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    # nanoGPT's published losses, of its CPU recipe and of its GPU recipe, and one between.
    marks = [1.88, 1.55, 1.4697]
    measured: list[Row] = []

    def add(loss: float, who: str, seconds: float, dtype: str) -> None:
        case = f"tinyshakespeare to a validation loss of {loss:.5g}"
        measured.append(row("nanogpt", case, dtype, who, [1e3 * seconds]))
        print(f"{case}: {who} {seconds:.1f} s")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.peer:
            seconds, loss = peer_seconds(args.peer, args.text.read_text(), folder)
            add(loss, "nanoGPT", seconds, "fp32")
            marks.insert(0, loss)
        for name in args.presets:
            precision, losses = our_losses(name, args.text, folder / name, RUNS[name])
            for mark in marks:
                reached = [seconds for seconds, loss in losses if loss <= mark]
                if reached:
                    add(mark, f"ponder train {name}", reached[0], precision)
    write(measured)


if __name__ == "__main__":
    main()
