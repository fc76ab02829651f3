"""How far a command has come, where there is no terminal: in tests there is none."""

import re

import pytest

from composer_tst.cli.progress_bar import progress


def test_elsewhere_than_on_a_terminal_it_is_a_line_now_and_then(capfd: pytest.CaptureFixture[str]):
    bar = progress(10, 'runs', 'evidence', every=0.0)
    for _ in range(10):
        bar.update(1)
    bar.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith('evidence: 0 of 10 runs, ')
    assert re.match(r'evidence: 5 of 10 runs, \d\d:\d\d gone, about \d\d:\d\d left', lines[5])
    assert lines[-1].startswith('evidence: 10 of 10 runs, ')
    assert not {'\r', '\x1b'} & set(''.join(lines))


def test_there_are_few_of_them_and_the_last_always(capfd: pytest.CaptureFixture[str]):
    bars = [progress(1000, 'steps', name, every=1e6) for name in ('baseline', 'tst')]
    for _ in range(1000):
        for bar in bars:
            bar.update(1)
    for bar in bars:
        bar.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(' of 1000 steps' in line for line in lines)
    assert not {'\r', '\x1b'} & set(''.join(lines))
