"""``composer-tst plan``: what a run will take before it is run, and the gain to expect of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer

from composer_tst.cli.main import CommandError
from composer_tst.cli.new_file import check_new, write_new

# Dense bf16 peaks in FLOP/s, by their makers.
GPUS = {'a100': 312e12, 'h100': 989e12, 'h200': 989e12, 'b200': 2250e12}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    yaml: Annotated[str, typer.Argument(metavar='YAML', help='A config of llm-foundry.')],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar='KEY=VALUE...', help='Override keys of the YAML.')
    ] = None,
    bag_size: Annotated[int | None, typer.Option(help="Override the YAML's bag_size.")] = None,
    duration: Annotated[str | None, typer.Option(help="Override the YAML's duration.")] = None,
    stats: Annotated[str | None, typer.Option(help='The stats.json that prepare-data wrote.')] = None,
    gpu: Annotated[str, typer.Option(help=f'The kind of GPU: {", ".join(GPUS)}.')] = 'h100',
    gpus: Annotated[int, typer.Option(min=1, help='How many GPUs.')] = 8,
    mfu: Annotated[float, typer.Option(help='The share of their peak that training reaches.')] = 0.4,
    as_json: Annotated[bool, typer.Option('--json', help='Print JSON.')] = False,
    sweeping: Annotated[bool, typer.Option('--sweep', help='Try several bag sizes and durations.')] = False,
    verbose: Annotated[bool, typer.Option('--verbose', help='Add FLOPs and all that is known of these bags.')] = False,
    out: Annotated[
        Path | None, typer.Option('--write', metavar='NEW.yaml', help='Write the YAML to run, filled in.')
    ] = None,
) -> None:
    """Say what a run will take, and whether superposition is likely to gain in it."""
    from omegaconf import OmegaConf

    from composer_tst.cli.plan.keys import change_settings, check, load, superposition_settings, train_splits
    from composer_tst.cli.plan.stats import read_data

    try:
        if gpu not in GPUS:
            raise CommandError(f'--gpu {gpu}: give one of {", ".join(GPUS)}')
        if not 0 < mfu <= 1:
            raise CommandError(f'--mfu {mfu}: give a share above 0 and up to 1')
        if out:
            check_new('--write', out)
        config = load(yaml, overrides or [])
        change_settings(config, bag_size, duration)
        if out and superposition_settings(config) is None:
            raise CommandError('--write needs a superposition: give --bag-size and --duration, or name it in the YAML')
        check(config)
        data = read_data(stats, train_splits(config), config.max_seq_len) if stats else None

        typer.echo('reading the model with Composer and llm-foundry, ten seconds or more ...', err=True)
        with warnings.catch_warnings():  # which are of no use to who only plans
            warnings.simplefilter('ignore')
            from composer_tst.cli.plan.config import read_run
            from composer_tst.cli.plan.filling import fill_in
            from composer_tst.cli.plan.forecast import make_plan, sweep
            from composer_tst.cli.plan.model import build
            from composer_tst.cli.plan.tables import sweep_table, table

        run = read_run(config)
        changes: list[str] = []
        if out:
            config, changes = fill_in(config, run)
            run = read_run(config)  # what is printed is what is written
        model = build(config)
        if sweeping:
            points = sweep(run, model, data)
            print(json.dumps(points, indent=2) if as_json else sweep_table(points))
        else:
            plan = make_plan(config, run, model, data, gpus * GPUS[gpu] * mfu)
            on = f'{gpus} {gpu.upper()} at MFU {mfu:g} (--gpu, --gpus and --mfu change that; a CPU takes longer)'
            print(json.dumps(plan, indent=2) if as_json else table(plan, on, verbose))
        if out:
            write_new('--write', out, OmegaConf.to_yaml(config))
            typer.echo('\n'.join(['', f'{out} is written; in it', *(f'  {change}' for change in changes)]), err=as_json)
    except CommandError as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from None
