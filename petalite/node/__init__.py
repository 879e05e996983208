"""`python -m petalite.node`: the command line."""
