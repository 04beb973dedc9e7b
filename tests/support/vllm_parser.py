"""vLLM's own parser of a server's arguments."""

from argparse import Namespace
from functools import cache
from typing import Any

import pytest


@cache
def parser() -> Any:
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if current_platform.is_unspecified():
        pytest.skip("vLLM finds no device here, and builds no argument parser without")
    return make_arg_parser(FlexibleArgumentParser())


def parse(*arguments: str) -> Namespace:
    return parser().parse_args(list(arguments))
