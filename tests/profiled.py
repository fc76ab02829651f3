"""Counting what a call allocates, inside of torch's operators too."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_above(limit: int, call: Callable[[], object]) -> list[int]:
    """Bytes of each CPU allocation above a limit that torch makes in a call, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == '[memory]']  # pyright: ignore[reportAttributeAccessIssue]
    assert changes  # the profiler saw something
    return [change for change in changes if change > limit]
