"""Every Triton kernel, with every tile the table can choose, compiled for sm_80 and sm_90.

Needs no GPU: the launchers run on meta tensors of FLUX's shapes, and what they would launch is only
compiled (with the divisibility that the JIT derives from those very arguments). Checked in each
cubin: no spills, shared memory within the device's limit, tensor-core instructions in the GEMMs,
and as many programs on an SM as the grid counts on. The table of registers and shared memory goes
to $D2M_ARTIFACTS/triton_resources.md, or into pytest's temporary folder.

The compiling happens in worker processes (this file run as a script), so that nothing of it leaks
into other tests; Triton's own cache makes a second run quick. It is done with the installed Triton
and with every other one that D2M_TRITON_PATHS names: folders, separated as in PATH, each filled by

    pip install --no-deps --target FOLDER triton==3.6.0

Two Tritons allocate registers differently, so the oldest supported one ought to be among them.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ARCHS = (90, 80)
BUDGETS = Path(__file__).with_name("sass_budgets.json")
SHARED_LIMIT = {90: 227 * 1024, 80: 163 * 1024}
REGISTERS = 65536
MOST_PARAMETERS = 30
OTHERS_OF_TRITON = [f for f in os.environ.get("D2M_TRITON_PATHS", "").split(os.pathsep) if f]
GEMMS = ("_grouped_gemm_fwd", "_down_fwd", "_down_bwd", "_weight_bwd")
OTHERS = ("_route_fwd", "_count_fwd", "_permute_fwd", "_combine_fwd", "_bias_bwd")
# (T, D, F, shared, E, K): FLUX.1-MoE-L's FFN, and a DiT-XL/2 whose experts no tile divides; as many
# experts as there may be; sizes that nothing divides, and sizes 1: constants to the JIT.
SHAPES = {
    "flux": (4608, 3072, 12288, 3072, 12, 2),
    "dit-xl": (1000, 1152, 4608, 1152, 8, 2),
    "many": (4608, 3072, 3072 + 256 * 64, 3072, 256, 2),
    "odd": (127, 33, 5 + 3 * 7, 5, 3, 3),
    "ones": (1, 1, 2, 1, 1, 1),
}


# -------------------------------------------------------------------------------------- the worker


class CompileOnlyDriver:
    """Stands in for the CUDA driver: names a target, launches nothing."""

    def __init__(self, arch):
        self.arch = arch

    def is_active(self):
        return True

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def cases(arch: int):
    """(label, {stage: config}, function) of everything to compile for one architecture."""
    from d2m_kernels.backends.triton import configs

    table = f"sm{arch}"
    tiles = {stage: configs.candidates(stage, table) for stage in configs.STAGES}
    chosen = {stage: c[-2] for stage, c in tiles.items()}  # what FLUX's own sizes get
    yield "flux chosen", chosen, lambda: layer("flux", "gelu_tanh")
    before = {s: replace(c, tickets=False, fence=False, approx=False) for s, c in chosen.items()}
    yield "flux as before", before, lambda: layer("flux", "gelu_tanh")
    if arch == 90:
        pins = chosen | {"up": replace(chosen["up"], shared_tma=True)}
        yield "flux shared tma", pins, lambda: layer("flux", "gelu_tanh")
    for i in range(max(len(c) for c in tiles.values())):
        pins = {stage: c[min(i, len(c) - 1)] for stage, c in tiles.items()}
        for activation in ("gelu_tanh", "geglu"):
            for shape in ("flux", "dit-xl"):
                yield f"{shape} {activation}", pins, lambda a=activation, s=shape: layer(s, a)
            label = f"flux pair {activation}"
            yield label, pins, lambda a=activation: layer("flux", a, tokens=(4096, 512))
    fp32 = dict.fromkeys(configs.STAGES, configs.FP32)
    for activation in ("gelu_tanh", "geglu"):
        for tf32 in (False, True)[: 2 if activation == "gelu_tanh" else 1]:
            label = f"flux {activation} {'tf32' if tf32 else 'fp32'}"
            yield label, fp32, lambda a=activation, t=tf32: layer("flux", a, "float32", t)
    whole = {stage: configs.without_halves(c[-2]) for stage, c in tiles.items()}
    for activation in ("gelu_tanh", "geglu"):
        yield f"flux whole {activation}", whole, lambda a=activation: layer("flux", a)
    for i in range(len(tiles["down_combine"])):
        pins = {"down_combine": tiles["down_combine"][i]}
        yield "flux block", pins, block_end
        yield "flux block pair", pins, lambda: block_end((4096, 512))
    few = {stage: tiles[stage][0] for stage in tiles}  # for groups of 36 rows
    few |= {s: tiles[s][-2] for s in ("down_combine", "dx_combine")}  # but these take T rows
    yield "many gelu_tanh", few, lambda: layer("many", "gelu_tanh")
    ragged = {"": (configs.RAGGED, "bfloat16"), " fp32": (configs.RAGGED_FP32, "float32")}
    for suffix, (tile, dtype) in ragged.items():
        pins = dict.fromkeys(configs.STAGES, tile)
        for shape, activation, tokens in (
            ("odd", "swiglu", (127, 9)), ("odd", "gelu", ()), ("ones", "gelu", ()),
        ):  # fmt: skip
            sizes = (shape, activation, dtype, False, tokens)
            yield f"{shape} {activation}{suffix}", pins, lambda s=sizes: layer(*s)
    half = {stage: c[0] for stage, c in tiles.items()}
    yield "flux gelu fp16", half, lambda: layer("flux", "gelu", "float16")
    for experts in (12, 64, 256):
        for x, router in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32",) * 2):
            label = f"E={experts} {x} {router}"
            yield label, {}, lambda e=experts, x=x, r=router: small_stages(e, x, r)


def layer(shape: str, activation: str, dtype: str = "bfloat16", tf32: bool = False, tokens=()):
    """Forward (inference and training) and backward of the layer, on meta tensors.

    `tokens`: the rows of each stream, where there are two.
    """
    import torch

    from d2m_kernels.activations import is_gated
    from d2m_kernels.backends import triton as triton_backend
    from d2m_kernels.contract import FFNAttrs, FFNGrads, FFNInputs

    T, D, F, S, E, K = SHAPES[shape]
    H, gated = (F - S) // E, is_gated(activation)
    torch.backends.cuda.matmul.allow_tf32 = tf32

    def new(*size, dtype=dtype):
        return torch.empty(*size, dtype=getattr(torch, dtype), device="meta")

    def ints(*size):
        return new(*size, dtype="int32")

    def inputs(T):
        gate, b_gate = (new(F, D), new(F)) if gated else (None, None)
        routing = (new(T, K, dtype="float32"), ints(E + 1), ints(T * K), ints(T * K))
        return FFNInputs(new(T, D), new(F, D), gate, new(D, F), new(F), b_gate, new(D), *routing)

    streams = [inputs(n) for n in tokens or (T,)]
    for save in (False, True):
        attrs = FFNAttrs(S, activation, save=save)
        triton_backend.ffn_fwd(streams, attrs, [(None, None)] * len(streams))
    grads = [FFNGrads(*s[:8]) for s in streams]
    zs = [(new(len(s.x), S * (1 + gated)), new(len(s.order), H * (1 + gated))) for s in streams]
    dys = [new(len(s.x), D) for s in streams]
    triton_backend.ffn_bwd(dys, streams, zs, attrs, grads)


def block_end(tokens=()):
    """The down-projection with a block's AdaLN gate and residual in its epilogue.

    As a double block's inference has it, of both streams where there are two in `tokens`.
    """
    import torch

    from d2m_kernels.backends.triton.down import Shared, down_shared
    from d2m_kernels.backends.triton.operands import neuron_columns

    T, D, F, S, E, K = SHAPES["flux"]

    def new(*size, dtype=torch.bfloat16):
        return torch.empty(*size, dtype=dtype, device="meta")

    def end(T):
        weights, offsets = new(T, K, dtype=torch.float32), new(E + 1, dtype=torch.int32)
        return Shared(
            new(T, S), neuron_columns(new(D, F), S, 768), new(T, D), offsets, y2=new(T * K, D),
            inverse_TK=new(T, K, dtype=torch.int32), weights_TK=weights, bias=new(D),
            adaln_BD=new(1, 6 * D)[:, 5 * D :], residual_TD=new(T, D),
        )  # fmt: skip

    down_shared("down_combine", [end(n) for n in tokens or (T,)], None, S=S)


def small_stages(experts: int, x_dtype: str, router_dtype: str):
    import torch

    from d2m_kernels.backends import triton as triton_backend

    T, D, *_, K = SHAPES["flux"]
    x = torch.empty(T, D, dtype=getattr(torch, x_dtype), device="meta")
    router = torch.empty(experts, D, dtype=getattr(torch, router_dtype), device="meta")
    mask = torch.empty(T, dtype=torch.bool, device="meta")
    _, weights, ids, offsets, _, inverse = triton_backend.route(x, router, K, mask)
    adaln = torch.empty(1, 6 * D, dtype=x.dtype, device="meta")
    triton_backend.modulate_route(x, adaln[:, :D], adaln[:, D : 2 * D], 1e-6, router, K)
    triton_backend.permute(ids, experts)
    triton_backend.combine(x.new_empty(T * K, D), inverse.view(T, K), weights, offsets, x, x[0])


def resources(kernel, label: str) -> dict:
    """Registers, stack and shared memory of a cubin, and which instructions its PTX has."""
    from helpers import sass

    cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    text = sass.dump(cubin, "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    counted = sass.instructions(sass.dump(cubin, "-sass")) if label == "flux chosen" else {}
    return counted | dict(
        registers=int(registers), stack=int(stack), shared=kernel.metadata.shared,
        local="ld.local" in ptx or "st.local" in ptx, wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx, tma="cp.async.bulk.tensor" in ptx,
        wide_stores="st.global.v4" in ptx or "st.global.v8" in ptx,
        unfenced=len(sass.unfenced(ptx)),
    )  # fmt: skip


def compile_all(arch: int, only: str | None = None) -> list[dict]:
    """Rows of what every case launches, or the first case of the label `only`."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from d2m_kernels.backends.triton import configs, launch

    driver.set_active(CompileOnlyDriver(arch))
    seen, rows, current = set(), [], {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            names = dict(kernel=self.__name__.removesuffix("_kernel"), arch=arch)
            config = current.get("config") if self.__name__ in _GEMM_NAMES else None
            about = dict(label=current["label"], config=config, warps=kernel.metadata.num_warps)
            about["stage"] = current.get("stage") if config else None
            rows.append(names | about | resources(kernel, current["label"]))
        return kernel

    JITFunction.run = compile_only
    configs.arch_of, configs.capability = lambda *_: f"sm{arch}", lambda _: (arch // 10, 0)
    wanted = [case for case in cases(arch) if only in (None, case[0])]
    for label, pins, function in wanted if only is None else wanted[:1]:

        def select(stage, *_, pins=pins):
            current["config"], current["stage"] = pins[stage].name, stage
            return pins[stage]

        configs.select, current["label"] = select, label
        launch.programs = lambda *_: 1
        function()
    return rows


_GEMM_NAMES = tuple(f"{name}_kernel" for name in GEMMS)


# --------------------------------------------------------------------------------------- the tests


def other_tritons():
    """The parameters of `rows` beside the installed Triton."""
    if OTHERS_OF_TRITON:
        return [pytest.param(folder, id=Path(folder).name) for folder in OTHERS_OF_TRITON]
    reason = "D2M_TRITON_PATHS names no folder with another Triton"
    return [pytest.param(None, id="others", marks=pytest.mark.skip(reason=reason))]


def environment(folder: str | None = None) -> dict[str, str]:
    """A worker's; with the Triton of `folder`, where there is one."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, env.get("PYTHONPATH"))))
    return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def start_worker(env: dict[str, str], arch: int, *only: str) -> subprocess.Popen:
    command = [sys.executable, __file__, str(arch), *only]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def result_of(worker: subprocess.Popen):
    """triton.__file__, its version, and the rows."""
    out, err = worker.communicate()
    assert worker.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module", params=[pytest.param(None, id="installed"), *other_tritons()])
def rows(request, tmp_path_factory):
    pytest.importorskip("triton")
    folder = request.param
    env = environment(folder)
    workers, found = [start_worker(env, arch) for arch in ARCHS], []
    for worker in workers:
        module, version, compiled = result_of(worker)
        assert folder is None or Path(folder).resolve() in Path(module).resolve().parents, module
        found += compiled
    artifacts = Path(os.environ.get("D2M_ARTIFACTS") or tmp_path_factory.mktemp("triton"))
    artifacts.mkdir(parents=True, exist_ok=True)
    path = artifacts / f"triton_resources{'' if folder is None else '_' + version}.md"
    path.write_text(as_table(found))
    print(f"\nTriton {version}: registers and shared memory of {len(found)} kernels: {path}")
    return found


def as_table(found) -> str:
    head = "| kernel | arch | config | case | registers | stack | shared KB | instructions |"
    lines = [head, "|---" * 8 + "|"]
    for r in found:
        used = " ".join(name for name in ("wgmma", "mma", "tma") if r[name])
        lines.append(
            f"| {r['kernel']} | sm_{r['arch']} | {r['config'] or ''} | {r['label']} "
            f"| {r['registers']} | {r['stack']} | {r['shared'] / 1024:.1f} | {used} |"
        )
    return "\n".join(lines) + "\n"


def described(found):
    return "\n" + as_table(found)


def test_no_function_takes_more_parameters_than_a_reader_can():
    """Kernels and what they call: operands travel in bundles (operands.py)."""
    jit = pytest.importorskip("triton.runtime.jit")
    package = importlib.import_module("d2m_kernels.backends.triton")
    names = [m.name for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    found = [f for n in names for f in vars(importlib.import_module(n)).values()]
    counts = {f.__name__: len(f.arg_names) for f in found if isinstance(f, jit.JITFunction)}
    assert {f"{name}_kernel" for name in (*GEMMS, *OTHERS)} <= counts.keys()
    assert max(counts.values()) <= MOST_PARAMETERS, counts


@pytest.mark.long
def test_a_product_compiles_for_hopper():
    """One of what the tests below do with every kernel and tile."""
    pytest.importorskip("triton")
    _, _, rows = result_of(start_worker(environment(), 90, "flux block"))
    assert [(r["kernel"], r["stack"], r["wgmma"]) for r in rows] == [("_down_fwd", 0, True)]


@pytest.mark.slow
def test_every_kernel_and_config_was_compiled(rows):
    from d2m_kernels.backends.triton import configs

    for arch in ARCHS:
        kernels = {r["kernel"] for r in rows if r["arch"] == arch}
        assert kernels == {*GEMMS, *OTHERS}
        tiles = {c.name for s in configs.STAGES for c in configs.candidates(s, f"sm{arch}")}
        compiled = {r["config"] for r in rows if r["arch"] == arch and r["config"]}
        assert any(configs.named(name).halves for name in compiled)
        whole = {configs.without_halves(configs.named(name)).name for name in tiles}
        others = {c.name for c in (configs.FP32, configs.RAGGED, configs.RAGGED_FP32)}
        assert tiles | others <= compiled
        # what else was: whole tiles for halved ones, and pins to compare with
        assert {configs.named(name).block_m for name in compiled - tiles - others - whole} == {128}


@pytest.mark.slow
def test_nothing_spills(rows):
    labels = {"flux block pair", "many gelu_tanh", "odd swiglu", "odd gelu fp32", "ones gelu"}
    assert labels <= {r["label"] for r in rows}
    spilled = [r for r in rows if r["stack"] or r["local"]]
    assert not spilled, described(spilled)


@pytest.mark.slow
def test_a_fence_lies_between_copies_and_the_products_that_read_them(rows):
    wrong = [r for r in rows if r["unfenced"] and r["label"] != "flux as before"]
    assert not wrong, described(wrong)


def budgets_of(found) -> dict[str, list]:
    """{"stage, its n-th kernel": [instructions of each loop over the sum, all others]}."""
    table: dict[str, list] = {}
    for r in found:
        if r["stage"]:
            number = 1 + sum(key.startswith(r["stage"] + " ") for key in table)
            table[f"{r['stage']} {number}"] = [[n for n, _ in r["steps"]], r["rest"]]
    return table


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("folder", ["", *OTHERS_OF_TRITON])
def test_instructions_stay_within_the_budgets(folder, arch):
    """5% around sass_budgets.json, which D2M_UPDATE_BUDGETS=1 writes anew."""
    pytest.importorskip("triton")
    worker = start_worker(environment(folder), arch, "flux chosen")
    _, version, found = result_of(worker)
    key, table = f"triton {version} sm_{arch}", json.loads(BUDGETS.read_text())
    counted = budgets_of(found)
    if os.environ.get("D2M_UPDATE_BUDGETS") == "1":
        table[key] = counted
        text = json.dumps(dict(sorted(table.items())), indent=1)
        BUDGETS.write_text(re.sub(r"\s+(?=[\d\]\[])", " ", text) + "\n")
    if key not in table:
        pytest.skip(f"{BUDGETS.name} knows nothing of {key}")
    expected = table[key]
    assert counted.keys() == expected.keys()
    for stage, (steps, rest) in expected.items():
        assert counted[stage] == [pytest.approx(steps, rel=0.05), pytest.approx(rest, rel=0.05)], (
            stage
        )


@pytest.mark.slow
def test_shared_memory_fits(rows):
    from d2m_kernels.backends.triton import configs

    over = [r for r in rows if r["shared"] > SHARED_LIMIT[r["arch"]]]
    lasts = (configs.SMALL, configs.RAGGED, configs.FP32, configs.RAGGED_FP32)
    last_resort = (*(c.name for c in lasts), None)
    limit = configs.SHARED_LIMIT["small"]
    over += [r for r in rows if r["config"] in last_resort and r["shared"] > limit]
    assert not over, described(over)


@pytest.mark.slow
def test_products_run_on_tensor_cores(rows):
    def expected(r):
        if r["label"].endswith("fp32"):
            return not (r["mma"] or r["wgmma"])  # exact fp32 products: no tensor cores
        if r["arch"] == 90 and "tf32" not in r["label"]:
            return r["wgmma"]
        return r["mma"] or r["wgmma"]

    gemms = [r for r in rows if r["kernel"] in GEMMS]
    wrong = [r for r in gemms if not expected(r)]
    assert not wrong, described(wrong)


@pytest.mark.slow
def test_tma_is_used_where_the_table_says_so(rows):
    from d2m_kernels.backends.triton import configs

    aligned = [r for r in rows if r["label"].startswith("flux") and r["kernel"] in GEMMS]
    wrong = [r for r in aligned if r["tma"] != configs.named(r["config"]).tma]
    assert not wrong, described(wrong)


@pytest.mark.slow
def test_stores_are_16_bytes_wide(rows):
    gemms = [r for r in rows if r["kernel"] in GEMMS and r["label"].startswith("flux")]
    # dW2 is stored transposed: its rows are the sum's columns
    narrow = [r for r in gemms if not r["wide_stores"] and r["kernel"] != "_weight_bwd"]
    assert not narrow, described(narrow)


@pytest.mark.slow
def test_the_grid_counts_on_programs_that_fit(rows):
    from d2m_kernels.backends.triton import configs

    wrong = []
    for r in rows:
        if r["config"] is None or not r["label"].startswith("flux"):
            continue
        config = configs.named(r["config"])
        threads = 32 * r["warps"]
        registers = -(-r["registers"] // 8) * 8 * threads * config.per_sm
        shared = (r["shared"] + 1024) * config.per_sm
        if registers > REGISTERS or shared > SHARED_LIMIT[r["arch"]] + 1024:
            wrong.append(r)
    assert not wrong, described(wrong)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
    import triton

    compiled = compile_all(int(sys.argv[1]), *sys.argv[2:])
    print(json.dumps((triton.__file__, triton.__version__, compiled)))
