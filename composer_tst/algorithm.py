"""Token superposition as a Composer algorithm: the one place that knows Composer's events."""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from composer_tst.attach import Superposition, check_model
from composer_tst.folding import IGNORE_INDEX, check_fold_settings, fold_batch
from composer_tst.loader import BagLoader, check_epoch_is_whole
from composer_tst.reporting import report_change, report_moved_ends, report_no_recovery, report_shares
from composer_tst.resumption import check_resumed_settings
from composer_tst.schedule import Plan, Schedule, parse_phases, plan_steps
from composer_tst.stack import check_algorithms, check_callbacks, check_loader, forget_losses, put_first
from composer_tst.weighting import Weighting, target_weights

log = logging.getLogger(__name__)


class TokenSuperposition(Algorithm):
    """Pre-train on bags of tokens first, then on tokens (Peng, Gigant, Quesnelle, arXiv 2605.06546).

    In the superposition phase the model reads bags of ``bag_size`` contiguous tokens, each as the mean of their
    embeddings, and predicts the next bag with a multi-hot cross-entropy. A step has the shapes and the cost of a
    plain one and reads ``bag_size`` times the data, which is drawn from the train loader as it is configured. When
    the phase ends, ordinary next-token training goes on with the same weights, optimizer and schedule, and nothing
    of the algorithm is left in the model, the loss or the loader.

    Timestamps count data samples and tokens. Evaluation is plain next-token evaluation throughout. Train metrics
    are absent while superposed: the multi-hot cross-entropy is logged as ``loss/train/total``.

    Logs every step ``superposition/bag_size`` (1 in recovery), and, cumulative over all ranks,
    ``superposition/data_tokens`` and ``superposition/s_tokens`` (model positions, padding included). A mixture of
    experts also logs ``superposition/router_loss`` while superposed, the mean over this rank's microbatches. At the end
    of each epoch it logs ``superposition/samples_left_out``, cumulative too: the tails that did not fill a step.

    A resumed run goes on as if it had not stopped. Settings that concern only phases to come may differ from the
    checkpoint's, and a share of the duration (``0.3dur``) is one of the duration as it now is; but a phase that has
    ended never begins again.

    ``device_train_microbatch_size`` keeps its meaning: where rows become shorter (``expand`` ``batch`` or ``none``), a
    microbatch has ``bag_size`` times as many of them.

    Args:
        bag_size: Tokens in a bag, ``s``, an integer of at least 2.
        duration: When superposition ends, as any Composer Time. A share (``0.3dur``) is one of steps if
            ``max_duration`` is in batches or epochs, and one of tokens or samples if it is in those.
        superpose: ``both`` sides, or the ``input`` only (predict the first token of the next bag), or the
            ``output`` only (single tokens predict the next ``s``; needs ``expand: none``).
        expand: Where the ``s``-fold data goes: ``sequence`` (joins ``s`` rows into one), ``batch`` (more, shorter
            rows), or ``none`` (no more data: cheaper steps).
        weighting: Weights of a bag's targets: ``uniform``, ``power_law``, ``exponential``, ``first``, or ``s``
            numbers.
        phases: Instead of ``bag_size`` and ``duration``, several phases from coarse to fine, each a mapping
            ``{bag_size, until}``.

    Raises:
        ValueError: On a setting that cannot be followed; before training wherever it can be known then.

    Example:
        .. code-block:: python

            trainer = Trainer(..., algorithms=[TokenSuperposition(bag_size=6, duration='0.3dur')])
    """

    def __init__(
        self,
        bag_size: int | None = None,
        duration: str | Time | None = None,
        superpose: str = 'both',
        expand: str = 'sequence',
        weighting: Weighting = 'uniform',
        phases: Sequence[Mapping[str, Any]] | None = None,
    ):
        self.schedule = Schedule(parse_phases(bag_size, duration, phases))
        check_fold_settings(expand, superpose)
        self.superpose = superpose
        self.expand = expand
        self.weighting = weighting
        for phase in self.schedule.phases:
            weights = target_weights(weighting, phase.bag_size)
            if superpose == 'input' and weights[0] == 0:
                raise ValueError(
                    f'weighting is {weighting} but superpose: input predicts the first token alone: '
                    'give that one a positive weight.'
                )
        self._superposition: Superposition | None = None
        self._weights = torch.empty(0)
        self._train_metrics: dict[str, Any] | None = None
        self._s_tokens = 0
        self._positions = 0
        self._microbatch_scale = 1
        self._left_out = 0
        self._left_out_of_epoch = 0
        self._saved_settings: Mapping[str, Any] | None = None
        self._warned_of_tail = False

    def __repr__(self) -> str:
        """The settings."""
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in self._settings().items())})'

    def _settings(self) -> dict[str, Any]:
        """The settings, in plain Python types."""
        return {
            'phases': [
                {'bag_size': phase.bag_size, 'until': phase.until.to_timestring()} for phase in self.schedule.phases
            ],
            'superpose': self.superpose,
            'expand': self.expand,
            'weighting': self.weighting if isinstance(self.weighting, str) else [float(w) for w in self.weighting],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, in plain Python types."""
        return {
            **super().state_dict(),
            'settings': self._settings(),
            'began': self.schedule.began,
            'ended': list(self.schedule.ended),
            'ends': [end.to_timestring() for end in self.schedule.ends],
            's_tokens': self._s_tokens,
            'left_out': self._left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off; the settings are compared once all of it is loaded."""
        self.schedule.began = state['began']
        self.schedule.ended = list(state['ended'])
        self.schedule.ends = [Time.from_timestring(end) for end in state['ends']]
        self._s_tokens = state['s_tokens']
        self._left_out = state['left_out']
        self._saved_settings = state['settings']

    _EVENTS = (
        Event.INIT,
        Event.AFTER_LOAD,
        Event.FIT_START,
        Event.EPOCH_START,
        Event.AFTER_DATALOADER,
        Event.BATCH_END,
        Event.EPOCH_END,
        Event.FIT_END,
    )

    def match(self, event: Event, state: State) -> bool:
        """Whether to run at this event."""
        del state
        return event in self._EVENTS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Superpose, fold, count, or step back, as the event asks."""
        if event == Event.INIT:
            # Composer sets its own logger's level by the trainer's python_log_level: follow it.
            if level := logging.getLogger('composer').level:
                logging.getLogger('composer_tst').setLevel(level)
            check_algorithms(state.algorithms)
            check_callbacks(state.callbacks)
            put_first(state, self)
            check_model(state.model)
        elif event == Event.AFTER_LOAD:
            self._check_resumed_settings(int(state.timestamp.batch))
        elif event == Event.FIT_START:
            self._start(state)
        elif event == Event.EPOCH_START:
            self._renew_loader(state)
        elif event == Event.AFTER_DATALOADER:
            self._fold(state)
        elif event == Event.BATCH_END:
            self._count(state, logger)
            self._advance(state)
        elif event == Event.EPOCH_END:
            self._check_epoch_is_whole(state)
            logger.log_metrics({'superposition/samples_left_out': self._left_out})
            self._advance(state)
        elif event == Event.FIT_END:
            self._stop(state)

    def _check_resumed_settings(self, batch: int) -> None:
        if self._saved_settings is None:
            return
        begun = self.schedule.phases_begun(batch)
        under_way = begun > len(self.schedule.ended)
        changes = check_resumed_settings(self._saved_settings, self._settings(), begun, under_way)
        if changes:
            log.info('Superposition resumes with other settings, where they change nothing of the past: %s.', changes)
            self.schedule.ends = []
        self._saved_settings = None

    def _start(self, state: State) -> None:
        assert state.max_duration is not None
        self._detach(state)
        self._restore_loader(state)
        batch = int(state.timestamp.batch)
        if self.schedule.began is None:
            self.schedule.began = batch
            self._s_tokens = int(state.timestamp.token)
        # Where the clock began again after superposition, its end is past all the same.
        self.schedule.began = min(self.schedule.began, batch)
        self.schedule.ended = [min(end, batch) for end in self.schedule.ended]
        if not self.schedule.finished:
            self._check_loader(state)
            plan = self._plan(state)
            before = self.schedule.ends
            self.schedule.resolve(state.max_duration, plan, resumed=batch > self.schedule.began)
            report_moved_ends(self.schedule, before, state.max_duration)
            report_shares(self.schedule, state.max_duration, plan, draws_more=self.expand != 'none')
            bag_size = self.schedule.bag_size
            if self.schedule.advance(state.timestamp):
                report_change(bag_size, self.schedule.bag_size, state.timestamp)
        if not self.schedule.finished:
            self._attach(state)
        superposed_in_epoch = not self.schedule.finished or self._epoch_start(state) < self.schedule.ended[-1]
        if (superposed_in_epoch and self.expand != 'none') or self._resumes_within_epoch(state):
            self._install_loader(state)

    def _check_loader(self, state: State) -> None:
        check_loader(state.train_dataloader)
        needed = max(self._draws(phase.bag_size) for phase in self.schedule.phases)
        if state.dataloader_len is not None and int(state.dataloader_len) < needed:
            raise ValueError(
                f'The train loader has {int(state.dataloader_len)} batches but one superposed step reads {needed}: '
                'use a smaller bag_size, more data, or a smaller batch.'
            )

    def _renew_loader(self, state: State) -> None:
        """Draw from a loader that was set since the last epoch, as llm-foundry's CurriculumLearning does."""
        if not self.schedule.finished and self.expand != 'none' and not isinstance(state.dataloader, BagLoader):
            self._check_loader(state)
            self._install_loader(state)

    def _plan(self, state: State) -> Plan | None:
        """Expected steps, from what the loader tells of itself."""
        assert state.max_duration is not None
        loader = state.train_dataloader
        draws = [self._draws(phase.bag_size) for phase in self.schedule.phases]
        per_batch: dict[TimeUnit, int | Fraction] = {}
        if state.dataloader_len is not None:
            per_batch[TimeUnit.EPOCH] = Fraction(1, int(state.dataloader_len))
        batch_size = getattr(loader, 'batch_size', None)
        if batch_size is not None:
            per_batch[TimeUnit.SAMPLE] = batch_size * dist.get_world_size()
            row_length = getattr(getattr(loader, 'dataset', None), 'max_seq_len', None)
            if row_length is not None:
                per_batch[TimeUnit.TOKEN] = per_batch[TimeUnit.SAMPLE] * row_length
        began = self.schedule.began or 0
        return plan_steps(self.schedule.placed, draws, state.max_duration, per_batch, began)

    def _draws(self, bag_size: int) -> int:
        return 1 if self.expand == 'none' else bag_size

    @staticmethod
    def _resumes_within_epoch(state: State) -> bool:
        """Whether the dataset goes on in the middle of an epoch by itself, as a StreamingDataset does."""
        return 'train' in state.dataset_resumption and int(state.timestamp.batch_in_epoch) > 0

    @staticmethod
    def _epoch_start(state: State) -> int:
        return int(state.timestamp.batch) - int(state.timestamp.batch_in_epoch)

    def _install_loader(self, state: State) -> None:
        source: Any = state.train_dataloader

        def begins_at() -> tuple[int, int]:
            if not self._resumes_within_epoch(state):
                return 0, 0
            batch_size = source.batch_size * dist.get_world_size()
            return int(state.timestamp.batch_in_epoch), int(state.timestamp.sample_in_epoch) // batch_size

        def draws_at(step: int) -> int:
            return self._draws(self.schedule.bag_size_at(self._epoch_start(state) + step))

        def leave_out(samples: int) -> None:
            samples *= dist.get_world_size()
            self._left_out += samples
            self._left_out_of_epoch += samples

        limit = None if state.dataloader_len is None else int(state.dataloader_len)
        loader = BagLoader(source, draws_at, begins_at, self.expand == 'sequence', limit, leave_out)
        state.set_dataloader(loader, state.dataloader_label, -1 if limit is None else limit)

    def _restore_loader(self, state: State) -> None:
        if isinstance(state.dataloader, BagLoader):
            limit = -1 if state.dataloader_len is None else int(state.dataloader_len)
            state.set_dataloader(state.train_dataloader, state.dataloader_label, limit)

    def _attach(self, state: State) -> None:
        model: Any = state.model
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        self._superposition = Superposition(model)
        self._enter_phase(state)
        # A next-token metric has nothing to measure in a superposed step.
        self._train_metrics, state.train_metrics = state.train_metrics, {}

    def _detach(self, state: State) -> None:
        if self._superposition is not None:
            self._superposition.remove()
            self._superposition = None
            self._scale_microbatch(state, 1)
            state.train_metrics, self._train_metrics = self._train_metrics, None

    def _enter_phase(self, state: State) -> None:
        """Set what depends on the bag size."""
        assert self._superposition is not None
        bag_size = self.schedule.bag_size
        self._weights = target_weights(self.weighting, bag_size)
        self._superposition.weights = None if self.weighting == 'uniform' else self._weights
        self._scale_microbatch(state, 1 if self.expand == 'sequence' or self.superpose == 'output' else bag_size)

    def _scale_microbatch(self, state: State, scale: int) -> None:
        """Let a microbatch have as many positions as in plain training, where rows have become shorter."""
        if scale != self._microbatch_scale and state.device_train_microbatch_size is not None:
            size = state.device_train_microbatch_size * scale / self._microbatch_scale
            state.device_train_microbatch_size = max(1, int(size))
            self._microbatch_scale = scale

    def _fold(self, state: State) -> None:
        if isinstance(state.dataloader, BagLoader) and state.dataloader.step != int(state.timestamp.batch_in_epoch):
            raise ValueError(
                f'The run is at step {int(state.timestamp.batch_in_epoch)} of the epoch but its data at step '
                f'{state.dataloader.step}: set spin_dataloaders: true, or use a StreamingDataset, which resumes itself.'
            )
        if self.schedule.finished:
            self._restore_loader(state)
            self._positions = state.batch['labels'].numel()
            return
        bag_size = self.schedule.bag_size
        batch = fold_batch(state.batch, bag_size, self.expand, self.superpose)
        rows, length = state.batch['input_ids'].shape
        # What llm-foundry's count of tokens weighs microbatches by, which it cannot count in bags: with the weights of
        # their targets, they add up to the loss of the whole batch.
        valid = (batch['labels'] != IGNORE_INDEX).double()
        batch['loss_generating_tokens'] = (valid * self._weights.to(valid)).sum((1, 2)).tolist()
        if 'total_tokens' not in batch:
            attended = state.batch.get('attention_mask', torch.ones_like(state.batch['input_ids'])).bool()
            batch['total_tokens'] = attended.reshape(len(valid), -1).sum(1).tolist()
        if state.device.name == 'gpu' and getattr(state.train_dataloader, 'pin_memory', False):
            # As the loader's own batches were: from other memory, each microbatch's copy to the GPU would wait for it.
            batch = {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
        state.batch = batch
        self._positions = batch['labels'].shape[:2].numel()
        dropped = rows * (length % bag_size) if self.expand == 'batch' else 0
        if dropped and not self._warned_of_tail:
            self._warned_of_tail = True
            log.warning(
                'bag_size %d does not divide rows of %d tokens: expand: batch drops %d tokens a step on each rank.',
                bag_size,
                length,
                dropped,
            )

    def _count(self, state: State, logger: Logger) -> None:
        # All ranks draw equally many rows, in the last step of an epoch too.
        self._s_tokens += self._positions * dist.get_world_size()
        metrics: dict[str, Any] = {
            'superposition/bag_size': self.schedule.bag_size,
            'superposition/data_tokens': int(state.timestamp.token),
            'superposition/s_tokens': self._s_tokens,
        }
        if self._superposition is not None:
            if self._superposition.router_losses:
                metrics['superposition/router_loss'] = torch.stack(self._superposition.router_losses).mean()
            self._superposition.forget()
        logger.log_metrics(metrics)

    def _advance(self, state: State) -> None:
        if self.schedule.finished:
            return
        before = self.schedule.bag_size
        if not self.schedule.advance(state.timestamp):
            return
        if self.schedule.finished:
            self._detach(state)
            self._restore_loader(state)
        else:
            self._enter_phase(state)
        forget_losses(state.callbacks)
        report_change(before, self.schedule.bag_size, state.timestamp)

    def _check_epoch_is_whole(self, state: State) -> None:
        left_out, self._left_out_of_epoch = self._left_out_of_epoch, 0
        if state.dataloader_len is not None:
            assert state.previous_timestamp is not None
            samples = int(state.previous_timestamp.sample_in_epoch) + left_out
            check_epoch_is_whole(state.train_dataloader, int(state.dataloader_len), samples)

    def _stop(self, state: State) -> None:
        if not self.schedule.finished:
            report_no_recovery(self.schedule, state.timestamp)
        self._detach(state)
        self._restore_loader(state)
