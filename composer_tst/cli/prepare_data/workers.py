"""Worker processes, with the packages they need loaded once for all of them.

Workers are forked from a server process that has imported these packages: their memory is shared, a worker
starts at once, and the parent is never forked.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from composer_tst.cli.main import CommandError

# Not transformers, which takes seconds and much memory, and which only one short-lived worker needs.
PRELOADED = [
    *('numpy', 'pyarrow.parquet', 'tokenizers', 'tqdm', 'typer', 's3fs'),
    *('PIL.JpegImagePlugin', 'brotli', 'requests', 'snappy', 'xxhash', 'zstd'),  # streaming's
]
TICK_SECONDS = 0.2
LONGEST_TMPDIR = 75  # of the 107 bytes that the address of a socket has
# transformers imports torch where it is, which takes seconds, for models alone.
NO_TORCH = {'USE_TORCH': '0', 'USE_TF': '0', 'USE_FLAX': '0', 'TRANSFORMERS_VERBOSITY': 'error'}

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(PRELOADED)
# In a worker: the function, what it is told once, and its way to report.
_work: tuple[Callable[..., Any], Any, Callable[[Any], None]]


def parallel(
    function: Callable[[Any, Any, Callable[[Any], None]], Any],
    job: Any,
    items: Sequence[Any],
    report: Callable[[Any], Any] = lambda _: None,
) -> Iterator[Any]:
    """Yield `function(job, item, report)` for every item, in the order in which they finish.

    Args:
        function: a function of a module.
        job: what all items have in common; sent to a worker once.
        items: what differs.
        report: is called here with what the function passes to its own `report`.

    Raises:
        CommandError: if a worker dies; and whatever `function` raises.
    """
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        raise CommandError(
            f'TMPDIR is {tempfile.gettempdir()}, which is too long for the sockets of worker processes: give a folder '
            f'of at most {LONGEST_TMPDIR} bytes'
        )
    cores = len(os.sched_getaffinity(0))
    count = min(cores, len(items))
    queue = _context.SimpleQueue()
    # A worker is born with the environment that the server was started with. If there are fewer items than cores,
    # tokenizers' own threads use the others.
    more = NO_TORCH | {'TOKENIZERS_PARALLELISM': str(count < cores).lower(), 'RAYON_NUM_THREADS': str(cores // count)}
    pool = ProcessPoolExecutor(count, _context, _start, (function, job, queue, os.environ | more))
    waiting: set[Any] = set()
    try:
        # An interrupt reaches every process of a terminal. The parent alone answers it, and not while others begin.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            waiting = {pool.submit(_run, item) for item in items}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while waiting:
            done, waiting = wait(waiting, TICK_SECONDS, FIRST_COMPLETED)
            while not queue.empty():
                report(queue.get())
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise CommandError(
            'a worker died, perhaps killed for want of memory; the same command goes on from here'
        ) from error
    finally:
        if waiting:  # after an interrupt or a failure: others may be in the midst of a part
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(cancel_futures=True)


def in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run one function, which may use transformers' tokenizers, in a worker and return what it returns."""
    return next(parallel(_call, function, [arguments]))


def _call(function: Callable[..., Any], arguments: tuple, report: Callable[[Any], None]) -> Any:
    return function(*arguments)


def _start(function: Callable[..., Any], job: Any, queue: Any, environment: dict[str, str]) -> None:
    global _work
    os.environ.update(environment)
    _work = function, job, queue.put
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _run(item: Any) -> Any:
    function, job, report = _work
    return function(job, item, report)
