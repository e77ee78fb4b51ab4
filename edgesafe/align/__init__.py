"""Retrain a depth-cuttable model so that it refuses at every exit depth and stays useful."""
