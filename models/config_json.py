"""GPTConfig and the fields of a Hugging Face config.json, each from the other.

The types are llama, qwen2, qwen3, smollm3, gpt2, and ponder: Llama's fields and the
booleans qk_norm, gated_mlp and qkv_bias, norm_type, position_type, and SmolLM3's no_rope_layers.
"""

import json
from collections.abc import Mapping
from typing import Any

from .gpt import GPTConfig
from .layers import RopeScaling

# What Transformers takes where a config.json of the type is silent, if not what all types take.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": dict(num_key_value_heads=32),
    "qwen3": dict(head_dim=128, num_key_value_heads=32),
    "smollm3": dict(
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_theta=2000000.0,
        no_rope_layer_interval=4,
    ),
    "gpt2": dict(layer_norm_epsilon=1e-5, activation_function="gelu_new", tie_word_embeddings=True),
    "ponder": {},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "ponder": "PonderForCausalLM",
}
# GPT-2's names of what the other types call otherwise.
GPT2_NAMES = dict(
    max_position_embeddings="n_positions",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    hidden_size="n_embd",
    intermediate_size="n_inner",
    hidden_act="activation_function",
    rms_norm_eps="layer_norm_epsilon",
)
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
GPT2_ACTS = dict(gelu_tanh="gelu_new")  # what GPT-2's own checkpoints call it
# Fields that change what is computed; a GPT has them off.
OFF = (
    *("quantization_config", "compression_config", "attention_dropout", "use_sliding_window"),
    *("add_cross_attention", "attention_chunk_size", "num_local_experts"),
    "scale_attn_by_inverse_layer_idx",
)
MLP_BIAS = ("llama", "smollm3", "ponder")  # the types that have the field mlp_bias


def model_type(config: GPTConfig) -> str:
    """The standard type that expresses the configuration exactly, or "ponder"."""
    c, whole = config, config.n_head * config.head_dim == config.n_embd
    if c.positions == "learned":
        plain = c.norm == "layer" and not c.gated and not c.qk_norm
        biased = c.attention_bias and c.mlp_bias
        return "gpt2" if plain and biased and whole and c.n_head == c.n_kv_head else "ponder"
    if c.norm == "layer" or not c.gated:
        return "ponder"
    if c.qk_norm:
        return "ponder" if c.qkv_bias or c.mlp_bias or c.nope_layers else "qwen3"
    if c.qkv_bias:
        return "qwen2" if whole and not c.mlp_bias and not c.nope_layers else "ponder"
    if c.nope_layers:
        return "smollm3"
    return "ponder" if c.n_embd % c.n_head else "llama"  # Transformers' Llama insists on it


def to_fields(config: GPTConfig) -> dict[str, Any]:
    """The content of config.json, but for the tokens."""
    kind, c = model_type(config), config
    names = {ours: theirs for theirs, ours in reversed(HIDDEN_ACTS.items())}
    sizes: dict[str, Any] = dict(
        max_position_embeddings=c.context,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        hidden_size=c.n_embd,
        intermediate_size=c.n_inner,
        hidden_act=names[c.activation],
        rms_norm_eps=c.norm_eps,
    )
    fields: dict[str, Any] = dict(
        model_type=kind,
        architectures=[ARCHITECTURES[kind]],
        vocab_size=c.vocab_size,
        tie_word_embeddings=c.tie_embeddings,
    )
    if kind == "gpt2":
        dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        activation = dict(activation_function=GPT2_ACTS.get(c.activation, names[c.activation]))
        renamed = {GPT2_NAMES[name]: value for name, value in sizes.items()}
        return fields | renamed | activation | dropout
    fields |= sizes | dict(num_key_value_heads=c.n_kv_head, head_dim=c.head_dim)
    if kind != "qwen2":
        fields["attention_bias"] = c.attention_bias
    if kind in MLP_BIAS:
        fields["mlp_bias"] = c.mlp_bias
    if kind in ("smollm3", "ponder"):
        fields["no_rope_layers"] = [int(i not in c.nope_layers) for i in range(c.n_layer)]
    if kind == "ponder":
        fields |= dict(
            qk_norm=c.qk_norm,
            gated_mlp=c.gated,
            norm_type=c.norm,
            position_type=c.positions,
            qkv_bias=c.qkv_bias,
        )
    rope: dict[str, Any] = dict(rope_type="default")
    if c.rope_scaling is not None:
        rope = dict(
            rope_type="llama3",
            factor=c.rope_scaling.factor,
            low_freq_factor=c.rope_scaling.low,
            high_freq_factor=c.rope_scaling.high,
            original_max_position_embeddings=c.rope_scaling.original_context,
        )
        fields["rope_scaling"] = rope  # Transformers before 5, vLLM, llama.cpp; so rope_theta
    return fields | dict(
        rope_theta=c.rope_theta, rope_parameters=dict(rope_theta=c.rope_theta) | rope
    )


