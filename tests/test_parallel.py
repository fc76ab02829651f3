"""Parallelism: real processes through the composer launcher, from one llm-foundry YAML."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, SEQ_LEN, VOCAB_SIZE
from parallel_runs import CASES

RUN = [
    f'max_seq_len={SEQ_LEN}',
    f'model.vocab_size={VOCAB_SIZE}',
    'model.d_model=16',
    'model.n_heads=2',
    'global_train_batch_size=8',
    'device_train_microbatch_size=2',
    'device_eval_batch_size=4',
    'eval_subset_num_batches=2',
    'eval_interval=2ba',
    'save_folder=null',
    'autoresume=false',
    'optimizer.lr=0.01',
    'scheduler.t_warmup=1ba',
    'max_duration=4ba',
    'algorithms.token_superposition.phases=[{bag_size: 2, until: 2ba}]',
    'algorithms.token_superposition.expand=batch',
    'loggers={inmemory: {}}',
    'python_log_level=warn',
]


def launch(processes: int, folder: Path, dataset: Path) -> dict[str, Any]:
    yamls = [str(REPO / 'yamls' / 'quickstart' / name) for name in ('tst.yaml', 'baseline.yaml')]
    script = [str(Path(__file__).parent / 'parallel_runs.py'), str(folder), *yamls]
    composer = [str(Path(sys.executable).parent / 'composer'), '-n', str(processes)]
    run = subprocess.run(
        [*composer, *script, *RUN, f'variables.data={dataset}'],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'COLUMNS': '500'},
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads((folder / f'ranks{processes}.json').read_text())


@pytest.fixture(scope='module')
def results(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp('parallel')
    return {processes: launch(processes, folder, dataset) for processes in (1, 2)}


@pytest.mark.parametrize('name', CASES)
def test_every_kind_of_parallelism_trains_as_a_single_process(name: str, results: dict[int, dict[str, Any]]):
    """The same samples in a step, so the same losses and weights, superposed and after the switch."""
    two = results[2]['runs'][name]
    other = CASES[name].equals
    one = results[1]['runs'][name] if other is None else results[2]['runs'][other]
    assert len(two['losses']) == 4
    assert two['losses'] == pytest.approx(one['losses'], rel=1e-4)
    assert two['eval'] == pytest.approx(one['eval'], rel=1e-4)
    assert two['weights'].keys() == one['weights'].keys()
    for key, value in one['weights'].items():
        assert two['weights'][key] == pytest.approx(value, rel=1e-3), key


def test_a_step_calls_no_collective_that_a_plain_step_does_not(results: dict[int, dict[str, Any]]):
    collectives = results[2]['collectives']
    assert len(collectives) == 3
    for name, (superposed, plain) in collectives.items():
        assert superposed == plain, name
        assert sum(plain.values()) > 8, name


def test_an_embedding_that_tensor_parallelism_has_divided_is_refused(results: dict[int, dict[str, Any]]):
    assert 'is divided by tensor parallelism' in results[2]['tensor parallel embedding']
