"""The commands together, and what becomes of what they raise."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from tdhook_train.cli import demo, doctor, export, ls, report, show, sweep, watch
from tdhook_train.cli.printing import complain
from tdhook_train.errors import TdhookTrainError

__all__ = ["app", "main"]

_WRONG = 2  # as of a usage error
_INTERRUPTED = 130
_TRACEBACK = "--traceback"

app = typer.Typer(
    help="Interpretability while a network trains.",
    epilog="Exit codes: 0; 2 where something given is wrong; 130 after Ctrl-C. COMMAND --help shows examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is the same text in a pipe, and no second is spent on importing rich
)


@app.callback()
def _root(
    traceback: Annotated[  # here for --help: `main` takes it out, wherever it stands
        bool, typer.Option(_TRACEBACK, help="Show the whole traceback of an error.")
    ] = False,
) -> None:
    """Interpretability while a network trains."""


for _module in (demo, sweep, ls, show, report, export, watch, doctor):
    _name = _module.__name__.rsplit(".", 1)[-1]
    _examples = "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in _module.EXAMPLES)])  # \b: leave lines alone
    app.command(_name, epilog=_examples)(getattr(_module, _name))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what a user got wrong is one line, not a traceback.

    Args:
        args: what stands behind the program's name; those of this process, if None.
    """
    given = list(sys.argv[1:] if args is None else args)
    whole = _TRACEBACK in given
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
            app([one for one in given if one != _TRACEBACK], prog_name="tdhook-train")
    except (TdhookTrainError, OSError) as error:
        if whole:
            traceback.print_exc()
        else:
            said = str(error) if isinstance(error, TdhookTrainError) else f"{type(error).__name__}: {error}"
            complain(f"error: {' '.join(said.split())}")
        raise SystemExit(_WRONG) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(_INTERRUPTED) from None
