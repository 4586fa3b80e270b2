"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted one.

Without thinking budgets a sample is one chat completion. A budget needs the model's own text to be
continued, which no two chat endpoints do alike: prompts are then rendered here, by the chat
template of the model's tokenizer, and go as tokens to the completions endpoint, first for the
thinking (up to the budget, or to </think>), then for the answer behind it.

What comes from a server is data: nothing in it is obeyed, and the key is struck out of it.
"""

import http.client
import json
import math
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from ..models import GPTConfig, hub
from .chat import THINK, THINK_END, ChatTokenizer, known_shape, printable, thoughtful
from .config import ServerOptions
from .engine import stream_key
from .speaker import Ask, Completion, Watch, room

Show: TypeAlias = Callable[[str], None]

STRUCK = "[key]"
KEYS = ("PONDER_API_KEY", "OPENAI_API_KEY")
UNBOUNDED = (
    1 << 40
)  # max_tokens where neither the user nor the server names a bound: it is not sent
MOST_BYTES = 1 << 26  # of one answer; more is garbage
LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
PATIENCE = 600.0  # seconds that a server may ask for
GIVE_UP = 8  # samples in a row (or as many as run at once) that failed: the server is gone


class Failed(Exception):
    """An answer that did not come, for a reason that may pass; wait: seconds asked for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Server:
    """The HTTP side: one JSON question, one JSON answer, asked again while there is hope.

    Answers that are late, cut off, garbled, rate-limited (429) or the server's own fault (5xx) are
    asked for again, after waits that double and vary, and never sooner than Retry-After says. The
    key is sent to this server alone: redirects are not followed.
    """

    def __init__(self, url: str, options: ServerOptions):
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                "the model's URL holds a user name, a password or a query; leave them out, and put "
                f"the key into the environment as {KEYS[0]}"
            )
        if not parts.hostname:
            raise ValueError(f"model is {printable(url)!r}; a server is http://HOST:PORT/v1")
        path = parts.path.rstrip("/") or "/v1"
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.options = options
        self.variable = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
        self._key = os.environ[self.variable].strip() if self.variable else ""
        if not re.fullmatch(r"[!-~]*", self._key):
            raise ValueError(f"{self.variable} holds characters that no HTTP header can carry")
        # What is shorter is a placeholder ("EMPTY"), and may be a word of an answer.
        self._secret = self._key if len(self._key) >= 8 else ""
        # A proxy's localhost is not ours.
        near = parts.hostname == "localhost" or parts.hostname.startswith(("127.", "::1"))
        proxies = urllib.request.ProxyHandler({} if near else None)
        self._opener = urllib.request.build_opener(_NoRedirects, proxies)
        self._not_before = 0.0
        self.stopped = threading.Event()

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        parse: Callable[[Any], Any],
        *,
        retries: int | None = None,
        timeout: float | None = None,
        watch: Callable[[Any], None] | None = None,
    ) -> Any:
        """What `parse` makes of the answer; retries and timeout are those of the options.

        watch gets the chunks of a streamed answer; one that broke off after the first is not asked
        for again. Raises Failed after the last attempt, ValueError for an answer that would be the
        same again.
        """
        retries = self.options.retries if retries is None else retries
        timeout = timeout or self.options.timeout
        seen = False

        def watched(chunk: Any) -> None:
            nonlocal seen
            seen = True
            assert watch
            watch(chunk)

        attempt = 0
        while True:
            self._pause(self._not_before - time.monotonic())
            try:
                return parse(self._once(path, body, timeout, watched if watch else None))
            except Failed as error:
                if attempt == retries or error.wait > PATIENCE or seen or self.stopped.is_set():
                    raise
                # Half of the wait is random, so that requests that failed together part.
                wait = min(0.5 * 2 ** min(attempt, 20), LONGEST_WAIT) * random.uniform(0.5, 1)
                if error.wait:  # the server's wish holds for every request
                    self._not_before = max(self._not_before, time.monotonic() + error.wait)
                self._pause(max(wait, error.wait))
            attempt += 1

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            self.stopped.wait(seconds)

    def _once(
        self,
        path: str,
        body: dict[str, Any] | None,
        timeout: float,
        watch: Callable[[Any], None] | None,
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", "User-Agent": "ponder"}
        )
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        deadline = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as response:
                blocks = _blocks(response, deadline)
                if watch is None:
                    return self.cleaned(_json(b"".join(blocks)))
                chunks = []
                for data in _events(blocks):
                    chunks.append(self.cleaned(_json(data)))
                    watch(chunks[-1])
                return chunks
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except TimeoutError:
            raise Failed("timed out") from None
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            raise Failed("timed out" if late else f"no connection ({error.reason})") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Failed(f"broken off ({type(error).__name__})") from None

    def cleaned(self, value: Any) -> Any:
        """The value, in whose strings the key is struck out, wherever the server echoed it, and
        what UTF-8 cannot hold (lone surrogates) is a question mark."""
        if isinstance(value, str):
            value = value.encode("utf-8", "replace").decode("utf-8")
            return value.replace(self._secret, STRUCK) if self._secret else value
        if isinstance(value, list):
            return [self.cleaned(v) for v in value]
        if isinstance(value, dict):
            return {self.cleaned(k): self.cleaned(v) for k, v in value.items()}
        return value

    def guarded(self, text: str) -> tuple[str, str]:
        """The text cleaned, and of its end what may be the beginning of the key, apart."""
        text = self.cleaned(text)
        for n in range(min(len(self._secret) - 1, len(text)), 0, -1):
            if text.endswith(self._secret[:n]):
                return text[:-n], text[-n:]
        return text, ""

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Failed where the status may pass, else the one sentence."""
        status = error.code
        if status in (408, 409, 425, 429) or status >= 500:
            return Failed(f"HTTP {status}", _retry_after(error.headers.get("Retry-After")))
        if status in (401, 403):
            if self.variable:
                return ValueError(f"{self.url} refuses the key in {self.variable} (HTTP {status})")
            return ValueError(
                f"{self.url} asks for a key (HTTP {status}); put it into the environment as "
                f"{KEYS[0]} or {KEYS[1]}"
            )
        if 300 <= status < 400:
            return ValueError(f"{self.url} sends its visitors elsewhere (HTTP {status})")
        try:
            body = self.cleaned(_json(error.read(1 << 16)))
            said = body.get("error", body.get("message", "")) if isinstance(body, dict) else ""
            said = said.get("message", "") if isinstance(said, dict) else said
        except (Failed, OSError, http.client.HTTPException):
            said = ""
        said = " ".join(printable(str(said)).split())[:300]
        return ValueError(f"{self.url} refuses (HTTP {status}){': ' + said if said else ''}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _blocks(response: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
    """The bytes of an answer, as they come; Failed for one that is late, endless or cut short."""
    size, whole = 0, response.length
    while whole is None or size < whole:
        block = response.read1(1 << 16)
        if time.monotonic() > deadline:
            raise Failed("timed out")
        if not block:
            break
        size += len(block)
        if size > MOST_BYTES:
            raise Failed("an endless answer")
        yield block
    if whole is not None and size < whole:
        raise Failed("broken off (IncompleteRead)")


def _events(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events; Failed where the last one, [DONE], is missing."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield data
    raise Failed("broken off (no [DONE])")


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Failed("a garbled answer") from None


def _retry_after(text: str | None) -> float:
    """Seconds to wait, from a number or a date (RFC 9110, 10.2.3); 0 for anything else."""
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


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
        self.name, self.context = self._served(name)
        self.system = system
        self.chat: ChatTokenizer | None = None
        self.shape: GPTConfig | None = None
        if budgets or tokenizer:
            self.chat = self._tokenizer(tokenizer, budgets)
            self.shape = known_shape(self.chat.path)
        self.identity = {
            "model": f"served as {self.name}",
            "precision": "the server's",
            "dialect": "chat" if self.chat is None else "completions",
        }
        self.failures: Counter[str] = Counter()
        self.clock = _Clock()

    def _served(self, name: str) -> tuple[str, int | None]:
        """The model's name and context, None where the server does not tell it."""
        url = self.server.url

        def parse(answer: Any) -> dict[str, Any]:
            try:
                return {str(model["id"]): model for model in answer["data"]}
            except (KeyError, TypeError):
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
            return name, None
        if not name and len(models) != 1:
            known = printable(", ".join(list(models)[:8]))
            raise ValueError(
                f"{url} serves {len(models)} models ({known}); say which, as in --model {url}#NAME"
            )
        name = name or next(iter(models))
        context = models.get(name, {}).get("max_model_len")
        return printable(name), context if isinstance(context, int) and context > 0 else None

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
        under_way = failed_in_a_row = 0
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
                result = done.get()
                under_way -= 1
                if isinstance(result, Completion):
                    failed_in_a_row = 0
                    yield result
                elif isinstance(result, Failed):
                    self.failures[result.reason] += 1
                    failed_in_a_row += 1
                    if failed_in_a_row >= max(GIVE_UP, len(workers)):
                        source = iter(())
                        self.server.stopped.set()  # what is under way gets no further attempt
                else:  # no ask would fare better; answers that are on their way are still taken
                    fault = fault or result
            if fault:
                raise fault
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
            tokens = round(answer.tokens * len(thinking) / max(1, len(thinking + answered)))
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
        text, sampled, forced = "", 0, 0
        if budget is not None:
            closed = False
            if budget:
                part = self._continue(ask, prompt, min(budget, most), show, stop=[THINK_END])
                # A server does not say whether </think> or the end of the text stopped it; either
                # way the thought is over. Some give the stop string with the text.
                text, sampled = part.text.partition(THINK_END)[0], part.tokens
                closed = part.finish == "stop"
            if not closed:
                forced = len(self._tokens(THINK_END))
            text += THINK_END
            if show:
                show(THINK_END)
        behind = prompt + self._tokens(text)
        answer = self._continue(ask, behind, max(1, most - sampled - forced), show)
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
    ) -> "_Answer":
        body = self._body(ask, most, stream_key(prompt, ask.seed, ask.index))
        body |= {"prompt": list(prompt)} | ({"stop": stop} if stop else {})
        return self._ask("/completions", body, show)

    def _body(self, ask: Ask, most: int, stream: int) -> dict[str, Any]:
        """What both endpoints are told; extensions of the protocol only where they are needed."""
        params = ask.params
        body = {
            "model": self.name,
            "temperature": params.temperature,
            "top_p": params.top_p if params.temperature else 1.0,
            "seed": stream & 0x7FFFFFFF,
        }
        if most < UNBOUNDED:
            body["max_tokens"] = most
        if params.temperature and params.top_k:
            body["top_k"] = params.top_k
        if params.temperature and params.min_p:
            body["min_p"] = params.min_p
        return body

    def _ask(self, path: str, body: dict[str, Any], show: Show | None) -> "_Answer":
        if show is None:
            return self.server.ask(path, body, _Answer.of)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        thinking, held = False, ""

        def watch(chunk: Any) -> None:
            nonlocal thinking, held
            for reasoning, text in _deltas(chunk):
                if reasoning and not thinking:
                    held += THINK
                elif text and not reasoning and thinking:
                    held += THINK_END
                thinking = bool(reasoning)
                ready, held = self.server.guarded(held + reasoning + text)
                show(ready)

        answer = self.server.ask(path, body, _Answer.of_chunks, watch=watch)
        show(held)
        # Once more as a whole: an echoed key may have come in pieces.
        return replace(answer, text=self.server.cleaned(answer.text))


