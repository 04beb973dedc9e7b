"""`fusedq check` prints the engine's verdict."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from checkpoints import drop, make_plain, write_checkpoint, write_json
from hub_server import Hub, serving_hub
from mixtures import write_mixture
from published import MODELS, write_headers
from tiny_models import CHECKPOINTS, asset
from vllm_fusedq import __version__
from vllm_fusedq.cli import app

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def fusedq(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def document(*arguments: str) -> dict:
    """What `fusedq check --json` prints, checked against the published schema."""
    result = fusedq("check", "--json", *arguments)
    found = json.loads(result.stdout)
    jsonschema.validate(found, json.loads((SCHEMAS / "check.v1.json").read_text()))
    return found


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version(argument: str) -> None:
    result = fusedq(argument)
    assert (result.exit_code, result.output.strip()) == (0, __version__)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(("device", "kernel"), [("cpu", "cpu-fused"), ("h200", "triton-gemm")])
def test_check_names_a_kernel_for_every_layer(name: str, device: str, kernel: str) -> None:
    result = fusedq("check", str(asset(name)), "--device", device, "-tp", "1,2")
    assert result.exit_code == 0, result.output
    assert result.output.count(f"fused: 8 (8 x {kernel})") == 2
    assert result.output.count("fallbacks: 0") == 2
    assert "layers.0-1.mlp.down_proj x2" in result.output


def test_check_refuses_with_every_problem_and_exit_code_1(tmp_path: Path) -> None:
    module = "model.layers.0.mlp"
    write_checkpoint(
        tmp_path,
        layers=2,
        edits=[drop(f"{module}.up_proj.scales"), drop(f"{module}.down_proj.qzeros")],
    )
    result = fusedq("check", str(tmp_path))
    assert result.exit_code == 1
    assert "2 problems" in result.stderr
    assert f"{module}.up_proj: found" in result.stderr
    assert f"{module}.down_proj: found" in result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    rows = {words[0]: words[-1] for words in lines}
    assert rows[f"{module}.up_proj"] == rows[f"{module}.down_proj"] == "refused"
    assert rows["model.layers.1.mlp.gate_up_proj"] == "fused"
    # Half of a fused layer is no layer
    assert f"{module}.gate_up_proj" not in rows


def test_check_of_one_bad_size_among_good_ones(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, intermediate=96)
    found = document(str(tmp_path), "-tp", "1,8")
    good, bad = found["results"]
    assert (good["verdict"], bad["verdict"]) == ("fused", "refused")
    assert good["problems"] == []
    assert all("sizes that work for the whole model: 1, 2" in p["fix"] for p in bad["problems"])
    assert fusedq("check", str(tmp_path), "-tp", "1,8").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "known devices"),
        (("-tp", "two"), "is not a list of numbers"),
        (("-tp", "0"), "start at 1"),
        (("--dtype", "float32"), "'float32' is not one of"),
        (("-pp", "0"), "pipeline-parallel-size"),
        (("--kv-cache-dtype", "int3"), "'int3' is not one of"),
        (("--gpu-memory-utilization", "1.5"), "gpu-memory-utilization"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = fusedq("check", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_more_stages_than_layers_is_wrong_usage(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layers=2)
    result = fusedq("check", str(tmp_path), "-pp", "3")
    assert result.exit_code == 2
    assert "3 pipeline stages for 2 layers" in result.output


def test_a_missing_directory_is_refused() -> None:
    result = fusedq("check", "no/such/model")
    assert result.exit_code == 1
    assert "not a local directory" in result.output
    error = document("no/such/model")["error"]
    assert error["type"] == "CheckpointError"
    assert error["problems"] == []


def test_amd_is_refused_by_name_but_for_consent(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    result = fusedq("check", str(tmp_path), "--device", "mi300x")
    assert result.exit_code == 1
    found = "device mi300x: found AMD gfx942, for which kernels were compiled and never run; "
    assert f"{found}supported: NVIDIA GPUs" in result.stderr
    assert '"device": "experimental"' in result.stderr
    (refused,) = document(str(tmp_path), "--device", "mi300x")["results"]
    assert [problem["layer"] for problem in refused["problems"]] == ["device mi300x"]
    arguments = (str(tmp_path), "--device", "mi300x", "--experimental-device")
    (consented,) = document(*arguments)["results"]
    assert consented["counts"]["fused"] > 0
    launches = [row[tokens] for row in consented["layers"] for tokens in ("decode", "prefill")]
    assert {each["source"].partition(", compiled")[2] for each in launches} == {", never run"}


def test_devices_by_architecture_get_the_engines_verdict(tmp_path: Path) -> None:
    """A name in any case; also one without a table of its own, as a GPU that is found gets it."""
    write_checkpoint(tmp_path)
    assert document(str(tmp_path), "--device", "H200")["device"]["name"] == "h200"
    result = fusedq("check", str(tmp_path), "--device", "sm_75")
    assert result.exit_code == 1
    assert "1 problem in" in result.stderr
    assert "device sm_75: found sm_75 of compute capability 7.5; supported: 8.0" in result.stderr
    (newer,) = document(str(tmp_path), "--device", "sm_103")["results"]
    assert newer["verdict"] == "fused"


def test_a_size_named_twice_is_checked_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    found = document(str(tmp_path), "-tp", "2,1,2")["results"]
    assert [each["tensor_parallel_size"] for each in found] == [2, 1]


def test_weights_that_do_not_fit_are_no_question_of_lengths(tmp_path: Path) -> None:
    write_headers(tmp_path, MODELS["Llama-3.3-70B"])
    (result,) = document(str(tmp_path), "--device", "rtx4090")["results"]
    (problem,) = result["problems"]
    assert problem["found"] == "39.50 GB of weights on a rank"
    assert result["warnings"] == []


def test_a_pipe_gets_one_line_per_row_however_long(tmp_path: Path) -> None:
    write_headers(tmp_path, MODELS["Llama-3.3-70B"], "gptq-order")
    arguments = ("-tp", "2", "--device", "h100", "--max-model-len", "8192", "--max-num-seqs", "16")
    lines = fusedq("check", str(tmp_path), *arguments).stdout.splitlines()
    rows = [line for line in lines if line.strip().startswith("model.layers.")]
    assert max(map(len, rows)) > 220
    assert all(row.split()[1] == "x80" and row.split()[-1] == "fused" for row in rows)
    (kv,) = (line for line in lines if "KV cache" in line)
    # 2 x 4 heads x 128 x 2 bytes x 80 layers for a token
    assert "KV cache for 16 x 8192 tokens (the activations' dtype, 163840 bytes per token, " in kv
    assert any(line.startswith("not counted: CUDA context and graphs, ") for line in lines)
    assert float(kv.split()[0]) == 21.475
    (order,) = (line for line in lines if "warning" in line and "down_proj" in line)
    # 17,696 rows for 14,336, in 139 blocks of 128 rows: 4 bits each, a 16-bit scale for each 16 of
    # them; and a row's place in 4 bytes, for 8,192 outputs: 139 x 128 x 5 / 14336 + 0.005
    assert "1.23 times its share of the rows, 6.21 bits per weight with the scales" in order


def test_expert_parallel_ranks_hold_whole_experts(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    arguments = ("--device", "cpu", "-tp", "2")
    cut = document(str(tmp_path), *arguments)["results"][0]
    whole = document(str(tmp_path), *arguments, "--expert-parallel")["results"][0]
    assert (cut["expert_parallel"], whole["expert_parallel"]) == (False, True)
    rows = [
        next(row for row in result["layers"] if row["layers"].startswith("model.layers.0.mlp"))
        for result in (cut, whole)
    ]
    assert [row["experts"] for row in rows] == [[0, 1, 2, 3], [0, 1]]
    assert [row["out_features"] for row in rows] == [96, 192]
    text = fusedq("check", str(tmp_path), *arguments, "--expert-parallel").output
    assert "tensor_parallel_size 2, expert-parallel on cpu" in text
    assert "model.layers.0.mlp.experts.w13 (2 experts)" in text


def test_dtype_is_the_checkpoints_unless_given(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)  # says float16
    assert document(str(tmp_path))["dtype"] == "float16"
    assert document(str(tmp_path), "--dtype", "bfloat16")["dtype"] == "bfloat16"


def test_verify_says_that_it_needs_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = fusedq("verify", "model")
    assert result.exit_code == 2
    assert "vLLM is not installed" in result.output


def test_strict_refuses_what_is_otherwise_a_warning(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.o_proj"
    write_checkpoint(
        tmp_path,
        edits=[make_plain(module, 64, 64)],
        config={"modules_to_not_convert": ["o_proj"]},
    )
    arguments = ("check", str(tmp_path), "--dtype", "float16")
    lax, strict = fusedq(*arguments), fusedq(*arguments, "--strict")
    assert (lax.exit_code, strict.exit_code) == (0, 1)
    text = f"{module}: a linear layer that the checkpoint leaves unquantized"
    assert f"warning: {text}" in lax.output
    assert f"refused (--strict): {text}" in strict.output
    (warned,) = document(str(tmp_path), "--dtype", "float16")["results"][0]["warnings"]
    assert warned["layer"] == module


def test_a_kv_cache_that_is_counted_too_large_is_noted_and_not_refused(tmp_path: Path) -> None:
    """8 x 131072 tokens do not fit 24 GB where every layer keeps them all."""
    write_headers(tmp_path, MODELS["Llama-3.1-8B"])
    arguments = (str(tmp_path), "--device", "rtx4090", "--max-num-seqs", "8")
    assert fusedq("check", *arguments, "--strict").exit_code == 1
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"sliding_window": 4096})
    done = fusedq("check", *arguments, "--strict")
    assert done.exit_code == 0, done.output
    (result,) = document(*arguments)["results"]
    assert result["warnings"] == []
    assert [note["message"] for note in result["notes"]] == [
        "the KV cache counts every token where no rule is known; not modelled, so no reason to "
        "refuse: sliding_window 4096"
    ]


def test_files_beside_the_model_are_named_once(tmp_path: Path) -> None:
    write_headers(tmp_path, MODELS["Qwen2.5-0.5B"])
    before = document(str(tmp_path), "--device", "h200", "-tp", "1,2")["results"]
    lora = {"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 64)}
    for name in ("adapter_model.safetensors", "old.safetensors"):
        save_file(lora, tmp_path / name)
    results = document(str(tmp_path), "--device", "h200", "-tp", "1,2")["results"]
    message = "not read, as no part of the model: adapter_model.safetensors, old.safetensors"
    for found, expected in zip(results, before, strict=True):
        assert found.pop("notes") == [{"layer": str(tmp_path), "message": message}]
        expected.pop("notes")
        assert found == expected
    printed = fusedq("check", str(tmp_path), "--device", "h200", "-tp", "1,2").output
    assert printed.count("adapter_model.safetensors") == 1
    save_file(lora, tmp_path / "consolidated.safetensors")
    (result,) = document(str(tmp_path), "--device", "h200")["results"]
    assert [each["message"] for each in result["warnings"]] == [
        "vLLM loads consolidated.safetensors in place of the model, unless with --load-format "
        "safetensors"
    ]


def test_json_has_every_number_of_the_table(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym-order", layers=3)
    (result,) = document(str(tmp_path), "--device", "h200", "-tp", "2")["results"]
    down = next(row for row in result["layers"] if "down_proj" in row["layers"])
    assert down["layers"] == "model.layers.0-2.mlp.down_proj x3"
    assert (down["count"], down["bits"], down["symmetric"]) == (3, 4, True)
    assert (down["group_size"], down["act_order"], down["phase"]) == (32, True, 0)
    # 48 of 96 in_features may touch all 3 groups, each padded to whole steps of 8
    assert (down["in_features"], down["resident_rows"], down["out_features"]) == (48, 64, 64)
    assert down["kernel"] == down["decode"]["kernel"] == "triton-gemm"
    assert down["decode"]["tile"]["block_m"] == 16
    # The layout pads N to 128 and K to a whole block of 128
    assert down["bytes"]["qweight"] == 3 * 128 * 128 // 2
    assert down["bytes"]["perm"] == 3 * 64 * 4
    assert result["counts"] == {"fused": 12, "unquantized": 2, "fallbacks": 0}


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "größe")
    done = subprocess.run(
        [sys.executable, "-m", "vllm_fusedq.cli", "check", str(tmp_path / "größe"), "-tp", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1
    assert "gr\\xf6\\xdfe" in done.stdout
    assert "Traceback" not in done.stderr


def test_json_goes_to_stdout_alone_and_a_pipe_gets_no_colours(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    command = [sys.executable, "-c", "from vllm_fusedq.cli import app; app()", "check"]
    env = {**os.environ, "FORCE_COLOR": "", "TERM": "xterm-256color"}
    env.pop("FORCE_COLOR")
    done = subprocess.run(
        [*command, str(tmp_path), "-tp", "3"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 1
    assert "refused" in done.stdout
    assert "refused" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_repository_through_hf_endpoint(tmp_path: Path) -> None:
    """The whole way: another process, the hub client's own setting, no weight downloaded."""
    write_checkpoint(tmp_path / "served", "ct-sym")
    with serving_hub(Hub(tmp_path / "served")) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        code = "from vllm_fusedq.cli import app; app()"
        done = subprocess.run(
            [sys.executable, "-c", code, "check", hub.repository, "--json"],
            capture_output=True,
            text=True,
            env=env,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["counts"]["fused"] == 4
    assert {name for name, _ in hub.sent} == {"config.json", "model.safetensors"}


def test_the_largest_models_fit_a_laptop(tmp_path: Path) -> None:
    """405 billion parameters in 191 files, in a process that imports no torch."""
    write_headers(tmp_path, MODELS["Llama-3.1-405B"], "gptq", shards=191)
    # VmHWM, because ru_maxrss counts what the parent held before it became this process
    code = """
import json, sys, time
start = time.perf_counter()
from vllm_fusedq.cli import app
try:
    app()
finally:
    peak = next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))
    heavy = sorted({"torch", "triton", "transformers", "vllm", "numpy"} & set(sys.modules))
    print(json.dumps([time.perf_counter() - start, int(peak) / 1024, heavy]), file=sys.stderr)
"""
    for device in ("h200", "cpu"):
        options = ["-tp", "8,16", "-pp", "2", "--device", device, "--json"]
        done = subprocess.run(
            [sys.executable, "-c", code, "check", str(tmp_path), *options],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        seconds, megabytes, heavy = json.loads(done.stderr)
        print(f"{device}: {seconds:.2f} s, {megabytes:.0f} MB")
        assert heavy == []
        assert megabytes < 200
        results = json.loads(done.stdout)["results"]
        assert [sum(row["count"] for row in each["layers"]) for each in results] == [504, 504]


def test_it_runs_as_a_module() -> None:
    """For an installation into a folder whose scripts are not on PATH."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_fusedq.cli", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "fusedq [OPTIONS] COMMAND" in done.stdout


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(("device", "verdict"), [("cpu", 0), ("mi300x", 1)])
def test_the_verdict_outlives_a_reader_that_goes_away(
    options: list[str], device: str, verdict: int
) -> None:
    """`fusedq check ... | head -1`: nobody reads on, and the exit code is the verdict."""
    code = "from vllm_fusedq.cli import app; app()"
    arguments = ["check", str(asset(CHECKPOINTS[0])), "--device", device, *options]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read().count(b"Error") == 0
    assert process.wait() == verdict
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", str(asset(CHECKPOINTS[0])), "--device", "cpu"],
        ["check", str(asset(CHECKPOINTS[0])), "--device", "cpu", "--json"],
        ["version"],
    ],
    ids=["text", "json", "version"],
)
def test_output_that_cannot_be_written_is_no_verdict(arguments: list[str]) -> None:
    code = "from vllm_fusedq.cli import app; app()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert done.stderr == "the output cannot be written: No space left on device\n"


def test_a_closed_stdout_leaves_the_verdict() -> None:
    arguments = ["check", str(asset(CHECKPOINTS[0])), "--device", "cpu"]
    command = [sys.executable, "-m", "vllm_fusedq.cli", *arguments]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_every_command_says_that_its_output_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "source")
    model = str(tmp_path / "source")
    for arguments in (
        ["convert", model, str(tmp_path / "out")],
        ["selfcheck", model, "--device", "cpu", "--kernel", "cpu-striped"],
    ):
        with open("/dev/full", "w") as full, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", full)
            with pytest.raises(SystemExit) as end:
                app(arguments)
            patched.undo()
        assert end.value.code == 3, arguments


def test_ctrl_c_ends_a_wait_for_the_hub_without_a_traceback() -> None:
    # A background job of a shell, this test perhaps, would hand down that it ignores Ctrl-C.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from vllm_fusedq.cli import app; app()"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        process = subprocess.Popen(
            [sys.executable, "-c", code, "check", "owner/name", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**env, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"},
        )
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
