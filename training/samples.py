"""What the model writes during training: greedy answers to problems, or a text's continuation."""

from typing import Any

import torch
from torch import Tensor

from ..models import GPT, KVCache
from ..models.decoder import Decoder, fits
from ..tasks import Task, at_most
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


def _task(data: Data) -> Task | None:
    """The task that the data are of, or the first one where several are mixed."""
    tasks = (getattr(source, "task", None) for source in data.sources)
    return next((task for task in tasks if task is not None), None)


def write_samples(model: GPT, data: Data, count: int) -> list[dict[str, Any]]:
    """`count` samples: {"prompt", "text", "right"}, the same prompts at every call.

    Of a task: validation problems that the context has room for, and whether the answer is right;
    as many tokens at most as a row of training has.
    Of a text: the beginnings of validation rows, continued; right is None.
    """
    task = _task(data)
    tokenizer = data.tokenizer
    if task is not None:
        eos = tokenizer.token_to_id(data.vocabulary.eos)
        limit = min(data.context, model.config.context)  # of a --init it may be far longer
        asked = []
        for problem in at_most(task, "val", count, 0):
            text = problem.prompt + "<think>"
            ids = data.vocabulary.prefix + tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) < limit:
                asked.append((problem, ids))
    else:
        rows = next(iter(data.validation())).tokens[:count]
        prompts = rows[:, : max(1, rows.shape[1] // 4)].tolist()
        asked, eos, limit = [(None, prompt) for prompt in prompts], None, NEW_TOKENS
    samples = []
    written = greedy(model, [prompt for _, prompt in asked], limit, eos) if asked else []
    for (problem, prompt), row in zip(asked, written, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=False)
        right = None
        if task is not None and problem is not None:
            text = "<think>" + text
            right = task.verify(problem, text)
            shown = problem.prompt
        else:
            shown = tokenizer.decode(prompt, skip_special_tokens=False)
        samples.append({"prompt": shown, "text": text, "right": right})
    return samples
