"""The engine, on a mock model whose right answers are known and on small GPTs."""

import itertools
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.inference.engine import LocalEngine, Request, SamplingParams, stream_key
from ponder.models import GPTConfig

from ..models.tiny import gpt

EOS, END = 0, 1


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Mock(torch.nn.Module):
    """The next token depends on the whole sequence, which it can only know from the cache.

    A sequence's state is sum_i (i + 1) · token_i. `table` None: the next token is the state modulo
    the vocabulary, for certain. Else row `state mod len(table)` of the table holds its logits.
    """

    def __init__(self, vocabulary=11, context=128, table=None):
        super().__init__()
        self.config = GPTConfig(vocabulary, context, 1, 1, 1, 16)
        self.table = torch.eye(vocabulary).log() if table is None else table
        self.prefilled, self.blocks = [], set()

    def hidden(self, tokens, cache):
        B, T = tokens.shape
        if cache.empty:
            self.prefilled += tokens.tolist()
            self.blocks.add((T, B))
        own = torch.zeros(B, 1, dtype=torch.int64) if cache.empty else cache.lengths[:, None]
        own = own + torch.arange(T)
        cache.empty = False
        cache.keys[0, torch.arange(B)[:, None], 0, own, 0] = tokens.float()
        stored, place = cache.keys[0, :, 0, :, 0].long(), torch.arange(cache.capacity)
        before = torch.as_tensor(cache.offsets()).view(-1, 1, 1)
        state = stored[:, None] * (before + place + 1) * (place <= own[..., None])
        state = state.sum(-1, keepdim=True)
        if cache.prefix is not None:
            shared = cache.prefix.keys[0, cache.prefix.place // cache.prefix.width, 0, :, 0].long()
            place = torch.arange(shared.shape[1])
            state += (shared[:, None] * (place + 1) * (place < before)).sum(-1, keepdim=True)
        return state

    def logits(self, hidden):
        return self.table[hidden[..., 0] % len(self.table)]


def random_table(vocabulary=11, rows=97):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def right_answer(request: Request, vocabulary=11, cue=()) -> tuple[tuple[int, ...], int]:
    """The certain mock's completion of a request, and the number of its forced tokens."""
    sequence, tokens, forced = list(request.prompt), [], 0
    params, left, pending = request.params, request.params.extend, []
    while len(tokens) < params.max_tokens and EOS not in tokens[-1:]:
        token = sum((i + 1) * t for i, t in enumerate(sequence)) % vocabulary
        if len(tokens) == params.budget and END not in tokens:
            token, forced, pending = END, forced + 1, []
        elif pending:
            token, forced = pending.pop(0), forced + 1
        elif token == END and END not in tokens and left:
            token, *pending = cue
            left, forced = left - 1, forced + 1
        tokens.append(token)
        sequence.append(token)
    return tuple(tokens), forced


def results(engine, requests):
    """What each request gave, time aside, by key."""
    return {
        s.request.key: (s.tokens, s.sampled_tokens, s.forced_tokens, s.logprob, s.finish)
        for s in engine.generate(requests)
    }


def mixed_requests(prompts=6, samples=3, vocabulary=21):
    """Prompts of unlike lengths, budgets and filters; each request's key is unique."""
    generator = random.Random(0)
    requests = []
    for i in range(prompts):
        length = generator.choice([1, 2, 5, 31, 32, 33, 60])
        prompt = tuple(generator.randrange(2, vocabulary) for _ in range(length))
        for j, budget in itertools.product(range(samples), (None, 0, 4)):
            params = SamplingParams(
                temperature=(1.0, 0.7, 0.0)[j % 3],
                top_k=(0, 5)[i % 2],
                top_p=(1.0, 0.9)[j % 2],
                max_tokens=(3, 12, 50)[(i + j) % 3],
                budget=budget,
            )
            requests.append(Request(prompt, params, seed=7, index=j, key=(i, j, budget)))
    return requests


def test_a_sample_ends_behind_the_tokens_that_end_it(device):
    """It is the plain one as far as that, to the bit; a forced token ends it too."""
    engine = LocalEngine(gpt(device), slots=16, eos=EOS, think_end=END)
    requests = mixed_requests()
    plain = {s.request.key: s for s in engine.generate(requests)}
    ends = {END, 5, 9}
    found = {s.request.key: s for s in engine.generate(requests, ends=ends)}
    assert found.keys() == plain.keys()
    for key, sample in found.items():
        whole = plain[key].tokens
        stop = next((i for i, t in enumerate(whole) if t in ends), len(whole) - 1)
        assert sample.tokens == whole[: stop + 1]
        assert sample.finish == ("stop" if sample.tokens[-1] == EOS else "length")
    cut = [key for key in found if len(found[key].tokens) < len(plain[key].tokens)]
    assert len(cut) > 20 and any(found[key].forced_tokens for key in cut)


prompts = st.lists(st.integers(0, 10), min_size=1, max_size=70).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(prompts, st.integers(1, 40), st.none() | st.integers(0, 20)),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([1, 9, 16]),
    st.sampled_from([1, 5]),
)
def test_every_completion_is_the_right_one(cases, slots, steps_per_look):
    engine = LocalEngine(Mock(), slots=slots, eos=EOS, think_end=END)
    engine.steps_per_look = steps_per_look
    requests = [
        Request(prompt, SamplingParams(max_tokens=n, budget=budget), 0, 0, key=i)
        for i, (prompt, n, budget) in enumerate(cases)
    ]
    samples = {s.request.key: s for s in engine.generate(requests)}
    assert sorted(samples) == list(range(len(requests)))
    for request in requests:
        sample = samples[request.key]
        tokens, forced = right_answer(request)
        assert sample.request is request
        assert sample.tokens == tokens
        assert (sample.forced_tokens, sample.sampled_tokens) == (forced, len(tokens) - forced)
        assert sample.finish == ("stop" if tokens[-1] == EOS else "length")
        if not forced:
            assert sample.logprob == 0.0  # certain; a forced token may make the rest of it so too


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_is_exact(budget):
    """Of a model that would think for ever, and ends after </think>."""

    class Thinker(Mock):
        def logits(self, hidden):
            return torch.where(hidden % 2 == 1, torch.eye(11)[EOS].log(), torch.eye(11)[2].log())

    # Twos and the prompt's four leave the state even; </think> on an odd place makes it odd.
    engine = LocalEngine(Thinker(), slots=8, eos=EOS, think_end=END)
    prompt = (4,) * (2 if budget % 2 == 0 else 1)
    request = Request(prompt, SamplingParams(max_tokens=50, budget=budget), 0, 0)
    (sample,) = engine.generate([request])
    assert sample.tokens == (2,) * budget + (END, EOS)
    assert (sample.sampled_tokens, sample.forced_tokens) == (budget + 1, 1)
    (sample,) = engine.generate([Request(prompt, SamplingParams(max_tokens=50), 0, 0)])
    assert sample.tokens == (2,) * 50 and sample.finish == "length"


