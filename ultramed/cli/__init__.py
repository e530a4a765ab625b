"""The command line. Each command is also a Python call; heavy libraries are imported only by the commands that need them."""

import logging
import sys

import typer

from ultramed.cli import annotate, bench, book, data, models, store, train
from ultramed.core.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Rerun every table and figure of MedAlpaca and UltraMedical by changing a parameter file.\n\n"
    "Start with `ultramed doctor`, then `ultramed run`. Nothing leaves this machine unless you give a URL.",
)
app.add_typer(book.book_app)
app.add_typer(models.models_app)
app.add_typer(bench.bench_app)
app.add_typer(train.train_app, name="train")
app.add_typer(data.data_app, name="data")
app.add_typer(annotate.annotate_app, name="annotate")
app.add_typer(store.store_app, name="store")


def main() -> None:
    """Entry point: known errors become one line and exit status 2, Ctrl-C 130; only bugs show a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ultramed").setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)  # Typer turns Ctrl-C into status 130 without a word
        if code == 130:
            print("\ninterrupted: what is finished is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(code)
    except UserError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
    except Exception as err:
        if not hasattr(err, "show"):
            raise
        err.show()  # Typer's own errors: a wrong option, a missing argument
        sys.exit(err.exit_code)
