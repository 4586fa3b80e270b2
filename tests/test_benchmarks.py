"""The benchmarks' own code, on tiny shapes; no time is asserted."""

import csv
import importlib
import itertools
import json
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ponder import provenance
from ponder.benchmarks import (
    comparison,
    isolated,
    machine,
    measure,
    mlp_tiles,
    on_gpu,
    overhead,
    patch,
    plan,
    profiles,
    sampling,
    tiles,
    train_124m,
    train_step,
)
from ponder.benchmarks.__main__ import CASES, measured, results
from ponder.benchmarks.comparison import Case, compile_all
from ponder.benchmarks.comparison import measure as measure_case
from ponder.benchmarks.figures import _in_order, _labels, _ticks, draw, ratios
from ponder.benchmarks.tables import tables
from ponder.kernels import _attention_tiles
from ponder.kernels._runtime import tiles_file
from ponder.models import GPT, GPTConfig
from ponder.training.data import load_data
from ponder.training.text import Windows

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
mlp = importlib.import_module("ponder.kernels.mlp")


@pytest.fixture
def case():
    def wrong(x):  # a forward pass that is right, and a gradient that is not
        return (2 * x).detach() + x - x.detach()

    x = torch.randn(30, 40, requires_grad=True)
    double = lambda x: 2 * x  # noqa: E731
    implementations = {"ponder": double, "right": lambda x: x + x, "wrong": wrong}
    return Case("test", "double", implementations, [x], double, nbytes={"forward": 9600})


def test_a_wrong_gradient_gets_no_row(case, capsys):
    rows = list(measure_case(case, repeats=2))
    found = [(row.case, row.implementation) for row in rows]
    assert found == [
        (f"double {mode}", name)
        for mode in ("forward", "forward+backward")
        for name in ("ponder", "right")
    ]
    assert "wrong is wrong by 5" in capsys.readouterr().out  # |1 - 2| / |2|
    assert all(float(row.error) == 0.0 and row.ms_p50 > 0 for row in rows)


def doubled(gradient):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return gradient(dy)

    return Double.apply


def test_a_gradient_may_be_written_over_its_upstream_and_must_be_a_number(case, capsys):
    in_place, nan = doubled(lambda dy: dy.mul_(2)), doubled(lambda dy: dy * torch.nan)
    case.implementations = {"in place": in_place, "nan": nan}
    case.inputs = [torch.randn(30, 40).bfloat16().requires_grad_()]
    assert {row.implementation for row in measure_case(case, repeats=1)} == {"in place"}
    assert "nan is wrong by nan" in capsys.readouterr().out


def test_the_truth_is_told_for_a_part_of_what_is_timed():
    """Rows of their own: the first of three is compared; all that is called has three."""
    called = []

    def double(x):
        called.append(len(x))
        return 2 * x

    def wrong(x):
        return x * torch.tensor([[3.0], [2.0], [2.0]])

    implementations = {"ponder": double, "wrong": wrong}
    x = torch.randn(3, 40, requires_grad=True)
    case = Case("test", "part", implementations, [x], lambda x: 2 * x, part=lambda xs: [xs[0][:1]])
    assert {row.implementation for row in measure_case(case, repeats=1)} == {"ponder"}
    assert set(called) == {3}


def test_ponders_own_fault_is_told(case, monkeypatch):
    monkeypatch.setattr(measure, "WRONG", [])
    wrong = case.implementations["wrong"]
    case.implementations = {"ponder": wrong, "ponder, one pass": wrong, "peer": wrong}
    assert not list(measure_case(case, repeats=1))
    assert len(measure.WRONG) == 4 and "ponder is wrong by" in measure.WRONG[0]


def test_what_cannot_run_is_left_out(case, monkeypatch, capsys):
    monkeypatch.setattr(measure, "WRONG", [])

    def absent(x):
        raise RuntimeError("no available kernel\nand more")

    case.implementations |= {"peer": absent, "wrong": case.implementations["ponder"]}
    names = {row.implementation for row in measure_case(case, repeats=1)}
    assert names == {"ponder", "right", "wrong"} and not measure.WRONG
    assert "peer fails: RuntimeError no available kernel\n" in capsys.readouterr().out
    factors = iter([2])
    case.implementations |= {"peer": lambda x: next(factors) * x}  # fails when called once more
    names = {row.implementation for row in measure_case(case, repeats=1)}
    assert names == {"ponder", "right", "wrong"} and not measure.WRONG
    factors = iter([2, 2, 2])  # fails when it is timed: the others are without it from then on
    assert {row.case for row in measure_case(case, repeats=1)} == {"double forward+backward"}
    assert len(measure.WRONG) == 1 and "ponder or a peer fails" in measure.WRONG.pop()
    case.implementations = {"ponder": absent, "right": case.implementations["right"]}
    assert {row.implementation for row in measure_case(case, repeats=1)} == {"right"}
    assert len(measure.WRONG) == 1 and "ponder fails" in measure.WRONG[0]


