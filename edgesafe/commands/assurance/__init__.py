"""The commands that show a bundle to others than its makers."""
