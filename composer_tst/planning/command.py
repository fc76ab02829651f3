"""What a run will take before it is run: steps, data, shards, time, and the gain that the published grids suggest.

    python tools/plan.py YAML [KEY=VALUE ...] [--stats STATS.json] [--gpu h100 --gpus 8 --mfu 0.4] [--json]
    python tools/plan.py YAML --sweep
    python tools/plan.py YAML --bag-size 6 --duration 0.3dur --write NEW.yaml

FLOPs are those of matrix products, forward and backward: 6 for each active parameter that multiplies (all but the
input embedding) and 12 * layers * width of attention * length for attention, each per model position.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from planning.config import PlanError, Run, change_settings, equal_steps, fill_in, load, read_run, train_split, write
from planning.cost import cost_phases
from planning.model import Model, build
from planning.published import expect
from planning.stats import read_stats, split_of
from planning.tables import sweep_table, table

# Dense bf16 peaks in FLOP/s, by their makers.
GPUS = {'a100': 312e12, 'h100': 989e12, 'h200': 989e12, 'b200': 2250e12}
SWEEP_BAGS = (2, 3, 4, 6, 8, 12, 16)
SWEEP_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def make_plan(run: Run, model: Model, stats: dict | None, split: str, speed: float) -> dict[str, Any]:
    """Everything there is to say, as JSON.

    Args:
        stats: what `tools/prepare_data.py` wrote, if it is there.
        speed: FLOP/s of all GPUs together, at the MFU reached.
    """
    data = split_of(stats, split, run) if stats is not None else None
    costs = cost_phases(run, model, data['rows'] if data else None)
    flops = sum(cost.steps * cost.flops_per_step for cost in costs)
    steps = sum(cost.steps for cost in costs)
    tokens = sum(cost.data_tokens for cost in costs)
    equivalent = flops / model.flops(run.length)
    superposed = costs[:-1]
    share = sum(cost.steps for cost in superposed) / steps
    plan: dict[str, Any] = {
        'parameters': model.parameters,
        'active_parameters': model.active,
        'phases': [asdict(cost) for cost in costs],
        'steps': steps,
        'superposed_share_of_steps': share,
        'data_tokens': tokens,
        'equivalent_tokens': equivalent,
        'flops': flops,
        'hours': flops / speed / 3600,
        'shard_bytes': tokens * (data['bytes'] / data['tokens'] if data else 4),
        'passes_over_data': tokens / data['tokens'] if data else None,
        'expected': None,
    }
    if superposed:
        bag = sum(cost.steps * cost.bag_size for cost in superposed) / sum(cost.steps for cost in superposed)
        expected = expect(run, model, equivalent, share, bag)
        plan['expected'] = expected and asdict(expected)
    return plan


def sweep(run: Run, model: Model) -> list[dict[str, Any]]:
    """The plain run's steps with every bag size and share of them: data tokens and the expected change."""
    plain = replace(run, max_duration=equal_steps(run), phases=())
    steps = int(plain.max_duration.value)
    found = []
    for bag in SWEEP_BAGS:
        for share in SWEEP_SHARES:
            superposed = int(share * steps)
            drawn = bag if run.expand != 'none' else 1
            tokens = (superposed * drawn + steps - superposed) * run.rows * run.length
            expected = expect(plain, model, steps * run.rows * run.length, share, bag)
            found.append(
                {'bag_size': bag, 'share': share, 'data_tokens': tokens, 'expected': expected and asdict(expected)}
            )
    return found


@app.command()
def main(
    yaml: Annotated[str, typer.Argument(metavar='YAML', help='A config of llm-foundry.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='KEY=VALUE...', help='As for llmfoundry.')] = None,
    bag_size: Annotated[int | None, typer.Option(help='Instead of what the YAML says.')] = None,
    duration: Annotated[str | None, typer.Option(help='Instead of what the YAML says.')] = None,
    stats: Annotated[str | None, typer.Option(help='The stats.json of the data.')] = None,
    gpu: Annotated[str, typer.Option(help=', '.join(GPUS))] = 'h100',
    gpus: Annotated[int, typer.Option(min=1, help='How many.')] = 8,
    mfu: Annotated[float, typer.Option(help='The share of their peak that training reaches.')] = 0.4,
    as_json: Annotated[bool, typer.Option('--json', help='As JSON.')] = False,
    sweeping: Annotated[bool, typer.Option('--sweep', help='Bag sizes and shares of steps instead.')] = False,
    out: Annotated[str | None, typer.Option('--write', metavar='NEW.yaml', help='The YAML to run, filled in.')] = None,
) -> None:
    """Say what a run will take and what it may bring."""
    try:
        if gpu not in GPUS:
            raise PlanError(f'--gpu {gpu}: give one of {", ".join(GPUS)}')
        if not 0 < mfu <= 1:
            raise PlanError(f'--mfu {mfu}: give a share above 0 and up to 1')
        config = load(yaml, overrides or [])
        change_settings(config, bag_size, duration)
        run = read_run(config)
        if out:
            config = fill_in(config, run)
            run = read_run(config)  # what is printed is what is written
        model = build(config)
        speed = gpus * GPUS[gpu] * mfu
        if sweeping:
            points = sweep(run, model)
            print(json.dumps(points, indent=2) if as_json else sweep_table(points))
        else:
            plan = make_plan(run, model, read_stats(stats) if stats else None, train_split(config), speed)
            print(json.dumps(plan, indent=2) if as_json else table(plan, f'{gpus} {gpu.upper()} at MFU {mfu:g}'))
        if out:
            write(config, out)
    except PlanError as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from None


if __name__ == '__main__':
    app()
