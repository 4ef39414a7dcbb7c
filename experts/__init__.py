"""What answers: backends, adapters, split models, and the model store."""
