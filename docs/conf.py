"""How the pages are built: `make docs`. Whatever stands on a page as code is run while it is read."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT / "tests")]
# Notebooks start processes of their own: one BLAS thread each, and Keras on TensorFlow unless a page says otherwise.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")
os.environ.update(COLUMNS="110", NO_COLOR="1", IPYTHONDIR=str(HERE / "_build" / "ipython"))
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# The pages' `kfaccore` is that of the environment that builds them.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

project = "kfaccore"
author = "kfaccore contributors"
project_copyright = "kfaccore contributors, Apache-2.0"
release = re.search(r'__version__ = "(.*)"', (ROOT / "kfaccore" / "__init__.py").read_text())[1]
version = release

extensions = ["myst_nb", "runs", "reference"]
exclude_patterns = ["_build", "_ext", "jupyter_execute"]
smartquotes = False  # -- is an option of a command, not a dash
nitpicky = True  # a name that leads nowhere is an error

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # links as GitHub writes them, page.md#a-heading
suppress_warnings = ["myst.strikethrough"]

nb_execution_in_temp = True  # what a page writes stays out of the repository
nb_execution_mode = "force"  # never an output that was stored
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

profile = HERE / "_build" / "ipython" / "profile_default"
(profile / "startup").mkdir(parents=True, exist_ok=True)
(profile / "startup" / "plain.py").write_text((HERE / "_ext" / "cells.py").read_text())
(profile / "ipython_kernel_config.py").write_text("c = get_config()\nc.IPKernelApp.log_level = 'ERROR'\n")

html_theme = "furo"
html_title = f"kfaccore {release}"
html_theme_options = {"top_of_page_buttons": []}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sourcelink = False
