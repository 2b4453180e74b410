"""The rules of the house as tests: placement, names, docstrings, light imports, wheel contents."""

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "danlu"
FAMILIES = sorted(
    path.name
    for path in SOURCE.iterdir()
    if (path / "__init__.py").exists() and path.name not in ("_common", "kernels", "lab", "integrations")
)

# Files of a family that are not methods, with the reason why they have no trial of their own.
NO_TRIAL = {
    "attention/band_calls": "how ReRoPE is computed; the trial attention/rerope measures the method",
    "attention/band_cuda": "how ReRoPE is computed",
    "attention/band_kernels": "how ReRoPE is computed",
    "attention/bands": "how ReRoPE is computed",
    "attention/log_n": "an option of ReRoPE",
    "attention/codebook_init": "first codewords for vector_quantizer",
    "attention/vector_quantizer": "part of vq_attention",
    "attention/vq_blocks": "how vq_attention is computed",
    "attention/vq_calls": "how vq_attention is computed",
    "attention/vq_caches": "how vq_attention is computed",
    "attention/vq_layout": "how vq_attention is computed",
    "attention/vq_decode": "part of vq_module; equal to the full pass, which its tests hold",
    "attention/vq_module": "the layer that the trial attention/vq_attention trains",
    "attention/feature_maps": "arms of attention/linear_attention",
    "attention/linear_chunks": "how linear attention is computed",
    "attention/dynamic_rope": "an arm of the trial positions/scaling",
    "attention/windows": "masks of a baseline, which is an arm of the trials of positions",
    "attention/mask_kinds": "masks, which the tests hold to their definitions",
    "attention/split_attention": "attention under those masks, which the trial attention/decoder_only measures",
    "attention/masks": "visibility rules shared by the attention functions",
    "attention/rerope_backend": "how ReRoPE is computed",
    "attention/rerope_cache": "generation with ReRoPE",
    "attention/rerope_decode": "generation with ReRoPE",
    "diagnostics/attention_rank": "a metric, which the trial attention/decoder_only reports",
    "diagnostics/attention_concentration": "a metric, which the trials attention/concentration* report",
    "diagnostics/attention_weights": "what the reports on attention look at",
    "diagnostics/bfgs": "the minimizer of the fits",
    "diagnostics/sum_of_powers": "what the fits share",
    "diagnostics/gradient_penalty": "reports only; the trial losses/gradient_penalty measures what it bounds",
    "flows/density_terms": "part of wasserstein_flow",
    "flows/energies": "part of wasserstein_flow",
    "flows/f_divergence": "part of wasserstein_flow",
    "flows/functional": "part of wasserstein_flow",
    "flows/gradient_flow": "an identity and closed forms, which its tests hold; there is no claim about data",
    "flows/jko": "closed forms in one dimension, which its tests hold",
    "flows/ornstein_uhlenbeck": "closed forms",
    "flows/particle_trajectory": "part of wasserstein_flow",
    "flows/proximal": "the implicit step of gradient_flow",
    "flows/steepest_direction": "closed forms",
    "losses/emo_module": "the module of losses/emo",
    "losses/generalized_cross_entropy": "an arm of the trial losses/tailr",
    "losses/ghost_norms": "the per-sample scope of losses/gradient_penalty",
    "diagnostics/embedding_health": "a metric; the trial embedding_anomaly reports what it finds",
    "losses/ground_cost": "the costs of losses/emo",
    "losses/margin_softmax": "a matter of faces and open-set search, for which there are no data here",
    "losses/linear_sparse_softmax": "the loss of an arm of losses/fenchel_young on a linear head",
    "losses/sparse_softmax": "an arm of the trial losses/fenchel_young",
    "losses/linear": "an engine; its losses have trials",
    "losses/subset": "the sum over subsets of simplex/soft_topk as a loss; that trial compares the maps",
    "simplex/subset_sums": "how soft_topk(method='grad') is computed",
    "simplex/topk_rows": "how soft_topk is computed",
    "losses/linear_chunks": "part of losses/linear",
    "losses/linear_engine": "part of losses/linear",
    "losses/linear_ops": "part of losses/linear",
    "losses/linear_sparse_softmax_engine": "part of losses/linear_sparse_softmax",
    "losses/row_loss": "protocols, and the baseline of the trials of its relatives",
    "diagnostics/span_f1": "a metric; the trial attention/global_pointer reports it",
    "losses/consistency": "the trial attention/global_pointer measures R-Drop",
    "losses/global_pointer": "its trial is attention/global_pointer",
    "losses/global_pointer_engine": "part of global_pointer",
    "losses/global_pointer_ops": "part of global_pointer",
    "losses/multilabel": "the trial attention/global_pointer measures it",
    "losses/prepared": "what losses share that compute their gradients in the forward call",
    "losses/second_gradients": "what the gradient penalties share",
    "losses/targets": "checks shared by the losses",
    "optim/amos_functional": "the step of Amos on lists of tensors",
    "optim/amos_scales": "the scales that Amos is given",
    "optim/amos_step": "the arithmetic of Amos",
    "optim/amos_strategy": "an arm of the trial of Amos",
    "optim/approximate_accumulation": "its trial is accumulation_memory",
    "optim/base": "what the optimizers share",
    "optim/cycle": "what Tiger and FoldedAdamW share",
    "optim/displacement": "a part of step_size",
    "optim/eg_sgd": "the plain form of step_size, an arm of its trial",
    "optim/folded_adamw": "part of approximate_accumulation",
    "optim/gain_steps": "a part of step_size",
    "optim/gains": "a part of step_size",
    "optim/hybrid": "a remedy that the trial embedding_anomaly measures",
    "optim/in_backward": "a mode of Tiger; the trial accumulation_memory measures it",
    "optim/lazy_rows": "a mode of Lion and Tiger; the trial embedding_anomaly measures it",
    "optim/lion_functional": "part of Lion",
    "optim/lion_paths": "part of Lion",
    "optim/lion_rows": "part of Lion",
    "optim/nonfinite": "what the optimizers share",
    "optim/options": "what the optimizers share",
    "optim/padding": "a promise that its tests hold",
    "optim/param_groups": "groups for the optimizers",
    "optim/rounding": "what the optimizers share; the trial tiger_half_precision measures it",
    "optim/row_steps": "the step of lazy rows; the trial embedding_anomaly measures it",
    "optim/schedules": "schedules for the optimizers",
    "optim/shrink": "the rescue of Tiger around other optimizers; tiger_nan_survival measures it",
    "optim/sign_optimizer": "what Lion and Tiger share",
    "optim/stale_momentum": "options of Lion and Tiger around the trial embedding_anomaly",
    "optim/state": "what the optimizers share",
    "optim/step_size_options": "part of step_size",
    "optim/tie_embeddings": "a remedy that the trial embedding_anomaly measures",
    "optim/tiger_functional": "part of Tiger",
    "optim/tiger_paths": "part of Tiger",
    "optim/tiger_rows": "part of Tiger",
    "optim/tiger_steps": "part of Tiger",
    "optim/traversal": "what the optimizers share",
    "positions/alibi": "an arm of the trial positions/randomized",
    "positions/log_n": "an arm of the trials positions/randomized and positions/scaling",
    "positions/position_collator": "how positions/randomized meets the data loaders of transformers",
    "positions/position_hook": "how positions/randomized meets any training loop",
    "positions/rotary": "the baseline of the trials of its relatives",
    "precision/audit": "a tool for models; its evidence are the planted models of its tests",
    "precision/compile": "part of the training step, see precision/precision",
    "precision/hazards": "the rules of the audit",
    "precision/mask_value": "a constant",
    "precision/modes": "part of the training step, see precision/precision",
    "precision/probe": "part of the report, see precision/precision",
    "precision/report": "a measurement; precision/precision publishes one",
    "precision/train_step": "its trials are precision/precision and precision/loss_scaling",
    "simplex/entmax_rows": "what entmax and sparsemax share",
    "simplex/perturb_max": "an arm of the trial simplex/taylor_softmax",
    "simplex/softmax": "the baseline of the trials of its relatives",
    "simplex/sparse_softmax": "an arm of the trial losses/fenchel_young",
    "simplex/sparsemax": "an arm of the trial simplex/entmax",
}
# Private files whose tests are those of the public functions that use them.
NO_TEST = {
    "attention/band_kernels",
    "attention/masks",
    "attention/vq_blocks",
    "attention/vq_caches",
    "attention/vq_calls",
    "attention/vq_decode",
    "diagnostics/sum_of_powers",
    "flows/functional",
    "flows/particle_trajectory",
    "flows/proximal",
    "losses/global_pointer_engine",
    "losses/global_pointer_ops",
    "losses/linear_chunks",
    "losses/linear_sparse_softmax_engine",
    "losses/prepared",
    "losses/second_gradients",
    "losses/targets",
    "simplex/subset_sums",
    "simplex/topk_rows",
    "optim/amos_functional",
    "optim/amos_step",
    "optim/cycle",
    "optim/displacement",
    "optim/eg_sgd",
    "optim/folded_adamw",
    "optim/gain_steps",
    "optim/gains",
    "optim/lion_functional",
    "optim/lion_paths",
    "optim/lion_rows",
    "optim/nonfinite",
    "optim/options",
    "optim/row_steps",
    "optim/sign_optimizer",
    "optim/state",
    "optim/step_size_options",
    "optim/tiger_functional",
    "optim/tiger_paths",
    "optim/tiger_rows",
    "optim/tiger_steps",
    "optim/traversal",
    "precision/compile",
    "precision/hazards",
    "precision/modes",
    "precision/probe",
    "simplex/entmax_rows",
}

