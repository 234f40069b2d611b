"""Sparsity: weights that are zero, kept so by masks. What narrows a model is in `surgery`; masks leave its shape."""
