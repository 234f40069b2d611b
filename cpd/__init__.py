"""Comb, Prune, Distill."""
