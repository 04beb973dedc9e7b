"""Which vLLM versions the plugin runs on, and everything that differs between them."""

import vllm
from packaging.version import InvalidVersion, Version
from vllm import envs

OLDEST = Version("0.26")
FIRST_UNSUPPORTED = Version("0.34")


def unsupported_version() -> str | None:
    """One sentence why this vLLM is outside the supported range, or None."""
    try:
        found = Version(vllm.__version__)
    except InvalidVersion:
        return f"vLLM reports the version {vllm.__version__!r}, which is not a version number"
    if OLDEST <= Version(found.base_version) < FIRST_UNSUPPORTED:
        return None
    return f"vLLM {found} is installed; vllm-fusedq supports >= {OLDEST} and < {FIRST_UNSUPPORTED}"


def batch_invariant() -> bool:
    """Whether vLLM runs in its batch-invariant mode."""
    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))
