"""Running tools/prepare_data.py within tests, to its end or until it is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))

from data_prep import local, parts
from prepare_data import app


def prepare(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    """Run the command, which must not fail."""
    result = prepare(*arguments)
    assert result.exit_code == 0, result.output
    return result


def prepare_until_killed(*arguments: object) -> None:
    """Run the command in a process that dies by SIGKILL when three of its parts are finished."""
    command = [sys.executable, __file__, str(parts.PART_BYTES), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr


def _prepare_and_die(arguments: list[str]) -> None:
    parts.PART_BYTES = int(arguments[0])
    parallel = local.parallel

    def dying(*args: Any) -> Iterator[Any]:
        for done, result in enumerate(parallel(*args), 1):
            yield result
            if done == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    local.parallel = dying
    app(arguments[1:])


if __name__ == '__main__':
    _prepare_and_die(sys.argv[1:])
