"""The command `composer-tst`: what it lists, and the configs it prints."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from common import REPO
from omegaconf import OmegaConf
from typer.testing import CliRunner

from composer_tst.cli import main as command
from composer_tst.cli import recipe
from composer_tst.cli.plan.config import load, read_run
from composer_tst.cli.plan.cost import cost_phases
from composer_tst.cli.plan.model import Model

MODEL = Model(1, 1, 1, 1)


def test_it_lists_its_commands_and_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert command.main([]) == 0
    assert re.findall(r'^  ([a-z-]+) ', capsys.readouterr().out, re.M) == ['plan', 'prepare-data', 'compare', 'recipe']
    assert command.main(['prepare']) == 2
    assert capsys.readouterr().err == (
        'error: prepare is no command (did you mean prepare-data?): give one of plan, prepare-data, compare, recipe\n'
    )


def test_recipes_are_listed_from_small_to_large_with_what_they_take():
    lines = CliRunner().invoke(recipe.app).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        f'{model}_{kind}' for model in ('270m', '600m', '3b', '10b_a1b') for kind in ('baseline', 'tst')
    ]
    assert '600M parameters; 20,000 steps, of which 6,000 with bags of 6, 105B tokens' in lines[3]
    assert lines[3].endswith('published at 61 B200-hours.')


@pytest.mark.parametrize('name', recipe.names())
def test_what_a_recipe_says_of_itself_is_what_it_trains(name: str):
    run = read_run(load(str(REPO / 'yamls' / 'pretrain' / f'{name}.yaml'), []))
    costs = cost_phases(run, MODEL, None)
    says = recipe.about(name)
    assert f'{sum(cost.steps for cost in costs):,} steps' in says
    number, unit = re.findall(r'([\d.]+)([BT]) tokens', says)[0]
    tokens = sum(cost.data_tokens for cost in costs)
    assert float(number) * {'B': 1e9, 'T': 1e12}[unit] == pytest.approx(tokens, rel=0.02)
    bags = re.findall(r'of which ([\d,]+) with bags of (\d+)', says)
    assert bags == [(f'{cost.steps:,}', str(cost.bag_size)) for cost in costs[:-1]]


def test_a_recipe_finds_its_architecture_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(recipe.app, ['10b_a1b_tst', '--output', 'run.yaml'])
    assert result.exit_code == 0
    assert 'composer -n 8 -c llmfoundry train run.yaml' in result.stderr
    made: Any = OmegaConf.load('run.yaml')
    assert (Path(made.model.pretrained_model_name_or_path) / 'config.json').exists()
    original: Any = OmegaConf.load(REPO / 'yamls' / 'pretrain' / '10b_a1b_tst.yaml')
    del made.variables.model_config, original.variables.model_config
    assert made == original


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['27m_tst'], "there is no recipe '27m_tst' (did you mean 270m_tst?): give one of 270m_baseline"),
        (['270m_tst', '--output', 'run.yaml'], '--output run.yaml: it exists: remove it or name another'),
        (['270m_tst', '--output', 'nowhere/run.yaml'], 'nowhere/run.yaml'),
        (['--output', 'run.yaml'], '--output run.yaml: name the recipe to write'),
    ],
)
def test_what_is_wrong_gets_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run.yaml').touch()
    result = CliRunner().invoke(recipe.app, arguments)
    assert (result.exit_code, result.stderr.count('\n')) == (1, 1)
    assert result.stderr.startswith('error: ')
    assert message in result.stderr


def test_the_file_that_spark_submit_runs():
    file = REPO / 'composer_tst' / 'cli' / 'main.py'
    shown = subprocess.run([sys.executable, str(file), 'recipe'], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert '270m_tst' in shown.stdout
