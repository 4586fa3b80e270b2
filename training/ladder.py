"""`ponder scale`: train a ladder of sizes × token budgets, fit the law, predict a larger run.

Each rung is an ordinary training in a folder of its own, OUT/runs/NAME; what is finished there is
not trained again. OUT/scaling gets runs.csv, fit.json and scaling.png. No torch is imported before
a training starts, so that `ponder scale --help` is quick.
"""

import math
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..provenance import open_run, read_run, write_aside
from .config import TrainConfig
from .journal import read_rows

if TYPE_CHECKING:
    from .scaling_report import Rung

STDLIB_CHARACTERS = 2_000_000  # a tenth of them validates every run
# Passes over a text up to which repeated tokens teach nearly what new ones do (Muennighoff et al.
# 2023, "Scaling Data-Constrained Language Models").
REPEATS = 4


@dataclass(frozen=True)
class ScaleConfig:
    """A ladder: every size with every token budget, and one larger run that the law predicts."""

    out: Path = Path("runs/scale")
    """the folder that gets runs/, scaling/ and run.json"""
    data: str = "stdlib"
    """stdlib (the source of Python's standard library, which every machine has), text:PATH or
    hub:NAME[:COLUMN]"""
    tokenizer: str = "char"
    """char, byte or bpe:SIZE, learned from the data, or a tokenizer.json"""
    sizes: tuple[str, ...] = ("2x16", "2x32", "2x64", "2x128", "2x192")
    """layers x width"""
    tokens: tuple[int, ...] = (150_000, 300_000, 600_000, 1_200_000)
    """training tokens of each size"""
    held_out: str = "2x256"
    """the size of the run that is predicted before it is trained; "": none"""
    held_out_tokens: int = 1_500_000
    """what it is trained on"""
    context: int = 128
    """the longest sequence, in tokens"""
    batch_tokens: int = 1024
    """tokens in one step: a law of sizes and tokens needs runs that more steps would not change"""
    lr: float = 0.02
    """peak rate of AdamW, which has the embedding and the norms, at every width"""
    matrix_lr: float = 0.03
    """peak rate of Muon, at every width"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """one for all runs: a ladder measures differences of 1 %"""
    compile: bool = False
    """torch.compile each model, which takes half a minute"""
    seed: int = 0
    """of the weights and the order of the data, in every run"""
    resamples: int = 1000
    """of the bootstrap"""
    resume: bool = False
    """go on in `out`: what is finished there is kept"""

    def check(self) -> None:
        """Raise one ValueError that names every field that cannot be."""
        faults = []
        for name in ("context", "batch_tokens", "resamples"):
            if getattr(self, name) < 1:
                faults.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_tokens % max(1, self.context):
            faults.append(
                f"batch_tokens is {self.batch_tokens}; it must be a multiple of the context, "
                f"{self.context}"
            )
        for size in filter(None, (*self.sizes, self.held_out)):
            match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
            if not match:
                faults.append(f"size {size!r} is not LAYERSxWIDTH, as in 4x64")
            elif int(match[2]) % head_dim(int(match[2])):
                faults.append(
                    f"the width of {size} is not a multiple of its head_dim, "
                    f"{head_dim(int(match[2]))}"
                )
        for count in (*self.tokens, *[self.held_out_tokens] * bool(self.held_out)):
            if count < 10 * self.batch_tokens:
                faults.append(
                    f"{count} tokens are fewer than 10 steps of {self.batch_tokens}; "
                    "give more tokens or a smaller batch_tokens"
                )
        for name, values in (("sizes", self.sizes), ("tokens", self.tokens)):
            if len(set(values)) < 3:
                faults.append(f"{name} are {len(set(values))}; a fit needs at least 3 different")
            for twice in sorted({v for v in values if values.count(v) > 1}):
                faults.append(f"{name} name {twice} more than once; one run would count for two")
        if not 0 <= self.seed < 1 << 32:
            faults.append(f"seed is {self.seed}; it must be at least 0 and less than 2³²")
        if self.data.startswith("task:"):
            faults.append(
                f"data is {self.data}; a law counts tokens, and problems have as many as they "
                "need: take text:PATH or hub:NAME"
            )
        if faults:
            raise ValueError("; ".join(dict.fromkeys(faults)))
        shapes = [tuple(map(int, size.split("x"))) for size in self.sizes]
        steps = {round(count / self.batch_tokens) for count in self.tokens}
        for name, different, what in (
            ("sizes", {layers * width**2 for layers, width in shapes}, "parameters"),
            ("tokens", steps, f"steps of {self.batch_tokens}"),
        ):
            if len(different) < 3:
                faults.append(
                    f"{name} are {', '.join(map(str, getattr(self, name)))}, of {len(different)} "
                    f"different numbers of {what}; a fit needs at least 3"
                )
        if self.held_out in self.sizes and round(self.held_out_tokens / self.batch_tokens) in steps:
            faults.append(
                f"held_out is {self.held_out} with {self.held_out_tokens} tokens, a run of the "
                "ladder; a prediction is of a run that the law has not seen"
            )
        if faults:
            raise ValueError("; ".join(faults))
        rung_config(self, self.sizes[0], self.tokens[0]).check()  # what all runs have alike


def tiny() -> ScaleConfig:
    """Nine runs and a larger one, minutes: shows that it works, and that so little tells little."""
    return ScaleConfig(
        sizes=("2x16", "2x32", "2x48"),
        tokens=(40_000, 80_000, 160_000),
        held_out="2x64",
        held_out_tokens=240_000,
        context=64,
        batch_tokens=512,
        resamples=200,
    )


def cpu() -> ScaleConfig:
    """Twenty runs and a larger one, 6 thousand to 1.6 million parameters: a quarter of an hour on
    two CPU cores. 0.2 to 195 tokens a parameter, so that both terms of the law show."""
    return ScaleConfig()


def gpu() -> ScaleConfig:
    """Twenty runs and a larger one, 3 to 135 million parameters: hours on a GPU."""
    return ScaleConfig(
        data="hub:roneneldan/TinyStories",
        tokenizer="bpe:8192",
        sizes=("4x256", "6x384", "8x512", "10x640", "12x768"),
        tokens=(50_000_000, 100_000_000, 200_000_000, 400_000_000),
        held_out="14x896",
        held_out_tokens=450_000_000,
        context=512,
        batch_tokens=131_072,
        lr=3e-3,
        precision="bf16",
        compile=True,
    )


PRESETS: dict[str, Callable[[], ScaleConfig]] = {f.__name__: f for f in (tiny, cpu, gpu)}


def preset(name: str) -> ScaleConfig:
    """The preset of that name; ValueError names the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no ladder is named {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def head_dim(width: int) -> int:
    """Width of a head in a model of that width."""
    return 16 if width < 64 else 32 if width < 512 else 64


def rung_config(config: ScaleConfig, size: str, tokens: int) -> TrainConfig:
    """The training of one rung.

    All that may differ between runs is what the law is of. The sizes of a ladder should differ in
    width alone, or in both alike: in a few hundred steps 1x32 was as good as 2x32 (2.28 and 2.30
    nats). The batch is small, as 250 thousand tokens in 122 steps are too few steps and not too few
    tokens. One rate serves all widths: Muon's updates have the same size at each, and neither does
    the rate of an embedding change with the width (Yang et al. 2022, "Tensor Programs V", table 8):
    2x32 lost 1.648 and 1.645 after 250 thousand tokens with 0.012 and 0.03, 2x64 1.553 and 1.507
    with 0.006 and 0.02. Each run has a seed of its own, so that what a seed does shows as scatter
    and is reckoned with: two of 2x32 came to 1.648 and 1.610. Warm-up is a tenth of short
    runs, and the rate falls to 0 over the second half of each: a loss in the middle of a longer run
    is no substitute for a run of that length (Hoffmann et al. 2022, section 3.1).
    """
    name = f"{size}_{tokens}"
    layers, width = map(int, size.split("x"))
    steps = round(tokens / config.batch_tokens)
    heads = width // head_dim(width)
    data = config.data
    if data == "stdlib":
        data = f"text:{(config.out / 'text.txt').absolute()}"  # however `out` is written
    return TrainConfig(
        data=data,
        out=config.out / "runs" / name,
        tokenizer=config.tokenizer,
        context=config.context,
        n_layer=layers,
        n_head=heads,
        n_kv_head=heads,
        head_dim=head_dim(width),
        n_embd=width,
        n_inner=4 * width,
        gated=False,
        activation="relu2",
        steps=steps,
        batch_size=config.batch_tokens // config.context,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        warmup=min(100, math.ceil(steps / 10)),
        precision=config.precision,
        compile=config.compile,
        seed=zlib.crc32(f"{config.seed} {name}".encode()),
        log_every=max(1, steps // 20),
        eval_every=0,
        save_every=1000,
        samples=0,
        resume=True,
    )


def scale(config: ScaleConfig) -> Path:
    """Train the ladder, fit the law and predict the held-out run; returns OUT/scaling.

    Stopped runs go on where they were, with `resume`. A run that diverges is left out of the fit,
    and said to be. ValueError where too few are left.
    """
    from .processes import main_alone, process_state
    from .scaling_report import fit_rungs, report, table

    config.check()
    identity = {k: v for k, v in asdict(config).items() if k not in ("out", "resume", "resamples")}
    folder = config.out / "scaling"

    def begin() -> None:
        open_run(config.out, "scale", identity, resume=config.resume)
        folder.mkdir(exist_ok=True)
        if config.data == "stdlib":
            _write_stdlib(config.out / "text.txt")

    main = process_state().is_main_process
    plan = [rung_config(config, size, count) for size in config.sizes for count in config.tokens]
    plan.sort(key=lambda c: _parameters(c) * c.steps)
    last, longest = None, max(plan, key=lambda c: c.steps)
    if config.held_out:
        last = rung_config(config, config.held_out, config.held_out_tokens)
        longest = max(longest, last, key=lambda c: c.steps)
    if config.data != "stdlib":  # a mistake in it is told before the folder is taken
        _say_passes(longest, main)
    main_alone(begin)
    if config.data == "stdlib":
        _say_passes(longest, main)
    rungs = []
    for number, run in enumerate(plan, 1):
        print(f"run {number} of {len(plan)}: {run.out.name}", flush=True)
        rungs.append(_train_rung(run))
        _check_same_data(plan[:number])
        if main:
            write_aside(folder / "runs.csv", table(rungs))
    fit = fit_rungs(rungs, resamples=config.resamples, seed=config.seed)
    if last:
        # Said before the run that it is about is trained.
        value, low, high = fit.predict(_parameters(last), last.steps * config.batch_tokens)
        print(f"predicted for {last.out.name}: {value:.4f} ({low:.4f} to {high:.4f})", flush=True)
        rungs.append(_train_rung(last, held_out=True))
        _check_same_data([*plan, last])
    if main:
        report(fit, rungs, folder)
    return folder


def _say_passes(longest: TrainConfig, main: bool) -> None:
    """Say how often the run of the most tokens sees the text, and warn where that is too often."""
    from .data import load_data, times_of

    [passes] = load_data(longest).passes(longest.steps)
    if main and passes:
        text = f"the longest run, {longest.out.name}, makes {times_of(passes)} over the text"
        if passes > REPEATS:
            text += (
                f": beyond {REPEATS}, repeated tokens teach less than new ones (Muennighoff et al. "
                "2023), which the law takes them for; give more text, or fewer tokens"
            )
        print(text, flush=True)


def _parameters(config: TrainConfig) -> int:
    from .loop import model_config

    return model_config(config, 1).layer_weights


def _train_rung(config: TrainConfig, *, held_out: bool = False) -> "Rung":
    """The run as it is on disk where it is finished, else trained."""
    from ..models import load_config
    from .loop import KNOWS_NOTHING, Diverged, train
    from .scaling_report import Rung

    rung = Rung(config.out.name, config.n_layer, config.n_embd, _parameters(config), held_out)
    failed = config.out / "diverged.txt"
    if not failed.exists() and not _finished(config):
        try:
            train(config)
        except Diverged as error:
            failed.write_text(f"{error}\n", encoding="utf-8")
            print(f"{rung.name} diverged: {error}; delete {config.out} to try it again", flush=True)
        else:
            if not _finished(config):
                raise KeyboardInterrupt  # it was asked to stop, and saved
    if failed.exists():
        return replace(rung, status="diverged")
    row, shape = _last_row(config), load_config(config.out)
    if not row["val_loss"] < KNOWS_NOTHING * math.log(shape.vocab_size):  # NaN too
        return replace(rung, status="diverged", val_loss=row["val_loss"])
    return replace(
        rung,
        status="finished",
        tokens=row["tokens"],
        flops=3 * shape.flops_per_token(config.context) * row["tokens"],
        seconds=row["seconds"],
        val_loss=row["val_loss"],
    )


def _check_same_data(rungs: Sequence[TrainConfig]) -> None:
    """ValueError where a file changed since earlier runs: one law is of one text."""
    found: dict[str, str] = {}
    for rung in filter(_finished, rungs):
        told = read_run(rung.out)["train"]["configuration"]["data_fingerprint"]
        found.setdefault(told, rung.out.name)
    if len(found) > 1:
        raise ValueError(
            f"the data are not what they were: {' and '.join(found.values())} have seen different "
            "ones; take another --out, or put the data back and delete the later runs"
        )


def _finished(config: TrainConfig) -> bool:
    """Whether the last step is measured and the model, which follows, is there."""
    return _last_row(config).get("step") == config.steps and (config.out / "config.json").exists()


def _last_row(config: TrainConfig) -> dict:
    rows = read_rows(config.out / "train" / "metrics.jsonl")
    return rows[-1] if rows else {}


def _write_stdlib(path: Path) -> None:
    """The source of Python's standard library, in an order of its own, as one ASCII text."""
    if path.exists():
        return
    library = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    files = sorted(
        f for f in library.rglob("*.py") if others.isdisjoint(f.relative_to(library).parts)
    )
    random.Random(0).shuffle(files)
    text = "".join(f.read_text(encoding="ascii", errors="ignore") for f in files)
    if len(text) < STDLIB_CHARACTERS // 2:
        raise ValueError(
            f"this Python keeps {len(text)} characters of its standard library as source; give "
            "--data text:PATH instead"
        )
    write_aside(path, text[:STDLIB_CHARACTERS])
