"""``python -m hvd_lars`` is ``hvd-lars``."""

from hvd_lars.cli import main

main()
