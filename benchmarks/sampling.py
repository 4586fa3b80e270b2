"""Batched sampling against Transformers: same weights, prompts and number of new tokens.

`python -m ponder.benchmarks.sampling [--batch 64 256] [--each 1 16] [--dtype fp32 bf16]
[--peer NAME ...] [--model FOLDER] [--compiled] [--profile]`: the model of train_step.py, or a
checkpoint's; 64-token prompts, 64 new tokens, temperature 1; 16 samples of each prompt, as a sweep
draws them, or of each prompt one.
Peers: `generate` with its dynamic cache and with a static one (compiled with --compiled, on a GPU
always; that takes half a minute for each shape), and `generate_batch`, its continuous batching,
which has a round of its own behind all others, against ours once more; the benchmark ends where its
first call takes longer than two minutes. It keeps its manager, whose graphs and cache are made in
that call; the cache takes half of what is free, so its row has no memory. Rows are written when
they are measured.

A row's gb_per_s counts what a decoder must read at least: in each step the weights once, each
prompt's keys and values once, and every sample's own; roofline is its fraction of a copy's
bandwidth, and peak_mib on a CPU what the process grew by. --profile prints where our time goes.
"""

import argparse
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from ponder.benchmarks.comparison import copy_ceiling, settings
from ponder.benchmarks.measure import DEVICE, Row, milliseconds, row, synchronize, write
from ponder.benchmarks.profiles import table
from ponder.benchmarks.train_step import peer_of, random_model
from ponder.inference.engine import LocalEngine, Request, SamplingParams
from ponder.models import GPT, GPTConfig
from ponder.training.hardware import PRECISION

