"""Dimensions as expressions over axes, count ties, sums of products; no torch."""
