"""What a run will take before it is run: ``composer-tst plan`` from a checkout."""

from composer_tst.cli.plan.command import app

if __name__ == '__main__':
    app()
