"""Transformers' models, tiny and with random weights: what GPT is measured against."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = dict(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=64,
)
GPT2_SHAPE = dict(vocab_size=50, n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=64)
NO_DROPOUT = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


@dataclass(frozen=True)
class Peer:
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        shape = GPT2_SHAPE | NO_DROPOUT if self.model_type == "gpt2" else SHAPE
        tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
        config = AutoConfig.for_model(self.model_type, **shape | tokens | self.fields)
        torch.manual_seed(0)
        peer = AutoModelForCausalLM.from_config(config).eval()
        randomize(peer)
        return peer


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights with which every parameter, norms and biases too, shows in the logits."""
    for p in model.parameters():
        noise = torch.randn_like(p)
        p.copy_(noise * p.shape[1] ** -0.5 if p.ndim == 2 else p + 0.3 * noise)


def theta(value: float) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_theta=value, rope_type="default"))


# Of 16 numbers a head, the first frequency stays, three are blended, the others divided.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# Grouped heads (one and two key-value heads), tied and untied, biases, other thetas and epsilons,
# other activations, and head_dim × heads ≠ width (24 × 4 ≠ 64; Qwen3 even where 4 ∤ width).
PEERS = {
    "llama": Peer("llama"),
    "llama-grouped-biased": Peer(
        "llama", dict(num_key_value_heads=2, attention_bias=True, rms_norm_eps=1e-3)
    ),
    "llama-tied-wide-heads": Peer(
        "llama",
        dict(head_dim=24, num_key_value_heads=1, tie_word_embeddings=True, hidden_act="relu2")
        | theta(500.0),
    ),
    "qwen3": Peer("qwen3", dict(tie_word_embeddings=True, num_key_value_heads=2)),
    "qwen3-untied-odd": Peer(
        "qwen3",
        dict(head_dim=24, hidden_size=54, num_key_value_heads=1, hidden_act="gelu_pytorch_tanh")
        | theta(1e6),
    ),
    "qwen3-biased": Peer("qwen3", dict(attention_bias=True, hidden_act="gelu")),
    "llama-stretched": Peer(
        "llama", dict(rope_parameters=LLAMA3, mlp_bias=True, max_position_embeddings=128)
    ),
    "qwen2": Peer("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True) | theta(1e6)),
    "smollm3": Peer(
        "smollm3",
        dict(num_hidden_layers=3, num_key_value_heads=1, no_rope_layers=[1, 0, 1]) | theta(5e6),
    ),
    "gpt2": Peer("gpt2"),
    "gpt2-untied": Peer("gpt2", dict(tie_word_embeddings=False, activation_function="relu")),
}


# What `patch` knows: every kind of norm, MLP, window, position and head, and sequences of 40 tokens
# that outgrow the windows.
GROUPED = dict(num_key_value_heads=2)
GEMMA = GROUPED | dict(sliding_window=7, query_pre_attn_scalar=20)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "llama": Peer("llama", GROUPED | dict(attention_bias=True, mlp_bias=True)),
    "qwen2": Peer(
        "qwen2", GROUPED | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)
    ),
    "qwen3": Peer("qwen3", GROUPED | dict(tie_word_embeddings=True)),
    "mistral": Peer("mistral", GROUPED | dict(sliding_window=7)),
    "smollm3": Peer("smollm3", GROUPED | dict(no_rope_layers=[1, 0])),
    "gemma2": Peer("gemma2", GEMMA | LAYERS | dict(attn_logit_softcapping=5.0)),
    "gemma3_text": Peer("gemma3_text", GEMMA | LAYERS),
    "phi3": Peer("phi3", dict(sliding_window=9)),
    "olmo2": Peer("olmo2", GROUPED),
    "gpt2": Peer("gpt2"),
    "arcee": Peer("arcee", GROUPED | dict(mlp_bias=True)),
    "nemotron": Peer("nemotron", GROUPED),
    "jais2": Peer("jais2", GROUPED),
    "gpt_neox": Peer("gpt_neox"),
    "starcoder2": Peer("starcoder2", GROUPED | dict(sliding_window=7)),
    "phi": Peer("phi", GROUPED),
}