def test_a_thought_that_ends_itself_is_not_forced():
    engine = LocalEngine(Mock(table=torch.eye(11)[[END]].log()), slots=8, eos=EOS, think_end=END)
    for budget, forced in ((0, 1), (1, 0), (9, 0)):
        request = Request((3,), SamplingParams(max_tokens=4, budget=budget), 0, 0)
        (sample,) = engine.generate([request])
        assert sample.tokens == (END,) * 4
        assert sample.forced_tokens == forced


def test_a_budget_changes_nothing_before_the_cut():
    engine = LocalEngine(Mock(table=random_table()), slots=16, eos=EOS, think_end=END)
    requests = [
        Request((5, 3), SamplingParams(max_tokens=60, budget=budget), 1, i, key=(budget, i))
        for budget in (None, 0, 2, 8)
        for i in range(40)
    ]
    found = results(engine, requests)
    cut = 0
    for (budget, i), (tokens, _, forced, *_) in found.items():
        free = found[None, i][0]
        if forced:
            assert tokens[: budget + 1] == (*free[:budget], END)
            cut += 1
        else:
            assert tokens == free
    assert cut > 40


def test_samples_follow_the_distribution():
    """First tokens of many samples against the softmax that they were drawn from, within 5 σ."""
    table = random_table(rows=1)
    engine = LocalEngine(Mock(table=table), slots=256, eos=EOS)
    n = 4000
    requests = (Request((3,), SamplingParams(max_tokens=1), 0, i) for i in range(n))
    samples = list(engine.generate(requests))
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in samples]), minlength=11)
    p = table[0].double().softmax(-1)
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()
    for sample in samples[:20]:
        expected = table[0].log_softmax(-1)[sample.tokens[0]].item()
        assert sample.logprob == pytest.approx(expected, abs=1e-6)


