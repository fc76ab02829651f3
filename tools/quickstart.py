"""Train the quickstart's two runs side by side, and say how far they are.

What is finished is kept: run it again to go on. A run whose YAML or data is newer than its end is trained anew.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from composer_tst.cli.progress_bar import progress

YAMLS = Path(__file__).parents[1] / 'yamls' / 'quickstart'
RUNS = ('baseline', 'tst')
LAST_LINES = 20
# StreamingDatasets made at one moment may choose one name for their shared memory: the second run goes on where it was.
ATTEMPTS = 2
# A line in the log now and then, which says at what step a run is.
SHOWN = ('log_to_console=true', 'console_log_interval=100ba')
_STEP = re.compile(r'\[batch=(\d+)/(\d+)\]')


def is_done(folder: Path, name: str, data: Path) -> bool:
    """Whether a run has ended since its YAML and its data were made; what has been overtaken by them is removed."""
    done = folder / f'{name}.done'
    if not done.exists():
        return False
    if done.stat().st_mtime > max(path.stat().st_mtime for path in (YAMLS / f'{name}.yaml', data / 'stats.json')):
        return True
    done.unlink()
    shutil.rmtree(folder / name)
    return False


def last_step(log: Path) -> tuple[int, int]:
    """The last step that a log tells of, and the steps there are; zeros before the first."""
    found = _STEP.findall(log.read_text(errors='replace'))
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


class TrainingError(Exception):
    """A run has failed; its log says why."""

    def __init__(self, name: str, log: Path):
        lines = log.read_text(errors='replace').splitlines()[-LAST_LINES:]
        super().__init__('\n'.join([f'{name} failed, {log} ends with:', *lines]))


class Training:
    """One run in a process of its own."""

    def __init__(self, folder: Path, name: str, overrides: list[str]):
        self.name, self.log, self.done = name, folder / f'{name}.log', folder / f'{name}.done'
        llmfoundry = Path(sys.executable).parent / 'llmfoundry'
        self._command = [str(llmfoundry), 'train', str(YAMLS / f'{name}.yaml'), *overrides]
        self._attempts = 0
        self._bar: tqdm | None = None
        self._start()

    def _start(self) -> None:
        self._attempts += 1
        with self.log.open('a' if self._attempts > 1 else 'w') as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)

    def ended(self, position: int) -> bool:
        """Show how far it is; whether it has ended.

        Raises:
            TrainingError: If it has failed.
        """
        code = self._process.poll()
        step, steps = last_step(self.log)
        if steps:
            self._bar = self._bar or progress(steps, 'steps', self.name, position, every=20, initial=step)
            self._bar.update(step - self._bar.n)
        if code is None:
            return False
        if code and self._attempts < ATTEMPTS:
            self._start()
            return False
        if self._bar:
            self._bar.close()
        if code:
            raise TrainingError(self.name, self.log)
        self.done.touch()
        return True

    def stop(self) -> None:
        """End it, if it has not."""
        self._process.terminate()


def main(
    data: Annotated[Path, typer.Option(help='What `composer-tst prepare-data` wrote.')],
    runs: Annotated[Path, typer.Option(help='Where runs and their logs go.')],
    seed: Annotated[int, typer.Option(help='Of the weights and of the order of the data.')] = 17,
    overrides: Annotated[list[str] | None, typer.Argument(metavar='KEY=VALUE...', help='As for llmfoundry.')] = None,
) -> None:
    """Train a baseline and a TST run."""
    runs.mkdir(parents=True, exist_ok=True)
    settings = [*SHOWN, f'variables.data={data}', f'variables.folder={runs}', f'seed={seed}', *(overrides or [])]
    trainings = [Training(runs, name, settings) for name in RUNS if not is_done(runs, name, data)]
    for training in trainings:
        typer.echo(f'{training.name}: training, log in {training.log}', err=True)
    under_way = list(trainings)
    try:
        while under_way:
            under_way = [training for at, training in enumerate(under_way) if not training.ended(at)]
            time.sleep(0.5)
    except TrainingError as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from None
    finally:
        for training in under_way:
            training.stop()


if __name__ == '__main__':
    typer.run(main)
