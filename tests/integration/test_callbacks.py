"""The callbacks of a pre-training run, in both phases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from common import REPO, SEQ_LEN
from common.trainers import llama, logged, make_trainer, random_loader
from composer import Callback
from composer.callbacks import EarlyStopper, ThresholdStopper
from composer.loggers import InMemoryLogger
from llmfoundry.callbacks import KillLossSpike
from llmfoundry.callbacks.async_eval_callback import get_eval_parameters
from llmfoundry.callbacks.loss_perp_v_len_callback import LossPerpVsContextLengthLogger
from llmfoundry.command_utils.train import train_from_yaml
from llmfoundry.utils.exceptions import LossSpikeError
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from composer_tst import TokenSuperposition
from composer_tst.compatibility import check_callbacks

pytestmark = pytest.mark.streaming

TST = REPO / 'yamls' / 'quickstart' / 'tst.yaml'


def test_the_callbacks_of_a_pretraining_run_work_in_both_phases(tiny_quickstart: list[str], tmp_path: Path):
    trainer = train_from_yaml(
        str(TST),
        [
            *tiny_quickstart,
            'max_duration=6ba',
            f'save_folder={tmp_path}/checkpoints',
            'save_interval=3ba',
            'autoresume=false',
            'algorithms.token_superposition.phases=[{bag_size: 2, until: 3ba}]',
            'loggers={inmemory: {}}',
            f'variables.folder={tmp_path}',
            'callbacks.speed_monitor={window_size: 1}',
            'callbacks.lr_monitor={}',
            'callbacks.memory_monitor={}',
            'callbacks.runtime_estimator={}',
            'callbacks.optimizer_monitor={batch_log_interval: 1}',
            'callbacks.nan_monitor={}',
            'callbacks.scheduled_gc={batch_interval: 2}',
            'callbacks.kill_loss_spike={log_only: false, window_size: 2}',
            'callbacks.hf_checkpointer={save_interval: 3ba, precision: float32}',
            f'callbacks.hf_checkpointer.save_folder={tmp_path}/hf',
        ],
    )
    logger = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    metrics = {key: logged(logger, key) for key in logger.data}
    assert metrics['superposition/bag_size'] == [2, 2, 2, 1, 1, 1]
    for key in ('lr-DecoupledAdamW/group0', 'l2_norm/grad/global', 'loss/train/total', 'time/token'):
        assert len(metrics[key]) >= 6, key
    assert len(metrics['throughput/tokens_per_sec']) == 5
    assert len(metrics['time/remaining_estimate']) >= 3
    assert all(value > 0 for value in metrics['l2_norm/grad/global'])

    exported = sorted(config.parent.name for config in (tmp_path / 'hf').glob('**/config.json'))
    assert exported == ['ba3', 'ba6']


def test_a_curriculum_changes_the_data_of_a_superposed_run(tiny_quickstart: list[str], tmp_path: Path):
    batch = 4 * SEQ_LEN
    trainer = train_from_yaml(
        str(TST),
        [
            *tiny_quickstart,
            f'max_duration={15 * batch}tok',
            'autoresume=false',
            'scheduler.t_warmup=1ba',
            f'algorithms.token_superposition.phases=[{{bag_size: 3, until: {12 * batch}tok}}]',
            'loggers={inmemory: {}}',
            f'variables.folder={tmp_path}',
            f'callbacks.curriculum_learning.duration={6 * batch}tok',
            f'callbacks.curriculum_learning.schedule=[{{duration: {9 * batch}tok, dataset: {{split: val}}}}]',
        ],
    )
    logger = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    assert logged(logger, 'superposition/bag_size') == [3, 3, 3, 3, 1, 1, 1]
    assert logged(logger, 'superposition/data_tokens') == [count * batch for count in (3, 6, 9, 12, 13, 14, 15)]
    assert trainer.state.train_dataloader.dataset.streams[0].split == 'val'  # pyright: ignore


@pytest.mark.parametrize(
    ('callback', 'message'),
    [
        (LossPerpVsContextLengthLogger(1, 1), 'loss_perp_v_len cannot be combined with token_superposition'),
        (EarlyStopper('LanguageCrossEntropy', 'train'), 'set its dataloader_label to eval'),
        (
            ThresholdStopper('LanguageCrossEntropy', 'train', 1.0, comp='less', stop_on_batch=True),  # pyright: ignore
            'threshold_stopper watches LanguageCrossEntropy of train, and there are no',
        ),
    ],
)
def test_callbacks_that_need_what_bags_lack_are_refused(callback: Callback, message: str):
    with pytest.raises(ValueError, match=message):
        check_callbacks([callback])


def test_callbacks_are_checked_before_training():
    with pytest.raises(ValueError, match='there are no train metrics while superposed'):
        make_trainer(
            llama(), random_loader(), TokenSuperposition(2, '2ba'), callbacks=[EarlyStopper('Accuracy', 'train')]
        )


def test_async_evaluation_takes_over_the_yaml_without_superposition():
    parameters: Any = OmegaConf.to_container(OmegaConf.load(TST), resolve=True)
    evaluation = get_eval_parameters({**parameters, 'icl_tasks': []}, 'checkpoint', 'tst')
    assert 'algorithms' not in evaluation
    assert evaluation['models'][0]['load_path'] == 'checkpoint'
    assert evaluation['eval_loader'] == parameters['eval_loader']


class Counting(torch.utils.data.Dataset):
    """Rows of four bags, each of one token thrice, that count upwards: learnt at once from bag to bag."""

    def __len__(self) -> int:
        return 1600

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(4).repeat_interleave(3) + index) % 16
        return {'input_ids': ids, 'labels': ids.clone()}


def test_the_jump_at_the_switch_is_no_loss_spike():
    killer = KillLossSpike(log_only=False, patience=0, outlier_multiplier=2)
    algorithm = TokenSuperposition(bag_size=3, duration='120ba', expand='batch')
    trainer, logger = make_trainer(
        llama(), DataLoader(Counting(), batch_size=4), algorithm, '125ba', callbacks=[killer]
    )
    trainer.fit()
    losses = logged(logger, 'loss/train/total')
    assert losses[120] > 2 * max(losses[20:120])
    assert len(losses) == 125


def test_the_patience_with_loss_spikes_begins_anew_at_a_switch():
    killer = KillLossSpike(log_only=False, patience=3, outlier_multiplier=2, window_size=2)

    class Outliers(Callback):
        seen: list[Any]

        def batch_start(self, state: Any, logger: Any) -> None:
            self.seen.append((killer.outlier_counter, len(killer.loss_window)))

        def after_train_batch(self, state: Any, logger: Any) -> None:
            killer.outlier_counter = 2

    outliers = Outliers()
    outliers.seen = []
    phases = [{'bag_size': 3, 'until': '2ba'}, {'bag_size': 2, 'until': '4ba'}]
    algorithm = TokenSuperposition(phases=phases)
    make_trainer(llama(), random_loader(), algorithm, '6ba', callbacks=[killer, outliers])[0].fit()
    counters, windows = zip(*outliers.seen, strict=True)
    assert [counters[step] for step in (2, 4)] == [0, 0]
    assert [windows[step] for step in (2, 4)] == [0, 0]
    assert windows[1] > 0


def test_a_loss_spike_within_a_phase_still_kills_the_run():
    class Spikes(Counting):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            return row if index < 1320 else {key: ids.flip(0) for key, ids in row.items()}

    killer = KillLossSpike(log_only=False, patience=0, outlier_multiplier=2)
    algorithm = TokenSuperposition(bag_size=3, duration='120ba', expand='batch')
    trainer, _ = make_trainer(llama(), DataLoader(Spikes(), batch_size=4), algorithm, '125ba', callbacks=[killer])
    with pytest.raises(LossSpikeError):
        trainer.fit()
