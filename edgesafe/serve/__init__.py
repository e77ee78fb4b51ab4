"""A local page for trying a bundle in a browser: standard library, loopback only, nothing from outside."""
