"""`python -m odtk` is `odtk`."""

import sys

from .cli import main

sys.exit(main())
