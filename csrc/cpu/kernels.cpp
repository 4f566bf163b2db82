// The arithmetic of route and combine, compiled once per instruction set (CMakeLists.txt sets
// D2M_ISA and D2M_LANES). No standard-library templates in here: the linker would be free to keep
// the AVX copy of a shared inline function and run it on a machine without AVX.
//
// Sums are fp32 in a fixed order: every token goes through the same lanes whatever tile or thread
// it is in, so results do not depend on the number of threads. No -ffast-math: NaN and Inf rows
// have to stay NaN and Inf.
#include "kernels.h"

#include <cstring>

#define D2M_CAT2(a, b) a##b
#define D2M_CAT(a, b) D2M_CAT2(a, b)
#define D2M_NAME(f) D2M_CAT(f, D2M_ISA)

namespace d2m {
namespace {

constexpr int L = D2M_LANES;
static_assert(kChunk % kMaxLanes == 0 && kMaxLanes % L == 0, "chunks hold whole vectors");

#if defined(__GNUC__) || defined(__clang__)
typedef float Vec __attribute__((vector_size(4 * L)));
inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) {
    std::memcpy(p, &v, sizeof v);
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return a * b + c;
}
#else
struct Vec {
    float v[L];
};
inline Vec load(const float* p) {
    Vec r;
    for (int i = 0; i < L; ++i) r.v[i] = p[i];
    return r;
}
inline void store(float* p, Vec a) {
    for (int i = 0; i < L; ++i) p[i] = a.v[i];
}
inline Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < L; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
}
#endif

inline float bits_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline uint32_t float_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

// Element types. Conversions are branch-free, so that the loops below vectorise.
struct F32 {
    using T = float;
    static inline float up(T v) { return v; }
    static inline T down(float v) { return v; }
};

