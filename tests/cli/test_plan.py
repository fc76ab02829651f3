"""`composer-tst plan` against sums written out by hand."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import REPO
from composer.core import Time
from omegaconf import OmegaConf
from typer.testing import CliRunner, Result

from composer_tst.cli.plan.command import app
from composer_tst.cli.plan.config import Run
from composer_tst.cli.plan.expected import expect
from composer_tst.cli.plan.forecast import SWEEP_BAGS, SWEEP_SHARES
from composer_tst.cli.plan.measured import DEVIATIONS, Measured, is_sure, same_bags
from composer_tst.cli.plan.model import Model
from composer_tst.cli.plan.units import si, span, times
from composer_tst.cli.plan.verdict import GAINS, REFUSED, UNKNOWN, WORSE, Verdict, judge
from composer_tst.settings import Phase

QUICKSTART = REPO / 'yamls' / 'quickstart'
PRETRAIN = REPO / 'yamls' / 'pretrain'
# The quickstart's model: width 128, 2 layers, vocabulary 2048, untied, no biases, RMS norms; rows of 64, 16 a step.
EMBEDDING = 2048 * 128
LAYER = 128 * 3 * 128 + 128 * 128 + 2 * 128 * 512 + 2 * 128
PARAMETERS = 2 * EMBEDDING + 2 * LAYER + 128


def flops(positions: int, length: int) -> int:
    """6 for every parameter that multiplies, and attention's 12 * layers * width * length, each per position."""
    return positions * (6 * (PARAMETERS - EMBEDDING) + 12 * 2 * 128 * length)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, '--json')
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_run_of_several_phases():
    made = planned(QUICKSTART / 'tst.yaml', '--gpu', 'h100', '--gpus', 2, '--mfu', 0.5)
    assert made['parameters'] == made['active_parameters'] == PARAMETERS
    expected = [(8, 300), (4, 300), (2, 300), (1, 2100)]
    assert made['phases'] == [
        {
            'bag_size': bag,
            'steps': steps,
            'data_tokens': steps * bag * 16 * 64,
            'positions': steps * 16 * 64,
            'flops_per_step': flops(16 * 64, 64),
        }
        for bag, steps in expected
    ]
    assert made['steps'] == 3000
    assert made['superposed_share_of_steps'] == 0.3
    assert made['data_tokens'] == (300 * (8 + 4 + 2) + 2100) * 16 * 64
    assert made['equivalent_tokens'] == pytest.approx(3000 * 16 * 64)
    assert made['shard_bytes'] == 4 * made['data_tokens']
    assert made['hours'] == pytest.approx(3000 * flops(16 * 64, 64) / (2 * 989e12 * 0.5) / 3600)
    # A small MPT is told by the one that was measured; of a large run the grids tell.
    assert made['expected']['source'] == "an MPT of 2.62M parameters on the quickstart's text"
    assert made['expected']['extrapolation'].startswith('the nearest measured model has 2.62M parameters; ')
    phases = '[{bag_size: 8, until: 0.1dur}, {bag_size: 4, until: 0.3dur}]'
    large = planned(PRETRAIN / '270m_baseline.yaml', f'algorithms.token_superposition.phases={phases}')
    assert 'one phase' in large['expected']['extrapolation']


def test_a_share_of_tokens_is_a_smaller_share_of_steps():
    made = planned(
        QUICKSTART / 'baseline.yaml', f'max_duration={1000 * 16 * 64}tok', '--bag-size', 4, '--duration', '0.5dur'
    )
    # Half of the tokens in steps of 4 batches, the other half in steps of one.
    assert [phase['steps'] for phase in made['phases']] == [125, 500]
    assert made['superposed_share_of_steps'] == 0.2
    assert made['data_tokens'] == 1000 * 16 * 64


def test_a_share_of_tokens_is_explained():
    shown = run(
        QUICKSTART / 'baseline.yaml', f'max_duration={1000 * 16 * 64}tok', '--bag-size', 4, '--duration', '0.5dur'
    ).stdout
    assert 'superposed steps    20.0% of all' in shown
    assert '0.5dur of 1024000tok is a share of the data, of which a superposed step reads' in shown
    assert 'is a share of the data' not in run(QUICKSTART / 'tst.yaml').stdout


def test_small_runs_are_in_megabytes_and_minutes():
    shown = run(QUICKSTART / 'baseline.yaml').stdout
    assert re.search(r'^shards +12.3 MB$', shown, re.M)  # 3000 * 16 * 64 tokens of 4 bytes
    assert re.search(r'^time +less than a second on 8 H100', shown, re.M)
    seconds = 3000 * flops(16 * 64, 64) / (8 * 989e12 * 0.4)
    hour = run(QUICKSTART / 'baseline.yaml', '--gpus', 1, '--mfu', seconds * 8 * 0.4 / 600).stdout
    assert re.search(r'^time +10.0 minutes on', hour, re.M)


def test_numbers_are_rounded_before_they_get_a_suffix():
    assert [si(number) for number in (999_400, 999_700, 999_700_000, 1e9, 12)] == ['999k', '1M', '1B', '1B', '12']


@pytest.mark.parametrize(
    ('hours', 'says'),
    [
        *((6.6e-5 / 3600, 'less than a second'), (1 / 3600, 'about a second'), (40 / 3600, '40 seconds')),
        *((1.5, '90.0 minutes'), (30, '30.0 hours'), (100, '4.2 days')),
    ],
)
def test_times_are_those_that_people_read(hours: float, says: str):
    assert span(hours) == says


def test_a_yaml_without_superposition_has_a_verdict_on_the_published_recipe():
    shown = run(QUICKSTART / 'baseline.yaml').stdout
    recipe = '{token_superposition: {bag_size: 6, duration: 0.3dur}}'
    assert f'verdict             No superposition here; with {recipe}: ' in shown
    assert 'No superposition' not in run(QUICKSTART / 'tst.yaml').stdout


