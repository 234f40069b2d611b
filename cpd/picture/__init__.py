"""The picture of a comb: its operations, coloured by coupling group, as .svg or .html."""

from cpd.picture.drawing import check_path, draw

__all__ = ["check_path", "draw"]
