"""Certification: a suite of rows, a judge, Wilson bounds, and a verdict for each exit, all through the shipped runtime."""
