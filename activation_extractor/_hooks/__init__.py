"""Getting onto a running model and off again: contexts, hooks, forwards, compiled models."""
