// Launches combine: 16-byte pieces where everything is aligned, single elements else.
#include "combine.cuh"
#include "launch.h"

namespace d2m {
namespace {

template <class Y>
int launch(const void* y, int64_t y_stride, const int* inverse, const float* weights,
           const int* routed, const void* base, int base_dtype, int64_t base_stride,
           const void* bias, int bias_dtype, float scale, void* out, int64_t T, int64_t D,
           int64_t K, Stream stream) {
    constexpr int kVec = 16 / sizeof(Y);
    const bool like_y = base_dtype == DtypeCode<Y>::value;
    const bool vec = D % kVec == 0 && aligned(y, y_stride * sizeof(Y), 16) &&
                     aligned(out, D * sizeof(Y), 16) &&
                     (base == nullptr || !like_y || aligned(base, base_stride * sizeof(Y), 16));
    const int64_t blocks = (T * (vec ? D / kVec : D) + kCombineThreads - 1) / kCombineThreads;
    auto* kernel = vec ? combine_kernel<Y, kVec> : combine_kernel<Y, 1>;
    D2M_LAUNCH(kernel, unsigned(blocks), 1, kCombineThreads, 0, stream, static_cast<const Y*>(y),
               y_stride, inverse, weights, routed, base, base_dtype, base_stride, bias, bias_dtype,
               scale, static_cast<Y*>(out), int(T), int(D), int(K));
    return cudaGetLastError();
}

}  // namespace

int combine(const void* y, int dtype, int64_t y_stride, const int* inverse, const float* weights,
            const int* routed, const void* base, int base_dtype, int64_t base_stride,
            const void* bias, int bias_dtype, float scale, void* out, int64_t T, int64_t D,
            int64_t K, Stream stream) {
    auto* run = dtype == kBF16 ? launch<bf16> : dtype == kF16 ? launch<f16> : launch<float>;
    return run(y, y_stride, inverse, weights, routed, base, base_dtype, base_stride, bias,
               bias_dtype, scale, out, T, D, K, stream);
}

}  // namespace d2m
