"""What superposition costs: each part beside what it replaces and beside the published listings.

    python -m tools.benchmarks.run [loss|embedding|loader|step|host|compiled|recipe] [--device cpu|cuda] [--json FILE]

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

from tools.benchmarks.host import fold_cases, host_work
from tools.benchmarks.loading import loader_cases
from tools.benchmarks.machine import machine
from tools.benchmarks.measure import Case, Result, clear, compare, copy_bandwidth
from tools.benchmarks.operations import embedding_cases, loss_cases
from tools.benchmarks.published_step import Rate, Recipe
from tools.benchmarks.published_step import rates as recipe_rates
from tools.benchmarks.stepping import compiled_cases, step_cases


class Part(str, Enum):
    """What can be measured."""

    loss = 'loss'
    embedding = 'embedding'
    loader = 'loader'
    step = 'step'
    host = 'host'
    compiled = 'compiled'
    recipe = 'recipe'


CASES = {
    Part.loss: loss_cases,
    Part.embedding: embedding_cases,
    Part.loader: loader_cases,
    Part.step: step_cases,
    Part.host: fold_cases,
    Part.compiled: compiled_cases,
}
# What takes a CPU too long: compiled steps, and a published model at its own size.
OF_A_GPU = (Part.compiled, Part.recipe)


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
            f'| {result.setting} | {result.other} | {result.ours_ms:.2f} | {result.other_ms:.2f} '
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
    return '\n'.join(lines)


def recipe_table(rates: list[Rate], recipe: Recipe) -> str:
    """What each kind of step takes at a published model's size, in Markdown; ratios are to the plain step."""
    lines = [
        f'270M recipe, {recipe}, s={recipe.bag_size}',
        '',
        '| step | ms (quartiles) | tokens a second | positions a second | peak, MiB | time ratio | memory ratio |',
        '|---|--:|--:|--:|--:|--:|--:|',
    ]
    lines += [
        f'| {rate.step}{", compiled" * rate.compiled} '
        f'| {rate.ms:.1f} ({rate.ms_quartiles[0]:.1f} to {rate.ms_quartiles[1]:.1f}) '
        f'| {rate.tokens_per_second:,.0f} | {rate.positions_per_second:,.0f} | {rate.peak_mib:,.0f} '
        f'| {rate.time_ratio:.3f} | {rate.memory_ratio:.2f} |'
        for rate in rates
    ]
    return '\n'.join(lines)


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
    what: Annotated[Part | None, typer.Argument(help='Only this part; by default all that the device can do.')] = None,
    device: Annotated[str, typer.Option(help='cpu or cuda.')] = 'cpu',
    json_file: Annotated[Path | None, typer.Option('--json', metavar='FILE', help='Save the results.')] = None,
) -> None:
    """Measure the package against what it replaces and against the published listings."""
    on = torch.device(device)
    torch.manual_seed(0)
    record: dict[str, Any] = {'machine': machine(on), 'copy_gb_per_s': copy_bandwidth(on), 'results': []}
    typer.echo(f'{record["machine"]}, copies {record["copy_gb_per_s"]:.0f} GB/s\n')
    results: list[Result] = []
    rates: list[Rate] = []
    parts = [what] if what else [part for part in Part if on.type == 'cuda' or part not in OF_A_GPU]

    def save() -> None:
        """At once: what comes later may not fit the device."""
        if json_file:
            json_file.write_text(json.dumps(record, indent=2, allow_nan=False) + '\n')

    for number, part in enumerate(parts, 1):
        name = f'{number} of {len(parts)}, {part.value}'
        if part is Part.recipe:
            for compiled in (False, True):
                typer.echo(f'{name}{", compiled" * compiled}', err=True)
                for rate in recipe_rates(on, Recipe.published(), compiled):
                    rates.append(rate)
                    record.setdefault('recipe', []).append(asdict(rate))
                    save()
            continue
        if part is Part.host:
            record['host'] = {'steps': {step: asdict(work) for step, work in host_work(on).items()}}
        # What the host does is timed by its own clock.
        clock = torch.device('cpu') if part is Part.host else on
        for result in measured(name, CASES[part](on), clock):
            results.append(result)
            record['results'].append(asdict(result))
            save()
    if results:
        typer.echo(table(results))
    if 'host' in record:
        typer.echo(host_table(record['host']))
    if rates:
        typer.echo(recipe_table(rates, Recipe.published()))
    save()


if __name__ == '__main__':
    typer.run(main)
