"""The command line ``tdhook-train``, one command a file."""

from tdhook_train.cli.app import app, main

__all__ = ["app", "main"]
