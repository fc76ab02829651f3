"""Parallelism: real processes through the composer launcher, from one llm-foundry YAML."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from common import REPO, SEQ_LEN, VOCAB_SIZE
from common.parallel_runs import CASES, counts_of_epochs, run

pytestmark = pytest.mark.streaming

RUN = [
    f'max_seq_len={SEQ_LEN}',
    f'model.vocab_size={VOCAB_SIZE}',
    'model.d_model=16',
    'model.n_heads=2',
    'global_train_batch_size=8',
    'device_train_microbatch_size=2',
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


YAMLS = [str(REPO / 'yamls' / 'quickstart' / name) for name in ('tst.yaml', 'baseline.yaml')]
EVAL_ROWS = 8


@pytest.fixture(scope='module')
def on_two(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all runs came to on two processes."""
    output = tmp_path_factory.mktemp('parallel') / 'results.json'
    composer = [str(Path(sys.executable).parent / 'composer'), '-n', '2']
    script = [str(REPO / 'tests/common/parallel_runs.py'), str(output), *YAMLS]
    path = os.pathsep.join(map(str, (REPO, REPO / 'tests')))
    launched = subprocess.run(
        [*composer, *script, *RUN, f'variables.data={dataset}', f'device_eval_batch_size={EVAL_ROWS // 2}'],
        capture_output=True,
        text=True,
        cwd=output.parent,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'COLUMNS': '500', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': path},
    )
    assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize('name', CASES)
def test_every_kind_of_parallelism_trains_as_a_single_process(
    name: str, on_two: dict[str, Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same samples in a step, so the same losses and weights, superposed and after the switch."""
    two, other = on_two['runs'][name], CASES[name].equals
    if other is not None:
        one = on_two['runs'][other]
    else:
        monkeypatch.chdir(tmp_path)
        place = [f'variables.data={dataset}', f'device_eval_batch_size={EVAL_ROWS}']
        one = run(YAMLS[0], [*RUN, *place, *CASES[name].overrides])
    assert len(two['losses']) == 4
    assert two['counts'] == one['counts']
    assert two['counts']['s_tokens'] == [8 * SEQ_LEN * step for step in range(1, 5)]
    assert two['losses'] == pytest.approx(one['losses'], rel=1e-4)
    assert two['eval'] == pytest.approx(one['eval'], rel=1e-4)
    assert two['weights'].keys() == one['weights'].keys()
    for key, value in one['weights'].items():
        assert two['weights'][key] == pytest.approx(value, rel=1e-3), key


def test_what_is_left_out_and_dropped_is_counted_over_all_ranks(on_two: dict[str, Any]):
    """And the plan, that shares of epochs are placed by, is that of one process."""
    assert on_two['counts of epochs'] == on_two['counts of epochs, added later'] == counts_of_epochs()
    # 5 batches an epoch: a step of 4 and one that is left out; of 3 epochs 2 steps of 6 or 7.
    counts = on_two['counts of epochs']
    assert counts['bag_size'][:2] == [4, 4]
    assert counts['samples_left_out'][:2] == [4, 8]
    assert counts['data_tokens'][0] == 16 * 8
    assert counts['s_tokens'][0] == 16 * 2


def test_an_epoch_ends_for_all_ranks_where_it_ends_for_one(on_two: dict[str, Any]):
    # 10 loader batches on the one and 6 on the other: 2 steps, then 1 and 3.
    assert on_two['epochs of unequal length'] == [3, 3, 3, 1, 1, 1, 1, 1]


def test_a_run_whose_ranks_read_the_same_rows_resumes(on_two: dict[str, Any]):
    whole, resumed = on_two['replicated rows']
    # 12 loader batches an epoch: 3 steps of 3 and 3 plain ones, then 12 plain ones.
    assert len(whole) == 6 + 12
    assert resumed == whole[2:]


def test_a_loss_that_reduces_over_ranks_is_called_equally_often_on_each(on_two: dict[str, Any]):
    # Else the ranks reduce other things, and the launch dies or hangs.
    assert len(on_two['a loss of all ranks']) == 4


def test_sequence_ids_reach_the_attention(on_two: dict[str, Any]):
    runs = on_two['runs']
    for packed, plain in zip(runs['ddp, packed, uneven microbatches']['losses'], runs['ddp']['losses'], strict=True):
        assert packed != pytest.approx(plain, rel=1e-5)


def test_a_step_calls_no_collective_that_a_plain_step_does_not(on_two: dict[str, Any]):
    collectives = on_two['collectives']
    assert len(collectives) == 3
    for name, (superposed, plain) in collectives.items():
        assert superposed == plain, name
        assert sum(plain.values()) > 8, name


def test_an_embedding_that_tensor_parallelism_has_divided_is_refused(on_two: dict[str, Any]):
    assert 'is divided by tensor parallelism' in on_two['tensor parallel embedding']
