"""One token a row, drawn from a random stream of the row's own. Inference only.

    token = min {i : c_i > u · c_V},   c_i = sum_{j <= i} p_j over the tokens that the filters keep

The inverse of the cumulative distribution in the order of token ids, at one uniform number u in
[0, 1) that is a function of (seed, position) alone. So a draw depends on the row's logits, its
parameters, its seed and its position, and on nothing else that shares the batch.

u comes from Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): key
(seed mod 2³², seed div 2³²), counter (position mod 2³², position div 2³², 0, 0); the first two of
the four output words, x and y, make u = (2²¹ x + y div 2¹¹) / 2⁵³.
Shapes: B rows, V tokens of vocabulary.
"""

import math
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._runtime import (
    TRITON_TYPE,
    Specialization,
    check_device,
    check_dtype,
    jit,
    launch,
    operation,
    tl,
    use_triton,
)

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of the counter's words 0 and 2
WEYL = (0x9E3779B9, 0xBB67AE85)  # what each of the 10 rounds adds to the key's words


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox 4x32-10: (4, B) random words of a counter (4, B) and a key (2, B).

    32-bit words in int64 (of which products keep the low 64 bits, as unsigned ones would).
    """
    multipliers = torch.tensor(MULTIPLIERS, device=key.device)[:, None]
    weyl = torch.tensor(WEYL, device=key.device)[:, None]
    steps = torch.arange(10, device=key.device)[:, None, None]
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, words 1 and 3
    for round_key in (key + steps * weyl & WORD).unbind():
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_and_(WORD).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(WORD)
    return torch.stack((even, odd), 1).flatten(0, 1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """fp64 u in [0, 1) of each (seed, position): a multiple of 2⁻⁵³, every one as likely."""
    halves = torch.stack((seeds, seeds >> 32, positions, positions >> 32)) & WORD
    words = philox(torch.cat((halves[2:], torch.zeros_like(halves[2:]))), halves[:2])
    return ((words[0] << 21) | (words[1] >> 11)).double() * 2.0**-53


def sample_tokens_reference(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition, and the path on CPU: filters that are off as numbers cost nothing.

    A parameter (B,) and the same number for all rows give the same bits: both are fp32, and every
    reduction is along a row.
    """
    logits = logits.float()
    n_token = logits.shape[1]
    logprobs = logits.log_softmax(-1)
    if not isinstance(temperature, Tensor) and temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    scaled = logits
    if isinstance(temperature, Tensor) or temperature != 1:
        divisor = temperature
        if isinstance(temperature, Tensor):
            divisor = torch.where(temperature == 0, 1.0, temperature)[:, None]
        scaled = (logits - logits.amax(-1, keepdim=True)) / divisor  # finite for the smallest
    weights = scaled.softmax(-1)
    n_best = n_token if isinstance(top_k, Tensor) or top_k == 0 else min(top_k, n_token)
    nucleus = isinstance(top_p, Tensor) or top_p < 1
    if nucleus or n_best < n_token or isinstance(top_k, Tensor):
        few = n_best < n_token
        ordered, ids = logits.topk(n_best) if few else logits.sort(-1, descending=True)
        threshold = ordered[:, -1:]
        if isinstance(top_k, Tensor):
            last = torch.where(top_k == 0, n_token, top_k).clamp_max(n_token) - 1
            threshold = ordered.gather(1, last[:, None])
        weights = weights.masked_fill(logits < threshold, 0.0)
        if nucleus:
            share = top_p[:, None] if isinstance(top_p, Tensor) else top_p
            wanted = weights.cumsum(-1, dtype=torch.float64)[:, -1:] * share
            mass = weights.gather(1, ids).cumsum(-1, dtype=torch.float64)
            crossing = (mass < wanted).sum(-1, keepdim=True).clamp_max_(n_best - 1)
            threshold = ordered.gather(1, crossing)
            if isinstance(share, Tensor):
                threshold = threshold.masked_fill(share >= 1, -math.inf)
            weights = weights.masked_fill(logits < threshold, 0.0)
    if isinstance(min_p, Tensor) or min_p > 0:
        share = min_p[:, None] if isinstance(min_p, Tensor) else min_p
        weights = weights.masked_fill(weights < weights.amax(-1, keepdim=True) * share, 0.0)
    mass = weights.cumsum(-1, dtype=torch.float64)
    tokens = (mass <= mass[:, -1:] * uniform(seeds, positions)[:, None]).sum(-1)
    if isinstance(temperature, Tensor):
        tokens = torch.where(temperature == 0, logits.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


# The kernel has one program a row, which goes over the vocabulary a block at a time, with no sort.
# The thresholds of top-k and top-p are found by bisection: the highest logit at or above which
# there are k tokens, or a mass of top_p. A step halves the distance in the ordered bits of a float,
# then goes on to the next logit there is: exact, after at most 32 passes over a cached row.


@jit
def _ordered(x):
    """An integer that is ordered as the float is."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit
def _unordered(x):
    bits = x.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _block(row_ptr, start, n_token, BLOCK_V: tl.constexpr):
    o_v = start + tl.arange(0, BLOCK_V)
    m_v = o_v < n_token
    return o_v, m_v, tl.load(row_ptr + o_v, mask=m_v, other=float("-inf")).to(tl.float32)


@jit
def _weight(b_logit, best, temperature):
    """The probability, relative to that of the best."""
    b_temperature = tl.zeros(b_logit.shape, tl.float32) + temperature
    return tl.exp(tl.div_rn(b_logit - best, b_temperature))


@jit
def _highest_threshold(
    row_ptr,
    n_token,
    best,
    temperature,
    threshold,
    wanted,
    COUNT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The highest logit at or above which the weights from `threshold` up sum to `wanted`.

    With COUNT, at or above which there are so many tokens.
    """
    low, high = _ordered(threshold), _ordered(best)
    while low < high:
        middle = (low + high + 1) >> 1
        logit = _unordered(middle)
        mass = tl.full((), 0.0, tl.float64)
        above = tl.full((), float("inf"), tl.float32)
        below = tl.full((), float("-inf"), tl.float32)
        for start in range(0, n_token, BLOCK_V):
            _, m_v, b_logit = _block(row_ptr, start, n_token, BLOCK_V)
            m_above = m_v & (b_logit >= logit)
            if COUNT:
                b_mass = tl.where(m_above, 1.0, 0.0)
            else:
                b_mass = tl.where(m_above, _weight(b_logit, best, temperature), 0.0)
            mass += tl.sum(b_mass).to(tl.float64)
            above = tl.minimum(above, tl.min(tl.where(m_above, b_logit, float("inf"))))
            below = tl.maximum(below, tl.max(tl.where(m_above, float("-inf"), b_logit)))
        if mass >= wanted:
            low = tl.maximum(middle, _ordered(above))
        else:
            high = tl.minimum(middle - 1, _ordered(below))
    return _unordered(low)


@jit
def _kept(row_ptr, start, n_token, best, temperature, threshold, min_p, BLOCK_V: tl.constexpr):
    """A block's weights, 0 where filtered out."""
    o_v, m_v, b_logit = _block(row_ptr, start, n_token, BLOCK_V)
    b_weight = _weight(b_logit, best, temperature)
    kept = m_v & (b_logit >= threshold) & (b_weight >= min_p)
    return o_v, tl.where(kept, b_weight, 0.0)


@jit
def _mass(row_ptr, n_token, best, temperature, threshold, min_p, BLOCK_V: tl.constexpr):
    mass = tl.full((), 0.0, tl.float64)
    for start in range(0, n_token, BLOCK_V):
        _, b_weight = _kept(row_ptr, start, n_token, best, temperature, threshold, min_p, BLOCK_V)
        mass += tl.sum(b_weight).to(tl.float64)
    return mass


@jit
def _uniform(seed, position):
    counter = position.to(tl.uint64, bitcast=True)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, low * 0, low * 0)
    bits = (words[0].to(tl.uint64) << 21) | (words[1] >> 11).to(tl.uint64)
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2⁻⁵³


