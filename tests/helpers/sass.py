"""Reading machine code: how many instructions a step of a product's sum takes, and all the rest."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?);", re.M)
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*?0x([0-9a-f]+)")
_TENSOR = re.compile(r"\b(?:HGMMA|HMMA)\b")


def dump(cubin: bytes, option: str) -> str:
    """What the cuobjdump of the imported Triton says of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> dict:
    """{"steps": a [length, tensor instructions] each innermost loop with products, "rest": others}.

    A step is everything between a loop's first instruction and its branch back.
    """
    code = [(int(address, 16), text) for address, text in _LINE.findall(sass)]
    code = [(a, t) for a, t in code if not t.strip().startswith("NOP")]
    loops = []
    for address, text in code:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address:  # a kernel ends with a branch to itself
            loops.append((int(branch[1], 16), address))
    inner = [
        (first, last) for first, last in loops
        if not any((f, e) != (first, last) and first <= f and e <= last for f, e in loops)
    ]  # fmt: skip
    steps = []
    for first, last in sorted(inner):
        body = [text for address, text in code if first <= address <= last]
        products = sum(bool(_TENSOR.search(text)) for text in body)
        if products:
            steps.append([len(body), products])
    return {"steps": steps, "rest": len(code) - sum(n for n, _ in steps)}


def unfenced(ptx: str) -> list[str]:
    """Products that may read what cp.async wrote before a proxy fence has ordered the two.

    wgmma reads shared memory through the asynchronous proxy, cp.async writes it through the generic
    one: between the wait for the copies and the product there must be a fence.
    """
    found, waited = [], False
    for line in ptx.splitlines():
        if "cp.async.wait_" in line:
            waited = True
        elif "fence.proxy.async" in line:
            waited = False
        elif "wgmma.mma_async" in line and waited:
            found.append(line.strip())
    return found
