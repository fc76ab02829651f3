"""What is saved loads where the package is not installed."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from common import REPO
from common.runs import ROW_LENGTH, VOCAB_SIZE, Run, assert_same_end, checkpoint, config, drawn, write_rows
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig

pytestmark = pytest.mark.streaming


def without_package(folder: Path) -> dict[str, str]:
    """The environment of an interpreter that has every installed package but this one."""
    for name in ('purelib', 'platlib'):
        for path in Path(sysconfig.get_paths()[name]).iterdir():
            link = folder / path.name
            if 'composer_tst' not in path.name and not link.exists():
                link.symlink_to(path)
    return os.environ | {'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1', 'COLUMNS': '500'}


@pytest.fixture(scope='module')
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('llama')
    settings: dict[str, Any] = {
        'hidden_size': 16,
        'intermediate_size': 32,
        'num_hidden_layers': 1,
        'num_attention_heads': 2,
    }
    LlamaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=1, max_position_embeddings=64, **settings).save_pretrained(
        folder
    )
    return folder


@pytest.mark.faults
def test_checkpoints_and_exports_need_no_package(llama: Path, tmp_path: Path):
    """A run whose bags end at batch 2; one whose bags go on, saved at batch 2; plain runs from both of these."""
    write_rows(tmp_path / 'data', 58)
    (tmp_path / 'plain').mkdir()
    (tmp_path / 'packages').mkdir()

    def settings(name: str, **overrides: Any) -> dict[str, Any]:
        base = {
            'model': {
                'name': 'hf_causal_lm',
                'pretrained_model_name_or_path': str(llama),
                'pretrained': False,
                'use_flash_attention_2': False,
            },
            'max_duration': '8ba',
            'scheduler': {'name': 'constant_with_warmup', 't_warmup': '2ba'},
        }
        return config(tmp_path / 'data', tmp_path / name, **(base | overrides))

    def superposed(name: str, until: str) -> Path:
        algorithm = {'token_superposition': {'bag_size': 3, 'duration': until, 'weighting': [1, 0.5, 0.25]}}
        export = {'save_folder': str(tmp_path / name / 'hf'), 'save_interval': '2ba'}
        made = settings(name, algorithms=algorithm, callbacks__hf_checkpointer=export)
        Run(made, tmp_path / name / 'log').wait()
        return tmp_path / name

    short, long = superposed('short', '2ba'), superposed('long', '5ba')
    for name, start in [('from-superposed', checkpoint(long, 2)), ('from-recovery', checkpoint(short, 5))]:
        made = settings(name, algorithms=None, callbacks=None, load_path=str(start))
        OmegaConf.save(OmegaConf.create(made), tmp_path / 'plain' / f'{name}.yaml')
    exports = long / 'hf' / 'huggingface'
    torch.save(torch.randint(2, VOCAB_SIZE, (2, ROW_LENGTH)), exports / 'ids.pt')

    run = subprocess.run(
        # -S: no site-packages but those of PYTHONPATH
        [sys.executable, '-S', str(REPO / 'tests/common/without_package.py'), str(tmp_path / 'plain'), str(exports)],
        env=without_package(tmp_path / 'packages'),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]

    for name in ('from-superposed', 'from-recovery'):
        assert_same_end(tmp_path / name, short, ignore=['algorithms'])
    assert len(drawn(short)) == 8

    saved = {path.name for path in exports.iterdir() if path.is_dir()}
    assert {'ba2', 'ba4', 'ba6', 'ba8'} <= saved
    for batch in (2, 4, 6, 8):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(llama)).eval()
        state = torch.load(checkpoint(long, batch), weights_only=False)['state']['model']
        model.load_state_dict({key.removeprefix('model.'): value for key, value in state.items()})
        with torch.no_grad():
            expected = model(torch.load(exports / 'ids.pt')).logits
        assert torch.equal(torch.load(exports / f'ba{batch}' / 'logits.pt'), expected)
