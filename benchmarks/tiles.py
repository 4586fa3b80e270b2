"""Which tiles the kernels of attention and of the MLPs should take on this GPU.

`python -m ponder.benchmarks.tiles --out FILE` tries other tiles for one kernel at a time, and the
kernels for Hopper, against what _attention_tiles.py says, on causal and on full attention over 4096
tokens in bf16; then mlp_tiles.py does the same. FILE (JSON) holds what was faster by more than the
noise; with PONDER_TILES=FILE in the environment ponder takes these, until a person has put them in
the tables. FILE is written anew with each kernel and head dimension that is done and each candidate
that was wrong, and a run goes on from there; what was wrong at another commit is tried again.

Each candidate first runs in a process of its own and must give the right result there: one that
never ends, or writes where it must not, would take everything after it along.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ponder.benchmarks import mlp_tiles
from ponder.benchmarks.measure import DEVICE, machine, milliseconds
from ponder.kernels import _attention_tiles
from ponder.kernels._attention_tiles import SPECIALIZED_TILES, Tiles

module = importlib.import_module("ponder.kernels.attention")
Found = dict[tuple[str, int], Tiles]

PLAIN = [
    Tiles(*numbers)
    for numbers in (
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 64, 4, 3),
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 3),
    )
]
# With eight warps the same kernels fetch by TMA too, but all warps share all of the work.
HOPPER = {
    "forward": [
        *((128, 128, 4, 2), (128, 128, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3)),
        *((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)),
    ],
    "backward_q": [
        *((128, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3)),
        *((128, 128, 8, 2), (128, 64, 8, 2)),
    ],
    "backward_kv": [(64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3)],
    "backward": [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 2), (128, 128, 8, 2)],
}
GAIN = 0.98  # of the time before: what is less than 2 % faster is not worth a change
ERROR = 2e-2  # relative, in norm, of bf16 against fp32


def take(found: Found) -> None:
    """Let the kernels take these tiles, and those of the table where there is none."""
    chip = module.capability(torch.device(DEVICE))
    _attention_tiles.measured = lambda: (chip, found)


def tensors(dim: int, smoke: bool) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    torch.manual_seed(0)
    shape = (1, 2, 128, dim) if smoke else (4, 16, 4096, dim)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bf16
    return [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(4)]


def forward(inputs: list[Tensor], causal: bool, deterministic: bool = True):
    q, k, v, _ = inputs
    rules = None, None, None, causal, None, None, q.shape[-1] ** -0.5, deterministic
    out, lse = module._attention(q, k, v, None, *rules)
    return out, lse, rules


def backward(inputs: list[Tensor], causal: bool, deterministic: bool) -> Callable:
    """The backward pass alone, as a call."""
    q, k, v, dout = inputs
    out, lse, rules = forward(inputs, causal, deterministic)
    return lambda: module._attention_backward(dout, None, q, k, v, out, lse, *rules)


def candidates(smoke: bool) -> Iterator[tuple[str, int, Tiles]]:
    hopper = module.capability(torch.device(DEVICE)) in (90, 0)
    for dim in (64,) if smoke else (64, 128):
        for name, shapes in HOPPER.items():
            specialized = [Tiles(*numbers, specialized=True) for numbers in shapes] * hopper
            plain = PLAIN if name in module.KERNELS else []
            if name in ("forward", "backward_kv") and hopper:
                plain = [*(replace(tiles, late=True) for tiles in plain), *plain]
            for tiles in (plain[:1] + specialized[:1]) if smoke else plain + specialized:
                yield name, dim, tiles


def error_of(name: str, dim: int, tiles: Tiles, smoke: bool) -> float:
    """The largest relative error with this candidate: of out, dq, dk and dv, causal and full, of
    the first and the last key-value head, two query heads to each. Infinite where a kernel that
    should repeat itself to the bit does not."""
    take({(name, dim): tiles})
    (q, k, v, dout), worst = tensors(dim, smoke), 0.0
    k, v = (x[:, : x.shape[1] // 2].contiguous() for x in (k, v))
    deterministic = name != "backward"
    for causal in (True, False):
        first = None
        for _ in range(2 if smoke else 4):  # a race may show now and then
            out, *_ = forward([q, k, v, dout], causal)
            found = (out, *backward([q, k, v, dout], causal, deterministic)()[:3])
            first = first or found
            if not all(x.isfinite().all() for x in found):
                return float("inf")
            if deterministic and not all(map(torch.equal, found, first)):
                return float("inf")
            # The truth in fp32 of as many heads as memory holds.
            for queries, keys in ((slice(0, 2), slice(0, 1)), (slice(-2, None), slice(-1, None))):
                of = (queries, keys, keys)
                leaves = [x[-1:, h].float() for x, h in zip((q, k, v), of, strict=True)]
                leaves = [x.requires_grad_() for x in leaves]
                expanded = (leaves[0], *(x.expand(-1, 2, -1, -1) for x in leaves[1:]))
                truth = F.scaled_dot_product_attention(*expanded, is_causal=causal)
                wanted = torch.autograd.grad(truth, leaves, dout[-1:, queries].float())
                heads = (queries, *of)
                for a, b, h in zip(found, (truth.detach(), *wanted), heads, strict=True):
                    worst = max(worst, ((a[-1:, h].float() - b).norm() / b.norm()).item())
    return worst


def attempt(trial: list, smoke: bool) -> str:
    """What is wrong with a candidate, found in a process of its own; empty if nothing is."""
    words = [sys.executable, "-m", "ponder.benchmarks.tiles", "--smoke"][: 3 + smoke]
    words += ["--try", json.dumps(trial)]
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "did not end"
    last = ((run.stdout + run.stderr).strip().splitlines() or [""])[-1]
    return "" if run.returncode == 0 else last[:120] or f"exit {run.returncode}"


class Notes:
    """What is known of this machine, and the file that it is in."""

    def __init__(self, path: Path | None, chip: int):
        self.path = path
        self.known: dict[str, Any] = {**machine(), "capability": chip, "attention": [], "mlp": []}
        self.known |= {"done": [], "wrong": []}
        if path and path.exists():
            there = json.loads(path.read_text())
            if all(there.get(name) == self.known[name] for name in ("gpu", "capability")):
                wrong = there["wrong"] if there["commit"] == self.known["commit"] else []
                self.known |= there | machine() | {"wrong": wrong}

    def add(self, kind: str, *entries: list) -> None:
        self.known[kind] += entries
        if self.path:
            aside = self.path.with_name(self.path.name + ".tmp")  # a cut here leaves the old one
            aside.write_text(json.dumps(self.known, indent=1) + "\n")
            os.replace(aside, self.path)

    def right(self, what: str, trials: list[tuple], smoke: bool) -> list[tuple]:
        """Those of the candidates whose results are right."""
        wrong = [entry[:-1] for entry in self.known["wrong"]]
        words = {
            trial: [what, *(asdict(x) if is_dataclass(x) else x for x in trial)] for trial in trials
        }
        words = {trial: each for trial, each in words.items() if each not in wrong}
        good = []
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:  # most of it compiles
            faults = pool.map(lambda each: attempt(each, smoke), words.values())
            for trial, fault in zip(words, faults, strict=True):
                if fault:
                    print(f"left out: {what} {' '.join(map(str, trial))}: {fault}", flush=True)
                    self.add("wrong", [*words[trial], fault])
                else:
                    good.append(trial)
        return good


def label(tiles: Tiles) -> str:
    kind = " Hopper" if tiles.specialized else " late" if tiles.late else ""
    return f"{tiles.block_t}x{tiles.block_s} w{tiles.num_warps} s{tiles.num_stages}{kind}"


def times(
    name: str, inputs: list[Tensor], options: dict[str, Found], smoke: bool
) -> dict[str, float]:
    """The time with each of some tiles over that with the first: the mean of causal and full."""
    ratios: dict[str, list[float]] = {key: [] for key in options}
    for causal in (True, False):
        works = {}
        for key, found in options.items():
            one_pass = ("backward", inputs[0].shape[-1]) in found

            def work(found=found, one_pass=one_pass, causal=causal):
                take(found)
                if name == "forward":
                    forward(inputs, causal)
                else:
                    passes[one_pass, causal]()

            works[key] = work
        take({})
        passes = {
            (one_pass, causal): backward(inputs, causal, not one_pass) for one_pass in (True, False)
        }
        counts = dict(repeats=2, warmup=1) if smoke else dict(repeats=15, warmup=2)
        taken = milliseconds(works, **counts, queued=True)
        medians = {key: statistics.median(series) for key, series in taken.items()}
        first = next(iter(medians.values()))
        for key, value in medians.items():
            kind = "causal" if causal else "full"
            print(f"{name:12} D{inputs[0].shape[-1]:<4} {kind:7} {key:24} {value:8.3f} ms")
            ratios[key].append(value / first)
    return {key: statistics.geometric_mean(values) for key, values in ratios.items()}


def attention(notes: Notes, smoke: bool) -> None:
    """A kernel and head dimension at a time: the tiles that beat the table's, if some do."""
    found: Found = {(name, dim): Tiles(**fields) for name, dim, fields in notes.known["attention"]}
    everything = list(candidates(smoke))
    for dim in sorted({dim for _, dim, _ in everything}):
        inputs = tensors(dim, smoke)
        for name in HOPPER:  # "backward" last: it must beat the two passes as chosen
            if ["attention", name, dim] in notes.known["done"]:
                continue
            trials = [trial for trial in everything if trial[:2] == (name, dim)]
            options = {"ponder": {}} if name != "backward" else {"two passes": dict(found)}
            for _, _, tiles in notes.right("attention", trials, smoke):
                own = {**found, (name, dim): tiles} if name == "backward" else {(name, dim): tiles}
                options[label(tiles)] = own
            ratios = times(name, inputs, options, smoke)
            winner = min(ratios, key=lambda key: ratios[key])
            print(f"{name} D{dim}: {winner}, {ratios[winner]:.3f} of the time before", flush=True)
            if ratios[winner] < GAIN:
                found[name, dim] = options[winner][name, dim]
                notes.add("attention", [name, dim, asdict(found[name, dim])])
            notes.add("done", ["attention", name, dim])


