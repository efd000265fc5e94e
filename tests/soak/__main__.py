"""``python -m tests.soak``: trainers do not import a ``__main__`` again, so that hundreds of them start in no time."""

from __future__ import annotations

import sys

from tests.soak.cluster import main

sys.exit(main())
