"""``python -m worker``: the same as ``confirm-offer``."""

from worker.cli import main

main()
