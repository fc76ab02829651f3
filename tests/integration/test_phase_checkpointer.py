"""One full checkpoint at every change of bag size."""

import tempfile
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from common.s3 import BUCKET, s3_server  # noqa: F401
from common.trainers import assert_same, llama, make_trainer, random_loader
from composer.loggers import MLFlowLogger

from composer_tst import PhaseCheckpointer, TokenSuperposition


def saved(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*.pt') if not path.is_symlink()}


def train(tst: TokenSuperposition, max_duration: str = '3ba', **settings: Any) -> None:
    """A whole run with the callback."""
    callbacks = [PhaseCheckpointer()]
    trainer, _ = make_trainer(llama(), random_loader(), tst, max_duration, callbacks=callbacks, **settings)
    trainer.fit()
    trainer.close()


@pytest.mark.parametrize(
    ('phases', 'expected'),
    [
        ([{'bag_size': 3, 'until': '2ba'}], {'bag3-to-bag1/ep0-ba2-rank0.pt'}),
        (
            [{'bag_size': 4, 'until': '1ba'}, {'bag_size': 2, 'until': '3ba'}],
            {'bag4-to-bag2/ep0-ba1-rank0.pt', 'bag2-to-bag1/ep0-ba3-rank0.pt'},
        ),
        ([{'bag_size': 3, 'until': '1ep'}], {'bag3-to-bag1/ep1-ba4-rank0.pt'}),
    ],
)
def test_each_change_is_saved_once_after_the_last_step_of_its_phase(phases: list, expected: set, tmp_path: Path):
    train(TokenSuperposition(phases=phases), '7ba', save_folder=str(tmp_path), save_interval='100ba')
    assert expected <= saved(tmp_path)
    assert {name for name in saved(tmp_path) if 'bag' in name} == expected
    for name in expected:
        state = torch.load(tmp_path / name, weights_only=False)['state']
        assert {'model', 'optimizers', 'timestamp', 'algorithms'} <= set(state)


def test_it_leaves_latest_alone_and_writes_over_what_it_wrote_before(tmp_path: Path):
    """A run that repeats the last step of a phase after a failure writes the same checkpoint again."""

    def run() -> None:
        train(TokenSuperposition(3, '2ba'), save_folder=str(tmp_path), save_interval='1ba', save_overwrite=True)

    run()
    assert (tmp_path / 'latest-rank0.pt').resolve().name == 'ep0-ba3-rank0.pt'
    name = tmp_path / 'bag3-to-bag1' / 'ep0-ba2-rank0.pt'
    whole = torch.load(name, weights_only=False)['state']
    name.write_bytes(b'half')
    run()
    again = torch.load(name, weights_only=False)['state']
    assert again['timestamp']['Timestamp']['batch'] == 2
    for key in ('model', 'optimizers', 'schedulers', 'timestamp', 'algorithms'):
        assert_same(again[key], whole[key], key)
    assert {path.name for path in tmp_path.glob('bag*/*')} == {'ep0-ba2-rank0.pt'}


def test_without_a_save_folder_it_says_where_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    train(TokenSuperposition(3, '2ba'), run_name='own')
    # In the log, if an earlier test has turned that on.
    said = capsys.readouterr().err + caplog.text
    assert 'save_folder is not set, so checkpoints go to own/checkpoints.' in said
    assert saved(tmp_path) == {'own/checkpoints/bag3-to-bag1/ep0-ba2-rank0.pt'}


def test_a_folder_named_by_a_logger(tmp_path: Path):
    pytest.importorskip('mlflow')  # which llm-foundry brings
    logger = MLFlowLogger(experiment_name='x', tracking_uri=str(tmp_path / 'mlflow'), synchronous=True)
    named = f'{tmp_path}/{{mlflow_experiment_id}}/{{mlflow_run_id}}/{{run_name}}'
    train(TokenSuperposition(3, '2ba'), loggers=[logger], save_folder=named, run_name='named')
    folder = tmp_path / str(logger._experiment_id) / str(logger._run_id) / 'named'
    assert saved(folder) >= {'bag3-to-bag1/ep0-ba2-rank0.pt'}


@pytest.mark.slow
def test_a_bucket_as_a_whole(
    s3_server: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """And nothing of a checkpoint of a phase stays on the disk."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    settings = {'save_interval': '3ba', 'save_num_checkpoints_to_keep': 0, 'save_overwrite': True}
    train(TokenSuperposition(3, '2ba'), save_folder=f's3://{BUCKET}', save_filename='last.pt', **settings)
    client = boto3.client('s3', endpoint_url=s3_server)
    client.download_file(BUCKET, 'bag3-to-bag1/ep0-ba2-rank0.pt', str(tmp_path / 'saved'))
    assert torch.load(tmp_path / 'saved', weights_only=False)['state']['timestamp']['Timestamp']['batch'] == 2
    assert not list(tmp_path.rglob('*.pt'))
