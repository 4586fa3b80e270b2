"""The tensors of a GPT as the checkpoints of each model type name and lay them out.

Llama, Qwen and SmolLM have GPT's own names behind "model.". GPT-2 has others; its matrices lie the
other way round (inputs × outputs), and those of queries, keys and values are one.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

HEAD = "lm_head.weight"
# GPT's modules, and GPT-2's.
GPT2 = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "layers": "h",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
QKV = "q_proj", "k_proj", "v_proj"
# What old checkpoints hold beside the parameters: rotary frequencies, GPT-2's causal masks.
DERIVED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(bias|masked_bias))")


def embedding(kind: str) -> str:
    """The name of the embedding's weight in a checkpoint of type `kind`."""
    return "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"


def standard_names(kind: str, names: Iterable[str]) -> dict[str, str]:
    """The tensors in a checkpoint, and the names that they should have.

    A checkpoint of the model without its head, as GPT-2's own is, lacks the first part of each.
    """
    names, whole = list(names), embedding(kind)
    prefix = whole[: whole.index(".") + 1]
    bare = whole not in names and whole.removeprefix(prefix) in names
    return {name: prefix + name if bare and name != HEAD else name for name in names}


def to_checkpoint(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A GPT's parameters (some or all of its state_dict) under the names of type `kind`."""
    if kind != "gpt2":
        return {name if name == HEAD else f"model.{name}": t for name, t in state.items()}
    found = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if module.endswith(QKV[1:]):
            continue
        if module.endswith(QKV[0]):
            tensor = torch.cat([state[name.replace(QKV[0], part)] for part in QKV])
        if module.endswith("_proj") and parameter == "weight":
            tensor = tensor.t().contiguous()
        found[name if name == HEAD else f"transformer.{_renamed(module, GPT2)}.{parameter}"] = (
            tensor
        )
    return found


def from_checkpoint(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `to_checkpoint` was given, from what it gave."""
    if kind != "gpt2":
        return {name.removeprefix("model."): t for name, t in state.items()}
    found, ours = {}, {theirs: ours for ours, theirs in GPT2.items()}
    for name, tensor in state.items():
        module, _, parameter = name.removeprefix("transformer.").rpartition(".")
        if ".c_" in module and parameter == "weight":
            tensor = tensor.t().contiguous()
        if name == HEAD:
            found[name] = tensor
        elif module.endswith("c_attn"):
            module = _renamed(module, ours)
            for part, piece in zip(QKV, tensor.chunk(3), strict=True):
                found[f"{module.replace(QKV[0], part)}.{parameter}"] = piece.clone()
        else:
            found[f"{_renamed(module, ours)}.{parameter}"] = tensor
    return found


def _renamed(module: str, names: Mapping[str, str]) -> str:
    """layers.3.mlp.up_proj → h.3.mlp.c_fc, or back."""
    parts = re.fullmatch(r"(\w+)(\.\d+\.)(.+)", module)
    if parts is None:
        return names[module]
    return names[parts[1]] + parts[2] + names[parts[3]]
