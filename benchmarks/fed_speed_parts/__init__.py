"""The parts of `benchmarks.fed_speed`."""