def test_greedy_is_the_argmax_whatever_the_seed():
    table = random_table()
    engine = LocalEngine(Mock(table=table), slots=8, eos=EOS)
    requests = [
        Request((5, 2), SamplingParams(0.0, max_tokens=30), seed, i)
        for seed in range(3)
        for i in range(3)
    ]
    state, tokens = 5 + 2 * 2, []
    while len(tokens) < 30 and EOS not in tokens:
        tokens.append(int(table[state % 97].argmax()))
        state += (len(tokens) + 2) * tokens[-1]
    assert {s.tokens for s in engine.generate(requests)} == {tuple(tokens)}


def test_streams_are_named_by_prompt_seed_and_index():
    names = [((1, 2), 1, 11), ((1, 2), 11, 1), ((2, 1), 1, 11), ((1,), 1, 11), ((1, 2), -1, 11)]
    keys = [stream_key(*name) for name in names]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


def test_slots_do_not_matter_where_logits_are_equal():
    model = Mock(vocabulary=21, table=random_table(21))
    found = [
        results(LocalEngine(model, slots=slots, eos=EOS, think_end=END), mixed_requests())
        for slots in (3, 8, 40, 100)
    ]
    assert len(found[0]) == len(mixed_requests())
    assert all(other == found[0] for other in found)


@pytest.fixture(params=["in C", "in PyTorch"])
def way(request, monkeypatch, device):
    """Both ways to decode on a CPU; on a GPU there is one."""
    if request.param == "in PyTorch":
        monkeypatch.setattr("ponder.inference.engine.fits", lambda *_: False)
    elif device == "cuda":
        pytest.skip("a GPU has one way")
    return request.param


