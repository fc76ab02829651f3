"""Where tools/prepare_data.py writes: nothing of anyone's is touched, nothing is lost, on disk as on S3."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter

# First, since it makes the tools importable.
from preparing import (  # isort: skip
    L, Bucket, Folder, define_rows, make_text, prepare, prepare_until_killed, read_rows, refuse, succeed, write_jsonl,
)  # fmt: skip
from composer_tst.data_prep import parts, shards, tokenizer
from composer_tst.data_prep.lock import locked

pytest_plugins = ['preparing_fixtures']

TOOL = str(Path(__file__).parents[1] / 'tools' / 'prepare_data.py')
TEXTS = [make_text(number) for number in range(40)]


@pytest.fixture
def common(tmp_path: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The arguments but for the output, for an input of several parts."""
    monkeypatch.setattr(parts, 'PART_BYTES', 2500)
    return [
        write_jsonl(tmp_path / 'a.jsonl', TEXTS), '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=1',
    ]  # fmt: skip


def test_what_is_there_before_is_a_reason_to_refuse(place: Folder | Bucket, common: list[object]):
    place.put('out/mine.txt', b'mine')
    before = place.files()
    sentence = refuse(*common, '--output', f'{place.root}/out')
    assert 'out holds mine.txt and was not begun by this command: name an empty or a new folder' in sentence
    assert place.files() == before
    # Not even a lock is left there.
    assert isinstance(place, Bucket) or os.listdir(f'{place.root}/out') == ['mine.txt']


@pytest.mark.parametrize('name', ['out[1]', 'o?t', 'a#b%20'])
def test_whatever_is_beside_or_put_there_meanwhile_stays(place: Folder | Bucket, common: list[object], name: str):
    foreign = {
        'out1/data.txt': b'beside', 'oxt/data.txt': b'beside', 'outer': b'beside',
        f'.{name}.partial/data.txt': b'hidden beside', f'{name}/.mine': b'hidden inside',
    }  # fmt: skip
    if isinstance(place, Bucket):
        foreign[name] = b'an object of the name'
    for path, data in foreign.items():
        place.put(path, data)
    # A bad document ends it half way; then others put files below.
    lines = Path(str(common[0]))
    lines.write_bytes(lines.read_bytes() + b'oops\n')
    assert 'malformed JSON' in refuse(*common, '--output', f'{place.root}/{name}')
    foreign |= {
        f'{name}/train/notes.txt': b'meanwhile',
        f'{name}/.records/notes.txt': b'meanwhile',
        f'{name}/x/y': b'z',
    }
    for path, data in foreign.items():
        place.put(path, data)
    succeed(*common, '--output', f'{place.root}/{name}', '--skip-bad', '--verify')
    made = place.files()
    assert {path: made[path] for path in foreign} == foreign
    assert f'{name}/train/index.json' in made


def test_a_bucket_itself_may_be_the_output_and_stays(place: Folder | Bucket, common: list[object], tmp_path: Path):
    lines = Path(str(common[0]))
    whole = lines.read_bytes()
    lines.write_bytes(whole + b'oops\n')
    refuse(*common, '--output', place.root)
    place.put('meanwhile', b'mine')
    # Once this began anew, by deleting all that was there.
    lines.write_bytes(whole)
    assert 'begun with another listing of INPUT' in refuse(*common, '--output', place.root)
    assert place.files()['meanwhile'] == b'mine'
    lines.write_bytes(whole + b'oops\n')
    assert 'begun with another listing' in refuse(*common, '--output', place.root), 'by its time'


def test_a_file_that_is_where_a_shard_goes_stays(place: Folder | Bucket, common: list[object]):
    lines = Path(str(common[0]))
    lines.write_bytes(lines.read_bytes() + b'oops\n')
    refuse(*common, '--output', f'{place.root}/out')
    name = sorted(name for name in place.files() if name.endswith('.mds'))[-1]
    number = int(name.split('.')[1])
    place.put(f'out/.records/part.{number:06}.json', b'')
    place.put(name, b'mine')
    sentence = refuse(*common, '--output', f'{place.root}/out', '--skip-bad')
    assert f'{name} is there already and is not what this run writes: move it away' in sentence
    assert place.files()[name] == b'mine'
    for other in ('out/train/index.json', 'out/stats.json'):
        place.delete(name) if name in place.files() else None
        place.put(other, b'mine')
        assert f'{other} is there already' in refuse(*common, '--output', f'{place.root}/out', '--skip-bad')
        assert place.files()[other] == b'mine'
        place.delete(other)
    succeed(*common, '--output', f'{place.root}/out', '--skip-bad', '--verify')


