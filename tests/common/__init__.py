"""What tests share. Constants of the session's data set, and where the repository lies."""

from pathlib import Path

REPO = Path(__file__).parents[2]
SEQ_LEN = 24
VOCAB_SIZE = 300
