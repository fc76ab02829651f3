"""Worker processes, with the packages they need loaded once for all of them.

Workers are forked from a server process that has imported these packages: their memory is shared, a worker
starts at once, and the parent is never forked.
"""

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.storage import explained

PRELOADED = [
    *('numpy', 'pyarrow.parquet', 'tokenizers', 'tqdm', 'typer', 's3fs'),
    *('PIL.JpegImagePlugin', 'brotli', 'requests', 'snappy', 'xxhash', 'zstd'),  # streaming's
]
TICK_SECONDS = 0.2
# transformers imports torch where it is, which takes seconds, for models alone.
NO_TORCH = {'USE_TORCH': '0', 'USE_TF': '0', 'USE_FLAX': '0', 'TRANSFORMERS_VERBOSITY': 'error'}

_context = multiprocessing.get_context('forkserver')
# In a worker: the function, what it is told once, its way to report, and whether to give up.
_work: tuple[Callable[..., Any], Any, Any, Any]


def preload() -> None:
    """Begin to load the packages, so that they are there when the first worker is wanted.

    Not transformers, which takes seconds and much memory, and which only one short-lived worker needs.
    """
    _context.set_forkserver_preload(PRELOADED)
    with explained('start', f'worker processes, with TMPDIR {tempfile.gettempdir()}'):
        forkserver.ensure_running()


def parallel(
    function: Callable[[Any, Any, Callable[[Any], None]], Any],
    job: Any,
    items: Iterable[Any],
    report: Callable[[Any], Any] = lambda _: None,
    scratch: str | None = None,
) -> Iterator[Any]:
    """Yield `function(job, item, report)` for every item, in the order in which they finish.

    Args:
        function: a function of a module.
        job: what all items have in common; sent to a worker once.
        items: what differs.
        report: is called here with what the function passes to its own `report`.
        scratch: a folder that goes when this process is killed.

    Raises:
        CommandError: if a worker dies; and whatever `function` raises.
    """
    items = list(items)
    # Those that this process may use, where the system can tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    count = max(1, min(cores, len(items)))
    queue, stop = _context.SimpleQueue(), _context.Event()
    preload()
    pool = ProcessPoolExecutor(
        count, _context, _start, (function, job, queue, stop, cores // count, dict(os.environ), scratch)
    )
    try:
        waiting = {pool.submit(_run, item) for item in items}
        while waiting:
            done, waiting = wait(waiting, TICK_SECONDS, FIRST_COMPLETED)
            while not queue.empty():
                report(queue.get())
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise CommandError(
            'a worker died, perhaps killed for want of memory; the same command goes on from here'
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run one function, which may use transformers' tokenizers, in a worker and return what it returns."""
    return next(parallel(_call, function, [arguments]))


def _call(function: Callable[..., Any], arguments: tuple, report: Callable[[Any], None]) -> Any:
    os.environ.update(NO_TORCH)
    return function(*arguments)


class _Stopped(Exception):
    """Another item failed, or the user interrupted."""


def _start(
    function: Callable[..., Any],
    job: Any,
    queue: Any,
    stop: Any,
    threads: int,
    environment: dict[str, str],
    scratch: str | None,
) -> None:
    global _work
    # A worker is born with the environment that the server was started with.
    os.environ.update(environment)
    _work = function, job, queue, stop
    # Where there are fewer items than cores, tokenizers' own threads use the others.
    os.environ['TOKENIZERS_PARALLELISM'] = 'true' if threads > 1 else 'false'
    os.environ['RAYON_NUM_THREADS'] = str(threads)
    # An interrupt reaches every process of a terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_end_with, args=(parent, scratch), daemon=True).start()


def _end_with(parent: Any, scratch: str | None) -> None:
    parent.join()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _run(item: Any) -> Any:
    function, job, queue, stop = _work

    def report(value: Any) -> None:
        if stop.is_set():
            raise _Stopped
        queue.put(value)

    return function(job, item, report)
