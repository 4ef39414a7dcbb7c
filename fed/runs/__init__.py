"""What a run from a configuration is made of: clients and their rows, judging, files, and what is told on the way."""
