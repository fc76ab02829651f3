"""Runs beside a baseline, as a table and a picture: ``composer-tst compare`` from a checkout."""

from composer_tst.cli.compare.command import app

if __name__ == '__main__':
    app()
