"""``python -m composer_tst`` is the command ``composer-tst``."""

import sys

from composer_tst.cli.main import main

sys.exit(main())
