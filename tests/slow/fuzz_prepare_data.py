"""Random attacks on composer-tst prepare-data, each checked against a plain reading of what it promises.

    python tests/slow/fuzz_prepare_data.py [--seed 17] [--minutes 15]

Hypothesis draws inputs (formats, encodings, names, links), an output on disk or in a bucket, a tokenizer, splits
and sizes, and what befalls the run: kills at any write, a full disk, a faulty store, a second run at once, changed
inputs and settings, files of others before and meanwhile, shards and records lost or altered. Every run but Spark's is
a forked process, so that a kill is one. After it all: every document is in one split, token for token, or was cut at
the end of a part, or is listed as bad; counts add up; what is not of the run is as it was; and another run, of either
engine, makes the same rows in the same shards.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
from common.fuzz_inputs import TOKENIZERS, Corpus, corpora, make_tokenizers
from common.preparing import Bucket, Folder, of_split, prepare, read_shard, stored
from common.s3 import Faulty, serve
from fsspec.asyn import reset_lock
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from composer_tst.cli.prepare_data import (
    command,
    convert,
    documents,
    output,
    parts,
    report,
    s3,
    shards,
    streams,
    tokenizer,
)

SPLITS = ['train=1', 'train=0.8,val=0.2', 'val=0.3,train=0.6,a-b=0.1']
NAMES = ['out', 'out[1]', 'o?t', 'a*b', 'deep/er/out', 'x#y%20z', 'é']
# What others may have there, beside the output and below it.
FOREIGN = ['beside.txt', 'out1/x', '.{}.partial/x', '{}/.hidden', '{}/train/notes.txt', '{}/.records/notes', '{}.old/x']
SIZES = {
    (parts, 'PART_BYTES'): [150, 600, 2000, 1 << 20],
    (convert, 'BATCH_CHARS'): [1, 300, 1 << 20],
    (tokenizer, 'PIECE_CHARS'): [600, 1 << 18],
    (streams, 'BLOCK_BYTES'): [5, 64, 1 << 20],
    (documents, 'BATCH_ROWS'): [1, 64],
    (s3, 'BLOCK_BYTES'): [700, 1 << 20],
    (shards, 'SHARD_BYTES'): [600, 1200, 1 << 24],
}
ACTIONS = [
    'kill',
    'kill',
    'kill',
    'full disk',
    'faulty store',
    'twice',
    'input',
    'setting',
    'foreign',
    'in the way',
    'lose',
    'alter',
    'bad record',
]


def shards_of(index: str) -> list[dict[str, Any]]:
    """What the index of a part says of its shards; of no rows it is empty."""
    return json.loads(index)['shards'] if index else []


class Killed(Exception):
    """What a killed run comes to."""


def serial(function: Any, job: Any, items: Any, report: Any = lambda _: None) -> Any:
    """All items in this process, which a kill then ends."""
    for item in items:
        yield function(job, item, report)


def kill_at(number: int, share: float) -> None:
    """End this process at a write: before it, half way, or when it is done."""
    left = number

    def dies() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def move(source: str, path: str) -> None:
        if dies():
            if share == 1:
                moved(source, path)
            elif share:
                os.truncate(source, int(os.path.getsize(source) * share))
            os._exit(9)
        moved(source, path)

    def write(path: str, data: bytes) -> None:
        if dies():
            if share == 1:
                written(path, data)
            os._exit(9)
        written(path, data)

    def finish(self: Any) -> Any:
        if dies():
            if share and self.writer:
                finished(self)
            os._exit(9)
        return finished(self)

    moved, written, finished = output._move, s3.write, shards.RowWriter.finish
    output._move, s3.write, shards.RowWriter.finish = move, write, finish  # pyright: ignore


def fill_disk(size: int) -> None:
    """Let the kernel refuse what is written of a file beyond some bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def start(arguments: list[str], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run the command in a forked process, after something else; give its id and the file that tells how it ended."""
    answer = tempfile.mktemp()
    process = os.fork()
    if process == 0:
        try:
            reset_lock()  # the thread of s3fs did not come along
            before()
            try:
                result = prepare(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            fault = '' if isinstance(result.exception, SystemExit | None) else f'Traceback {result.exception!r}'
            Path(answer).write_bytes(pickle.dumps((result.exit_code, result.output + fault)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return process, answer


def end(process: int, answer: str) -> tuple[int, str]:
    """Wait for a run; give its exit code, -9 if it was killed, and its output."""
    _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) == 9:
        return -9, ''
    code, output = pickle.loads(Path(answer).read_bytes())
    os.unlink(answer)
    assert 'Traceback' not in output, output
    return code, output


def launch(arguments: list[str], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    return end(*start(arguments, before))


class Attack:
    """One example: a corpus, a place, a command, and what others have there."""

    def __init__(self, data: Any, work: Path, client: Any):
        draw = data.draw
        self.draw = draw
        self.corpus: Corpus = draw(corpora(), 'corpus')
        self.inputs = self._place(work / 'in', client, draw(st.sampled_from(['disk', 'disk', 's3']), 'inputs on'))
        self.place = self._place(work / 'place', client, draw(st.sampled_from(['disk', 'disk', 's3']), 'output on'))
        self.name = draw(st.sampled_from(NAMES), 'output')
        self.tokenizer = draw(st.sampled_from(sorted(TOKENIZERS)), 'tokenizer')
        self.seq_len = draw(st.integers(1, 12), 'seq_len')
        self.splits = draw(st.sampled_from(SPLITS), 'splits')
        self.written = self.corpus.write(self.inputs)
        self.expected = self.corpus.expect(self.inputs)
        packing = draw(st.sampled_from([[], ['--compression', 'zstd'], ['--hashes', 'sha1', '--compression', 'gz']]))
        self.common = [
            *self.corpus.addresses(self.inputs), '--seq-len', str(self.seq_len), '--tokenizer',
            TOKENIZERS[self.tokenizer].folder, '--split', self.splits, *packing,
        ]  # fmt: skip
        self.command = [*self.common, '--output', f'{self.place.root}/{self.name}']
        self.foreign: dict[str, bytes] = {}
        self.uses_s3 = isinstance(self.inputs, Bucket) or isinstance(self.place, Bucket)

    @staticmethod
    def _place(path: Path, client: Any, kind: str) -> Folder | Bucket:
        return Folder(path) if kind == 'disk' else Bucket(client, f'fuzz-{uuid.uuid4().hex}')

    def own(self) -> dict[str, bytes]:
        """What the run has written so far."""
        return {name: data for name, data in self.place.files().items() if name not in self.foreign}

    def check_foreign(self) -> None:
        files = self.place.files()
        for name, data in self.foreign.items():
            assert files.get(name) == data, f'{name} of others was changed'

    def befall(self, action: str) -> None:
        """Let something happen, and see that it is answered as it should be."""
        draw = self.draw
        skipping = [*self.command, '--skip-bad']
        own = self.own()
        shard_names = sorted(name for name in own if '.mds' in name and '.records' not in name)
        record_names = sorted(name for name in own if '/.records/part' in name and name.endswith('.json'))
        # Not one that was killed while it wrote its first record.
        has_begun = f'{self.name}/.records/begun.json' in own
        # One that was only begun is taken up by any command.
        has_more = has_begun and bool(shard_names)
        if action == 'kill':
            number, share = draw(st.integers(0, 25)), draw(st.sampled_from([0, 0.3, 0.9, 1]))
            code, output = launch(skipping, lambda: kill_at(number, share))
            assert code in (-9, 0) or self.is_empty(code, output), output
        elif action == 'full disk':
            size = draw(st.integers(0, 3000))
            code, output = launch(skipping, lambda: fill_disk(size))
            assert code == 0 or 'File too large' in output or self.is_empty(code, output), output
        elif action == 'faulty store' and self.uses_s3:
            fault = draw(st.sampled_from(['cut', 'reset', '503']))
            server = Faulty(os.environ['S3_ENDPOINT_URL'], fault, draw(st.integers(1, 12)), 'all')
            with mock.patch.dict(os.environ, S3_ENDPOINT_URL=server.url):
                code, output = launch(skipping)
            assert code == 0 or self.is_empty(code, output), output
            server.server.shutdown()
        elif action == 'twice':
            ends = [end(*each) for each in [start(skipping), start(skipping)]]
            for code, output in ends:
                refused = 'another run' in output and code == 1 and isinstance(self.place, Folder)
                assert code == 0 or refused or self.is_empty(code, output), output
        elif action == 'foreign':
            name = draw(st.sampled_from(FOREIGN)).format(self.name)
            self.place.put(name, b'of others')
            if not has_begun and name == f'{self.name}/train/notes.txt':
                code, output = launch(skipping)
                assert code == 1, output
                assert 'was not begun by this command: name an empty or a new folder' in output, output
                assert self.place.files()[name] == b'of others'
                self.place.delete(name)
                if isinstance(self.place, Folder):
                    shutil.rmtree(f'{self.place.root}/{self.name}/train')
            else:
                self.foreign[name] = b'of others'
        elif action == 'input' and has_more:
            with self.corpus.changed(self.inputs):
                code, output = launch(skipping)
                assert code == 1, output
                assert 'was begun with another listing of INPUT' in output, output
            self.corpus.write_again(self.inputs, self.written)
            assert self.own() == own, 'a refused run wrote'
        elif action == 'setting' and has_more:
            code, output = launch([*skipping, '--seq-len', str(self.seq_len + 1)])
            assert code == 1, output
            assert 'was begun with another --seq-len' in output, output
            assert self.own() == own, 'a refused run wrote'
        elif action == 'in the way' and has_begun:
            places = ['train/00000/shard.00000.mds', 'stats.json', 'train/index.json']
            name = f'{self.name}/{draw(st.sampled_from(places))}'
            if name not in own:
                self.place.put(name, b'of others')
                code, output = launch(skipping)
                assert self.place.files()[name] == b'of others'
                assert code == 0 or f'{name} is there already' in output or self.is_empty(code, output), output
                self.place.delete(name)
        elif action == 'lose' and (written := sorted(name for name in own if 'begun' not in name)):
            self.place.delete(draw(st.sampled_from(written)))
        elif action == 'bad record' and record_names:
            self.place.put(draw(st.sampled_from(record_names)), draw(st.sampled_from([b'', b'{', b'null'])))
        elif action == 'alter' and shard_names and record_names:
            name = draw(st.sampled_from(shard_names))
            number = int(name.split('/')[-2])
            if f'{self.name}/.records/part.{number:05}.json' in record_names:
                altered = bytearray(own[name])
                altered[draw(st.integers(0, len(altered) - 1))] ^= 1
                self.place.put(name, bytes(altered))
                code, output = launch([*skipping, '--verify'])
                assert code == 1, 'an altered shard was not seen'
                assert name in output, output
                self.place.delete(name)

    def is_empty(self, code: int, output: str) -> bool:
        """Whether the run ended since there is no row to write, which `check` looks at."""
        return code == 1 and ('fills a row' in output or self.is_looked_at(output))

    def is_looked_at(self, output: str) -> bool:
        """Whether it ended since the first documents have no text, so that nothing was begun."""
        return 'name the one that holds the text with --text-key' in output or 'make lines of it, as with' in output

    def finish(self) -> None:
        bad = self.expected.bad
        code, output = launch(self.command)
        if bad:
            assert code == 1, output
            assert any(place in output for places in bad for place in places), (output, bad)
            code, output = launch([*self.command, '--skip-bad'])
        if self.is_empty(code, output):
            if not self.is_looked_at(output):
                self.check_records()
            return
        assert code == 0, output
        code, output = launch([*self.command, '--skip-bad', '--verify'])
        assert code == 0, output
        self.check_records()
        self.check_index()

    def check_records(self) -> None:
        """Every document: in one split, token for token, or cut at the end of a part, or bad."""
        own = self.place.files(self.name)
        loaded = TOKENIZERS[self.tokenizer]
        names = [item.split('=')[0] for item in self.splits.split(',')]
        splits = tuple((item.split('=')[0], float(item.split('=')[1])) for item in self.splits.split(','))
        streams, docs = {}, {}
        for split in names:
            texts = of_split(self.expected.texts, split, splits)
            docs[split] = len(texts)
            streams[split] = [token for text in texts for token in [*loaded.define(text), loaded.eos]]
        positions = dict.fromkeys(names, 0)
        counted = dict.fromkeys(names, 0)
        bad = []
        for name in sorted(name for name in own if name.startswith('.records/part.') and name.endswith('.json')):
            record = json.loads(own[name])
            number = record['part']
            bad += record['bad']
            for split in names:
                read: list[int] = []
                made = record['splits'][split]
                count = made['counts']
                for file, (size, digest) in made['files'].items():
                    data = own[f'{split}/{number:05}/{file}']
                    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
                for entry in shards_of(made['index']):
                    rows = read_shard(own[f'{split}/{number:05}/{stored(entry)}'], entry)
                    assert rows.shape == (entry['samples'], self.seq_len)
                    read += rows.ravel().tolist()
                assert len(read) == count['rows'] * self.seq_len
                at = positions[split]
                assert read == streams[split][at : at + len(read)], (name, split)
                assert 0 <= count['dropped_tokens'] < self.seq_len
                positions[split] = at + len(read) + count['dropped_tokens']
                if positions[split] > at:
                    assert streams[split][positions[split] - 1] == loaded.eos, 'a part ends within a document'
                assert count['documents'] == streams[split][at : positions[split]].count(loaded.eos)
                counted[split] += count['documents']
        assert positions == {split: len(stream) for split, stream in streams.items()}
        assert counted == docs
        assert len(bad) == len(self.expected.bad), (bad, self.expected.bad)
        for places in self.expected.bad:
            assert any(place in sentence for sentence in bad for place in places), (places, bad)

    def check_index(self) -> None:
        """What training reads names the shards of all records, in order."""
        own = self.place.files(self.name)
        stats = json.loads(own['stats.json'])
        assert stats['bad_documents'] == len(self.expected.bad)
        for split, counted in stats['splits'].items():
            entries = []
            for name in sorted(name for name in own if name.startswith('.records/part.')):
                record = json.loads(own[name])
                for entry in shards_of(record['splits'][split]['index']):
                    for kind in ('raw_data', 'zip_data'):
                        if entry[kind]:
                            entry[kind]['basename'] = f'{record["part"]:05}/{entry[kind]["basename"]}'
                    entries.append(entry)
            assert counted['rows'] == sum(entry['samples'] for entry in entries)
            if entries:
                assert json.loads(own[f'{split}/index.json'])['shards'] == entries
            else:
                assert f'{split}/index.json' not in own

    def check_same(self, work: Path, engine: str) -> None:
        """Another run makes the same rows in the same shards."""
        other = Folder(work / 'other')
        command = [*self.common, '--skip-bad', '--output', f'{other.root}/again']
        if engine == 'spark':
            result = prepare(*command, '--engine', 'spark')
            code, output = result.exit_code, result.output
        else:
            code, output = launch(command)
        assert code == 0 or self.is_empty(code, output), output
        mine = self.place.files(self.name)
        theirs = other.files('again')
        others = [name.removeprefix(f'{self.name}/') for name in self.foreign]
        mine = {name: data for name, data in mine.items() if name not in others and '/scratch/' not in name}
        assert sorted(mine) == sorted(theirs)
        assert not [name for name in mine if mine[name] != theirs[name]]


@contextlib.contextmanager
def spark_session() -> Any:
    """One session for all examples."""
    with mock.patch.dict(os.environ, SPARK_LOCAL_IP='127.0.0.1'):
        os.environ['PYSPARK_SUBMIT_ARGS'] = (
            '--conf spark.ui.enabled=false --conf spark.ui.showConsoleProgress=false '
            '--driver-java-options -XX:TieredStopAtLevel=1 pyspark-shell'
        )
        from pyspark import SparkContext

        from composer_tst.cli.prepare_data import spark

        stop, added, add = spark.SparkSession.stop, [], SparkContext.addPyFile
        spark.SparkSession.stop = lambda session: None  # pyright: ignore
        SparkContext.addPyFile = lambda self, path: added or added.append(add(self, path))  # pyright: ignore
        try:
            yield
        finally:
            active = spark.SparkSession.getActiveSession()
            if active:
                stop(active)


def fuzz(number: int, minutes: float) -> int:
    """Attack for some minutes; return how many examples held."""
    deadline = time.monotonic() + 60 * minutes
    count, kinds = 0, dict.fromkeys([*ACTIONS, 'spark'], 0)
    command.parallel = serial  # pyright: ignore
    command.in_worker = report.in_worker = lambda function, *arguments: function(*arguments)
    output.GRACE, s3.FIRST_PAUSE = 1.0, 0.01
    with tempfile.TemporaryDirectory() as folder, serve() as (url, _), spark_session():
        client = boto3.client('s3', endpoint_url=url)
        make_tokenizers(Path(folder))
        for each in TOKENIZERS.values():
            # Here once, rather than in every process.
            tokenizer.load_tokenizer(each.folder)

        def attack(data: Any) -> None:
            nonlocal count
            work = Path(tempfile.mkdtemp(dir=folder))
            begun = time.monotonic()
            with contextlib.ExitStack() as stack:
                engine = data.draw(st.sampled_from(['local'] * 14 + ['spark']), 'the other engine')
                for (module, name), values in SIZES.items():
                    # Spark's workers have the sizes as they are.
                    value = (
                        values[-1]
                        if engine == 'spark' and name == 'SHARD_BYTES'
                        else data.draw(st.sampled_from(values), name)
                    )
                    stack.enter_context(mock.patch.object(module, name, value))
                each = Attack(data, work, client)
                for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=4), 'actions'):
                    each.befall(action)
                    each.check_foreign()
                    kinds[action] += 1
                each.finish()
                each.check_foreign()
                each.check_same(work, engine)
                kinds['spark'] += engine == 'spark'
            for place in (each.inputs, each.place):
                if isinstance(place, Bucket):
                    for key in place.files():
                        place.delete(key)
            shutil.rmtree(work)
            count += 1
            if os.environ.get('FUZZ_TIMES'):
                print(
                    f'{time.monotonic() - begun:.1f} s', each.inputs.root[:3], each.place.root[:3], engine, flush=True
                )

        while time.monotonic() < deadline:
            number += 1_000_003
            checked = settings(
                max_examples=10, deadline=None, database=None, print_blob=False,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], phases=[Phase.generate],
            )(given(st.data())(attack))  # fmt: skip
            seed(number)(checked)()
            print(f'{count} examples held: {kinds}', flush=True)
    return count


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=17)
    parser.add_argument('--minutes', type=float, default=15)
    chosen = parser.parse_args()
    print(f'{fuzz(chosen.seed, chosen.minutes)} examples held in {chosen.minutes:g} minutes at seed {chosen.seed}')
