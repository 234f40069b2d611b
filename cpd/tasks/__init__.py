"""Tasks: what a model is for, as far as compressing it asks: its batches, its loss, its metric, where it comes from."""
