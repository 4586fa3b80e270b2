"""Our kernels under a Transformers model: `patch(model)` puts them in place, `unpatch` takes them
out.

Attention goes through Transformers' own registry (`hf_attention`). Norms, MLPs (`hf_layers`), the
rotary positions of attention layers, and the loss of the whole model change by the class of the
module, to a subclass whose forward calls a kernel; parameters, names and all else stay. A module is
taken for what it is by its parts, and only if the kernel gives what its own forward gives on a few
numbers; otherwise it stays as it is, and the summary says why. Where something comes between later
(LoRA, quantization, a hook on a projection), the module falls back on its own forward.
"""

import copy
import functools
import inspect
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import ACTIVATIONS, linear_cross_entropy
from ..kernels import rotary as turn
from . import hf_attention, hf_layers
from .layers import hooked, readable

# Models whose logits are a head's alone, as they are or capped as Gemma's, in the five ways that
# Transformers writes that down; the loss is known of every model with the code of one of them.
LOSSES = [
    *("LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel"),
    *("NemotronForCausalLM", "GPTNeoXForCausalLM"),
]
STATE, OF = "_ponder_patch", "_ponder_of"  # on the model, and on each class that is put in
_patched: weakref.WeakSet[Any] = weakref.WeakSet()  # some of which may share a config


@dataclass
class Part:
    """How many modules of a kind were replaced, and how many were kept, by the reason."""

    name: str
    replaced: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    note: str = ""

    def __str__(self) -> str:
        kept = [f"{count} kept: {why}" for why, count in self.kept.items()]
        none = "" if self.replaced or kept else "none was found"
        said = "; ".join(x for x in (f"{self.replaced} replaced", *kept, none, self.note) if x)
        return f"  {self.name:<10} {said}"


class _Undo:
    """What attention was before, of the model and of the parts that have a config of their own."""

    def __init__(self, attention: dict[str, str] | None = None):
        self.attention = attention

    def __reduce__(self):
        return _undo, (self.attention,)


def _undo(attention: dict[str, str] | None) -> _Undo:
    """An unpickled _Undo, in a process where our attention may not be known yet."""
    hf_attention.register()
    return _Undo(attention)


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    rotary: bool = True,
    norm: bool = True,
    mlp: bool = True,
    loss: bool = True,
    quiet: bool = False,
) -> list[Part]:
    """Put our kernels under a Transformers model, in place; prints and returns what was replaced.

    Outputs, gradients, `generate` and `save_pretrained` stay what they were, within the rounding of
    the parameters' dtype; attention, MLPs and norms by our kernels where the model is on a CUDA
    GPU, and by PyTorch's best operations elsewhere. Second derivatives (create_graph=True) raise.
    What the model lacks or a kernel does not compute is kept as it is. Patch before a model is
    wrapped (PEFT, DDP, FSDP, torch.compile).

    loss: while training, with labels given, the logits are never held: the output's `logits` is
    None. A trainer that reads them needs loss=False. A batch without a target has a loss of 0.
    The other flags leave out a kind of part; quiet prints nothing.

    Raises ValueError for what is no Transformers model, or patched already, or without weights (on
    the meta device), or in a dtype that no kernel takes on a GPU; nothing is changed then.
    """
    _check(model)
    wanted = dict(rotary=rotary, norm=norm, mlp=mlp)
    names = dict(rotary="rotary", norm="norm", mlp="MLP")
    parts = {kind: Part(names[kind]) for kind, want in wanted.items() if want}
    classes: list[tuple[nn.Module, type]] = []
    known: dict[Any, type | str] = {}
    for module in model.modules():
        for kind, part in parts.items():
            found = _KINDS[kind](module, known)
            if isinstance(found, str):
                part.kept[found] += 1
            elif found is not None:
                part.replaced += 1
                classes.append((module, found))
    everything = list(parts.values())
    if loss:
        part, found = Part("loss"), _loss(model)
        everything.append(part)
        if isinstance(found, str):
            part.kept[found] += 1
        else:
            part.replaced, part.note = 1, "while training, and then the output's logits is None"
            classes.append((model, found))
    undo = _Undo()
    if attention:
        everything.insert(0, _attention(model, undo))
    for module, new in classes:
        module.__class__ = new
    setattr(model, STATE, undo)
    _patched.add(model)
    if not quiet:
        print("\n".join([f"ponder under {type(model).__name__}:", *map(str, everything)]))
    return everything


