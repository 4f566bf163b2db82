"""One small forward and backward of every kernel, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from d2m_kernels import backends, combine, grouped_gemm, moe_ffn, route


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
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
