"""Benchmarks: what is timed, against what, and the results that the tables of docs/benchmarks.md are generated from."""
