"""``python -m tests.soak [faults]``: trainers do not import a ``__main__`` again, so that hundreds start in no time."""

from __future__ import annotations

import sys

from tests.soak import cluster, faults

sys.exit(faults.main() if sys.argv[1:2] == ["faults"] else cluster.main())
