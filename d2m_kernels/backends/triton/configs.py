"""Which tile each launch uses: a short table, keyed on stage, architecture, dtype and sizes.

A rule applies when the rows a group has on average and the width of its output do not exceed the
rule's bounds; the first that applies wins. `D2M_TRITON_CONFIG` pins: either one name for every
stage ("small", or any `Config.name`) or a list "up=128x256x64w8s3,wgrad=small". Nothing is tuned
at run time unless the user asks by pinning.
"""

import functools
import os
import re
import warnings
from dataclasses import dataclass, replace

import torch
import triton

ENV = "D2M_TRITON_CONFIG"
STAGES = ("up", "up_gated", "down", "down_combine", "act_bwd", "dx", "dx_combine", "wgrad")


@dataclass(frozen=True)
class Config:
    """One tile shape, BLOCK_M rows, BLOCK_N columns, BLOCK_K of the sum at a time, and its launch.

    `name` leaves out what is as by default; with everything in it:
    128x128x64w8s3p2g4r128halftmaatmastaticnofenceexact.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_sm: int = 1  # programs on one multiprocessor; 2 hide each other's epilogue when K is short
    tma: bool = False  # W (and A where its rows are consecutive) by TMA descriptor
    group_m: int = 8
    max_registers: int | None = None
    halves: bool = False  # a group's last rows, where they fill half a tile, in half a tile
    tickets: bool = True  # the next tile to whichever program is free, else in rounds of the grid
    fence: bool = True  # where Triton leaves it out: see `fences`
    approx: bool = True  # bf16 gelu_tanh by tanh.approx
    shared_tma: bool = False  # with tma: the shared expert's rows of A too, in their own loop

    @property
    def name(self) -> str:
        tail = f"g{self.group_m}" if self.group_m != 8 else ""
        tail += f"r{self.max_registers}" if self.max_registers else ""
        for word, (field, value) in _WORDS.items():
            tail += word if getattr(self, field) == value else ""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile}w{self.warps}s{self.stages}p{self.per_sm}{tail}"

    def parts(self, most: int) -> int:
        """In how many column blocks an epilogue walks the tile, for `most` numbers a thread."""
        held = self.block_m * self.block_n // (32 * self.warps)
        return next((n for n in (1, 2) if held <= n * most), 4)

    def meta(self) -> dict:
        """How the JIT is to compile; the tile itself is in the launch's Product."""
        meta = dict(num_warps=self.warps, num_stages=self.stages)
        return meta if self.max_registers is None else meta | dict(maxnreg=self.max_registers)


_WORDS = {
    "half": ("halves", True), "tma": ("tma", True), "atma": ("shared_tma", True),
    "static": ("tickets", False), "nofence": ("fence", False), "exact": ("approx", False),
}  # fmt: skip
_NAME = re.compile(
    r"(\d+)x(\d+)x(\d+)w(\d+)s(\d+)(?:p(\d+))?(?:g(\d+))?(?:r(\d+))?"
    + "".join(f"({word})?" for word in _WORDS)
)
_NUMBERS = ("block_m", "block_n", "block_k", "warps", "stages", "per_sm", "group_m",
            "max_registers")  # fmt: skip
LEAST_BLOCK_N = 32  # sums over a row's tiles have room for as many


def with_halves(config: Config) -> Config:
    """The variant that skips the empty half of a group's last tile, for twice the code."""
    return replace(config, halves=config.block_m >= 128)


def without_halves(config: Config) -> Config:
    return replace(config, halves=False)


@functools.cache
def unbounded(config: Config) -> Config:
    """For sums over two matrices without TMA: their addresses and masks take 184 registers."""
    return replace(config, max_registers=255)


@dataclass(frozen=True)
class Rule:
    config: Config
    max_rows: float = float("inf")  # average rows of a group: T for the shared one, N / E routed
    max_width: float = float("inf")  # columns of a group's output


