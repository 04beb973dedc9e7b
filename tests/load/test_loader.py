"""From checkpoint tensors to resident weights: exact at every split, checked, in little memory."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoints import (
    AWQ_BUILDS,
    BITSANDBYTES_BUILDS,
    BUILDS,
    WIDTH_BUILDS,
    drop,
    write_checkpoint,
)
from loading import DEVICES, assert_exact, load, plans_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import LayerPlan


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("build", "tp_size"),
    [
        *product([*BUILDS, *AWQ_BUILDS, *BITSANDBYTES_BUILDS], [1, 2, 4]),
        *product(WIDTH_BUILDS, [4]),
    ],
)
def test_every_rank_holds_exactly_its_slice(
    tmp_path: Path, build: str, tp_size: int, device: str
) -> None:
    # 192 / 4 = 48 rows per rank: with groups of 32, ranks begin and end inside groups.
    truths = write_checkpoint(tmp_path, build, hidden=128, intermediate=192, group_size=32)
    checkpoint = read_checkpoint(tmp_path)
    for rank in range(tp_size):
        for plan in plans_of(checkpoint, device, tp_size, rank):
            assert_exact(load(plan, tmp_path), truths)


def test_a_rank_that_starts_inside_a_group_has_a_phase(tmp_path: Path) -> None:
    truths = write_checkpoint(tmp_path, "awq", hidden=128, intermediate=192, group_size=32)
    down = [
        next(p for p in plans_of(read_checkpoint(tmp_path), "gpu", 4, rank) if "down" in p.prefix)
        for rank in range(4)
    ]
    assert [plan.phase for plan in down] == [0, 16, 0, 16]
    assert_exact(load(down[1], tmp_path), truths)


def test_one_fused_module_on_disk_fills_all_parts(tmp_path: Path) -> None:
    """Phi-3 stores qkv_proj as one module; vLLM loads it without a shard id."""
    from dataclasses import replace

    from vllm_fusedq.formats import Region
    from vllm_fusedq.plan.shards import PartShard

    truths = write_checkpoint(tmp_path, "gptq-sym", hidden=128, intermediate=192)
    plan = next(p for p in plans_of(read_checkpoint(tmp_path), "cpu") if "o_proj" in p.prefix)
    module = plan.shard.parts[0].module
    parts = tuple(
        PartShard(module, name, Region(start, start + size, 0, 128))
        for name, start, size in (("q", 0, 64), ("k", 64, 32), ("v", 96, 32))
    )
    plan = replace(plan, shard=replace(plan.shard, parts=parts), formats=plan.formats * 3)
    loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for stored in plan.formats[0].tensors:
            loader.add(stored.name, file.get_tensor(f"{module}.{stored.name}"))
    loader.check_complete()
    assert_exact(loader, truths)


def test_parts_may_differ_in_optional_tensors(tmp_path: Path) -> None:
    """GPTQ's g_idx may be missing in one part of a fused layer."""
    module = "model.layers.0.mlp.gate_proj"
    truths = write_checkpoint(tmp_path, "gptq-sym", edits=[drop(f"{module}.g_idx")])
    plans = plans_of(read_checkpoint(tmp_path), "cpu")
    loader = load(next(plan for plan in plans if "gate_up_proj" in plan.prefix), tmp_path)
    assert loader.tensor_dtypes["g_idx"] is torch.int32
    assert_exact(loader, truths)


@pytest.fixture
def awq_plan(tmp_path: Path) -> LayerPlan:
    write_checkpoint(tmp_path, "awq", hidden=64, intermediate=96)
    plans = plans_of(read_checkpoint(tmp_path), "cpu")
    return next(plan for plan in plans if "down_proj" in plan.prefix)


def stored_tensors(path: Path, plan: LayerPlan) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", "pt") as file:
        module = plan.shard.parts[0].module
        return {t.name: file.get_tensor(f"{module}.{t.name}") for t in plan.formats[0].tensors}


