"""ultramed: rerun every table and figure of MedAlpaca and UltraMedical, from a laptop to a cluster."""

import os

# Nothing leaves the machine unless the user gives a URL: libraries' telemetry is off before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"
