"""The training loop: for each step forward, loss, backward, update; then evaluate, save, log."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from tqdm import tqdm

from ..models import GPT, GPTConfig, hub
from ..provenance import open_run
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import IGNORE, Batch, Data, load_data
from .hardware import choose_precision, peak_flops
from .optimizer import build_optimizer

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(ValueError):
    """The loss is no number any more."""


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    names = "context n_layer n_head n_kv_head head_dim n_embd n_inner gated activation qk_norm"
    fields = {name: getattr(config, name) for name in (*names.split(), "tie_embeddings")}
    return GPTConfig(vocab_size=vocab_size, **fields)


def _cpp_compiler() -> str | None:
    """Where the compiler is that torch.compile would take on a CPU."""
    names = os.environ.get("CXX", ""), "g++", "clang++"
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Stop:
    """Set by SIGTERM and by the first Ctrl-C; the loop then saves and ends."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __call__(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(config: TrainConfig, *, model_folder: Path | None = None) -> Path:
    """Train as the configuration says; returns the model's folder, by default `config.out`.

    `config.out` then holds the model (a Hugging Face folder), train/metrics.jsonl,
    train/checkpoint.pt and run.json. ValueError for a configuration that cannot be; `Diverged`, a
    ValueError too, where the loss stops being finite.
    """
    config.check()
    data = load_data(config)
    vocab_size = data.tokenizer.get_vocab_size()
    shape = model_config(config, vocab_size)
    identity = {k: v for k, v in asdict(config).items() if k not in ("out", "resume")}
    with Stop() as stop:
        run = _Run(config, data, shape, identity, stop)
        run.model_folder = model_folder or config.out
        return run.go()


