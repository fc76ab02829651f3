"""An output of composer-tst prepare-data on a disk: locks, links, modes, and what a kill or a power loss leaves."""

import fcntl
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from common import REPO
from common.preparing import COMMAND, prepare_until_killed, read_rows, refuse, succeed

pytest_plugins = ['common.preparing_fixtures']


def test_a_lock_lives_as_long_as_any_worker_of_the_run(common: list[object], tmp_path: Path):
    """A run is killed; until its workers are gone too, nobody else may write."""
    script = f"""
import multiprocessing, os, sys, time
sys.path.insert(0, {str(REPO)!r})
from composer_tst.cli.prepare_data.lock import DiskLock
def work(lock):
    open({str(tmp_path / 'up')!r}, 'w').close()
    while not os.path.exists({str(tmp_path / 'go')!r}):
        time.sleep(0.01)
if __name__ == '__main__':
    lock = DiskLock({str(tmp_path / 'out')!r})
    process = multiprocessing.get_context('forkserver').Process(target=work, args=(lock,))
    process.start()
    while not os.path.exists({str(tmp_path / 'up')!r}):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
    (tmp_path / 'run.py').write_text(script)
    try:
        killed = subprocess.run([sys.executable, tmp_path / 'run.py'], check=False)
        assert killed.returncode == -signal.SIGKILL
        with open(tmp_path / 'out' / '.records' / 'lock') as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (tmp_path / 'go').touch()
            fcntl.flock(file, fcntl.LOCK_EX)
    finally:
        (tmp_path / 'go').touch()


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
    command = [*COMMAND, *map(str, common), '--output', str(tmp_path / 'out')]
    subprocess.run(command, check=True, capture_output=True, umask=0o027)
    assert (tmp_path / 'out' / 'train' / 'index.json').exists()
    for path in (tmp_path / 'out').rglob('*'):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_kill_leaves_nothing_in_the_temporary_folder(
    common: list[object], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    temporary = tmp_path_factory.mktemp('t')  # of a short name: what a socket's may come to is limited
    monkeypatch.setenv('TMPDIR', str(temporary))
    prepare_until_killed(*common, '--output', tmp_path / 'out')
    assert not [path for path in temporary.rglob('*') if path.is_file()]


def test_two_commands_at_once_make_one_data_set(common: list[object], tmp_path: Path, tokenizer_dir: str):
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
