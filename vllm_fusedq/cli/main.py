"""The `fusedq` command: one module per subcommand."""

import typer

from vllm_fusedq import __version__
from vllm_fusedq.cli.check import check
from vllm_fusedq.cli.convert import convert
from vllm_fusedq.cli.selfcheck import selfcheck
from vllm_fusedq.cli.verify import verify

app = typer.Typer(
    help="Weight-only quantized checkpoints in vLLM: fused on every layer, or not served.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(check)
app.command()(convert)
app.command()(selfcheck)
app.command()(verify)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
