"""Parts of `benchmarks.tiers`."""
