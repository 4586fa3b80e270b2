"""GPTConfig and the fields of a Hugging Face config.json, each from the other.

The types are llama, qwen3, and ponder: Llama's fields and the booleans qk_norm and gated_mlp.
"""

import json
from collections.abc import Mapping
from typing import Any

from .gpt import GPTConfig

# What Transformers takes where a config.json of the type is silent, if not what all types take.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": dict(head_dim=128, num_key_value_heads=32),
    "ponder": {},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "ponder": "PonderForCausalLM",
}
# Transformers' name of an activation → ours; of several names, the first is the one written.
HIDDEN_ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "identity",
}
# Fields that change what is computed; a GPT has them off.
OFF = (
    *("quantization_config", "compression_config", "mlp_bias", "attention_dropout"),
    *("use_sliding_window", "add_cross_attention", "attention_chunk_size", "num_local_experts"),
)


def model_type(config: GPTConfig) -> str:
    """The standard type that expresses the configuration exactly, or "ponder"."""
    if config.gated and config.qk_norm:
        return "qwen3"
    if config.gated and config.n_embd % config.n_head == 0:  # Transformers' Llama insists on it
        return "llama"
    return "ponder"


def to_fields(config: GPTConfig) -> dict[str, Any]:
    """The content of config.json, but for the tokens."""
    kind = model_type(config)
    names = {ours: theirs for theirs, ours in reversed(HIDDEN_ACTS.items())}
    own = dict(qk_norm=config.qk_norm, gated_mlp=config.gated) if kind == "ponder" else {}
    return dict(
        model_type=kind,
        architectures=[ARCHITECTURES[kind]],
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner,
        hidden_act=names[config.activation],
        attention_bias=config.attention_bias,
        tie_word_embeddings=config.tie_embeddings,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,  # Transformers before 5, vLLM, llama.cpp
        rope_parameters=dict(rope_theta=config.rope_theta, rope_type="default"),
        **own,
    )


def from_fields(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig that computes what config.json says, or ValueError naming the field."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(f"model_type is {kind!r}; known are {', '.join(DEFAULTS)}")
    fields = DEFAULTS[kind] | dict(fields)
    for name in OFF:
        if fields.get(name):
            raise ValueError(f"{name} is {_short(fields[name])}, which a GPT does not express")
    if fields.get("sliding_window") and kind != "qwen3":  # there, use_sliding_window decides
        raise ValueError(
            f"sliding_window is {_short(fields['sliding_window'])}; a GPT attends to every position"
        )
    for layer in fields.get("layer_types") or ():
        if layer != "full_attention":
            raise ValueError(f"layer_types holds {layer!r}; a GPT has full_attention alone")
    width, heads = _get(fields, "hidden_size", int), _get(fields, "num_attention_heads", int)
    if fields.get("head_dim") is None and (heads < 1 or width % heads):
        raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    activation = _get(fields, "hidden_act", str, "silu")
    if activation not in HIDDEN_ACTS:
        raise ValueError(f"hidden_act is {activation!r}; known are {', '.join(HIDDEN_ACTS)}")
    return GPTConfig(
        vocab_size=_get(fields, "vocab_size", int),
        context=_get(fields, "max_position_embeddings", int),
        n_layer=_get(fields, "num_hidden_layers", int),
        n_head=heads,
        n_kv_head=_get(fields, "num_key_value_heads", int, heads),
        head_dim=_get(fields, "head_dim", int, width // max(heads, 1)),
        n_embd=width,
        n_inner=_get(fields, "intermediate_size", int),
        gated=_get(fields, "gated_mlp", bool) if kind == "ponder" else True,
        activation=HIDDEN_ACTS[activation],
        qk_norm=_get(fields, "qk_norm", bool) if kind == "ponder" else kind == "qwen3",
        attention_bias=_get(fields, "attention_bias", bool, False),
        tie_embeddings=_get(fields, "tie_word_embeddings", bool, False),
        rope_theta=_rope_theta(fields),
        norm_eps=_get(fields, "rms_norm_eps", float, 1e-6),
    )


def _rope_theta(fields: Mapping[str, Any]) -> float:
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name} is {_short(rope)}; it must be an object")
    plain = dict(rope_type="default", type="default", partial_rotary_factor=1.0)
    rotary = {"partial_rotary_factor": fields.get("partial_rotary_factor")} | rope
    for key, value in rotary.items():
        if key != "rope_theta" and value not in (None, plain.get(key)):
            raise ValueError(f"{name} has {key} {_short(value)}; a GPT has plain rotary positions")
    return _get(rope if rope.get("rope_theta") else fields, "rope_theta", float, 10000.0)


def _get(fields: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise ValueError(f"{name} is missing")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ValueError(f"{name} is {_short(value)}; it must be {words[kind]}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
