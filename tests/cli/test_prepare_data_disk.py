"""An output of composer-tst prepare-data on a disk: locks, links, modes, and what a kill or a power loss leaves."""

import subprocess
import threading
from pathlib import Path

import pytest
from common.preparing import COMMAND, prepare_until_killed, read_rows, refuse, shards_in, succeed

pytest_plugins = ['common.preparing_fixtures']


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
    succeed(*common, '--output', tmp_path / 'out')
    shard = next((tmp_path / 'out' / 'train').rglob('*.mds'))
    shard.unlink()
    shard.symlink_to(tmp_path / 'mine')
    assert f'{shard} is there already and is not what this run writes' in refuse(*common, '--output', tmp_path / 'out')
    assert (tmp_path / 'mine').read_bytes() == b''


def test_what_a_kill_left_of_a_part_goes_with_the_next_run(common: list[object], tmp_path: Path):
    left = tmp_path / 'out' / '.records' / 'scratch' / '00000abc' / 'train'
    left.mkdir(parents=True)
    (left / 'shard.00000.mds').write_bytes(b'half')
    succeed(*common, '--output', tmp_path / 'out', '--verify')
    assert not left.exists()


def test_modes_follow_the_umask(common: list[object], tmp_path: Path):
    command = [*COMMAND, *map(str, common), '--output', str(tmp_path / 'out')]
    subprocess.run(command, check=True, capture_output=True, umask=0o027)
    for path in (tmp_path / 'out').rglob('*'):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_kill_leaves_nothing_in_the_temporary_folder(
    common: list[object], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    temporary = tmp_path_factory.mktemp('t')  # of a short name: what a socket's may come to is limited
    monkeypatch.setenv('TMPDIR', str(temporary))
    prepare_until_killed(*common, '--output', tmp_path / 'out')
    assert not [path for path in temporary.rglob('*') if path.is_file()]


def test_a_temporary_folder_may_have_any_name(
    common: list[object], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv('TMPDIR', str(tmp_path_factory.mktemp('a#b?c')))
    command = [*COMMAND, *map(str, common), '--output', str(tmp_path / 'out')]
    subprocess.run(command, check=True, capture_output=True)
    assert [name for name, _ in shards_in(tmp_path / 'out' / 'train')] == ['00000/shard.00000.mds']


def test_two_commands_at_once_make_one_data_set(common: list[object], tmp_path: Path):
    command = [*COMMAND, *map(str, common), '--output', str(tmp_path / 'out')]
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
