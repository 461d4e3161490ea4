"""Run a script as a rank of a test: the arguments are the script and its own.

A rank that has finished leaves at once: gloo's threads may still free tensors, and would abort a
process whose interpreter ends meanwhile.
"""

import os
import runpy
import sys

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
