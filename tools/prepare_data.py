"""Raw text to tokenised MDS shards: ``composer-tst prepare-data`` from a checkout."""

from composer_tst.data_prep.command import app

if __name__ == '__main__':
    app()
