"""Where composer-tst prepare-data writes: nothing of anyone's is touched, nothing is lost, on disk as on S3."""

import errno
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from common.preparing import (
    COMMAND,
    TEXTS,
    Bucket,
    Folder,
    L,
    prepare_until_killed,
    refuse,
    save_tokenizer,
    succeed,
    write_jsonl,
)

from composer_tst.cli.prepare_data import command, output, parts, tokenizer

pytest_plugins = ['common.preparing_fixtures']


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
    record = sorted(name for name in place.files() if '.records/part.' in name)[-1]
    name = f'out/train/{int(record.split(".")[-2]):05}/shard.00000.mds'
    place.delete(record)
    place.put(name, b'mine')
    sentence = refuse(*common, '--output', f'{place.root}/out', '--skip-bad')
    assert f'{name} is there already and is not what this run writes: move it away' in sentence
    assert place.files()[name] == b'mine'
    place.delete(name)
    for other in ('out/train/index.json', 'out/stats.json'):
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
    part_index = names[0].rpartition('/')[0] + '/index.json'
    assert len(names) > 3
    # Finished already.
    succeed(*arguments, '--verify')
    assert place.files() == whole
    # A shard, an index, the summary, or a record that is gone.
    for name in (names[1], part_index, 'out/train/index.json', 'out/stats.json', 'out/.records/part.00002.json'):
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
    damages = [b'', b'{', b'null', b'[1]', b'{"part": 777}', whole[records[1]][:-1]]
    for name, damage in zip(records, damages, strict=False):
        place.put(name, damage)
    succeed(*arguments, '--verify')
    assert place.files() == whole


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (['--seq-len', L + 1], '--seq-len'),
        (['--split', 'train=0.5,val=0.5'], '--split'),
        (['--compression', 'gz'], '--compression'),
        (['--hashes', 'md5'], '--hashes'),
        (['other end of text'], '--tokenizer'),
        (['another input'], 'listing of INPUT'),
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
        change = ['--tokenizer', save_tokenizer(bpe, tmp_path / 'other')]
    elif change == ['another input']:
        change = [write_jsonl(tmp_path / 'b.jsonl', TEXTS)]
    sentence = refuse(*common, *change, '--output', f'{place.root}/out')
    assert f'out was begun with another {named}' in sentence
    assert 'make it anew with another --output' in sentence
    assert place.files() == before


def test_skip_bad_goes_on_from_what_is_finished(place: Folder | Bucket, common: list[object]):
    lines = Path(str(common[0]))
    bad = f'{lines}, the line that begins at byte {lines.stat().st_size}: malformed JSON'
    lines.write_bytes(lines.read_bytes() + b'oops\n')
    arguments = [*common, '--output', f'{place.root}/out']
    assert f'{bad} (with --skip-bad, the same command goes on' in refuse(*arguments)
    finished = {name: data for name, data in place.files().items() if '.records/part' in name}
    assert finished
    succeed(*arguments, '--skip-bad')
    assert finished.items() <= place.files().items()
    assert place.files()['out/bad_documents.txt'].decode() == f'{bad}\n'
    # Without it, what was skipped is a fault again.
    assert bad in refuse(*arguments)


def test_a_killed_run_is_taken_up(place: Folder | Bucket, common: list[object]):
    arguments = [*common, '--output', f'{place.root}/out']
    prepare_until_killed(*arguments)
    left = place.files()
    assert 'out/train/index.json' not in left
    records = {name: data for name, data in left.items() if '.records/part' in name}
    assert len(records) >= 3
    succeed(*arguments, '--verify')
    assert records.items() <= place.files().items()
    # On one core, with nothing in between.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        succeed(*common, '--output', f'{place.root}/whole')
    finally:
        os.sched_setaffinity(0, cores)
    assert place.files('out') == place.files('whole')


def test_other_versions_are_refused_by_name(
    place: Folder | Bucket, common: list[object], monkeypatch: pytest.MonkeyPatch
):
    succeed(*common, '--output', f'{place.root}/out')
    here = importlib.metadata.version('tokenizers')
    real = importlib.metadata.version
    monkeypatch.setattr(command, 'version', lambda name: '9.9' if name == 'tokenizers' else real(name))
    sentence = refuse(*common, '--output', f'{place.root}/out', '--verify')
    assert f'was begun with another version of tokenizers ({here}, now 9.9)' in sentence
    assert 'run with the same, or make it anew with another --output' in sentence


