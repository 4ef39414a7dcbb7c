"""The parts of `benchmarks.cascade`."""