@pytest.mark.parametrize("threads, slots", [(1, 8), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_and_neighbours_do_not_matter(threads, slots, dtype, way, device, set_threads):
    """Bit for bit, log-probabilities included, with the real model."""
    engine = LocalEngine(gpt(device), slots=slots, eos=EOS, think_end=END, dtype=dtype)
    assert engine.native == (way == "in C")
    requests = mixed_requests(prompts=4)
    set_threads(threads)
    found = results(engine, requests)
    assert len(found) == len(requests)
    shuffled = random.Random(1).sample(requests, len(requests))
    assert results(engine, shuffled) == found
    for request in requests[::12]:  # alone
        assert results(engine, [request]) == {request.key: found[request.key]}
    # Beside a sequence that is longer than all, so that the cache is too.
    long = Request((5,) * 60, SamplingParams(max_tokens=68), 0, 0, key="long")
    beside = results(engine, [long, *requests])
    assert {k: v for k, v in beside.items() if k != "long"} == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_do_not_matter_where_invariant(dtype, device, set_threads):
    """Bit for bit with the real model, on any number of threads; on a CPU always."""
    requests, model = mixed_requests(prompts=4), gpt(device)
    found = []
    for slots, threads in ((1, 1), (7, 2), (64, 3), (256, 1)):
        set_threads(threads)
        on_gpu = device == "cuda"
        engine = LocalEngine(
            model, slots=slots, eos=EOS, think_end=END, dtype=dtype, invariant=on_gpu
        )
        assert engine.slots == (256 if on_gpu else slots)
        found.append(results(engine, requests[::-1] if slots == 64 else requests))
    assert len(found[0]) == len(requests)
    assert all(other == found[0] for other in found)


def some_results(keys: range) -> dict:
    """Those of the mixed requests, as another process finds them."""
    torch.set_num_threads(1)
    engine = LocalEngine(gpt(), slots=40, eos=EOS, think_end=END)
    return results(engine, [mixed_requests()[i] for i in keys])


def test_processes_and_restarts_do_not_matter():
    """All at once, against two processes that share the requests, and a run that was cut."""
    requests = mixed_requests()
    engine = LocalEngine(gpt(), slots=40, eos=EOS, think_end=END)
    wanted = results(engine, requests)
    code = "import pickle, sys; from ponder.tests.inference.test_engine import some_results; "
    code += "pickle.dump(some_results(range(*map(int, sys.argv[1:]))), sys.stdout.buffer)"
    words = [sys.executable, "-c", code]
    halves = [[str(first), str(len(requests)), "2"] for first in range(2)]
    pipes = [subprocess.Popen(words + half, stdout=subprocess.PIPE) for half in halves]
    first, second = (pickle.loads(pipe.communicate()[0]) for pipe in pipes)
    assert first | second == wanted and len(first) + len(second) == len(wanted)
    cut = engine.generate(requests)
    kept = {s.request.key for s in itertools.islice(cut, 17)}
    cut.close()
    rest = results(engine, [r for r in requests if r.key not in kept])
    assert rest == {key: value for key, value in wanted.items() if key not in kept}


def test_steps_per_look_do_not_matter(device):
    model = gpt(device)
    found = []
    for steps in (1, 4):
        engine = LocalEngine(model, slots=8, eos=EOS, think_end=END)
        engine.steps_per_look = steps
        found.append(results(engine, mixed_requests()))
    assert found[0] == found[1]


def test_samples_are_the_models_own(device):
    """Greedy tokens and every log-probability against the model's full forward pass."""
    model = gpt(device)
    engine = LocalEngine(model, slots=8, eos=EOS, think_end=END)
    requests = mixed_requests()
    for sample in engine.generate(requests):
        prompt = sample.request.prompt
        sequence = torch.tensor([prompt + sample.tokens], device=device)
        with torch.no_grad():
            logprobs = model(sequence)[0, len(prompt) - 1 : -1].log_softmax(-1)
        at = list(range(len(sample.tokens)))
        if sample.forced_tokens:
            at.remove(sample.request.params.budget)
        tokens = torch.tensor(sample.tokens, device=device)
        drawn = logprobs.gather(1, tokens[:, None])[at, 0]
        assert sample.logprob == pytest.approx(drawn.sum().item(), abs=1e-3)
        if sample.request.params.temperature == 0:
            assert (drawn >= logprobs[at].amax(-1) - 1e-4).all()


def test_each_prompt_is_prefilled_once():
    model = Mock()
    engine = LocalEngine(model, slots=8, eos=EOS)
    prompts = [(i % 11, i // 11 % 11, 3) for i in range(70)]
    requests = (
        Request(prompt, SamplingParams(max_tokens=5), 0, i) for prompt in prompts for i in range(7)
    )
    assert len(list(engine.generate(requests))) == 490
    real = sorted(tuple(row[:3]) for row in model.prefilled if any(row))
    assert real == sorted(prompts)


def test_what_fills_a_block_is_not_read_twice():
    """Prompts further ahead, of which some are ready because others wait for them, too."""
    model = Mock()
    engine = LocalEngine(model, slots=8, eos=EOS)
    prompts = [(i, 3) for i in range(1, 10)]
    asked = [*prompts, *prompts[:7]]  # the ninth has a block to itself
    requests = [Request(p, SamplingParams(max_tokens=5), 0, i) for i, p in enumerate(asked)]
    assert len(list(engine.generate(requests))) == len(asked)
    assert sorted(tuple(row[:2]) for row in model.prefilled if any(row)) == prompts


def test_prefilled_blocks_have_a_shape_that_their_width_decides():
    """However many prompts wait: else a prompt's numbers could depend on its companions."""
    model = Mock(vocabulary=21, table=random_table(21))
    engine = LocalEngine(model, slots=8, eos=EOS, think_end=END)
    requests = mixed_requests(prompts=20)
    for some in (requests, requests[:1], requests[::7]):
        list(engine.generate(some))
    assert len(dict(model.blocks)) == len(model.blocks) >= 2


@pytest.mark.parametrize("context, length", [(40, 35), (200, 150)])
def test_a_prompt_that_is_no_multiple_of_a_block_or_longer_than_one(context, length, way, device):
    model = gpt(device, context=context)
    engine = LocalEngine(model, slots=8, eos=EOS)
    prompt = (3, 4, 5, 6, 7) * (length // 5)
    (sample,) = engine.generate([Request(prompt, SamplingParams(0.0, max_tokens=5), 0, 0)])
    sequence = torch.tensor([prompt + sample.tokens], device=device)
    with torch.no_grad():
        wanted = model(sequence)[0, length - 1 : -1].argmax(-1)
    assert sample.tokens == tuple(wanted.tolist())


def test_requests_are_read_as_they_are_needed():
    read = 0

    def endless():
        nonlocal read
        for i in itertools.count():
            read += 1
            yield Request((i % 7, 2), SamplingParams(max_tokens=6), 0, i, key=i)

    samples = LocalEngine(Mock(), slots=8, eos=EOS).generate(endless())
    assert read == 0
    first = list(itertools.islice(samples, 100))
    assert len({s.request.key for s in first}) == 100
    assert read <= 100 + 3 * 8
    assert all(s.tokens == right_answer(s.request)[0] for s in first)


def test_an_interrupted_iteration_leaves_the_engine_usable():
    engine = LocalEngine(Mock(table=random_table(21), vocabulary=21), slots=8, eos=EOS, think_end=1)
    requests = mixed_requests()
    found = results(engine, requests)
    samples = engine.generate(requests)
    next(samples)
    other = engine.generate(requests)  # two at once
    next(other), next(samples)
    samples.close()

    def failing():
        yield from requests[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(failing()))
    assert len(list(other)) == len(requests) - 1
    assert results(engine, requests) == found


def test_weights_are_read_anew():
    model = gpt()
    engine = LocalEngine(model, slots=8, eos=EOS)
    request = Request((3, 4), SamplingParams(0.0, max_tokens=20), 0, 0)
    before = [s.tokens for s in engine.generate([request])]
    with torch.no_grad():
        model.embed_tokens.weight.mul_(-1)
    assert [s.tokens for s in engine.generate([request])] != before


def test_seconds_share_out_the_time():
    engine = LocalEngine(gpt(), slots=8, eos=EOS, think_end=END)
    start = time.perf_counter()
    seconds = [s.seconds for s in engine.generate(mixed_requests())]
    elapsed = time.perf_counter() - start
    assert min(seconds) > 0
    assert 0.3 * elapsed <= sum(seconds) <= elapsed

    class Slow(Mock):
        def hidden(self, tokens, cache):
            time.sleep(0.2 * cache.empty)
            return super().hidden(tokens, cache)

    asked = [Request((3,), SamplingParams(max_tokens=2), 0, i) for i in range(2)]
    seconds = [s.seconds for s in LocalEngine(Slow(), slots=8, eos=EOS).generate(asked)]
    assert min(seconds) > 0.1  # each pays half of what their prompt took


def test_the_caller_is_outside_inference_mode():
    model = gpt()
    for _ in LocalEngine(model, slots=8, eos=EOS).generate(mixed_requests(1, 1)[:1]):
        model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    assert model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(prompt=()), "the prompt is empty"),
        (dict(prompt=(3, 11)), "the prompt holds token 11; the model has 0 to 10"),
        (dict(prompt=(3, -1)), "the prompt holds token -1"),
        (dict(prompt=(3,) * 128), "128 tokens; .* context of 128 leaves room for at most 127"),
        (dict(prompt=(3,) * 28, max_tokens=101), "28 tokens .* 101 .* 128; .* at most 100 fits"),
        (dict(budget=3), "budget is 3, but the engine knows no </think>"),
    ],
)
def test_a_request_that_cannot_be_is_told_before_it_is_sampled(request_, message):
    model = Mock()
    engine = LocalEngine(model, slots=8, eos=EOS)
    prompt = request_.pop("prompt", (3,))
    with pytest.raises(ValueError, match=message):
        next(
            engine.generate(
                [Request(prompt, SamplingParams(**({"max_tokens": 5} | request_)), 0, 0)]
            )
        )
    assert not model.prefilled


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(temperature=-1.0), "temperature is -1.0; it must be at least 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1"),
        (dict(min_p=1.5), "min_p is 1.5; it must be from 0 to 1"),
        (dict(max_tokens=0), "max_tokens is 0; it must be at least 1"),
        (dict(budget=-2), "budget is -2; it must be at least 0"),
    ],
)
def test_parameters_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


