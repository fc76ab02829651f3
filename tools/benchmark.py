"""What superposition costs: each operation beside what it replaces and beside the published listings.

    python tools/benchmark.py [loss|embedding] [--device cpu|cuda] [--json FILE]

Every number comes from one process. The variants of a setting take turns, call by call, so that whatever else
the machine does slows all of them; a ratio is the median, with quartiles, of the ratios of neighbouring calls.
Memory is the peak of one call over what stood before it: torch's counters on a GPU, its profiler on a CPU.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from composer_tst.embedding import bag_embedding
from composer_tst.loss import multi_hot_cross_entropy

Call = Callable[[], object]

BAG_SIZES = (2, 6, 16)
MIN_ROUNDS, MAX_ROUNDS = 3, 15
SECONDS = 1.0  # for each variant of a setting, once it has run in MIN_ROUNDS rounds


@dataclass(frozen=True)
class Other:
    """Something to compare with, and how much of its time and memory the package may take."""

    name: str
    call: Call
    time_at_most: float | None = None
    memory_at_most: float | None = None


@dataclass(frozen=True)
class Case:
    """One call of the package in one setting, and its alternatives on the same inputs."""

    setting: str
    call: Call
    others: tuple[Other, ...]


@dataclass(frozen=True)
class Result:
    """A line of the table: milliseconds and MiB of the package (ours) and of the other, and ratios of the two."""

    setting: str
    other: str
    ours_ms: float
    other_ms: float
    time_ratio: float
    time_ratio_quartiles: tuple[float, float]
    rounds: int
    time_at_most: float | None
    ours_mib: float
    other_mib: float
    memory_ratio: float
    memory_at_most: float | None


# --- The loss ---------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The plain step's loss, one target a row: (N, V) logits, upcast as autocast does, (N,) targets."""
    return F.cross_entropy(logits.float(), targets)


def loop_of_cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """The published listing of TST: (N, V) logits, (N, s) targets, one cross-entropy a target."""
    losses = [F.cross_entropy(logits.float(), targets[:, k]) for k in range(targets.shape[1])]
    return sum(losses, start=logits.new_zeros((), dtype=torch.float32)) / len(losses)


def one_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """The published listing of patch-level training (arXiv 2407.12665): one log-softmax, one nll a target."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    losses = [F.nll_loss(log_probs, targets[:, k]) for k in range(targets.shape[1])]
    return sum(losses, start=log_probs.new_zeros(())) / len(losses)


def loss_cases(device: torch.device) -> Iterator[Case]:
    """Forward and backward of the loss, down to the gradient of the logits."""
    elements = 1 << (28 if device.type == 'cuda' else 23)
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in (32768, 50257, 131072):
            for bag_size in BAG_SIZES:
                rows = elements // vocabulary
                logits = torch.randn(rows, vocabulary, device=device).to(dtype).requires_grad_()
                targets = torch.randint(vocabulary, (rows, bag_size), device=device)
                copy = torch.empty_like(logits, requires_grad=False)

                def gradient(loss: Callable[[Tensor, Tensor], Tensor], logits=logits, targets=targets) -> Call:
                    return lambda: torch.autograd.grad(loss(logits, targets), logits)

                yield Case(
                    f'loss s={bag_size} V={vocabulary} N={rows} {_name(dtype)}',
                    gradient(multi_hot_cross_entropy),
                    (
                        Other(
                            'one cross-entropy',
                            gradient(lambda logits, targets: cross_entropy(logits, targets[:, 0])),
                            time_at_most=1.05,
                            memory_at_most=1.0,
                        ),
                        Other(
                            'TST listing: s cross-entropies',
                            gradient(loop_of_cross_entropies),
                            time_at_most={6: 1 / 7, 16: 1 / 20}.get(bag_size),
                        ),
                        Other('patch-level listing: one log-softmax, s nll', gradient(one_log_softmax)),
                        # The loss must read the logits twice and write a gradient: at a copy's bandwidth, 1.5 of it.
                        Other(
                            'a copy of the logits',
                            lambda logits=logits, copy=copy: copy.copy_(logits.detach()),
                            time_at_most=1.5 / 0.8 if device.type == 'cuda' else None,
                        ),
                    ),
                )


# --- The embedding ----------------------------------------------------------------------------------------------


def loop_of_lookups(weight: Tensor, input_ids: Tensor) -> Tensor:
    """The published listing of TST: (T, s) ids, one float32 lookup a token of the bag."""
    total = F.embedding(input_ids[:, 0], weight).float()
    for k in range(1, input_ids.shape[1]):
        total = total + F.embedding(input_ids[:, k], weight).float()
    return (total / input_ids.shape[1]).to(weight.dtype)


def mean_of_lookups(weight: Tensor, input_ids: Tensor) -> Tensor:
    """The short way, through a (T, s, d) tensor."""
    return F.embedding(input_ids, weight).mean(-2)


def embedding_cases(device: torch.device) -> Iterator[Case]:
    """Forward and backward of the bag embedding, down to the gradient of the weight."""
    vocabulary, width, positions = (131072, 2048, 16384) if device.type == 'cuda' else (50257, 512, 4096)
    # Tokens of text: the k-th most frequent comes 1/k as often as the first.
    frequency = torch.arange(1.0, vocabulary + 1, device=device).reciprocal()
    for dtype in (torch.float32, torch.bfloat16):
        for bag_size in BAG_SIZES:
            weight = torch.randn(vocabulary, width, device=device).to(dtype).requires_grad_()
            input_ids = frequency.multinomial(positions * bag_size, replacement=True).view(positions, bag_size)
            upstream = torch.randn(positions, width, device=device).to(dtype)

            def gradient(
                embed: Callable[[Tensor, Tensor], Tensor], weight=weight, input_ids=input_ids, upstream=upstream
            ) -> Call:
                return lambda: torch.autograd.grad(embed(weight, input_ids), weight, upstream)

            yield Case(
                f'embedding s={bag_size} V={vocabulary} d={width} T={positions} {_name(dtype)}',
                gradient(bag_embedding),
                (
                    Other('TST listing: s lookups in float32', gradient(loop_of_lookups), time_at_most=1 / 5),
                    Other('embedding(ids).mean(-2)', gradient(mean_of_lookups), time_at_most=1 / 1.5),
                ),
            )


# --- Measuring --------------------------------------------------------------------------------------------------


class Part(str, Enum):
    """What can be measured."""

    loss = 'loss'
    embedding = 'embedding'


CASES = {Part.loss: loss_cases, Part.embedding: embedding_cases}


def compare(case: Case, device: torch.device) -> list[Result]:
    """Times and peak memory of a case, after one call of each of its variants to warm up."""
    calls = [case.call, *(other.call for other in case.others)]
    memory = [_peak_bytes(call, device) / 2**20 for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(MAX_ROUNDS):
        for call, spent in zip(calls, seconds, strict=True):
            if round_ < MIN_ROUNDS or sum(spent) < SECONDS:
                spent.append(_seconds(call, device))
    results = []
    for other, spent, mib in zip(case.others, seconds[1:], memory[1:], strict=True):
        ratios = [ours / theirs for ours, theirs in zip(seconds[0], spent, strict=False)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method='inclusive')
        results.append(
            Result(
                setting=case.setting,
                other=other.name,
                ours_ms=1e3 * statistics.median(seconds[0]),
                other_ms=1e3 * statistics.median(spent),
                time_ratio=ratio,
                time_ratio_quartiles=(low, high),
                rounds=len(ratios),
                time_at_most=other.time_at_most,
                ours_mib=memory[0],
                other_mib=mib,
                memory_ratio=memory[0] / mib if mib else float('inf'),
                memory_at_most=other.memory_at_most,
            )
        )
    return results


def _seconds(call: Call, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory a second call holds at once, over what was held before it."""
    call()
    gc.collect()
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    assert results is not None
    changes = [event for event in results.events() if event.name() == '[memory]']
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak


