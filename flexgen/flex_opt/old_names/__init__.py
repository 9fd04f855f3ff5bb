"""Modules that FlexGen 0.1 had at the top of its package, for scripts that import them.

`flexgen/__init__.py` adds this folder to the package's path: `flexgen.utils` is the file `utils.py` here. Each names
what its module had, and has no code.
"""
