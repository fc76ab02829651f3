"""How a call is measured beside others."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 11, 1000


@dataclass(frozen=True)
class Other:
    """Something to compare with, and how much of its time and memory the package may take.

    `moves` is how often the package has to move, at the least, the memory that this one moves at full bandwidth.
    """

    name: str
    call: Call
    time_at_most: float | None = None
    memory_at_most: float | None = None
    moves: float | None = None


@dataclass(frozen=True)
class Case:
    """One call of the package in one setting, its alternatives on the same inputs, and the time to spend on each.

    Where the variants are `apart`, each is too large to stand beside another: its `call` makes what is then called,
    measured alone, and closed.
    """

    setting: str
    call: Call
    others: tuple[Other, ...]
    seconds: float = 1.0
    apart: bool = False


@dataclass(frozen=True)
class Result:
    """A line of the table: milliseconds and MiB of the package (ours) and of the other, and ratios of the two.

    There is no ratio of memory where the other takes none. The first call, which compiles what is compiled, is
    in none of the other figures (of a case whose variants are apart, it is what making one takes).
    `bandwidth_share` is the share of the other's bandwidth at which the package moves what it has to move.
    """

    setting: str
    other: str
    ours_ms: float
    other_ms: float
    ours_first_ms: float
    other_first_ms: float
    time_ratio: float
    time_ratio_quartiles: tuple[float, float]
    rounds: int
    time_at_most: float | None
    bandwidth_share: float | None
    ours_mib: float
    other_mib: float
    memory_ratio: float | None
    memory_at_most: float | None


@dataclass
class Measured:
    """Seconds of the first call and of the counted ones, and bytes at the peak of two."""

    first: float
    peak: int
    seconds: list[float]


def compare(case: Case, device: torch.device) -> list[Result]:
    """Times and peak memory of a case, after two calls of each of its variants to warm up."""
    variants = [case.call, *(other.call for other in case.others)]
    measured = _apart(variants, case.seconds, device) if case.apart else _taking_turns(variants, case.seconds, device)
    ours = measured[0]
    results = []
    for other, theirs in zip(case.others, measured[1:], strict=True):
        ratios = [mine / its for mine, its in zip(ours.seconds, theirs.seconds, strict=False)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method='inclusive')
        results.append(
            Result(
                setting=case.setting,
                other=other.name,
                ours_ms=1e3 * statistics.median(ours.seconds),
                other_ms=1e3 * statistics.median(theirs.seconds),
                ours_first_ms=1e3 * ours.first,
                other_first_ms=1e3 * theirs.first,
                time_ratio=ratio,
                time_ratio_quartiles=(low, high),
                rounds=len(ratios),
                time_at_most=other.time_at_most,
                bandwidth_share=None if other.moves is None else other.moves / ratio,
                ours_mib=ours.peak / 2**20,
                other_mib=theirs.peak / 2**20,
                memory_ratio=ours.peak / theirs.peak if theirs.peak else None,
                memory_at_most=other.memory_at_most,
            )
        )
    return results


def _taking_turns(calls: list[Call], seconds: float, device: torch.device) -> list[Measured]:
    """Call by call, so that whatever else the machine does slows all of them."""
    measured = [Measured(_seconds(call, device), _peak_bytes(call, device), []) for call in calls]
    for round_ in range(MAX_ROUNDS):
        for turn in range(len(calls)):
            index = (round_ + turn) % len(calls)  # another first each round: what ran before is in the cache
            spent = measured[index].seconds
            if round_ < MIN_ROUNDS or sum(spent) < seconds:
                spent.append(_seconds(calls[index], device))
    return measured


def _apart(makers: list[Call], seconds: float, device: torch.device) -> list[Measured]:
    """One after the other, nothing of the one before left."""
    return [alone(make, seconds, device) for make in makers]


def alone(make: Call, seconds: float, device: torch.device) -> Measured:
    """Make what is called, call it, and close it. Making counts as the first call."""
    begin = time.perf_counter()
    call: Any = make()
    one = Measured(time.perf_counter() - begin, _peak_bytes(call, device), [])
    while len(one.seconds) < MIN_ROUNDS or (sum(one.seconds) < seconds and len(one.seconds) < MAX_ROUNDS):
        one.seconds.append(_seconds(call, device))
    call.close()
    del call
    clear(device)
    return one


def clear(device: torch.device) -> None:
    """Free what nothing uses any more, and let the compiler forget: else it gives up at the ninth shape."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of copies within the device's memory."""
    source = torch.empty((1 << 30) if device.type == 'cuda' else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = [_seconds(lambda: target.copy_(source), device) for _ in range(3 + MIN_ROUNDS)]
    return 2 * source.numel() / statistics.median(copies[3:]) / 1e9


def _seconds(call: Call, device: torch.device) -> float:
    """From the call to the end of what it set off: on a GPU by its own clock."""
    if device.type == 'cuda':
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start, end = events
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


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
    # Later versions of torch also report that memory is freed which they did not see allocated. So a peak is measured
    # from the lowest point before it, which where they do not is where it began.
    held = lowest = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        lowest = min(lowest, held)
        peak = max(peak, held - lowest)
    return peak