PROMPT, NEW = 64, 64
# The most telling first.
BATCHES = (64, 256, 16, 1, 1024) if DEVICE == "cpu" else (4096, 64, 1024, 256, 16, 1)
EACH = (1, 16) if DEVICE == "cpu" else (64, 16, 1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USUAL_DTYPES = tuple(PRECISION[setting.dtype] for setting in settings(smoke=False))
PEERS = ("generate", "generate static", "generate_batch")
# On a CPU `generate_batch` took 7 GB and did not end in two minutes: only where it is asked for.
USUAL = PEERS[:2] if DEVICE == "cpu" else PEERS
PATIENCE = 120  # seconds for the first call of generate_batch, which waits for threads of its own


@torch.inference_mode()
def error_of(model: GPT, peer) -> float:
    """Relative difference of the two models' logits on one batch: they are the same model."""
    tokens = torch.randint(model.config.vocab_size, (4, PROMPT), device=DEVICE)
    a, b = model(tokens), peer(input_ids=tokens).logits.float()
    return ((a - b).norm() / b.norm()).item()


@cache
def build(dtype: torch.dtype, folder: str | None = None) -> tuple[GPT, torch.nn.Module, float]:
    """Our model (fp32: the engine casts it) and the peer in dtype, with the same weights: those of
    a checkpoint, or random ones; and by how much they differ in fp32."""
    peer: Any
    if folder is None:
        model = random_model()
        peer = peer_of(model)
    else:
        model = GPT.from_pretrained(folder, dtype=torch.float32, device=DEVICE)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    error = error_of(model.eval(), peer.eval())  # in bf16 rounding alone is 1 to 9 %, by the tokens
    return model, peer.to(dtype), error


@cache
def engine_of(model: GPT, slots: int, dtype: torch.dtype) -> LocalEngine:
    """Made in the first call, whose memory is counted and whose time is not."""
    return LocalEngine(model, slots=slots, eos=(), dtype=dtype, device=DEVICE)


def least_bytes(c: GPTConfig, batch: int, prompts: int, itemsize: int) -> float:
    """What the decode steps must read at least, the prefill left out."""
    weights = (c.layer_weights + c.n_embd * c.vocab_size) * itemsize
    token = 2 * c.n_layer * c.n_kv_head * c.head_dim * itemsize
    return NEW * (weights + prompts * PROMPT * token) + batch * token * NEW * (NEW + 1) / 2


def peak_mib(work: Callable[[], object]) -> float | str:
    """Memory that a call takes beyond what is there, in MiB; empty where nothing says so."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        work()
        return round((torch.cuda.max_memory_allocated() - allocated) / 2**20, 1)
    if not reset.exists():
        work()
        return ""

    def kib(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1])

    reset.write_text("5")  # the highest so far is forgotten
    before = kib("VmRSS")
    work()
    return round((kib("VmHWM") - before) / 1024, 1)


def _peers(peer, prompts: torch.Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    """Of no end: every sample has as many tokens."""
    shared: Any = dict(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=NEW)
    shared |= dict(eos_token_id=-1, pad_token_id=0)

    def generate(**more) -> None:
        mask = torch.ones_like(prompts)
        found = peer.generate(prompts, attention_mask=mask, use_cache=True, **shared, **more)
        synchronize()
        _check_count(found[:, PROMPT:].numel(), prompts)

    def static() -> None:
        generate(cache_implementation="static", disable_compile=True)

    def compiled_static() -> None:
        if DEVICE == "cuda":  # Transformers compiles it itself, with CUDA graphs
            return generate(cache_implementation="static")
        eager = peer.forward
        peer.forward = _compiled(peer)
        try:
            static()
        finally:
            peer.forward = eager

    def generate_batch() -> None:
        found = peer.generate_batch(
            prompts.tolist(),
            generation_config=GenerationConfig(**shared),
            # By itself it takes 0.9, and stays: ours is timed beside it.
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.5),
            persistent_manager=True,
        )
        synchronize()
        _check_count(sum(len(output.generated_tokens) for output in found.values()), prompts)

    name = "generate static compiled" if compiled else "generate static"
    static_peer = compiled_static if compiled else static
    return {"generate": generate, name: static_peer, "generate_batch": generate_batch}


def _check_count(tokens: int, prompts: torch.Tensor) -> None:
    if tokens != len(prompts) * NEW:
        raise RuntimeError(f"{tokens} tokens of {len(prompts) * NEW}")


@cache
def _compiled(peer):
    return torch.compile(type(peer).forward.__get__(peer), dynamic=False)


def case_of(batch: int, each: int, folder: str | None = None) -> str:
    case = f"{PROMPT}-token prompts, {NEW} new, batch {batch}, {each} of each prompt"
    return case if folder is None else f"{Path(folder).name}, {case}"


def run(
    batches=BATCHES,
    eachs=EACH,
    dtypes=USUAL_DTYPES,
    peers=USUAL,
    compiled: bool = DEVICE == "cuda",
    done: Collection[tuple[str, str, str]] = (),
    folder: str | None = None,
) -> Iterator[list[Row]]:
    """The rows of each case, as they come, but for `done`: (case, dtype, implementation)."""
    rounds = {"ponder": [peer for peer in peers if peer != "generate_batch"]}
    if "generate_batch" in peers:  # which may not come back: behind all others
        rounds["transformers generate_batch"] = ["generate_batch"]
    for (shown, chosen), name, batch in product(rounds.items(), dtypes, batches):
        torch.compiler.reset()  # else the second size is compiled for any, which is slower
        for each in eachs:
            if each <= batch and (case_of(batch, each, folder), name, shown) not in done:
                yield _run(name, batch, each, chosen, compiled, folder)


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer, where the system has such alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number, frame):
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run(
    name: str, batch: int, each: int, peers: Collection[str], compiled: bool, folder: str | None
) -> list[Row]:
    """The rows of a case; TimeoutError where generate_batch does not come back."""
    dtype = DTYPES[name]
    model, peer, error = build(dtype, folder)
    if not error <= 1e-5:
        raise RuntimeError(f"the two models differ by {error:.2e} in fp32, allowed 1e-5")
    prompts = prompts_of(model, batch, each)

    def ours() -> None:
        sample(model, prompts, dtype)
        synchronize()

    case = case_of(batch, each, folder)
    label = f"{case}, {name}"
    works: dict[str, Callable[[], object]] = {"ponder": ours}
    for peer_name, work in _peers(peer, prompts, compiled).items():
        if peer_name.removesuffix(" compiled") not in peers:
            continue
        works[f"transformers {peer_name}"] = work
    peaks, slowest = {}, 0.0
    for who, work in list(works.items()):
        begin = time.perf_counter()
        waits = "generate_batch" in who
        try:
            with _patience(PATIENCE) if waits else nullcontext():
                peaks[who] = peak_mib(work)
            if waits:
                peaks[who] = ""  # of a cache as large as there is room
        except Exception as reason:
            # Whatever does not come back goes on in threads of its own, and disturbs what follows.
            if who == "ponder" or isinstance(reason, TimeoutError):
                raise
            print(f"{label}: {who} cannot run here: {reason}")
            del works[who]
        else:
            first = time.perf_counter() - begin
            print(f"{label}: {who}: first call {first:.1f} s", flush=True)
            slowest = max(slowest, first * ("compiled" not in who))
    repeats = max(1, min(9, int(30 / slowest)))
    times = milliseconds(works, repeats=repeats, warmup=0)
    if "generate_batch" in peers:  # the next case has a manager of its own size
        peer.destroy_cached_continuous_batching_manager()
    measured: list[Row] = []
    nbytes = least_bytes(model.config, batch, batch // each, dtype.itemsize)
    for who in works:
        seconds = statistics.median(times[who]) / 1e3
        more = dict(gb_per_s=round(nbytes / seconds / 1e9, 3), peak_mib=peaks[who])
        more |= dict(roofline=round(nbytes / seconds / copy_ceiling(), 4))
        more |= dict(error=f"{error:.3e}" if who == "ponder" else "")
        if who != "ponder" or "generate_batch" not in peers:  # its row is of the first round
            measured.append(row("sampling", case, name, who, times[who], **more))
        ratio = 1e3 * seconds / statistics.median(times["ponder"])
        print(
            f"{label}: {who:35} {batch * NEW / seconds:9,.0f} tokens/s, ponder's {ratio:5.2f}×, "
            f"{more['roofline']:.1%} of the bandwidth, {more['peak_mib'] or '?'} MiB",
            flush=True,
        )
    return measured


def prompts_of(model: GPT, batch: int, each: int) -> torch.Tensor:
    prompts = torch.randint(model.config.vocab_size, (batch // each, PROMPT), device=DEVICE)
    return prompts.repeat_interleave(each, 0)


def sample(model: GPT, prompts: torch.Tensor, dtype: torch.dtype) -> None:
    """Draw a sample of each of our prompts."""
    engine = engine_of(model, len(prompts), dtype)
    params = SamplingParams(temperature=1.0, max_tokens=NEW)
    rows = [tuple(prompt) for prompt in prompts.tolist()]
    requests = (Request(prompt, params, 0, i) for i, prompt in enumerate(rows))
    _check_count(sum(len(sample.tokens) for sample in engine.generate(requests)), prompts)


def profile(batch: int, each: int, name: str, folder: str | None) -> None:
    """Where our time goes, by operation; on a CPU in one thread, as others are not looked at."""
    torch.set_num_threads(1)
    model = build(DTYPES[name], folder)[0]
    prompts = prompts_of(model, batch, each)
    table(f"{case_of(batch, each, folder)}, {name}", lambda: sample(model, prompts, DTYPES[name]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--each", type=int, nargs="+", default=EACH)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=USUAL_DTYPES)
    parser.add_argument("--peer", choices=PEERS, nargs="*", default=USUAL)
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint instead of random weights")
    parser.add_argument(
        "--compiled",
        action="store_true",
        default=DEVICE == "cuda",
        help="compile the static cache's peer",
    )
    parser.add_argument("--profile", action="store_true", help="print ours by operation instead")
    args = parser.parse_args()
    if args.profile:
        for name in args.dtype:
            profile(args.batch[0], args.each[0], name, args.model)
    else:
        chosen = args.batch, args.each, args.dtype, args.peer, args.compiled
        for rows in run(*chosen, folder=args.model):
            write(rows, whole_cases=False)


if __name__ == "__main__":
    main()