def unpatch(model: nn.Module) -> None:
    """Undo `patch`; ValueError for a model that is not patched, or has a part that something else
    (`fully_shard`, a parametrization) has given a class since; nothing is changed then."""
    # A model that was made by the class of a patched one has that class alone.
    undo = vars(model).get(STATE, _Undo() if OF in vars(type(model)) else None)
    if undo is None:
        raise ValueError(f"the {type(model).__name__} is not patched: there is nothing to undo")
    changed = {name: m for name, m in model.named_modules() if hasattr(type(m), OF)}
    for name, module in changed.items():
        if OF not in vars(type(module)):
            raise ValueError(
                f"{name or 'the model'} was made into a {type(module).__name__} after patch; undo "
                "that first"
            )
    for module in changed.values():
        module.__class__ = vars(type(module))[OF][1]
    if undo.attention is not None:
        model.set_attn_implementation(undo.attention)  # pyright: ignore[reportCallIssue]
    vars(model).pop(STATE, None)
    _patched.discard(model)


def _check(model: nn.Module) -> None:
    try:
        from transformers import PreTrainedModel
    except ImportError:
        raise ValueError("patch needs Transformers: pip install transformers") from None
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"patch takes a Transformers model, not a {name}: unwrap it first")
    for part, module in model.named_modules():
        if hasattr(module, STATE) or hasattr(type(module), OF):
            part = f"{part} in the {name}" if part else f"the {name}"
            raise ValueError(f"{part} is patched already; unpatch it first")
    for parameter, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"the {name} has no weights: {parameter} is on the meta device")
        if p.is_cuda and p.dtype == torch.float64:
            raise ValueError(
                f"{parameter} is {p.dtype} on {p.device}; the kernels take fp32, fp16 and bf16"
            )


def _attention(model: Any, undo: _Undo) -> Part:
    """Point the model to our attention function; a part that counts its layers."""
    hf_attention.register()
    named = [m for m in model.modules() if type(m).__name__.endswith(("Attention", "MLA"))]
    # BertAttention holds a BertSelfAttention: one layer.
    layers = [m for m in named if not any(n in named for n in m.modules() if n is not m)]
    configs = {part: getattr(model.config, part, None) for part in model.config.sub_configs}
    configs = {"": model.config} | {part: c for part, c in configs.items() if c is not None}
    before = {part: config._attn_implementation for part, config in configs.items()}
    shared = (getattr(other, STATE).attention for other in _patched if other.config is model.config)
    before = next(filter(None, shared), before)
    part, why = Part("attention"), _own_attention(model, [*configs.values()], layers)
    if why is None:
        model.set_attn_implementation(hf_attention.NAME)
        if model.config._attn_implementation != hf_attention.NAME:
            why = f"{type(model).__name__} does not go by Transformers' registry"
    if why is not None:
        part.kept[why] = len(layers)
        return part
    undo.attention = before
    part.replaced = len(layers)
    found = [_get(m, name) for m in layers for name in ("attention_dropout", "attn_dropout")]
    rates = {d.p if isinstance(d, nn.Dropout) else d for d in found}
    rates = {float(rate) for rate in rates if isinstance(rate, int | float)}
    if max(rates, default=0.0) > 0:
        part.note = f"by PyTorch's sdpa while training, with dropout {max(rates)}"
    return part


def _own_attention(model: Any, configs: list[Any], layers: list[nn.Module]) -> str | None:
    """Why the model keeps its own attention, if it does."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} takes no attention of others"
    if any(config.output_attentions for config in configs):
        return "its config has output_attentions"
    if any(config.model_type in hf_attention.WHOLE for config in configs):
        return f"{name} tells its layers by the whole mask alone"
    chooses = next(filter(_chooses_keys, layers), None)
    return None if chooses is None else f"{type(chooses).__name__} chooses its keys by itself"


def _chooses_keys(layer: nn.Module) -> bool:
    """Whether an attention layer picks keys by a rule that it tells eager attention and SDPA alone,
    by their names (DeepSeek-V3.2), or joins some to those that the mask is for (DeepSeek-V4)."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    told = code is not None and ("eager", "sdpa") in code.co_consts
    return told or any(_get(layer, name) is not None for name in ("indexer", "compressor"))


