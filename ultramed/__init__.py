"""ultramed: rerun every table and figure of MedAlpaca and UltraMedical, from a laptop to a cluster."""

import os

# Nothing leaves the machine unless the user gives a URL: libraries' telemetry is off before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Threads that have done their part of a matrix product spin for microseconds, not for milliseconds: beside other work on the
# same cores a spinning thread keeps the one that it waits for from running, and training takes six times as long and more
# (docs/PERFORMANCE.md). GNU's OpenMP reads this once, when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
