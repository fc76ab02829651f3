"""What superposition costs: each part beside what it replaces and beside the published listings.

    python tools/benchmark.py [loss|embedding|loader|step] [--device cpu|cuda] [--json FILE]

Every number comes from one process. The variants of a setting take turns, call by call, so that whatever else
the machine does slows all of them; a ratio is the median, with quartiles, of the ratios of neighbouring calls.
Memory is the peak of two calls in a row over what stood before it: torch's counters on a GPU, its profiler on a CPU.
"""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench.loading import loader_cases
from bench.machine import machine
from bench.measure import Result, compare
from bench.operations import embedding_cases, loss_cases
from bench.stepping import step_cases


class Part(str, Enum):
    """What can be measured."""

    loss = 'loss'
    embedding = 'embedding'
    loader = 'loader'
    step = 'step'


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
        '| ours, MiB | other, MiB | memory ratio | target |',
        '|---|---|--:|--:|--:|--:|---|--:|--:|--:|---|',
    ]
    for result in results:
        low, high = result.time_ratio_quartiles
        lines.append(
            f'| {result.setting} | {result.other} | {result.ours_ms:.1f} | {result.other_ms:.1f} '
            f'| {result.time_ratio:.3f} ({low:.3f} to {high:.3f}) | {result.rounds} '
            f'| {_verdict(result.time_ratio, result.time_at_most)} '
            f'| {result.ours_mib:.0f} | {result.other_mib:.0f} '
            f'| {"" if result.memory_ratio is None else f"{result.memory_ratio:.2f}"} '
            f'| {_verdict(result.memory_ratio, result.memory_at_most)} |'
        )
    return '\n'.join(lines)


def _verdict(ratio: float | None, at_most: float | None) -> str:
    if ratio is None or at_most is None:
        return ''
    return f'<= {at_most:.3g}: {"met" if ratio <= at_most else "MISSED"}'


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
        json_file.write_text(json.dumps(record, indent=2, allow_nan=False) + '\n')


if __name__ == '__main__':
    typer.run(main)
