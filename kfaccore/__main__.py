"""`python -m kfaccore`: the command, where its script is not on the path."""

from kfaccore.cli import main

if __name__ == "__main__":
    main()
