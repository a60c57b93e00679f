"""``confirm-offer`` and ``python -m worker``."""

import sys

from worker import celery_environment, core_dumps


def main() -> None:
    """Runs a command. For a worker, gevent replaces parts of the standard library before anything else is imported."""
    core_dumps.forbid()
    celery_environment.remove()
    if sys.argv[1:2] == ["worker"]:
        from worker import gevent_support

        gevent_support.patch_if_requested()
    from worker.cli.app import main as run_command

    run_command()


if __name__ == "__main__":
    main()