def test_what_needs_a_gpus_libraries_is_planned_without_and_written_back(tmp_path: Path):
    stock = ['model.loss_fn=fused_crossentropy', 'model.attn_config={attn_impl: flash}']
    assert planned(QUICKSTART / 'baseline.yaml', *stock)['parameters'] == PARAMETERS
    path = tmp_path / 'new.yaml'
    assert run(QUICKSTART / 'tst.yaml', *stock, '--write', path).exit_code == 0
    made: Any = OmegaConf.load(path)
    assert (made.model.loss_fn, made.model.attn_config.attn_impl) == ('fused_crossentropy', 'flash')
    # llm-foundry's own default is the same loss.
    written = path.read_text().replace('  loss_fn: fused_crossentropy\n', '')
    path.write_text(written)
    assert planned(path)['parameters'] == PARAMETERS


def test_one_setting_is_changed_and_the_other_kept():
    recipe = REPO / 'yamls' / 'pretrain' / '270m_tst.yaml'
    made = planned(recipe, '--bag-size', 8)
    assert [(phase['bag_size'], phase['steps']) for phase in made['phases']] == [(8, 6000), (1, 14000)]
    made = planned(QUICKSTART / 'tst.yaml', '--bag-size', 4, '--duration', '0.2dur')
    assert [(phase['bag_size'], phase['steps']) for phase in made['phases']] == [(4, 600), (1, 2400)]


def test_a_mixture_is_counted_by_its_active_experts():
    made = planned(REPO / 'yamls' / 'pretrain' / '10b_a1b_tst.yaml')
    layer = 2 * 1024 * 2048 + 2 * 1024 * 512 + 2 * 128 + 128 * 1024 + 2 * 1024
    expert = 3 * 1024 * 864
    assert made['parameters'] == 2 * 128256 * 1024 + 28 * (layer + 128 * expert) + 1024
    assert made['active_parameters'] == 2 * 128256 * 1024 + 28 * (layer + 8 * expert) + 1024
    assert '1.01B active' in run(REPO / 'yamls' / 'pretrain' / '10b_a1b_tst.yaml').stdout


def of_model(folder: Path) -> list[str]:
    """A YAML with the model of a config.json, in rows of 64."""
    model = [f'model.pretrained_model_name_or_path={folder}', 'model.config_overrides=null']
    return [str(PRETRAIN / '270m_baseline.yaml'), *model, 'max_seq_len=64', 'global_train_batch_size=16']


def test_mixtures_that_say_so_of_their_feed_forward_layers(tmp_path: Path):
    from transformers import DbrxConfig

    layers = {'ffn_type': 'torch_dmoe', 'moe_num_experts': 8, 'moe_top_k': 2, 'mlp_type': 'mlp', 'moe_jitter_eps': 0}
    layers |= {'moe_normalize_expert_weights': 1, 'uniform_expert_assignment': False}
    made = planned(QUICKSTART / 'baseline.yaml', f'model.ffn_config={json.dumps(layers)}'.replace('"', ''))
    experts = made['parameters'] - made['active_parameters']
    assert experts > 0
    every_layer = 2 * 8 * 2 * 128 * 512  # 2 layers, a matrix up and one down
    assert experts == every_layer * 6 // 8

    shape: dict[str, Any] = {'d_model': 64, 'n_heads': 2, 'n_layers': 2, 'vocab_size': 2048}
    shape |= {'attn_config': {'kv_n_heads': 2}}
    shape |= {'ffn_config': {'ffn_hidden_size': 128, 'moe_num_experts': 16, 'moe_top_k': 4}}
    DbrxConfig(**shape).save_pretrained(tmp_path)
    made = planned(*of_model(tmp_path))
    assert made['parameters'] - made['active_parameters'] == 2 * 12 * 3 * 64 * 128


