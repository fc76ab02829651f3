"""What the host does in a step, superposed beside plain: folding, copies to the device, waits for it."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from composer_tst import TokenSuperposition
from composer_tst.ops.fold import fold_batch
from tools.benchmarks.measure import clear
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


def fold_milliseconds(shape: Shape) -> float:
    """Of folding the batches of one step on the host."""
    ids = torch.randint(shape.vocabulary, (BAG_SIZE * shape.batch_size, shape.length))
    spent = []
    for _ in range(21):
        begin = time.perf_counter()
        fold_batch({'input_ids': ids, 'labels': ids}, BAG_SIZE)
        spent.append(time.perf_counter() - begin)
    return 1e3 * sorted(spent)[10]


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