# At most 99 KB of shared memory: sm_86, sm_89 and sm_120 have no more, and it is every stage's last
# resort on any other device. Without a bound ptxas spills a word to stay at 128 registers.
SMALL = Config(64, 64, 32, warps=4, stages=3, per_sm=2, max_registers=255)
# fp32 products without TF32 run on the plain units. Left to itself ptxas stops at 80 registers here
# to fit a third program on the SM, and spills.
FP32 = Config(64, 64, 16, warps=8, stages=2, max_registers=255)
# Sizes that 16 does not divide take a pointer and a mask an element, which no wider tile has the
# registers for.
RAGGED = Config(64, 32, 32, warps=4, stages=2, max_registers=255)
RAGGED_FP32 = replace(FP32, block_n=32)


def _static(*rules: Rule) -> tuple[Rule, ...]:
    """Where all tiles are equal a ticket decides nothing, and costs a word out of L2."""
    return tuple(replace(rule, config=replace(rule.config, tickets=False)) for rule in rules)


def _halved(*rules: Rule) -> tuple[Rule, ...]:
    """With whole tiles of 128 rows alone 8% of the routed rows are padding at T = 4608, with half
    tiles at the groups' ends 4%."""
    return tuple(replace(rule, config=with_halves(rule.config)) for rule in rules)


# sm_90. 128x256 over 8 warps needs 9.3 TB/s of L2 at 790 TFLOP/s, 128x128 needs 12.3: the wide tile
# wherever its columns are not mostly padding, else two programs of the narrow one on an SM.
# The epilogue of "act_bwd" holds dA', z and act'(z) at once: 187 to 255 registers, one program.
# Two programs of 8 warps have 128 registers a thread; left to itself ptxas takes up to 144 of them.
_WIDE = Config(128, 256, 64, warps=8, stages=3, tma=True)
_NARROW = Config(128, 128, 64, warps=8, stages=4, tma=True)
_PAIR = Config(128, 128, 64, warps=8, stages=3, per_sm=2, tma=True, max_registers=128)
_SHORT = Config(64, 128, 64, warps=4, stages=4, per_sm=2, tma=True)
_SHORT_GATED = Config(64, 64, 64, warps=4, stages=4, per_sm=2, tma=True)
_DOWN = (Rule(_PAIR, max_width=1536), Rule(_WIDE))
_SM90 = {
    "up": _halved(Rule(_SHORT, max_rows=128), Rule(_NARROW, max_width=128), Rule(_WIDE)),
    # two accumulators: with half tiles two streams in training spill 24 bytes
    "up_gated": (*_halved(Rule(_SHORT_GATED, max_rows=128)), Rule(_NARROW)),
    "down": _halved(Rule(_SHORT, max_rows=128), *_DOWN),
    "down_combine": _static(Rule(_SHORT, max_rows=512), *_DOWN),
    "act_bwd": (Rule(_SHORT, max_rows=128), Rule(_NARROW)),
    "dx": _halved(Rule(_SHORT, max_rows=128), *_DOWN),
    "dx_combine": _static(Rule(_SHORT, max_rows=512), *_DOWN),
    "wgrad": (Rule(Config(128, 256, 64, warps=8, stages=3)),),
}

# sm_80: 163 KB, mma.sync, everything by cp.async. Four warps of 128x128 leave two programs an SM;
# the backward's epilogues and masks need eight warps to stay out of local memory.
_SM80_PAIR = Config(128, 128, 32, warps=4, stages=4, per_sm=2)
_SM80_EIGHT = Config(128, 128, 32, warps=8, stages=4)
_SM80_SHORT = Config(64, 128, 32, warps=4, stages=4, per_sm=2)
_SM80_FORWARD = (Rule(_SM80_SHORT, max_rows=128), Rule(_SM80_PAIR))
_SM80_BACKWARD = (Rule(_SM80_SHORT, max_rows=128), Rule(_SM80_EIGHT))
_SM80 = {
    "up": _halved(*_SM80_FORWARD),
    "up_gated": (Rule(_SM80_SHORT),),
    "down": _halved(*_SM80_FORWARD),
    "down_combine": _static(*_SM80_FORWARD),
    "act_bwd": _SM80_BACKWARD,
    "dx": _halved(*_SM80_BACKWARD),
    "dx_combine": _static(*_SM80_BACKWARD),
    "wgrad": (Rule(_SM80_PAIR),),
}
TABLE = {"sm90": _SM90, "sm80": _SM80}
# Bytes of shared memory a program may have, where a table applies.
SHARED_LIMIT = {"sm90": 227 * 1024, "sm80": 163 * 1024, "small": 99 * 1024}


