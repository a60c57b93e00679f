"""``confirm-offer`` and ``python -m worker``."""

import sys


def main() -> None:
    if sys.argv[1:2] == ["health"]:  # a probe runs every few seconds, and needs a tenth of what the others import
        from worker.cli.health import health

        health.main(sys.argv[2:], prog_name="confirm-offer health")
    else:
        if sys.argv[1:2] == ["worker"]:
            from worker import gevent_support

            gevent_support.patch_if_requested()
        from worker.cli.app import main as others

        others()


if __name__ == "__main__":
    main()
