"""The training loop: for each step forward, loss, backward, update; then evaluate, save, log."""

import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors import SafetensorError
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed

from ..models import GPT, GPTConfig, hub
from ..models.verifier import Verifier, save_verifier, verifier_loss
from ..provenance import alone_in, note, open_run, read_run
from .checkpoint import Checkpoints
from .config import PRESETS, SHAPE, TrainConfig
from .data import IGNORE, Batch, Data, load_data
from .hardware import choose_precision, cpp_compiler, peak_flops
from .journal import append_rows, forget_after
from .memory import check_free, keep_memory
from .optimizer import Average, build_optimizer
from .packing import compacted
from .processes import (
    DTYPE,
    build_accelerator,
    gather,
    gather_weights,
    main_alone,
    process_state,
    scatter,
    scatter_weights,
    shard_count,
    wants_shards,
    whole_model,
)
from .samples import write_samples
from .solutions import reading
from .tokenizer import check_vocabulary
from .trackers import check_trackers, start_trackers
from .view import View


class Diverged(ValueError):
    """The loss is no number any more."""


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The shape of the model that this configuration trains."""
    fields = {name: getattr(config, name) for name in ("context", *SHAPE)}
    return GPTConfig(vocab_size=vocab_size, **fields)


def _given(config: TrainConfig, shape: GPTConfig) -> TrainConfig:
    """The configuration of a run that goes on from a checkpoint of that shape; ValueError where it
    asks for another one.

    What was asked for is what the nearest preset does not have. A preset's context is a default,
    and shrinks to what the checkpoint has; the tokenizer is the checkpoint's, unless named.
    """

    def distance(preset: TrainConfig) -> int:
        return sum(getattr(preset, name) != getattr(config, name) for name in ("context", *SHAPE))

    nearest = min((TrainConfig(), *(make() for make in PRESETS.values())), key=distance)
    faults = []
    for name in SHAPE:
        asked, has = getattr(config, name), getattr(shape, name)
        if asked not in (has, getattr(nearest, name)):
            faults.append(f"{name} is {asked}, where {config.init} has {has}")
    if faults:
        raise ValueError(f"{'; '.join(faults)}: a checkpoint keeps its shape, so leave that out")
    if config.context == nearest.context:
        config = replace(config, context=min(config.context, shape.context))
    return replace(config, tokenizer=config.init) if config.tokenizer == "char" else config


def _taken_up(config: TrainConfig, data: Data, shape: GPTConfig) -> GPTConfig:
    """The checkpoint's shape, with room for the tokens that its tokenizer was given; ValueError
    where it does not take the data's tokens or lengths."""
    words = data.vocabulary
    check_vocabulary(words.size - words.added, shape.vocab_size, config.init)
    if config.context > shape.context:
        raise ValueError(
            f"context is {config.context}; {config.init} has one of {shape.context}, so set it to "
            "at most that"
        )
    return replace(shape, vocab_size=max(shape.vocab_size, words.size))


# Of ln V, the loss of a guess: what is not below knows nothing. Weights that overflowed give logits
# of 0, and ln V as it was rounded.
KNOWS_NOTHING = 0.9999


class Stop:
    """Set by SIGTERM and by the first Ctrl-C; the loop then saves and ends. (Python hears signals
    in its main thread alone: in another one there is none to set it.)

    A second Ctrl-C interrupts, but not within two seconds: launchers send on to their processes
    what a terminal or Slurm has sent these already.
    """

    def __init__(self):
        self.asked, self.since = False, 0.0

    def __enter__(self):
        heard = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if heard else ()
        self.before = {s: signal.signal(s, self) for s in signals}
        return self

    def __call__(self, number, frame):
        now = time.monotonic()
        if not self.asked:
            self.asked, self.since = True, now
        elif number == signal.SIGINT and now - self.since > 2:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(config: TrainConfig, *, model_folder: Path | None = None) -> Path:
    """Train as the configuration says; returns the model's folder, by default `config.out`.

    `config.out` then holds the model (a Hugging Face folder), run.json and train/: metrics.jsonl,
    samples.jsonl and checkpoints/. ValueError for a configuration that cannot be, and where the
    disk is full; `Diverged`, a ValueError too, where the loss stops being finite.
    """
    config = replace(config, out=Path(config.out))
    config.check()
    check_trackers(config.trackers)
    given = hub.load_config(config.init) if config.init else None
    if given is None:
        model_config(config, 1)  # a shape that cannot be is told before the data are read
        data = load_data(config)
        shape = model_config(config, data.vocabulary.size)
    else:
        config = _given(config, given)
        data = load_data(config)
        shape = _taken_up(config, data, given)
        config = replace(config, **{name: getattr(shape, name) for name in SHAPE})
    with Stop() as stop, ExitStack() as held:
        return _Run(config, data, shape, stop, held, model_folder or config.out).go()


