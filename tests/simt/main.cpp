// Runs the project's CUDA launchers on the SIMT machine: main <job file> <result file>.
//
// A job is a line of text: the operation, the order of the threads, the most blocks of a counting
// sort, then the operation's own integers; then the arrays it takes, raw, in order. Every array is
// a heap block of its own and of just its size, so that ASan sees the first byte past it. Outputs
// start as 0xff bytes.
#include "simt.h"

static int max_blocks = 1024;
#define D2M_MAX_BLOCKS max_blocks
#define D2M_ROUTE_BLOCKS (max_blocks < d2m::kRouteBlocks ? max_blocks : d2m::kRouteBlocks)
#include "../../csrc/cuda/permute.cu"
#ifndef SIMT_PERMUTE_ONLY  // compiles in a third of the time
#include "../../csrc/cuda/combine.cu"
#include "../../csrc/cuda/route.cu"
#endif

#include <fstream>
#include <iostream>
#include <sstream>
#include <string>

namespace {

std::ifstream job;
std::ofstream result;

[[maybe_unused]] size_t dtype_size(int64_t dtype) {
    return dtype == d2m::kF32 ? 4 : 2;
}

// `offset` bytes lie before the array (so that its alignment can be spoiled); without `present`
// there is none.
struct Input {
    std::unique_ptr<char[]> block;
    char* data = nullptr;
    Input(size_t bytes, bool present = true, size_t offset = 0) {
        if (!present) return;
        block.reset(new char[offset + bytes]);
        data = block.get() + offset;
        job.read(data, std::streamsize(bytes));
        if (size_t(job.gcount()) != bytes) simt::fail("the job file is too short");
    }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data);
    }
};

template <class T>
struct Output {
    size_t count;
    std::unique_ptr<T[]> data;
    explicit Output(size_t n) : count(n), data(new T[n]) {
        std::memset(data.get(), 0xff, n * sizeof(T));
    }
    void write() const {
        result.write(reinterpret_cast<const char*>(data.get()), std::streamsize(count * sizeof(T)));
    }
};

#ifndef SIMT_PERMUTE_ONLY
int route(std::istream& in) {
    int64_t T, D, E, K, x_dtype, x_stride, router_dtype, router_stride, masked, offset;
    in >> T >> D >> E >> K >> x_dtype >> x_stride >> router_dtype >> router_stride >> masked >>
        offset;
    // A row stride beyond D belongs to no row after the last one.
    Input x(((T - 1) * x_stride + D) * dtype_size(x_dtype), true, offset * dtype_size(x_dtype));
    Input router(((E - 1) * router_stride + D) * dtype_size(router_dtype));
    Input mask(T, masked != 0);
    Output<float> probs(T * E), weights(T * K);
    Output<int> ids(T * K), offsets(E + 1), order(T * K), inverse(T * K),
        workspace(d2m::workspace_ints(E));
    const int err =
        d2m::route(x.data, int(x_dtype), x_stride, router.data, int(router_dtype), router_stride,
                   mask.as<unsigned char>(), {}, T, D, E, K, probs.data.get(), weights.data.get(),
                   ids.data.get(), offsets.data.get(), order.data.get(), inverse.data.get(),
                   workspace.data.get(), nullptr);
    probs.write();
    weights.write();
    ids.write();
    offsets.write();
    order.write();
    inverse.write();
    return err;
}