class _Run:
    def __init__(
        self, config: TrainConfig, data: Data, shape: GPTConfig, identity: dict, stop: Stop
    ):
        self.config, self.data, self.stop = config, data, stop
        # Said in so many words: accelerate runs several processes on CPUs only where it is told.
        cpu = not torch.accelerator.is_available()
        processes = PartialState(cpu=cpu)
        self.ranks, self.rank = processes.num_processes, processes.process_index
        device = torch.device(processes.device or "cpu")
        rows = config.batch_size // config.accumulation
        if rows % self.ranks:
            raise ValueError(
                f"batch_size {config.batch_size} over {config.accumulation} micro-batches gives "
                f"{rows} rows, which {self.ranks} processes cannot share evenly"
            )
        if config.compile and device.type == "cpu" and not _cpp_compiler():
            raise ValueError(
                "compile needs a C++ compiler and there is none (g++, clang++, or what CXX names); "
                "say --no-compile"
            )
        self.out, self.folder = config.out, config.out / "train"
        self.model_folder = self.out
        if processes.is_main_process:
            open_run(self.out, "train", identity, resume=config.resume)
            self.folder.mkdir(exist_ok=True)
        processes.wait_for_everyone()
        self.checkpoint = self.folder / "checkpoint.pt"
        # None where nothing was written yet: the run then goes on from the beginning.
        state = None
        if config.resume and self.checkpoint.exists():
            state = load_checkpoint(self.checkpoint)
        # Measured once a run: not anew where it goes on, and not by each process for itself.
        if state:
            precision = state["precision"]
        else:
            precision = choose_precision(
                config.precision, device, shape.n_embd, shape.n_inner, rows * config.context
            )
            [precision] = broadcast_object_list([precision])
        self.precision = precision
        mixed = "no" if precision == "fp32" else precision
        AcceleratorState._reset_state()  # an earlier run in this process may have had another
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=mixed)
        set_seed(config.seed)
        self.raw = GPT(shape)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        optimizer = build_optimizer(self.raw, config)
        model = torch.compile(self.raw) if config.compile else self.raw
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if config.resume:
            self._restore(state)
        self.peak = peak_flops(self.accelerator.device, DTYPE[precision]) * self.ranks
        self.flops = 3 * shape.flops_per_token(config.context)  # backward costs two forwards
        self.first_bad = torch.tensor(config.steps, device=self.accelerator.device)

    def _restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, and forget the metrics of what comes after it."""
        if state:
            self.raw.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        metrics = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process and metrics.exists():
            lines = metrics.read_text().splitlines(keepends=True)
            kept = [s for s in lines if s.endswith("\n") and json.loads(s)["step"] <= self.step]
            metrics.write_text("".join(kept))

    def go(self) -> Path:
        config = self.config
        say = self.accelerator.print
        say(
            f"{self.raw.parameter_count / 1e6:.2f}M parameters, {self.precision}, "
            f"{self.accelerator.device}, {self.ranks} process(es) → {self.out}"
        )
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            unit="step",
            dynamic_ncols=True,
        )
        logged = time.perf_counter(), self.tokens, self.step
        loss_sum = torch.zeros((), device=self.accelerator.device)
        with ThreadPoolExecutor(1) as ahead, bar:
            batch = ahead.submit(self.data.batch, self.step)
            while self.step < config.steps and not self._stop_agreed():
                rows = batch.result()
                batch = ahead.submit(self.data.batch, self.step + 1)
                loss, norm = self._update(rows)
                self.first_bad = torch.where(
                    torch.isfinite(loss), self.first_bad, self.first_bad.clamp_max(self.step + 1)
                )
                loss_sum += loss
                self.step += 1
                self.tokens += rows.tokens.numel()
                bar.update()
                last = self.step == config.steps
                evaluate = last or (config.eval_every and self.step % config.eval_every == 0)
                save = last or (config.save_every and self.step % config.save_every == 0)
                if (config.log_every and self.step % config.log_every == 0) or evaluate or save:
                    self._check_finite()
                    now = time.perf_counter()
                    elapsed = now - logged[0]
                    self.seconds += elapsed
                    rate = (self.tokens - logged[1]) / elapsed
                    row = {
                        "step": self.step,
                        "tokens": self.tokens,
                        "seconds": round(self.seconds, 3),
                        "train_loss": loss_sum.item() / (self.step - logged[2]),
                        "val_loss": self._evaluate() if evaluate else None,
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "grad_norm": norm.item(),
                        "tokens_per_second": round(rate, 1),
                        "mfu": round(rate * self.flops / self.peak, 4),
                    }
                    self._log(row, bar)
                    if save:
                        self._save()
                    # Evaluating and saving is not training: the clock starts again after it.
                    logged = time.perf_counter(), self.tokens, self.step
                    loss_sum.zero_()
        if self.step < config.steps:
            self._check_finite()
            self.seconds += time.perf_counter() - logged[0]
            self._save()
            say(f"stopped after step {self.step} of {config.steps}; --resume goes on from there")
        return self.model_folder

    def _stop_agreed(self) -> bool:
        """Whether any process was asked to stop: all leave the loop at the same step."""
        if self.ranks == 1:
            return self.stop.asked
        flag = torch.tensor(float(self.stop.asked), device=self.accelerator.device)
        return bool(self._total(flag))

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return cast(torch.Tensor, self.accelerator.reduce(x, "sum"))

    def _update(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on the global batch; (mean loss, gradient norm), on the device."""
        config, accelerator = self.config, self.accelerator
        self.optimizer.optimizer.set_rate(config.rate(self.step))
        # Normalized by the tokens of the whole batch, not by micro-batches or processes.
        total = int((batch.targets != IGNORE).sum())
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
        limit = config.clip or float("inf")
        norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        assert norm is not None  # None is for pipelines alone
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._total(loss_sum), norm

    def _share(self, batch: Batch, start: int = 0, stop: int | None = None) -> Batch:
        """This process's part of these rows, on its device."""
        share = slice(start + self.rank, stop, self.ranks)

        def part(x: torch.Tensor) -> torch.Tensor:
            return x[share].to(self.accelerator.device, non_blocking=True)

        segment_ids = None if batch.segment_ids is None else part(batch.segment_ids)
        return Batch(part(batch.tokens), part(batch.targets), segment_ids)

    def _check_finite(self) -> None:
        bad = int(self.first_bad)
        if bad < self.config.steps:
            kept = "the last good checkpoint is kept" if self.checkpoint.exists() else ""
            raise Diverged(
                f"the loss of step {bad} is not finite; {kept or 'nothing was saved yet'}; "
                "try a lower lr or matrix_lr, or another precision"
            )

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean loss over the validation tokens, in nats."""
        self.model.eval()
        sums = torch.zeros(2, device=self.accelerator.device, dtype=torch.float64)
        for batch in self.data.validation():
            part = self._share(batch)
            if len(part.tokens):
                sums[0] += self.model(*part, reduction="sum").double()
                sums[1] += (part.targets != IGNORE).sum()
        self.model.train()
        total, count = self._total(sums).tolist()
        return total / count

    def _log(self, row: dict[str, Any], bar: tqdm) -> None:
        if not self.accelerator.is_main_process:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {
            "loss": f"{row['train_loss']:.4f}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "MFU": f"{row['mfu']:.1%}",
        }
        if row["val_loss"] is not None:
            self.accelerator.print(
                f"\nstep {row['step']}: val loss {row['val_loss']:.4f}, {row['seconds']:.0f} s"
            )
        bar.set_postfix(shown)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "precision": self.precision,
                "model": self.raw.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_checkpoint(self.checkpoint, state)
            hub.save(self.raw, self.model_folder, tokenizer=self.data.tokenizer)
        self.accelerator.wait_for_everyone()
