"""Optional dependencies, asked for before the long work begins."""

from importlib.util import find_spec

from vllm_fusedq.errors import MissingExtra


def require(module: str, option: str, extra: str) -> None:
    """Raise MissingExtra where `module` is not installed, which `option` needs."""
    if find_spec(module) is None:
        raise MissingExtra(
            f"{option} needs {module}, which is not installed: pip install 'vllm-fusedq[{extra}]'"
        )
