"""Whole runs, each one call: compress, sweep, sensitivity."""
