"""`python -m microscale.cli`: the same as `microscale`."""

from microscale.cli import main

main()
