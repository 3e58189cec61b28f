"""``python -m metaql`` is the same as ``metaql``."""

import sys

from metaql.cli import main

sys.exit(main())
