"""Benchmarks: each module asks one question; ``python -m bench.NAME`` answers it, ``python -m bench`` answers all."""
