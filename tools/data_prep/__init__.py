"""Raw text to tokenised, packed MDS shards; the command is `tools/prepare_data.py`."""
