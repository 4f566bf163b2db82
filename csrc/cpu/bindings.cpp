// The module `_d2m_cpu`: addresses and sizes in, nothing out. d2m_kernels/backends/native.py is its only
// caller.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

namespace py = pybind11;

namespace {

template <class T>
T* ptr(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_d2m_cpu, m) {
    using addr = std::uintptr_t;
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "route, permute and combine on the CPU; use d2m_kernels, not this";
    m.attr("ABI") = D2M_ABI;
    m.def("isa", [] { return d2m::kernels().name; });
    m.def(
        "route",
        [](addr x, int x_dtype, int64_t x_stride, addr router, int router_dtype,
           int64_t router_stride, addr mask, int64_t T, int64_t D, int64_t E, int64_t K, addr probs,
           addr weights, addr ids, int threads) {
            d2m::route(ptr<const void>(x), x_dtype, x_stride, ptr<const void>(router), router_dtype,
                       router_stride, ptr<const uint8_t>(mask), T, D, E, K, ptr<float>(probs),
                       ptr<float>(weights), ptr<int32_t>(ids), threads);
        },
        release());
    m.def(
        "permute",
        [](addr ids, int64_t N, int64_t E, addr offsets, addr order, addr inverse) {
            d2m::permute(ptr<const int32_t>(ids), N, E, ptr<int32_t>(offsets), ptr<int32_t>(order),
                         ptr<int32_t>(inverse));
        },
        release());
    m.def(
        "combine",
        [](addr y, int dtype, int64_t y_stride, addr inverse, addr weights, addr offsets, int64_t E,
           addr base, int base_dtype, int64_t base_stride, addr bias, int bias_dtype, float scale,
           addr out, int64_t T, int64_t D, int64_t K, int threads) {
            const int64_t routed = ptr<const int32_t>(offsets)[E];
            d2m::combine({ptr<const void>(y), dtype, y_stride, ptr<const int32_t>(inverse),
                          ptr<const float>(weights), routed, ptr<const void>(base), base_dtype,
                          base_stride, nullptr, scale, ptr<void>(out), D, K},
                         ptr<const void>(bias), bias_dtype, T, threads);
        },
        release());
    m.def(
        "gather_rows",
        [](addr src, int64_t src_stride, addr index, int64_t rows, int64_t divisor,
           int64_t row_bytes, addr dst, int threads) {
            d2m::gather_rows(ptr<const char>(src), src_stride, ptr<const int32_t>(index), rows,
                             divisor, row_bytes, ptr<char>(dst), threads);
        },
        release());
}