def test_an_engine_that_cannot_be_is_told_at_once():
    with pytest.raises(ValueError, match="slots is 0; it must be at least 1"):
        LocalEngine(Mock(), slots=0, eos=EOS)
    with pytest.raises(ValueError, match="eos is 11; the model's tokens are 0 to 10"):
        LocalEngine(Mock(), eos=11)
    with pytest.raises(ValueError, match="think_end is -1"):
        LocalEngine(Mock(), eos=0, think_end=-1)
    with pytest.raises(ValueError, match="both 3; they must differ"):
        LocalEngine(Mock(), eos=3, think_end=3)


@pytest.mark.parametrize("cue", [(5,), (5, 7, 3)])
def test_a_thought_is_drawn_out_by_the_cue(cue):
    """On a mock that is certain: </think> gives way to the whole cue as often as asked, unless the
    budget or the length ends the thought before; what follows depends on the cue."""
    prompts = [(2, last) for last in range(2, 10)]
    requests = [
        Request(prompt, SamplingParams(0.0, max_tokens=40, budget=b, extend=e), 0, 0, (i, b, e))
        for i, prompt in enumerate(prompts)
        for b in (None, 0, 5, 12)
        for e in (0, 1, 2, 5)
    ]
    found = results(LocalEngine(Mock(), slots=16, eos=EOS, think_end=END, cue=cue), requests)
    drawn_out = cut_inside = 0
    for request in requests:
        tokens, forced = right_answer(request, cue=cue)
        assert found[request.key][:3] == (tokens, len(tokens) - forced, forced)
        budget = request.params.budget
        at_budget = budget is not None and END in tokens and tokens.index(END) == budget
        drawn_out += forced > at_budget
        cut_inside += (forced - at_budget) % len(cue) > 0  # by the budget, amid a cue
    assert drawn_out > 30 and (cut_inside > 3 or len(cue) == 1)


