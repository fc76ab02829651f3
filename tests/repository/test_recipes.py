"""yamls/pretrain and launch: the published models, by count and name, and a few real steps of each YAML."""

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import REPO, SEQ_LEN, VOCAB_SIZE
from composer import Trainer
from llmfoundry.command_utils import train
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import no_init_weights
from typer.testing import CliRunner

from composer_tst.cli.plan.command import app

pytestmark = pytest.mark.streaming

RECIPES, LAUNCH = REPO / 'yamls' / 'pretrain', REPO / 'yamls' / 'launch'
MODELS = ('270m', '600m', '3b', '10b_a1b')
# Two layers, 16 wide: what is overridden on the command line to try a recipe on a CPU.
TINY = {
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'head_dim': 8,
    'intermediate_size': 32,
}
TINY_EXPERTS = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 8}


NO_WORKERS = (
    *('train_loader.num_workers=0', 'train_loader.prefetch_factor=null', 'train_loader.persistent_workers=false'),
    'train_loader.timeout=0',
)


def load(name: str) -> Any:
    return OmegaConf.load(RECIPES / f'{name}.yaml')


@cache
def parameters(name: str) -> dict[str, int]:
    """The parameters that llm-foundry's `hf_causal_lm` would make, by name, counted on the meta device."""
    config = load(name)
    folder = REPO / config.model.pretrained_model_name_or_path
    settings: Any = OmegaConf.to_container(config.model.config_overrides, resolve=True)
    hf = AutoConfig.from_pretrained(folder)
    assert all(hasattr(hf, name) for name in settings)
    hf.update(settings)
    with torch.device('meta'), no_init_weights():
        model = AutoModelForCausalLM.from_config(hf)
    return {name: weight.numel() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ('name', 'published', 'sum_by_hand'),
    [
        # Embedding and head, then layers of attention, MLP and two norms, and the last norm.
        ('270m', 270e6, 2 * 128256 * 576 + 30 * (4 * 576**2 + 3 * 576 * 1536 + 2 * 576) + 576),
        ('600m', 600e6, 2 * 128256 * 960 + 32 * (4 * 960**2 + 3 * 960 * 2560 + 2 * 960) + 960),
        # SmolLM3-3B's 3.08B, and a head of its own.
        (
            '3b',
            3.08e9 + 128256 * 2048,
            2 * 128256 * 2048 + 36 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 11008 + 2 * 2048) + 2048,
        ),
        # Norms of queries and keys, and a router over 128 experts.
        (
            '10b_a1b',
            10e9,
            2 * 128256 * 1024
            + 28 * (2 * 1024 * 2048 + 2 * 1024 * 512 + 2 * 128 + 128 * (1024 + 3 * 1024 * 864) + 2 * 1024)
            + 1024,
        ),
    ],
)
def test_a_recipe_has_the_parameters_its_model_is_named_for(name: str, published: float, sum_by_hand: int):
    assert sum(parameters(f'{name}_baseline').values()) == sum_by_hand
    assert sum_by_hand == pytest.approx(published, rel=0.02)


def test_the_mixture_has_its_name_in_active_parameters_too():
    count = parameters('10b_a1b_baseline')
    experts = sum(number for name, number in count.items() if '.experts.' in name)
    assert sum(count.values()) - experts + experts * 8 / 128 == pytest.approx(1e9, rel=0.02)


@pytest.mark.parametrize('name', MODELS)
def test_baseline_and_superposition_differ_in_the_method_alone(name: str):
    baseline, tst = load(f'{name}_baseline'), load(f'{name}_tst')
    assert (baseline.pop('run_name'), tst.pop('run_name')) == (f'{name}-baseline', f'{name}-tst')
    settings = tst.algorithms.pop('token_superposition')
    durations = baseline.max_duration, tst.max_duration
    if name == '10b_a1b':
        # Published at equal loss.
        assert (baseline.pop('max_duration'), tst.pop('max_duration')) == ('125000ba', '49983ba')
        assert settings == {'bag_size': 16, 'duration': '12483ba'}
    else:
        assert durations == ('20000ba', '20000ba')
        assert settings == {'bag_size': 6, 'duration': '0.3dur'}
    assert baseline == tst
    tokens = baseline.global_train_batch_size * baseline.max_seq_len
    assert tokens == (8 if name == '10b_a1b' else 2) * 2**20


def trained(config: Any, overrides: list[str]) -> Trainer:
    made = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
    assert isinstance(made, DictConfig)
    return train(made)


