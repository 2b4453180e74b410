"""The Triton kernels: equal to the references under the interpreter, and compilable for a GPU that is not there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "triton_script.py"
CHECKS = re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
pytestmark = needs_triton


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """The interpreter must be chosen before Triton is imported, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == "passed", results[check]


COMPILE = """
import json, sys
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from danlu.kernels import _sign_update_triton as kernels

numbers = "lr near far weight_decay gain shrink center vector_scale rms_floor decays"
types = dict.fromkeys(numbers.split(), "*fp64") | {"finite": "*i32", "partial": "*fp32", "scales": "*fp32"}
found = {}
for name, flags in {
    "_check": {"GUARD": True, "SQUARES": True, "KAHAN": False, "ALIGNED": True},
    "_scales": {"KAHAN": True},
    "_lion": {"GUARD": True, "MODE": 1, "ALIGNED": True, "M": tl.float32},
    "_tiger": {"GUARD": True, "UPDATE": True, "DECAY_VECTORS": False, "MODE": 2, "ALIGNED": True, "M": tl.bfloat16},
}.items():
    kernel = getattr(kernels, name)
    constants = {"P": tl.bfloat16, "F": tl.float32, "BLOCK": kernels.BLOCK, **flags}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*i64") for n in names}
    source = ASTSource(kernel, signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    made = compile(source, target=GPUTarget("cuda", 90, 32))
    found[name] = [made.asm["ptx"].count("ld.global.v4"), len(made.asm["cubin"]) > 0]
print(json.dumps(found))
"""


def test_kernels_compile_for_a_hopper_gpu_with_vector_loads(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    if done.returncode and "ptxas" in done.stderr:
        pytest.skip("Triton came without its assembler")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert all(cubin for _, cubin in found.values())
    for kernel in ("_check", "_lion", "_tiger"):
        assert found[kernel][0] > 0, kernel


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["lion", "tiger", "skip_and_off"])
def test_on_the_gpu(check):
    """The checks of the script, with its tensors made on the device."""
    spec = importlib.util.spec_from_file_location("triton_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with torch.device("cuda"):
        script.CHECKS[check]()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Lion", "Tiger"])
def test_graph_replay_equals_eager(name):
    import danlu.optim

    def fresh():
        torch.manual_seed(0)
        net = torch.nn.Linear(300, 200, device="cuda", dtype=torch.bfloat16)
        lr = torch.tensor(0.01, device="cuda")
        params = net if name == "Tiger" else net.parameters()
        return net, getattr(danlu.optim, name)(params, lr=lr, fused=True, capturable=True, rounding="stochastic")

    nets = []
    for captured in (False, True):
        net, optimizer = fresh()
        grads = [torch.zeros_like(p) for p in net.parameters()]
        for p, grad in zip(net.parameters(), grads, strict=True):
            p.grad = grad
        graph = None
        for step in range(8):
            for i, grad in enumerate(grads):
                generator = torch.Generator("cuda").manual_seed(10 * step + i)
                grad.copy_(torch.randn(grad.shape, generator=generator, device="cuda"))
            if not captured or step < 3:
                optimizer.step()
            elif graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
                graph.replay()
            else:
                graph.replay()
        nets.append(net)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
