"""Certification: a suite of rows, a judge, Wilson bounds, and a verdict an exit, all through the shipped runtime."""
