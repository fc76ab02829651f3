"""``composer-tst compare``: runs beside a baseline, as a table and a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

FORMATS = ('.png', '.svg', '.pdf')

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    baseline: Annotated[Path, typer.Argument(metavar='BASELINE_DIR', help='Folder of the baseline run.')],
    runs: Annotated[list[Path], typer.Argument(metavar='TST_DIR', help='Folders of the runs to compare.')],
    output: Annotated[
        Path | None, typer.Option(metavar='PICTURE', help='Draw the curves too: .png, .svg or .pdf.')
    ] = None,
    label: Annotated[
        str | None, typer.Option('--eval', metavar='LABEL', help='The eval loader to compare, if there are several.')
    ] = None,
) -> None:
    """Print final losses and iso-loss speed-ups of runs beside a baseline's, and draw their loss curves.

    They are read from TensorBoard files. The train loss of a superposed phase is the multi-hot cross-entropy over a
    bag's tokens, another quantity than the next-token loss: it is drawn dashed and faint.
    """
    from composer_tst.cli.compare.fairness import remarks_on_all
    from composer_tst.cli.compare.runs import read_run
    from composer_tst.cli.compare.table import table
    from composer_tst.cli.main import CommandError

    try:
        if output is not None:
            if output.suffix.lower() not in FORMATS:
                raise CommandError(f'--output {output}: its suffix is its format, give {", ".join(FORMATS)}')
            from composer_tst.cli.compare.picture import draw  # which alone needs matplotlib
        folders = [baseline, *runs]
        compared = [read_run(folder, label) for folder in folders]
        for folder in folders:
            if sum(folder.resolve() == other.resolve() for other in folders) > 1:
                raise CommandError(f'{folder} is given more than once: give each run once')
        if len({run.name for run in compared}) < len(compared):
            compared = [replace(run, name=str(folder)) for run, folder in zip(compared, folders, strict=True)]
        if output is not None:
            draw(compared, output)
    except CommandError as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f'error: {error.filename or output}: {error.strerror or error}', err=True)
        raise typer.Exit(1) from None
    typer.echo(table(compared))
    if said := remarks_on_all(compared):
        typer.echo('\n' + '\n'.join(said))
    if output is not None:
        typer.echo(f'\ncurves: {output}')