def _norm(module: nn.Module, known: dict) -> type | str | None:
    old = type(module)
    if isinstance(module, nn.LayerNorm) and old is nn.LayerNorm:
        affine = len(module.normalized_shape) == 1 and module.weight is not None
        kinds = ["LayerNorm"] if affine else []
    else:  # T5's LayerNorm is Llama's RMSNorm
        weight, names = _get(module, "weight"), [name for name, _ in module.named_parameters()]
        vector = isinstance(weight, Tensor) and weight.ndim == 1
        named = old.__name__.endswith("Norm")  # Mamba-2's RMSNormGated takes a gate too
        if not named and not ("Norm" in old.__name__ and vector):
            return None
        plain = named and vector and names == ["weight"]
        plain = plain and isinstance(hf_layers.epsilon(module), float)
        kinds = ["RMSNorm", "OffsetRMSNorm"] if plain else []
    return _proven(module, kinds, None, known)


def _mlp(module: nn.Module, known: dict) -> type | str | None:
    name, parts = type(module).__name__, hf_layers.Parts.of(module)
    named = name.endswith(("MLP", "FFN", "FeedForward", "Experts"))
    if parts is None:
        return f"{name} is of no known parts" if named else None
    function = getattr(module, parts.function)
    if isinstance(function, nn.Module) and hooked(function):
        return f"{parts.function} is hooked ({type(function).__name__})"
    activation = _activation(function)
    if not named and activation in (None, "identity"):  # an attention, with a dropout left out
        return None
    if activation is None:
        return f"no kernel has its activation ({type(function).__name__})"
    for part in parts.projections:
        if not readable(projection := getattr(module, part)):
            weight = type(_get(projection, "weight"))
            if type(projection) is nn.Linear and weight is not nn.Parameter:
                return f"{part} is quantized or distributed (its weight is a {weight.__name__})"
            return f"{part} is wrapped or hooked ({type(projection).__name__})"
    own = sum(len(list(getattr(module, part).parameters())) for part in parts.projections)
    if len(list(module.parameters())) > own:
        return f"{name} has parameters beside its projections"
    kinds = ["GatedMLP"] if len(parts.projections) == 3 else ["PlainMLP", "JoinedMLP"]
    parts = parts._replace(activation=activation, proven=hf_layers.identity(function))
    return _proven(module, kinds, parts, known)


def _rotary(module: nn.Module, known: dict) -> type | str | None:
    """An attention layer that turns queries and keys by the apply_rotary_pos_emb of its file."""
    old, forward = type(module), type(module).forward
    if not isinstance(forward, types.FunctionType):
        return None
    innermost = inspect.unwrap(forward)
    if "apply_rotary_pos_emb" not in innermost.__code__.co_names:
        return None
    if _turning(innermost.__globals__["apply_rotary_pos_emb"]) is None:
        return f"{old.__name__} turns by other pairs"
    if "forward" in vars(module) or _turned(forward) is None:
        return "its forward is replaced"
    return _class("rotary", old)


def _turned(forward: types.FunctionType) -> types.FunctionType | None:
    """The same code with our apply_rotary_pos_emb, in the same decorators; None where one of them
    holds what it decorates in another way than by its closure."""
    scope, cells = forward.__globals__, forward.__closure__
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        # Without a name the compiler does not take the scope for the file's own.
        scope = {name: x for name, x in scope.items() if name != "__name__"}
        scope["apply_rotary_pos_emb"] = _turning(scope["apply_rotary_pos_emb"])
    else:
        held, turned = [cell.cell_contents is inner for cell in cells or ()], _turned(inner)
        if turned is None or sum(held) != 1:
            return None
        inner = types.CellType(turned)
        cells = tuple(inner if h else cell for h, cell in zip(held, cells or (), strict=True))
    made = types.FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, cells
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


_KINDS: dict[str, Callable] = dict(rotary=_rotary, norm=_norm, mlp=_mlp)


