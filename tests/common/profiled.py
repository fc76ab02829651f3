"""What torch does in a call, counted by its profiler: inside of its operators too."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def allocated_above(limit: int, call: Callable[[], object]) -> list[int]:
    """Bytes of each CPU allocation above a limit, in order."""
    changes = [event.nbytes() for event in _events(call) if event.name() == '[memory]']
    assert changes  # the profiler saw something
    return [change for change in changes if change > limit]


def operators(call: Callable[[], object]) -> Counter[str]:
    """How often each operator was called, by others included."""
    return Counter(event.name() for event in _events(call))


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, from Python or from DDP's reducer."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if 'c10d' in func.namespace:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


# The operators that read a tensor's values on the host: on a GPU each of them would wait for it.
WAITING = {'aten::item', 'aten::_local_scalar_dense', 'aten::nonzero', 'aten::equal', 'aten::is_nonzero'}


@contextmanager
def errors_at_waits(device: torch.device) -> Iterator[None]:
    """On a GPU, whatever makes the host wait for it raises; a CPU has nothing to wait for."""
    if device.type != 'cuda':
        yield
        return
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@contextmanager
def deterministic() -> Iterator[None]:
    """What is not deterministic raises."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _events(call: Callable[[], object]) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.events()
