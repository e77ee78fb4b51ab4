"""Certificates for other people's servers: a suite through any OpenAI-style endpoint, and what changed between two."""
