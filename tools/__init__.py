"""Commands of the repository: the quickstart, the benchmarks, the evidence."""
