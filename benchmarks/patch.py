"""Transformers' models as they are, patched by ponder, and by Liger: parity, step time, memory.

    python -m ponder.benchmarks.patch [--steps 20] [--resume]

Each family has random weights. The parity columns (fp32) hold the largest difference of a logit,
and of a gradient (relative, by tensor), to the model with eager attention on a padded batch.
A training step (forward, backward; bf16 autocast around fp32 weights) is timed for all three in one
process, in turns: on a GPU of a model of GPT-2's size and 4 x 1024 tokens, with the memory that it
takes beside the weights; on a CPU of 4 layers, 256 wide, and 4 x 256 tokens, in fp32 where the CPU
has no products in bf16, and without Liger, which needs a GPU. Rows go to
benchmarks/results/patch.csv, and the table in docs/patch.md is drawn from it (`--table` prints it).
A family that fails is told and left out; with --resume so is what --out has.
"""

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ponder.benchmarks.measure import (
    DEVICE,
    RESULTS,
    WRONG,
    left_out_if_it_fails,
    machine,
    measured_here,
    merge,
)
from ponder.models import patch
from ponder.training.hardware import has_bf16_products

TABLE = RESULTS / "patch.csv"
COLUMNS = (
    *("model", "implementation", "attention", "rotary", "norm", "mlp", "loss"),
    *("logit_error", "gradient_error", "ms_p50", "peak_mib"),
    *("gpu", "torch", "transformers", "commit", "date"),
)
SIZE = (768, 12, 32000, 1024) if DEVICE == "cuda" else (256, 4, 2000, 256)
"""Width, layers, vocabulary and context of what is timed."""
GEMMA = dict(query_pre_attn_scalar=64, layer_types=["sliding_attention", "full_attention"] * 6)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": dict(sliding_window=256),
    "smollm3": {},
    "gemma2": GEMMA | dict(sliding_window=256),
    "gemma3_text": GEMMA | dict(sliding_window=256),
    "phi3": dict(sliding_window=None),
    "olmo2": {},
    "gpt2": {},
    "arcee": {},
    "nemotron": {},
    "jais2": {},
    "gpt_neox": {},
    "starcoder2": {},
    "phi": {},
}


