"""The command ``composer-tst``: plan, prepare-data, compare and recipe. A training run imports nothing of it."""
