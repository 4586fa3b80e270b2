"""The benchmarks' own code, on tiny shapes; no time is asserted."""

import subprocess
import sys

import pytest
import torch

from ponder.benchmarks import measure
from ponder.benchmarks.comparison import Case
from ponder.benchmarks.comparison import measure as measure_case
from ponder.benchmarks.figures import draw, ratios

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_ponders_own_fault_is_told(case, monkeypatch):
    monkeypatch.setattr(measure, "WRONG", [])
    case.implementations = {"ponder": case.implementations["wrong"]}
    assert not list(measure_case(case, repeats=1))
    assert len(measure.WRONG) == 2 and "ponder is wrong by" in measure.WRONG[0]


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


def test_every_group_runs():
    words = [sys.executable, "-m", "ponder.benchmarks", "--smoke"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-2000:]
    measured = {line.split()[0] for line in run.stdout.splitlines()}
    assert {"attention", "mlp", "losses", "pointwise", "decode"} <= measured