@pytest.mark.parametrize('kind', ['baseline', 'tst'])
@pytest.mark.parametrize('name', MODELS)
def test_a_recipe_trains_on_a_cpu_with_its_sizes_overridden(name: str, kind: str, dataset: Path, tmp_path: Path):
    sizes = TINY | (TINY_EXPERTS if name == '10b_a1b' else {})
    overrides = [
        *(f'model.config_overrides.{key}={value}' for key, value in sizes.items()),
        f'variables.model_config={REPO / load(f"{name}_{kind}").variables.model_config}',
        f'variables.data={dataset}',
        f'variables.cache={tmp_path / "cache"}',
        f'variables.tokenizer={dataset / "tokenizer"}',
        f'variables.vocab_size={VOCAB_SIZE}',
        f'variables.save={tmp_path}',
        f'variables.logs={tmp_path / "logs"}',
        f'max_seq_len={SEQ_LEN}',
        'max_duration=4ba',
        'scheduler.t_warmup=1ba',
        *('model.init_device=cpu', 'fsdp_config=null', 'precision=fp32'),
        *('global_train_batch_size=2', 'device_train_microbatch_size=2', 'device_eval_batch_size=2'),
        *('eval_interval=4ba', 'eval_subset_num_batches=1', 'save_interval=4ba', 'log_to_console=false'),
        *NO_WORKERS,
        *(line.replace('train', 'eval') for line in NO_WORKERS if 'timeout' not in line),
    ]
    if kind == 'tst':
        overrides += ['algorithms.token_superposition.bag_size=2', 'algorithms.token_superposition.duration=0.5dur']
    trainer = trained(load(f'{name}_{kind}'), overrides)
    assert trainer.state.timestamp.batch == 4
    assert trainer.state.timestamp.sample == 2 * (2 + 2 + 1 + 1 if kind == 'tst' else 4)
    assert all(torch.isfinite(weight).all() for weight in trainer.state.model.parameters())
    assert (tmp_path / f'{name}-{kind}' / 'checkpoints').is_dir()
    trainer.close()


def test_the_five_lines_of_the_readme_fit_runs_of_any_length(
    tiny_quickstart: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """In a YAML that has another scheduler and no algorithm."""
    (lines,) = re.findall(r'^```yaml\n(.+?)^```', (REPO / 'README.md').read_text(), re.M | re.S)
    config: Any = OmegaConf.load(REPO / 'yamls' / 'quickstart' / 'baseline.yaml')
    config.scheduler = {'name': 'cosine_with_warmup', 't_warmup': '100ba', 'alpha_f': 0.1}
    config |= yaml.safe_load(lines)
    sizes = [override for override in tiny_quickstart if not override.startswith('scheduler')]
    place = [f'variables.folder={tmp_path}', f'save_folder={tmp_path}/checkpoints', 'autoresume=false']
    trainer = trained(config, [*sizes, *place, 'max_duration=20ba', 'save_interval=20ba'])
    assert trainer.state.timestamp.sample == 4 * (6 * 6 + 14)
    assert [path.name for path in (tmp_path / 'checkpoints').glob('bag*')] == ['bag6-to-bag1']
    shown = ''.join(capfd.readouterr())
    assert 'Superposition until step 6 of 20' in shown
    assert 'WARNING: composer_tst' not in shown
    trainer.close()
    OmegaConf.save(config, tmp_path / 'run.yaml')
    for steps in (600, 4_800, 100_000):
        result = CliRunner().invoke(app, [str(tmp_path / 'run.yaml'), f'max_duration={steps}ba', '--json'])
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)
        assert plan['phases'][0]['steps'] == 0.3 * steps
        assert plan['remarks'] == []


def test_the_launch_template_trains_with_its_sizes_overridden(dataset: Path, tmp_path: Path):
    cache = tmp_path / 'cache'
    cache.mkdir()
    (cache / 'tokenizer').symlink_to(dataset / 'tokenizer')
    overrides = [
        *('model.d_model=16', 'model.n_heads=2', 'model.n_layers=1', f'model.vocab_size={VOCAB_SIZE}'),
        *('model.init_device=cpu', 'model.attn_config.attn_impl=torch', 'model.norm_type=layernorm'),
        *(f'variables.data={dataset}', f'variables.cache={cache}', f'variables.save={tmp_path}/runs'),
        *('train_loader.dataset.validate_hash=null', 'fsdp_config=null', 'precision=fp32', *NO_WORKERS),
        *(f'max_seq_len={SEQ_LEN}', 'max_duration=10ba', 'scheduler.t_warmup=1ba', 'save_interval=5ba'),
        *('global_train_batch_size=2', 'device_train_microbatch_size=2'),
        f'loggers.tensorboard.log_dir={tmp_path}',
    ]
    trainer = trained(OmegaConf.load(LAUNCH / 'train.yaml'), overrides)
    assert trainer.state.timestamp.sample == 2 * (3 * 6 + 7)
    # One checkpoint is kept, and that of the switch beside it.
    files = sorted(
        path.name for path in (tmp_path / 'runs' / 'checkpoints').rglob('*-rank0.pt') if not path.is_symlink()
    )
    assert files == ['ep0-ba10-rank0.pt', 'ep0-ba3-rank0.pt']


def test_the_launch_files_are_what_their_programs_read():
    subprocess.run(['bash', '-n', str(LAUNCH / 'slurm.sh')], check=True)
    service, job = yaml.safe_load_all((LAUNCH / 'kubernetes.yaml').read_text())
    (container,) = job['spec']['template']['spec']['containers']
    (script,) = container['args']
    subprocess.run(['bash', '-n'], input=script, text=True, check=True)
    # Every node finds the first by the name that the service gives it.
    assert f'--master_addr {job["metadata"]["name"]}-0.{service["metadata"]["name"]} ' in script
    assert job['spec']['template']['spec']['subdomain'] == service['metadata']['name']
    ranks = job['spec']['completions'] * container['resources']['limits']['nvidia.com/gpu']
    assert f'--world_size {ranks} ' in script
    mounted = {mount['name'] for mount in container['volumeMounts']}
    assert mounted == {volume['name'] for volume in job['spec']['template']['spec']['volumes']}
