"""One small forward and backward of every kernel, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from d2m_kernels import (
    Stream,
    backends,
    combine,
    grouped_gemm,
    modulate_route,
    moe_ffn,
    moe_ffn_pair,
    route,
)


def main() -> None:
    torch.manual_seed(0)
    T, D, S, H, E = 70, 48, 16, 24, 5
    for name in ("cuda", "triton"):
        reason = backends.why_not(name, "cuda", torch.bfloat16)
        print(name, reason or "runs")
        if reason:
            continue
        x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        router = torch.randn(E, D, device="cuda", requires_grad=True)
        w1 = torch.randn(S + E * H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w2 = torch.randn(D, S + E * H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = moe_ffn(x, router, w1, w2, top_k=2, shared=S, backend=name)
        y.sum().backward()
        r = route(x, router, top_k=2, backend=name)
        experts = w1[S:].view(E, H, D).detach()
        h = grouped_gemm(x.detach(), experts, r.offsets, gather=r.order // 2, backend=name)
        combine(h, r, backend=name)
        for E_few in (E, 14):  # modulation inside the route kernel and before it
            many = torch.randn(E_few, D, device="cuda")
            adaln = torch.randn(2, 3 * D, device="cuda", dtype=torch.bfloat16).chunk(3, -1)
            modulate_route(x.detach(), *adaln[:2], many, top_k=2, backend=name)
        pair = [Stream(t, router, w1, w2, top_k=2, shared=S) for t in (x, x[:9])]
        sum(y.sum() for y in moe_ffn_pair(*pair, backend=name)).backward()
        with torch.no_grad():
            block = Stream(x, router, w1, w2, top_k=2, shared=S, modulation=adaln[:2],
                           gate=adaln[2], residual=x)  # fmt: skip
            moe_ffn_pair(block, pair[1], backend=name)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
