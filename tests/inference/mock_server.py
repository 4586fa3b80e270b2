"""An OpenAI-compatible server whose model is a few lines, and which can be told to misbehave.

The model thinks one to six letters and answers with a digit, all decided by the prompt and the
seed. Prompts come as a message, or as the tokens of `character_tokenizer(ALPHABET)`.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ponder.training.tokenizer import character_tokenizer

ALPHABET = "0123456789+-*=abcdef"
TOKENIZER = character_tokenizer(ALPHABET)


def number(*parts: Any) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest())


def thought(prompt: str, seed: int) -> str:
    n = 1 + number(prompt, seed) % 6
    return "".join("abcdef"[number(prompt, seed, i) % 6] for i in range(n))


def continuation(text: str, seed: int) -> str:
    """What the model writes behind the text, its end included in the last character."""
    prompt, opened, thinking = text.partition("<think>")
    if "</think>" in thinking:
        return str(number(prompt, thinking.removesuffix("</think>")) % 10)
    whole = thought(prompt, seed)
    return whole + "</think>" + str(number(prompt, whole) % 10)


class MockServer:
    """Serves on a free port of this machine; with fault(n, path) deciding what the n-th POST gets:
    "drop", "late", "garble", "cut", "limit", "error", or None for an answer."""

    def __init__(self, *, fault: Callable[[int], str | None] = lambda n: None, key: str = ""):
        self.fault, self.key = fault, key
        self.requests: list[tuple[str, dict]] = []  # all that were asked
        self.answered: Counter[str] = Counter()  # how often each whole question got its answer
        self.lost = 0  # good answers that nobody waited for
        self.context: int | None = 64
        self.models = ["mock"]
        self.reasoning = True  # whether chat answers part the thinking from the text
        self.counts = True  # whether it counts the thinking, or says 0 like vLLM 0.32
        self.usage = True
        self.listed: dict[str, Any] = {}  # what the list of models says besides
        self.done = True  # whether a stream ends in [DONE], or like Transformers' in its last chunk
        self.echo = ""  # put into every answer's text, and into errors
        self.status = 0  # refuse all POSTs with this
        self.refused = "nothing"  # or those that hold this text
        self._gathering: threading.Barrier | None = None
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        mock = self

        class Handler(BaseHTTPRequestHandler):
            under_way = False

            def do_GET(self):
                mock.get(self)

            def do_POST(self):
                self.under_way = True
                with mock._lock:
                    mock._now += 1
                    mock.most_at_once = max(mock.most_at_once, mock._now)
                try:
                    mock.post(self)
                finally:
                    self.over()

            def over(self):
                """Before the client can know it, who then asks for the next."""
                with mock._lock:
                    mock._now -= self.under_way
                    self.under_way = False

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> "MockServer":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def gather(self, count: int) -> None:
        """The first `count` requests are answered once all of them are here."""
        self._gathering = threading.Barrier(count)

    def send(self, handler, status: int, body: bytes, **headers: str) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.over()
        handler.end_headers()
        handler.wfile.write(body)

    def allowed(self, handler) -> bool:
        sent = handler.headers.get("Authorization", "")
        if not self.key or sent == f"Bearer {self.key}":
            return True
        said = {"error": {"message": f"Incorrect API key provided: {sent.removeprefix('Bearer ')}"}}
        self.send(handler, 401, json.dumps(said).encode())
        return False

    def get(self, handler) -> None:
        if handler.path != "/v1/models":
            return self.send(handler, 404, b"<html>not here</html>")
        if self.allowed(handler):
            length = {"max_model_len": self.context} if self.context else {}
            data = [{"id": name} | length | self.listed for name in self.models]
            self.send(handler, 200, json.dumps({"object": "list", "data": data}).encode())

    def post(self, handler) -> None:
        size = int(handler.headers["Content-Length"])
        text = handler.rfile.read(size)
        body = json.loads(text)
        with self._lock:
            self.requests.append((handler.path, body))
            asked = len(self.requests)
            fault = self.fault(asked - 1)
        if self._gathering and asked <= self._gathering.parties:
            self._gathering.wait(10)
            time.sleep(0.1)  # in which one too many would come
        if not self.allowed(handler):
            return
        if self.refused in text.decode():
            return self.send(handler, 400, b'{"detail": "too long"}')
        if self.status:
            said = {"error": {"message": f"no such thing\x1b[31m {self.echo}"}}
            return self.send(handler, self.status, json.dumps(said).encode())
        answer = json.dumps(self.answer(handler.path, body)).encode()
        if fault == "drop":
            handler.close_connection = True
            return handler.connection.close()
        if fault == "limit":
            return self.send(handler, 429, b"{}", Retry_After="0.05")
        if fault == "error":
            return self.send(handler, 503, b"busy")
        if fault == "garble":
            return self.send(handler, 200, answer[: len(answer) // 2])
        if fault == "strange":
            return self.send(handler, 200, b'{"choices": [{"text": 7}], "usage": null}')
        if fault == "deep":
            return self.send(handler, 200, b"[" * 900 + b"]" * 900)
        if fault == "cut":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(answer)))
            handler.end_headers()
            return handler.wfile.write(answer[:-5])
        if fault == "late":
            handler.connection.recv(1)  # until the client gives up
            handler.close_connection = True
            return
        try:
            if body.get("stream"):
                self.stream(handler, body)
            else:
                self.send(handler, 200, answer)
        except OSError:
            with self._lock:
                self.lost += 1
            return
        with self._lock:
            self.answered[handler.path + text.decode()] += 1

    def answer(self, path: str, body: dict) -> dict:
        details = {}
        if path == "/v1/chat/completions":
            prompt = body["messages"][-1]["content"]
            text = continuation(prompt + "<think>", body["seed"])
            tokens = len(TOKENIZER.encode(text).ids) + 1
            reasoning, _, content = text.partition("</think>")
            message = {"role": "assistant", "content": content + self.echo}
            if self.reasoning:
                message["reasoning_content"] = reasoning
                details = {
                    "completion_tokens_details": {"reasoning_tokens": len(reasoning) * self.counts}
                }
            else:
                message["content"] = f"<think>{reasoning}</think>{content}{self.echo}"
            choice: dict = {"message": message, "finish_reason": "stop"}
            used = len(prompt) + 4
        else:
            prompt = TOKENIZER.decode(body["prompt"], skip_special_tokens=False)
            ids = TOKENIZER.encode(continuation(prompt, body["seed"])).ids + [0]
            finish = "stop"
            # As vLLM where a tokenizer calls </think> special: out of the text, it stops nothing.
            stops = [] if body.get("skip_special_tokens", True) else body.get("stop", [])
            if stops:
                end = TOKENIZER.token_to_id(stops[0])
                if end in ids:
                    ids = ids[: ids.index(end) + 1]
            if len(ids) > body["max_tokens"]:
                ids, finish = ids[: body["max_tokens"]], "length"
            tokens = len(ids)
            text = TOKENIZER.decode(ids, skip_special_tokens=False).removesuffix("<eos>")
            if body.get("skip_special_tokens", True):
                text = text.replace("</think>", "")
            for stop in stops:
                text = text.partition(stop)[0]
            choice = {"text": text + self.echo, "finish_reason": finish}
            used = len(body["prompt"])
        usage = {"prompt_tokens": used, "completion_tokens": tokens} | details
        return {"choices": [choice]} | ({"usage": usage} if self.usage else {})

    def stream(self, handler, body: dict) -> None:
        whole = self.answer(handler.path, body)
        (choice,) = whole["choices"]
        chunks: list[dict] = []
        if "message" in choice:
            for name in ("reasoning_content", "content"):
                chunks += [{"delta": {name: c}} for c in choice["message"].get(name, "")]
        else:
            chunks += [{"text": c} for c in choice["text"]]
        chunks.append({"delta": {}, "text": "", "finish_reason": choice["finish_reason"]})
        events: list[dict] = [{"choices": [chunk]} for chunk in chunks]
        if self.done:
            events.append({"choices": [], "usage": whole.get("usage")})
        else:
            events[-1]["usage"] = whole.get("usage")
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for event in events:
            handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        handler.wfile.write(b"data: [DONE]\n\n" * self.done)
