"""Runtimes: what runs a model when its latency is taken, one file each, behind one protocol (`base.py`).

`catalogue.py` has them by name; a device of one's own is a function (`device.py`).
"""
