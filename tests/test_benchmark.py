"""tools/benchmark.py: what it compares computes the same, and its table says what was measured."""

import json
import time
from pathlib import Path

import benchmark
import pytest
import torch
import typer
from bench import measure, operations
from torch import Tensor
from typer.testing import CliRunner

from composer_tst.embedding import bag_embedding
from composer_tst.loss import multi_hot_cross_entropy


def same(ours: Tensor, other: Tensor, of: Tensor, tolerance: float) -> None:
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(other, ours, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(ours, of, upstream)
    (expected,) = torch.autograd.grad(other, of, upstream)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('listing', [operations.loop_of_cross_entropies, operations.one_log_softmax])
def test_the_listings_compute_the_loss(listing, dtype: torch.dtype):
    logits, targets = torch.randn(5, 19).to(dtype).requires_grad_(), torch.randint(0, 19, (5, 4))
    same(
        multi_hot_cross_entropy(logits, targets),
        listing(logits, targets),
        logits,
        2e-2 if dtype.itemsize == 2 else 1e-5,
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('listing', [operations.loop_of_lookups, operations.mean_of_lookups])
def test_the_listings_compute_the_embedding(listing, dtype: torch.dtype):
    weight, ids = torch.randn(19, 8).to(dtype).requires_grad_(), torch.randint(0, 19, (5, 3))
    same(bag_embedding(weight, ids), listing(weight, ids), weight, 3e-2 if dtype.itemsize == 2 else 1e-5)


def test_time_and_memory_are_compared():
    """One that takes a quarter of the time and half of the memory, beside one that takes none."""

    def spend(seconds: float, elements: int) -> None:
        buffer = torch.empty(elements)
        time.sleep(seconds)
        del buffer

    others = (
        measure.Other('more', lambda: spend(0.02, 1 << 19), time_at_most=0.5, memory_at_most=0.4),
        measure.Other('none', lambda: None),
    )
    case = measure.Case('a', lambda: spend(0.005, 1 << 18), others, seconds=0.1)
    more, none = measure.compare(case, torch.device('cpu'))
    assert more.time_ratio < 1
    assert (more.ours_mib, more.other_mib, more.memory_ratio) == (1, 2, 0.5)
    assert none.memory_ratio is None
    text = benchmark.table([more, none])
    assert '<= 0.5: met' in text
    assert '<= 0.4: MISSED' in text


def test_what_one_call_leaves_and_the_next_frees_counts_once():
    kept: list[Tensor] = []

    def step() -> None:
        kept.clear()
        kept.append(torch.empty(1 << 18))

    case = measure.Case('a', step, (measure.Other('b', step),), seconds=0.0)
    (result,) = measure.compare(case, torch.device('cpu'))
    assert result.ours_mib == result.other_mib == 1


def test_the_command_writes_its_table_and_strict_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def cases(device: torch.device):
        logits, targets = torch.randn(4, 64, device=device, requires_grad=True), torch.randint(0, 64, (4, 2))
        loss = lambda: torch.autograd.grad(multi_hot_cross_entropy(logits, targets), logits)  # noqa: E731
        yield measure.Case('tiny', loss, (measure.Other('nothing', lambda: None),), seconds=0.0)

    monkeypatch.setitem(benchmark.CASES, benchmark.Part.loss, cases)
    app = typer.Typer()
    app.command()(benchmark.main)
    result = CliRunner().invoke(app, ['loss', '--json', str(tmp_path / 'made.json')])
    assert result.exit_code == 0, result.output
    assert '| tiny | nothing |' in result.stdout
    made = json.loads((tmp_path / 'made.json').read_text(), parse_constant=pytest.fail)
    assert made['results'][0]['rounds'] == measure.MIN_ROUNDS
