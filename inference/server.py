"""An OpenAI-compatible server: one question, one answer, asked again while there is hope.

What comes from it is data: nothing in it is obeyed, and the key is struck out of it.
"""

import http.client
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from .chat import THINK, THINK_END, printable
from .config import ServerOptions

KEYS = ("PONDER_API_KEY", "OPENAI_API_KEY")
STRUCK = "[key]"
DONE = b"[DONE]"  # the last event of a stream
MOST_BYTES = 1 << 26  # of one answer; more is garbage
LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
PATIENCE = 600.0  # seconds that a server may ask for


class Failed(Exception):
    """An answer that did not come, for a reason that may pass; wait: seconds asked for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Refused(ValueError):
    """A refusal that may be of what was asked, and of nothing else."""


class Server:
    """The HTTP side: JSON out, JSON in.

    Answers that are late, cut off, garbled, rate-limited (429) or the server's own fault (5xx) are
    asked for again, after waits that double and vary, and never sooner than Retry-After says. The
    key is sent to this server alone: redirects are not followed.
    """

    def __init__(self, url: str, options: ServerOptions):
        if "@" in url or "?" in url:
            raise ValueError(
                "the model's URL holds a user name, a password or a query; leave them out, and put "
                f"the key into the environment as {KEYS[0]}"
            )
        try:
            parts = urlsplit(url)
            if not (parts.hostname and parts.port != 0 and re.fullmatch(r"[!-~]+", url)):
                raise ValueError
        except ValueError:  # or urlsplit's, of a bracket, or the port's
            raise ValueError(
                f"model is {printable(url)!r}; a server is http://HOST:PORT/v1, in ASCII and "
                "without spaces"
            ) from None
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
                for event in _events(blocks):
                    if event == DONE:
                        return chunks
                    chunks.append(self.cleaned(_json(event)))
                    watch(chunks[-1])
                if _ended(chunks):
                    return chunks
                raise Failed("broken off (no [DONE])")
        except urllib.error.HTTPError as error:
            raise self._refusal(error, deadline) from None
        except TimeoutError:
            raise Failed("timed out") from None
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            raise Failed("timed out" if late else f"no connection ({error.reason})") from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
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

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """Failed where the status may pass, else the one sentence."""
        status = error.code
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
            said = _complaint(self.cleaned(_json(b"".join(_blocks(error, deadline)))))
        except (Failed, OSError, http.client.HTTPException, RecursionError):
            said = ""
        said = " ".join(printable(said).split())[:300]
        said = f": {said}" if said else ""
        if status in (408, 409, 425, 429) or status >= 500:
            wait = _retry_after(error.headers.get("Retry-After"))
            return Failed(f"HTTP {status}{said}", wait)
        kind = Refused if status in (400, 413, 422) else ValueError
        return kind(f"{self.url} refuses (HTTP {status}){said}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _blocks(response: Any, deadline: float) -> Iterator[bytes]:
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
    """The data of server-sent events."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line[5:].strip() for line in lines if line.startswith(b"data:"))


def _ended(chunks: list[Any]) -> bool:
    """Whether a stream without [DONE] is whole all the same: Transformers' end in a chunk that says
    why the text ended and what it cost."""
    try:
        return bool(chunks[-1]["usage"] and chunks[-1]["choices"][0]["finish_reason"])
    except (KeyError, IndexError, TypeError):
        return False


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Failed("a garbled answer") from None


def _complaint(body: Any) -> str:
    """What the body of a refusal says: OpenAI's {"error": {"message"}}, or FastAPI's "detail"."""
    if isinstance(body, dict):
        named = (body.get(name) for name in ("error", "message", "detail", "msg"))
        return next((_complaint(said) for said in named if said), "")
    if isinstance(body, list):
        return "; ".join(filter(None, map(_complaint, body)))
    return body if isinstance(body, str) else ""


def _retry_after(text: str | None) -> float:
    """Seconds to wait, from a number or a date (RFC 9110, 10.2.3); 0 for anything else."""
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


@dataclass(frozen=True)
class Answer:
    """What an answer of either endpoint says; think_tokens None where it does not."""

    text: str
    tokens: int
    prompt_tokens: int
    think_tokens: int | None
    finish: Literal["stop", "length"]

    @classmethod
    def of(cls, answer: Any) -> "Answer":
        """From a whole answer; Failed for what is no completion."""
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            reasoning, text = _parts(choice.get("message") or choice)
            details = usage.get("completion_tokens_details") or {}
            told = details.get("reasoning_tokens") or None  # vLLM 0.32 says 0 of any thought
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
    def of_chunks(cls, chunks: list[Any]) -> "Answer":
        """From a streamed answer; Failed for what is no completion."""
        parts = [part for chunk in chunks for part in deltas(chunk)]
        try:
            reasons = [c.get("finish_reason") for chunk in chunks for c in chunk["choices"]]
            usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        except (KeyError, TypeError, AttributeError):
            raise Failed("a garbled answer") from None
        reasoning, text = (
            ("".join(texts) for texts in zip(*parts, strict=True)) if parts else ("", "")
        )
        choice = {
            "message": {"reasoning_content": reasoning, "content": text},
            "finish_reason": next((r for r in reversed(reasons) if r), "stop"),
        }
        # Without usage a chunk is about a token.
        guess = {"completion_tokens": len(parts), "prompt_tokens": 0}
        return cls.of({"choices": [choice], "usage": usage[-1] if usage else guess})


def _parts(message: Any) -> tuple[str, str]:
    """The reasoning, which servers spell in two ways, and the text of a message or a delta."""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    text = message["text"] if "text" in message else message.get("content")
    if not isinstance(reasoning, str) or not isinstance(text, str | None):
        raise TypeError
    return reasoning, text or ""


def deltas(chunk: Any) -> Iterator[tuple[str, str]]:
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
    """A number of tokens that can be; TypeError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST_BYTES:
        raise TypeError
    return value
