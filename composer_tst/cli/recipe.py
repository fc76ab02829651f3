"""``composer-tst recipe``: the configs of the published models, which run from any folder."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from composer_tst.cli.main import CommandError, meant
from composer_tst.cli.new_file import check_new, write_new

# What the configs call the folder that they and the architectures' config.json lie in, from the repository's root.
_IN_REPOSITORY = re.compile(r'(model_config: )yamls/pretrain/(\w+)')

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def folder() -> Path:
    """Where the configs lie."""
    return Path(str(resources.files('composer_tst') / 'recipes')).resolve()


def names() -> list[str]:
    """The configs, smallest model first, each baseline before its TST run."""
    found = (path.stem for path in folder().glob('*.yaml'))
    return sorted(found, key=lambda name: (_parameters(name), name))


def about(name: str) -> str:
    """A config in a line: size, budget, hardware; it is its first."""
    with (folder() / f'{name}.yaml').open() as file:
        return file.readline().removeprefix('# ').strip()


def _parameters(name: str) -> float:
    number, unit = re.match(r'([\d.]+)([MB])', about(name)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * {'M': 1e6, 'B': 1e9}[unit]


def recipe(name: str) -> tuple[str, str]:
    """A config, and the folder of its architecture, which lies beside it.

    Raises:
        CommandError: If there is none of that name.
    """
    name = name.removesuffix('.yaml')
    if name not in names():
        raise CommandError(f'there is no recipe {name!r}{meant(name, names())}: give one of {", ".join(names())}')
    text = (folder() / f'{name}.yaml').read_text()
    architecture = _IN_REPOSITORY.search(text)[2]  # pyright: ignore[reportOptionalSubscript]
    return _IN_REPOSITORY.sub(r'\1\2', text), architecture


@app.command()
def main(
    name: Annotated[
        str | None, typer.Argument(metavar='NAME', help='One of the list; without it, print the list.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar='FILE', help='Write it to this file; without it, print it.')
    ] = None,
) -> None:
    """List the configs of the published models, or write one, with the config.json of its architecture beside it."""
    try:
        if name is None:
            if output:
                raise CommandError(f'--output {output}: name the recipe to write: one of {", ".join(names())}')
            width = max(map(len, names()))
            typer.echo('\n'.join(f'{each.ljust(width)}  {about(each)}' for each in names()))
            typer.echo('composer-tst recipe NAME --output run.yaml writes one.', err=True)
            return
        text, architecture = recipe(name)
        shape = f'{architecture}/config.json'
        if output is None:
            typer.echo(text, nl=False)
            typer.echo(f'It needs {shape} beside it: --output FILE writes both.', err=True)
            return
        check_new('--output', output)
        content = (folder() / shape).read_text()
        beside = output.parent / shape
        if not (beside.is_file() and beside.read_text() == content):  # which another recipe has written
            write_new('--output', beside, content)
        write_new('--output', output, text)
    except CommandError as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from None
    there = '' if output.parent == Path() else f'cd {shlex.quote(str(output.parent))} && '
    typer.echo(
        f'{output} and {beside} are written. Set variables.data, variables.tokenizer and variables.save to your own, '
        f'then: {there}composer -n 8 -c llmfoundry train {shlex.quote(output.name)}',
        err=True,
    )