def test_rows_replace_those_of_their_case_or_their_own(tmp_path, monkeypatch):
    def write(*names, **options):
        measure.write(
            [measure.row("b", "a case", "bf16", n, [1.0]) for n in names], tmp_path, **options
        )
        return [row.implementation for row in measure.read(tmp_path / "b.csv") or ()]

    assert write("ponder", "peer") == ["ponder", "peer"]
    assert write("late peer", whole_cases=False) == ["ponder", "peer", "late peer"]
    assert write("ponder") == ["ponder"]  # ratios are of one run

    def cut(writer, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", cut)
    with pytest.raises(KeyboardInterrupt):
        write("peer")
    assert [row.implementation for row in measure.read(tmp_path / "b.csv") or ()] == ["ponder"]


def test_figures_show_each_machine_and_peer(tmp_path):
    def row(name, ms, gpu="A", dtype="bf16"):
        found = measure.row("kernel", "a case", dtype, name, [ms])
        return measure.Row(**{**vars(found), "gpu": gpu})

    rows = [row("ponder", 2.0), row("peer", 3.0), row("peer, torch.compile", 1.0)]
    rows += [row("ponder, torch.compile", 0.5), row("ponder", 1.0, "B"), row("peer", 1.0, "B")]
    measure.write(rows, tmp_path)
    of_a = [vars(r) for r in rows if r.gpu == "A"]
    assert ratios(of_a) == {"a case, bf16": {"peer": 1.5, "peer, torch.compile": 2.0}}
    drawn = draw(tmp_path, tmp_path)
    assert [path.name for path in drawn] == ["kernel-a.png", "kernel-b.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_a_figures_labels_say_what_differs_in_order():
    cases = ["64 new, batch 16, bf16", "64 new, batch 128, bf16", "64 new, batch 9, fp32"]
    labels, common = _labels(cases)
    assert common == ["64 new"] and labels[cases[0]] == "batch 16, bf16"
    ordered = sorted(labels.values(), key=_in_order)
    assert ordered == ["batch 9, fp32", "batch 16, bf16", "batch 128, bf16"]
    assert _labels(cases[:1]) == ({cases[0]: cases[0]}, [])
    assert _ticks(0.8, 1.6) == [1, 1.25, 1.5, 0.8]
    few = sorted(_ticks(0.05, 70.0))
    assert 1 in few and all(b / a > 1.6 for a, b in itertools.pairwise(few))


def test_every_group_runs():
    words = [sys.executable, "-m", "ponder.benchmarks", "--smoke"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-2000:]
    measured = {line.split()[0] for line in run.stdout.splitlines()}
    assert {"attention", "mlp", "losses", "pointwise", "decode"} <= measured


@pytest.mark.cpu
def test_a_cpu_is_compared_in_what_it_has_products_for(monkeypatch):
    monkeypatch.setattr(comparison, "DEVICE", "cpu")
    found = {}
    for has in (True, False):
        monkeypatch.setattr(comparison, "has_bf16_products", lambda device, has=has: has)
        found[has] = [setting.dtype for setting in comparison.settings(smoke=False)]
    assert found == {True: [torch.float32, torch.bfloat16], False: [torch.float32]}
    [setting] = comparison.settings(smoke=True)
    assert setting.of("tiny", "cpu", "gpu") == "tiny"
    assert replace(setting, smoke=False).of("tiny", "cpu", "gpu") == "cpu"
    monkeypatch.setattr(comparison, "DEVICE", "cuda")
    [setting] = comparison.settings(smoke=False)
    assert setting.dtype == torch.bfloat16 and setting.of("tiny", "cpu", "gpu") == "gpu"


@pytest.mark.cpu
@pytest.mark.parametrize("group", [name for name in CASES if name != "mlp_autotuned"])
def test_a_group_is_right_in_fp32(group, monkeypatch):
    monkeypatch.setattr(measure, "WRONG", wrong := [])
    monkeypatch.setattr(comparison, "matmul_ceiling", lambda dtype: 1e11)
    monkeypatch.setattr(comparison, "copy_ceiling", lambda: 1e10)
    for case in CASES[group](comparison.Setting(torch.float32, smoke=True)):
        found = list(measure_case(case, repeats=1))
        assert {(row.implementation, row.dtype) for row in found} >= {("ponder", "fp32")}
        assert all(float(row.error) < 1e-4 for row in found)
    assert not wrong


def test_a_run_goes_on_at_the_case_where_it_stopped(tmp_path, monkeypatch):
    cases = [row.case for rows in results("decode", "", True) for row in rows]
    assert len(set(cases)) > 1
    row = measure.row("decode", cases[0], "bf16", "ponder", [1.0])

    def again(**changes):
        (tmp_path / "decode.csv").unlink(missing_ok=True)
        measure.write([replace(row, **changes)], tmp_path)
        return [r.case for rows in results("decode", "", True, measured(tmp_path)) for r in rows]

    assert again() == [case for case in cases if case != cases[0]]
    assert again(implementation="sdpa") == again(dtype="fp32") == again(gpu="another") == cases
    monkeypatch.setattr(train_step, "run", lambda done: [done])
    name = f"ponder{train_step.COMPILED}"  # the last; until it is there, all are measured again
    for i, (gpu, who, left) in enumerate(
        (
            (row.gpu, name, set(train_step.DTYPES)),
            ("another", name, set()),
            (row.gpu, "ponder", set()),
        )
    ):
        new = replace(row, benchmark="train_step", gpu=gpu, implementation=who)
        measure.write([replace(new, dtype=d) for d in train_step.DTYPES], tmp_path / str(i))
        assert list(results("train_step", "", False, measured(tmp_path / str(i)))) == [left]


def test_calls_go_on_too_and_come_case_by_case(monkeypatch):
    monkeypatch.setattr(measure, "WRONG", [])
    monkeypatch.setattr(overhead, "CALLS", 1)

    def absent():
        raise RuntimeError("no kernel")

    monkeypatch.setattr(
        overhead, "_pairs", lambda: [("a", absent, lambda: 1), ("b", lambda: 1, lambda: 1)]
    )
    found = [[(row.case[0], row.implementation) for row in rows] for rows in overhead.run(True)]
    both = [("b", "ponder"), ("b", "eager")]
    assert found == [[("a", "eager")], [("a", "eager")], both, both]
    assert len(measure.WRONG) == 2 and "overhead a call" in measure.WRONG[0]
    there = {("overhead", "b call, with gradient", "bf16")}
    assert [rows[0].case for rows in overhead.run(True, "b", there)] == ["b call, without gradient"]


def test_all_that_a_case_compiles_is_called_once(case, monkeypatch, capsys):
    """In each mode, whatever fails; what PyTorch has compiled long ago is not."""
    called = []

    def absent(x):
        raise torch.OutOfMemoryError("too many at once")

    def note(name):
        def double(x):
            called.append((name, torch.is_grad_enabled()))
            return 2 * x

        return double

    case.implementations = {"absent": absent, "ponder": note("ponder"), "eager": note("eager")}
    compile_all(case)
    assert set(called) == {("ponder", False), ("ponder", True)}
    assert capsys.readouterr().out.count("absent fails: OutOfMemoryError too many at once") == 2


def test_a_peer_that_may_not_come_back_is_behind_all_others(monkeypatch):
    monkeypatch.setattr(sampling, "_run", lambda *arguments: arguments[:4])

    def order(done=()):
        return list(sampling.run((64, 8), (1, 16), ("bf16",), sampling.PEERS, False, done))

    cases = [("bf16", 64, 1), ("bf16", 64, 16), ("bf16", 8, 1)]
    others = [(*case, ["generate", "generate static"]) for case in cases]
    assert order() == others + [(*case, ["generate_batch"]) for case in cases]
    done = {(sampling.case_of(64, 16), "bf16", "ponder")}
    assert order(done) == [others[0], others[2], *order()[3:]]
    assert order({(case, "fp32", who) for case, _, who in done}) == order()
    with pytest.raises(TimeoutError, match="longer than 0.01 s"), sampling._patience(0.01):
        time.sleep(5)


def test_logits_that_are_no_numbers_are_not_timed(monkeypatch):
    monkeypatch.setattr(sampling, "build", lambda dtype, folder: (None, None, float("nan")))
    with pytest.raises(RuntimeError, match="differ by nan"):
        sampling._run("fp32", 16, 1, [], False, None)


def test_continuous_batching_keeps_its_manager_for_a_case(monkeypatch):
    """The calls that are timed make no new one; its cache, half of what is free, is no figure."""
    calls = []

    class Peer:
        def generate_batch(self, prompts, persistent_manager, continuous_batching_config, **_):
            assert continuous_batching_config.max_memory_percent == 0.5
            calls.append(persistent_manager)
            tokens = SimpleNamespace(generated_tokens=[0] * sampling.NEW)
            return dict(enumerate([tokens] * len(prompts)))

        def destroy_cached_continuous_batching_manager(self):
            calls.append("destroyed")

    model = SimpleNamespace(config=train_step.SMALL)
    monkeypatch.setattr(sampling, "build", lambda dtype, folder: (model, Peer(), 0.0))
    monkeypatch.setattr(sampling, "sample", lambda model, prompts, dtype: None)
    monkeypatch.setattr(sampling, "peak_mib", lambda work: work() or 1.0)
    monkeypatch.setattr(sampling, "copy_ceiling", lambda: 1e9)
    [row] = sampling._run("fp32", 4, 1, ["generate_batch"], False, None)
    assert (row.implementation, row.peak_mib) == ("transformers generate_batch", "")
    assert calls == [True] * 10 + ["destroyed"]


def test_losses_of_the_first_step_must_agree(monkeypatch):
    shape = dict(vocab_size=50, context=8, n_layer=1, n_head=2, n_kv_head=1, head_dim=16)
    monkeypatch.setattr(train_step, "CONFIG", GPTConfig(**shape, n_embd=32, n_inner=64))
    monkeypatch.setattr(train_step, "CONTEXT", 8)
    monkeypatch.setattr(measure, "WRONG", [])
    dtypes = list(train_step.DTYPES)
    names = ["ponder", "transformers Qwen3"]
    rows = sum(train_step.run(compiled=False), [])
    found = [(row.dtype, row.implementation) for row in rows]
    assert found == [(dtype, name) for dtype in dtypes for name in names]
    other = torch.roll
    monkeypatch.setattr(torch, "roll", lambda x, *_: other(x, 1, 1))  # the token before
    rows = sum(train_step.run(compiled=False), [])
    assert {row.implementation for row in rows} == {names[1]}
    assert len(measure.WRONG) == len(dtypes)


def test_a_step_that_cannot_be_compiled_leaves_the_others(monkeypatch, capsys):
    """What is uncompiled has its rows before anything is compiled."""
    shape = dict(vocab_size=50, context=8, n_layer=1, n_head=2, n_kv_head=1, head_dim=16)
    monkeypatch.setattr(train_step, "CONFIG", GPTConfig(**shape, n_embd=32, n_inner=64))
    monkeypatch.setattr(train_step, "CONTEXT", 8)
    monkeypatch.setattr(measure, "WRONG", [])

    def fails_on_theirs(model):
        if not isinstance(model, GPT):
            raise RuntimeError("no compiler")
        return model

    monkeypatch.setattr(torch, "compile", fails_on_theirs)
    eager, everything = (
        [row.implementation for row in rows] for rows in train_step.run(done=["bf16"])
    )
    assert eager == ["ponder", "transformers Qwen3"] and not measure.WRONG
    assert everything == [*eager, "ponder, torch.compile"]
    assert "Qwen3, torch.compile fails: RuntimeError no compiler" in capsys.readouterr().out

    def absent(model):
        raise RuntimeError("no such model")

    monkeypatch.setattr(train_step, "peer_of", absent)  # so there is nothing to compare with
    assert not list(train_step.run(done=["bf16"])) and len(measure.WRONG) == 2


def test_what_a_patch_puts_into_a_module_is_its_own():
    """As Liger's does: neither another model, nor one built later, meets it."""
    plain = patch.build("llama", small=True)
    model, names = patch.build("llama", small=True), {}
    module = sys.modules[type(model).__module__]
    theirs, called = module.apply_rotary_pos_emb, []

    def rotary(*arguments, **options):
        called.append(1)
        return theirs(*arguments, **options)

    with patch.own_names(model, names):
        module.apply_rotary_pos_emb = rotary
    tokens = torch.randint(500, (1, 8))
    plain(tokens)
    assert module.apply_rotary_pos_emb is theirs and not called
    with patch.own_names(model, names):
        model(tokens)
    assert len(called) == 2  # a layer each


def test_a_gradient_of_a_patched_model_that_is_no_number_shows(monkeypatch):
    def spoiled(name, model):
        model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
        return {}

    monkeypatch.setattr(patch, "apply", spoiled)
    assert patch.parity("llama", "cpu")["gradient_error"] == "nan"


def test_patched_models_are_timed_beside_their_own(monkeypatch):
    monkeypatch.setattr(patch, "SIZE", (256, 1, 50, 8))
    found = patch.times("llama", ["ponder", "transformers"], steps=2)
    assert list(found) == ["ponder", "transformers"]
    assert all(float(row["ms_p50"]) > 0 for row in found.values())


def test_a_family_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "WRONG", [])
    monkeypatch.setattr(patch, "WRONG", measure.WRONG)
    monkeypatch.setattr(patch, "FAMILIES", dict.fromkeys(["llama", "qwen2", "phi"], {}))
    failing = "qwen2"

    def parity(kind, device):
        if kind == failing:
            raise RuntimeError("another attention")
        return {"logit_error": kind}

    monkeypatch.setattr(patch, "parity", parity)
    monkeypatch.setattr(patch, "times", lambda *arguments: {"ponder": {}, "transformers": {}})
    out = tmp_path / "patch.csv"
    monkeypatch.setattr(sys, "argv", ["patch", "--out", str(out), "--resume"])
    assert patch.main() == 1
    assert "patch qwen2: ponder fails: RuntimeError another attention" in capsys.readouterr().out
    assert measure.measured_here(out, "model") == {"llama", "phi"}
    failing = None
    measure.WRONG.clear()
    assert patch.main() == 0
    told = capsys.readouterr().out
    assert "qwen2" in told and "llama" not in told
    assert measure.measured_here(out, "model") == {"llama", "qwen2", "phi"}


def test_the_slowest_of_our_kernels_are_held_against_the_chip(monkeypatch, capsys):
    names = ["void at::native::vectorized_elementwise_kernel<4>(int)", "attention_forward_kernel"]
    names += ["_mlp_forward_kernel", "aten::mm", "_norm_forward_kernel", "_rotary_kernel"]
    events = [SimpleNamespace(key=n, self_device_time_total=9 - i) for i, n in enumerate(names)]
    found, runs = "ncu", []
    monkeypatch.setattr(profiles, "our_step", lambda dtype, compiled: None)
    monkeypatch.setattr(profiles, "averages", lambda step: events)
    monkeypatch.setattr(profiles.shutil, "which", lambda name: found)
    monkeypatch.setattr(profiles.subprocess, "run", lambda words, check: runs.append(words))
    profiles.nsight()
    own = ["attention_forward_kernel", "_mlp_forward_kernel", "_norm_forward_kernel"]
    assert [words[words.index("--kernel-name") + 1] for words in runs] == own
    found = None
    profiles.nsight()
    assert len(runs) == 3 and "there is no ncu on the PATH" in capsys.readouterr().out


def test_a_machine_without_bf16_has_no_rate_of_it(monkeypatch, capsys):
    for name, value in (("matmul_ceiling", 3e12), ("copy_ceiling", 2e9)):
        monkeypatch.setattr(machine, name, lambda value=value: value)
    for has, shown in ((True, 1), (False, 0)):
        monkeypatch.setattr(machine, "has_bf16_products", lambda device, has=has: has)
        machine.main()
        out = capsys.readouterr().out
        assert out.count("matrix product, bf16: 3.0 TFLOP/s") == shown and "copy: 2 GB/s" in out


def test_the_table_of_patched_models_is_of_the_newest_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(patch, "TABLE", tmp_path / "patch.csv")

    def add(gpu, *names):
        rows = [dict(model="llama", implementation=n, gpu=gpu, ms_p50=gpu) for n in names]
        measure.merge(patch.TABLE, patch.COLUMNS, rows, ("gpu", "model"))

    add("1", "ponder", "transformers", "liger")
    add("2", "ponder", "transformers")
    assert "| 2 / 2 |" in patch.table() and "1" not in patch.table()
    assert len(patch.TABLE.read_text().splitlines()) == 6


def test_tables_say_what_the_rows_say(tmp_path):
    def row(name, ms, case="a case", **more):
        found = measure.row("kernel", case, "bf16", name, [ms], **more)
        return measure.Row(**{**vars(found), "gpu": "A"})

    rows = [row("ponder", 2.0, roofline=0.815, tflops=400.0, peak_mib=12.5)]
    rows += [row("slow", 9.0), row("fast", 3.0), row("fast", 1.0, "without ours")]
    measure.write(rows, tmp_path)
    (tmp_path / "other.csv").write_text("model,ms\nllama,1\n")
    text = tables(tmp_path)
    assert "# kernel on A" in text
    assert "| a case, bf16 | 2.000 | fast | 3.000 | 1.50× | 400.0 | 82% | 12 |" in text
    assert "without ours" not in text and "llama" not in text


def stage(code, **more):
    return on_gpu.Stage([sys.executable, "-c", code], **{"least": 0, **more})


def test_stages_fail_and_end_one_by_one(tmp_path, monkeypatch, capsys):
    """A failure, a missing program and one that never ends, child processes included."""
    child = "import subprocess, sys; "
    child += "subprocess.run([sys.executable, '-c', '{}'], start_new_session=True)"
    late = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    stages = {
        "good": stage("import os; print('seen', os.environ.get('PONDER_TILES'))"),
        "bad": stage("print('reason'); raise SystemExit(3)"),
        "endless": stage(child.format(late.replace("'", '"')), limit=1.0),
        "absent": on_gpu.Stage(["no-such-program"], least=0),
        "last": stage("open('OUT/results/x.csv', 'w').write('a,b\\n')"),
        "long": stage("", least=1e9),
    }
    monkeypatch.setattr(on_gpu, "STAGES", stages)
    (tmp_path / "tiles.json").write_text("{}")
    words = ["on_gpu", "--out", str(tmp_path), "--seconds", "60", "--stage", *stages]
    monkeypatch.setattr(sys, "argv", words)
    on_gpu.main()
    verdicts = [
        found["verdict"] for found in json.loads((tmp_path / "stages.json").read_text()).values()
    ]
    assert verdicts == ["ok", "exit 3", "over 1 s", "no no-such-program", "ok", "not started"]
    assert (tmp_path / "good.log").read_text() == f"seen {tmp_path / 'tiles.json'}\n"
    assert "reason" in capsys.readouterr().out
    with tarfile.open(tmp_path / "on_gpu.tar.gz") as archive:
        assert {"summary.md", "stages.json", "bad.log", "results/x.csv"} <= set(archive.getnames())
    stages["good"] = stage("raise SystemExit(1)")  # succeeded before: it is not run again
    stages["bad"] = stage("")
    on_gpu.main()
    state = json.loads((tmp_path / "stages.json").read_text())
    assert state["good"]["verdict"] == state["bad"]["verdict"] == "ok"
    time.sleep(2)
    assert not (tmp_path / "late").exists()  # the child ended with its parent


def test_what_failed_comes_after_what_had_no_turn(tmp_path, monkeypatch):
    note = f"open({str(tmp_path / 'order')!r}, 'a').write('{{}} '); raise SystemExit({{}})"
    names = "fails", "slow", "cut", "new"
    stages = {name: stage(note.format(name, 1), limit=60) for name in names}
    monkeypatch.setattr(on_gpu, "STAGES", stages)
    found = {"fails": ("exit 1", 3), "slow": ("over 60 s", 60), "cut": ("over 20 s", 20)}
    state = {name: dict(verdict=v, seconds=s) for name, (v, s) in found.items()}
    (tmp_path / "stages.json").write_text(json.dumps(state))
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--out", str(tmp_path), "--stage", *names])
    on_gpu.main()
    assert (tmp_path / "order").read_text().split() == ["cut", "new", "fails", "slow"]


def test_a_run_goes_on_where_another_machine_left_it(tmp_path, monkeypatch):
    """What was done stays done; what only fills caches is done again, where it still serves."""
    note = f"open({str(tmp_path / 'order')!r}, 'a').write('{{}} ')"
    stages = {
        "caches": stage(note.format("caches"), serves=("first", "second")),
        "first": stage(note.format("first")),
        "other": stage(note.format("other"), least=1e9),
        "second": stage(note.format("second"), least=1e9),
    }
    monkeypatch.setattr(on_gpu, "STAGES", stages)
    packed = tmp_path / "home" / "packed.tar.gz"
    packed.parent.mkdir()
    words = ["on_gpu", "--stage", *stages, "--seconds", "60", "--tar", str(packed), "--out"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "one")])
    on_gpu.main()
    for name in ("other", "second"):
        stages[name] = stage(note.format(name))
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "two"), "--after", str(packed)])
    for _ in range(2):
        on_gpu.main()
    found = (tmp_path / "order").read_text().split()
    assert found == ["caches", "first", "other", "caches", "second"]


