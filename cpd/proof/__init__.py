"""Narrower copies of a model: what its forward asks for, and what explains it."""
