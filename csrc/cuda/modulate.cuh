// AdaLN in front of the router: out = (x - mean) / sqrt(var + eps) * (1 + scale) + shift, scale and
// shift of the sample a token belongs to. Shapes: B samples, T tokens, D model width.
//
// A warp a token, three passes over its row: mean, variance about that mean (no sum of squares that
// a large mean would cancel), result. The row, 6 KB at D = 3072 in bf16, comes from memory once and
// twice out of L1: 8 warps' rows are 48 KB of it.
#pragma once

#include "common.cuh"

namespace d2m {

constexpr int kModulateWarps = 8;

template <class X>
struct Modulation {
    const X *scale_BD, *shift_BD;
    long long scale_stride, shift_stride;
    int tokens;  // of a sample
    float eps;
};

template <class X, int VEC>
struct alignas(sizeof(X) * VEC) Columns {
    X v[VEC];
};

template <int VEC, class X>
D2M_DEV Columns<X, VEC> load_columns(const X* p) {
    return *reinterpret_cast<const Columns<X, VEC>*>(p);
}

// One token by one warp. VEC > 1: D is a multiple of it and every row is aligned to VEC elements.
template <int VEC, class X>
D2M_DEV void modulate_row(const X* x_D, X* out_D, long long t, int D, const Modulation<X>& m) {
    const int first = threadIdx.x % 32 * VEC;
    float sum = 0.0f;
    for (int d = first; d < D; d += 32 * VEC) {
        const auto x = load_columns<VEC>(x_D + d);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum += to_float(x.v[i]);
    }
    const float mean = warp_sum(sum) / float(D);
    float square = 0.0f;
    for (int d = first; d < D; d += 32 * VEC) {
        const auto x = load_columns<VEC>(x_D + d);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const float apart = to_float(x.v[i]) - mean;
            square += apart * apart;
        }
    }
    const float rstd = 1.0f / sqrtf(warp_sum(square) / float(D) + m.eps);
    const X* const scale_D = m.scale_BD + t / m.tokens * m.scale_stride;
    const X* const shift_D = m.shift_BD + t / m.tokens * m.shift_stride;
    for (int d = first; d < D; d += 32 * VEC) {
        const auto x = load_columns<VEC>(x_D + d), scale = load_columns<VEC>(scale_D + d),
                   shift = load_columns<VEC>(shift_D + d);
        Columns<X, VEC> out;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const float normed = (to_float(x.v[i]) - mean) * rstd;
            out.v[i] = from_float<X>(normed * (1.0f + to_float(scale.v[i])) + to_float(shift.v[i]));
        }
        *reinterpret_cast<Columns<X, VEC>*>(out_D + d) = out;
    }
}

// All tokens, in a launch of its own: where a token's experts are spread over several blocks.
template <class X, int VEC>
__global__ void __launch_bounds__(32 * kModulateWarps)
    modulate_kernel(const X* x_TD, long long x_stride, const X* scale_BD, long long scale_stride,
                    const X* shift_BD, long long shift_stride, int tokens, float eps, int T, int D,
                    X* out_TD) {
    const Modulation<X> m = {scale_BD, shift_BD, scale_stride, shift_stride, tokens, eps};
    const long long t = (long long)blockIdx.x * kModulateWarps + threadIdx.x / 32;
    if (t < T) modulate_row<VEC>(x_TD + t * x_stride, out_TD + t * D, t, D, m);
}

}  // namespace d2m
