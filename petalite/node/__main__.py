"""`python -m petalite.node`."""

from petalite.node.cli import main

main()
