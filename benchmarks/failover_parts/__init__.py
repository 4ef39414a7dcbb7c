"""Parts of `benchmarks.failover`."""
