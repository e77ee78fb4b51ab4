"""``python -m edgesafe`` is the ``edgesafe`` command."""

import sys

from edgesafe.cli import main

sys.exit(main())
