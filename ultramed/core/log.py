"""What is printed while things run: this package's own lines, and not the advice of libraries."""

import logging
import sys
import warnings


def quiet_libraries() -> None:
    """Our own log lines, and no library's advice: what a reader needs to know is in the prose or is an error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ultramed").setLevel(logging.INFO)
    for noisy in ("bitsandbytes", "httpx", "datasets", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(peft|torch|transformers|bitsandbytes)\b")
    from transformers.utils import logging as hf

    hf.set_verbosity_error()
    hf.disable_progress_bar()
