# pyright: reportMissingImports=false
"""The Spark engine: the same parts as partitions of a data frame, written by streaming's own converter.

It makes the same rows as the local engine, in shards of other names and order: every task writes a folder
of shards, and the index of a split lists them all. Spark itself runs failed tasks again; a run that was
killed as a whole starts over.
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
from .parts import Part, PartCount, pack_part
from .storage import filesystem

SCHEMA = 'split string, tokens array<int>, record string'
# Rows are handed between Java and Python in batches of about this many bytes.
ARROW_BYTES = 16 << 20


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


def _session(job: Job) -> SparkSession:
    if 'PYSPARK_GATEWAY_PORT' not in os.environ:
        # Not under spark-submit, so workers run here, and in this Python.
        os.environ.setdefault('PYSPARK_PYTHON', sys.executable)
    try:
        builder: Any = SparkSession.builder
        session = builder.appName('prepare_data').getOrCreate()
    except PySparkException as error:
        raise PrepareError('--engine spark: Spark did not start, is a Java runtime installed?') from error
    rows = max(1, ARROW_BYTES // (4 * job.settings.seq_len))
    session.conf.set('spark.sql.execution.arrow.maxRecordsPerBatch', str(rows))
    return session


def _convert(session: SparkSession, parts: Sequence[Part], job: Job) -> tuple[dict[str, list], PartCount]:
    told = session.sparkContext.broadcast((parts, job))
    frame = (
        session.range(0, len(parts), 1, numPartitions=len(parts))
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
    for split in shards:
        if count.splits[split].rows == 0:
            continue
        out = job.output.at(split)
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
        shards[split] = json.loads(job.output.read(split, 'index.json'))['shards']
    return shards, count


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
