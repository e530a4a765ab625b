"""A profile's notebooks one after the other in one process, which loads the libraries once; `ultramed run` starts two
processes for each of them.

    python tests/one_process.py PROFILE '["key=value", ...]' [NUMBER ...]
"""

import json
import os
import sys

import matplotlib
import nbformat
from IPython.core.interactiveshell import InteractiveShell

from ultramed.book.runner import notebooks

matplotlib.use("agg")
profile, overrides, *numbers = sys.argv[1:]
parameters = f"# Parameters\nprofile = {profile!r}\noverrides = {json.loads(overrides)!r}"  # papermill's cell
shell = InteractiveShell.instance()
for path in notebooks(numbers):
    print(path.stem, flush=True)
    shell.reset()
    os.chdir(path.parent)
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source, store_history=True).raise_error()
            if "parameters" in cell.metadata.get("tags", []):
                shell.run_cell(parameters, store_history=True).raise_error()
