"""What superposition costs: each part beside what it replaces and beside the published listings.

    python -m tools.benchmarks.run [loss|embedding|loader|step|host] [--device cpu|cuda] [--json FILE]

Every number comes from one process. The variants of a setting take turns, call by call, so that whatever else
the machine does slows all of them; a ratio is the median, with quartiles, of the ratios of neighbouring calls.
Memory is the peak of two calls in a row over what stood before it: torch's counters on a GPU, its profiler on a CPU.
On a GPU times are its own clock's, and a whole training is measured alone, the next one when nothing is left of it.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tools.benchmarks.host import fold_milliseconds, host_work
from tools.benchmarks.loading import loader_cases
from tools.benchmarks.machine import machine
from tools.benchmarks.measure import Case, Result, clear, compare, copy_bandwidth
from tools.benchmarks.operations import embedding_cases, loss_cases
from tools.benchmarks.stepping import Shape, step_cases


class Part(str, Enum):
    """What can be measured."""

    loss = 'loss'
    embedding = 'embedding'
    loader = 'loader'
    step = 'step'
    host = 'host'


CASES = {
    Part.loss: loss_cases,
    Part.embedding: embedding_cases,
    Part.loader: loader_cases,
    Part.step: step_cases,
}


def table(results: list[Result]) -> str:
    """The results in Markdown; ratios are ours to the other's, with the target each has to stay under."""
    lines = [
        '| setting | against | ours, ms | other, ms | time ratio (quartiles) | rounds | target '
        '| of its bandwidth | ours, MiB | other, MiB | memory ratio | target |',
        '|---|---|--:|--:|--:|--:|---|--:|--:|--:|--:|---|',
    ]
    for result in results:
        low, high = result.time_ratio_quartiles
        lines.append(
            f'| {result.setting} | {result.other} | {result.ours_ms:.1f} | {result.other_ms:.1f} '
            f'| {result.time_ratio:.3f} ({low:.3f} to {high:.3f}) | {result.rounds} '
            f'| {_verdict(result.time_ratio, result.time_at_most)} '
            f'| {"" if result.bandwidth_share is None else f"{result.bandwidth_share:.0%}"} '
            f'| {result.ours_mib:.0f} | {result.other_mib:.0f} '
            f'| {"" if result.memory_ratio is None else f"{result.memory_ratio:.2f}"} '
            f'| {_verdict(result.memory_ratio, result.memory_at_most)} |'
        )
    return '\n'.join(lines)


def _verdict(ratio: float | None, at_most: float | None) -> str:
    if ratio is None or at_most is None:
        return ''
    return f'<= {at_most:.3g}: {"met" if ratio <= at_most else "MISSED"}'


def host_table(work: dict[str, Any]) -> str:
    """What the host does in a step, in Markdown."""
    lines = ['| step | waits for the device | copies to it |', '|---|--:|--:|']
    lines += [f'| {name} | {step["waits"]:.1f} | {step["copies"]:.1f} |' for name, step in work['steps'].items()]
    return '\n'.join([*lines, '', f'Folding the batches of a step: {work["fold_ms"]:.2f} ms on the host.'])


def measured(part: str, cases: Iterator[Case], on: torch.device) -> Iterator[Result]:
    """The results of each case, of which only one at a time is alive."""
    for number in itertools.count(1):
        if (case := next(cases, None)) is None:
            return
        typer.echo(f'{part}, setting {number}: {case.setting}', err=True)
        yield from compare(case, on)
        del case
        clear(on)


def main(
    what: Annotated[Part | None, typer.Argument(help='Only this part; all of them by default.')] = None,
    device: Annotated[str, typer.Option(help='cpu or cuda.')] = 'cpu',
    json_file: Annotated[Path | None, typer.Option('--json', metavar='FILE', help='Save the results.')] = None,
) -> None:
    """Measure the package against what it replaces and against the published listings."""
    on = torch.device(device)
    torch.manual_seed(0)
    record: dict[str, Any] = {'machine': machine(on), 'copy_gb_per_s': copy_bandwidth(on), 'results': []}
    typer.echo(f'{record["machine"]}, copies {record["copy_gb_per_s"]:.0f} GB/s\n')
    results: list[Result] = []
    parts = [what] if what else list(Part)
    for number, part in enumerate(parts, 1):
        if part is Part.host:
            shape = Shape.of(on, 2048)
            steps = {name: asdict(work) for name, work in host_work(on).items()}
            record['host'] = {'steps': steps, 'fold_ms': fold_milliseconds(shape)}
            continue
        for result in measured(f'{number} of {len(parts)}, {part.value}', CASES[part](on), on):
            results.append(result)
            record['results'].append(asdict(result))
            if json_file:  # at once: a later case may not fit the device
                json_file.write_text(json.dumps(record, indent=2, allow_nan=False) + '\n')
    if results:
        typer.echo(table(results))
    if 'host' in record:
        typer.echo(host_table(record['host']))
    if json_file:
        json_file.write_text(json.dumps(record, indent=2, allow_nan=False) + '\n')


if __name__ == '__main__':
    typer.run(main)