@pytest.mark.parametrize('compression', [[], ['--compression', 'zstd', '--hashes', 'sha1,xxh64']])
def test_what_is_gone_or_damaged_is_found_and_made_anew(
    place: Folder | Bucket, common: list[object], compression: list[str]
):
    arguments = [*common, *compression, '--output', f'{place.root}/out']
    succeed(*arguments)
    whole = place.files()
    names = sorted(name for name in whole if '.mds' in name)
    assert len(names) > 3
    # Finished already.
    succeed(*arguments, '--verify')
    assert place.files() == whole
    # A shard, an index, the summary, or a record that is gone.
    for name in (names[1], 'out/train/index.json', 'out/stats.json', 'out/.records/part.000002.json'):
        place.delete(name)
    succeed(*arguments)
    assert place.files() == whole
    # Two of equal size exchanged, or one id altered; and too short.
    altered = bytearray(whole[names[0]])
    altered[-4] ^= 1
    twins = [
        (one, two) for one in names for two in names
        if one < two and len(whole[one]) == len(whole[two]) and whole[one] != whole[two]
    ]  # fmt: skip
    cases = [{names[0]: bytes(altered)}]
    if not compression:
        assert twins
        cases.append({twins[0][0]: whole[twins[0][1]], twins[0][1]: whole[twins[0][0]]})
    for case in cases:
        for name, data in case.items():
            place.put(name, data)
        assert 'does not hold what was written' in refuse(*arguments, '--verify')
        for name, data in case.items():
            assert place.files()[name] == data
            place.delete(name)
        succeed(*arguments, '--verify')
        assert place.files() == whole


def test_damaged_records_count_as_absent(place: Folder | Bucket, common: list[object]):
    arguments = [*common, '--output', f'{place.root}/out']
    succeed(*arguments)
    whole = place.files()
    records = [name for name in whole if '.records/part' in name]
    damages = [b'', b'{', b'null', b'[1]', b'{"sha256": "", "record": {}}', whole[records[1]][:-1]]
    for name, damage in zip(records, damages, strict=False):
        place.put(name, damage)
    succeed(*arguments, '--verify')
    assert place.files() == whole


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (['--seq-len', L + 1], '--seq-len'),
        (['--split', 'train=0.5,val=0.5'], '--split'),
        (['--text-key', 'body'], '--text-key'),
        (['--compression', 'gz'], '--compression'),
        (['--hashes', 'md5'], '--hashes'),
        (['other end of text'], '--tokenizer'),
        (['another input'], 'listing of INPUT'),
        (['another plan'], 'plan of parts'),
    ],
)
def test_other_inputs_or_settings_are_refused_by_name(
    place: Folder | Bucket, common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: Any,
    change: list, named: str,
):  # fmt: skip
    succeed(*common, '--output', f'{place.root}/out')
    before = place.files()
    if change == ['other end of text']:
        monkeypatch.setattr(tokenizer, 'END_OF_TEXT', '<|padding|>')
        monkeypatch.setattr(tokenizer, 'PADDING', '<|endoftext|>')
        tokenizer.save_tokenizer(bpe, str(tmp_path / 'other'))
        change = ['--tokenizer', tmp_path / 'other']
    elif change == ['another input']:
        change = [write_jsonl(tmp_path / 'b.jsonl', TEXTS)]
    elif change == ['another plan']:
        monkeypatch.setattr(parts, 'PART_BYTES', 1500)
        change = []
    sentence = refuse(*common, *change, '--output', f'{place.root}/out')
    assert f'out was begun with another {named}' in sentence
    assert 'name another output' in sentence
    assert place.files() == before


def test_skip_bad_goes_on_from_what_is_finished(place: Folder | Bucket, common: list[object]):
    lines = Path(str(common[0]))
    lines.write_bytes(lines.read_bytes() + b'oops\n')
    arguments = [*common, '--output', f'{place.root}/out']
    assert f'{lines}, line 41: malformed JSON (with --skip-bad, the same command goes on' in refuse(*arguments)
    finished = {name: data for name, data in place.files().items() if '.records/part' in name}
    assert finished
    succeed(*arguments, '--skip-bad')
    assert finished.items() <= place.files().items()
    assert place.files()['out/bad_documents.txt'].decode() == f'{lines}, line 41: malformed JSON\n'
    # Without it, what was skipped is a fault again.
    assert 'line 41: malformed JSON' in refuse(*arguments)


