"""The examples, for a few steps: they train, and what each says of itself is true."""

import copy
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import REPO

from composer_tst import functional as F_tst

EXAMPLES = REPO / 'examples'


def launch(*command: str, **settings: str) -> str:
    """What a command prints, run with one thread and no GPU."""
    environment = os.environ | {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'} | settings
    result = subprocess.run(
        [sys.executable, *command], cwd=REPO, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def torchrun(*command: str) -> str:
    """What a script prints on two processes. Without a GPU, accelerate must be told that they belong together."""
    start = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    return launch(*start, *command, ACCELERATE_USE_CPU='true')


def functions_of(name: str) -> Any:
    """What an example defines."""
    return runpy.run_path(str(EXAMPLES / name), run_name='example')


def test_the_plain_loop_trains_with_torch_alone():
    code = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('composer', 'streaming', 'transformers', 'llmfoundry', 'wrapt', 'omegaconf'):
            raise ModuleNotFoundError('refused: ' + name, name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    output = launch('-c', code, str(EXAMPLES / 'plain_pytorch.py'), '20')
    lines = re.findall(r'step (\d+) \((.+)\): train loss (.+), validation loss (.+)', output)
    assert [line[:2] for line in lines] == [('6', 'bags of 6'), ('20', 'plain')]
    at_the_switch, at_the_end = (float(line[3]) for line in lines)
    assert at_the_end < at_the_switch < math.log(256)


def test_fsdp2_trains_on_two_processes_as_one_process_on_the_rows_of_both():
    output = torchrun(str(EXAMPLES / 'fsdp2.py'), '10')
    lines = re.findall(r'step (\d+) \((.+)\): train loss (.+)', output)
    assert [kind for _, kind, _ in lines] == ['bags of 6'] * 3 + ['plain'] * 7

    example = functions_of('fsdp2.py')
    torch.manual_seed(0)
    model = example['Model']()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    ranks = [F_tst.draw(example['batches_of'](rank, 2), lambda step: 6 if step < 3 else 1) for rank in (0, 1)]
    losses = []
    for batches in zip(*ranks, strict=True):
        loss = torch.zeros(())
        for batch, size in zip(batches, (rank.bag_size for rank in ranks), strict=True):
            folded = F_tst.fold_batch(batch, size)
            with F_tst.superposed(model, folded, model.tokens) as inputs:
                logits = model(**inputs)
                loss_of_rank = F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
                (loss_of_rank / 2).backward()
            loss += loss_of_rank.detach() / 2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        if len(losses) == len(lines):
            break
    assert [float(loss) for _, _, loss in lines] == pytest.approx(losses, abs=1e-3)
    assert losses[2] < losses[0]
    assert losses[-1] < losses[3]


@pytest.fixture(scope='module')
def hf() -> Any:
    pytest.importorskip('accelerate')
    return functions_of('hf_trainer.py')


# One thread, one seed, quiet; 3 of 10 steps are superposed.
STEPS = 10
QUIET: dict[str, Any] = {
    'use_cpu': True, 'disable_tqdm': True, 'eval_strategy': 'no', 'save_strategy': 'no', 'logging_steps': 1
}  # fmt: skip


def losses_of(trainer: Any) -> list[float]:
    return [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.model.state_dict())


def test_hf_trainer_counts_and_evaluates(hf: Any, tmp_path: Path):
    import transformers

    trainer = hf['make_trainer'](str(tmp_path), STEPS, **(QUIET | {'eval_strategy': 'steps', 'eval_steps': 3}))
    trainer.train()
    evaluated = [entry['eval_loss'] for entry in trainer.state.log_history if 'eval_loss' in entry]
    assert evaluated[-1] < evaluated[0] < math.log(256)
    # 2 microbatches of 8 rows of 64 bytes, 6 times as many in the superposed steps.
    assert trainer.state.num_input_tokens_seen == (3 * 6 + 7) * 2 * 8 * 64
    positions = {'input_ids': torch.zeros(STEPS * 2 * 8, 64)}
    assert trainer.state.total_flos == transformers.Trainer.floating_point_ops(trainer, positions)
    # The evaluation is next-byte prediction, by the model itself.
    rows = torch.stack([row['input_ids'] for row in trainer.eval_dataset])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=rows).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert trainer.evaluate()['eval_loss'] == pytest.approx(float(expected), rel=1e-3)


def test_hf_trainer_trains_as_a_loop_without_it(hf: Any, tmp_path: Path):
    settings = QUIET | {'lr_scheduler_type': 'constant', 'lr_scheduler_kwargs': {}, 'warmup_steps': 0}
    trainer = hf['make_trainer'](str(tmp_path), STEPS, max_grad_norm=0.0, **settings)
    model = copy.deepcopy(trainer.model).train()
    trainer.train()
    order = hf['shuffled'](len(trainer.train_dataset), 42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        size = 6 if step < 3 else 1
        rows = torch.stack([trainer.train_dataset[next(order)]['input_ids'] for _ in range(16 * size)])
        folded = F_tst.fold_batch({'input_ids': rows}, size)
        embeddings = model.get_input_embeddings()(folded['input_ids']).mean(2)  # by the definition
        logits = model(inputs_embeds=embeddings).logits
        loss = F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses_of(trainer) == pytest.approx(losses, abs=1e-3)  # the log has four digits


def test_hf_trainer_accumulates(hf: Any, tmp_path: Path):
    runs = [
        hf['make_trainer'](
            str(tmp_path), STEPS, per_device_train_batch_size=16 // parts, gradient_accumulation_steps=parts, **QUIET
        )
        for parts in (1, 2)
    ]
    for trainer in runs:
        trainer.train()
    whole, parts = runs
    assert losses_of(parts) == pytest.approx(losses_of(whole), abs=2e-3)
    assert parts.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(parts)[name], weight, rtol=0, atol=2e-4, msg=name)


class Killed(Exception):
    pass


@pytest.mark.parametrize('step', [2, 3, 6])  # superposed, at the switch, in recovery
def test_hf_trainer_resumes_to_the_bit(hf: Any, tmp_path: Path, step: int):
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
            if state.global_step == step + 1:
                raise Killed

    # Dropout makes the run depend on random numbers too.
    def make(folder: str, **settings: Any) -> Any:
        trainer = hf['make_trainer'](str(tmp_path / folder), STEPS, **(QUIET | settings))
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return trainer

    uninterrupted = make('whole')
    uninterrupted.train()
    saving = {'save_strategy': 'steps', 'save_steps': step}
    killed = make('killed', **saving)
    killed.add_callback(Kill())
    with pytest.raises(Killed):
        killed.train()
    resumed = make('killed', **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.num_input_tokens_seen == uninterrupted.state.num_input_tokens_seen
    assert losses_of(resumed) == losses_of(uninterrupted)
    for name, weight in weights_of(uninterrupted).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


def test_the_loop_of_the_readme_trains():
    transformers = pytest.importorskip('transformers')
    page = (REPO / 'README.md').read_text()
    (loop,) = [code for code in re.findall(r'^```python\n(.+?)^```', page, re.M | re.S) if 'F_tst.draw' in code]
    torch.manual_seed(0)
    sizes = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    before = copy.deepcopy(model.state_dict())
    names: dict[str, Any] = {
        'model': model,
        'optimizer': torch.optim.AdamW(model.parameters()),
        'loader': [{'input_ids': torch.randint(64, (2, 12))} for _ in range(6 * 3 + 4)],
        'sizes': [],
    }
    exec(loop.replace('6000', '3') + '    sizes.append(batches.bag_size)\n', names)
    assert names['sizes'] == [6, 6, 6, 1, 1, 1, 1]
    assert all(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_hf_trainer_on_two_processes_trains_as_on_one(hf: Any, tmp_path: Path):
    torchrun(str(EXAMPLES / 'hf_trainer.py'), str(tmp_path / 'two'), str(STEPS))
    two = json.loads((tmp_path / 'two' / f'checkpoint-{STEPS}' / 'trainer_state.json').read_text())
    one = hf['make_trainer'](
        str(tmp_path / 'one'), STEPS, per_device_train_batch_size=16, **(QUIET | {'logging_steps': 2})
    )
    one.train()
    assert [entry['loss'] for entry in two['log_history'] if 'loss' in entry] == pytest.approx(losses_of(one), abs=2e-3)
    assert two['num_input_tokens_seen'] == one.state.num_input_tokens_seen


def test_composer_script_trains_evaluates_and_saves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    pytest.importorskip('composer')
    trainer = functions_of('composer_script.py')['make_trainer'](str(tmp_path), 20)
    trainer.fit()
    assert (tmp_path / 'bag6-to-bag1' / 'ep0-ba6-rank0.pt').exists()
    said = ''.join((*capfd.readouterr(), caplog.text))  # a run before may have told logging to show it
    assert 'read 51,200 data tokens in 20,480 positions' in said
    (metric,) = trainer.state.eval_metrics['eval'].values()
    at_the_end = float(metric.compute())
    trainer.state.model.load_state_dict(
        torch.load(tmp_path / 'bag6-to-bag1' / 'ep0-ba6-rank0.pt', weights_only=False)['state']['model']
    )
    trainer.eval()
    at_the_switch = float(metric.compute())
    assert at_the_end < at_the_switch < math.log(256)
