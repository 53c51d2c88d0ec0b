"""The device of a run and the settings that make its bits repeatable."""

import torch

from trainer.config import TrainConfig

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def settle(config: TrainConfig, local_rank: int = 0) -> torch.device:
    """Choose the device, fix the thread count, switch deterministic algorithms on; ValueError if there is no GPU.

    local_rank: which of a machine's GPUs.
    One thread inside each operation: `threads` of them run rows side by side (trainer/pool.py).
    CUBLAS_WORKSPACE_CONFIG, which CUDA needs for deterministic products, is set by `launch` before torch starts.
    """
    torch.set_num_threads(1)
    # Not use_deterministic_algorithms: for the same switch that one also imports the compiler, 2 s at every start.
    torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
    # Filling fresh memory guards against reads of it, which no kernel here does, and costs thousands of passes a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("device = cuda: expected an NVIDIA GPU that this torch can use; found none")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank) if local_rank else torch.device("cuda")
