"""Observers for moeplug. Each is declared in its own YAML file; code is in the module of the same name."""