@pytest.mark.parametrize('tied', [False, True])
def test_a_hugging_face_model_has_the_parameters_that_training_has(tied: bool, tmp_path: Path):
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 2, 'vocab_size': 2048}
    shape |= {'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 16, 'tie_word_embeddings': tied}
    text = Gemma3TextConfig(**shape)
    # llm-foundry trains the part of a model of text and images that reads text.
    for name, config, built in (
        ('llama', LlamaConfig(**shape), LlamaForCausalLM(LlamaConfig(**shape))),
        ('gemma', Gemma3Config(text_config=text.to_dict()), Gemma3ForCausalLM(text)),
    ):
        config.save_pretrained(tmp_path / name)
        made = planned(*of_model(tmp_path / name))
        assert made['parameters'] == sum(weight.numel() for weight in built.parameters())
        multiplying = made['parameters'] - (0 if tied else 2048 * 64)
        attention = 12 * 2 * 4 * 16 * 64  # layers, heads, width of a head, length
        assert made['phases'][0]['flops_per_step'] == 16 * 64 * (6 * multiplying + attention)


def test_a_mixture_whose_experts_cannot_be_told_is_refused(tmp_path: Path):
    from transformers import GraniteMoeConfig

    GraniteMoeConfig(num_hidden_layers=1, num_local_experts=4).save_pretrained(tmp_path)
    result = run(*of_model(tmp_path))
    assert result.exit_code == 1
    assert 'experts this cannot tell from the rest' in result.stderr


@pytest.mark.parametrize(
    ('settings', 'drawn', 'positions', 'length'),
    [
        ({'expand': 'batch'}, 4, 4 * 16 * 16, 16),
        ({'expand': 'none'}, 1, 16 * 16, 16),
        ({'expand': 'none', 'superpose': 'output'}, 1, 16 * 64, 64),
        ({'superpose': 'input'}, 4, 16 * 64, 64),
    ],
)
def test_what_a_superposed_step_costs(settings: dict[str, str], drawn: int, positions: int, length: int):
    given = [f'algorithms.token_superposition.{key}={value}' for key, value in settings.items()]
    made = planned(QUICKSTART / 'baseline.yaml', *given, '--bag-size', 4, '--duration', '1000ba')
    superposed, plain = made['phases']
    assert superposed['data_tokens'] == 1000 * drawn * 16 * 64
    assert superposed['positions'] == 1000 * positions
    assert superposed['flops_per_step'] == flops(positions, length)
    total = 1000 * flops(positions, length) + 2000 * flops(16 * 64, 64)
    assert made['flops'] == pytest.approx(total)
    assert made['equivalent_tokens'] == pytest.approx(16 * 64 * total / flops(16 * 64, 64))
    assert plain['steps'] == 2000


def test_the_ends_of_rows_that_fill_no_bag_are_not_read():
    settings = ('algorithms.token_superposition.expand=batch', '--bag-size', 3, '--duration', '1000ba')
    superposed, plain = planned(QUICKSTART / 'baseline.yaml', *settings)['phases']
    assert superposed['data_tokens'] == 1000 * 3 * 16 * 63  # of 64
    assert plain['data_tokens'] == 2000 * 16 * 64


def test_shards_are_counted_against_the_data_there_is(tmp_path: Path):
    stats = {'seq_len': 64, 'splits': {'train': {'rows': 16000, 'tokens': 1_024_000, 'bytes': 2_048_000}}}
    path = tmp_path / 'stats.json'
    path.write_text(json.dumps(stats))
    made = planned(QUICKSTART / 'baseline.yaml', '--stats', path)
    assert made['passes_over_data'] == 3
    assert made['shard_bytes'] == 3000 * 16 * 64 * 2
    assert 'data repeats' in run(QUICKSTART / 'baseline.yaml', '--stats', path).stdout
    assert planned(QUICKSTART / 'baseline.yaml', '--stats', path, 'max_duration=2ep')['steps'] == 2000
    # Every cell of a sweep that reads more than there is is marked: 1,000 steps' data for 3,000.
    swept = run(QUICKSTART / 'baseline.yaml', '--stats', path, '--sweep').stdout
    assert swept.count('! ') == swept.count('\ns = ') * 4 + 1
    path.write_text(json.dumps(stats | {'seq_len': 128}))
    result = run(QUICKSTART / 'baseline.yaml', '--stats', path)
    assert 'max_seq_len is 64, and the rows of --stats ' in result.stderr
    assert 'have 128 tokens: set max_seq_len: 128, or prepare the data with --seq-len 64' in result.stderr


def test_of_several_streams_the_splits_are_added_up(tmp_path: Path):
    counts = {'a': 100, 'b': 900, 'val': 7}
    splits = {name: {'rows': rows, 'tokens': 64 * rows, 'bytes': 256 * rows} for name, rows in counts.items()}
    (tmp_path / 'stats.json').write_text(json.dumps({'seq_len': 64, 'splits': splits}))
    streams = '{one: {local: x, split: a}, two: {local: x, split: b}, three: {local: y, split: b}}'
    loader = f'train_loader.dataset.streams={streams}'
    made = planned(QUICKSTART / 'baseline.yaml', loader, '--stats', tmp_path / 'stats.json', 'max_duration=1ep')
    assert made['steps'] == 1000 // 16


MODEL = Model(267_000_000, 267_000_000, 193_000_000, 30 * 576)
BATCH = Run((), 'both', 'sequence', 'uniform', 1024, 2048, Time.from_batch(20000))


def test_expected_loss_is_read_off_the_published_grid_of_the_nearest_scale():
    found = expect(BATCH, MODEL, 42e9, 20_000, 0.3, 6)
    assert found is not None
    # 270M, 20k steps: 3.1423 against 3.2124; the other grids with uniform weights span the range.
    assert found.change == pytest.approx(3.1423 - 3.2124)
    assert found.source == 'final_loss_270m_20k'
    # 3B gains most, 270M in 100k steps least.
    assert found.low == pytest.approx(2.676 - 2.808, abs=1e-4)
    assert found.high == pytest.approx(-0.0441, abs=1e-4)
    assert found.extrapolation == ''
    between = expect(BATCH, MODEL, 42e9, 20_000, 0.3, 6.5)
    assert between is not None
    assert between.change == pytest.approx((3.1423 + 3.1392) / 2 - 3.2124)
    # At no superposed step at all there is no change, and half way to the first share half of its change.
    half = expect(BATCH, MODEL, 42e9, 20_000, 0.05, 2)
    assert half is not None
    assert half.change == pytest.approx((3.1847 - 3.2124) / 2)


def test_expected_loss_elsewhere_is_called_an_extrapolation():
    large = Model(3_000_000_000, 3_000_000_000, 2_700_000_000, 36 * 2048)
    pair = expect(BATCH, large, 42e9, 20_000, 0.3, 6)
    assert pair is not None
    assert (pair.source, pair.extrapolation) == ('the published pair of 3B', '')
    found = expect(BATCH, large, 42e9, 20_000, 0.3, 8)
    assert found is not None
    assert found.source == 'final_loss_600m_20k'
    assert 'the nearest published model has 600M' in found.extrapolation
    assert expect(BATCH, MODEL, 42e9, 20_000, 0.3, 40) is None
    shorter = expect(BATCH, MODEL, 42e9, 10_000, 0.3, 6)
    assert shorter is not None
    assert shorter.extrapolation == 'the nearest published run has 20,000 steps'


def test_expected_loss_is_a_measured_one_where_that_is_nearer(monkeypatch: pytest.MonkeyPatch):
    few = Measured(0.2, 0.05, 3, 'prose', 400_000, 1, 400)
    more = Measured(-0.05, 0.02, 4, 'prose', 400_000, 20, 8_000)
    every = [([6], [0.3], 'sequence', each) for each in (few, more)]
    monkeypatch.setattr('composer_tst.cli.plan.expected.read_measured', lambda _: every)
    small = replace(MODEL, parameters=400_000)
    found = expect(BATCH, small, 20 * 400_000, 8_000, 0.3, 6, [few, more])
    assert found is not None
    assert (found.change, found.low, found.high) == pytest.approx((-0.05, -0.07, -0.03))
    assert found.range == 'a standard deviation over 4 seeds'
    assert (found.source, found.tokens_per_parameter) == ('a Llama of 400k parameters on prose', 20)
    assert (found.steps, found.extrapolation) == (8_000, '')
    beyond = expect(BATCH, replace(small, parameters=4_000_000), 400_000, 1_000, 0.3, 40, [few, more])
    assert beyond is not None
    assert beyond.change == 0.2
    assert beyond.extrapolation == (
        'the nearest measured model has 400k parameters; the nearest measured run has 400 steps'
    )
    # What is known of these bags is farther than what was measured of others.
    assert expect(BATCH, small, 20 * 400_000, 8_000, 0.3, 8) is None
    assert expect(BATCH, small, 20 * 400_000, 8_000, 0.3, 8, [few]) is None
    # A run of a published size is told by the grids.
    grids = expect(BATCH, MODEL, 42e9, 20_000, 0.3, 6, [few, more])
    assert grids is not None
    assert grids.source == 'final_loss_270m_20k'


def test_what_was_measured_is_that_of_the_same_bags_at_every_budget(monkeypatch: pytest.MonkeyPatch):
    def of(budget: float, steps: int) -> Measured:
        return Measured(-0.01, 0.02, 3, 'prose', 10, budget, steps)

    lines = [
        ([6], [0.3], 'sequence', of(28, 10_000)),
        ([6], [0.3], 'sequence', of(1.0, 350)),
        ([8, 2], [0.1, 0.3], 'batch', of(5, 1_000)),
    ]
    monkeypatch.setattr('composer_tst.cli.plan.measured.read_measured', lambda _: lines)
    bags_of_6 = replace(BATCH, phases=(Phase(6, Time.from_timestring('0.3dur')),))
    assert same_bags(bags_of_6, MODEL, [0.304]) == [of(1.0, 350), of(28, 10_000)]
    assert same_bags(bags_of_6, MODEL, [0.4]) == []
    for other in ({'expand': 'batch'}, {'weighting': 'power_law'}, {'superpose': 'input'}):
        assert same_bags(replace(bags_of_6, **other), MODEL, [0.3]) == []
    phases = (Phase(8, Time.from_timestring('0.1dur')), Phase(2, Time.from_timestring('0.3dur')))
    two = replace(BATCH, phases=phases, expand='batch')
    assert same_bags(two, MODEL, [0.1, 0.3]) == [of(5, 1_000)]
    assert same_bags(two, MODEL, [0.2, 0.3]) == []


BAGS = replace(BATCH, phases=(Phase(6, Time.from_timestring('0.3dur')),))


def judged(parameters: float, tokens_per_parameter: float, steps: int, run: Run = BAGS, bag: float = 6) -> Verdict:
    model = replace(MODEL, parameters=int(parameters))
    return judge(run, model, tokens_per_parameter * parameters, steps, 0.3, bag, same_bags(run, model, [0.3]))


@pytest.mark.parametrize(
    ('parameters', 'tokens_per_parameter', 'steps', 'verdict', 'advice'),
    [
        (267e6, 157, 20_000, GAINS, 'Use algorithms: {token_superposition: {bag_size: 6, duration: 0.3dur}}. --write'),
        (1e9, 200, 100_000, GAINS, 'Use algorithms: '),
        (125e6, 1, 300, WORSE, 'In fewer than 2,000 steps, on fewer than 40 tokens per parameter, train plainly.'),
        (125e6, 5, 600, UNKNOWN, 'In fewer than 2,000 steps, on fewer than 40 tokens per parameter, train plainly.'),
        (125e6, 80, 1_800, UNKNOWN, 'Find the batch size'),
        (125e6, 5, 2_000, UNKNOWN, 'Find the batch size at which plain training is best. Then try algorithms: '),
        (125e6, 40, 4_800, UNKNOWN, 'Find the batch size'),
        (125e6, 1, 20_000, UNKNOWN, 'Find the batch size'),
        (125e6, 11.9, 20_000, UNKNOWN, 'Find the batch size'),
        (125e6, 12, 20_000, GAINS, 'Use algorithms: '),
        (70e9, 20, 100_000, UNKNOWN, 'Find the batch size'),
    ],
)
def test_a_verdict_is_that_of_readme(
    parameters: float, tokens_per_parameter: float, steps: int, verdict: str, advice: str
):
    found = judged(parameters, tokens_per_parameter, steps)
    assert found.verdict == verdict
    assert found.advice.startswith(advice)


def test_a_verdict_names_the_nearest_run_and_how_far_it_is():
    found = judged(570e6, 157, 40_000)
    assert found.nearest == 'better 0.075 nats: published, 600M parameters, 70 tokens per parameter, 20,000 steps'
    assert found.distance == (
        'this run has about as many parameters, 2.2 times its tokens per parameter, 2 times its steps'
    )
    assert times(0.001, 'steps') == '1/1,000 of its steps'
    far = judged(70e6, 40, 4_800)
    assert 'published' in far.nearest
    assert '0.26 times its parameters' in far.distance
    assert far.why == 'No run that is known is near this one.'


def test_a_small_mpt_is_judged_by_the_one_that_was_measured():
    small = Model(900_000, 0, 0, 0, mpt=True)
    bags = same_bags(BAGS, small, [0.3])
    found = judge(BAGS, small, 3.3 * 900_000, 3_000, 0.3, 6, bags)
    assert (found.verdict, found.why) == (
        UNKNOWN, 'In the runs measured nearest, of 2,000 steps, these bags gained, but plain training was not tried '
        'there in steps of another size.'
    )  # fmt: skip
    assert found.nearest.startswith(
        "better 0.083 ± 0.028 nats: measured, an MPT of 2.62M parameters on the quickstart's"
    )
    assert judge(BAGS, small, 3.3 * 900_000, 3_000, 0.3, 4.7, bags).advice.count('Then try these bags, or algorithms: ')
    near = judge(BAGS, replace(small, parameters=2_600_000), 0.78 * 2_600_000, 2_000, 0.3, 6, bags)
    assert (near.verdict, near.advice.split()[0]) == (UNKNOWN, 'Find')
    # One of another size is not, nor another model of that size.
    for other in (replace(small, parameters=125_000_000), replace(small, mpt=False)):
        assert 'a Llama' in judge(BAGS, other, 3.3 * 900_000, 3_000, 0.3, 6, same_bags(BAGS, other, [0.3])).nearest


def test_finetuning_is_not_judged_by_pre_training():
    lines = run(PRETRAIN / '270m_tst.yaml', 'train_loader.name=finetuning').stdout.splitlines()
    assert lines[-2].startswith(f'verdict             {REFUSED}. Superposition is for pre-training')
    assert lines[-1] == 'advice              Finetune plainly.'


@pytest.mark.parametrize(
    ('overrides', 'verdict', 'why'),
    [
        (['model.peft_config={peft_type: LORA, r: 8}'], REFUSED, 'trains all weights, and model.peft_config a few'),
        (['load_path=x.pt'], UNKNOWN, 'began with random weights, and this one begins with those of load_path.'),
        (['model.pretrained=null'], UNKNOWN, 'those of model.pretrained (true if it is not given).'),
        (['model.pretrained=false'], GAINS, 'The nearest published run with these bags gained.'),
    ],
)
def test_what_is_no_pre_training_from_random_weights_is_not_judged_by_it(overrides: list[str], verdict: str, why: str):
    found = planned(PRETRAIN / '270m_tst.yaml', *overrides)['verdict']
    assert found['verdict'] == verdict
    assert why in found['why']


def test_a_mixture_is_judged_by_the_one_that_is_published():
    found = planned(PRETRAIN / '10b_a1b_tst.yaml')['verdict']
    assert (found['verdict'], found['why'][:35]) == (UNKNOWN, 'Of mixtures of experts one pair is ')


def test_settings_that_are_not_published_have_no_verdict():
    assert judged(267e6, 157, 20_000, replace(BAGS, expand='none')).verdict == UNKNOWN
    assert judged(267e6, 157, 20_000, replace(BAGS, expand='batch')).verdict == UNKNOWN
    assert judged(267e6, 157, 20_000, bag=40).verdict == UNKNOWN
    many = replace(BAGS, phases=(Phase(6, Time.from_timestring('0.9dur')),))
    model = replace(MODEL, parameters=600_000_000)
    assert judge(many, model, 42e9, 20_000, 0.9, 6, []).verdict == WORSE


def test_a_verdict_of_few_steps_is_by_the_nearest_budgets_on_either_side(monkeypatch: pytest.MonkeyPatch):
    worse, unsure, better = (
        Measured(change, 0.015, 3, 'prose', 400_000, budget, steps, 1_024, change, 0.015, 3)
        for change, budget, steps in ((0.05, 1, 350), (-0.03, 5, 1_800), (-0.05, 20, 7_100))
    )
    every = [([6], [0.3], 'sequence', each) for each in (worse, unsure, better)]
    for module in ('measured', 'verdict'):
        monkeypatch.setattr(f'composer_tst.cli.plan.{module}.read_measured', lambda _: every)
    few = judged(400_000, 1, 400)
    assert (few.verdict, few.why) == (
        WORSE, 'In the runs measured nearest, of 350 steps, these bags ended worse.'
    )  # fmt: skip
    assert few.nearest.startswith('worse 0.050 ± 0.015 nats: measured, a Llama of 400k parameters on prose, 1 tokens')
    level = judged(400_000, 5, 1_800)
    assert level.why == 'In the runs measured nearest, of 1,800 steps, it is not sure that these bags gained.'
    assert level.nearest.startswith('level (better 0.030 ± 0.015) nats: measured, ')
    assert judged(400_000, 20, 7_000).verdict == GAINS
    # Between budgets that differ, the one of fewer steps tells too, though the other is nearer.
    assert judged(400_000, 20, 4_000).why == (
        'In the runs measured nearest, of 1,800 and 7,100 steps, these bags gained in some, and not surely in others.'
    )
    # What gained in a run that is far from this one is no promise.
    assert judged(4_000_000, 20, 7_000).why.endswith('these bags gained, but they are far from this one.')
    assert judged(400_000, 20, 12_000).verdict == UNKNOWN
    # What gained in few steps is not advised against.
    many = replace(unsure, tokens_per_parameter=80, change_from_best=-0.05, change=-0.05)
    every[1] = ([6], [0.3], 'sequence', many)
    short = judged(400_000, 80, 1_800)
    assert (short.verdict, short.advice.split()[0]) == (GAINS, 'Find')
    # As many seeds as it was beside the best plain run tell, not as many as beside the plain run of its steps.
    every[1] = ([6], [0.3], 'sequence', replace(many, deviation_from_best=0.03))
    assert judged(400_000, 80, 1_800).verdict == UNKNOWN
    every[1] = ([6], [0.3], 'sequence', replace(many, deviation_from_best=0.03, seeds_from_best=6))
    assert judged(400_000, 80, 1_800).verdict == GAINS
    # What gained over a plain run of the same steps alone is no promise either.
    every[-1] = ([6], [0.3], 'sequence', replace(better, change_from_best=-0.03))
    level = judged(400_000, 20, 7_000)
    assert (level.verdict, level.why) == (
        UNKNOWN, 'In the runs measured nearest, of 7,100 steps, these bags gained, but it is not sure that they did '
        'over plain training in steps of its best size.'
    )  # fmt: skip
    # Bags that were run nowhere are judged by what was.
    other = judge(replace(BAGS, expand='batch'), replace(MODEL, parameters=400_000), 400_000, 300, 0.3, 40, [])
    assert (other.verdict, other.why) == (
        WORSE, 'In the runs measured nearest, of 350 steps, what was tried ended worse.'
    )  # fmt: skip
    assert 'on prose with other bags, 1 tokens per parameter' in other.nearest


@pytest.mark.parametrize('seeds', DEVIATIONS)
def test_what_is_sure_is_what_chance_makes_once_in_20(seeds: int):
    """The t of a mean over its standard error, by numbers that are drawn."""
    drawn = np.random.default_rng(17).normal(size=(400_000, seeds))
    changes, deviations = drawn.mean(1), drawn.std(1, ddof=1)
    sure = [is_sure(*each, seeds) for each in zip(changes[:50_000], deviations[:50_000], strict=True)]
    assert np.mean(np.abs(changes) > DEVIATIONS[seeds] * deviations) == pytest.approx(0.05, abs=0.002)
    assert np.mean(sure) == pytest.approx(0.05, abs=0.004)


def test_all_that_is_known_is_shown_if_asked_for():
    lines = run(QUICKSTART / 'baseline.yaml', '--bag-size', 6, '--duration', '0.3dur', '--verbose').stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith('measured '))
    assert lines[at] == (
        'measured            in nats against plain training of as many steps, on an MPT of 2.62M parameters '
        '(docs/evidence.md), where this run has 918k:'
    )
    assert re.fullmatch(r' +better 0\.\d{3} ± 0\.\d{3} at .* tokens per parameter, 2,000 steps of .*', lines[at + 1])
    assert any(line.startswith('equivalent tokens ') for line in lines)
    assert any('FLOPs per step' in line for line in lines)
    short = run(QUICKSTART / 'baseline.yaml', '--bag-size', 6, '--duration', '0.3dur').stdout
    assert len(short.splitlines()) < len(lines)
    assert not re.search('FLOPs|equivalent|^measured', short, re.M)
    assert [line.split()[0] for line in short.splitlines()[-4:]] == ['verdict', 'nearest', 'this', 'advice']


