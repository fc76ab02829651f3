"""The five YAML lines in a real `llmfoundry train`, with nothing imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import REPO, SEQ_LEN
from llmfoundry import registry
from llmfoundry.command_utils.train import train_from_yaml
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from composer_tst import PhaseCheckpointer, TokenSuperposition, WarmupStableDecayScheduler

pytestmark = pytest.mark.streaming

QUICKSTART = REPO / 'yamls' / 'quickstart'


def train(yaml: Path, *overrides: str) -> str:
    """Run `llmfoundry train` on one thread; return what it printed."""
    command = [str(Path(sys.executable).parent / 'llmfoundry'), 'train', str(yaml), *overrides]
    # Wide columns keep a traceback's last line in one piece.
    env = os.environ | {'OMP_NUM_THREADS': '1', 'COLUMNS': '500'}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout + run.stderr


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    return [event.value for event in events.Scalars(tag)]


def test_the_entry_points_are_registered():
    assert registry.algorithms.get('token_superposition') is TokenSuperposition
    assert registry.schedulers.get('warmup_stable_decay') is WarmupStableDecayScheduler
    assert registry.callbacks.get('phase_checkpointer') is PhaseCheckpointer


def test_the_quickstart_runs_differ_in_the_algorithm_alone():
    baseline = OmegaConf.to_container(OmegaConf.load(QUICKSTART / 'baseline.yaml'), resolve=False)
    tst = OmegaConf.to_container(OmegaConf.load(QUICKSTART / 'tst.yaml'), resolve=False)
    assert isinstance(baseline, dict)
    assert isinstance(tst, dict)
    algorithms = tst.pop('algorithms')
    assert list(algorithms) == ['token_superposition']
    assert (baseline.pop('run_name'), tst.pop('run_name')) == ('baseline', 'tst')
    assert baseline == tst


def test_a_run_from_yaml_superposes_resumes_and_recovers(
    tiny_quickstart: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = [
        *tiny_quickstart,
        f'variables.folder={tmp_path}',
        'save_interval=2ba',
        'callbacks.phase_checkpointer={}',
        'algorithms.token_superposition.phases=[{bag_size: 4, until: 2ba}, {bag_size: 2, until: 3ba}]',
    ]
    printed = train(QUICKSTART / 'tst.yaml', *settings, 'max_duration=6ba')
    assert 'bag size goes from 4 to 2 at batch 2' in printed
    assert 'bag size goes from 2 to 1 (the recovery phase begins) at batch 3' in printed
    assert scalars(tmp_path / 'tst', 'superposition/bag_size') == [4, 4, 2, 1, 1, 1]
    tokens = [4 * SEQ_LEN * n for n in (4, 8, 10, 11, 12, 13)]
    assert scalars(tmp_path / 'tst', 'superposition/data_tokens') == tokens
    assert len(scalars(tmp_path / 'tst', 'metrics/eval/LanguageCrossEntropy')) == 3

    for name in ('bag4-to-bag2/ep0-ba2-rank0.pt', 'bag2-to-bag1/ep0-ba3-rank0.pt'):
        checkpoint = torch.load(tmp_path / 'tst' / 'checkpoints' / name, weights_only=False)
        assert set(checkpoint['state']['model'])

    capsys.readouterr()
    train_from_yaml(str(QUICKSTART / 'tst.yaml'), [*settings, 'max_duration=60ba'])
    printed = ''.join(capsys.readouterr())
    assert 'Autoresuming training from checkpoint' in printed
    assert 'bag size goes' not in printed
    assert scalars(tmp_path / 'tst', 'superposition/bag_size')[6:] == [1] * 54


def test_a_bad_setting_stops_the_run_with_one_sentence(tiny_quickstart: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match='there would be no recovery phase'):
        train_from_yaml(
            str(QUICKSTART / 'tst.yaml'),
            [
                *tiny_quickstart,
                f'variables.folder={tmp_path}',
                'max_duration=6ba',
                'algorithms.token_superposition.phases=[{bag_size: 4, until: 6ba}]',
            ],
        )