# --- Reporting --------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """The results in Markdown; ratios are ours to the other's, with the target each has to stay under."""
    lines = [
        '| setting | against | ours, ms | other, ms | time ratio (quartiles) | target '
        '| ours, MiB | other, MiB | memory ratio | target |',
        '|---|---|--:|--:|--:|---|--:|--:|--:|---|',
    ]
    for result in results:
        low, high = result.time_ratio_quartiles
        lines.append(
            f'| {result.setting} | {result.other} | {result.ours_ms:.1f} | {result.other_ms:.1f} '
            f'| {result.time_ratio:.3f} ({low:.3f} to {high:.3f}) '
            f'| {_verdict(result.time_ratio, result.time_at_most)} '
            f'| {result.ours_mib:.0f} | {result.other_mib:.0f} | {result.memory_ratio:.2f} '
            f'| {_verdict(result.memory_ratio, result.memory_at_most)} |'
        )
    return '\n'.join(lines)


def _verdict(ratio: float, at_most: float | None) -> str:
    if at_most is None:
        return ''
    return f'<= {at_most:.3g}: {"met" if ratio <= at_most else "MISSED"}'


def machine(device: torch.device) -> str:
    """The hardware and the versions in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line.split(':')[1].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        processor = names[0] if names else processor
    parts = [f'{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads', f'torch {torch.__version__}']
    if device.type == 'cuda':
        parts.insert(0, torch.cuda.get_device_name(device))
    return ', '.join(parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def main(
    what: Annotated[Part | None, typer.Argument(help='Only this part; all of them by default.')] = None,
    device: Annotated[str, typer.Option(help='cpu or cuda.')] = 'cpu',
    json_file: Annotated[Path | None, typer.Option('--json', metavar='FILE', help='Save the results.')] = None,
) -> None:
    """Measure the package against what it replaces and against the published listings."""
    on = torch.device(device)
    torch.manual_seed(0)
    results: list[Result] = []
    for part in [what] if what else Part:
        for case in CASES[part](on):
            typer.echo(f'measuring {case.setting}', err=True)
            results += compare(case, on)
    typer.echo(f'{machine(on)}\n\n{table(results)}')
    if json_file:
        record = {'machine': machine(on), 'results': [asdict(result) for result in results]}
        json_file.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    typer.run(main)
