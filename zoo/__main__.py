"""`python -m tokenzoo`."""

from tokenzoo.cli import main

main()
