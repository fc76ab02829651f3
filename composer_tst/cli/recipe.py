"""``composer-tst recipe``: the configs of the published models, which run from any folder."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from composer_tst.cli.main import CommandError

# What the configs call the folder that they and the architectures' config.json lie in, from the repository's root.
_IN_REPOSITORY = re.compile(r'(model_config: )yamls/pretrain/')

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


def recipe(name: str) -> str:
    """A config that finds its architecture from any folder.

    Raises:
        CommandError: If there is none of that name.
    """
    name = name.removesuffix('.yaml')
    if name not in names():
        nearest = difflib.get_close_matches(name, names(), 1)
        meant = f' (did you mean {nearest[0]}?)' if nearest else ''
        raise CommandError(f'there is no recipe {name!r}{meant}: give one of {", ".join(names())}')
    return _IN_REPOSITORY.sub(rf'\g<1>{folder()}/', (folder() / f'{name}.yaml').read_text())


@app.command()
def main(
    name: Annotated[str | None, typer.Argument(metavar='NAME', help='One of those listed without it.')] = None,
    output: Annotated[Path | None, typer.Option(metavar='FILE', help='Instead of printing it.')] = None,
) -> None:
    """List the configs of the published models, or print one that runs from any folder."""
    try:
        if name is None:
            if output:
                raise CommandError(f'--output {output}: name the recipe to write: one of {", ".join(names())}')
            width = max(map(len, names()))
            typer.echo('\n'.join(f'{each.ljust(width)}  {about(each)}' for each in names()))
            return
        text = recipe(name)
        if output is None:
            typer.echo(text, nl=False)
        elif output.exists():
            raise CommandError(f'--output {output}: it exists: remove it or name another')
        else:
            output.write_text(text)
    except (CommandError, OSError) as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from None
    typer.echo(
        'Set variables.data, variables.tokenizer and variables.save to your own, then: '
        f'composer -n 8 -c llmfoundry train {output or "FILE"}',
        err=True,
    )


if __name__ == '__main__':
    app()
