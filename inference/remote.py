"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted one.

Without thinking budgets a sample is one chat completion. A budget needs the model's own text to be
continued, which no two chat endpoints do alike: prompts are then rendered here, by the chat
template of the model's tokenizer, and go as tokens to the completions endpoint, first for the
thinking (up to the budget, or to </think>), then for the answer behind it.
"""

import queue
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from ..models import GPTConfig, hub
from .chat import (
    THINK,
    THINK_END,
    ChatTokenizer,
    check_text,
    known_shape,
    printable,
    thoughtful,
)
from .config import ServerOptions
from .engine import stream_key
from .server import Answer, Failed, Refused, Server, deltas
from .speaker import Ask, Completion, Watch, room

Show: TypeAlias = Callable[[str], None]

# max_tokens where neither the user nor the server names a bound: it is not sent.
UNBOUNDED = 1 << 40
ENOUGH_PAIRS = 24  # second samples like the first that are no coincidence
# Who serves, as its list of models says, that knows more than OpenAI's parameters.
EXTENDED = ("vllm", "sglang", "llamacpp")
GIVE_UP = 8  # samples in a row (or as many as run at once) that failed: the server is gone


class RemoteSpeaker:
    """A served model: see the module. The URL names it behind #, where the server has several.

    system: a system message. tokenizer: a folder or Hub id with the chat template, by default the
    model's own name; it is loaded where `budgets` or itself is given, and without it only chat is
    spoken. Asks run side by side, `options.concurrency` at a time.

    Raises ValueError for a server that is down, speaks another dialect, or refuses.
    """

    def __init__(
        self,
        url: str,
        options: ServerOptions,
        *,
        system: str | None = None,
        tokenizer: str | None = None,
        budgets: bool = False,
    ):
        url, _, name = url.partition("#")
        self.server = Server(url, options)
        self.name, model = self._served(name)
        self.context = _context(model)
        self.system = system
        self.chat: ChatTokenizer | None = None
        self.shape: GPTConfig | None = None
        if budgets or tokenizer:
            self.chat = self._tokenizer(tokenizer, budgets)
            self.shape = known_shape(self.chat.path)
        self.exact = self.chat is not None or model.get("owned_by") in EXTENDED
        self.identity = {
            "model": f"served as {self.name}",
            "precision": "the server's",
            "dialect": "chat" if self.chat is None else "completions",
        }
        self.failures: Counter[str] = Counter()
        self.clock = _Clock()

    def _served(self, name: str) -> tuple[str, dict[str, Any]]:
        """The model's name, and what the server's list of models says of it."""
        url = self.server.url

        def parse(answer: Any) -> dict[str, Any]:
            try:
                return {str(model["id"]): dict(model) for model in answer["data"]}
            except (KeyError, TypeError, ValueError):
                raise Failed("a garbled answer") from None

        try:
            # Quick to tell that a server is down, yet past a single slip.
            options = self.server.options
            models = self.server.ask(
                "/models",
                None,
                parse,
                retries=min(2, options.retries),
                timeout=min(30.0, options.timeout),
            )
        except Failed as error:
            if error.reason.startswith("HTTP"):
                if name:  # there is a server, and perhaps only its list is broken
                    return name, {}
                raise ValueError(
                    f"{url} fails to list its models ({error.reason}); where it answers prompts "
                    f"all the same, say which model is to, as in --model {url}#NAME"
                ) from None
            if error.reason == "a garbled answer":
                raise ValueError(
                    f"{url} answers /models with something else than a list of models; an "
                    "OpenAI-compatible server is needed, with its whole path, as in "
                    "http://HOST:PORT/v1"
                ) from None
            raise ValueError(f"no server answers at {url}: {error.reason}") from None
        except ValueError as error:
            if not (name and "HTTP 404" in str(error)):  # a few servers have no such list
                raise
            return name, {}
        known = printable(", ".join(list(models)[:8])) or "none"
        if not name and len(models) != 1:
            raise ValueError(
                f"{url} lists {len(models)} models ({known}); say which, as in --model {url}#NAME"
            )
        # These list all that they serve; llama.cpp would answer by any name.
        whole = any(model.get("owned_by") in EXTENDED for model in models.values())
        if name and name not in models and whole:
            raise ValueError(f"{url} serves no model {name!r}; what it serves: {known}")
        name = name or next(iter(models))
        return printable(name), models.get(name, {})

    @property
    def slots(self) -> int:
        return self.server.options.concurrency

    def _tokenizer(self, path: str | None, budgets: bool) -> ChatTokenizer:
        if path is None and not hub.HUB_ID.fullmatch(self.name):
            raise ValueError(
                f"thinking budgets of {self.name} need the chat template of its tokenizer; say "
                "--tokenizer FOLDER or HUB_ID, or leave budgets away (--budgets with no number)"
            )
        return ChatTokenizer(path or self.name, system=self.system, think=budgets)

    def fit(
        self, prompts: Sequence[str], *, budgets: Sequence[int | None], max_tokens: int | None
    ) -> int:
        if not all(prompts):
            raise ValueError("the prompt is empty; there is nothing to answer")
        if self.chat is None:  # only the server knows how long its prompts are
            for prompt in prompts:
                check_text(prompt, "prompt")
            return max_tokens or UNBOUNDED
        if self.context is None and max_tokens is None:
            raise ValueError(
                f"{self.server.url} does not say how long the context of {self.name} is; say "
                "--max-tokens"
            )
        return room(
            max(len(self.chat.encode(prompt)[0]) for prompt in prompts),
            context=self.context or UNBOUNDED,
            budgets=budgets,
            max_tokens=max_tokens,
        )

    def length(self, text: str) -> int:
        return len(self._tokens(text))

    def generate(self, asks: Iterable[Ask], *, watch: Watch | None = None) -> Iterator[Completion]:
        todo: queue.SimpleQueue[Ask | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()

        def work() -> None:
            while (ask := todo.get()) is not None:
                try:
                    done.put(self._answer(ask, watch))
                except BaseException as error:
                    done.put(error)

        self.server.stopped.clear()
        workers = [
            threading.Thread(target=work, daemon=True)  # Ctrl-C waits for no answer
            for _ in range(self.server.options.concurrency)
        ]
        for worker in workers:
            worker.start()
        source = iter(asks)
        under_way = failed_in_a_row = refused = 0
        alike = _Alike()
        refusal: ValueError | None = None
        arrived = False
        fault: BaseException | None = None
        try:
            while True:
                while under_way < 2 * len(workers) and fault is None:
                    ask = next(source, None)
                    if ask is None:
                        break
                    todo.put(ask)
                    under_way += 1
                if not under_way:
                    break
                try:  # not for ever: a signal that a worker's thread got waits for this one to move
                    result = done.get(timeout=1)
                except queue.Empty:
                    continue
                under_way -= 1
                if isinstance(result, Completion):
                    failed_in_a_row, arrived = 0, True
                    alike.see(result)
                    yield result
                elif isinstance(result, Failed | ValueError):
                    refusal = refusal or (result if isinstance(result, ValueError) else None)
                    self.failures[str(result)] += 1
                    # Of this prompt (too long, say); if nothing arrives, of all.
                    if isinstance(result, Refused):
                        refused += 1
                        if refused == GIVE_UP and not arrived:
                            warnings.warn(f"nothing arrived so far: {result}", stacklevel=2)
                    else:
                        failed_in_a_row += 1
                    if failed_in_a_row >= max(GIVE_UP, len(workers)):
                        source = iter(())
                        self.server.stopped.set()  # what is under way gets no further attempt
                else:  # a fault of ours; answers that are on their way are still taken
                    fault = fault or result
            if fault:
                raise fault
            if refusal and not arrived:
                raise refusal
            if alike.all():
                warnings.warn(
                    f"{self.server.url} gave every prompt the same text each time, {alike.pairs} "
                    "times, at a temperature above 0: it seems not to sample",
                    stacklevel=2,
                )
        finally:
            self.server.stopped.set()
            for _ in workers:
                todo.put(None)

    def _answer(self, ask: Ask, watch: Watch | None) -> Completion:
        show = watch and partial(watch, ask)
        start = self.clock.tick(+1)
        try:
            completion = (self._say if self.chat is None else self._think)(ask, show)
        finally:
            end = self.clock.tick(-1)
        return replace(completion, seconds=end - start)

    def _say(self, ask: Ask, show: Show | None) -> Completion:
        """One chat completion; the server renders the prompt."""
        messages = [{"role": "user", "content": ask.prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        stream = stream_key(tuple(ask.prompt.encode()), ask.seed, ask.index)
        body = self._body(ask, ask.params.max_tokens, stream) | {"messages": messages}
        answer = self._ask("/chat/completions", body, show)
        text = thoughtful(answer.text, opened=False)
        thinking = _thinking(text)
        tokens = answer.think_tokens
        if tokens is None:  # by its share of the characters: this server counts no closer
            answered = text.partition(THINK_END)[2] if thinking else text
            written = answer.tokens - (THINK_END in text) - (answer.finish == "stop")
            tokens = round(max(0, written) * len(thinking) / max(1, len(thinking + answered)))
        return Completion(
            ask=ask,
            text=text,
            prompt_tokens=answer.prompt_tokens,
            sampled_tokens=answer.tokens,
            forced_tokens=0,
            think_tokens=tokens,
            logprob=None,
            finish=answer.finish,
            seconds=0.0,
        )

    def _think(self, ask: Ask, show: Show | None) -> Completion:
        """Thinking up to the budget, then the answer behind it; without a budget all at once."""
        assert self.chat
        prompt, opened = self.chat.encode(ask.prompt)
        budget, most = ask.params.budget, ask.params.max_tokens
        if show and opened:
            show(THINK)
        text, tag, sampled, forced = "", "", 0, 0
        if budget is not None:
            closed = False
            if budget:
                part = self._continue(ask, prompt, min(budget, most), show, stop=[THINK_END])
                # A server does not say whether </think> or the end of the text stopped it; either
                # way the thought is over. Some give the stop string with the text.
                text, tag, _ = part.text.partition(THINK_END)
                sampled = part.tokens
                closed = part.finish == "stop"
            if not closed:
                forced = len(self._tokens(THINK_END))
            text += THINK_END
            if show and not tag:  # else it was streamed
                show(THINK_END)
        behind = prompt + self._tokens(text)
        # A thought that was cut inside a character may have more tokens when it is read again.
        left = min(most - sampled - forced, (self.context or UNBOUNDED) - len(behind))
        answer = self._continue(ask, behind, max(1, left), show)
        text = thoughtful(text + answer.text, opened)
        return Completion(
            ask=ask,
            text=text,
            prompt_tokens=len(prompt),
            sampled_tokens=sampled + answer.tokens,
            forced_tokens=forced,
            think_tokens=len(self._tokens(_thinking(text))),
            logprob=None,
            finish=answer.finish,
            seconds=0.0,
        )

    def _tokens(self, text: str) -> tuple[int, ...]:
        assert self.chat
        return tuple(self.chat.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _continue(
        self,
        ask: Ask,
        prompt: tuple[int, ...],
        most: int,
        show: Show | None,
        stop: list[str] | None = None,
    ) -> Answer:
        body = self._body(ask, most, stream_key(prompt, ask.seed, ask.index))
        # A </think> that a tokenizer calls special would be left out of the text, and stop nothing.
        body |= {"prompt": list(prompt), "skip_special_tokens": False}
        body |= {"stop": stop} if stop else {}
        return self._ask("/completions", body, show)

    def _body(self, ask: Ask, most: int, stream: int) -> dict[str, Any]:
        """What both endpoints are told.

        Extensions of the protocol only where they are needed, or known to be understood: what a
        request leaves open llama.cpp takes for min_p 0.05 and top_k 40, vLLM and SGLang for what
        the model's generation_config.json says.
        """
        params = ask.params
        body = {
            "model": self.name,
            "temperature": params.temperature,
            "top_p": params.top_p if params.temperature else 1.0,
            "seed": stream & 0x7FFFFFFF,
        }
        if most < UNBOUNDED:
            body["max_tokens"] = most
        top_k, min_p = (params.top_k, params.min_p) if params.temperature else (0, 0.0)
        if self.exact:
            return body | {"top_k": top_k or -1, "min_p": min_p, "repetition_penalty": 1.0}
        return body | {k: v for k, v in (("top_k", top_k), ("min_p", min_p)) if v}

    def _ask(self, path: str, body: dict[str, Any], show: Show | None) -> Answer:
        if show is None:
            return self.server.ask(path, body, Answer.of)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        thinking, held = False, ""

        def watch(chunk: Any) -> None:
            nonlocal thinking, held
            for reasoning, text in deltas(chunk):
                if reasoning and not thinking:
                    held += THINK
                elif text and not reasoning and thinking:
                    held += THINK_END
                thinking = bool(reasoning)
                ready, held = self.server.guarded(held + reasoning + text)
                show(ready)

        answer = self.server.ask(path, body, Answer.of_chunks, watch=watch)
        show(held)
        # Once more as a whole: an echoed key may have come in pieces.
        return replace(answer, text=self.server.cleaned(answer.text))


def _context(model: dict[str, Any]) -> int | None:
    """The longest context, which vLLM and SGLang tell in one way and llama.cpp in another."""
    meta = model.get("meta")
    found = model.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return found if isinstance(found, int) and found > 0 else None


def _thinking(text: str) -> str:
    """What stands between <think> and </think>, or the end."""
    return text[len(THINK) :].partition(THINK_END)[0] if text.startswith(THINK) else ""


class _Alike:
    """Whether samples of a prompt that were drawn at random are one and the same text: a server may
    ignore the temperature, or answer from a cache."""

    def __init__(self):
        self.first: dict[Any, tuple[int, int]] = {}
        self.pairs = self.same = 0

    def see(self, completion: Completion) -> None:
        params = completion.ask.params
        if params.temperature:
            ask, text = completion.ask, hash(completion.text)
            first, index = self.first.setdefault((ask.prompt, params.budget), (text, ask.index))
            if ask.index != index:  # else it is the first one, or that of a problem of one prompt
                self.pairs += 1
                self.same += text == first

    def all(self) -> bool:
        return self.same == self.pairs >= ENOUGH_PAIRS


class _Clock:
    """Divides time among the answers under way, so that their shares sum to the wall clock's."""

    def __init__(self):
        self._lock = threading.Lock()
        self._active, self._owed, self._last = 0, 0.0, time.perf_counter()

    def tick(self, change: int) -> float:
        """Begins (+1) or ends (-1) an answer; what one that ran all the time would owe."""
        with self._lock:
            now = time.perf_counter()
            self._owed += (now - self._last) / max(1, self._active)
            self._last, self._active = now, self._active + change
            return self._owed
