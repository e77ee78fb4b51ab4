"""Boards reached from a clone: the wheel and a bundle on one that is emulated here, or on a real one by ssh."""
