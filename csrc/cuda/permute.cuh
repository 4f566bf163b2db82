// Stable counting sort of the slots by expert, in two launches and without atomics on the order.
// Shapes: T tokens, E experts, K top-k, N = T*K slots, G blocks.
//
// Every block owns a contiguous span of slots. counts[e, b] is how many of block b's slots go to
// expert e (row E: masked slots, id -1). A slot's row is
//     first row of its expert
//   + slots of that expert in earlier blocks
//   + slots of that expert before it in its block.
// The scan over blocks is no launch of its own: every block sums the counts it needs, (E + 1) x G
// ints from L2 (6.5 KB at E = 12, G = 128), which should cost less than one more dependent launch.
#pragma once

#include "common.cuh"

namespace d2m {

constexpr int kPermuteThreads = 256;
constexpr int kPermuteWarps = kPermuteThreads / 32;

D2M_DEV int bucket(int id, int E) {
    return id >= 0 && id < E ? id : E;
}

// counts[e, b] for ids that were made elsewhere; the route kernels count as they go.
__global__ void __launch_bounds__(kPermuteThreads)
    permute_count_kernel(const int* ids_N, int N, int E, int span, int* counts_EG) {
    __shared__ int count[kBuckets];
    for (int e = threadIdx.x; e <= E; e += kPermuteThreads) count[e] = 0;
    __syncthreads();
    const long long begin = (long long)blockIdx.x * span;
    const long long end = begin + span < N ? begin + span : N;
    // Integer sums do not depend on the order of the additions: these atomics cost no determinism.
    for (long long s = begin + threadIdx.x; s < end; s += kPermuteThreads)
        atomicAdd(&count[bucket(ids_N[s], E)], 1);
    __syncthreads();
    for (int e = threadIdx.x; e <= E; e += kPermuteThreads)
        counts_EG[(long long)e * gridDim.x + blockIdx.x] = count[e];
}

// counts -> offsets [E + 1] (by block 0), order [N], inverse [N].
__global__ void __launch_bounds__(kPermuteThreads)
    permute_rank_kernel(const int* ids_N, const int* counts_EG, int N, int E, int span,
                        int* offsets, int* order_N, int* inverse_N) {
    __shared__ int total[kBuckets];
    __shared__ int base[kBuckets];  // next free row of each bucket, for this block
    __shared__ int in_warp[kPermuteWarps][kBuckets];  // slots of each bucket in one warp's 32
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int G = gridDim.x, me = blockIdx.x;

    for (int e = warp; e <= E; e += kPermuteWarps) {
        int before = 0, all = 0;
        for (int b = lane; b < G; b += 32) {
            const int c = counts_EG[(long long)e * G + b];
            all += c;
            if (b < me) before += c;
        }
        before = warp_sum(before);
        all = warp_sum(all);
        if (lane == 0) {
            total[e] = all;
            base[e] = before;
        }
    }
    __syncthreads();

    if (warp == 0) {  // exclusive scan over the experts, 32 at a time
        int carry = 0;
        for (int e0 = 0; e0 <= E; e0 += 32) {
            const int e = e0 + lane;
            const int own = e < E ? total[e] : 0;
            int sum = own;
            for (int o = 1; o < 32; o <<= 1) {
                const int up = __shfl_up_sync(kAll, sum, o);
                if (lane >= o) sum += up;
            }
            const int first = carry + sum - own;  // at e == E: all the routed slots
            if (e <= E) {
                base[e] += first;
                if (me == 0) offsets[e] = first;
            }
            carry += __shfl_sync(kAll, sum, 31);
        }
    }
    __syncthreads();

    const long long begin = (long long)me * span;
    const long long end = begin + span < N ? begin + span : N;
    for (long long s0 = begin; s0 < end; s0 += kPermuteThreads) {
        for (int i = threadIdx.x; i < kPermuteWarps * (E + 1); i += kPermuteThreads)
            in_warp[i / (E + 1)][i % (E + 1)] = 0;
        __syncthreads();
        const long long s = s0 + threadIdx.x;
        const int e = s < end ? bucket(ids_N[s], E) : -1;
        const unsigned peers = __match_any_sync(kAll, e);
        const int rank = __popc(peers & ((1u << lane) - 1u));
        if (e >= 0 && rank == 0) in_warp[warp][e] = __popc(peers);
        __syncthreads();
        for (int b = threadIdx.x; b <= E;
             b += kPermuteThreads) {  // counts -> first row of each warp's slots
            int row = base[b];
            for (int w = 0; w < kPermuteWarps; ++w) {
                const int c = in_warp[w][b];
                in_warp[w][b] = row;
                row += c;
            }
            base[b] = row;
        }
        __syncthreads();
        if (e >= 0) {
            const int row = in_warp[warp][e] + rank;
            order_N[row] = (int)s;
            inverse_N[s] = row;
#ifdef D2M_PLANT_OOB  // the tests' proof that a write past the end would be seen
            if (s == N - 1) order_N[N] = 0;
#endif
        }
        __syncthreads();
    }
}

}  // namespace d2m
