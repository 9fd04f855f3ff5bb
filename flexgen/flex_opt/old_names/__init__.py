"""The modules that FlexGen 0.1 had at the top of its package, for scripts that import them.

`flexgen/__init__.py` adds this folder to the package's path, so `flexgen.utils` is the file `utils.py` here. The
modules contain only imports.
"""
