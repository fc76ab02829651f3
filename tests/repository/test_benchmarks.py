"""tools/benchmarks/run.py: what it compares computes the same, and its table says what was measured."""

import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch import Tensor
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from composer_tst import TokenSuperposition
from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.embedding import bag_embedding
from tools.benchmarks import host, measure, operations, published_step, stepping
from tools.benchmarks import run as benchmark


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


class Clock:
    """Time that passes where a test spends it, and a microsecond at each look."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that is measured by: whatever else the machine does, a call takes what it says it does."""
    made = Clock()
    monkeypatch.setattr(measure, 'time', SimpleNamespace(perf_counter=made.perf_counter))
    return made


def test_time_and_memory_are_compared(clock: Clock):
    """One that takes a quarter of the time and half of the memory, beside one that takes none."""

    def spend(seconds: float, elements: int) -> None:
        buffer = torch.empty(elements)
        clock.spend(seconds)
        del buffer

    others = (
        measure.Other('more', lambda: spend(0.02, 1 << 19), time_at_most=0.5, memory_at_most=0.4),
        measure.Other('none', lambda: None),
    )
    case = measure.Case('a', lambda: spend(0.005, 1 << 18), others, seconds=0.1)
    more, none = measure.compare(case, torch.device('cpu'))
    assert more.time_ratio == pytest.approx(0.25, rel=1e-3)
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


def test_variants_that_are_apart_are_never_alive_together(clock: Clock):
    alive: list[str] = []

    class Training:
        def __init__(self, name: str):
            alive.append(name)
            assert len(alive) == 1
            clock.spend(0.01)

        def __call__(self) -> None:
            assert alive

        def close(self) -> None:
            alive.clear()

    others = tuple(measure.Other(name, lambda name=name: Training(name)) for name in ('b', 'c'))
    results = measure.compare(measure.Case('a', lambda: Training('a'), others, 0.0, apart=True), torch.device('cpu'))
    assert [result.other for result in results] == ['b', 'c']
    assert not alive
    # Making is no part of the time of a call.
    assert all(result.ours_first_ms >= 10 > result.ours_ms for result in results)


def test_the_first_call_is_apart_from_the_others(clock: Clock):
    calls: list[float] = []

    def compiles_first() -> None:
        clock.spend(0.05 if not calls else 0.001)
        calls.append(0)

    case = measure.Case('a', compiles_first, (measure.Other('b', lambda: clock.spend(0.002)),), seconds=0.0)
    (result,) = measure.compare(case, torch.device('cpu'))
    assert (result.ours_first_ms, result.ours_ms) == pytest.approx((50, 1), rel=1e-2)
    assert (result.other_first_ms, result.other_ms) == pytest.approx((2, 2), rel=1e-2)


