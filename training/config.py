"""What a training run is: one frozen dataclass, and the presets as functions that return one."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

DATA_KINDS = ("task", "text", "jsonl", "json", "parquet", "hub", "samples")
# The fields that are a model's shape.
SHAPE = (
    *("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_inner", "gated", "activation"),
    *("qk_norm", "tie_embeddings"),
)


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Times are in optimizer steps, lengths in tokens."""

    data: str | tuple[str, ...] = "task:last_digit"
    """task:NAME or task:FILE.py:CLASS, text:FILE, jsonl:FILES, parquet:FILES or hub:NAME; several
    are mixed. FILES is one or a pattern, NAME an id of the Hub (OWNER/NAME[/CONFIG]) or a folder; a
    :COLUMN behind it holds the text where the columns are not text, prompt and completion, question
    and answer, messages. samples:FOLDER, of a sweep, is for a verifier"""
    weights: tuple[float, ...] = ()
    """how much of every batch each of `data` gives; none: all the same"""
    data_tokens: int = 0
    """the most tokens to take of each set of documents, which hub: then streams; 0: all. A single
    text and tasks are not bounded"""
    out: Path = Path("runs/train")
    """the folder that holds the model (a Hugging Face folder), train/ and run.json"""
    tokenizer: str = "char"
    """char, byte, bpe:SIZE (learned from the data), a tokenizer.json or its folder, or the
    OWNER/NAME of one on the Hub"""

    init: str = ""
    """a Hugging Face folder or id to go on training: its weights and shape, and its tokenizer
    where `tokenizer` is char; "": a new model of the shape below. The rates below are for new
    models: one that is good already wants lower ones, as --optimizer adamw --lr 1e-4"""

    verifier: Literal["outcome", "value", "process"] | None = None
    """train no writer but a judge of solutions, one number a token. outcome: the last token's is
    whether samples: are right; value: every token's is; process: the end of each step's is whether
    the step was, for samples: of a task that can tell (countdown), or task:NAME, its own traces"""

    context: int = 128
    """the longest sequence, in tokens"""
    n_layer: int = 4
    """layers"""
    n_head: int = 4
    """query heads of a layer"""
    n_kv_head: int = 4
    """fewer than n_head: grouped-query attention"""
    head_dim: int = 32
    """width of a head"""
    n_embd: int = 128
    """width of the residual stream"""
    n_inner: int = 384
    """width of the MLP"""
    gated: bool = True
    """a gated MLP (Qwen3, Llama) or a plain one"""
    activation: str = "silu"
    """of the MLP: silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh or identity"""
    qk_norm: bool = True
    """RMS norms on queries and keys, head by head"""
    tie_embeddings: bool = True
    """the head that gives the logits shares its matrix with the embedding"""

    steps: int = 1000
    """optimizer steps in all"""
    batch_size: int = 32
    """sequences in one step, over all processes and accumulated micro-batches"""
    accumulation: int = 1
    """micro-batches a step"""
    optimizer: Literal["muon", "adamw", "adam", "momentum", "sgd"] = "muon"
    """muon: Muon for the layers' matrices, AdamW for the rest; momentum: SGD with 0.9 of it"""
    lr: float = 3e-3
    """peak learning rate of whatever is not Muon"""
    matrix_lr: float = 0.02
    """peak learning rate of Muon"""
    weight_decay: float = 0.0
    """on matrices alone; decoupled, but for adam, momentum and sgd, where it joins the gradient"""
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """the rate after the warm-up: stable and then linear (wsd), or falling from there on"""
    warmup: int = 20
    """steps of linear warm-up"""
    decay: float = 0.5
    """wsd: the last fraction of the steps, over which the rate falls"""
    floor: float = 0.0
    """what the rate falls to, as a fraction of its peak"""
    clip: float = 1.0
    """largest norm of the whole gradient; 0: no clipping"""
    ema: float = 0.0
    """0.999, say: evaluate and save a moving average of the weights, with this decay; 0: none"""
    full_traces: float = 0.5
    """tasks, and questions with worked answers: the fraction with a whole chain of thought; the
    others are cut at random, so that budgets at inference are nothing new"""

    retries: float = 0.0
    """tasks: the fraction of chains of thought that take up the problem again, behind attempts that
    may be wrong, so that thoughts can be drawn out at inference (sweep --extend)"""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where it is faster, measured at the start on a CPU"""
    compile: bool = False
    """torch.compile the model"""
    recompute: bool = False
    """compute each layer again in the backward pass: less memory, a third more work"""
    shard: bool = False
    """split weights, gradients and optimizer states over the processes (FSDP2)"""
    seed: int = 0
    """of the weights, the order of the data and what tasks draw"""
    log_every: int = 10
    """steps between two rows of train/metrics.jsonl"""
    eval_every: int = 250
    """0: at the end alone"""
    save_every: int = 250
    """0: at the end alone"""
    keep: int = 2
    """checkpoints to keep, the newest"""
    samples: int = 4
    """texts that the model writes at each evaluation"""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """where metrics go besides train/metrics.jsonl"""
    resume: bool = False
    """go on from the last checkpoint in `out`"""

    @property
    def sources(self) -> tuple[str, ...]:
        """`data`, as a tuple also where it is one name."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)

    def check(self) -> None:
        """Raise one ValueError that names every field that cannot be."""
        faults = []
        one = ("context", "n_layer", "n_head", "n_embd", "steps", "batch_size", "keep")
        none = ("warmup", "clip", "weight_decay", "log_every", "eval_every", "save_every")
        for least, names in ((1, one), (0, (*none, "samples", "data_tokens"))):
            for name in names:
                if not least <= getattr(self, name) < math.inf:
                    faults.append(f"{name} is {getattr(self, name)}; it must be at least {least}")
        # The command line refuses these itself; Python would take them for the last choice.
        for name, hint in get_type_hints(type(self)).items():
            known = [choice for part in (hint, *get_args(hint)) for choice in _choices(part)]
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if known and value is not None and value not in known:
                    faults.append(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if not 0 <= self.seed < 1 << 32:
            faults.append(f"seed is {self.seed}; it must be from 0 to {(1 << 32) - 1}")
        for name in ("lr", "matrix_lr"):
            if not 0 < getattr(self, name) < math.inf:
                faults.append(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("decay", "floor", "full_traces", "retries"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0 <= self.ema < 1:
            faults.append(f"ema is {self.ema}; it must be at least 0 and below 1")
        if self.accumulation < 1 or self.batch_size % self.accumulation:
            faults.append(
                f"accumulation is {self.accumulation}; it must divide batch_size {self.batch_size}"
            )
        for name in self.sources:
            kind, _, place = name.partition(":")
            if kind not in DATA_KINDS or not place:
                faults.append(
                    f"data is {name!r}; it must be task:NAME, text:FILE, jsonl:FILES, "
                    "parquet:FILES or hub:NAME"
                )
            if self.verifier is None and kind == "samples":
                faults.append(f"data is {name!r}; samples need --verifier")
            if self.verifier and kind != "samples" and (kind, self.verifier) != ("task", "process"):
                also = " or task:NAME" if self.verifier == "process" else ""
                faults.append(
                    f"data is {name!r}; a verifier of kind {self.verifier} learns from "
                    f"samples:FOLDER{also}"
                )
        if not self.sources:
            faults.append("data is empty; it must name one source at least")
        if self.weights and len(self.weights) != len(self.sources):
            faults.append(
                f"weights is {list(self.weights)}; it must have a number for each of the "
                f"{len(self.sources)} in data"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            faults.append(f"weights is {list(self.weights)}; each must be above 0")
        if faults:
            raise ValueError("; ".join(faults))

    def rate(self, step: int) -> float:
        """The fraction of the peak learning rate at a step (0 is the first): warm-up, then a fall.

        wsd: Hu et al. 2024, "MiniCPM", section 4; cosine: Loshchilov and Hutter 2017, "SGDR".
        """
        warm = (step + 1) / (self.warmup + 1)
        flat = (
            self.steps - round(self.decay * self.steps) if self.schedule == "wsd" else self.warmup
        )
        left = min(1.0, (self.steps - step) / max(1, self.steps - flat))
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return min(warm, self.floor + (1 - self.floor) * left)

    def identity(self) -> dict[str, Any]:
        """The fields that make it this run and no other: two runs of one folder agree in them."""
        free = {
            *("out", "keep", "trackers", "samples", "recompute", "shard", "resume"),
            *("log_every", "eval_every", "save_every"),
        }
        return {k: v for k, v in asdict(self).items() if k not in free}


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def tiny() -> TrainConfig:
    """Seconds, for tests."""
    return TrainConfig(
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        head_dim=16,
        n_embd=32,
        n_inner=64,
        context=64,
        steps=20,
        batch_size=8,
        warmup=2,
    )


def demo() -> TrainConfig:
    """A reasoning model of 0.5M parameters: `last_digit`, two to six minutes on two CPU cores.

    `lr`, the rate of the tied embedding, decides how sure the model gets. Of 250 validation
    problems it solved 98 to 100 % greedily with 3e-3, 1e-3, 7e-4 and 5e-4 (400, 340, 350 and 300
    steps), and 99, 93, 88 and 59 % at temperature 1. One that slips now and then shows what votes
    are for.
    """
    return TrainConfig(
        data="task:last_digit",
        out=Path("runs/demo"),
        context=64,
        n_layer=4,
        n_head=3,
        n_kv_head=3,
        head_dim=32,
        n_embd=96,
        n_inner=256,
        steps=360,
        batch_size=256,
        lr=6e-4,
    )


def shakespeare() -> TrainConfig:
    """nanoGPT's CPU size, 4 layers of width 128, three minutes; give it --data text:PATH."""
    return TrainConfig(
        data="text:tinyshakespeare.txt",
        out=Path("runs/shakespeare"),
        context=128,
        n_layer=4,
        n_head=4,
        n_kv_head=4,
        head_dim=32,
        n_embd=128,
        n_inner=512,
        gated=False,
        activation="relu2",
        steps=1400,
        batch_size=16,
        weight_decay=0.1,
        eval_every=200,
    )


def shakespeare_long() -> TrainConfig:
    """The same size on contexts of 256, five to eight minutes on two CPU cores.

    A million characters are seen seven times: without weight decay 2000 steps ended at a validation
    loss of 1.50, with 0.3 these 1700 end at 1.45.
    """
    return replace(
        shakespeare(),
        out=Path("runs/shakespeare_long"),
        context=256,
        steps=1700,
        weight_decay=0.3,
        eval_every=425,
    )


def gpt2() -> TrainConfig:
    """GPT-2's size, 124M parameters, for a GPU."""
    return TrainConfig(
        data="hub:HuggingFaceFW/fineweb-edu/sample-10BT",
        data_tokens=2_700_000_000,  # 5000 steps see 2.6 billion
        out=Path("runs/gpt2"),
        tokenizer="bpe:50257",
        context=1024,
        n_layer=12,
        n_head=12,
        n_kv_head=12,
        head_dim=64,
        n_embd=768,
        n_inner=3072,
        gated=False,
        activation="relu2",
        steps=5000,
        batch_size=512,
        accumulation=8,
        warmup=250,
        compile=True,
        eval_every=500,
        save_every=500,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    f.__name__: f for f in (tiny, demo, shakespeare, shakespeare_long, gpt2)
}


def preset(name: str, **changes) -> TrainConfig:
    """The preset of that name, with fields changed; ValueError names the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name](), **changes)