def test_a_killed_run_is_taken_up(place: Folder | Bucket, common: list[object], tokenizer_dir: str, tmp_path: Path):
    arguments = [*common, '--output', f'{place.root}/out']
    prepare_until_killed(*arguments)
    left = place.files()
    assert not any('index.json' in name for name in left)
    records = {name: data for name, data in left.items() if '.records/part' in name}
    assert len(records) >= 3
    succeed(*arguments, '--verify')
    assert records.items() <= place.files().items()
    succeed(*common, '--output', f'{place.root}/whole')
    assert place.files('out') == place.files('whole')


def test_a_second_run_is_refused_while_the_first_lives(place: Folder | Bucket, common: list[object]):
    with locked(f'{place.root}/out'):
        before = place.files()
        sentence = refuse(*common, '--output', f'{place.root}/out')
        assert f'another run is writing to {place.root}/out (process {os.getpid()} on ' in sentence
        assert place.files() == before
    succeed(*common, '--output', f'{place.root}/out')
    if isinstance(place, Bucket):
        keys = place.client.list_objects_v2(Bucket=place.name)['Contents']
        assert not [item for item in keys if item['Key'].endswith('lock')]


def test_a_run_whose_lock_was_taken_over_makes_no_index(common: list[object], tmp_path: Path, place: Folder | Bucket):
    if isinstance(place, Folder):
        pytest.skip('the system holds the lock')
    from composer_tst.data_prep import pipeline

    def stolen(*arguments: Any) -> Any:
        place.put('out/.records/lock', b'another')
        time.sleep(0.5)
        return convert(*arguments)

    convert = pipeline.convert
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, 'convert', stolen)
        assert 'another run took over' in refuse(*common, '--output', f'{place.root}/out')
    assert not any('index.json' in name for name in place.files())


# On disk


