// What the launchers share. Host code: included by the *.cu and by bindings.cpp, never by NVRTC.
// Every launcher returns a cudaError_t as int, takes device addresses, and only enqueues: no
// allocation, no synchronisation, so all of them can be captured into a CUDA graph.
#pragma once

#include <cstdint>

#ifndef D2M_HOST_SIM
#include <cuda_runtime.h>
#define D2M_LAUNCH(kernel, gx, gy, threads, shared, stream, ...) \
    kernel<<<dim3(gx, gy), threads, shared, stream>>>(__VA_ARGS__)
#endif

namespace d2m {

using Stream = cudaStream_t;

// Blocks of the counting sort: few enough that every block can add up all the others' counts.
#ifndef D2M_MAX_BLOCKS  // the tests on the host vary it
#define D2M_MAX_BLOCKS 1024
#endif

struct Spans {
    int blocks, span;
};

// `items` in spans of a multiple of `grain`, at most D2M_MAX_BLOCKS of them.
inline Spans spans(int64_t items, int64_t grain) {
    int64_t grains = (items + grain - 1) / grain;
    int64_t per_block = (grains + D2M_MAX_BLOCKS - 1) / D2M_MAX_BLOCKS;
    if (per_block < 1) per_block = 1;
    return {static_cast<int>((grains + per_block - 1) / per_block),
            static_cast<int>(per_block * grain)};
}

// Integers of workspace that route and permute want for a routing of T tokens (or N slots) and E
// experts.
inline int64_t workspace_ints(int64_t E) {
    return (E + 1) * D2M_MAX_BLOCKS;
}

// Modulation in front of route: scale and shift [B, D] in x's dtype, T / B = tokens of a sample;
// the modulated x [T, D] goes to out. Without out there is none.
struct AdaLN {
    const void* scale = nullptr;
    int64_t scale_stride = 0;
    const void* shift = nullptr;
    int64_t shift_stride = 0, tokens = 1;
    float eps = 0;
    void* out = nullptr;
};

int route(const void* x, int x_dtype, int64_t x_stride, const void* router, int router_dtype,
          int64_t router_stride, const unsigned char* mask, const AdaLN& adaln, int64_t T,
          int64_t D, int64_t E, int64_t K, float* probs, float* weights, int* ids, int* offsets,
          int* order, int* inverse, int* workspace, Stream stream);
int permute(const int* ids, int64_t N, int64_t E, int* offsets, int* order, int* inverse,
            int* workspace, Stream stream);
int permute_rank(const int* ids, int64_t N, int64_t E, int blocks, int span, int* offsets,
                 int* order, int* inverse, const int* workspace, Stream stream);
int combine(const void* y, int dtype, int64_t y_stride, const int* inverse, const float* weights,
            const int* routed, const void* base, int base_dtype, int64_t base_stride,
            const void* bias, int bias_dtype, float scale, void* out, int64_t T, int64_t D,
            int64_t K, Stream stream);

inline bool aligned(const void* p, int64_t row_bytes, int bytes) {
    return reinterpret_cast<std::uintptr_t>(p) % bytes == 0 && row_bytes % bytes == 0;
}

}  // namespace d2m
