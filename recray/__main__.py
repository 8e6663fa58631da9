"""`python -m recray`: the command line, where the script `recray` is not on PATH."""

from recray.cli import main

if __name__ == "__main__":
    main()
