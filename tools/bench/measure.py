"""How a call is measured beside others."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 11, 1000


@dataclass(frozen=True)
class Other:
    """Something to compare with, and how much of its time and memory the package may take."""

    name: str
    call: Call
    time_at_most: float | None = None
    memory_at_most: float | None = None


@dataclass(frozen=True)
class Case:
    """One call of the package in one setting, its alternatives on the same inputs, and the time to spend on each."""

    setting: str
    call: Call
    others: tuple[Other, ...]
    seconds: float = 1.0


@dataclass(frozen=True)
class Result:
    """A line of the table: milliseconds and MiB of the package (ours) and of the other, and ratios of the two.

    There is no ratio of memory where the other takes none.
    """

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
    memory_ratio: float | None
    memory_at_most: float | None


def compare(case: Case, device: torch.device) -> list[Result]:
    """Times and peak memory of a case, after one call of each of its variants to warm up."""
    calls = [case.call, *(other.call for other in case.others)]
    memory = [_peak_bytes(call, device) / 2**20 for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(MAX_ROUNDS):
        for turn in range(len(calls)):
            index = (round_ + turn) % len(calls)  # another first each round: what ran before is in the cache
            if round_ < MIN_ROUNDS or sum(seconds[index]) < case.seconds:
                seconds[index].append(_seconds(calls[index], device))
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
                memory_ratio=memory[0] / mib if mib else None,
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
    """The most memory held at once in two calls, over what was held before; on a CPU, of what they allocated."""
    call()
    gc.collect()
    gc.disable()  # when it would come in a call is chance
    try:
        if device.type == 'cuda':
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            call()
            return torch.cuda.max_memory_allocated(device) - before
        # Two, because the profiler does not see that a call frees what the one before it left, a step's gradients
        # for example, unless it saw that one too.
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
            call()
    finally:
        gc.enable()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    assert results is not None
    changes = [event for event in results.events() if event.name() == '[memory]']
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak
