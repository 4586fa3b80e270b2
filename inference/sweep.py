"""A sweep: samples of a model on a task at every budget, kept in a store, evaluated, reported."""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from .. import tasks
from ..models import hub
from ..models.gpt import GPT
from ..provenance import open_run, read_run
from .config import SweepConfig
from .decoder import bf16_pays
from .engine import LocalEngine, Request, Sample, SamplingParams
from .evaluation import evaluate
from .report import write_report
from .store import Key, Record, Store, params_text

SPLIT = "test"
GREEDY = SamplingParams(temperature=0.0)
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEEP_EVERY_SECONDS = 2.0  # at most this much sampling is lost when a sweep is killed


def model_hash(folder: Path) -> str:
    """What the model is, whatever its folder is called: a hash of configuration and weights."""
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer.json")
    for path in sorted([folder / n for n in names] + list(folder.glob("*.safetensors"))):
        if path.exists():
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:16]


class Speaker:
    """A model with its tokenizer and its special tokens: text in, samples out.

    precision is fp32, bf16, or auto: bf16 on a GPU, and on a CPU where it is measured to be faster.
    """

    def __init__(self, path: str, *, slots: int, precision: str = "auto"):
        self.folder = Path(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: GPT = hub.load(path, device=device, dtype=torch.float32)
        self.model.eval()
        if precision == "auto":
            bf16 = device == "cuda" or bf16_pays(self.model, slots)
            precision = "bf16" if bf16 else "fp32"
        self.precision, dtype = precision, DTYPE[precision]
        if device == "cuda":
            self.model.to(dtype)
        self.tokenizer: Tokenizer = hub.load_tokenizer(path)
        self.think = self._token("<think>")
        self.think_end = self._token("</think>")
        self.eos = self._token("<eos>")
        self.engine = LocalEngine(
            self.model,
            slots=slots,
            eos=self.eos,
            think_end=self.think_end,
            device=device,
            dtype=dtype,
        )

    def _token(self, text: str) -> int:
        token = self.tokenizer.token_to_id(text)
        if token is None:
            raise ValueError(
                f"the tokenizer of {self.folder} has no {text} token; budgets of thinking need a "
                "model that was trained with <think>, </think> and <eos>"
            )
        return token

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The prompt with <think> behind it; ValueError for what the vocabulary cannot say."""
        if not prompt:
            raise ValueError("the prompt is empty; there is nothing to answer")
        encoding = self.tokenizer.encode(prompt)
        unknown = self.tokenizer.token_to_id("<unk>")
        if unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            raise ValueError(
                f"the prompt has {prompt[start:end]!r}, which the tokenizer of {self.folder} "
                "does not know"
            )
        return (*encoding.ids, self.think)

    def text(self, sample: Sample) -> str:
        """The completion with its <think> and without <eos>."""
        tokens = list(sample.tokens)
        if tokens and tokens[-1] == self.eos:
            tokens.pop()
        return "<think>" + self.tokenizer.decode(tokens, skip_special_tokens=False)

    def room(self, prompt_tokens: int) -> int:
        """The new tokens that the context leaves; ValueError where it leaves none."""
        room = self.model.config.context - prompt_tokens
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens with <think>; the model's context of "
                f"{self.model.config.context} leaves room for at most "
                f"{self.model.config.context - 1}"
            )
        return room


def sweep(config: SweepConfig) -> Path:
    """Sample what the store lacks, evaluate, write the report; returns its page.

    Every finished sample is kept within seconds: a sweep that was killed goes on where it was
    (`resume`) and ends with the same samples.
    """
    config.check()
    task = tasks.get(config.task)
    precision = config.precision
    if precision == "auto" and config.resume and (config.out / "run.json").exists():
        # What was measured when the sweep began, not what a busier moment would say.
        before = read_run(config.out).get("sweep", {}).get("configuration", {})
        precision = before.get("precision", "auto")
    speaker = Speaker(config.model, slots=config.slots, precision=precision)
    problems = task.problems(SPLIT, config.problems, config.seed)
    prompts = [speaker.encode(p.prompt) for p in problems]
    room = speaker.room(max(map(len, prompts)))
    # A budget needs room for itself, </think> and an answer of one token at least.
    largest = max(config.budgets, default=0)
    if largest + 2 > room:
        raise ValueError(
            f"a budget of {largest} does not fit: prompts of up to {max(map(len, prompts))} tokens "
            f"in a context of {speaker.model.config.context} leave room for {room - 2}"
        )
    identity = {k: v for k, v in asdict(config).items() if k not in ("out", "resume", "slots")}
    identity |= {"model_hash": model_hash(speaker.folder), "precision": speaker.precision}
    open_run(config.out, "sweep", identity, resume=config.resume)
    folder = config.out / "sweep"
    folder.mkdir(exist_ok=True)
    store = Store(
        folder / "samples.sqlite",
        identity={
            "model": identity["model_hash"],
            "task": config.task,
            "split": SPLIT,
            "precision": speaker.precision,
        },
    )
    with store:
        store.add_problems(problems)
        sampled = SamplingParams(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        wanted = []
        for params, samples in ((GREEDY, 1), (sampled, max(config.samples))):
            keys = store.missing(
                problems=range(len(problems)),
                budgets=[*config.budgets, None],
                params=params_text(params),
                seed=config.seed,
                samples=samples,
            )
            wanted += [(key, params) for key in keys]
        # A problem's samples side by side, so that they share one prefill.
        wanted.sort(key=lambda pair: pair[0].problem)
        requests = (
            Request(
                prompt=prompts[key.problem],
                params=SamplingParams(
                    temperature=params.temperature,
                    top_k=params.top_k,
                    top_p=params.top_p,
                    min_p=params.min_p,
                    max_tokens=room,
                    budget=key.budget,
                ),
                seed=config.seed,
                index=key.sample,
                key=key,
            )
            for key, params in wanted
        )
        finished: list[Sample] = []
        kept = time.monotonic()
        with tqdm(total=len(wanted), unit="sample", dynamic_ncols=True) as bar:
            try:
                for sample in speaker.engine.generate(requests):
                    finished.append(sample)
                    if time.monotonic() - kept > KEEP_EVERY_SECONDS:
                        store.add(_record(s, speaker, task, problems) for s in finished)
                        bar.update(len(finished))
                        finished, kept = [], time.monotonic()
            finally:  # also when sampling was interrupted: what is finished is kept
                store.add(_record(s, speaker, task, problems) for s in finished)
                bar.update(len(finished))
        results = evaluate(
            store,
            shape=speaker.model.config,
            samples=config.samples,
            seed=config.seed,
            model=config.model,
        )
        return write_report(
            config.out / "report", results, store, run=read_run(config.out)["sweep"]
        )


def redraw(folder: Path) -> Path:
    """Write the report of a sweep again from its stored samples; returns its page."""
    runs = read_run(folder)
    if "sweep" not in runs:
        raise ValueError(f"{folder} holds no sweep; its run.json knows {', '.join(runs)}")
    configuration = runs["sweep"]["configuration"]
    model = Path(configuration["model"])
    with Store(folder / "sweep" / "samples.sqlite", identity=None) as store:
        results = evaluate(
            store,
            shape=hub.load_config(model) if model.is_dir() else None,
            samples=configuration["samples"],
            seed=configuration["seed"],
            model=str(model),
        )
        return write_report(folder / "report", results, store, run=runs["sweep"])


def _record(
    sample: Sample, speaker: Speaker, task: tasks.Task, problems: list[tasks.Problem]
) -> Record:
    key: Key = sample.request.key
    text = speaker.text(sample)
    tokens = sample.tokens
    end = speaker.think_end
    return Record(
        key=key,
        text=text,
        answer=task.answer(text),
        correct=task.verify(problems[key.problem], text),
        prompt_tokens=len(sample.request.prompt),
        sampled_tokens=sample.sampled_tokens,
        forced_tokens=sample.forced_tokens,
        think_tokens=tokens.index(end) if end in tokens else len(tokens),
        logprob=sample.logprob,
        finish=sample.finish,
        seconds=sample.seconds,
    )
