"""The commands of ``edgesafe``, one module each: the docstring is its help, its functions are ``add_arguments`` and ``run``."""
