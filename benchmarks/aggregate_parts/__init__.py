"""Parts of the benchmark `aggregate`."""
