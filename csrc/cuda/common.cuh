// What the kernels share: element types, conversions, warp reductions, asynchronous copies.
//
// Device code only and without any include, so that nvcc, NVRTC and a host compiler behind a SIMT
// shim (which defines D2M_HOST_SIM and the CUDA keywords) all take these files as they are. Host
// code lives in the *.cu.
#pragma once

#define D2M_DEV __device__ __forceinline__
#ifndef D2M_HOST_SIM  // the shim hands out a buffer of just the size of the launch
#define D2M_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace d2m {

constexpr unsigned kAll = 0xffffffffu;  // every lane of a warp
constexpr int kMaxExperts = 256;
constexpr int kBuckets = kMaxExperts + 1;  // the last one for masked slots

// Codes of the element types, as in csrc/abi.h.
constexpr int kF32 = 0, kBF16 = 1, kF16 = 2;

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

template <class X>
struct DtypeCode {
    static constexpr int value = kF32;
};
template <>
struct DtypeCode<bf16> {
    static constexpr int value = kBF16;
};
template <>
struct DtypeCode<f16> {
    static constexpr int value = kF16;
};

D2M_DEV float bits_to_float(unsigned u) {
    return __uint_as_float(u);
}
D2M_DEV unsigned float_to_bits(float f) {
    return __float_as_uint(f);
}

D2M_DEV float to_float(float v) {
    return v;
}
D2M_DEV float to_float(bf16 v) {
    return bits_to_float(unsigned(v.bits) << 16);
}
D2M_DEV float to_float(f16 v) {
#ifdef D2M_HOST_SIM
    return simt_half_to_float(v.bits);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
#endif
}

template <class X>
D2M_DEV X from_float(float v);
template <>
D2M_DEV float from_float<float>(float v) {
    return v;
}
template <>
D2M_DEV bf16 from_float<bf16>(float v) {  // round to nearest even, NaN stays NaN
    unsigned u = float_to_bits(v);
    unsigned r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    bf16 b;
    b.bits = (unsigned short)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r);
    return b;
}
template <>
D2M_DEV f16 from_float<f16>(float v) {
    f16 h;
#ifdef D2M_HOST_SIM
    h.bits = simt_float_to_half(v);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
#endif
    return h;
}

// The two values in a 32-bit register.
D2M_DEV void unpack2(unsigned u, bf16, float& lo, float& hi) {
    lo = bits_to_float(u << 16);
    hi = bits_to_float(u & 0xffff0000u);
}
D2M_DEV void unpack2(unsigned u, f16, float& lo, float& hi) {
    f16 a, b;
    a.bits = (unsigned short)(u & 0xffffu);
    b.bits = (unsigned short)(u >> 16);
    lo = to_float(a);
    hi = to_float(b);
}

D2M_DEV float load_any(const void* p, int dtype, long long i) {
    if (dtype == kBF16) return to_float(static_cast<const bf16*>(p)[i]);
    if (dtype == kF16) return to_float(static_cast<const f16*>(p)[i]);
    return static_cast<const float*>(p)[i];
}

D2M_DEV float warp_sum(float v) {
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(kAll, v, o);
    return v;
}
D2M_DEV int warp_sum(int v) {
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(kAll, v, o);
    return v;
}
D2M_DEV float warp_max(float v) {  // fmaxf: a NaN loses
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(kAll, v, o));
    return v;
}

// BYTES (8 or 16) from global to shared memory without passing registers; zeros when `valid` is
// false.
template <int BYTES>
D2M_DEV void copy_async(void* shared, const void* global, bool valid) {
#ifdef D2M_HOST_SIM
    simt_copy_async(shared, global, BYTES, valid);
#else
    unsigned dst = (unsigned)__cvta_generic_to_shared(shared);
    int bytes = valid ? BYTES : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(global),
                 "n"(BYTES), "r"(bytes)
                 : "memory");
#endif
}
D2M_DEV void copy_async_wait() {
#ifndef D2M_HOST_SIM
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace d2m