def products(notes: Notes, smoke: bool) -> None:
    """The same of the MLPs' products, forward and backward."""
    everything = list(mlp_tiles.candidates(smoke))
    for backward in (False, True):
        if ["mlp", backward] in notes.known["done"]:
            continue
        trials = [trial for trial in everything if trial[0] == backward]
        tiles = [tile for _, tile in notes.right("mlp", trials, smoke)]
        if tile := mlp_tiles.best(backward, tiles, smoke, GAIN):
            notes.add("mlp", [backward, asdict(tile)])
        notes.add("done", ["mlp", backward])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, in the interpreter too")
    parser.add_argument(
        "--try", dest="trial", help="one candidate: [kernel, head dimension, tiles]"
    )
    args = parser.parse_args()
    if DEVICE == "cpu":
        if not args.smoke:
            print("tiles: no GPU here, so there is nothing to compare")
            return 0
        os.environ["TRITON_INTERPRET"] = "1"
    if args.trial:
        what, name, *rest, fields = json.loads(args.trial)
        if what == "mlp":
            error = mlp_tiles.error_of(name, mlp_tiles.Tile(**fields), args.smoke)
        else:
            error = error_of(name, *rest, Tiles(**fields), args.smoke)
        print(f"relative error {error:.1e}")
        return int(not error <= ERROR)
    notes = Notes(args.out, module.capability(torch.device(DEVICE)))
    attention(notes, args.smoke)
    products(notes, args.smoke)
    print(json.dumps(notes.known, indent=1))
    return 0


if __name__ == "__main__":
    # Today's tiles of the kernels for Hopper are among the candidates, but for "delta".
    assert {name for name, _ in SPECIALIZED_TILES} == {*HOPPER, "delta"}
    sys.exit(main())
