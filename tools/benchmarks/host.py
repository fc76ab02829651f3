"""What the host does in a step, superposed beside plain: folding, copies to the device, waits for it."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from composer_tst import TokenSuperposition
from composer_tst.ops.fold import bag_rows, bag_targets, lay_out
from tools.benchmarks.measure import Call, Case, Other, clear
from tools.benchmarks.stepping import BAG_SIZE, SUPERPOSED, Shape, Steps

STEPS = 10
# How a CPU reads a tensor's values: on a GPU's tensor, each would wait.
_READS = ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::equal')


@dataclass(frozen=True)
class HostWork:
    """Of one step: how often the host waits (on a CPU: reads a tensor's values), and copies from host to device."""

    waits: float
    copies: float


def host_work(device: torch.device, shape: Shape | None = None) -> dict[str, HostWork]:
    """Means over ten steps once all is warm, of a plain step and of a superposed one."""
    work = {}
    for name, algorithm in (('plain', None), ('superposed', TokenSuperposition(BAG_SIZE, SUPERPOSED))):
        steps = Steps(device, shape or Shape.of(device, 2048), algorithm)
        for _ in range(3):
            steps()
        work[name] = HostWork(_waits(steps, device) / STEPS, _copies(steps) / STEPS)
        steps.close()
        del steps
        clear(device)
    return work


def fold_cases(device: torch.device) -> Iterator[Case]:
    """What laying out, pinning and folding the rows of one step takes the host, beside the copy of these rows.

    On a GPU the rows are laid out in pinned memory, and folded by the device, whose work the host does not wait for.
    A CPU pins nothing, and folds them itself. Each step has other rows, as in a training: none is in the cache from
    the step before.
    """
    rows, length = BAG_SIZE * 32, 512
    gpu = device.type == 'cuda'
    weights = torch.full((BAG_SIZE,), 1 / BAG_SIZE)

    def lay_out_pin_and_fold(batch: dict[str, torch.Tensor]) -> None:
        laid_out = lay_out(batch, BAG_SIZE, 'sequence', 'both', weights, pin=gpu).batch
        for key in batch if gpu else ():
            laid_out[key] = laid_out[key].to(device, non_blocking=True)
        bag_rows(laid_out, BAG_SIZE, 'both', padded=False)
        bag_targets(laid_out['labels'], None, BAG_SIZE, 'both')

    def copy(batch: dict[str, torch.Tensor]) -> None:
        _ = [value.clone() for value in batch.values()]

    for masked in (False, True):
        batches = [_batch(rows, length, masked) for _ in range(64)]
        yield Case(
            f'host, {rows} rows of {length}{", masked" * masked}: lay out{", pin" * gpu} and fold',
            _on_each(lay_out_pin_and_fold, batches),
            (Other('a copy of these rows', _on_each(copy, batches[32:] + batches[:32]), time_at_most=2.0),),
        )


def _on_each(call: Callable[[dict[str, torch.Tensor]], None], batches: list[dict[str, torch.Tensor]]) -> Call:
    ahead = itertools.cycle(batches)
    return lambda: call(next(ahead))


def _batch(rows: int, length: int, masked: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(32768, (rows, length))
    return {'input_ids': ids, 'labels': ids.clone(), **({'attention_mask': torch.ones_like(ids)} if masked else {})}


def _waits(steps: Callable[[], None], device: torch.device) -> int:
    if device.type != 'cuda':
        return sum(name in _READS for name in _events(steps))
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            for _ in range(STEPS):
                steps()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchroniz' in str(warning.message) for warning in seen)


def _copies(steps: Callable[[], None]) -> int:
    return sum('Memcpy HtoD' in name for name in _events(steps))


def _events(steps: Callable[[], None]) -> list[str]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            steps()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    assert results is not None
    return [event.name() for event in results.events()]
