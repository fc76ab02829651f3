"""Raw text to tokenised MDS shards: ``composer-tst prepare-data`` from a checkout."""

from composer_tst.cli.prepare_data.command import app

if __name__ == '__main__':
    app()