@functools.cache
def _turning(theirs: Callable) -> Callable | None:
    """Our kernel in the place of an apply_rotary_pos_emb, if it computes the same."""

    def apply_rotary_pos_emb(q, *others, **options):
        if len(others) == 3 and options in ({}, {"unsqueeze_dim": 1}):
            k, cos, sin = others
            if cos.ndim == 3 and cos.shape[-1] == q.shape[-1] and k.dtype == q.dtype:
                half = slice(q.shape[-1] // 2)
                cos, sin = cos[..., half], sin[..., half]
                return turn(q, k, *((cos[0], sin[0]) if len(cos) == 1 else (cos, sin)))
        hf_attention.say_once(
            "rotary positions of a part of each head, or of queries alone, are Transformers' own"
        )
        return theirs(q, *others, **options)

    numbers = torch.arange(2.0 * 3 * 16, device="cpu").sin()
    angles = numbers.view(2, 3, 16)[..., :8].repeat(1, 1, 2)
    q, k = numbers.cos().view(2, 1, 3, 16).repeat(1, 2, 1, 1), numbers.view(2, 1, 3, 16)
    try:
        expected = theirs(q, k, angles.cos(), angles.sin())
        found = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
        same = all(_near(x, y) for x, y in zip(found, expected, strict=True))
    except Exception:  # another signature: any error says so
        return None
    return apply_rotary_pos_emb if same else None


def _loss(model: Any) -> type | str:
    """The model's class with the forward of `_fused`, if its loss is known."""
    import transformers

    old = type(model)
    known = (getattr(transformers, name) for name in LOSSES)
    ours = old.__module__.startswith("transformers.")
    if not ours or not any(_code(old) == _code(kind) for kind in known):
        return f"that of {old.__name__} is not known"
    if "forward" in vars(model):
        return "the model's forward is replaced"

    return _class("loss", old)


def _code(kind: type) -> Any:
    """What a class's forward does, but for its docstring."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code and (code.co_code, code.co_names, code.co_varnames, code.co_consts[1:])


def _fused(theirs: Callable) -> Callable:
    """A model's forward that computes the loss, where it can, without holding the logits."""
    caps = "final_logit_softcapping" in inspect.unwrap(theirs).__code__.co_names

    @functools.wraps(theirs)
    def forward(self, input_ids=None, *args, labels=None, **kwargs):
        if labels is None or args or not _can_fuse(self, kwargs):
            labels = {} if labels is None else dict(labels=labels)
            return theirs(self, input_ids, *args, **labels, **kwargs)
        from transformers import modeling_outputs as outputs

        shifted, ignored = kwargs.pop("shift_labels", None), kwargs.pop("ignore_index", -100)
        kwargs.pop("logits_to_keep", None)
        out = self.base_model(input_ids, **kwargs)
        hidden, count = out.last_hidden_state, kwargs.get("num_items_in_batch")
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        loss = linear_cross_entropy(
            hidden,
            self.lm_head.weight,
            shifted.to(hidden.device).reshape(hidden.shape[:-1]),
            bias=self.lm_head.bias,
            ignore_index=ignored,
            softcap=self.config.final_logit_softcapping if caps else None,
            reduction="mean" if count is None else "sum",
        )
        if count is not None:
            loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        kind = outputs.CausalLMOutputWithPast
        if hasattr(out, "cross_attentions"):  # GPT-2's
            kind = outputs.CausalLMOutputWithCrossAttentions
        return kind(loss=loss, **{f.name: getattr(out, f.name) for f in fields(kind)[2:]})

    return forward


def _can_fuse(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call with labels wants the usual loss, and no logits."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    keep, as_dict = kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
    return (
        model.training
        and model.loss_function is ForCausalLMLoss
        and readable(model.lm_head)
        and isinstance(keep, int)
        and keep == 0
        and (as_dict if as_dict is not None else getattr(model.config, "return_dict", True))
        and kwargs.get("encoder_hidden_states") is None
    )


def _class(kind: str, old: type, parts: hf_layers.Parts | None = None) -> type:
    """`old` with another forward: a subclass by its name, one for each `kind`, and each `parts` of
    an MLP."""
    return _made(kind, old, old.forward, parts)


@functools.cache
def _made(kind: str, old: type, forward: Any, parts: hf_layers.Parts | None) -> type:
    members: dict[str, Any] = dict(__module__=old.__module__, __qualname__=old.__qualname__)
    members |= {OF: (kind, old, parts), "__reduce_ex__": _reduce, "ponder_parts": parts}
    before = ()
    if kind in _FORWARDS:
        members["forward"] = _FORWARDS[kind](forward)
    else:  # its super() is `old`
        before = (getattr(hf_layers, kind),)
    return type(old.__name__, (*before, old), members)


_FORWARDS: dict[str, Callable] = dict(rotary=_turned, loss=_fused)


def _reduce(module: nn.Module, protocol: Any):
    """For pickle and copy, which look a class up by its name, and would find the old one."""
    made, *rest = object.__reduce_ex__(module, protocol)
    of = vars(type(module)).get(OF)  # None: something has made a class of ours into its own
    return (made, *rest) if of is None else (_blank, of, *rest[1:])


def _blank(*of: Any) -> nn.Module:
    return nn.Module.__new__(_class(*of))


def _proven(
    module: nn.Module, kinds: list[str], parts: hf_layers.Parts | None, known: dict
) -> type | str:
    """The first of `kinds` that gives what the module's own forward gives, as a class."""
    old = type(module)
    if "forward" in vars(module):
        return "its forward is replaced"
    # Of one class and with the same settings: those may differ from layer to layer.
    simple = bool | int | float | str
    settings = tuple(
        (name, x if isinstance(x, simple) else id(x))
        for name, x in vars(module).items()
        if isinstance(x, simple) or name[0] != "_"
    )
    key = (old, *kinds, parts, settings)
    if key not in known:
        classes = (_class(kind, old, parts) for kind in kinds)
        other = f"{old.__name__} computes something else"
        known[key] = next((new for new in classes if _agree(module, new)), other)
    return known[key]


@torch.no_grad()
def _agree(module: nn.Module, new: type) -> bool:
    """Whether a copy of the module with random weights, in fp32, gives the same under both classes,
    while training (its dropout, with the same random numbers) and not, for rows with a mean and of
    three magnitudes, one near the root of a norm's epsilon, one beyond what an MLP may clamp; a row
    grows along its width, which a norm of groups does not pass. No hook sees the trial."""
    old, weight = type(module), next(module.parameters())
    width = weight.shape[0] if weight.ndim == 1 else _width(module)
    x = 0.5 + torch.arange(3.0 * width, device=weight.device).sin().view(1, 3, width)
    x = x * torch.linspace(0.2, 3.0, width, device=weight.device)
    x = x * x.new_tensor([1.0, 1e-3, 30.0])[:, None]
    hooks = (x for m in module.modules() for name, x in vars(m).items() if "_hooks" in name)
    found = []
    try:
        trial = copy.deepcopy(module, {id(x): type(x)() for x in hooks}).float()
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)
            for p in (*trial.parameters(), *trial.buffers()):
                if p.is_floating_point():
                    p.normal_(std=1.0 if p.ndim == 1 else width**-0.5)
            for m in trial.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.5  # where it stands shows at any rate
            for training in (False, True):
                trial.train(training)
                for trial.__class__ in (old, new):
                    torch.manual_seed(1)
                    found.append(trial(x))
        return _near(found[1], found[0]) and _near(found[3], found[2])
    except Exception:  # its forward is not one of a tensor that gives a tensor: any error says so
        return False


def _near(found: Tensor, expected: Tensor) -> bool:
    """Row by row within a coarse bound: what would be another computation differs by far more."""
    error = (found.double() - expected.double()).norm(dim=-1)
    return bool((error <= 0.02 * expected.double().norm(dim=-1)).all())


def _width(module: nn.Module) -> int:
    """The input width of an MLP: that of its first projection, a Linear or a Conv1D."""
    first = next(m for m in module.modules() if isinstance(_get(m, "weight"), Tensor))
    return first.weight.shape[1 if isinstance(first, nn.Linear) else 0]  # pyright: ignore


def _activation(function: Callable) -> str | None:
    """Our name of an activation function, by its values."""
    x = torch.linspace(-20, 20, 401, dtype=torch.float64, device="cpu")
    try:
        y = function(x)
    except Exception:  # whatever it is, it is no function of a tensor on the CPU
        return None
    for name, ours in ACTIVATIONS.items():
        if isinstance(y, Tensor) and torch.allclose(y, ours(x), rtol=1e-9, atol=1e-9):
            return name
    return None


def _get(module: nn.Module, name: str, default: Any = None) -> Any:
    return getattr(module, name, default)