def test_a_tensor_that_never_arrives_is_named(tmp_path: Path, awq_plan: LayerPlan) -> None:
    loader = LayerLoader.create(awq_plan, torch.float16, torch.device("cpu"))
    loader.add("qweight", stored_tensors(tmp_path, awq_plan)["qweight"])
    with pytest.raises(WeightLoadError) as error:
        loader.check_complete()
    assert "2 tensors were never loaded" in str(error.value)
    assert "or --load-format dummy reads none; download the checkpoint again" in str(error.value)
    assert "model.layers.0.mlp.down_proj.qzeros" in str(error.value)
    assert "model.layers.0.mlp.down_proj.scales" in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scales", lambda t: t[:-1], "the header said torch.float16"),
        ("scales", lambda t: t.float(), "loaded as torch.float32"),
        ("scales", lambda t: t.fill_(float("nan")), "NaN or infinite"),
        ("scales", lambda t: t.fill_(float("inf")), "NaN or infinite"),
    ],
)
def test_bad_tensors_are_refused(
    tmp_path: Path, awq_plan: LayerPlan, name: str, change, message: str
) -> None:
    tensors = stored_tensors(tmp_path, awq_plan)
    tensors[name] = change(tensors[name])
    loader = LayerLoader.create(awq_plan, torch.float16, torch.device("cpu"))
    bad = tensors.pop(name)
    for suffix, tensor in tensors.items():
        loader.add(suffix, tensor)
    with pytest.raises(WeightLoadError) as error:
        loader.add(name, bad)
    assert message in str(error.value)
    assert "model.layers.0.mlp.down_proj.scales" in str(error.value)


def test_an_unknown_part_or_tensor_is_refused(tmp_path: Path, awq_plan: LayerPlan) -> None:
    loader = LayerLoader.create(awq_plan, torch.float16, torch.device("cpu"))
    tensor = stored_tensors(tmp_path, awq_plan)["qweight"]
    with pytest.raises(WeightLoadError, match="vLLM loads part 'q', but the plan knows None"):
        loader.add("qweight", tensor, "q")
    with pytest.raises(WeightLoadError, match=r"unexpected tensor .* supported: qweight"):
        loader.add("weight_packed", tensor)


def test_loading_again_writes_into_the_same_memory(tmp_path: Path, awq_plan: LayerPlan) -> None:
    loader = load(awq_plan, tmp_path)
    before = (loader.packed.qweight.data_ptr(), loader.packed.qweight.clone())
    for name, tensor in stored_tensors(tmp_path, awq_plan).items():
        loader.add(name, tensor)
    loader.check_complete()
    assert loader.packed.qweight.data_ptr() == before[0]
    assert torch.equal(loader.packed.qweight, before[1])


MEMORY_PROBE = """
import json, sys, threading, time
from pathlib import Path
sys.path[:0] = {path!r}
import torch
from safetensors import safe_open
from loading import LayerLoader, load, plans_of
from vllm_fusedq.checkpoint.read import read_checkpoint

def anonymous() -> int:
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def peak_of(work):
    done, peak = threading.Event(), [0]
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return result, peak[0]

torch.set_num_threads(2)
folder = Path(sys.argv[1])
small, big = (plans_of(read_checkpoint(folder / name), sys.argv[2]) for name in ("small", "big"))
load(small[0], folder / "small")
plan = next(plan for plan in big if "down_proj" in plan.prefix)
base = anonymous()
loader, peak = peak_of(lambda: load(plan, folder / "big"))
packed = sum(t.nbytes for t in (loader.packed.qweight, loader.packed.scales))
print(json.dumps({{"packed": packed, "beyond": peak - base - packed}}))
"""


def test_the_process_grows_by_at_most_twice_the_packed_layer(tmp_path: Path) -> None:
    """As the system counts it; `test_memory.py` has every packing, as torch counts it."""
    write_checkpoint(tmp_path / "small", "awq", hidden=64, intermediate=96)
    write_checkpoint(tmp_path / "big", "awq", hidden=1024, intermediate=8192, group_size=128)
    path = [str(Path(__file__).parents[1] / "support")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE.format(path=path), str(tmp_path), "gpu"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["beyond"] <= 2 * found["packed"], found