PUBLIC = [(family, name) for family in FAMILIES for name in importlib.import_module(f"danlu.{family}").__all__]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_is_sorted_and_resolves(family):
    module = importlib.import_module(f"danlu.{family}")
    # The order of ruff's rule: acronyms, classes, functions.
    assert module.__all__ == sorted(module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for name in module.__all__:
        assert getattr(module, name).__module__.startswith(f"danlu.{family}")


@pytest.mark.parametrize(("family", "name"), PUBLIC)
def test_docstring_has_the_required_sections(family, name):
    target = getattr(importlib.import_module(f"danlu.{family}"), name)
    text = inspect.getdoc(target) or ""
    required = ["Definition", "Args", "Returns", "Numerics", "Source", "Example"]
    if inspect.isclass(target) and not any(callable(getattr(target, call, None)) for call in ("forward", "step")):
        required.remove("Returns")
    found = re.findall(r"^(\w+):$", text, flags=re.MULTILINE)
    assert [section for section in required if section not in found] == []
    order = ["Definition", "Args", "Returns", "Raises", "Numerics", "Cost", "Differences", "Source", "Example"]
    assert [section for section in order if section in found] == [section for section in found if section in order]


def test_every_method_has_a_test_and_a_trial():
    for family in FAMILIES:
        for path in sorted((SOURCE / family).glob("_*.py")):
            if path.name == "__init__.py":
                continue
            method = path.stem.lstrip("_")
            key = f"{family}/{method}"
            assert key in NO_TEST or (ROOT / "tests" / family / f"test_{method}.py").exists(), key
            assert key in NO_TRIAL or (SOURCE / "lab" / "trials" / family / f"{method}.py").exists(), key
    for key in NO_TRIAL:
        family, method = key.split("/")
        assert (SOURCE / family / f"_{method}.py").exists(), f"{key} is an exception for nothing"


def test_every_family_has_a_contract_test():
    for family in FAMILIES:
        assert (ROOT / "tests" / family / "test_contract.py").exists(), family


def test_no_family_reaches_into_the_private_file_of_another():
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("danlu."):
                names = node.module.split(".")[1:]
                private = len(names) > 1 and names[1].startswith("_") and names[0] != "_common"
                assert not private or names[0] == parts[0], f"{path} imports {node.module}"
                assert node.level == 0


def test_no_module_uses_pickle_or_unsafe_loads():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in re.sub(r'""".*?"""|#.*', "", text, flags=re.DOTALL), path
        assert "allow_pickle=True" not in text, path
        assert "weights_only=False" not in text, path


def test_imports_are_light():
    heavy = ["transformers", "triton", "sklearn", "matplotlib", "scipy", "vl_convert", "rich", "typer", "danlu.lab"]
    code = (
        "import json, sys\n"
        + "\n".join(f"import danlu.{family}" for family in FAMILIES)
        + "\nimport torch\n"
        + f"print(json.dumps([[m for m in {heavy!r} if m in sys.modules], torch.cuda.is_initialized()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False]


def test_every_module_imports():
    import danlu

    names = [module.name for module in pkgutil.walk_packages(danlu.__path__, "danlu.")]
    assert len(names) > 30
    for name in names:
        if not name.endswith("_triton") or importlib.util.find_spec("triton"):
            importlib.import_module(name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the build backend could not be installed: {done.stderr.strip().splitlines()[-1:]}")
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("danlu/", "danlu-")) for name in names)
    for needed in (
        "danlu/py.typed",
        "danlu/lab/data.txt",
        "danlu/lab/templates/trial.html.j2",
        "danlu/kernels/cpu/common.h",
    ):
        assert needed in names
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    core = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert core == ["Requires-Dist: torch>=2.11"]
