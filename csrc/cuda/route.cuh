// Gate of eqs. 2-3: logits, softmax, top-k, weights, and the counts that the counting sort starts
// from. Shapes: T tokens, D model width, E experts, K top-k, N = T*K slots, G blocks.
//
// The arithmetic behind the tile (T = 4608, D = 3072, E = 12, bf16, 132 SMs at 1.75 GHz); what the
// compiler says is checked in tests/kernels/test_cuda_compile.py, the times are for a GPU to measure:
//
// - x is 28 MB: 6.6 us at 4.3 TB/s, if it is read once.
// - 170 M multiply-adds in fp32 (exact with an fp32 router): 5.8 us at 128 a clock and SM.
// - Every token needs E x D router values. Shared memory gives 128 bytes a clock and SM: with one
//   read for every multiply-add that would take 4x as long as the arithmetic. So each value read is
//   used for kTokens = 9 tokens held in registers: 12 experts x 8 columns are 96 clocks of shared
//   memory under 216 clocks of arithmetic.
// - 9 x 12 sums a lane beside 36 registers of x in flight and 36 unpacked: 8 warps of up to 255
//   registers an SM (12 warps of 168 with 6 tokens each spilled). The sums are independent, so two
//   warps keep a scheduler busy. 8 x 9 x 512 B = 36 KB of x are in flight an SM, more than the
//   23 KB that 4.3 TB/s at 0.7 us ask for.
// - 36 tokens a block make 128 blocks, one wave, each reading the router once (19 MB from L2). Few
//   tokens are spread as well: a block of 512 has one token warp, so 57 SMs have 2 warps each where
//   15 would have 8 that wait for the same schedulers.
// - The router is staged by cp.async into two buffers of 24 KB, a barrier for every 512 columns.
//
// - With a modulation (AdaLN) each warp first normalises and modulates whole rows of the tile and
//   writes them; the products then read what was written, out of L1 and L2. No register more: the
//   sums are not alive yet.
//
// More than 12 experts: blockIdx.y takes them in groups, the logits go through probs_TE, and
// route_select_kernel does the rest.
#pragma once

#include "common.cuh"
#include "modulate.cuh"
#include "select.cuh"

