"""Verifier: a GPT that says how likely a solution is right, instead of what comes next.

    logit = wᵀ norm(h) + b        for every token; σ(logit) is the value of the text up to it

A scalar head on a language model's body, as in Cobbe et al. 2021, "Training Verifiers to Solve Math
Word Problems". Its folder is what Transformers calls token classification with one label:
`AutoModelForTokenClassification.from_pretrained` opens it.

Shapes: B sequences, T tokens.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from . import hub, layout
from .config_json import ARCHITECTURES, model_type, to_fields
from .gpt import GPT, GPTConfig

Labels = Literal["outcome", "value", "process"]
IGNORE = -100


@dataclass(frozen=True)
class Reading:
    """Where a verifier's values mean something: what its labels were, and on which tokens.

    labels: outcome (is the solution right, at its last token), value (the same, at every token of
    it), process (is this step right, at the end of each). step_end: the text that ends a step, ""
    where steps are not known. end: whether the last token was labelled.
    """

    labels: Labels
    step_end: str = ""
    end: bool = True

    @property
    def steps(self) -> bool:
        """Whether the values at the ends of steps mean something."""
        return self.labels != "outcome" and bool(self.step_end)


class Verifier(nn.Module):
    """A GPT's body and one number a token. `model(tokens)` gives logits, with targets a loss."""

    def __init__(self, body: GPT, reading: Reading):
        """body: a GPT; it loses its head."""
        super().__init__()
        self.model, self.reading = body, reading
        del body.lm_head
        self.score = nn.Linear(body.config.n_embd, 1)
        nn.init.zeros_(self.score.weight)  # every value starts at one half
        nn.init.zeros_(self.score.bias)

    @property
    def config(self) -> GPTConfig:
        """The body's."""
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The body's blocks, which FSDP shards one by one."""
        return self.model.layers

    @property
    def parameter_count(self) -> int:
        """Of body and head."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> Tensor:
        """tokens (B, T) → logits (B, T) in fp32; with targets (B, T) of 0 and 1, −100 where there
        is none, the binary cross-entropy in nats, whose `reduction` (mean, sum) is over them;
        ValueError for another."""
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; it must be mean or sum")
        hidden = self.model.hidden(tokens, segment_ids=segment_ids)
        logits = self.score(hidden).squeeze(-1).float()
        if targets is None:
            return logits
        total = verifier_loss(logits, targets)
        return total if reduction == "sum" else total / (targets != IGNORE).sum()


def verifier_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the binary cross-entropies, in nats, of logits and targets (B, T), where targets
    are not −100."""
    # Weights, not a selection: a shape that depended on the data would stop torch.compile.
    there = (targets != IGNORE).float()
    right = targets.clamp(min=0).float()
    return binary_cross_entropy_with_logits(logits, right, weight=there, reduction="sum")


def save_verifier(
    verifier: Verifier,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    eos: str = "<eos>",
    scale: float = 1.0,
    shift: float = 0.0,
) -> str:
    """Write a Hugging Face folder, as `hub.save` does; returns a sentence that says what opens it.

    scale, shift: of a calibration (Platt 1999), put into the head: what is saved gives
    scale · logit + shift, so that its σ is a probability for whoever opens it.
    """
    path, config = Path(path), verifier.config
    with hub.shapes_alone():
        hub.check_parameters(verifier, Verifier(GPT(config), verifier.reading))
    kind = model_type(config)
    score = copy.deepcopy(verifier.score).to("cpu", torch.float32)
    with torch.no_grad():
        score.weight *= scale
        score.bias.mul_(scale).add_(shift)
    state = hub.checkpoint(verifier.model, kind, torch.float32)
    state |= {_head(kind, n): p.detach() for n, p in score.named_parameters()}
    fields = to_fields(config) | dict(
        architectures=[_architecture(kind)],
        id2label={"0": "right"},
        label2id={"right": 0},
        verifier=asdict(verifier.reading),
    )
    hub.write_folder(path, state, config, fields, tokenizer, eos=eos)
    if kind == "ponder":
        return f"{path} has model_type ponder, as no standard type expresses this model"
    return f"{path} has model_type {kind}: AutoModelForTokenClassification opens it"


