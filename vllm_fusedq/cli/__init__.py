"""The `fusedq` command."""

from vllm_fusedq.cli.main import app

__all__ = ["app"]
