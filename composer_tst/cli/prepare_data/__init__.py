"""Raw text to tokenised, packed MDS shards; the command is `composer-tst prepare-data`."""
