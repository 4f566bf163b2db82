// The number both extension modules carry as `ABI` and d2m_kernels/backends/native.py checks on import: raise
// it in both places whenever an argument list changes, so that a stale build is refused instead of
// called wrongly.
#pragma once

#define D2M_ABI 2

// Codes of the element types, the same in _ext.py.
enum D2mDtype : int { D2M_F32 = 0, D2M_BF16 = 1, D2M_F16 = 2 };