def test_a_sweep_of_a_small_run_has_what_was_measured_there():
    points: Any = planned(QUICKSTART / 'baseline.yaml', '--sweep')
    stated = {(point['bag_size'], point['share']) for point in points if point['expected']}
    assert stated == {(bag, share) for bag in (2, 3, 4, 6, 8) for share in SWEEP_SHARES} | {(12, 0.3)}
    assert {point['expected']['steps'] for point in points if point['expected']} == {2_000}
    shown = run(QUICKSTART / 'baseline.yaml', '--sweep').stdout
    assert "By an MPT of 2.62M parameters on the quickstart's text." in shown
    assert shown.splitlines()[-1] == points[0]['advice']


def test_the_sweep_has_every_point():
    points: Any = planned(PRETRAIN / '270m_baseline.yaml', 'max_duration=12000ba', '--sweep')
    assert len(points) == len(SWEEP_BAGS) * len(SWEEP_SHARES)
    point = next(point for point in points if (point['bag_size'], point['share']) == (6, 0.2))
    assert point['data_tokens'] == (2400 * 6 + 9600) * 1024 * 2048
    shown = run(PRETRAIN / '270m_baseline.yaml', 'max_duration=12000ba', '--sweep').stdout
    # All of it is one, and the lowest of the published losses at the nearest scale is marked.
    assert '*' not in shown
    assert 'All of it is an extrapolation: the nearest published budget' in shown
    assert 'By final_loss_270m_20k.' in shown
    best = min((point for point in points if point['expected']), key=lambda point: point['expected']['change'])
    row = next(line for line in shown.splitlines() if line.startswith(f's = {best["bag_size"]} '))
    assert row.count('>') == shown.count('>') - 1 == 1
    assert 's is the bag size, r the share of steps' in shown
    none: Any = planned(
        QUICKSTART / 'baseline.yaml', '--sweep', '--bag-size', 6, '--duration', '0.2dur',
        'algorithms.token_superposition.expand=none',
    )  # fmt: skip
    for point in none:  # the ends of rows that fill no bag are not read
        kept = point['superposed_steps'] * (64 - 64 % point['bag_size']) + (3000 - point['superposed_steps']) * 64
        assert point['data_tokens'] == 16 * kept
    # Which reads less than a plain run of equal cost: nothing that is known tells of it.
    assert all(point['expected'] is None for point in none)