def candidates(stage: str, arch: str) -> tuple[Config, ...]:
    """Every 16-bit config the table can choose for a stage, SMALL last."""
    found = [rule.config for rule in TABLE.get(arch, {}).get(stage, ())]
    return tuple(dict.fromkeys((*found, SMALL)))


def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where there is no CUDA."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def fences(device: torch.device) -> bool:
    """Whether the kernels must order cp.async's writes before a product's reads themselves.

    From Hopper on products read shared memory through another proxy than cp.async writes it by;
    only a proxy fence orders the two, and Triton emits it itself from 3.8 on.
    """
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    return version < (3, 8) and capability(device)[0] >= 9


@functools.cache
def arch_of(device_type: str, device_index: int | None) -> str:
    """The table that fits a device: by capability, and by the shared memory it offers."""
    if device_type != "cuda":
        return "small"
    major, minor = torch.cuda.get_device_capability(device_index)
    if (major, minor) == (9, 0):
        return "sm90"
    properties = torch.cuda.get_device_properties(device_index)
    roomy = getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED_LIMIT["sm80"]
    return "sm80" if major >= 8 and roomy else "small"


NAMED = {"small": SMALL, "ragged": RAGGED, "fp32": FP32, "ragged_fp32": RAGGED_FP32}


@functools.cache
def named(name: str) -> Config:
    """The config that ENV may name so, be it in the table or not.

    Raises:
        ValueError: `name` is neither in NAMED nor made as `Config.name` is.
    """
    if name in NAMED:
        return NAMED[name]
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"expected {', '.join(NAMED)} or a tile such as {SMALL.name}")
    groups = match.groups()
    numbers = {f: int(n) for f, n in zip(_NUMBERS, groups, strict=False) if n is not None}
    words = dict(w for w, given in zip(_WORDS.values(), groups[len(_NUMBERS) :], strict=True)
                 if given)  # fmt: skip
    config = Config(**numbers, **words)
    least = dict(block_m=32 if config.halves else 16, block_n=LEAST_BLOCK_N, block_k=16, warps=1)
    for field, bound in least.items():
        value = getattr(config, field)
        if value < bound or value & (value - 1):
            raise ValueError(f"{field} is {value}; expected a power of two of at least {bound}")
    if not (config.stages and config.per_sm and config.group_m):
        raise ValueError("stages, programs and group_m; expected at least 1 of each")
    return config


@functools.cache
def _pinned(spec: str) -> dict[str, Config]:
    """{stage: config} of an ENV value; what it does not understand it warns about and ignores."""
    pins = {}
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        stage, _, name = entry.rpartition("=")
        try:
            if stage not in ("", *STAGES):
                raise ValueError(f"expected NAME or STAGE=NAME, a stage of {', '.join(STAGES)}")
            config = named(name)
        except ValueError as error:
            warnings.warn(f"{ENV}: ignored {entry!r}; {error}", stacklevel=2)
            continue
        pins.update(dict.fromkeys(STAGES if stage == "" else (stage,), config))
    return pins


def from_table(arch: str, stage: str, rows: float, width: int) -> Config:
    """The first rule that applies to 16-bit numbers."""
    for rule in TABLE.get(arch, {}).get(stage, ()):
        if rows <= rule.max_rows and width <= rule.max_width:
            return rule.config
    return SMALL


def select(stage: str, x: torch.Tensor, rows: float, width: int, sizes: tuple) -> Config:
    """The config of a launch on x's device and dtype, for groups of `rows` x `width` outputs.

    `sizes`: every width and depth of the launch, which decide how wide its loads may be.
    """
    pinned = _pinned(os.environ.get(ENV, "")).get(stage)
    if pinned is not None:
        return pinned
    ragged = any(size % 16 for size in sizes)
    if x.dtype == torch.float32:
        return RAGGED_FP32 if ragged else FP32
    if ragged:
        return RAGGED
    return from_table(arch_of(x.device.type, x.device.index), stage, rows, width)
