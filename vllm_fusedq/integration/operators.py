"""vLLM's CPU operators, for programs that are no vLLM process."""

from fusedq_kernels.cpu import wna16


def register_cpu_operators() -> bool:
    """Have the installed vLLM register its CPU operators; whether the fused one is there now.

    False also where no vLLM is installed or where it is a GPU build.
    """
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    if current_platform.is_cpu():
        current_platform.import_kernels()
    return wna16.available()
