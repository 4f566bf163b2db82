// From a token's logits to its experts: top-k, softmax, weights (eq. 3), and the counts for the
// counting sort. Shapes: T tokens, E experts, K top-k, G blocks.
#pragma once

#include "common.cuh"

namespace d2m {

constexpr int kSelectWarps = 8;

// Larger first; -0 equals +0; NaN below -Inf. Ties are broken by the id.
D2M_DEV unsigned sort_key(float logit) {
    if (logit != logit) return 0u;
    const unsigned u = float_to_bits(logit + 0.0f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// One token by one warp: row[0 .. E) are its logits. An expert's rank is the number of experts
// before it, which needs no sorting and gives K distinct ids in range whatever the logits are. Adds
// to `count`, by expert.
template <int MINE>  // experts a lane: E <= 32 * MINE
D2M_DEV void select_token(const float* row, int E, int K, bool masked, float* probs_E,
                          float* weights_K, int* ids_K, int* count) {
    const int lane = threadIdx.x % 32;
    float ex[MINE];
    int rank[MINE];
    float top = bits_to_float(0xff800000u);  // -Inf
#pragma unroll
    for (int i = 0; i < MINE; ++i)
        if (lane + 32 * i < E) top = fmaxf(top, row[lane + 32 * i]);
    top = warp_max(top);
    float sum = 0.0f, sum_k = 0.0f;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int e = lane + 32 * i;
        ex[i] = 0.0f;
        rank[i] = K;
        if (e < E) {
            const unsigned own = sort_key(row[e]);
            int before = 0;
            for (int f = 0; f < E; ++f) {
                const unsigned other = sort_key(row[f]);
                before += other > own || (other == own && f < e) ? 1 : 0;
            }
            rank[i] = before;
            ex[i] = expf(row[e] - top);
            sum += ex[i];
            if (before < K) sum_k += ex[i];
        }
    }
    sum = warp_sum(sum);
    sum_k = warp_sum(sum_k);
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int e = lane + 32 * i;
        if (e < E) {
            probs_E[e] = masked ? 0.0f : ex[i] / sum;
            if (rank[i] < K) {
                weights_K[rank[i]] = masked ? 0.0f : ex[i] / sum_k;
                ids_K[rank[i]] = masked ? -1 : e;
                atomicAdd(&count[masked ? E : e], 1);  // an integer sum: any order gives the same
            }
        }
    }
}

// logits in probs_TE -> probs, weights, ids and counts, a warp a token; each block `span` tokens.
__global__ void __launch_bounds__(32 * kSelectWarps)
    route_select_kernel(const unsigned char* mask_T, int T, int E, int K, int span, float* probs_TE,
                        float* weights_TK, int* ids_TK, int* counts_EG) {
    __shared__ float rows[kSelectWarps][kMaxExperts];
    __shared__ int count[kBuckets];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e = threadIdx.x; e <= E; e += 32 * kSelectWarps) count[e] = 0;
    __syncthreads();
    const long long begin = (long long)blockIdx.x * span;
    const long long end = begin + span < T ? begin + span : T;
    for (long long t = begin + warp; t < end; t += kSelectWarps) {
        __syncwarp();
        for (int e = lane; e < E; e += 32) rows[warp][e] = probs_TE[t * E + e];
        __syncwarp();
        select_token<kMaxExperts / 32>(rows[warp], E, K, mask_T != nullptr && mask_T[t] == 0,
                                       probs_TE + t * E, weights_TK + t * K, ids_TK + t * K, count);
    }
    __syncthreads();
    for (int e = threadIdx.x; e <= E; e += 32 * kSelectWarps)
        counts_EG[(long long)e * gridDim.x + blockIdx.x] = count[e];
}

}  // namespace d2m