@dataclass(frozen=True)
class _Answer:
    """What an answer of either endpoint says; think_tokens None where it does not."""

    text: str
    tokens: int
    prompt_tokens: int
    think_tokens: int | None
    finish: Literal["stop", "length"]

    @classmethod
    def of(cls, answer: Any) -> "_Answer":
        """From a whole answer; Failed for what is no completion."""
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            reasoning, text = _parts(choice.get("message") or choice)
            details = usage.get("completion_tokens_details") or {}
            told = details.get("reasoning_tokens")
            return cls(
                text=_spelled(reasoning, text, choice["finish_reason"]),
                tokens=_count(usage["completion_tokens"]),
                prompt_tokens=_count(usage["prompt_tokens"]),
                think_tokens=None if told is None else _count(told),
                finish="length" if choice["finish_reason"] == "length" else "stop",
            )
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failed("a garbled answer") from None

    @classmethod
    def of_chunks(cls, chunks: list[Any]) -> "_Answer":
        """From a streamed answer; Failed for what is no completion."""
        deltas = [delta for chunk in chunks for delta in _deltas(chunk)]
        try:
            reasons = [c.get("finish_reason") for chunk in chunks for c in chunk["choices"]]
            usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        except (KeyError, TypeError, AttributeError):
            raise Failed("a garbled answer") from None
        reasoning, text = (
            ("".join(parts) for parts in zip(*deltas, strict=True)) if deltas else ("", "")
        )
        choice = {
            "message": {"reasoning_content": reasoning, "content": text},
            "finish_reason": next((r for r in reversed(reasons) if r), "stop"),
        }
        # Without usage a chunk is about a token.
        guess = {"completion_tokens": len(deltas), "prompt_tokens": 0}
        return cls.of({"choices": [choice], "usage": usage[-1] if usage else guess})


def _parts(message: Any) -> tuple[str, str]:
    """The reasoning, which servers spell in two ways, and the text of a message or a delta."""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    text = message["text"] if "text" in message else message.get("content")
    if not isinstance(reasoning, str) or not isinstance(text, str | None):
        raise TypeError
    return reasoning, text or ""


def _deltas(chunk: Any) -> Iterator[tuple[str, str]]:
    """The (reasoning, text) by which a streamed chunk lengthens the answer."""
    try:
        for choice in chunk["choices"]:
            reasoning, text = _parts(choice.get("delta") or choice)
            if reasoning or text:
                yield reasoning, text
    except (KeyError, TypeError, AttributeError):
        raise Failed("a garbled answer") from None


def _spelled(reasoning: str, text: str, finish: str) -> str:
    """The text with its reasoning in front, closed unless the answer was cut inside it."""
    if not reasoning:
        return text
    cut = finish == "length" and not text
    return THINK + reasoning + THINK_END * (not cut) + text


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def _thinking(text: str) -> str:
    """What stands between <think> and </think>, or the end."""
    return text[len(THINK) :].partition(THINK_END)[0] if text.startswith(THINK) else ""


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
