"""Bundles on the Hugging Face hub: fetched and opened by name and commit, and pushed with a model card."""