def build(kind: str, *, small: bool) -> Any:
    """A model of the family with random weights: two layers and few numbers for parity's sake, or
    of the size that is timed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width, layers, vocabulary = (96, 2, 500) if small else SIZE[:3]
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    shape: dict[str, Any] = dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // (24 if small else 64),
        num_key_value_heads=2 if small else 4,
        head_dim=24 if small else 64,
        max_position_embeddings=2048,
    )
    changes = dict(FAMILIES[kind])
    if small and changes.get("sliding_window"):
        changes["sliding_window"] = 16
    if "layer_types" in changes:
        changes["layer_types"] = changes["layer_types"][:layers]
    if kind == "gpt2":
        heads = shape["num_attention_heads"]
        shape = dict(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads)
        shape |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, n_positions=2048)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape | ends | changes)
    return AutoModelForCausalLM.from_config(config)


def apply(implementation: str, model: Any) -> dict[str, str]:
    """Patch in place; what each part was replaced by."""
    if implementation == "ponder":
        parts = patch(model, quiet=True)
        return {
            part.name.lower(): f"{part.replaced} of {part.replaced + sum(part.kept.values())}"
            for part in parts
        }
    if implementation == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
    return {}


def parity(kind: str, device: str) -> dict[str, Any]:
    """The row of ponder's errors, fp32, against eager attention."""
    model = build(kind, small=True).to(device)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.copy_(noise * p.shape[1] ** -0.5 if p.ndim == 2 else p + 0.3 * noise)
    patched = copy.deepcopy(model)
    replaced = apply("ponder", patched)
    tokens = torch.randint(0, 500, (2, 64), device=device)
    mask = torch.ones_like(tokens)
    mask[0, 50:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    logits, gradients = [], []
    for m in (model, patched):
        with torch.no_grad():
            logits.append(m.eval()(tokens, attention_mask=mask).logits[mask.bool()])
        m.train()(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    errors = [(b - a).norm() / a.norm() for a, b in zip(*gradients, strict=True)]
    return replaced | dict(
        logit_error=f"{(logits[1] - logits[0]).abs().max().item():.1e}",
        gradient_error=f"{torch.stack(errors).max().item():.1e}",  # NaN if one is
    )


@contextmanager
def own_names(model: Any, names: dict[str, Any]) -> Iterator[None]:
    """Within, Transformers' module of a model holds the `names` that a patch of it left there.

    Liger replaces functions and classes of the module, and so would time the other models too.
    """
    module = vars(sys.modules[type(model).__module__])
    plain = dict(module)
    module.update(names)
    try:
        yield
    finally:
        names.update(module)
        module.update(plain)


def times(kind: str, implementations: list[str], steps: int) -> dict[str, dict[str, str]]:
    """Milliseconds of a training step, and on a GPU the most memory beside the weights."""
    found: dict[str, dict[str, str]] = {}
    models: dict[str, tuple[Any, dict[str, Any]]] = {}
    *_, vocabulary, context = SIZE
    tokens = torch.randint(0, vocabulary, (4, context), device=DEVICE)
    bf16 = has_bf16_products(torch.device(DEVICE))

    def step(model: Any) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad()

    for name in implementations:
        model, names = build(kind, small=False).to(DEVICE).train(), {}
        try:
            with own_names(model, names):
                apply(name, model)
                step(model)
        except Exception as error:  # a peer that cannot run here must not end the comparison
            if name == "ponder":
                raise
            print(f"{kind}: {name} fails: {type(error).__name__} {error}", flush=True)
        else:
            models[name] = model, names
    milliseconds: dict[str, list[float]] = {name: [] for name in models}
    for i in range(steps + 3):
        for name, (model, names) in models.items():
            with own_names(model, names):
                elapsed, found[name] = timed(lambda m=model: step(m))
            if i >= 3:
                milliseconds[name].append(elapsed)
    for name, values in milliseconds.items():
        found[name]["ms_p50"] = f"{statistics.median(values):.2f}"
    return found


def timed(step: Callable[[], None]) -> tuple[float, dict[str, str]]:
    """Milliseconds of a step, and on a GPU the column of its memory."""
    if DEVICE == "cpu":
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin), {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return start.elapsed_time(end), dict(peak_mib=f"{peak:.0f}")


def liger_knows(kind: str) -> bool:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return False
    return kind in MODEL_TYPE_TO_APPLY_LIGER_FN


def table() -> str:
    """The rows of the results as the table of docs/patch.md."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    head = "| model | attention | rotary | norm | MLP | loss | logits | gradients | ms | MiB |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    by_model: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["implementation"] == "ponder":  # a machine's first row: the last machine's stay
            by_model[row["model"]] = {}
        by_model[row["model"]][row["implementation"]] = row
    for model, found in by_model.items():
        ours = found["ponder"]
        parts = [ours[name] or "-" for name in ("attention", "rotary", "norm", "mlp", "loss")]
        measured = [
            " / ".join(
                found[i][column] or "-" for i in ("ponder", "transformers", "liger") if i in found
            )
            if ours[column]
            else ""
            for column in ("ms_p50", "peak_mib")
        ]
        cells = [model, *parts, ours["logit_error"], ours["gradient_error"], *measured]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--resume", action="store_true", help="leave out families that --out has")
    options = parser.parse_args()
    if options.table:
        print(table())
        return 0
    import transformers

    facts = {name: machine()[name] for name in ("gpu", "torch", "commit", "date")}
    facts["transformers"] = transformers.__version__
    done = measured_here(options.out, "model") if options.resume else set()
    for kind in [kind for kind in FAMILIES if kind not in done]:
        implementations = ["ponder", "transformers"]
        if DEVICE == "cuda" and liger_knows(kind):
            implementations.append("liger")
        with left_out_if_it_fails(f"patch {kind}", "ponder"):
            found = parity(kind, DEVICE)
            rows = []
            for name, figures in times(kind, implementations, options.steps).items():
                own = found if name == "ponder" else {}
                rows.append(dict(model=kind, implementation=name) | own | figures | facts)
            print(rows, flush=True)
            merge(options.out, COLUMNS, rows, ("gpu", "model"))  # now, lest a later one is cut
    return bool(WRONG)


if __name__ == "__main__":
    sys.exit(main())
