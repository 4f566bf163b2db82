// out[t] = base[t] + bias + scale * sum_j weights[t, j] * y[inverse[t*K + j]]: a gather, so no
// float atomics. Shapes: T tokens, D model width, K top-k, N = T*K slots.
//
// Bound by memory: at T = 4608, D = 3072, K = 2, bf16 it reads 2 x 28 MB of y and 28 MB of base and
// writes 28 MB, 26 us at 4.3 TB/s. One thread a 16-byte piece of a row; the k rows of a token are
// independent loads, two in flight at a time beside base, and 4 or more blocks of 256 threads an SM
// make up the 23 KB in flight that the latency asks for.
#pragma once

#include "common.cuh"

namespace d2m {

constexpr int kCombineThreads = 256;

template <class Y, int VEC>
struct alignas(sizeof(Y) * VEC) Piece {
    Y v[VEC];
};

template <class Y, int VEC>
__global__ void __launch_bounds__(kCombineThreads, 4)
    combine_kernel(const Y* y_ND, long long y_stride, const int* inverse_N, const float* weights_TK,
                   const int* routed_ptr, const void* base_TD, int base_dtype,
                   long long base_stride, const void* bias_D, int bias_dtype, float scale,
                   Y* out_TD, int T, int D, int K) {
    const int pieces = (D + VEC - 1) / VEC;  // VEC > 1 only where D is a multiple of it
    const long long i = (long long)blockIdx.x * kCombineThreads + threadIdx.x;
    if (i >= (long long)T * pieces) return;
    const long long t = i / pieces;
    const int d = (int)(i % pieces) * VEC;
    const int routed = *routed_ptr;  // offsets[E]: rows past it were never written

    const bool like_y = base_TD != nullptr && base_dtype == DtypeCode<Y>::value;
    Piece<Y, VEC> base;
    if (like_y)
        base = *reinterpret_cast<const Piece<Y, VEC>*>(static_cast<const Y*>(base_TD) +
                                                       t * base_stride + d);

    float acc[VEC];
#pragma unroll
    for (int c = 0; c < VEC; ++c) acc[c] = 0.0f;
    for (int j = 0; j < K; j += 2) {
        Piece<Y, VEC> p[2];
        float w[2];
        bool use[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const long long slot = t * K + j + h;
            const int row = j + h < K ? inverse_N[slot] : -1;
            use[h] = row >= 0 && row < routed;  // never 0 * y: what was not written may be NaN
            w[h] = use[h] && weights_TK != nullptr ? weights_TK[slot] : 1.0f;
            if (use[h]) p[h] = *reinterpret_cast<const Piece<Y, VEC>*>(y_ND + row * y_stride + d);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (use[h]) {
#pragma unroll
                for (int c = 0; c < VEC; ++c) acc[c] += w[h] * to_float(p[h].v[c]);
            }
    }

    Piece<Y, VEC> out;
#pragma unroll
    for (int c = 0; c < VEC; ++c) {
        float v = acc[c] * scale;
        if (bias_D != nullptr) v += load_any(bias_D, bias_dtype, d + c);
        if (like_y)
            v += to_float(base.v[c]);
        else if (base_TD != nullptr)
            v += load_any(base_TD, base_dtype, t * base_stride + d + c);
        out.v[c] = from_float<Y>(v);
    }
    *reinterpret_cast<Piece<Y, VEC>*>(out_TD + t * D + d) = out;
}

}  // namespace d2m
