"""Transformers' Llama and Qwen3, tiny and with random weights: what GPT is measured against."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class Peer:
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)

    def build(self) -> LlamaForCausalLM | Qwen3ForCausalLM:
        config, model = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[self.model_type]
        shape = dict(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        peer = model(config(**shape | self.fields)).eval()
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
}
