// Launches route: logits and selection (one kernel up to 12 experts, else two), then the ranks of
// the counting sort.
#include "launch.h"
#include "route.cuh"

#ifndef D2M_ROUTE_BLOCKS  // the tests on the host vary it
#define D2M_ROUTE_BLOCKS kRouteBlocks
#endif

namespace d2m {
namespace {

struct RouteCall {
    const void *x, *router;
    int64_t x_stride, router_stride;
    const unsigned char* mask;
    AdaLN adaln;
    int T, D, E, K;
    float *probs, *weights;
    int *ids, *counts;
    int token_warps;
    Spans spans;
    Stream stream;
};

template <class X, int VEC>
void modulate(const RouteCall& a) {
    const int blocks = (a.T + kModulateWarps - 1) / kModulateWarps;
    auto* kernel = modulate_kernel<X, VEC>;
    D2M_LAUNCH(kernel, blocks, 1, 32 * kModulateWarps, 0, a.stream, static_cast<const X*>(a.x),
               a.x_stride, static_cast<const X*>(a.adaln.scale), a.adaln.scale_stride,
               static_cast<const X*>(a.adaln.shift), a.adaln.shift_stride, int(a.adaln.tokens),
               a.adaln.eps, a.T, a.D, static_cast<X*>(a.adaln.out));
}

// Modulation in the route kernel where one block has all the experts of a token, else before it.
template <class X, class W, int EG, bool VEC, bool FUSED>
int launch(RouteCall a) {
    if (!FUSED && a.adaln.out != nullptr) {
        modulate<X, VEC ? 16 / int(sizeof(X)) : 1>(a);
        a.x = a.adaln.out;
        a.x_stride = a.D;
        a.adaln.out = nullptr;
    }
    auto* kernel = route_kernel<X, W, EG, VEC, FUSED>;
    constexpr int kShared = RouteShared<W, EG>::kBytes;
    if (kShared > 48 * 1024) {
        const cudaError_t err =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
        if (err != cudaSuccess) return err;
    }
    D2M_LAUNCH(kernel, a.spans.blocks, (a.E + EG - 1) / EG, 32 * kDepthWarps * a.token_warps,
               kShared, a.stream, static_cast<const X*>(a.x), a.x_stride,
               static_cast<const W*>(a.router), a.router_stride, a.mask,
               static_cast<const X*>(a.adaln.scale), a.adaln.scale_stride,
               static_cast<const X*>(a.adaln.shift), a.adaln.shift_stride, int(a.adaln.tokens),
               a.adaln.eps, static_cast<X*>(a.adaln.out), a.T, a.D, a.E, a.K,
               a.spans.span / (kTokens * a.token_warps), a.probs, a.weights, a.ids, a.counts);
    if (!FUSED)
        D2M_LAUNCH(route_select_kernel, a.spans.blocks, 1, 32 * kSelectWarps, 0, a.stream, a.mask,
                   a.T, a.E, a.K, a.spans.span, a.probs, a.weights, a.ids, a.counts);
    return cudaGetLastError();
}

// The group size that wastes the fewest expert columns: 4, 8 or 12, the larger of equals.
template <class X, class W>
int dispatch(const RouteCall& a) {
    const bool vec = aligned(a.x, a.x_stride * sizeof(X), 16) &&
                     aligned(a.router, a.router_stride * sizeof(W), 16) &&
                     aligned(a.adaln.scale, a.adaln.scale_stride * sizeof(X), 16) &&
                     aligned(a.adaln.shift, a.adaln.shift_stride * sizeof(X), 16) &&
                     aligned(a.adaln.out, 0, 16) && a.D % (16 / sizeof(X)) == 0;
    if (!vec) return a.E <= 4 ? launch<X, W, 4, false, true>(a) : launch<X, W, 4, false, false>(a);
    if (a.E <= 4) return launch<X, W, 4, true, true>(a);
    if (a.E <= 8) return launch<X, W, 8, true, true>(a);
    if (a.E <= 12) return launch<X, W, 12, true, true>(a);
    return (a.E + 7) / 8 * 8 < (a.E + 11) / 12 * 12 ? launch<X, W, 8, true, false>(a)
                                                    : launch<X, W, 12, true, false>(a);
}

}  // namespace

int route(const void* x, int x_dtype, int64_t x_stride, const void* router, int router_dtype,
          int64_t router_stride, const unsigned char* mask, const AdaLN& adaln, int64_t T,
          int64_t D, int64_t E, int64_t K, float* probs, float* weights, int* ids, int* offsets,
          int* order, int* inverse, int* workspace, Stream stream) {
    int token_warps = kTokenWarps;
    while (token_warps > 1 && T <= kTokens * (token_warps / 2) * D2M_ROUTE_BLOCKS) token_warps /= 2;
    const Spans s = spans(T, kTokens * token_warps);
    const RouteCall call{x,           router, x_stride, router_stride, mask,    adaln, int(T),
                         int(D),      int(E), int(K),   probs,         weights, ids,   workspace,
                         token_warps, s,      stream};
    int err = cudaErrorInvalidValue;  // the caller converts a router of yet another type to fp32
    if (router_dtype == kF32) {
        err = x_dtype == kBF16  ? dispatch<bf16, float>(call)
              : x_dtype == kF16 ? dispatch<f16, float>(call)
                                : dispatch<float, float>(call);
    } else if (router_dtype == x_dtype) {
        err = x_dtype == kBF16 ? dispatch<bf16, bf16>(call) : dispatch<f16, f16>(call);
    }
    if (err != cudaSuccess || order == nullptr) return err;
    return permute_rank(ids, T * K, E, s.blocks, int(s.span * K), offsets, order, inverse,
                        workspace, stream);
}

}  // namespace d2m
