// Shapes: T tokens, D model width, E experts, K top-k, N = T*K slots.
// Threads, the choice of instruction set, and what is done per token after its logits are there.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace d2m {

const Kernels& kernels() {
    static const Kernels chosen = [] {
        const char* want = std::getenv("D2M_CPU_ISA");
        auto allowed = [&](const char* name) {
            return want == nullptr || std::strcmp(want, name) == 0;
        };
#if defined(D2M_HAVE_avx512)
        if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq"))
            return Kernels{"avx512", route_tile_avx512, combine_rows_avx512, to_float_avx512};
#endif
#if defined(D2M_HAVE_avx2)
        if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") &&
            __builtin_cpu_supports("fma"))
            return Kernels{"avx2", route_tile_avx2, combine_rows_avx2, to_float_avx2};
#endif
        (void)allowed;
        return Kernels{"base", route_tile_base, combine_rows_base, to_float_base};
    }();
    return chosen;
}

namespace {

// Calls fn(part, begin, end) for contiguous parts of 0..n, multiples of `grain` long. One
// std::thread per part and call: starting one costs tens of us, against a millisecond of work
// where more than one is used, and a pool that does not exist needs no care at fork(). fn must not
// throw; scratch is allocated by the caller.
template <class F>
void parallel(int64_t n, int64_t grain, int parts, const F& fn) {
    const int64_t step = round_up((n + parts - 1) / parts, grain);
    std::vector<std::thread> workers;
    workers.reserve(static_cast<size_t>(parts));
    for (int p = 1; p < parts && p * step < n; ++p) {
        const int64_t begin = p * step, end = std::min(n, begin + step);
        try {
            workers.emplace_back([&fn, p, begin, end] { fn(p, begin, end); });
        } catch (const std::system_error&) {  // no more threads to be had: do it here
            fn(p, begin, end);
        }
    }
    fn(0, int64_t(0), std::min(n, step));
    for (auto& w : workers) w.join();
}

// About 0.2 ms of memory traffic or arithmetic for each thread, else fewer threads.
int parts_for(double bytes_touched, int threads) {
    const double useful = bytes_touched / (1 << 20);
    return std::max(1, static_cast<int>(std::min<double>(threads, useful)));
}

// A total order as one integer: larger logit first, then lower id; -0 equals +0; NaN below -Inf.
inline uint64_t sort_key(float logit, int64_t id) {
    uint32_t u = 0;
    if (!std::isnan(logit)) {
        logit += 0.0f;
        std::memcpy(&u, &logit, 4);
        u = (u & 0x80000000u) ? ~u : (u | 0x80000000u);
    }
    return (uint64_t(u) << 32) | (0xffffffffu - uint32_t(id));
}

// probs = softmax(logits); ids = the K largest; weights = softmax over these (eq. 3).
void select(const float* logits, int64_t E, int64_t K, uint64_t* keys, float* probs, float* weights,
            int32_t* ids) {
    for (int64_t e = 0; e < E; ++e) keys[e] = sort_key(logits[e], e);
    if (K == 1) {
        keys[0] = *std::max_element(keys, keys + E);
    } else {
        std::partial_sort(keys, keys + K, keys + E, [](uint64_t a, uint64_t b) { return a > b; });
    }
    float top = logits[0];
    for (int64_t e = 1; e < E; ++e) top = logits[e] > top || std::isnan(top) ? logits[e] : top;
    float sum = 0.0f;
    for (int64_t e = 0; e < E; ++e) sum += probs[e] = std::exp(logits[e] - top);
    float sum_k = 0.0f;
    for (int64_t j = 0; j < K; ++j) {
        ids[j] = static_cast<int32_t>(0xffffffffu - uint32_t(keys[j]));
        sum_k += weights[j] = probs[ids[j]];
    }
    for (int64_t j = 0; j < K; ++j) weights[j] /= sum_k;
    for (int64_t e = 0; e < E; ++e) probs[e] /= sum;
}

}  // namespace

void route(const void* x_TD, int x_dtype, int64_t x_stride, const void* router_ED, int router_dtype,
           int64_t router_stride, const uint8_t* mask_T, int64_t T, int64_t D, int64_t E, int64_t K,
           float* probs_TE, float* weights_TK, int32_t* ids_TK, int threads) {
    if (T == 0 || E == 0) return;
    const Kernels& k = kernels();
    const int64_t Dp = round_up(D, kMaxLanes), Ep = round_up(E, kExpertBlock);
    std::vector<float> router(static_cast<size_t>(Ep * Dp), 0.0f);
    const int64_t router_size = router_dtype == D2M_F32 ? 4 : 2;
    for (int64_t e = 0; e < E; ++e)
        k.to_float(static_cast<const char*>(router_ED) + e * router_stride * router_size,
                   router_dtype, router.data() + e * Dp, D);

    const int64_t size = x_dtype == D2M_F32 ? 4 : 2;
    const int parts = parts_for(double(T) * double(D) * double(size + E / 4), threads);
    const int64_t floats = round_up(route_scratch_floats(E) + kTileTokens * E, 16);
    std::vector<float> scratch(static_cast<size_t>(floats * parts));
    std::vector<uint64_t> keys(static_cast<size_t>(E * parts));
    parallel(T, kTileTokens, parts, [&](int part, int64_t t0, int64_t t1) {
        float* mine = scratch.data() + part * floats;
        float* logits = mine + route_scratch_floats(E);
        for (int64_t t = t0; t < t1; t += kTileTokens) {
            const int rows = static_cast<int>(std::min<int64_t>(kTileTokens, t1 - t));
            k.route_tile({static_cast<const char*>(x_TD) + t * x_stride * size, x_dtype, x_stride,
                          rows, router.data(), D, E, mine, logits});
            for (int r = 0; r < rows; ++r) {
                float* probs = probs_TE + (t + r) * E;
                float* weights = weights_TK + (t + r) * K;
                int32_t* ids = ids_TK + (t + r) * K;
                if (mask_T && !mask_T[t + r]) {
                    std::fill_n(probs, E, 0.0f);
                    std::fill_n(weights, K, 0.0f);
                    std::fill_n(ids, K, -1);
                } else {
                    select(logits + r * E, E, K, keys.data() + part * E, probs, weights, ids);
                }
            }
        }
    });
}

void combine(CombineArgs args, const void* bias_D, int bias_dtype, int64_t T, int threads) {
    if (T == 0 || args.D == 0) return;
    const Kernels& k = kernels();
    std::vector<float> bias(bias_D ? static_cast<size_t>(args.D) : 0);
    if (bias_D) k.to_float(bias_D, bias_dtype, bias.data(), args.D);
    args.bias_D = bias_D ? bias.data() : nullptr;
    const double row_bytes = double(args.D) * (args.dtype == D2M_F32 ? 4 : 2) * double(args.K + 2);
    parallel(T, 1, parts_for(double(T) * row_bytes, threads),
             [&](int, int64_t t0, int64_t t1) { k.combine_rows(args, t0, t1); });
}

void gather_rows(const char* src, int64_t src_stride, const int32_t* index, int64_t rows,
                 int64_t divisor, int64_t row_bytes, char* dst, int threads) {
    if (rows == 0 || row_bytes == 0) return;
    parallel(rows, 1, parts_for(2.0 * double(rows) * double(row_bytes), threads),
             [&](int, int64_t r0, int64_t r1) {
                 for (int64_t r = r0; r < r1; ++r)
                     std::memcpy(dst + r * row_bytes, src + (index[r] / divisor) * src_stride,
                                 static_cast<size_t>(row_bytes));
             });
}

}  // namespace d2m
