"""One full checkpoint at every change of bag size."""

from pathlib import Path

import pytest
import torch
from trainers import llama, make_trainer, random_loader

from composer_tst import PhaseCheckpointer, TokenSuperposition


def saved(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*.pt') if not path.is_symlink()}


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
    trainer, _ = make_trainer(
        llama(),
        random_loader(),
        TokenSuperposition(phases=phases),
        '7ba',
        callbacks=[PhaseCheckpointer()],
        save_folder=str(tmp_path),
        save_interval='100ba',
    )
    trainer.fit()
    trainer.close()
    assert expected <= saved(tmp_path)
    assert {name for name in saved(tmp_path) if 'bag' in name} == expected
    for name in expected:
        state = torch.load(tmp_path / name, weights_only=False)['state']
        assert {'model', 'optimizers', 'timestamp', 'algorithms'} <= set(state)


def test_it_needs_superposition(tmp_path: Path):
    with pytest.raises(ValueError, match='add token_superposition to algorithms'):
        make_trainer(llama(), random_loader(), callbacks=[PhaseCheckpointer()], save_folder=str(tmp_path))