def test_a_run_is_adopted(tmp_path):
    results, own = tmp_path / "run" / "results", tmp_path / "own"
    rows = [measure.row("kernel", "a case", "bf16", name, [1.0]) for name in ("ponder", "peer")]
    measure.write(rows, results)
    (results / "patch.csv").write_text("model,gpu,ms\nllama,A,1\n")
    own.mkdir()
    kept = "model,gpu,ms\nllama,B,3\nqwen2,A,4\n"
    (own / "patch.csv").write_text(kept + "llama,A,2\n")
    on_gpu.adopt(tmp_path / "run", own)
    with open(own / "kernel.csv", newline="") as file:
        assert [row["implementation"] for row in csv.DictReader(file)] == ["ponder", "peer"]
    assert (own / "patch.csv").read_text() == kept + "llama,A,1\n"


def test_a_file_that_dies_is_a_failure(tmp_path, monkeypatch, capsys):
    """And takes no other along."""
    (tmp_path / "test_dies.py").write_text("import os\ndef test_x():\n    os.abort()\n")
    (tmp_path / "test_good.py").write_text("def test_y():\n    pass\n")
    monkeypatch.setattr(sys, "argv", ["isolated", str(tmp_path)])
    assert isolated.main() == 1
    out = capsys.readouterr().out
    assert "FAILED test_dies.py: exit -6" in out and out.endswith("1 passed, 1 failed\n")


