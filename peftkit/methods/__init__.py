"""The built-in methods, one a module, each written as a third party's plugin would be: `peftkit` and torch alone.

A module's name here is its method's name, as an entry point's is for an installed plugin.
"""
