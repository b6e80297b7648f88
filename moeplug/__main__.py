"""`python -m moeplug` is the `moeplug` command."""

from moeplug.cli import main

main()
