"""The command `composer-tst`: what it lists, and the configs it prints."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from common import REPO
from omegaconf import OmegaConf
from typer.testing import CliRunner

import composer_tst
from composer_tst.cli import main as command
from composer_tst.cli import recipe
from composer_tst.cli.plan.config import read_run
from composer_tst.cli.plan.cost import cost_phases
from composer_tst.cli.plan.keys import load
from composer_tst.cli.plan.model import Model

MODEL = Model(1, 1, 1, 1)


def test_it_lists_its_commands_and_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert command.main([]) == 0
    assert re.findall(r'^  ([a-z-]+) ', capsys.readouterr().out, re.M) == ['plan', 'prepare-data', 'compare', 'recipe']
    assert command.main(['prepare']) == 2
    assert capsys.readouterr().err == (
        'error: prepare is no command (did you mean prepare-data?): give one of plan, prepare-data, compare, recipe\n'
    )


def command_line(*arguments: str, without: str = '') -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, on a machine without some packages."""
    return subprocess.run(
        [sys.executable, '-c', WITHOUT, without, *arguments],
        env=os.environ | {'PYTHONPATH': str(REPO), 'COLUMNS': '200'}, capture_output=True, text=True, check=False,
    )  # fmt: skip


WITHOUT = """
import sys
from importlib.machinery import PathFinder
missing = sys.argv.pop(1).split(',')
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.partition('.')[0] in missing else find(name, path, target)
)
from composer_tst.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize('name', command.COMMANDS)
def test_every_command_has_help(name: str):
    first, *others = (command_line(*line) for line in ([name, '-h'], [name, '--help'], ['help', name]))
    assert first.returncode == 0, first.stderr
    assert f'Usage: composer-tst {name}' in first.stdout
    assert '-h' in first.stdout
    assert all(other.stdout == first.stdout for other in others)


def test_help_without_a_command_lists_them(capsys: pytest.CaptureFixture[str]):
    for line in ([], ['help'], ['-h'], ['--help']):
        assert command.main(line) == 0
        assert capsys.readouterr().out == command.usage() + '\n'
    assert command.main(['--version']) == 0
    assert capsys.readouterr().out == f'{composer_tst.__version__}\n'


@pytest.mark.parametrize('line', [['plan', '--bagsize', '4'], ['recipe', '270m_tst', 'more'], ['compare', 'a', '--x']])
def test_what_a_command_does_not_know_is_refused(line: list[str]):
    result = command_line(*line)
    assert result.returncode == 2
    assert re.search('No such option|unexpected extra argument', result.stderr)


PREPARE = ['prepare-data', str(REPO / 'LICENSE'), '--format', 'text', '--seq-len', '8', '--train-tokenizer', '300']


@pytest.mark.parametrize(
    ('without', 'line', 'extra'),
    [
        *(('typer', [name], '[tools]') for name in command.COMMANDS),
        ('matplotlib', ['compare', 'a', 'b', '--output', 'c.png'], '[tools]'),
        ('tqdm', [*PREPARE, '--output', 'x'], '[tools]'),
        ('pyspark', [*PREPARE, '--output', 'x', '--engine', 'spark'], '[spark]'),
        ('llmfoundry', ['plan', str(REPO / 'yamls' / 'quickstart' / 'tst.yaml')], ''),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_brings_it(
    without: str, line: list[str], extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    result = command_line(*line, without=without)
    assert result.returncode == 2
    # From where it was installed: here the checkout, in which the environment is.
    (told,) = filter(None, (each.read_text('direct_url.json') for each in distributions(name='composer-tst')))
    origin = json.loads(told)['url'].removeprefix('file://')
    assert result.stderr.splitlines()[-1] == (
        f"error: composer-tst {line[0]} needs {without}: pip install '{origin}{extra}'"
    )


def test_no_command_asks_for_what_it_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert command_line('recipe', without='matplotlib,tqdm,filelock,s3fs,torch,composer').returncode == 0
    # The folders are not there: it has come as far as to look for them.
    assert 'a is not a folder' in command_line('compare', 'a', 'b', without='matplotlib,tqdm,filelock,s3fs').stderr
    result = command_line(*PREPARE, '--output', 'x', without='matplotlib,s3fs,pyspark,zstandard,llmfoundry')
    assert result.returncode == 0, result.stderr


def test_recipes_are_listed_from_small_to_large_with_what_they_take():
    result = CliRunner().invoke(recipe.app)
    assert result.stderr == 'composer-tst recipe NAME --output run.yaml writes one.\n'
    lines = result.stdout.splitlines()
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


def test_a_recipe_is_written_with_its_architecture_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ('10b_a1b_tst', '10b_a1b_baseline'):  # of one architecture
        result = CliRunner().invoke(recipe.app, [name, '--output', f'new/folder/{name}.yaml'])
        assert result.exit_code == 0, result.output
        assert f'cd new/folder && composer -n 8 -c llmfoundry train {name}.yaml' in result.stderr
    monkeypatch.chdir(tmp_path / 'new' / 'folder')
    made: Any = OmegaConf.load('10b_a1b_tst.yaml')
    assert made.model.pretrained_model_name_or_path == 'qwen3_moe'
    config = Path(made.model.pretrained_model_name_or_path) / 'config.json'
    assert config.read_text() == (REPO / 'yamls' / 'pretrain' / 'qwen3_moe' / 'config.json').read_text()
    original: Any = OmegaConf.load(REPO / 'yamls' / 'pretrain' / '10b_a1b_tst.yaml')
    del made.variables.model_config, original.variables.model_config
    assert made == original


@pytest.mark.parametrize('name', recipe.names())
def test_a_recipe_that_is_printed_has_no_path_of_this_machine(name: str):
    result = CliRunner().invoke(recipe.app, [name])
    assert str(recipe.folder()) not in result.stdout
    assert not re.search(r'site-packages|yamls/pretrain', result.stdout)
    architecture: Any = OmegaConf.create(result.stdout)
    beside = f'{architecture.variables.model_config}/config.json'
    assert (recipe.folder() / beside).exists()
    assert result.stderr == f'It needs {beside} beside it: --output FILE writes both.\n'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['27m_tst'], "there is no recipe '27m_tst' (did you mean 270m_tst?): give one of 270m_baseline"),
        (['270m_tst', '--output', 'run.yaml'], '--output run.yaml: it exists: remove it or name another'),
        (['270m_tst', '--output', '.'], '--output . is a folder: name a file'),
        (['270m_tst', '--output', 'run.yaml/run.yaml'], '--output run.yaml/llama/config.json: Not a directory'),
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
