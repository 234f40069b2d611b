"""The coupling groups of a model, whether they are exact, and what any widths cost."""
