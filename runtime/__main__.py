"""`python -m runtime status|logs|stop|list`."""

import sys

from runtime.cli import main

sys.exit(main())
