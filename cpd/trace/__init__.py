"""From a model to a graph of ATen operations."""
