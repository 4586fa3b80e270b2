"""What the model writes during training: greedy answers to problems, or a text's continuation."""

from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from ..models import GPT, KVCache
from ..models.decoder import Decoder, fits
from ..tasks import at_most
from .data import Data

NEW_TOKENS = 64  # of a continued text


@torch.no_grad()
def greedy(model: GPT, prompts: list[list[int]], limit: int, eos: int | None) -> list[list[int]]:
    """The likeliest next tokens of each prompt, one by one: `limit` of them, or up to `eos`.

    Fewer where the context ends. Prompts may differ in length. In fp32, on a CPU by the decoder.
    """
    device = model.embed_tokens.weight.device
    native = device.type == "cpu" and fits(model, torch.float32)
    network = Decoder(model) if native else model
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = max(map(len, prompts))
    limit = min(limit, model.config.context - width)
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    cache = KVCache(model.config, len(prompts), width + limit, device=device)
    hidden = network.hidden(tokens, cache)[torch.arange(len(prompts), device=device), lengths - 1]
    cache.lengths += lengths
    written: list[Tensor] = []
    while len(written) < limit:
        token = network.logits(hidden).argmax(-1)
        written.append(token)
        if eos is not None and bool((torch.stack(written) == eos).any(0).all()):
            break
        hidden = network.hidden(token[:, None], cache)[:, 0]
        cache.lengths += 1
    rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def write_samples(model: GPT, data: Data, count: int) -> list[dict[str, Any]]:
    """`count` samples, or one of each source where those are more: {"prompt", "text", "right"}, the
    same prompts at every call.

    Of a task: validation problems that the context has room for, and whether the answer is right;
    as many tokens at most as a row of training has.
    Of other data: what held-out rows begin with, continued; right is None, and "expected" is what
    a row goes on with where the loss is on that alone.
    """
    each = max(1, count // len(data.sources))
    of_source = [_of_source(model, data, source, each) for source in data.sources]
    in_turns = chain.from_iterable(zip_longest(*of_source))
    return [sample for sample in in_turns if sample is not None]


def _of_source(model: GPT, data: Data, source: Any, count: int) -> list[dict[str, Any]]:
    tokenizer, eos = data.tokenizer, data.vocabulary.id(data.vocabulary.eos)

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    task = getattr(source, "task", None)
    if task is not None:
        limit = min(data.context, model.config.context)  # of a --init it may be far longer
        asked = []
        for problem in at_most(task, "val", count, 0):
            text = problem.prompt + "<think>"
            ids = data.vocabulary.prefix + tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) < limit:
                asked.append((problem, ids))
        written = greedy(model, [ids for _, ids in asked], limit, eos) if asked else []
        texts = ["<think>" + text_of(row) for row in written]
        return [
            {"prompt": problem.prompt, "text": text, "right": task.verify(problem, text)}
            for (problem, _), text in zip(asked, texts, strict=True)
        ]
    begun = source.beginnings(count, NEW_TOKENS)
    limit = max([NEW_TOKENS, *(len(rest) for _, rest in begun if rest)])
    written = greedy(model, [prompt for prompt, _ in begun], limit, eos) if begun else []
    samples = []
    for (prompt, rest), row in zip(begun, written, strict=True):
        samples.append({"prompt": text_of(prompt), "text": text_of(row), "right": None})
        if rest is not None:
            samples[-1]["expected"] = text_of(rest)
    return samples