def test_a_share_of_a_copys_bandwidth(clock: Clock):
    """Half again as much to move as the copy has, in three times its time: at half of its bandwidth."""
    copy = measure.Other('copy', lambda: clock.spend(0.01), moves=1.5)
    case = measure.Case('a', lambda: clock.spend(0.03), (copy,), seconds=0.0)
    (result,) = measure.compare(case, torch.device('cpu'))
    assert result.bandwidth_share == pytest.approx(0.5, rel=1e-3)
    assert '| 50% |' in benchmark.table([result])
    # A copy of 64 MiB that takes a microsecond, read and written.
    assert measure.copy_bandwidth(torch.device('cpu')) == pytest.approx(2 * 2**26 / 1e-6 / 1e9, rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_each_part_of_the_operations_runs(dtype: torch.dtype, device: torch.device):
    for case in (
        operations.loss_case(device, dtype, 5, 19, 6, peers=False),
        operations.embedding_case(device, dtype, 19, 8, 7, 3),
        operations.embedding_case(device, dtype, 19, 8, 7, 3, half_one_token=True),
    ):
        results = measure.compare(dataclasses.replace(case, seconds=0.0), device)
        assert len(results) == len(case.others) >= 3


def test_more_shapes_than_the_compiler_keeps_are_compiled(device: torch.device):
    def double(x: Tensor) -> Tensor:
        return 2 * x

    for size in range(2, 14):  # dynamo gives up at the ninth
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(double, fullgraph=True, dynamic=False, backend='eager')
        assert compiled(torch.ones(size, device=device)).sum() == 2 * size
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
        measure.clear(device)


@pytest.mark.slow
def test_what_is_called_compiled_is_compiled(device: torch.device):
    measure.clear(device)
    case = operations.loss_case(device, torch.float32, 5, 20, 2, peers=True)
    torch._dynamo.utils.counters.clear()
    measure.compare(dataclasses.replace(case, seconds=0.0), device)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2


def test_trainings_go_step_by_step_and_leave_nothing(device: torch.device):
    shape = stepping.Shape(batch_size=2, length=12, width=64, layers=1, vocabulary=300)
    for algorithm in (None, TokenSuperposition(3, stepping.SUPERPOSED)):
        steps = stepping.Steps(device, shape, algorithm)
        state = steps._trainer.state
        model = weakref.ref(state.model)
        at = [int(state.timestamp.batch)]
        for _ in range(3):
            steps()
            at.append(int(state.timestamp.batch))
        assert at == list(range(at[0], at[0] + 4))
        steps.close()
        del steps, state
        measure.clear(device)
        assert model() is None


def test_the_hosts_work_is_counted(device: torch.device):
    shape = stepping.Shape(batch_size=2, length=12, width=64, layers=1, vocabulary=300)
    work = host.host_work(device, shape)
    assert work['plain'].waits > 0
    if device.type == 'cuda':  # on a CPU, reading the values of the host's own batch counts too
        assert work['superposed'].waits <= work['plain'].waits
        assert work['superposed'].copies <= work['plain'].copies
    text = benchmark.host_table({'steps': {k: dataclasses.asdict(v) for k, v in work.items()}})
    assert f'| superposed | {work["superposed"].waits:.1f} |' in text


def test_folding_is_timed_beside_the_copy_of_the_rows(device: torch.device):
    for case in host.fold_cases(device):
        (result,) = measure.compare(dataclasses.replace(case, seconds=0.0), torch.device('cpu'))
        assert result.other == 'a copy of these rows'
        assert result.time_at_most == 2
        assert result.ours_mib > 1
        assert result.other_mib > 1


def test_a_recipe_at_its_size():
    pytest.importorskip('omegaconf', reason='llm-foundry brings it')
    published = published_step.Recipe.published()
    assert str(published) == 'B=8 L=2048 d=576 layers=30 V=128256'
    assert published.bag_size == 6
    with torch.device('meta'):
        model = LlamaForCausalLM(published.config())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 267
    assert model.config._attn_implementation == 'sdpa'


def tiny_recipe() -> published_step.Recipe:
    """The recipe's own bags, in a model that a test can train."""
    pytest.importorskip('omegaconf', reason='llm-foundry brings it')
    heads = {'num_attention_heads': 1, 'num_key_value_heads': 1}
    sizes = {'hidden_size': 64, 'num_hidden_layers': 1, 'intermediate_size': 64, 'vocab_size': 300}
    return published_step.Recipe.published(batch_size=2, length=15, **heads, **sizes)


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_steps_of_a_recipe(compiled: bool, device: torch.device):
    shape = tiny_recipe()
    rates = list(published_step.rates(device, shape, compiled, seconds=0.0))
    assert [rate.step for rate in rates] == ['plain', 'sequence', 'batch', 'recovery']
    assert rates[0].time_ratio == rates[0].memory_ratio == 1
    # Rows of 15 tokens have two bags of 6 each, and a tail that `batch` leaves out.
    positions = [rate.positions_per_second * rate.ms / 1e3 for rate in rates]
    tokens = [rate.tokens_per_second * rate.ms / 1e3 for rate in rates]
    assert positions == pytest.approx([30, 30, 24, 30])
    assert tokens == pytest.approx([30, 180, 144, 30])
    assert all(rate.peak_mib > 0 for rate in rates)
    table = benchmark.recipe_table(rates, shape)
    assert f'| recovery{", compiled" * compiled} |' in table


@pytest.mark.slow
def test_the_compiled_step(device: torch.device):
    shape = stepping.Shape(batch_size=2, length=12, width=64, layers=1, vocabulary=300)
    case = next(stepping.cases_of(device, shape, compiled=True))
    measure.clear(device)
    torch._dynamo.utils.counters.clear()
    (result,) = measure.compare(dataclasses.replace(case, seconds=0.0), device)
    assert 'compiled' in result.setting
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] >= 2


def test_all_parts_are_measured_that_the_device_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[benchmark.Part] = []

    def nothing_of(part: benchmark.Part) -> Callable[[torch.device], Iterator[measure.Case]]:
        return lambda device: iter(asked.append(part) or ())

    monkeypatch.setattr(benchmark, 'CASES', {part: nothing_of(part) for part in benchmark.CASES})
    monkeypatch.setattr(benchmark, 'host_work', lambda device: {})
    shape = tiny_recipe()
    monkeypatch.setattr(benchmark.Recipe, 'published', lambda: shape)
    app = typer.Typer()
    app.command()(benchmark.main)
    assert CliRunner().invoke(app, []).exit_code == 0
    assert asked == [part for part in benchmark.Part if part not in benchmark.OF_A_GPU]
    monkeypatch.setattr(benchmark, 'recipe_rates', lambda on, shape, _: published_step.rates(on, shape, False, 0.0))
    result = CliRunner().invoke(app, ['recipe', '--json', str(tmp_path / 'made.json')])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / 'made.json').read_text(), parse_constant=pytest.fail)
    assert [rate['step'] for rate in made['recipe']] == 2 * ['plain', 'sequence', 'batch', 'recovery']
    assert '| plain |' in result.stdout


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
