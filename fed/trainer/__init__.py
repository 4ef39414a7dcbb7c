"""The parts of a client's training: the live model, its adapter, tokens, batches and evaluation."""
