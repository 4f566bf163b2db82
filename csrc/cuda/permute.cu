// Launches the counting sort.
#include "launch.h"
#include "permute.cuh"

namespace d2m {

int permute_rank(const int* ids, int64_t N, int64_t E, int blocks, int span, int* offsets,
                 int* order, int* inverse, const int* workspace, Stream stream) {
    D2M_LAUNCH(permute_rank_kernel, blocks, 1, kPermuteThreads, 0, stream, ids, workspace, int(N),
               int(E), span, offsets, order, inverse);
    return cudaGetLastError();
}

int permute(const int* ids, int64_t N, int64_t E, int* offsets, int* order, int* inverse,
            int* workspace, Stream stream) {
    const Spans s = spans(N, kPermuteThreads);
    D2M_LAUNCH(permute_count_kernel, s.blocks, 1, kPermuteThreads, 0, stream, ids, int(N), int(E),
               s.span, workspace);
    const int err = cudaGetLastError();
    return err != cudaSuccess ? err
                              : permute_rank(ids, N, E, s.blocks, s.span, offsets, order, inverse,
                                             workspace, stream);
}

}  // namespace d2m
