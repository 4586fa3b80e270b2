"""Batched sampling against Transformers' `generate`, same weights, same number of new tokens.

`python -m ponder.benchmarks.sampling`: the model of train_step.py, 64-token prompts, 64 new tokens,
temperature 1; 16 samples of each prompt, as a sweep draws them, or of each prompt one. The peer
runs eagerly with its dynamic KV cache, in the dtype of the row.
"""

import torch

from ponder.benchmarks.measure import DEVICE, Row, rows, synchronize, write
from ponder.benchmarks.train_step import CONFIG, peer_of
from ponder.inference.engine import LocalEngine, Request, SamplingParams
from ponder.models import GPT

PROMPT, NEW = 64, 64
EOS = CONFIG.vocab_size - 1
BATCHES = (64, 256) if DEVICE == "cpu" else (1, 16, 64, 256, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.inference_mode()
def error_of(model: GPT, peer) -> float:
    """Relative difference of the two models' logits on one batch: they are the same model."""
    tokens = torch.randint(CONFIG.vocab_size, (4, PROMPT), device=DEVICE)
    a, b = model(tokens), peer(input_ids=tokens).logits.float()
    return ((a - b).norm() / b.norm()).item()


def build(dtype: torch.dtype) -> tuple[GPT, torch.nn.Module]:
    """Our model (fp32: the engine casts it) and the peer in dtype, with the same random weights."""
    torch.manual_seed(0)
    model = GPT(CONFIG).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # zero output projections would make it trivial
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.lm_head.weight[EOS] = 0.0  # <eos> is rare, as in the middle of a thought
    peer = peer_of(model).to(dtype).eval()
    return model.eval(), peer


def run() -> list[Row]:
    return [row for name, dtype in DTYPES.items() for row in _run(name, dtype)]


def _run(name: str, dtype: torch.dtype) -> list[Row]:
    measured: list[Row] = []
    model, peer = build(dtype)
    error = error_of(model, peer)
    for batch in BATCHES:
        for each in (1, 16) if batch >= 16 else (1,):
            prompts = torch.randint(EOS, (batch // each, PROMPT), device=DEVICE)
            prompts = prompts.repeat_interleave(each, 0)
            rows_of_tokens = [tuple(row) for row in prompts.tolist()]
            engine = LocalEngine(model, slots=batch, eos=EOS, dtype=dtype, device=DEVICE)
            params = SamplingParams(temperature=1.0, max_tokens=NEW)
            counted: list[int] = []

            def ours(e=engine, prompts=rows_of_tokens, params=params, counted=counted) -> None:
                requests = (Request(p, params, 0, i) for i, p in enumerate(prompts))
                counted.append(sum(len(sample.tokens) for sample in e.generate(requests)))
                synchronize()

            def theirs(prompts=prompts) -> None:
                peer.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    eos_token_id=EOS,
                    pad_token_id=EOS,
                    use_cache=True,
                )
                synchronize()

            found = rows(
                "sampling",
                f"{PROMPT}-token prompts, {NEW} new, batch {batch}, {each} of each prompt",
                name,
                {"ponder": ours, "transformers generate": theirs},
                repeats=3,
                warmup=1,
                errors={"ponder": error},
                allowed=1e-5 if dtype == torch.float32 else 5e-2,
            )
            measured += found
            # A sample that drew <eos> ended early: ours is judged by the tokens that it did draw.
            tokens = {"ponder": sum(counted) / len(counted), "transformers generate": batch * NEW}
            rate = {r.implementation: tokens[r.implementation] / r.ms_p50 * 1e3 for r in found}
            ratio = rate["ponder"] / rate["transformers generate"]
            both = ", ".join(f"{who} {value:,.0f}" for who, value in rate.items())
            print(f"  batch {batch}, {each} of each, {name}: tokens/s {both}; {ratio:.2f}×")
    return measured


if __name__ == "__main__":
    write(run())
