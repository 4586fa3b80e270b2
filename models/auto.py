"""GPT behind Transformers' Auto classes, for model_type "ponder" (see `hub.register`)."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels import attention
from .cache import KVCache, LayerCache
from .config_json import from_fields
from .gpt import GPT
from .layers import Rotary

# What a model's cache is called in its calls and answers: Transformers 5.24 renamed it.
_NAMES = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in _NAMES else "past_key_values"


class PonderConfig(PretrainedConfig):
    """config.json of model_type "ponder": Llama's fields, and those that `config_json` names."""

    model_type = "ponder"
    max_position_embeddings = 0  # Transformers asks for it before config.json's is set


class _Layer(LayerCache):
    """One layer of Transformers' cache, as GPT's attention asks for it."""

    def __init__(self, past: DynamicCache, index: int, length: int):
        self.past, self.index, self.length = past, index, length

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.past.update(k, v, self.index)
        if keys.shape[2] != self.length + k.shape[2]:
            raise ValueError(
                f"the {type(self.past).__name__} gives {keys.shape[2]} keys for "
                f"{self.length + k.shape[2]} tokens; a ponder model takes a DynamicCache"
            )
        return attention(q, keys, values, causal=True)


class _Past(KVCache):
    """Transformers' cache, all rows equally long, as GPT asks for it."""

    def __init__(self, past: DynamicCache, tokens: Tensor, n_layer: int):
        self.past, self.n_layer, self.length = past, n_layer, int(past.get_seq_length())
        self.lengths = torch.full(tokens.shape[:1], self.length, device=tokens.device)
        self.empty = self.length == 0

    def views(self, positions: Tensor | None, count: int) -> list[LayerCache]:
        return [_Layer(self.past, i, self.length) for i in range(self.n_layer)]


class PonderForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT as a Transformers model, with its cache; rows of a batch have equal lengths, unpadded."""

    config_class = PonderConfig
    base_model_prefix = "model"

    def __init__(self, config: PonderConfig):
        super().__init__(config)
        self.model = GPT(from_fields(config.to_dict()))
        self.lm_head = self.model.lm_head  # the standard names have it out here
        del self.model.lm_head
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.post_init()

    def _init_weights(self, module) -> None:
        if isinstance(module, Rotary):
            module.reset()  # not part of a checkpoint
        else:
            super()._init_weights(module)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        *,
        cache: DynamicCache | None = None,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) → logits (B, T, V); the last `logits_to_keep` of them where given.

        position_ids are those of unpadded rows: 0, 1, … after what the cache holds; use_cache
        begins a cache where none is given; it is `cache` or, before Transformers 5.24,
        `past_key_values`. Raises ValueError for an attention_mask with zeros, for
        more tokens than the context, and for a cache that gives more keys than there are tokens.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask has zeros; a ponder model takes rows of equal length")
        c, past, length = self.model.config, None, input_ids.shape[1]
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if cache is not None:
            past = _Past(cache, input_ids, c.n_layer)
            length += past.length
        if length > c.context:
            raise ValueError(f"{length} tokens are more than the model's context of {c.context}")
        hidden = self.model.hidden(input_ids, past)
        logits = self.lm_head(hidden[:, -logits_to_keep:]).float()
        named: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(logits=logits, **named)
