// The module `_d2m_cuda`: addresses, sizes and a stream in, nothing out. d2m_kernels/backends/native.py is its
// only caller.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../abi.h"
#include "launch.h"

namespace py = pybind11;

namespace {

template <class T>
T* ptr(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check(const char* what, int err) {
    if (err == cudaSuccess) return;
    const auto e = static_cast<cudaError_t>(err);
    throw std::runtime_error(std::string("_d2m_cuda.") + what + ": " + cudaGetErrorName(e) + ": " +
                             cudaGetErrorString(e));
}

}  // namespace

PYBIND11_MODULE(_d2m_cuda, m) {
    using addr = std::uintptr_t;
    using d2m::Stream;
    m.doc() = "route, permute and combine on a CUDA stream; use d2m_kernels, not this";
    m.attr("ABI") = D2M_ABI;
    m.attr("CUDA_VERSION") = CUDART_VERSION;
    m.def("workspace_ints", &d2m::workspace_ints);
    m.def("route", [](addr x, int x_dtype, int64_t x_stride, addr router, int router_dtype,
                      int64_t router_stride, addr mask, int64_t T, int64_t D, int64_t E, int64_t K,
                      addr probs, addr weights, addr ids, addr offsets, addr order, addr inverse,
                      addr workspace, addr stream) {
        check("route", d2m::route(ptr<const void>(x), x_dtype, x_stride, ptr<const void>(router),
                                  router_dtype, router_stride, ptr<const unsigned char>(mask), {},
                                  T, D, E, K, ptr<float>(probs), ptr<float>(weights), ptr<int>(ids),
                                  ptr<int>(offsets), ptr<int>(order), ptr<int>(inverse),
                                  ptr<int>(workspace), reinterpret_cast<Stream>(stream)));
    });
    m.def("modulate_route",
          [](addr x, int x_dtype, int64_t x_stride, addr scale, int64_t scale_stride, addr shift,
             int64_t shift_stride, int64_t tokens, float eps, addr out, addr router,
             int router_dtype, int64_t router_stride, addr mask, int64_t T, int64_t D, int64_t E,
             int64_t K, addr probs, addr weights, addr ids, addr offsets, addr order, addr inverse,
             addr workspace, addr stream) {
              const d2m::AdaLN adaln{ptr<const void>(scale), scale_stride, ptr<const void>(shift),
                                     shift_stride,           tokens,       eps,
                                     ptr<void>(out)};
              check("modulate_route",
                    d2m::route(ptr<const void>(x), x_dtype, x_stride, ptr<const void>(router),
                               router_dtype, router_stride, ptr<const unsigned char>(mask), adaln,
                               T, D, E, K, ptr<float>(probs), ptr<float>(weights), ptr<int>(ids),
                               ptr<int>(offsets), ptr<int>(order), ptr<int>(inverse),
                               ptr<int>(workspace), reinterpret_cast<Stream>(stream)));
          });
    m.def("permute", [](addr ids, int64_t N, int64_t E, addr offsets, addr order, addr inverse,
                        addr workspace, addr stream) {
        check("permute", d2m::permute(ptr<const int>(ids), N, E, ptr<int>(offsets), ptr<int>(order),
                                      ptr<int>(inverse), ptr<int>(workspace),
                                      reinterpret_cast<Stream>(stream)));
    });
    m.def("combine", [](addr y, int dtype, int64_t y_stride, addr inverse, addr weights,
                        addr offsets, int64_t E, addr base, int base_dtype, int64_t base_stride,
                        addr bias, int bias_dtype, float scale, addr out, int64_t T, int64_t D,
                        int64_t K, addr stream) {
        check("combine", d2m::combine(ptr<const void>(y), dtype, y_stride, ptr<const int>(inverse),
                                      ptr<const float>(weights), ptr<const int>(offsets) + E,
                                      ptr<const void>(base), base_dtype, base_stride,
                                      ptr<const void>(bias), bias_dtype, scale, ptr<void>(out), T,
                                      D, K, reinterpret_cast<Stream>(stream)));
    });
}