def from_fields(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig that computes what config.json says, or ValueError naming the field."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(f"model_type is {kind!r}; known are {', '.join(DEFAULTS)}")
    fields = DEFAULTS[kind] | dict(fields)
    _refuse(fields, kind)
    gpt2, ponder = kind == "gpt2", kind == "ponder"
    if gpt2:
        fields.pop("head_dim", None)  # GPT-2 knows none: a head is its share of the width

    def called(name: str) -> str:
        return GPT2_NAMES.get(name, name) if gpt2 else name

    def get(name: str, of: type, default: Any = None) -> Any:
        return _get(fields, called(name), of, default)

    width, heads = get("hidden_size", int), get("num_attention_heads", int)
    layers = get("num_hidden_layers", int)
    if fields.get("head_dim") is None and (heads < 1 or width % heads):
        raise ValueError(
            f"{called('hidden_size')} {width} is not a multiple of "
            f"{called('num_attention_heads')} {heads}"
        )
    activation = get("hidden_act", str, "silu")
    if activation not in HIDDEN_ACTS:
        raise ValueError(
            f"{called('hidden_act')} is {activation!r}; known are {', '.join(HIDDEN_ACTS)}"
        )
    theta, scaling = (10000.0, None) if gpt2 else _rope(fields)
    norm, positions = ("layer", "learned") if gpt2 else ("rms", "rotary")
    if ponder:
        norm, positions = get("norm_type", str, norm), get("position_type", str, positions)
    return GPTConfig(
        vocab_size=get("vocab_size", int),
        context=get("max_position_embeddings", int),
        n_layer=layers,
        n_head=heads,
        n_kv_head=heads if gpt2 else get("num_key_value_heads", int, heads),
        head_dim=get("head_dim", int, width // max(heads, 1)),
        n_embd=width,
        n_inner=get("intermediate_size", int, 4 * width if gpt2 else None),
        gated=get("gated_mlp", bool) if ponder else not gpt2,
        activation=HIDDEN_ACTS[activation],
        qk_norm=get("qk_norm", bool) if ponder else kind == "qwen3",
        attention_bias=gpt2 or (kind != "qwen2" and get("attention_bias", bool, False)),
        tie_embeddings=get("tie_word_embeddings", bool, False),
        rope_theta=theta,
        norm_eps=get("rms_norm_eps", float, 1e-6),
        norm=norm,
        positions=positions,
        qkv_bias=kind == "qwen2" or (ponder and get("qkv_bias", bool, False)),
        mlp_bias=gpt2 or (kind in MLP_BIAS and get("mlp_bias", bool, False)),
        rope_scaling=scaling,
        nope_layers=_nope_layers(fields, layers) if kind in ("smollm3", "ponder") else (),
    )


def _refuse(fields: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError for a field that asks for what a GPT does not compute."""
    for name in OFF if kind in MLP_BIAS else (*OFF, "mlp_bias"):
        if fields.get(name):
            raise ValueError(f"{name} is {_short(fields[name])}, which a GPT does not express")
    for name in ("scale_attn_weights", "is_causal"):
        if fields.get(name) is False:
            raise ValueError(f"{name} is false, which a GPT does not express")
    # There, use_sliding_window decides.
    if fields.get("sliding_window") and kind not in ("qwen2", "qwen3", "smollm3"):
        raise ValueError(
            f"sliding_window is {_short(fields['sliding_window'])}; a GPT attends to every position"
        )
    layers = fields.get("layer_types") or []
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer != "full_attention":
            raise ValueError(f"layer_types holds {layer!r}; a GPT has full_attention alone")


def _nope_layers(fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers without rotary positions: the zeros of no_rope_layers, else every n-th."""
    marks = fields.get("no_rope_layers")
    if marks is None:
        every = fields.get("no_rope_layer_interval")
        if every is None:
            return ()
        every = _get(fields, "no_rope_layer_interval", int)
        if every < 1:
            raise ValueError(f"no_rope_layer_interval is {every}; it must be at least 1")
        return tuple(range(every - 1, layers, every))
    if not isinstance(marks, list) or len(marks) != layers or any(m not in (0, 1) for m in marks):
        raise ValueError(
            f"no_rope_layers is {_short(marks)}; it must hold a 0 or 1 for each of {layers} layers"
        )
    return tuple(i for i, mark in enumerate(marks) if not mark)


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta, and Llama 3's scaling where there is one."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name} is {_short(rope)}; it must be an object")
    theta = _get(fields if rope.get("rope_theta") is None else rope, "rope_theta", float, 10000.0)
    plain = dict(rope_type="default", type="default", partial_rotary_factor=1.0)
    scaling = None
    if "llama3" in (rope.get("rope_type"), rope.get("type")):
        try:
            scaling = RopeScaling(
                factor=_get(rope, "factor", float),
                original_context=_get(rope, "original_max_position_embeddings", int),
                low=_get(rope, "low_freq_factor", float),
                high=_get(rope, "high_freq_factor", float),
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        used = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        plain |= dict(rope_type="llama3", type="llama3") | {key: rope[key] for key in used}
    # The type first: it is what a reader knows a scaling by.
    first = {key: rope.get(key) for key in ("rope_type", "type")}
    rotary = first | {"partial_rotary_factor": fields.get("partial_rotary_factor")} | rope
    for key, value in rotary.items():
        if key != "rope_theta" and value not in (None, plain.get(key)):
            raise ValueError(
                f"{name} has {key} {_short(value)}; a GPT has plain rotary positions or llama3's"
            )
    return theta, scaling


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