def load_verifier(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> Verifier:
    """The verifier in a folder that `save_verifier` wrote, in fp32.

    Raises ValueError for a folder that is missing, broken or incomplete, or holds no verifier.
    """
    folder = Path(path)
    config = hub.load_config(folder)
    reading = _reading(folder)
    kind = model_type(config)
    with hub.shapes_alone():
        verifier = Verifier(GPT(config), reading)
    body = layout.to_checkpoint(kind, verifier.model.state_dict())
    expected = {name: tensor.shape for name, tensor in body.items()}
    heads = {_head(kind, name): name for name in verifier.score.state_dict()}
    expected |= {h: verifier.score.get_parameter(name).shape for h, name in heads.items()}
    state = hub.read_tensors(folder, expected, config, dtype=torch.float32, device=device)
    score = {name: state.pop(head) for head, name in heads.items()}
    verifier.score.load_state_dict(score, assign=True)
    verifier.model.load_state_dict(layout.from_checkpoint(kind, state), assign=True)
    verifier.model.rotary.reset(verifier.score.weight.device)
    return verifier


def _reading(folder: Path) -> Reading:
    fields = hub.read_json(folder / "config.json")
    said = fields.get("verifier")
    if said is None:
        what = (fields.get("architectures") or ["a model"])[0]
        raise ValueError(
            f"{folder} holds no verifier, but {what}; train one with ponder train --verifier"
        )
    try:
        reading = Reading(**said)
    except TypeError:  # no object, or one with other fields
        reading = None
    if reading is None or reading.labels not in get_args(Labels):
        raise ValueError(
            f"{folder / 'config.json'}: verifier is {said!r}; it must have labels "
            f"({', '.join(get_args(Labels))}), step_end and end"
        )
    return reading


def _architecture(kind: str) -> str:
    causal = ARCHITECTURES[kind]
    return causal.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForTokenClassification"


def _head(kind: str, name: str) -> str:
    """What Transformers calls a parameter of the head."""
    return f"{'classifier' if kind == 'gpt2' else 'score'}.{name}"


def encode_solutions(
    tokenizer: Tokenizer, solutions: Sequence[tuple[str, str, int | None]]
) -> list[tuple[list[int], int]]:
    """For each (prompt, text, end) the tokens of both, and how many of them are the prompt's.

    end: the token behind a text that was not cut, None where it was. Raises ValueError for a
    character that the tokenizer does not know.
    """
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in solutions))
    heads = dict(zip(prompts, tokenizer.encode_batch(prompts), strict=True))
    texts = [text for _, text, _ in solutions]
    tails = tokenizer.encode_batch(texts, add_special_tokens=False)
    unknown = tokenizer.token_to_id("<unk>")
    found = []
    for (prompt, text, end), tail in zip(solutions, tails, strict=True):
        for source, encoding in ((prompt, heads[prompt]), (text, tail)):
            spans = [o for o, i in zip(encoding.offsets, encoding.ids, strict=True) if i == unknown]
            for word in (source[first:last] for first, last in spans):
                if word != "<unk>":  # which a model may write
                    raise ValueError(
                        f"the verifier's tokenizer does not know {word!r}, which is in "
                        f"{source[:60]!r}; it must be the tokenizer of the model that wrote it"
                    )
        tokens = heads[prompt].ids + tail.ids + ([] if end is None else [end])
        found.append((tokens, len(heads[prompt].ids)))
    return found


def step_ends(tokenizer: Tokenizer, step_end: str) -> dict[int, int]:
    """The tokens that hold `step_end`, and how often each does; none where it is ""."""
    if not step_end:
        return {}
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    counts = {i: text.count(step_end) for i, text in zip(ids, texts, strict=True)}
    return {i: n for i, n in counts.items() if n}


def places_of_steps(
    tokens: Sequence[int], start: int, ends: Mapping[int, int], close: int | None
) -> list[int]:
    """Where the steps of a thought end that begins at `start`: at each token of `ends` (as
    `step_ends` gives them), up to `close`, the id of </think>."""
    stop = tokens.index(close, start) if close in tokens[start:] else len(tokens)
    return [place for place in range(start, stop) if tokens[place] in ends]
