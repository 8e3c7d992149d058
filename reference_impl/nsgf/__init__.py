"""Neural Sinkhorn Gradient Flow (NSGF, NSGF++), arXiv 2401.14069: the kit's reference implementation."""

import os

# GeomLoss imports KeOps, which prints a warning on standard output when there is no CUDA; standard output is for data.
# PYKEOPS_VERBOSE would come too late: pykeops 2.3 imports the module that prints before it reads that variable.
os.environ.setdefault("KEOPS_VERBOSE", "0")