struct BF16 {
    using T = uint16_t;
    static inline float up(T v) { return bits_float(uint32_t(v) << 16); }
    static inline T down(float v) {  // round to nearest even; NaN stays NaN
        uint32_t u = float_bits(v);
        uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        return T((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
};

struct F16 {
    using T = uint16_t;
    static inline float up(T v) {
        // Subnormals through a subtraction of normal numbers: right also where denormals are
        // flushed.
        uint32_t e = v & 0x7c00u, m = uint32_t(v & 0x7fffu) << 13;
        float normal = bits_float(m + (112u << 23));
        float tiny = bits_float(m + (113u << 23)) - bits_float(113u << 23);
        float special = bits_float(m + (224u << 23));
        float mag = e == 0x7c00u ? special : (e == 0 ? tiny : normal);
        return bits_float(float_bits(mag) | (uint32_t(v & 0x8000u) << 16));
    }
    static inline T down(float v) {  // round to nearest even, overflow to Inf
        uint32_t u = float_bits(v), sign = (u >> 16) & 0x8000u;
        u &= 0x7fffffffu;
        uint32_t tiny = float_bits(bits_float(u) + 0.5f) - 0x3f000000u;  // the adder rounds for us
        uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
        uint32_t r = u < 0x38800000u ? tiny : normal;
        r = u >= 0x477ff000u ? 0x7c00u : r;
        r = u > 0x7f800000u ? 0x7e00u : r;
        return T(r | sign);
    }
};

template <class S>
void convert(const void* src_, float* dst, int64_t n) {
    const typename S::T* src = static_cast<const typename S::T*>(src_);
    for (int64_t i = 0; i < n; ++i) dst[i] = S::up(src[i]);
}

void convert_any(const void* src, int dtype, float* dst, int64_t n) {
    if (dtype == D2M_BF16) return convert<BF16>(src, dst, n);
    if (dtype == D2M_F16) return convert<F16>(src, dst, n);
    convert<F32>(src, dst, n);
}

constexpr int R = 4;  // tokens and
constexpr int C =
    L == 16 ? 6 : 3;  // experts per register block: 24 of 32 / 12 of 16 vector registers hold sums
static_assert(kExpertBlock % C == 0 && kTileTokens % R == 0, "whole register blocks");

// acc[r][c] += x[r, :] . w[c, :] over one chunk; R + C loads for R * C multiply-adds.
inline void block(const float* x, const float* w, int64_t w_stride, int64_t n, float* acc,
                  int64_t acc_stride) {
    Vec a[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) a[r][c] = load(acc + r * acc_stride + c * L);
    for (int64_t d = 0; d < n; d += L) {
        Vec wv[C];
        for (int c = 0; c < C; ++c) wv[c] = load(w + c * w_stride + d);
        for (int r = 0; r < R; ++r) {
            Vec xv = load(x + r * kChunk + d);
            for (int c = 0; c < C; ++c) a[r][c] = fma(xv, wv[c], a[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(acc + r * acc_stride + c * L, a[r][c]);
}

inline float lane_sum(const float* p) {
    float s[L];
    for (int i = 0; i < L; ++i) s[i] = p[i];
    for (int h = L / 2; h > 0; h /= 2)
        for (int i = 0; i < h; ++i) s[i] += s[i + h];
    return s[0];
}

// One row, at most two routed slots, base of the output's dtype: the usual case in one pass, twice
// the speed of the general one below. `out` may be `base`: an element is read before it is written.
template <class S, int SLOTS, bool BIAS, bool BASE>
void combine_row(const typename S::T* __restrict y0, const typename S::T* __restrict y1, float w0,
                 float w1, float scale, const float* __restrict bias,
                 const typename S::T* base, typename S::T* out, int64_t D) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#elif defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#endif
    for (int64_t d = 0; d < D; ++d) {
        float v = w0 * S::up(y0[d]);
        if (SLOTS == 2) v += w1 * S::up(y1[d]);
        v *= scale;
        if (BIAS) v += bias[d];
        if (BASE) v += S::up(base[d]);
        out[d] = S::down(v);
    }
}

template <class S>
void combine_row_any(const CombineArgs& a, int64_t t) {
    using T = typename S::T;
    constexpr int64_t kMax = 1024;  // 4 KB of sums and 4 KB of conversions stay in L1
    alignas(64) float acc[kMax];
    alignas(64) float tmp[kMax];
    for (int64_t d0 = 0; d0 < a.D; d0 += kMax) {
        const int64_t n = a.D - d0 < kMax ? a.D - d0 : kMax;
        for (int64_t i = 0; i < n; ++i) acc[i] = 0.0f;
        for (int64_t j = 0; j < a.K; ++j) {
            const int64_t r = a.inverse_N[t * a.K + j];
            if (r < 0 || r >= a.routed)
                continue;  // a masked slot: its row may hold NaN, so never 0 * y
            const float w = a.weights_TK ? a.weights_TK[t * a.K + j] : 1.0f;
            const T* y = static_cast<const T*>(a.y_ND) + r * a.y_stride + d0;
            for (int64_t i = 0; i < n; ++i) acc[i] += w * S::up(y[i]);
        }
        for (int64_t i = 0; i < n; ++i) acc[i] *= a.scale;
        if (a.bias_D)
            for (int64_t i = 0; i < n; ++i) acc[i] += a.bias_D[d0 + i];
        if (a.base_TD) {
            const int64_t size = a.base_dtype == D2M_F32 ? 4 : 2;
            convert_any(static_cast<const char*>(a.base_TD) + (t * a.base_stride + d0) * size,
                        a.base_dtype, tmp, n);
            for (int64_t i = 0; i < n; ++i) acc[i] += tmp[i];
        }
        T* out = static_cast<T*>(a.out_TD) + t * a.D + d0;
        for (int64_t i = 0; i < n; ++i) out[i] = S::down(acc[i]);
    }
}

template <class S>
void combine_rows(const CombineArgs& a, int64_t t0, int64_t t1) {
    using T = typename S::T;
    for (int64_t t = t0; t < t1; ++t) {
        const T* y[2] = {};
        float w[2] = {};
        int slots = 0;
        for (int64_t j = 0; j < a.K && slots < 3; ++j) {
            const int64_t r = a.inverse_N[t * a.K + j];
            if (r < 0 || r >= a.routed) continue;
            if (slots < 2) {
                y[slots] = static_cast<const T*>(a.y_ND) + r * a.y_stride;
                w[slots] = a.weights_TK ? a.weights_TK[t * a.K + j] : 1.0f;
            }
            ++slots;
        }
        if (slots == 0 || slots > 2 || (a.base_TD && a.base_dtype != a.dtype)) {
            combine_row_any<S>(a, t);
            continue;
        }
        const T* base = a.base_TD ? static_cast<const T*>(a.base_TD) + t * a.base_stride : nullptr;
        T* out = static_cast<T*>(a.out_TD) + t * a.D;
#define D2M_ROW(s, bias, has_base) \
    combine_row<S, s, bias, has_base>(y[0], y[1], w[0], w[1], a.scale, a.bias_D, base, out, a.D)
#define D2M_ROW_S(s)                                                      \
    (a.bias_D ? (base ? D2M_ROW(s, true, true) : D2M_ROW(s, true, false)) \
              : (base ? D2M_ROW(s, false, true) : D2M_ROW(s, false, false)))
        slots == 2 ? D2M_ROW_S(2) : D2M_ROW_S(1);
#undef D2M_ROW_S
#undef D2M_ROW
    }
}

}  // namespace

void D2M_NAME(to_float_)(const void* src, int dtype, float* dst, int64_t n) {
    convert_any(src, dtype, dst, n);
}

void D2M_NAME(route_tile_)(const RouteTile& a) {
    const int64_t Ep = round_up(a.E, kExpertBlock), Dp = round_up(a.D, kMaxLanes);
    const int64_t size = a.x_dtype == D2M_F32 ? 4 : 2;
    float* x = a.scratch;                           // [kTileTokens, kChunk]
    float* acc = a.scratch + kTileTokens * kChunk;  // [kTileTokens, Ep, L]
    const int64_t acc_stride = Ep * L;
    for (int64_t i = 0; i < kTileTokens * acc_stride; ++i) acc[i] = 0.0f;
    for (int64_t d0 = 0; d0 < a.D; d0 += kChunk) {
        const int64_t n = a.D - d0 < kChunk ? a.D - d0 : kChunk;
        const int64_t np = Dp - d0 < kChunk ? Dp - d0 : kChunk;
        const int blocks = (a.rows + R - 1) / R;
        for (int r = 0; r < blocks * R; ++r) {
            const int row =
                r < a.rows ? r
                           : a.rows - 1;  // a short tile repeats its last row: same code, same sums
            const char* src = static_cast<const char*>(a.x) + (row * a.x_stride + d0) * size;
            convert_any(src, a.x_dtype, x + r * kChunk, n);
            for (int64_t i = n; i < np; ++i) x[r * kChunk + i] = 0.0f;
        }
        for (int b = 0; b < blocks; ++b)
            for (int64_t e = 0; e < Ep; e += C)
                block(x + b * R * kChunk, a.router_ED + e * Dp + d0, Dp, np,
                      acc + b * R * acc_stride + e * L, acc_stride);
    }
    for (int r = 0; r < a.rows; ++r)
        for (int64_t e = 0; e < a.E; ++e)
            a.logits[r * a.E + e] = lane_sum(acc + r * acc_stride + e * L);
}

void D2M_NAME(combine_rows_)(const CombineArgs& a, int64_t t0, int64_t t1) {
    if (a.dtype == D2M_BF16) return combine_rows<BF16>(a, t0, t1);
    if (a.dtype == D2M_F16) return combine_rows<F16>(a, t0, t1);
    combine_rows<F32>(a, t0, t1);
}

}  // namespace d2m
