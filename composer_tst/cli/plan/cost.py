"""Each phase in numbers: steps, data tokens, positions, FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from composer_tst.cli.main import CommandError
from composer_tst.cli.plan.config import Run
from composer_tst.cli.plan.model import Model
from composer_tst.schedule import Data, Plan, plan_steps


@dataclass(frozen=True)
class PhaseCost:
    """A phase in numbers: data tokens are read, positions are what the model works on."""

    bag_size: int
    steps: int
    data_tokens: int
    positions: int
    flops_per_step: float


def steps_of(run: Run, rows_in_data: int | None = None) -> Plan | None:
    """At which step each phase ends; None if a time is in epochs and the data are not known."""
    batches = max(1, rows_in_data // run.rows) if rows_in_data else None
    bags_rows = run.expand != 'sequence' and run.superpose != 'output'
    data = Data(batches, run.rows, run.rows * run.length, row_length=run.length if bags_rows else None)
    try:
        return plan_steps(run.phases, run.draws, run.max_duration, data)
    except ValueError as error:
        raise CommandError(str(error)) from error


def cost_phases(run: Run, model: Model, rows_in_data: int | None) -> list[PhaseCost]:
    """The phases of a run, recovery last."""
    plan = steps_of(run, rows_in_data)
    if plan is None:
        raise CommandError('a time is given in epochs, which needs --stats to know the length of one')
    for phase, start, end in zip(run.phases, [0, *plan.ends], plan.ends, strict=False):
        if end <= start or end >= plan.total:
            raise CommandError(
                f'algorithms.token_superposition: the phase with bag_size {phase.bag_size} goes from step {start} to '
                f'{end} of {plan.total}: give it steps, and leave some for recovery'
            )
    costs = []
    for stretch in plan.stretches:
        bag, rows, length = stretch.bag_size, run.rows, run.length
        fewest = bag if run.superpose == 'output' else 2 * bag
        if run.expand != 'sequence' and bag > 1 and length < fewest:
            raise CommandError(
                f'algorithms.token_superposition: max_seq_len is {length}, and a row by itself needs {fewest} tokens '
                f'for bags of {bag}: use expand: sequence, a smaller bag_size, or longer rows'
            )
        if bag > 1 and run.superpose != 'output' and run.expand != 'sequence':
            rows, length = rows * run.draws(bag), length // bag
        costs.append(
            PhaseCost(
                bag, stretch.steps, plan.tokens_of(stretch) or 0, stretch.steps * rows * length,
                float(rows * length * model.flops(length)),
            )
        )  # fmt: skip
    return costs
