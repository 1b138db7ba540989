"""``python -m tdhook_train.cli``."""

from tdhook_train.cli.app import main

main()
