// A SIMT machine small enough to run CUDA kernels on the CPU, for the tests: one fiber a thread,
// one block after another. Warp shuffles, votes and __syncthreads are yields. Not fast; right, and
// visible to ASan and UBSan.
//
// It is stricter than a GPU: a barrier that not all threads of the block (or of the warp) reach
// aborts with a message, fibers can run in forward, reverse or shuffled order (a missing barrier
// then gives wrong results), dynamic shared memory is a heap block of just the launched size,
// filled with NaN patterns before every block.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define D2M_HOST_SIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another, so one copy a kernel is one copy a block
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define D2M_DYNAMIC_SHARED(name) unsigned char* const name = simt::machine().shared.get()

namespace simt {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

constexpr size_t kStack = 256 * 1024;
enum class Order { forward, reverse, shuffled };

struct Meeting {  // the threads of a warp or a block waiting for one another
    int arrived = 0;
    long generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;
    bool done = false;
};

struct Warp {
    Meeting meeting;
    uint64_t value[2][32];  // of the even and the odd meeting, so that none is overwritten before
                            // it is read
};

struct Machine {
    Dim grid, block, block_index;
    std::unique_ptr<unsigned char[]> shared;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting barrier;
    int current = 0;
    long progress = 0;  // arrivals and exits, to notice a deadlock
    ucontext_t scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    Order order = Order::forward;
    uint64_t seed = 1;
    std::function<void()> body;

    int threads() const { return int(block.x); }
};

inline Machine& machine() {
    static Machine m;
    return m;
}

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "simt: %s (block %u, thread %d)\n", what, machine().block_index.x,
                 machine().current);
    std::exit(3);
}

inline void yield() {
    Machine& m = machine();
    Fiber& f = m.fibers[m.current];
    __sanitizer_start_switch_fiber(&f.fake_stack, m.scheduler_stack, m.scheduler_size);
    swapcontext(&f.context, &m.scheduler);
    __sanitizer_finish_switch_fiber(f.fake_stack, &m.scheduler_stack, &m.scheduler_size);
}

// Returns once `expected` threads have come here.
inline void meet(Meeting& meeting, int expected) {
    const long mine = meeting.generation;
    ++machine().progress;
    if (++meeting.arrived == expected) {
        meeting.arrived = 0;
        ++meeting.generation;
        return;
    }
    while (meeting.generation == mine) yield();
}

inline int lane() {
    return machine().current % 32;
}
inline Warp& warp() {
    return machine().warps[machine().current / 32];
}

// Every lane's value, after all 32 lanes have brought theirs.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
    if (mask != 0xffffffffu) fail("only whole warps may shuffle");
    Warp& w = warp();
    const int half = int(w.meeting.generation & 1);
    w.value[half][lane()] = value;
    meet(w.meeting, 32);
    return w.value[half];
}

inline void entry() {
    Machine& m = machine();
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_size);
    m.body();
    m.fibers[m.current].done = true;
    ++m.progress;
    __sanitizer_start_switch_fiber(nullptr, m.scheduler_stack, m.scheduler_size);
    swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

inline void run_block() {
    Machine& m = machine();
    const int n = m.threads();
    m.barrier = Meeting();
    m.warps.assign((n + 31) / 32, Warp());
    std::vector<int> sequence(n);
    for (int i = 0; i < n; ++i) sequence[i] = m.order == Order::reverse ? n - 1 - i : i;
    for (int i = 0; i < n; ++i) {
        Fiber& f = m.fibers[i];
        f.done = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, entry, 0);
    }
    for (int left = n; left > 0;) {
        const long before = m.progress;
        if (m.order == Order::shuffled)
            for (int i = n - 1; i > 0; --i) {
                m.seed = m.seed * 6364136223846793005ull + 1442695040888963407ull;
                std::swap(sequence[i], sequence[int((m.seed >> 33) % uint64_t(i + 1))]);
            }
        for (int i : sequence) {
            Fiber& f = m.fibers[i];
            if (f.done) continue;
            m.current = i;
            void* fake = nullptr;
            __sanitizer_start_switch_fiber(&fake, f.stack.get(), kStack);
            swapcontext(&m.scheduler, &f.context);
            __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
            if (f.done) --left;
        }
        if (left > 0 && m.progress == before)
            fail("deadlock: not all threads reach a barrier or shuffle");
    }
}

