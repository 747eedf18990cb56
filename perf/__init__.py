"""Benchmarks and profiling. The programs are the files that are executable; the others are theirs."""
