"""`python -m vllm_fusedq.cli`: the `fusedq` command where its script is not installed."""

from vllm_fusedq.cli.main import app

app(prog_name="fusedq")