namespace d2m {

constexpr int kTokens = 9;      // tokens a warp, held in registers
constexpr int kTokenWarps = 4;  // at most, warps side by side in tokens
constexpr int kDepthWarps = 2;  // warps side by side in D
constexpr int kRouteThreads = 32 * kTokenWarps * kDepthWarps;
constexpr int kTile = kTokens * kTokenWarps;  // at most 36 tokens a block at a time
constexpr int kRouteBlocks = 128;  // about a wave: for less, blocks have fewer token warps
constexpr int kStep = 256;         // columns a warp takes at a time: 8 a lane
constexpr int kChunk = kStep * kDepthWarps;  // columns a router buffer holds

// Tokens of this block's tile. Computed where it is wanted: a register would be one too many.
D2M_DEV int tile_tokens() {
    return kTokens * ((int)blockDim.x / (32 * kDepthWarps));
}

template <class W, int EG>
struct RouteShared {  // dynamic shared memory: the router's two buffers, later the partial logits
    static constexpr int kStage = EG * kChunk * (int)sizeof(W);
    static constexpr int kPartial = (kDepthWarps + 1) * kTile * EG * (int)sizeof(float);
    static constexpr int kCounts = 2 * kStage > kPartial ? 2 * kStage : kPartial;
    static constexpr int kBytes = kCounts + (EG + 1) * (int)sizeof(int);
};

// Which 8 of a step's 256 columns a lane has, in two halves of 4. 16-bit x: 8 in a row, one 16-byte
// load; fp32: twice 4 in a row. The router buffer holds [expert][depth warp][half][lane][4], free
// of bank conflicts for either.
template <class X>
D2M_DEV int lane_column(int lane, int half) {
    return sizeof(X) == 2 ? lane * 8 + half * 4 : half * 128 + lane * 4;
}
template <class X>
D2M_DEV int group_slot(int group) {  // place of a step's columns 4 * group .. in units of 4
    return sizeof(X) == 2 ? (group & 1) * 32 + (group >> 1) : group;
}

// 16 bytes of one token, as loaded: 8 columns of 16-bit x, or one half (4 columns) of fp32.
template <class X, bool VEC>
D2M_DEV uint4 load_raw(const X* row, int c, int D) {
    constexpr int kEach = 16 / (int)sizeof(X);
    if constexpr (VEC) {  // D is a multiple of kEach, so a load is inside or outside as a whole
        return c < D ? *reinterpret_cast<const uint4*>(row + c) : make_uint4(0u, 0u, 0u, 0u);
    } else {
        unsigned u[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u[i] = 0u;
#pragma unroll
            for (int h = 0; h < kEach / 4; ++h) {
                const int ch = c + i * (kEach / 4) + h;
                if (ch < D && sizeof(X) == 2)
                    u[i] |= (unsigned)reinterpret_cast<const unsigned short*>(row)[ch] << (16 * h);
                else if (ch < D)
                    u[i] = reinterpret_cast<const unsigned*>(row)[ch];
            }
        }
        return make_uint4(u[0], u[1], u[2], u[3]);
    }
}

// One such piece of kTokens rows; past the end (last = T - 1 - first row) the last token again, not
// written later.
template <class X, bool VEC>
D2M_DEV void load_tokens(uint4* raw, const X* rows, long long stride, int last, int c, int D) {
#pragma unroll
    for (int r = 0; r < kTokens; ++r)
        raw[r] = load_raw<X, VEC>(rows + (r < last ? r : last) * stride, c, D);
}

D2M_DEV void unpack4(const uint4& q, int, float, float* v) {
    v[0] = bits_to_float(q.x);
    v[1] = bits_to_float(q.y);
    v[2] = bits_to_float(q.z);
    v[3] = bits_to_float(q.w);
}
template <class X>
D2M_DEV void unpack4(const uint4& q, int half, X type, float* v) {
    unpack2(half == 0 ? q.x : q.z, type, v[0], v[1]);
    unpack2(half == 0 ? q.y : q.w, type, v[2], v[3]);
}

D2M_DEV void load_router4(const float* p, float* v) {
    const float4 q = *reinterpret_cast<const float4*>(p);
    v[0] = q.x;
    v[1] = q.y;
    v[2] = q.z;
    v[3] = q.w;
}
template <class W>
D2M_DEV void load_router4(const W* p, float* v) {
    const uint2 q = *reinterpret_cast<const uint2*>(p);
    unpack2(q.x, W(), v[0], v[1]);
    unpack2(q.y, W(), v[2], v[3]);
}

// Columns chunk0 .. of EG experts from e0 on into one buffer; zeros past D and past E.
template <class X, class W, int EG, bool VEC>
D2M_DEV void stage_router(W* buffer, const W* router_ED, long long stride, int e0, int E,
                          int chunk0, int D) {
    constexpr int kGroups = kChunk / 4;
#pragma unroll 1  // unrolled, its addresses would take the registers that the sums need
    for (int i = threadIdx.x; i < EG * kGroups; i += blockDim.x) {
        const int e = i / kGroups, g = i % kGroups, c = chunk0 + g * 4;
        W* to = buffer +
                (e * kGroups + g / (kStep / 4) * (kStep / 4) + group_slot<X>(g % (kStep / 4))) * 4;
        const W* from = router_ED + (long long)(e0 + e) * stride + c;
        const bool inside = e0 + e < E && c < D;
        if (VEC) {
            copy_async<4 * (int)sizeof(W)>(to, inside ? from : router_ED, inside);
        } else {
            for (int h = 0; h < 4; ++h) to[h] = inside && c + h < D ? from[h] : W();
        }
    }
}

// v[0 .. N) summed over the warp's lanes, each lane left with at most (N + 31) / 32 (rounded up per
// halving) of the sums: 54 + 27 + 14 + 7 + 4 = 106 shuffles for N = 108 where a full reduction of
// each would take 540. `first` and `count` say which are this lane's.
template <int N, int OFFSET>
struct Scatter {
    static constexpr int kLeft =
        Scatter<(N + 1) / 2, OFFSET / 2>::kLeft;  // most sums a lane ends with
    static D2M_DEV void run(float* v, int lane, int& first, int& count) {
        constexpr int H = (N + 1) / 2;
        const bool upper = (lane & OFFSET) != 0;
#pragma unroll
        for (int i = 0; i < H; ++i) {
            const float low = v[i], high = i + H < N ? v[i + H] : 0.0f;
            v[i] = (upper ? high : low) + __shfl_xor_sync(kAll, upper ? low : high, OFFSET);
        }
        if (upper) {
            first += H;
            count = count > H ? count - H : 0;
        } else {
            count = count < H ? count : H;
        }
        Scatter<H, OFFSET / 2>::run(v, lane, first, count);
    }
};
template <int N>
struct Scatter<N, 0> {
    static constexpr int kLeft = N;
    static D2M_DEV void run(float*, int, int&, int&) {}
};

// FUSED: E <= EG, everything in this launch, counts_EG included. Else logits go to probs_TE.
template <class X, class W, int EG, bool VEC, bool FUSED>
__global__ void __launch_bounds__(kRouteThreads, 1)
    route_kernel(const X* source, long long source_stride, const W* router_ED,
                 long long router_stride, const unsigned char* mask_T, const X* scale_BD,
                 long long scale_stride, const X* shift_BD, long long shift_stride, int tokens,
                 float eps, X* modulated_TD, int T, int D, int E, int K, int tiles, float* probs_TE,
                 float* weights_TK, int* ids_TK, int* counts_EG) {
    using Shared = RouteShared<W, EG>;
    D2M_DYNAMIC_SHARED(shared);
    W* const router = reinterpret_cast<W*>(shared);
    float* const partial = reinterpret_cast<float*>(shared);   // [kDepthWarps][kTile][EG]
    float* const logits = partial + kDepthWarps * kTile * EG;  // [kTile][E]
    int* const count = reinterpret_cast<int*>(shared + Shared::kCounts);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token_warp = warp / kDepthWarps, depth_warp = warp % kDepthWarps;
    const int e0 = blockIdx.y * EG;
    const int chunks = (D + kChunk - 1) / kChunk;
    constexpr bool kAhead = sizeof(X) == 2;  // x is loaded ahead of its use

    if (FUSED)
        for (int e = threadIdx.x; e <= E; e += blockDim.x) count[e] = 0;

    for (int tile = 0; tile < tiles;
         ++tile) {  // a block's tiles are neighbours, so its slots are one span
        const int t0 = (blockIdx.x * tiles + tile) * tile_tokens();
        if (t0 >= T) break;
        if (FUSED && modulated_TD != nullptr) {
            const Modulation<X> m = {scale_BD, shift_BD, scale_stride, shift_stride, tokens, eps};
            constexpr int kVec = VEC ? 16 / (int)sizeof(X) : 1;
            for (long long t = t0 + warp; t < t0 + tile_tokens() && t < T; t += blockDim.x / 32)
                modulate_row<kVec>(source + t * source_stride, modulated_TD + t * D, t, D, m);
            __syncthreads();
        }
        float acc[kTokens * EG];
#pragma unroll
        for (int i = 0; i < kTokens * EG; ++i) acc[i] = 0.0f;
        const int t_warp = t0 + token_warp * kTokens < T ? t0 + token_warp * kTokens : T - 1;
        const bool modulated = FUSED && modulated_TD != nullptr;
        const long long x_stride = modulated ? D : source_stride;
        const X* const rows = (modulated ? modulated_TD : source) + t_warp * x_stride;
        const int last = T - 1 - t_warp;
        int column = depth_warp * kStep + lane_column<X>(lane, 0);
        uint4 raw[kTokens];
        if (kAhead) load_tokens<X, VEC>(raw, rows, x_stride, last, column, D);
        __syncthreads();  // the previous tile's logits have been read
        stage_router<X, W, EG, VEC>(router, router_ED, router_stride, e0, E, 0, D);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            copy_async_wait();
            __syncthreads();  // chunk c is there, and nobody reads the other buffer any more
            if (c + 1 < chunks)
                stage_router<X, W, EG, VEC>(router + (c + 1) % 2 * (EG * kChunk), router_ED,
                                            router_stride, e0, E, (c + 1) * kChunk, D);
            const W* const w_lane = router + c % 2 * (EG * kChunk) + depth_warp * kStep + lane * 4;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float xv[kTokens][4];
                if (!kAhead) load_tokens<X, VEC>(raw, rows, x_stride, last, column + half * 128, D);
#pragma unroll
                for (int r = 0; r < kTokens; ++r) unpack4(raw[r], half, X(), xv[r]);
                // The next chunk's x, half a chunk (0.5 us) ahead and into the registers that have
                // just become free; past the last chunk this reads nothing (column >= D).
                if (half == 1) column += kChunk;
                if (kAhead && half == 1) load_tokens<X, VEC>(raw, rows, x_stride, last, column, D);
#pragma unroll
                for (int e = 0; e < EG; ++e) {
                    float wv[4];
                    load_router4(w_lane + e * kChunk + half * 128, wv);
#pragma unroll
                    for (int r = 0; r < kTokens; ++r)
#pragma unroll
                        for (int i = 0; i < 4; ++i) acc[r * EG + e] += xv[r][i] * wv[i];
                }
            }
        }
        int first = 0, mine = kTokens * EG;
        Scatter<kTokens * EG, 16>::run(acc, lane, first, mine);
        __syncthreads();  // the router buffers become `partial`
        float* const own = partial + (depth_warp * kTile + token_warp * kTokens) * EG;
#pragma unroll
        for (int i = 0; i < Scatter<kTokens * EG, 16>::kLeft; ++i)
            if (i < mine) own[first + i] = acc[i];
        __syncthreads();
        for (int i = threadIdx.x; i < tile_tokens() * EG; i += blockDim.x) {
            const int t = i / EG, e = e0 + i % EG;
            float v = 0.0f;
            for (int w = 0; w < kDepthWarps; ++w) v += partial[w * kTile * EG + i];
            if (e < E) {
                if (FUSED)
                    logits[t * E + e] = v;
                else if (t0 + t < T)
                    probs_TE[(long long)(t0 + t) * E + e] = v;
            }
        }
        if (FUSED) {
            __syncthreads();
            for (int i = warp; i < tile_tokens(); i += blockDim.x / 32) {
                const long long t = t0 + i;
                if (t < T)
                    select_token<1>(logits + i * E, E, K, mask_T != nullptr && mask_T[t] == 0,
                                    probs_TE + t * E, weights_TK + t * K, ids_TK + t * K, count);
            }
        }
    }
    if (FUSED) {
        __syncthreads();
        for (int e = threadIdx.x; e <= E; e += blockDim.x)
            counts_EG[(long long)e * gridDim.x + blockIdx.x] = count[e];
    }
}

}  // namespace d2m
