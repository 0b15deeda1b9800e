"""What a notebook's kernel does before its first cell."""

import os
import subprocess

from IPython import get_ipython

# ipykernel tells programs that its cells are a terminal in colour, which a page is not.
os.environ.pop("FORCE_COLOR", None)
os.environ["TERM"] = "dumb"


def bash(line, cell):
    """%%bash as IPython has it, its output printed at once: in pieces it would be broken in the middle of lines."""
    print(subprocess.run(["bash", "-e", "-c", cell], stdout=subprocess.PIPE, text=True, check=True).stdout, end="")


get_ipython().register_magic_function(bash, "cell")
