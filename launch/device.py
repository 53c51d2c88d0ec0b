"""Is there an NVIDIA driver on this machine, does the installed torch make use of it, and is all set for it?

Importing this file needs nothing but the standard library: the bootstrap asks it before anything is installed.
"""

import os
import shutil
import sys

DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
"""Linux, Linux in a sandbox that hides /proc, and Linux inside Windows."""


def nvidia_driver() -> bool:
    """Whether this machine has an NVIDIA driver; nothing is started to find out."""
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None
    return any(os.path.exists(path) for path in DRIVER_FILES)


def prepare(device: str) -> None:
    """Before torch is first imported to train on `device`: refuse an idle GPU, make CUDA's products repeatable."""
    # cuBLAS reads this once, when it starts; without it deterministic algorithms refuse matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cpu" or not nvidia_driver():
        # Else deepspeed, where it is needed, warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    refuse_idle_gpu(device)


def refuse_idle_gpu(device: str) -> None:
    """Raise ValueError if the choice of device is ours and a GPU would stand idle for want of a CUDA build of torch."""
    if device != "auto" or not nvidia_driver():
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"device = auto: expected a torch that sees this machine's NVIDIA GPU, not {torch.__version__}; set the "
            "environment up again (remove .venv; KEEL_TORCH_INDEX names an index with CUDA builds) or say device=cpu"
        )