def test_a_lock_lives_as_long_as_any_worker_of_the_run(common: list[object], tmp_path: Path):
    """A run is killed; until its workers are gone too, nobody else may write."""
    script = f"""
import multiprocessing, os, sys, time
sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.dirname(shards.__file__)))!r})
from composer_tst.data_prep.lock import DiskLock
def work(lock, path):
    open(path, 'w').close()
    time.sleep(2)
if __name__ == '__main__':
    lock = DiskLock({str(tmp_path / 'out')!r})
    process = multiprocessing.get_context('forkserver').Process(target=work, args=(lock, {str(tmp_path / 'up')!r}))
    process.start()
    while not os.path.exists({str(tmp_path / 'up')!r}):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
    (tmp_path / 'run.py').write_text(script)
    subprocess.run([sys.executable, tmp_path / 'run.py'], check=False)
    with open(tmp_path / 'out' / '.records' / 'lock') as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX)


def test_an_output_may_be_a_link_or_an_empty_mount_point(common: list[object], tmp_path: Path):
    (tmp_path / 'disk' / 'lost+found').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('disk')
    succeed(*common, '--output', tmp_path / 'link', '--verify')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'disk' / 'train' / 'index.json').exists()
    assert (tmp_path / 'disk' / 'lost+found').exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.jsonl', 'disk', 'link']


def test_a_link_in_the_place_of_a_shard_is_not_followed(common: list[object], tmp_path: Path):
    (tmp_path / 'mine').write_bytes(b'')
    lines = Path(str(common[0]))
    lines.write_bytes(lines.read_bytes() + b'oops\n')
    refuse(*common, '--output', tmp_path / 'out')
    for name in (tmp_path / 'out' / 'train').iterdir():
        name.unlink()
        name.symlink_to(tmp_path / 'mine')
    assert 'cannot write' in refuse(*common, '--output', tmp_path / 'out', '--skip-bad')
    assert (tmp_path / 'mine').read_bytes() == b''


@pytest.mark.parametrize('left', [lambda data: data[:100], lambda data: data[:100] + bytes(50), lambda data: b''])
def test_what_a_kill_or_a_power_loss_left_of_a_shard_is_completed(common: list[object], tmp_path: Path, left: Any):
    out = tmp_path / 'out'
    succeed(*common, '--output', out)
    shard = sorted((out / 'train').glob('*.mds'))[0]
    data = shard.read_bytes()
    (out / '.records' / 'part.000000.json').unlink()
    shard.write_bytes(left(data))
    succeed(*common, '--output', out, '--verify')
    assert shard.read_bytes() == data


def test_modes_follow_the_umask(common: list[object], tmp_path: Path):
    command = [sys.executable, TOOL, *map(str, common), '--output', str(tmp_path / 'out')]
    subprocess.run(command, check=True, capture_output=True, umask=0o027)
    for path in (tmp_path / 'out').rglob('*'):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_kill_leaves_nothing_in_the_temporary_folder(
    common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'temporary'))
    prepare_until_killed(*common, '--output', tmp_path / 'out')
    assert not [path for path in (tmp_path / 'temporary').rglob('*') if path.is_file()]


def test_two_commands_at_once_make_one_data_set(common: list[object], tmp_path: Path, tokenizer_dir: str):
    command = [sys.executable, TOOL, *map(str, common), '--output', str(tmp_path / 'out')]
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(subprocess.run(command, capture_output=True, text=True)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(result.returncode for result in results)
    assert codes in ([0, 0], [0, 1]), results
    assert all('another run is writing' in result.stderr for result in results if result.returncode)
    assert read_rows(tmp_path / 'out' / 'train')


# The format


@pytest.mark.parametrize('length', [1, 3, 255, 256, 70_000])
def test_shards_are_the_bytes_of_the_writer_of_streaming(tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch):
    import numpy as np

    rows = np.random.default_rng(0).integers(0, 1 << 30, (7, length), dtype=np.int32)
    limit = 3 * (4 * length + 20) + 300
    monkeypatch.setattr(shards, 'SHARD_BYTES', limit)
    options = shards.ShardOptions('zstd:3', ['sha1', 'xxh64'])
    with MDSWriter(
        out=str(tmp_path), columns={'tokens': 'ndarray:int32'}, compression='zstd:3', hashes=['sha1', 'xxh64'],
        size_limit=limit,
    ) as writer:  # fmt: skip
        for row in rows:
            writer.write({'tokens': row})
    theirs = json.loads((tmp_path / 'index.json').read_text())['shards']
    full = options.rows_in_shard(length)
    for at, entry in enumerate(theirs):
        some = rows[at * full : (at + 1) * full]
        data, ours = options.pack(options.encode(some), f'shard.{at:05}.mds')
        assert {'samples': len(some), **ours} == entry
        assert data == (tmp_path / entry['zip_data']['basename']).read_bytes()
        assert np.array_equal(options.decode(options.unpack(data), len(some), length), some)
    assert sum(entry['samples'] for entry in theirs) == len(rows)


@pytest.mark.parametrize('compression', ['gz', 'zstd:3', 'bz2', 'br:1', 'snappy'])
def test_a_shard_made_again_is_the_same(compression: str, monkeypatch: pytest.MonkeyPatch):
    """Of any time of day, which gzip writes down."""
    import numpy as np

    options = shards.ShardOptions(compression, ['sha1'])
    rows = np.arange(4 * L, dtype=np.int32).reshape(4, L)
    first = options.pack(options.encode(rows), 'shard')
    monkeypatch.setattr(time, 'time', lambda: 1e9)
    assert options.pack(options.encode(rows), 'shard') == first
    assert np.array_equal(options.decode(options.unpack(first[0]), 4, L), rows)


def test_what_was_made_before_is_refused_and_kept(common: list[object], tmp_path: Path):
    """A data set of the older format, which training reads as it does the new ones."""
    with MDSWriter(out=str(tmp_path / 'out' / 'train'), columns={'tokens': 'ndarray:int32'}) as writer:
        import numpy as np

        writer.write({'tokens': np.arange(L, dtype=np.int32)})
    assert 'out holds train and was not begun by this command' in refuse(*common, '--output', tmp_path / 'out')
    assert read_rows(tmp_path / 'out' / 'train') == [list(range(L))]


def test_rows_of_all_parts_are_those_of_the_definition(common: list[object], tokenizer_dir: str, tmp_path: Path):
    succeed(*common, '--output', tmp_path / 'out')
    stats = json.loads((tmp_path / 'out' / 'stats.json').read_text())['splits']['train']
    whole = define_rows(TEXTS, tokenizer_dir, 1)
    assert stats['tokens'] + stats['dropped_tokens'] == len(whole)
    assert stats['documents'] == len(TEXTS)
    ends = sum(row.count(0) for row in read_rows(tmp_path / 'out' / 'train'))
    assert stats['cut_documents'] == len(TEXTS) - ends
    assert prepare(*common, '--output', tmp_path / 'out').exit_code == 0