@jit
def _sample_tokens_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,
    logprob_ptr,
    stride_row,
    n_token,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i_row * stride_row
    best = tl.full((), float("-inf"), tl.float32)
    least = tl.full((), float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    token = tl.full((), 0, tl.int32)
    for start in range(0, n_token, BLOCK_V):
        o_v, m_v, b_logit = _block(row_ptr, start, n_token, BLOCK_V)
        block_best = tl.max(b_logit)
        if block_best > best:  # only where greater: of equals, the lowest id
            token = start + tl.argmax(b_logit, 0)
        new = tl.maximum(best, block_best)
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(best - finite) + tl.sum(tl.exp(b_logit - finite))
        best = new
        least = tl.minimum(least, tl.min(tl.where(m_v, b_logit, float("inf"))))

    temperature = tl.load(temperature_ptr + i_row)
    if temperature > 0.0:
        threshold = least
        top_k = tl.load(top_k_ptr + i_row)
        if (top_k > 0) & (top_k < n_token):
            wanted = top_k.to(tl.float64)
            threshold = _highest_threshold(
                row_ptr, n_token, best, temperature, threshold, wanted, True, BLOCK_V
            )
        top_p = tl.load(top_p_ptr + i_row)
        if top_p < 1.0:
            kept = _mass(row_ptr, n_token, best, temperature, threshold, 0.0, BLOCK_V)
            wanted = kept * top_p.to(tl.float64)
            threshold = _highest_threshold(
                row_ptr, n_token, best, temperature, threshold, wanted, False, BLOCK_V
            )
        min_p = tl.load(min_p_ptr + i_row)
        mass = _mass(row_ptr, n_token, best, temperature, threshold, min_p, BLOCK_V)
        target = mass * _uniform(tl.load(seed_ptr + i_row), tl.load(position_ptr + i_row))
        before = tl.full((), 0.0, tl.float64)
        start = 0
        while start < n_token:
            o_v, b_weight = _kept(
                row_ptr, start, n_token, best, temperature, threshold, min_p, BLOCK_V
            )
            after = before + tl.sum(b_weight).to(tl.float64)
            start += BLOCK_V
            if after > target:
                m_kept = b_weight > 0.0
                m_over = (before + tl.cumsum(b_weight).to(tl.float64) > target) & m_kept
                first = tl.min(tl.where(m_over, o_v, n_token))
                # No token is over where the two sums of the block differ in their last bits.
                token = tl.minimum(first, tl.max(tl.where(m_kept, o_v, 0)))
                start = n_token
            before = after

    # In a row with a NaN the argmax may lie past the last token.
    token = tl.minimum(token, n_token - 1)
    tl.store(token_ptr + i_row, token.to(tl.int64))
    # In this order: beside a large logit the logarithm would be rounded away.
    logprob = (tl.load(row_ptr + token).to(tl.float32) - best) - tl.log(total)
    tl.store(logprob_ptr + i_row, logprob)


def _block_and_warps(n_token: int) -> tuple[int, int]:
    """(BLOCK_V, warps)"""
    return (1024, 4) if n_token <= 1024 else (4096, 8)


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launcher below can compile the kernel."""
    for dtype in TRITON_TYPE.values():
        for n_token in (1024, 4096):
            block_v, num_warps = _block_and_warps(n_token)
            yield Specialization(
                _sample_tokens_kernel,
                dict(
                    logits_ptr=f"*{dtype}:16",
                    temperature_ptr="*fp32:16",
                    top_k_ptr="*i64:16",
                    top_p_ptr="*fp32:16",
                    min_p_ptr="*fp32:16",
                    seed_ptr="*i64:16",
                    position_ptr="*i64:16",
                    token_ptr="*i64:16",
                    logprob_ptr="*fp32:16",
                    stride_row="i32:16",
                    n_token="i32:16",
                ),
                dict(BLOCK_V=block_v),
                num_warps=num_warps,
            )


@operation("ponder::sample_tokens")
def _sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """The kernel on logits whose rows are contiguous and contiguous parameters (B,)."""
    n_row, n_token = logits.shape
    tokens = torch.empty(n_row, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(n_row, dtype=torch.float32, device=logits.device)
    if n_row:
        block_v, num_warps = _block_and_warps(n_token)
        launch(
            _sample_tokens_kernel,
            n_row,
            (logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, logprobs),
            (logits.stride(0), n_token),
            BLOCK_V=block_v,
            num_warps=num_warps,
        )
    return tokens, logprobs


@_sample_tokens.register_fake
def _(logits, temperature, top_k, top_p, min_p, seeds, positions):
    n_row = logits.shape[0]
    return seeds.new_empty(n_row), logits.new_empty(n_row, dtype=torch.float32)


# name: lowest, highest, whether the lowest itself is allowed, in words
LIMITS = {
    "temperature": (0, torch.finfo(torch.float32).max, True, "a finite number >= 0"),
    "top_k": (0, 2**31 - 1, True, "an integer >= 0 (0: no limit)"),
    "top_p": (0, 1, False, "above 0 and at most 1"),
    "min_p": (0, 1, True, "between 0 and 1"),
}


def _checked(name: str, value: Any, n_row: int) -> Any:
    """The parameter in fp32, as the kernel takes it; on a GPU its values are not looked at.

    On CPU, the same value in every row becomes the number: it is cheaper, and gives the same bits.
    """
    low, high, closed, words = LIMITS[name]
    least = most = value
    if isinstance(value, Tensor):
        if value.shape != (n_row,):
            raise ValueError(
                f"sample_tokens: {name} is {tuple(value.shape)}; it must be a number or ({n_row},)"
            )
        if name == "top_k" and value.is_floating_point():
            raise ValueError(f"sample_tokens: top_k is {value.dtype}; it must be {words}")
        value = value.long() if name == "top_k" else value.float()
        if value.device.type != "cpu" or not n_row:
            return value
        least, most = (x.item() for x in value.aminmax())
    elif name == "top_k" and not isinstance(value, int):
        raise ValueError(f"sample_tokens: top_k is {value!r}; it must be {words}")
    inside = least >= low if closed else least > low  # False for NaN
    if not (inside and most <= high):
        raise ValueError(
            f"sample_tokens: {name} is {most if inside else least}; it must be {words}"
        )
    if least < most:
        return value
    return least if name == "top_k" else struct.unpack("f", struct.pack("f", least))[0]


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability; no gradient (inference only).

    The row's logits are divided by `temperature`; then the filters keep, in this order, `top_k`:
    the k most probable tokens; `top_p`: of those, the smallest set whose share of the probability
    is at least top_p (the token that crosses it included); `min_p`: of those, the tokens at least
    min_p times as probable as the best. Logits equal to the last that top_k or top_p keeps are kept
    too. One is drawn from what remains by the inverse of the cumulative distribution, in
    the order of ids, at a uniform number that (seed, position) alone decide: see the module.
    Where temperature is 0: the most probable token, the lowest id of equals.

    logits (B, V) in fp32, fp16 or bf16 (the arithmetic is fp32, sums of probabilities fp64); −inf
    excludes a token. Each parameter is a number or (B,), of which the same values give the same
    tokens; top_k = 0, top_p = 1 and min_p = 0 switch a filter off. seeds and positions (B,) int64:
    which stream, and which of its draws; give each row a seed of its own and count positions up.

    Returns tokens (B,) int64 and logprobs (B,) fp32: the token's log_softmax(logits), that is under
    the model's own distribution, at temperature 1 and unfiltered. A row with a NaN, or all −inf,
    has the log-probability NaN.

    Raises ValueError for shapes and dtypes that do not fit, and for a temperature < 0, a top_k < 0,
    a top_p outside (0, 1] or a min_p outside [0, 1] (in tensors on a GPU these are not looked at:
    it would wait for the device). Source: Holtzman et al. 2020 (top_p), section 3.1; Nguyen et al.
    2024 (min_p), section 3; Fan et al. 2018 (top_k), section 5.1.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample_tokens: logits is {tuple(logits.shape)}; it must be (B, V)")
    check_dtype("sample_tokens", "logits", logits.dtype)
    n_row = logits.shape[0]
    for name, x in (("seeds", seeds), ("positions", positions)):
        if x.shape != (n_row,) or x.dtype != torch.int64:
            raise ValueError(
                f"sample_tokens: {name} is {tuple(x.shape)} {x.dtype}; it must be ({n_row},) int64"
            )
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    check_device("sample_tokens", logits, seeds=seeds, positions=positions, **tensors)
    given = {name: _checked(name, value, n_row) for name, value in given.items()}
    if not use_triton(logits):
        return sample_tokens_reference(logits, **given, seeds=seeds, positions=positions)
    for name, value in given.items():
        if not isinstance(value, Tensor):
            dtype = torch.int64 if name == "top_k" else torch.float32
            value = torch.full((n_row,), value, dtype=dtype, device=logits.device)
        given[name] = value.contiguous()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return _sample_tokens(logits, *given.values(), seeds.contiguous(), positions.contiguous())