int modulate_route(std::istream& in) {
    int64_t T, D, E, K, dtype, x_stride, B, adaln_stride, router_dtype;
    float eps;
    in >> T >> D >> E >> K >> dtype >> x_stride >> B >> adaln_stride >> eps >> router_dtype;
    const size_t size = dtype_size(dtype);
    Input x(((T - 1) * x_stride + D) * size), scale(((B - 1) * adaln_stride + D) * size),
        shift(((B - 1) * adaln_stride + D) * size), router(E * D * dtype_size(router_dtype));
    Output<char> out(T * D * size);
    Output<float> probs(T * E), weights(T * K);
    Output<int> ids(T * K), offsets(E + 1), order(T * K), inverse(T * K),
        workspace(d2m::workspace_ints(E));
    const d2m::AdaLN adaln{scale.data, adaln_stride, shift.data,    adaln_stride,
                           T / B,      eps,          out.data.get()};
    const int err = d2m::route(x.data, int(dtype), x_stride, router.data, int(router_dtype), D,
                               nullptr, adaln, T, D, E, K, probs.data.get(), weights.data.get(),
                               ids.data.get(), offsets.data.get(), order.data.get(),
                               inverse.data.get(), workspace.data.get(), nullptr);
    out.write();
    probs.write();
    weights.write();
    ids.write();
    offsets.write();
    order.write();
    inverse.write();
    return err;
}

int combine(std::istream& in) {
    int64_t T, D, K, rows, dtype, y_stride, weighted, base_dtype, base_stride, bias_dtype;
    float scale;
    in >> T >> D >> K >> rows >> dtype >> y_stride >> weighted >> base_dtype >> base_stride >>
        bias_dtype >> scale;
    Input y(rows ? ((rows - 1) * y_stride + D) * dtype_size(dtype) : 0);
    Input inverse(T * K * 4), weights(T * K * 4, weighted != 0), routed(4);
    Input base(((T - 1) * base_stride + D) * dtype_size(base_dtype), base_dtype >= 0);
    Input bias(D * dtype_size(bias_dtype), bias_dtype >= 0);
    Output<char> out(T * D * dtype_size(dtype));
    const int err =
        d2m::combine(y.data, int(dtype), y_stride, inverse.as<int>(), weights.as<float>(),
                     routed.as<int>(), base.data, int(base_dtype), base_stride, bias.data,
                     int(bias_dtype), scale, out.data.get(), T, D, K, nullptr);
    out.write();
    return err;
}
#endif

int permute(std::istream& in) {
    int64_t N, E;
    in >> N >> E;
    Input ids(N * 4);
    Output<int> offsets(E + 1), order(N), inverse(N), workspace(d2m::workspace_ints(E));
    const int err = d2m::permute(ids.as<int>(), N, E, offsets.data.get(), order.data.get(),
                                 inverse.data.get(), workspace.data.get(), nullptr);
    offsets.write();
    order.write();
    inverse.write();
    return err;
}

// Kernels that break the rules, to show that the machine notices.
__global__ void missing_barrier_kernel(int* out) {
    D2M_DYNAMIC_SHARED(shared);
    int* const s = reinterpret_cast<int*>(shared);
    s[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = s[(threadIdx.x + 1) % 64];
}
__global__ void divergent_barrier_kernel(int*) {
    if (threadIdx.x < 32) __syncthreads();
}

int broken(std::istream& in) {
    int which;
    in >> which;
    Output<int> out(64);
    if (which == 0)
        D2M_LAUNCH(missing_barrier_kernel, 1, 1, 64, 256, nullptr, out.data.get());
    else
        D2M_LAUNCH(divergent_barrier_kernel, 1, 1, 64, 0, nullptr, out.data.get());
    out.write();
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    job.open(argv[1], std::ios::binary);
    result.open(argv[2], std::ios::binary);
    std::string line, op, order;
    while (std::getline(job, line)) {
        std::istringstream in(line);
        in >> op >> order >> max_blocks;
        simt::machine().order = order == "reverse"    ? simt::Order::reverse
                                : order == "shuffled" ? simt::Order::shuffled
                                                      : simt::Order::forward;
        int err = 2;
        if (op == "permute") err = permute(in);
        if (op == "broken") err = broken(in);
#ifndef SIMT_PERMUTE_ONLY
        if (op == "route") err = route(in);
        if (op == "modulate_route") err = modulate_route(in);
        if (op == "combine") err = combine(in);
#endif
        if (err) {
            std::cerr << "job '" << line << "' failed with " << err << "\n";
            return err;
        }
    }
    result.close();
    return result ? 0 : 4;
}
