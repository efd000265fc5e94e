"""``python -m tests.fuzz [--seconds N]``: see ``campaign``."""

from __future__ import annotations

import sys

from tests.fuzz.campaign import main

sys.exit(main())
