"""Where the kernels of these tests run: compiled on a GPU, else in Triton's interpreter.

The interpreter must be chosen before triton is first imported, and then serves the whole process. So this file, which
pytest imports before the tests beside it, chooses it on machines without a GPU and there only.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "triton was imported too early"
    os.environ["TRITON_INTERPRET"] = "1"
