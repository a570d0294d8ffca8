"""Benchmarks: what is timed, against what, and the results that the tables in the README are generated from."""