def test_write_fills_in_the_algorithm_the_scheduler_and_the_steps(tmp_path: Path):
    path = tmp_path / 'folder' / 'new.yaml'
    result = run(
        QUICKSTART / 'baseline.yaml', f'max_duration={1000 * 16 * 64}tok', 'scheduler.name=constant_with_warmup',
        '--bag-size', 6, '--duration', '0.3dur', '--write', path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made: Any = OmegaConf.load(path)
    assert made.algorithms.token_superposition == {'bag_size': 6, 'duration': '0.3dur'}
    assert made.max_duration == '1000ba'
    assert made.scheduler == {'name': 'warmup_stable_decay', 't_warmup': '0.05dur', 't_decay': '0.1dur', 'alpha_f': 0.0}
    assert OmegaConf.to_container(made)['train_loader']['dataset']['local'] == '${variables.data}'  # pyright: ignore
    assert [phase['steps'] for phase in planned(path)['phases']] == [300, 700]
    # What is printed is what is written.
    assert re.findall(r'^(?:superposed|plain) +\d+ +(\d+)', result.stdout, re.M) == ['300', '700']
    for said in (
        'max_duration is 1000ba and was 1024000tok: the steps of a plain run of that length',
        'scheduler is {name: warmup_stable_decay, t_warmup: 0.05dur, t_decay: 0.1dur, alpha_f: 0.0} and was constant',
        'scheduler.t_warmup is 0.05dur and was 100ba',
        'The baseline needs the same scheduler',
        'algorithms.token_superposition is {bag_size: 6, duration: 0.3dur}',
    ):
        assert said in result.stdout
    assert 'it exists' in run(path, '--write', path).stderr
    # What is in order is left as it is, and nothing is said of it.
    kept = run(QUICKSTART / 'tst.yaml', '--write', tmp_path / 'kept.yaml').stdout
    assert 'scheduler' not in kept
    assert 'max_duration' not in kept


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['max_seq_len=null'], 'max_seq_len is missing: give the tokens of a row'),
        (['global_train_batch_size=many'], "global_train_batch_size is 'many': give the rows"),
        (['max_duration=3000steps'], "max_duration is '3000steps': give a Composer Time"),
        (['max_duration=infba'], "max_duration is 'infba': give a Composer Time in ba"),
        (['max_duration=2.5ba'], "max_duration is '2.5ba': give a Composer Time in ba"),
        (['max_duration=2ep'], 'needs --stats'),
        (['max_duration=4800'], 'max_duration is 4800 without a unit, which Composer takes for epochs: give 4800ba'),
        (['bag_size'], 'bag_size is no override and no option: give overrides as KEY=VALUE'),
        (['max_durration=20ba'], 'max_durration is no key of llm-foundry (did you mean max_duration?): remove it'),
        (['scheduler.t_warmup=2800ba'], 't_warmup=2800ba and t_decay=0.1dur do not fit in max_duration=3000ba'),
        (['scheduler=cosine'], "scheduler is 'cosine': give its settings by name"),
        (['scheduler.alpha_f=2'], 'alpha_f=2 must be a number from 0 to 1'),
        (['scheduler.t_decay=5000tok'], 't_decay=5000tok cannot be counted back from max_duration=3000ba'),
        (['algorithms.token_superposition.bagsize=4'], 'bagsize is no setting (did you mean bag_size?)'),
        (['model.name=gpt'], "model.name is 'gpt': this reads"),
        (['model.n_layers=two'], 'model: mpt_causal_lm refuses these settings'),
        (['max_seq_len=${nothing}'], 'nothing'),
        (['max_duration=${oc.env:HOME}'], 'reads the environment by oc.env, which llm-foundry does not resolve'),
        (['train_loader.dataset.max_seq_len=32'], 'max_seq_len is 64 and train_loader.dataset.max_seq_len 32: give'),
        (['model.name=hf_causal_lm'], 'model.d_model is no setting of hf_causal_lm: remove it'),
        (['--bag-size', '1', '--duration', '0.3dur'], 'bag_size is 1: give an integer of at least 2'),
        (['--bag-size', '4'], 'bag_size is 4 and duration is None: give both'),
        (
            ['algorithms.token_superposition=4'],
            'algorithms.token_superposition is 4: give settings by name, as algorithms: {token_s',
        ),
        (
            ['algorithms=[token_superposition]', '--bag-size', '4'],
            "algorithms is ['token_superposition']: give settings",
        ),
        (['algorithms=[{token_superposition: {bag_size: 4}}]'], 'give settings by name, as algorithms: {token_superp'),
        (
            ['algorithms=token_superposition'],
            "algorithms is 'token_superposition': give settings by name, as algorithms",
        ),
        (['algorithms.token_superposition.phases=3'], 'algorithms.token_superposition: '),
        (
            ['algorithms.token_superposition.weighting=powerlaw', '--bag-size', '4', '--duration', '0.3dur'],
            "weighting is 'powerlaw'",
        ),
        (['train_loader.dataset=rows'], "train_loader.dataset is 'rows': give its settings by name"),
        (['algorithms.token_superposition.bags=4'], 'token_superposition.bags is no setting'),
        (['algorithms.token_superposition.expand=rows', '--bag-size', '4', '--duration', '0.3dur'], "expand is 'rows'"),
        (['--bag-size', '4', '--duration', '3000ba'], 'leave some for recovery'),
        (['--gpu', 'abacus'], '--gpu abacus: give one of'),
        (['--mfu', '40'], '--mfu 40'),
        (['--stats', 'nowhere.json'], '--stats nowhere.json: cannot be read'),
        (['train_loader.dataset.streams=[a]', '--stats', 's.json'], 'train_loader.dataset.streams is '),
        (['--write', 'new.yaml'], '--write needs a superposition'),
        (
            [
                '--write',
                'new.yaml',
                '--bag-size',
                '4',
                '--duration',
                '0.3dur',
                'scheduler.t_decay=102400tok',
                'max_duration=3072000tok',
            ],
            'scheduler.t_decay is 102400tok: give it in dur or ba',
        ),
        (['max_duration=0ba'], 'max_duration is 0ba: give a positive time'),
        (['max_duration=-5ba'], 'max_duration is -5ba: give a positive time'),
        (['algorithms.token_superposition={}'], 'bag_size is None and duration is None: give both'),
        (['algorithms.token_superposition=null'], 'bag_size is None and duration is None: give both'),
        (
            ['algorithms.token_superposition.expand=batch', '--bag-size', '33', '--duration', '0.3dur'],
            'max_seq_len is 64, and a row by itself needs 66 tokens for bags of 33',
        ),
    ],
)
def test_what_is_wrong_gets_one_sentence_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = run(QUICKSTART / 'baseline.yaml', *arguments)
    assert result.exit_code == 1, result.output
    *waits, line = result.stderr.splitlines()
    assert waits in ([], ['reading the model with Composer and llm-foundry, ten seconds or more ...'])
    assert line.startswith('error: ')
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        (
            'model.pretrained_model_name_or_path=meta-llama/Llama-3.2-1B',
            "is 'meta-llama/Llama-3.2-1B', which is no folder with a config.json, and the hub does not answer",
        ),
        ('model.config_overides={}', 'model.config_overides is no setting of hf_causal_lm (did you mean config_overr'),
    ],
)
def test_what_is_wrong_with_a_hugging_face_model_gets_one_sentence(override: str, message: str):
    result = run(PRETRAIN / '270m_tst.yaml', override)
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]