class _Run:
    """A run and its state.

    That is the step, the weights and their average, the optimizer's and the scaler's state, and
    the loss since the last row of metrics. Data are functions of the step and nothing in a step
    draws a random number, so there is no loader and no random state to keep.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        shape: GPTConfig,
        stop: Stop,
        held: ExitStack,
        model_folder: Path,
    ):
        """held: closed when the run is over, it gives back the folder and memory."""
        self.config, self.data, self.shape, self.stop = config, data, shape, stop
        processes = process_state()
        self.ranks, self.rank = processes.num_processes, processes.process_index
        self.main = processes.is_main_process
        device = torch.device(processes.device or "cpu")
        rows = config.batch_size // config.accumulation
        if rows % self.ranks:
            raise ValueError(
                f"batch_size {config.batch_size} over {config.accumulation} micro-batches gives "
                f"{rows} rows, which {self.ranks} processes cannot share evenly"
            )
        if config.compile and device.type == "cpu" and not cpp_compiler():
            raise ValueError(
                "compile needs a C++ compiler and there is none (g++, clang++, or what CXX names); "
                "say --no-compile"
            )
        if config.precision == "fp16" and device.type == "cpu":
            raise ValueError("precision is fp16, which needs a GPU; say bf16, fp32 or auto")
        sharded = wants_shards(config)
        self.out, self.folder, self.model_folder = config.out, config.out / "train", model_folder
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep)
        shards = shard_count(config, self.ranks)
        check_free(config, shape, device, ranks=self.ranks, shards=shards)
        state = self._claim(held)
        # Measured once a run: not anew where it goes on, and not by each process for itself.
        if state:
            precision = state["precision"]
        else:
            precision = choose_precision(
                config.precision, device, shape.n_embd, shape.n_inner, rows * config.context
            )
            [precision] = broadcast_object_list([precision])
        if device.type == "cpu":
            held.enter_context(keep_memory())
        self.precision = precision
        self.accelerator = build_accelerator(config, precision, sharded=sharded)
        self.sharded = self.accelerator.is_fsdp2
        set_seed(config.seed)
        if config.init and not state:
            given = hub.load(config.init, dtype=torch.float32)
            self.raw = self._model(given.grow_vocabulary(shape.vocab_size).train())
        else:
            self.raw = self._model(GPT(shape))
        optimizer = build_optimizer(self.raw, config)
        if config.recompute:
            for block in self.raw.layers:
                block.forward = partial(
                    recomputed, block.forward, use_reentrant=False, preserve_rng_state=False
                )
        model = self.raw
        if config.compile and not self.sharded:
            model = torch.compile(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if config.compile and self.sharded:  # FSDP2 shards modules, not what they compile to
            self.model = torch.compile(self.model)
        # Processes agree through their hosts' memory: to ask a device would wait for it.
        self.hosts = distributed.new_group(backend="gloo") if self.ranks > 1 else None
        self.average = Average(self.raw, config.ema) if config.ema else None
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        # The loss since the last row of metrics, and that row's step.
        self.loss_sum, self.logged = torch.zeros((), device=self.accelerator.device), 0
        self.calibrated = -1  # the step that a verifier was last calibrated after
        if state:
            self._restore(state)
        self.first_step = self.step
        for file in (self.metrics, self.samples):
            self._write(partial(forget_after, file, self.step))
        self.peak = peak_flops(self.accelerator.device, DTYPE[precision]) * self.ranks
        head = 2 * shape.n_embd * shape.vocab_size if config.verifier else 0  # which that lacks
        self.flops = 3 * (shape.flops_per_token(config.context) - head)  # backward: two forwards
        self.first_bad = torch.tensor(config.steps + 1, device=self.accelerator.device)
        start_trackers(self.accelerator, config, self.step)

    def _model(self, gpt: GPT) -> GPT | Verifier:
        """What is trained: a GPT, or the verifier that it becomes."""
        return Verifier(gpt, reading(self.data.sources)) if self.config.verifier else gpt

    def _claim(self, held: ExitStack) -> dict[str, Any] | None:
        """Claim the folder; the state to go on from, or None where the run begins."""

        def claimed() -> int | None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(alone_in(self.folder))
                known = read_run(self.out) if (self.out / "run.json").exists() else {}
                if "train" not in known and (self.model_folder / "config.json").exists():
                    raise ValueError(
                        f"{self.model_folder} holds a model that no run of ponder left; take "
                        "another --out"
                    )
                # Data that changed since the run began would make another run of it.
                identity = self.config.identity() | {"data_fingerprint": self.data.fingerprint}
                try:
                    open_run(self.out, "train", identity, resume=self.config.resume)
                except ValueError as error:
                    steps = known.get("train", {}).get("configuration", {}).get("steps")
                    if steps in (None, self.config.steps):
                        raise
                    raise ValueError(
                        f"{error}; --init {self.model_folder} with another --out goes on from its "
                        "weights"
                    ) from None
                return self.checkpoints.newest() if self.config.resume else None
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(
                    f"{self.out} cannot be written to: {reason}; take another --out"
                ) from None

        # The main process alone looks at checksums; all take the same checkpoint, or none.
        step = main_alone(claimed)
        return None if step is None else self.checkpoints.load(step)

    def _restore(self, state: dict[str, Any]) -> None:
        scatter(self.raw, self.optimizer.optimizer, state)
        if self.average is not None:
            with self.average.shown():
                scatter_weights(self.raw, state["average"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.logged = state["logged"]

    def go(self) -> Path:
        config = self.config
        # What auto came to.
        self._write(lambda: note(self.out, "train", {"precision": self.precision}))
        if self.step == config.steps and main_alone(self._model_is_gone):
            self._save()
        with ExitStack() as stack:
            self.view = stack.enter_context(View(config.steps, self.step, enabled=self.main))
            ahead = stack.enter_context(ThreadPoolExecutor(1))
            self.view.say(
                f"{self.raw.parameter_count / 1e6:.2f}M parameters, context {config.context}, "
                f"{self.precision}, {self.accelerator.device}, {self.ranks} process(es)"
                f"{', sharded' if self.sharded else ''} → {self.out}"
            )
            new = (TrainConfig.lr, TrainConfig.matrix_lr)
            if config.init and not config.verifier and (config.lr, config.matrix_lr) == new:
                self.view.say(
                    f"the learning rates are those of new models; {config.init}, if it is good "
                    "already, learns more at lower ones, as --optimizer adamw --lr 1e-4"
                )
            self.clock = time.perf_counter(), self.tokens
            batch = ahead.submit(self.data.batch, self.step)
            while self.step < config.steps and not self._stop_agreed():
                rows = batch.result()
                batch = ahead.submit(self.data.batch, self.step + 1)
                loss, norm = self._update(rows)
                self._note_if_bad(loss, norm)
                self.loss_sum += loss
                self.step += 1
                self.tokens += int(rows.lengths().sum())
                self.view.step()
                evaluate, save = self._due(config.eval_every), self._due(config.save_every)
                if (config.log_every and self.step % config.log_every == 0) or evaluate or save:
                    self._log(norm, evaluate)
                    if save:
                        self._save()
                    # Evaluating and saving is not training: the clock starts again after it.
                    self.clock = time.perf_counter(), self.tokens
            if self.step < config.steps:
                self._check_finite()
                self.seconds += time.perf_counter() - self.clock[0]
                self._save()
                again = "the same command" if config.resume else "--resume"
                self.view.say(
                    f"stopped after step {self.step} of {config.steps}; {again} goes on from there"
                )
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.model_folder

    def _model_is_gone(self) -> bool:
        return not any(self.model_folder.glob("*.safetensors"))

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or bool(every) and self.step % every == 0

    def _stop_agreed(self) -> bool:
        """Whether any process was asked to stop: all leave the loop at the same step."""
        flag = torch.tensor(self.stop.asked, dtype=torch.int32)
        if self.hosts is not None:
            distributed.all_reduce(flag, group=self.hosts)
        return bool(flag)

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return cast(torch.Tensor, self.accelerator.reduce(x, "sum"))

    def _update(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on the global batch; (mean loss, gradient norm), on the device."""
        config, accelerator = self.config, self.accelerator
        self.optimizer.optimizer.set_rate(config.rate(self.step))
        # Normalized by the tokens of the whole batch, not by micro-batches or processes.
        total = int((batch.targets != IGNORE).sum())
        if not total:
            raise ValueError(
                f"nothing in the batch of step {self.step + 1} is to be learned; a larger batch "
                "or a longer context would hold something"
            )
        loss_sum = torch.zeros((), device=accelerator.device)
        rows = len(batch.tokens) // config.accumulation
        for i in range(config.accumulation):
            part = self._share(batch, i * rows, (i + 1) * rows)
            last = i == config.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.model(*part, reduction="sum") / total
                # Several processes average their gradients; the sum is what is meant.
                accelerator.backward(loss * self.ranks)
                loss_sum += loss.detach()
        if self.step == self.first_step:
            without = [name for name, p in self.raw.named_parameters() if p.grad is None]
            assert not without, f"no gradient reaches {', '.join(without)}"
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.step)
        return self._total(loss_sum), norm

    def _clip(self) -> torch.Tensor:
        """Shorten the gradient to `config.clip`; the norm that it had."""
        limit = self.config.clip or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        assert norm is not None  # None is for pipelines alone
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _share(self, batch: Batch, start: int = 0, stop: int | None = None) -> Batch:
        """This process's part of these rows, on its device, with little padding.

        Where there are fewer rows than processes, the last ones get a row without a target: every
        process takes part in every forward pass.
        """
        rows = slice(start + self.rank, stop, self.ranks)
        idle = not len(batch.tokens[rows])
        if idle:
            rows = slice(1)
            batch = batch._replace(targets=torch.full_like(batch.targets, IGNORE))
        device = self.accelerator.device

        def moved(x: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda":  # from other memory a copy waits for the device
                x = x.contiguous().pin_memory()
            return x.to(device, non_blocking=True)

        return compacted(batch.each(lambda x: x[rows])).each(moved)

    def _note_if_bad(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Keep the first step that went wrong, without waiting for the device."""
        fine = torch.isfinite(loss)
        if self.accelerator.scaler is None:  # which leaves out a step whose gradient overflowed
            fine &= torch.isfinite(norm)
        bad = self.first_bad.clamp_max(self.step + 1)
        self.first_bad = torch.where(fine, self.first_bad, bad)

    def _check_finite(self) -> None:
        """Before anything is told or kept of a step."""
        bad = int(self.first_bad)
        if bad > self.config.steps and self._weights_are_bad():
            bad = self.step
        if bad <= self.config.steps:
            kept = "the last good checkpoint is kept"
            raise Diverged(
                f"the loss, its gradient or a weight at step {bad} is not finite; "
                f"{kept if self.checkpoints.steps() else 'nothing was saved yet'}; "
                "try a lower lr or matrix_lr, or another precision"
            )

    def _weights_are_bad(self) -> bool:
        """Whether the last update left one that is not finite, of which no loss knows yet.

        Told from their norm, in a few passes: weights of 1e19 and more would count, too.
        """
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in self.raw.parameters())
        norm = torch.nn.utils.get_total_norm([p.detach() for p in parts])
        return bool(self._total((~norm.isfinite()).float()))

    def _shown(self) -> AbstractContextManager[None]:
        """The weights that are evaluated and saved as the model: the averaged ones, if any."""
        return nullcontext() if self.average is None else self.average.shown()

    def _whole(self) -> Any:
        """The model with every weight, on the main process; None elsewhere."""
        return whole_model(
            self.raw, lambda: self._model(GPT(self.shape)), sharded=self.sharded, main=self.main
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float | None]:
        """{"val_loss": mean over the validation tokens, in nats}, and how good a verifier is."""
        self.model.eval()
        sums = torch.zeros(2, device=self.accelerator.device, dtype=torch.float64)
        judged: list[tuple[float, int, int]] = []  # logit, label, batch
        with self._shown():
            for number, batch in enumerate(self.data.validation()):
                part = self._share(batch)
                there = part.targets != IGNORE
                sums[1] += there.sum()
                if self.config.verifier:
                    logits = self.model(part.tokens, segment_ids=part.segment_ids)
                    sums[0] += verifier_loss(logits, part.targets).double()
                    pairs = zip(logits[there].tolist(), part.targets[there].tolist(), strict=True)
                    judged += [(logit, label, number) for logit, label in pairs]
                else:
                    sums[0] += self.model(*part, reduction="sum").double()
        self.model.train()
        total, count = self._total(sums).tolist()
        figures: dict[str, float | None] = {"val_loss": total / count}
        if self.config.verifier:
            logits, labels, number = np.array(gather_object(judged)).T
            from .calibration import calibrate  # SciPy takes a second to import

            self.calibration = calibrate(logits, labels, number % 2 == 0)
            self.calibrated = self.step
            facts = self.calibration._asdict()
            figures |= {name: facts[name] for name in ("auc", "calibration_error")}
        return figures

    def _sample(self) -> None:
        """Let the model write; train/samples.jsonl keeps it."""
        samples = []
        with self._shown():
            model = self._whole()
            if model is not None:
                samples = write_samples(model, self.data, self.config.samples)
        rows = [{"step": self.step} | sample for sample in samples]
        self._write(lambda: append_rows(self.samples, rows))
        self.view.samples(samples)

    def _log(self, norm: torch.Tensor, evaluate: bool) -> None:
        """A row of metrics on what was done since the last one."""
        self._check_finite()
        elapsed = time.perf_counter() - self.clock[0]
        self.seconds += elapsed
        rate = (self.tokens - self.clock[1]) / elapsed
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "train_loss": self.loss_sum.item() / (self.step - self.logged),
            **(self._evaluate() if evaluate else {"val_loss": None}),
            "lr": self.optimizer.param_groups[-1]["lr"],  # Muon's is as far along its own
            "grad_norm": norm.item(),
            "tokens_per_second": round(rate, 1),
            "mfu": round(rate * self.flops / self.peak, 4),
        }
        self.loss_sum.zero_()
        self.logged = self.step
        self._write(lambda: append_rows(self.metrics, [row]))
        self.view.row(row)
        if evaluate and self.config.samples and not self.config.verifier:
            self._sample()
        if self.step == self.config.steps and not self.config.verifier:
            guessing = math.log(self.shape.vocab_size)
            if not row["val_loss"] < KNOWS_NOTHING * guessing:  # NaN too
                self.view.say(
                    f"warning: the validation loss, {row['val_loss']:.4g}, is not below that of "
                    f"guessing, ln {self.shape.vocab_size} = {guessing:.4g}: the training diverged "
                    "or hardly began; try a lower lr and matrix_lr, or more steps"
                )
        self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=self.step)

    def _save(self) -> None:
        """The model's folder, then the checkpoint: killed between them, the run does both again."""
        average = None
        if self.config.verifier and self.calibrated != self.step:
            self._evaluate()
        with self._shown():
            model = self._whole()  # used by the main process, which has it
            self._write(lambda: self._save_model(model))
            if self.average is not None:
                average = {name: w.clone() for name, w in gather_weights(self.raw).items()}
        scaler = self.accelerator.scaler
        state = gather(self.raw, self.optimizer.optimizer) | {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "precision": self.precision,
            "average": average,
            "scaler": None if scaler is None else scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "logged": self.logged,
        }
        self._write(lambda: self.checkpoints.save(self.step, state))

    def _save_model(self, model: Any) -> None:
        words = self.data.vocabulary
        folder: dict[str, Any] = dict(
            path=self.model_folder, tokenizer=words.tokenizer, eos=words.eos
        )
        if not self.config.verifier:
            hub.save(model, **folder, bos=words.bos, template=self.data.template)
            return
        found = self.calibration
        save_verifier(model, **folder, scale=found.scale, shift=found.shift)
        note(self.out, "train", {"verifier": {"step": self.step} | found._asdict()})

    def _write(self, action: Callable[[], Any]) -> None:
        """Let the main process write; where it cannot, all processes end with one sentence."""

        def attempt() -> None:
            try:
                action()
            except (OSError, SafetensorError) as error:
                steps = self.checkpoints.steps()
                kept = "nothing was saved yet"
                if steps:
                    kept = f"the checkpoint of step {steps[-1]} is kept, make room and say --resume"
                reason = getattr(error, "strerror", None) or error
                raise ValueError(
                    f"{self.out} cannot be written to after step {self.step}: {reason}; {kept}"
                ) from None

        main_alone(attempt)
