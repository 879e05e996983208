"""`python -m petalite.node`, and the command `petalite`."""

import sys


def main() -> None:
    """Ctrl-C ends it with one line and the shell's code for that, while it is still loading, too."""
    try:
        from petalite.node.cli import main as commands

        commands()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
