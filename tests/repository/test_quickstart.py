"""tools/quickstart.py: two real runs side by side, tiny."""

import os
import re
import time
from pathlib import Path

import pytest
import typer

from tools import quickstart

pytestmark = pytest.mark.streaming


def test_both_runs_are_trained_shown_kept_and_trained_again_when_overtaken(
    dataset: Path, tiny_quickstart: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    settings = [*tiny_quickstart, 'max_duration=10ba', 'console_log_interval=1ba', 'save_interval=10ba']
    quickstart.main(dataset, tmp_path, 17, settings)
    shown = capfd.readouterr().err
    for name in ('baseline', 'tst'):
        assert f'{name}: training, log in {tmp_path}/{name}.log' in shown
        assert re.search(rf'^{name}: 10 of 10 steps, ', shown, re.M)
        assert quickstart.last_step(tmp_path / f'{name}.log') == (10, 10)
        assert list((tmp_path / name).glob('*tfevents*'))

    quickstart.main(dataset, tmp_path, 17, settings)
    assert 'training' not in capfd.readouterr().err
    # A run whose data is newer than its end is gone; the other stays.
    long_ago = time.time() - 1e6
    os.utime(tmp_path / 'tst.done', (long_ago, long_ago))
    assert quickstart.is_done(tmp_path, 'baseline', dataset)
    assert not quickstart.is_done(tmp_path, 'tst', dataset)
    assert not (tmp_path / 'tst').exists()


def test_a_run_that_fails_shows_the_end_of_its_log(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quickstart, 'ATTEMPTS', 1)
    monkeypatch.setattr(quickstart, 'RUNS', ('baseline',))
    with pytest.raises(typer.Exit):
        quickstart.main(dataset, tmp_path, 17, ['model.name=no_such_model'])
    shown = capfd.readouterr().err
    assert re.search(r'^error: baseline failed, .*\.log ends with:$', shown, re.M)
    assert 'no_such_model' in shown
    assert not list(tmp_path.glob('*.done'))