inline void launch(unsigned gx, unsigned gy, unsigned threads, size_t shared,
                   const std::function<void()>& body) {
    Machine& m = machine();
    if (gx == 0 || gy == 0 || threads == 0 || threads > 1024 || gy > 65535)
        fail("launch: invalid configuration");
    if (threads % 32 != 0) fail("launch: blocks are whole warps here");
    m.grid = {gx, gy, 1};
    m.block = {threads, 1, 1};
    m.body = body;
    if (m.fibers.size() < threads) m.fibers.resize(threads);
    for (auto& f : m.fibers)
        if (!f.stack) f.stack.reset(new char[kStack]);
    for (unsigned y = 0; y < gy; ++y)
        for (unsigned x = 0; x < gx; ++x) {
            m.block_index = {x, y, 0};
            m.shared.reset(new unsigned char[shared]);
            std::memset(m.shared.get(), 0xff, shared);
            run_block();
        }
    m.shared.reset();
}

struct ThreadIndex {
    struct X {
        operator int() const { return machine().current; }
    } x;
};
struct BlockIndex {
    struct X {
        operator int() const { return int(machine().block_index.x); }
    } x;
    struct Y {
        operator int() const { return int(machine().block_index.y); }
    } y;
};
struct GridSize {
    struct X {
        operator int() const { return int(machine().grid.x); }
    } x;
};
struct BlockSize {
    struct X {
        operator int() const { return machine().threads(); }
    } x;
};

}  // namespace simt

static const simt::BlockSize blockDim;
static const simt::ThreadIndex threadIdx;
static const simt::BlockIndex blockIdx;
static const simt::GridSize gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

inline float __uint_as_float(unsigned u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline int __popc(unsigned u) {
    return __builtin_popcount(u);
}

inline void __syncthreads() {
    simt::meet(simt::machine().barrier, simt::machine().threads());
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    simt::exchange(mask, 0);
}

template <class T>
T simt_shuffle(unsigned mask, T v, int from) {
    static_assert(sizeof(T) == 4, "32-bit values");
    uint64_t u = 0;
    std::memcpy(&u, &v, 4);
    u = simt::exchange(mask, u)[from];
    std::memcpy(&v, &u, 4);
    return v;
}
template <class T>
T __shfl_sync(unsigned mask, T v, int from) {
    return simt_shuffle(mask, v, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits) {
    return simt_shuffle(mask, v, simt::lane() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int by) {
    return simt_shuffle(mask, v, simt::lane() >= by ? simt::lane() - by : simt::lane());
}
inline unsigned __match_any_sync(unsigned mask, int v) {
    const uint64_t* all = simt::exchange(mask, uint64_t(uint32_t(v)));
    unsigned same = 0;
    for (int i = 0; i < 32; ++i) same |= all[i] == uint64_t(uint32_t(v)) ? 1u << i : 0u;
    return same;
}

inline int atomicAdd(int* p, int v) {
    const int old = *p;
    *p += v;
    return old;
}

inline void simt_copy_async(void* shared, const void* global, int bytes, bool valid) {
    if (reinterpret_cast<uintptr_t>(shared) % bytes ||
        (valid && reinterpret_cast<uintptr_t>(global) % bytes))
        simt::fail("cp.async: misaligned address");
    if (valid)
        std::memcpy(shared, global, bytes);
    else
        std::memset(shared, 0, bytes);
}

// Slow and plain on purpose: by value, not by bit tricks.
inline float simt_half_to_float(unsigned short h) {
    const int e = (h >> 10) & 31, m = h & 1023;
    const float mag = e == 31  ? (m ? NAN : INFINITY)
                      : e == 0 ? std::ldexp(float(m), -24)
                               : std::ldexp(float(m + 1024), e - 25);
    return h & 0x8000 ? -mag : mag;
}
inline unsigned short simt_float_to_half(float f) {
    const unsigned short sign = std::signbit(f) ? 0x8000 : 0;
    const float a = std::fabs(f);
    if (std::isnan(f)) return 0x7e00;
    if (a >= 65520.0f) return sign | 0x7c00;
    const int e = a < 6.103515625e-5f ? -14 : std::ilogb(a);
    const float steps =
        std::nearbyint(std::ldexp(a, 10 - e));  // in units of 2^(e - 10), to nearest even
    return sign | (unsigned short)(int(steps) + ((e + 14) << 10));
}

// What the launchers take from the CUDA runtime.
using cudaStream_t = void*;
using cudaError_t = int;
enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8
};
inline int cudaGetLastError() {
    return cudaSuccess;
}
template <class F>
int cudaFuncSetAttribute(F*, int, int bytes) {
    return bytes <= 163 * 1024 ? cudaSuccess
                               : cudaErrorInvalidValue;  // the smaller of sm_80 and sm_90
}
#define D2M_LAUNCH(kernel, gx, gy, threads, shared, stream, ...)                                 \
    do {                                                                                         \
        auto simt_kernel = kernel;                                                               \
        if ((shared) > 48 * 1024 && (shared) > 163 * 1024) simt::fail("too much shared memory"); \
        simt::launch(gx, gy, threads, shared, [&] { simt_kernel(__VA_ARGS__); });                \
    } while (0)