def test_stats_of_something_else_get_one_sentence(tmp_path: Path):
    path = tmp_path / 'stats.json'
    path.write_text('[]')
    assert 'it is not what prepare-data writes' in run(QUICKSTART / 'tst.yaml', '--stats', path, '--sweep').stderr


AT_ONCE = """
import runpy, sys, time
start = time.process_time()
sys.argv[0] = 'composer-tst'
try:
    runpy.run_module('composer_tst', run_name='__main__')
finally:
    print(time.process_time() - start, *({'torch', 'composer', 'transformers', 'llmfoundry'} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ('text', 'arguments', 'message'),
    [
        (
            None,
            ['nowhere.yaml'],
            'there is no nowhere.yaml: give the path of a YAML, or write one with composer-tst recipe',
        ),
        (None, ['270m_tst'], '270m_tst is the name of a recipe, not a file: composer-tst recipe 270m_tst --output'),
        (None, ['.'], '. is a folder: give the YAML in it'),
        ('- a\n- b\n', ['a.yaml'], 'a.yaml is a list: give a config that llm-foundry trains'),
        ('seed: 1\nmodel: {}\nseed: 2\n', ['a.yaml'], 'a.yaml has seed twice, again in line 3: keep one of them'),
        ('a: [', ['a.yaml'], 'a.yaml is no YAML that OmegaConf reads: mend it: '),
        ('seed: 1\n', ['a.yaml', 'b.yaml'], 'b.yaml is no override and no option: give overrides as KEY=VALUE'),
        ('max_seq_len: 8\nglobal_train_batch_size: 1\nmax_duration: 4800\n', ['a.yaml'], '4800 without a unit'),
        (None, ['a.yaml', '--gpu', 'abacus'], '--gpu abacus: give one of'),
        (None, ['a.yaml', '--write', '.'], '--write . is a folder: name a file'),
    ],
)
def test_what_a_glance_tells_is_told_before_anything_heavy_is_imported(
    text: str | None, arguments: list[str], message: str, tmp_path: Path
):
    if text is not None:
        (tmp_path / 'a.yaml').write_text(text)
    result = subprocess.run(
        [sys.executable, '-c', AT_ONCE, 'plan', *arguments],
        cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(REPO)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: ')
    assert message in line
    seconds, *heavy = result.stdout.split()
    assert float(seconds) < 2
    assert heavy == []


def test_rows_of_another_length_than_the_shards_are_refused(tmp_path: Path):
    (tmp_path / 'stats.json').write_text(json.dumps({'seq_len': 32, 'vocab_size': 2048}))
    for key in ('local', 'streams.x.remote'):
        result = run(QUICKSTART / 'tst.yaml', f'train_loader.dataset.{key}={tmp_path}')
        assert result.exit_code == 1
        assert result.stderr == (
            f'error: max_seq_len is 64, and the rows in {tmp_path} have 32 tokens: set max_seq_len: 32, or prepare the '
            'data with --seq-len 64\n'
        )


def test_ids_beyond_the_vocabulary_are_refused_with_tokenizer_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # the checkout may have the quickstart's tokenizer
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(300)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token='0'))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    sizes = ['hidden_size=16', 'num_hidden_layers=1', 'intermediate_size=16', 'head_dim=8']
    arguments = [
        *(f'variables.tokenizer={tmp_path}', f'variables.model_config={PRETRAIN / "llama"}'),
        *(f'model.config_overrides.{size}' for size in sizes),
    ]
    assert run(PRETRAIN / '270m_tst.yaml', *arguments, 'variables.vocab_size=300').exit_code == 0
    result = run(PRETRAIN / '270m_tst.yaml', *arguments, 'variables.vocab_size=256')
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f'error: tokenizer.name {tmp_path} has 300 ids, and the model (LlamaForCausalLM, tokenizer {tmp_path}) embeds '
        '256: give the model a vocab_size of at least 300, or the tokenizer that made the data'
    )
    # Shards of another tokenizer, which an MPT is not enlarged for.
    (tmp_path / 'stats.json').write_text(json.dumps({'seq_len': 64, 'vocab_size': 5000}))
    data = f'train_loader.dataset.local={tmp_path}'
    assert run(QUICKSTART / 'tst.yaml', data).exit_code == 0  # its tokenizer is not here, and may be as large
    result = run(QUICKSTART / 'tst.yaml', data, f'tokenizer.name={tmp_path}')
    assert result.exit_code == 1
    assert f'the data in {tmp_path} has 5,000 ids, and the model (MPTForCausalLM, tok' in result.stderr


@pytest.mark.parametrize(
    ('overrides', 'says'),
    [
        (['scheduler.t_warmup=1000ba'], 'warms up until step 1,000, and superposition lasts until step 900 alone'),
        (['scheduler.t_decay=0.8dur'], 'decays from step 600, and superposition lasts until step 900'),
        (['algorithms.token_superposition.phases=[{bag_size: 4, until: 0.6dur}]'], 'Recovery has 1,200 of 3,000 steps'),
    ],
)
def test_a_plan_warns_of_what_training_warns_of(overrides: list[str], says: str):
    (remark,) = planned(QUICKSTART / 'tst.yaml', *overrides)['remarks']
    assert says in remark
    assert remark in run(QUICKSTART / 'tst.yaml', *overrides).stdout


def test_a_plan_warns_of_a_cosine(tmp_path: Path):
    config: Any = OmegaConf.load(QUICKSTART / 'tst.yaml')
    config.scheduler = {'name': 'cosine_with_warmup', 't_warmup': '100ba'}
    OmegaConf.save(config, tmp_path / 'cosine.yaml')
    (remark,) = planned(tmp_path / 'cosine.yaml')['remarks']
    assert 'decays from step 100, and superposition lasts until step 900' in remark


def test_a_scheduler_that_training_refuses_is_refused_without_stats(tmp_path: Path):
    config: Any = OmegaConf.load(QUICKSTART / 'tst.yaml')
    config.scheduler = {'name': 'cosine_with_warmup', 't_warmup': '100000tok'}
    OmegaConf.save(config, tmp_path / 'cosine.yaml')
    result = run(tmp_path / 'cosine.yaml')
    assert result.exit_code == 1
    assert 'error: scheduler: Cannot use warmup scheduler with t_max' in result.stderr


def test_a_plan_of_the_quickstart_has_nothing_to_remark():
    assert planned(QUICKSTART / 'tst.yaml')['remarks'] == []
    assert planned(QUICKSTART / 'tst.yaml', 'scheduler.name=of_the_users_own')['remarks'] == []


def test_a_warmup_that_is_filled_in_ends_while_superposed(tmp_path: Path):
    options = ['scheduler={name: cosine_with_warmup, t_warmup: 10ba}', '--bag-size', 6, '--duration', '0.05dur']
    result = run(QUICKSTART / 'baseline.yaml', *options, '--write', tmp_path / 'new.yaml')
    assert result.exit_code == 0, result.output
    written: Any = OmegaConf.load(tmp_path / 'new.yaml')
    assert written.scheduler.t_warmup == '0.05dur'
    assert 'warms up' not in result.stdout


def test_a_sweep_says_where_no_step_is_superposed():
    short = ('--sweep', 'max_duration=3ba', 'scheduler.t_warmup=0ba', 'scheduler.t_decay=0ba')
    lines = run(QUICKSTART / 'baseline.yaml', *short).stdout.splitlines()
    # 0.1, 0.2 and 0.3 of 3 steps are none; 0.4 is one step of 2 loader batches.
    assert lines[1].split()[:11] == ['s', '=', '2', *['no', 'step', '3.07k'] * 2, 'no', 'step']
    assert lines[1].count('no step') == 3
    assert lines[1].count('4.1k') == 2


@pytest.mark.parametrize('split', [5, {'rows': 1}, {'rows': 1, 'tokens': 64}, {'rows': 1, 'tokens': 'x', 'bytes': 1}])
def test_stats_of_another_program_are_refused(split: Any, tmp_path: Path):
    (tmp_path / 'stats.json').write_text(json.dumps({'seq_len': 64, 'splits': {'train': split}}))
    result = run(QUICKSTART / 'tst.yaml', '--stats', tmp_path / 'stats.json')
    assert result.exit_code == 1
    assert "split 'train' lacks rows, tokens or bytes: give what prepare-data wrote" in result.stderr
