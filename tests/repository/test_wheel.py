"""The wheel alone, in an empty folder: the command, the recipes, and what a package index shows of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
from common import REPO
from torch.utils.tensorboard import SummaryWriter

import composer_tst

REPOSITORY = 'https://example.org/someone/composer-tst'
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of the package and what it is made with, so that nothing else in the checkout can help it."""
    source, output = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('composer_tst', 'yamls'):
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(REPO / name, source / name)
    script = f'from setuptools.build_meta import build_wheel; build_wheel({str(output)!r})'
    environment = os.environ | {'REPOSITORY': REPOSITORY}
    subprocess.run([sys.executable, '-c', script], cwd=source, check=True, capture_output=True, env=environment)
    (path,) = output.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: all that are installed, but of this one the wheel's."""
    folder = tmp_path_factory.mktemp('site')
    for name in ('purelib', 'platlib'):
        for path in Path(sysconfig.get_paths()[name]).iterdir():
            link = folder / path.name
            if (
                not path.name.startswith(('composer_tst', '__editable__'))
                and path.suffix != '.pth'
                and not link.exists()
            ):
                link.symlink_to(path)
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def command(installed: Path, tmp_path: Path) -> Command:
    """`python -m composer_tst` in an empty folder, with the wheel's package alone."""
    environment = os.environ | {'PYTHONPATH': str(installed), 'COLUMNS': '500'}

    def call(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, '-S', '-m', 'composer_tst', *map(str, arguments)]
        return subprocess.run(
            line, cwd=tmp_path, env=environment | settings, capture_output=True, text=True, timeout=300, check=False
        )

    return call


def test_the_wheel_says_what_it_is(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith('METADATA')]
        says = Parser().parsestr(archive.read(metadata).decode())
        (points,) = [name for name in names if name.endswith('entry_points.txt')]
        assert 'composer-tst = composer_tst.cli.main:main' in archive.read(points).decode()
    assert says['Author'] == 'The composer-tst authors'
    assert 'token superposition' in says['Keywords']
    assert 'Development Status :: 4 - Beta' in says.get_all('Classifier', [])
    urls = dict(url.split(', ') for url in says.get_all('Project-URL', []))
    assert urls['Paper'] == 'https://arxiv.org/abs/2605.06546'
    assert urls['Source'] == REPOSITORY
    assert urls['Issues'] == f'{REPOSITORY}/issues'
    assert urls['Changelog'] == f'{REPOSITORY}/blob/main/CHANGELOG.md'
    assert 'composer_tst/py.typed' in names
    recipes = {path.name for path in (REPO / 'yamls' / 'pretrain').glob('*.yaml')}
    assert {name.removeprefix('composer_tst/recipes/') for name in names if name.endswith('.yaml')} == recipes
    assert {'composer_tst/recipes/llama/config.json', 'composer_tst/recipes/qwen3_moe/config.json'} <= set(names)
    assert not [name for name in names if name.startswith(('tests', 'tools', 'docs'))]
    # Every link and picture of its page leads somewhere from anywhere.
    page = says.get_payload()
    assert isinstance(page, str)
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', page)
    assert len(links) > 5
    for link in (first or second for first, second in links):
        assert link.startswith(('https://', '#')), link
        for kind in ('raw', 'blob'):
            path = link.partition(f'{REPOSITORY}/{kind}/main/')[2].partition('#')[0]
            assert (REPO / path).exists(), link


def test_without_the_extra_one_sentence_says_what_to_install(
    command: Command, installed: Path, wheel: Path, tmp_path: Path
):
    fewer = tmp_path / 'site'
    fewer.mkdir()
    for path in installed.iterdir():
        if not path.name.startswith(('typer', 'composer_tst')):
            (fewer / path.name).symlink_to(path)
    shutil.copytree(installed / 'composer_tst', fewer / 'composer_tst')
    (metadata,) = installed.glob('composer_tst-*.dist-info')
    there = shutil.copytree(metadata, fewer / metadata.name)

    def said() -> str:
        result = command('plan', 'run.yaml', PYTHONPATH=str(fewer))
        assert result.returncode == 2
        return result.stderr.splitlines()[-1]

    # What pip leaves of where a wheel was.
    (there / 'direct_url.json').write_text(json.dumps({'url': wheel.as_uri(), 'archive_info': {}}))
    assert said() == f"error: composer-tst plan needs typer: pip install '{wheel}[tools]'"
    # It is not there any more, and the package is on no index.
    (there / 'direct_url.json').write_text(json.dumps({'url': 'file:///gone.whl', 'archive_info': {}}))
    assert said() == "error: composer-tst plan needs typer: pip install 'typer<1,>=0.19'"


def test_the_package_knows_its_version(command: Command):
    assert command('--version').stdout == f'{composer_tst.__version__}\n'


def test_from_a_recipe_to_its_plan(command: Command, tmp_path: Path):
    made = command('recipe', '270m_tst', '--output', 'run.yaml')
    assert made.returncode == 0, made.stderr
    planned = command('plan', 'run.yaml')
    assert planned.returncode == 0, planned.stderr
    assert '267M' in planned.stdout
    assert re.search(r'^superposed +6 +6,000 +75.5B$', planned.stdout, re.M)


def test_two_text_files_become_shards(command: Command, tmp_path: Path):
    for name in ('one.txt', 'two.txt'):
        (tmp_path / name).write_text('A line of text, and one more of it.\n' * 2000)
    made = command(
        'prepare-data', 'one.txt', 'two.txt', '--output', 'data', '--seq-len', 16, '--train-tokenizer', 300,
        '--split', 'train=1.0',
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert (tmp_path / 'data' / 'train' / 'index.json').exists()


def test_two_runs_become_a_table_and_a_picture(command: Command, tmp_path: Path):
    for name, loss in (('baseline', 3.0), ('tst', 2.5)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step in range(20):
                writer.add_scalar('time/token', 10 * step, step)
                writer.add_scalar('loss/train/total', loss + 1 / (1 + step), step)
            writer.add_scalar('metrics/eval/LanguageCrossEntropy', loss, 20)
    made = command('compare', 'baseline', 'tst', '--output', 'comparison.png')
    assert made.returncode == 0, made.stderr
    assert 'better 0.5000' in made.stdout
    assert (tmp_path / 'comparison.png').stat().st_size > 10_000