def test_a_file_that_hangs_ends_at_its_limit(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_hangs.py").write_text("import time\ndef test_x():\n    time.sleep(999)\n")
    monkeypatch.setattr(sys, "argv", ["isolated", "--seconds", "2", str(tmp_path)])
    assert isolated.main() == 1
    out = capsys.readouterr().out
    assert "FAILED test_hangs.py: over 2 s" in out and out.endswith("0 passed, 1 failed\n")


def test_parts_of_a_file_are_all_of_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "conftest.py").write_text("from ponder.tests.order import *\n")
    tests = [f"def test_{i}():\n    assert {i} != 3\n" for i in range(5)]
    (tmp_path / "test_five.py").write_text("".join(tests))
    monkeypatch.setattr(sys, "argv", ["isolated", "--parts", "3", str(tmp_path)])
    assert isolated.main() == 1
    out = capsys.readouterr().out
    assert "FAILED test_five.py, part 1 of 3: exit 1" in out
    assert "test_five.py, part 2 of 3: 2 passed" in out and out.endswith("4 passed, 1 failed\n")


def test_what_has_a_mark_is_left_out_before_the_parts_are_made(tmp_path, monkeypatch, capsys):
    """Of every two tests one has it: else two of four parts would have nothing to do."""
    (tmp_path / "conftest.py").write_text("from ponder.tests.order import *\n")
    way = "pytest.param('cpu', marks=pytest.mark.slow)"
    tests = f"import pytest\n@pytest.mark.parametrize('way', ['kernel', {way}])\n"
    tests += (
        "@pytest.mark.parametrize('i', range(2))\ndef test_x(i, way):\n    assert way == 'kernel'\n"
    )
    (tmp_path / "test_ways.py").write_text(tests)
    words = ["isolated", "--parts", "2", "--marked", "not slow", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert isolated.main() == 0
    out = capsys.readouterr().out
    assert out.count(": 1 passed") == 2 and out.endswith("2 passed, 0 failed\n")


def test_tests_go_on_from_what_passed(tmp_path, monkeypatch, capsys):
    """And begin with the files that are named, the largest first of the others."""
    for name, line in (("bad", "1 / 0"), ("first", "pass"), ("good", "pass # of the largest")):
        (tmp_path / f"test_{name}.py").write_text(f"def test_x():\n    {line}\n")
    monkeypatch.setattr(isolated, "WORKERS", 1)
    words = ["--first", "test_first.py", "--passed", str(tmp_path / "passed"), "--"]
    monkeypatch.setattr(sys, "argv", ["isolated", *words, str(tmp_path)])
    assert isolated.main() == 1
    assert (tmp_path / "passed").read_text().split() == ["test_first.py", "test_good.py"]
    capsys.readouterr()
    assert isolated.main() == 1
    out = capsys.readouterr().out
    assert out.startswith("2 passed before") and out.endswith("0 passed, 1 failed\n")


@pytest.mark.slow
def test_cases_are_compiled_side_by_side():
    words = [sys.executable, "-m", "ponder.benchmarks", "decode", "--smoke", "--warm-up", "2"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    compiled = [line for line in run.stdout.splitlines() if line.endswith("is compiled")]
    assert len(compiled) == len(set(compiled)) == 2


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PONDER_TILES", str(path))
    caches = tiles_file, _attention_tiles.measured, mlp._measured
    for cache in caches:
        cache.cache_clear()
    yield path
    for cache in caches:
        cache.cache_clear()


def test_a_row_says_whether_the_code_is_the_commit_s(tmp_path, monkeypatch, own_file):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("PONDER_COMMIT", "0123456789abcdef")
    own_file.write_text("{}")
    assert measure._commit() == "0123456789ab"

    def git(*words: str) -> str:
        author = "-c", "user.name=a", "-c", "user.email=a@b"
        run = subprocess.run(["git", "-C", tmp_path, *author, *words], capture_output=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.decode().strip()

    git("init", "-q")
    (tmp_path / "kernel.py").write_text("x = 1")
    git("add", "kernel.py")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert (provenance.commit(), measure._commit()) == (head, head[:12])
    (tmp_path / "rows.csv").write_text("1")
    assert provenance.commit() == head
    (tmp_path / "kernel.py").write_text("x = 2")
    assert (provenance.commit(), measure._commit()) == (head + "+", head[:12] + "+")
    git("checkout", "-q", "kernel.py")
    (tmp_path / "new.c").write_text("")
    assert provenance.commit() == head + "+"
    (tmp_path / "new.c").unlink()
    own_file.write_text('{"capability": 90}')
    tiles_file.cache_clear()
    assert measure._commit() == head[:12] + "+tiles"


def test_tiles_of_a_file_are_taken_where_they_were_measured(own_file):
    own = _attention_tiles.Tiles(64, 64, 4, 3)
    attention = [["forward", 64, vars(own)], ["backward", 64, vars(own)]]
    wide = mlp.Tile(128, 128, 64, num_warps=4, num_stages=4, tma=True)
    found = {"capability": 90, "attention": attention, "mlp": [[True, vars(wide)]]}
    own_file.write_text(json.dumps(found))
    assert mlp._tiles(90, 2, True).by_size == (wide, *mlp._HOPPER_BACKWARD.by_size[1:])
    assert mlp._tiles(90, 2, False) is mlp._HOPPER_FORWARD
    assert mlp._tiles(100, 2, True) is mlp._HOPPER_BACKWARD
    choose = _attention_tiles.choose
    assert choose("forward", 64, "bf16", 90, ()) == choose("backward", 50, "fp16", 90, ()) == own
    table = _attention_tiles.TILES["forward", "large"]
    assert choose("forward", 128, "bf16", 90, ()) == table[128]
    assert choose("forward", 64, "bf16", 90, ("sinks",)) == table[64]
    assert choose("forward", 64, "fp32", 90, ()) != own
    assert choose("forward", 64, "bf16", 80, ()) != own
    assert choose("backward", 128, "bf16", 90, ()) is None


def test_a_candidate_is_proven_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed here")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for where there is no GPU")
    words = [sys.executable, "-m", "ponder.benchmarks.tiles", "--smoke", "--try"]
    good = ["attention", "backward", 64, vars(_attention_tiles.SPECIALIZED_TILES["backward", 64])]
    run = subprocess.run([*words, json.dumps(good)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("relative error")


def test_tiles_are_kept_as_they_are_found(tmp_path, monkeypatch):
    """A kernel and head dimension at a time, and what was wrong; a run goes on behind them."""
    path, tried, timed = tmp_path / "tiles.json", [], []
    good, bad = _attention_tiles.Tiles(64, 64, 4, 3), _attention_tiles.Tiles(64, 64, 4, 9)
    trials = [(name, 64, which) for name in tiles.HOPPER for which in (good, bad)]

    def attempt(trial, smoke):
        tried.append((trial[1], trial[-1]["num_stages"]))
        return "wrong" * (trial[-1] == vars(bad))

    def times(name, inputs, options, smoke):
        timed.append((name, list(options.values())))
        if name == stop:
            raise KeyboardInterrupt
        return dict(zip(options, (1.0, 0.5), strict=True))

    for name, value in (("attempt", attempt), ("times", times)):
        monkeypatch.setattr(tiles, name, value)
    monkeypatch.setattr(tiles, "candidates", lambda smoke: iter(trials))
    monkeypatch.setattr(tiles, "tensors", lambda dim, smoke: [])
    stop = "backward_q"
    with pytest.raises(KeyboardInterrupt):
        tiles.attention(tiles.Notes(path, 90), smoke=False)
    there = json.loads(path.read_text())
    assert there["attention"] == [["forward", 64, vars(good)]]
    assert there["wrong"][0] == ["attention", "forward", 64, vars(bad), "wrong"]
    assert there["done"] == [["attention", "forward", 64]]
    tried.clear(), timed.clear()
    stop = None
    tiles.attention(tiles.Notes(path, 90), smoke=False)
    assert tried[0] == ("backward_q", 3) and [name for name, _ in timed] == [*tiles.HOPPER][1:]
    two = {("forward", 64): good, ("backward_q", 64): good, ("backward_kv", 64): good}
    assert timed[-1] == ("backward", [two, two | {("backward", 64): good}])
    assert len(json.loads(path.read_text())["attention"]) == 4
    there["commit"] = "another"
    path.write_text(json.dumps(there))
    tried.clear()
    tiles.attention(tiles.Notes(path, 90), smoke=False)
    assert tried[:2] == [("backward_q", 3), ("backward_q", 9)]
    assert tiles.Notes(path, 80).known["done"] == []  # of another chip


@pytest.mark.parametrize("spoiled, value", [(1, torch.nan), (2, 7.0)])
def test_all_that_a_tile_writes_is_judged(monkeypatch, spoiled, value):
    """The gradients, whose NaN is no small error, and the hidden units."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for where there is no GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backward = mlp._mlp_backward

    def wrong(*arguments):
        written = backward(*arguments)
        written[spoiled].fill_(value)
        return written

    monkeypatch.setattr(mlp, "_mlp_backward", wrong)
    monkeypatch.setattr(mlp, "_tiles", mlp._tiles)  # put back what error_of leaves there
    assert not mlp_tiles.error_of(True, mlp_tiles.INTERPRETED[0], True) < 1


def test_a_plan_is_measured_beyond_what_was_there(monkeypatch):
    """As cuBLAS's workspace of the tiny model's steps."""
    most = iter([164 * 2**20])
    monkeypatch.setattr(plan, "DEVICE", "cuda")
    monkeypatch.setattr(plan, "train", lambda *arguments: 0.0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 64 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(most))
    assert plan.measure("memory", "4.85M, 16x256")["peak_mib"] == 100


def test_plans_come_case_by_case_and_go_on(tmp_path, monkeypatch):
    numbers = dict(peak_mib=2.0, planned_mib=2.0, ms=1.0, planned_ms=1.0)

    def run(command, **options):
        called.append(command[-1])
        if len(called) == most:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(numbers))

    out, called, most = tmp_path / "plan.csv", [], plan.PROCESSES + 2
    monkeypatch.setattr(plan, "has_bf16_products", lambda device: True)
    monkeypatch.setattr(plan, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["plan", "--out", str(out), "--resume"])
    first, *others = plan.CASES
    with pytest.raises(KeyboardInterrupt):
        plan.main()
    assert measure.measured_here(out, "case") == {first}
    called.clear()
    most = None
    plan.main()
    assert list(dict.fromkeys(called)) == others
    assert measure.measured_here(out, "case") == {*plan.CASES}


def test_both_sides_train_on_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "cache"))
    text = "To be, or not to be: that is the question.\n" * 100
    config = train_124m.recipe(text, tmp_path, 20, smoke=True)
    train_124m.write_tokens(config, tmp_path)
    data = load_data(config)
    assert data.vocabulary.size == train_124m.VOCABULARY
    [windows] = data.sources
    assert isinstance(windows, Windows)
    files = [np.fromfile(tmp_path / f"{name}.bin", dtype=np.uint16) for name in ("train", "val")]
    for file, own in zip(files, (windows.train, windows.held_out), strict=True):
        assert np.array_equal(file, own)
    assert data.tokenizer.decode(np.concatenate(files).tolist()) == text


TRAIN_PY = """
import sys
import torch

given = dict(word[2:].split("=") for word in sys.argv[1:])
assert given["batch_size"] == "4" and given["block_size"] == "64"
print("step 0: train loss 9.9999, val loss 9.9999")
for i in range(int(given["max_iters"]) + 1):
    print(f"iter {i}: loss {i / 10:.4f}, time {100 + i}.00ms, mfu -100.00%")


class Model(torch.nn.Module):
    def forward(self, x, y):
        found = y != -1
        return None, (x * found).sum() / found.sum()


model, ctx = Model(), torch.no_grad()
"""


@pytest.mark.slow
def test_a_training_run_beside_nanogpt(tmp_path, monkeypatch, capsys):
    """What train.py prints, and the model that it leaves, become rows and curves; then again."""
    (tmp_path / "train.py").write_text(TRAIN_PY)
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 300)
    words = [sys.executable, "-m", "ponder.benchmarks.train_124m", "--smoke", "--resume"]
    words += ["--nanogpt", str(tmp_path), "--text", str(text), "--out", str(tmp_path / "out")]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-2000:]
    found = measure.read(tmp_path / "out" / "train_124m.csv") or []
    rows = {row.implementation: row for row in found}
    assert list(rows) == ["nanoGPT", "ponder", "ponder Muon"]
    assert float(rows["nanoGPT"].ms_p50) == (104.5 + 114.5) / 2
    with open(tmp_path / "out" / "train_124m_curves.csv", newline="") as file:
        curves = list(csv.DictReader(file))
    peer = [tuple(row.values())[2:] for row in curves if row["implementation"] == "nanoGPT"]
    assert [row[:3] for row in peer] == [("10", "1.095", "0.45"), ("20", "2.24", "1.45")]
    # Letters a to j are tokens 4 to 13; the last of the 300 held out is predicted, not seen.
    assert float(peer[-1][3]) == pytest.approx((8.5 * 300 - 13) / 299, abs=1e-4)
    losses = [float(row["train_loss"]) for row in curves if row["implementation"] == "ponder Muon"]
    assert losses[1] < losses[0] < 11
    assert draw(tmp_path / "out", tmp_path)[-1].stat().st_size > 5000
    monkeypatch.setenv("PONDER_CACHE", "")  # which main sets
    monkeypatch.setattr(sys, "argv", words[2:])
    assert train_124m.main() == 0 and "tokens/s" not in capsys.readouterr().out