def test_company_does_not_change_a_drawn_out_sample():
    """To the last bit: in another order, among other requests, and with no cue to be put in."""
    engine = LocalEngine(gpt(), slots=16, eos=EOS, think_end=END, cue=(5, 7))
    requests = mixed_requests()
    longer = [
        replace(r, params=replace(r.params, extend=3), key=(r.key, "longer")) for r in requests
    ]
    together = results(engine, requests + longer)
    apart = results(engine, longer[::-1]) | results(engine, requests[::-1])
    assert together == apart
    plain = LocalEngine(gpt(), slots=16, eos=EOS, think_end=END)
    assert results(plain, requests) == {r.key: together[r.key] for r in requests}
    differ = [r for r in requests if together[r.key][0] != together[r.key, "longer"][0]]
    assert differ
    for r in differ:  # the same up to the first cue, by the same random stream
        short, long = together[r.key][0], together[r.key, "longer"][0]
        place = short.index(END)
        assert long[:place] == short[:place] and long[place] == 5


def test_what_cannot_draw_a_thought_out_is_named():
    ask = Request((2,), SamplingParams(max_tokens=9, extend=2), 0, 0)
    for known in ({}, {"think_end": END}, {"cue": (5,)}):
        with pytest.raises(ValueError, match="extend is 2, but the engine knows no cue"):
            list(LocalEngine(Mock(), eos=EOS, **known).generate([ask]))
    with pytest.raises(ValueError, match="cue is .5, 1.; it may hold neither eos nor think_end"):
        LocalEngine(Mock(), eos=EOS, think_end=END, cue=(5, END))
    with pytest.raises(ValueError, match="cue is 11; the model's tokens are 0 to 10"):
        LocalEngine(Mock(), eos=EOS, think_end=END, cue=(11,))
    with pytest.raises(ValueError, match="extend is -1; it must be at least 0"):
        SamplingParams(extend=-1)
