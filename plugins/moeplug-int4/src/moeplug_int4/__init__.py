"""int4 experts for moeplug. Everything is declared in plugin.yaml; code is in hooks.py and search.py."""
