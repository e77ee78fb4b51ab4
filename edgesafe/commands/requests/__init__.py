"""The commands that turn lists of requests into suites and training rows."""
