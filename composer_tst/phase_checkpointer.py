"""One full checkpoint at every change of bag size."""

from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import parse_uri

from composer_tst.messages import say
from composer_tst.schedule import schedule_of
from composer_tst.settings import refuse_unknown


class PhaseCheckpointer(Callback):
    """Saves one full checkpoint after the last step of each superposition phase.

    The checkpoints go to the trainer's ``save_folder``, local or remote. Each has a folder that names the change:
    ``bag6-to-bag1/ep0-ba6000-rank0.pt``. Without a ``save_folder`` they go to Composer's default,
    ``{run_name}/checkpoints``. They are never rotated away and do not move the ``latest`` link. A run that repeats the
    last step of a phase after a failure overwrites the checkpoint of that phase.

    To fork a recovery run, load one: ``load_path: .../bag6-to-bag1/ep0-ba6000-rank0.pt``.
    """

    def __init__(self, **unknown: Any):
        refuse_unknown('phase_checkpointer', unknown, ())
        self._bag_size = 1

    def init(self, state: State, logger: Logger) -> None:
        """Set up saving to where the trainer saves.

        Raises:
            ValueError: If the run has no TokenSuperposition.
        """
        if schedule_of(state.algorithms) is None:
            raise ValueError('phase_checkpointer saves at changes of bag size: add token_superposition to algorithms.')
        folder = '{run_name}/checkpoints'
        for callback in state.callbacks:
            if isinstance(callback, CheckpointSaver):
                uploader = callback.remote_uploader
                folder = callback.folder if uploader is None else uploader.remote_folder
                break
        else:
            say([f'phase_checkpointer: save_folder is not set, so checkpoints go to {state.run_name}/checkpoints.'])
        self._saver = CheckpointSaver(
            folder=folder,
            remote_file_name=parse_uri(folder)[2] or '.',  # the folder may be a whole bucket
            latest_filename=None,
            latest_remote_file_name=None,
            save_interval=lambda state, event: True,
            overwrite=True,
            num_checkpoints_to_keep=0 if parse_uri(folder)[0] else -1,  # after an upload, delete the local copy
        )
        self._saver.init(state, logger)  # fills in what loggers know, such as {mlflow_run_id}
        assert self._saver.remote_file_name is not None
        self._remote_folder = self._saver.remote_file_name.filename

    def fit_start(self, state: State, logger: Logger) -> None:
        """Note the bag size that training starts with."""
        self._bag_size = _bag_size(state)
        self._saver.fit_start(state, logger)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if the step just taken was the last of its phase."""
        self._save_if_changed(Event.BATCH_CHECKPOINT, state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if the epoch just finished was the last of its phase."""
        self._save_if_changed(Event.EPOCH_CHECKPOINT, state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the uploads."""
        self._saver.batch_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for uploads."""
        self._saver.fit_end(state, logger)

    def post_close(self) -> None:
        """Close the uploader, if ``init`` made one."""
        if hasattr(self, '_saver'):
            self._saver.post_close()

    def _save_if_changed(self, event: Event, state: State, logger: Logger) -> None:
        before, self._bag_size = self._bag_size, _bag_size(state)
        if self._bag_size == before:
            return
        name = f'bag{before}-to-bag{self._bag_size}/ep{{epoch}}-ba{{batch}}-rank{{rank}}.pt'
        self._saver.filename.filename = name
        assert self._saver.remote_file_name is not None
        self._saver.remote_file_name.filename = str(Path(self._remote_folder) / name)
        self._saver.run_event(event, state, logger)


def _bag_size(state: State) -> int:
    """The bag size of the next step."""
    schedule = schedule_of(state.algorithms)
    return 1 if schedule is None else schedule.bag_size
