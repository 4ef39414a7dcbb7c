"""Parts of the benchmark `schedule`."""