def test_what_a_refused_run_only_began_is_taken_up_by_the_corrected_command(
    place: Folder | Bucket, common: list[object], monkeypatch: pytest.MonkeyPatch
):
    """With a tokenizer that it trained, too, which is trained anew."""
    monkeypatch.setattr(parts, 'PART_BYTES', 1 << 20)
    lines, arguments = Path(str(common[0])), [common[0], '--output', f'{place.root}/out', '--seq-len', L]
    whole = lines.read_bytes()
    lines.write_bytes(whole + b'oops\n')
    assert 'malformed JSON' in refuse(*arguments, '--train-tokenizer', 260)
    assert set(place.files()) == {'out/.records/begun.json'}
    lines.write_bytes(whole)
    sentence = refuse(*arguments[:-1], 1 << 20, '--train-tokenizer', 260)
    assert sentence.endswith('no split fills a row of --seq-len 1048576: give more text, or a smaller --seq-len')
    assert all(name.startswith('out/.records/') for name in place.files())
    succeed(*arguments, '--train-tokenizer', 300, '--verify')
    assert len(json.loads(place.files()['out/tokenizer/tokenizer.json'])['model']['vocab']) == 300
    assert 'begun with another --train-tokenizer' in refuse(*arguments, '--train-tokenizer', 310)
    # But not another's.
    place.put('other/tokenizer/tokenizer.json', b'mine')
    arguments[2] = f'{place.root}/other'
    assert 'other holds tokenizer and was not begun' in refuse(*arguments, '--train-tokenizer', 300)


def test_an_output_of_the_older_command_is_refused_with_what_to_do(place: Folder | Bucket, common: list[object]):
    place.put('out/.records/begun.json', b'{"sha256": "0", "record": {"version of this program": 2}}')
    place.put('out/train/index.json', b'{}')
    before = place.files()
    for more in ([], ['--verify']):
        sentence = refuse(*common, '--output', f'{place.root}/out', *more)
        assert sentence.endswith(
            f'out was begun with another version of this program (earlier, now {output.FORMAT}): run with the same, or '
            'make it anew with another --output'
        )
    assert place.files() == before


def test_a_second_run_is_refused_while_the_first_lives(common: list[object], tmp_path: Path):
    with output.locked(str(tmp_path / 'out')):
        sentence = refuse(*common, '--output', tmp_path / 'out')
        assert sentence == f'another run is writing to {tmp_path}/out: wait for its end, or name another output'
    succeed(*common, '--output', tmp_path / 'out')


def test_a_disk_without_locks_is_said_and_the_run_goes_on(
    common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('fcntl.flock', refused)
    result = succeed(*common, '--output', tmp_path / 'out')
    assert f'there is no lock on {tmp_path}/out (No locks available): see to it that no second run' in result.stderr


def test_an_object_that_marks_the_folder_is_no_reason_to_refuse(place: Folder | Bucket, common: list[object]):
    if isinstance(place, Bucket):
        place.put('out/', b'')
    else:
        Path(place.root, 'out').mkdir(parents=True)
    succeed(*common, '--output', f'{place.root}/out/')


def test_a_screen_that_cannot_be_written_to_is_no_fault_of_the_program(common: list[object], tmp_path: Path):
    line = [*COMMAND, *map(str, common), '--output', str(tmp_path / 'out')]
    with open('/dev/full', 'w') as full:
        result = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith('error: No space left on device')
    assert (tmp_path / 'out' / 'train' / 'index.json').exists()
    # Without any stderr, as of a service.
    result = subprocess.run(['bash', '-c', '"$@" 2>&-', '_', *line[:-1], str(tmp_path / 'again')])
    assert result.returncode == 0
    assert (tmp_path / 'again' / 'train' / 'index.json').exists()


@pytest.mark.parametrize(
    ('name', 'value', 'said'),
    [
        ('S3_ENDPOINT_URL', 'localhost:9000', 'cannot list s3://bucket/out/: Invalid endpoint: localhost:9000'),
        ('AWS_MAX_ATTEMPTS', 'x', 'cannot list s3://bucket/out/: '),
    ],
)
def test_an_odd_environment_gets_one_sentence(name: str, value: str, said: str, common: list[object], tmp_path: Path):
    line = [*COMMAND, *map(str, common), '--output', 's3://bucket/out']
    result = subprocess.run(line, env=os.environ | {name: value}, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert said in result.stderr.splitlines()[-1]
