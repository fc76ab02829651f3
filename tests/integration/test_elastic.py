"""A run saved on some ranks goes on with others: the same samples in the same order, with the same global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from common.runs import Run, assert_same, checkpoint, config, drawn_by_all, write_rows
from composer import Trainer
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.utils.builders import (
    build_algorithm,
    build_callback,
    build_composer_model,
    build_optimizer,
    build_tokenizer,
)
from omegaconf import OmegaConf
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytestmark = pytest.mark.streaming

# A bias of the keys has no gradient but rounding, which Adam makes a step of.
NO_BIAS = {'model__no_bias': True}
# Gloo sums the gradients that FSDP2 asks it to average: clipped to one length they are the same on any ranks.
CLIPPING = {'clipping_type': 'norm', 'clipping_threshold': 0.01}
Steps = dict[tuple[int, int], list[int]]


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('rows')
    write_rows(folder, 58)
    return folder


def since(batch: int, steps: Steps) -> Steps:
    return {at: rows for at, rows in steps.items() if at[1] >= batch}


def test_ranks_may_change_between_the_checkpoint_and_the_run(data: Path, tmp_path: Path):
    """Rows are folded by themselves here: which rows are joined depends on the ranks that they are dealt to."""

    def run(name: str, ranks: int, load: Path | None = None) -> Path:
        settings = {
            'algorithms__token_superposition__expand': 'batch',
            'device_train_microbatch_size': 2,
            **NO_BIAS,
            'load_path': load and str(load),
        }
        Run(config(data, tmp_path / name, **settings), tmp_path / name / 'log', ranks).wait()
        return tmp_path / name

    one, two = run('one', 1), run('two', 2)
    steps = drawn_by_all(one, 1)
    assert drawn_by_all(two, 2) == steps
    to_one, to_two = run('to-one', 1, checkpoint(two, 2)), run('to-two', 2, checkpoint(one, 4))
    assert drawn_by_all(to_one, 1) == since(2, steps)
    assert drawn_by_all(to_two, 2) == since(4, steps)
    expected = weights(torch.load(checkpoint(one), weights_only=False))
    for folder in (two, to_one, to_two):
        assert_close(weights(torch.load(checkpoint(folder), weights_only=False)), expected)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal but for the order that ranks are summed in."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def weights(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    return saved['state']['model']


@pytest.mark.faults
def test_a_sharded_checkpoint_is_loaded_by_other_ranks(data: Path, tmp_path: Path):
    def run(name: str, ranks: int, load: Path | None = None) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / name
        settings = {
            'algorithms__token_superposition__expand': 'batch',
            'algorithms__gradient_clipping': CLIPPING,
            'load_path': load and str(load),
            **NO_BIAS,
        }
        made = config(data, folder, **settings)
        Run(made, folder / 'log', ranks, {'FSDP_VERSION': '2'}, train=train_sharded).wait()
        (last,) = (folder / 'checkpoints').glob('ep*-ba14')
        dcp_to_torch_save(str(last), folder / 'last.pt')
        return folder, torch.load(folder / 'last.pt', weights_only=False)

    def saved(folder: Path, batch: int) -> Path:
        (found,) = (folder / 'checkpoints').glob(f'ep*-ba{batch}')
        return found

    two, expected = run('two', 2)
    assert len(list(saved(two, 2).glob('*.distcp'))) == 2
    steps = drawn_by_all(two, 2)

    again, end = run('again', 2, saved(two, 4))
    assert drawn_by_all(again, 2) == since(4, steps)
    assert_same(end['state']['model'], expected['state']['model'], 'model')
    assert_same(end['state']['optimizers'], expected['state']['optimizers'], 'optimizers')

    one, end = run('one', 1, saved(two, 2))
    assert drawn_by_all(one, 1) == since(2, steps)
    assert_close(weights(end), weights(expected))

    back, end = run('back', 2, saved(one, 5))
    assert drawn_by_all(back, 2) == since(5, steps)
    assert_close(weights(end), weights(expected))


def train_sharded(yaml: str) -> Trainer:
    """What `llmfoundry train` does with FSDP, which it drops on one rank."""
    from composer.utils import dist, get_device

    made = OmegaConf.to_container(OmegaConf.load(yaml))
    assert isinstance(made, dict)
    made = {str(key): value for key, value in made.items()}
    dist.initialize_dist(get_device('cpu'))
    tokenizer = build_tokenizer(made['tokenizer']['name'], made['tokenizer']['kwargs'])
    name = made['model'].pop('name')
    model = build_composer_model(name, made['model'], tokenizer)
    name = made['optimizer'].pop('name')
    trainer = Trainer(
        model=model,
        train_dataloader=build_dataloader(made['train_loader'], tokenizer, 4 // dist.get_world_size()),
        optimizers=build_optimizer(model, name, made['optimizer']),
        algorithms=[build_algorithm(name, settings) for name, settings in made['algorithms'].items()],
        callbacks=[build_callback(name, settings) for name, settings in made['callbacks'].items()],
        parallelism_config={'fsdp': {'state_dict_type': 'sharded'}},
        device='cpu',
        **{
            key: made[key]
            for key in ('run_name', 'seed', 'max_duration', 'save_folder', 'save_interval', 'load_path')
            if key in made
        },
    )
    trainer.fit()
    return trainer
