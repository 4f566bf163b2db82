// Shapes: T tokens, D model width, E experts, K top-k, N = T*K slots.
// Raw pointers only; strides are in elements, the inner stride is 1. Nothing here allocates.
#pragma once

#include <cstdint>

#include "../abi.h"

namespace d2m {

constexpr int kTileTokens = 16;  // tokens that share one router chunk in L1
constexpr int kChunk = 256;      // columns per chunk: 16 KB of x + E KB of router
constexpr int kMaxLanes = 16;    // widest vector build, in floats
constexpr int kExpertBlock = 6;  // the packed router has a multiple of this many rows

struct RouteTile {
    const void* x;  // first row of the tile
    int x_dtype;
    int64_t x_stride;  // elements between rows
    int rows;          // 1..kTileTokens
    const float*
        router_ED;  // packed: [round_up(E, kExpertBlock), round_up(D, kMaxLanes)], zero-padded
    int64_t D, E;
    float* scratch;  // route_scratch_floats(E) floats
    float* logits;   // out: [rows, E]
};

struct CombineArgs {
    const void* y_ND;
    int dtype;  // of y and out
    int64_t y_stride;
    const int32_t* inverse_N;
    const float* weights_TK;  // or null: all ones
    int64_t routed;           // offsets[E]: slots at or past it are skipped
    const void* base_TD;      // or null
    int base_dtype;
    int64_t base_stride;
    const float* bias_D;  // or null
    float scale;
    void* out_TD;
    int64_t D, K;
};

inline int64_t round_up(int64_t n, int64_t m) {
    return (n + m - 1) / m * m;
}

inline int64_t route_scratch_floats(int64_t E) {
    return kTileTokens * kChunk + kTileTokens * round_up(E, kExpertBlock) * kMaxLanes;
}

// One copy of these per instruction set (kernels.cpp), named by the build.
#define D2M_DECLARE(isa)                                                      \
    void route_tile_##isa(const RouteTile& args);                             \
    void combine_rows_##isa(const CombineArgs& args, int64_t t0, int64_t t1); \
    void to_float_##isa(const void* src, int dtype, float* dst, int64_t n);

D2M_DECLARE(base)
D2M_DECLARE(avx2)
D2M_DECLARE(avx512)
#undef D2M_DECLARE

struct Kernels {
    const char* name;
    void (*route_tile)(const RouteTile&);
    void (*combine_rows)(const CombineArgs&, int64_t, int64_t);
    void (*to_float)(const void*, int, float*, int64_t);
};

// The widest build this processor runs; the environment's D2M_CPU_ISA=base|avx2|avx512 can ask for
// less.
const Kernels& kernels();

// dispatch.cpp
void route(const void* x_TD, int x_dtype, int64_t x_stride, const void* router_ED, int router_dtype,
           int64_t router_stride, const uint8_t* mask_T, int64_t T, int64_t D, int64_t E, int64_t K,
           float* probs_TE, float* weights_TK, int32_t* ids_TK, int threads);
void combine(CombineArgs args, const void* bias_D, int bias_dtype, int64_t T, int threads);
void gather_rows(const char* src, int64_t src_stride, const int32_t* index, int64_t rows,
                 int64_t divisor, int64_t row_bytes, char* dst, int threads);

// permute.cpp
void permute(const int32_t* ids_N, int64_t N, int64_t E, int32_t* offsets, int32_t* order,
             int32_t* inverse);

}  // namespace d2m
