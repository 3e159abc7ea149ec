"""`python -m benchmarks.kernels`, the same as `strongroom bench kernels`."""

import sys

from benchmarks.kernels.report import main

sys.exit(main())
