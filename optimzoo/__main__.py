"""``python -m optimzoo``."""

import sys

from optimzoo.cli import main

sys.exit(main())
