"""A CUDA driver for Triton that compiles for Hopper and launches nothing: the host's cost alone."""

from __future__ import annotations

from contextlib import contextmanager, suppress


class _Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, *arguments):
        pass


class _Driver:
    launcher_cls = _Launcher

    @property
    def utils(self):
        return self

    def is_active(self):
        return True

    def get_current_device(self):
        return 99  # kernels "loaded" for it must never be taken for a real device's

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 64, 0, 1024  # module, function, registers, spills, threads


@contextmanager
def nothing_launched():
    """Within it Triton's kernels take tensors of the CPU, and no launch does anything."""
    from triton.runtime import driver

    from d2m_kernels.backends.triton import configs, launch

    kept = launch.programs, configs.capability
    driver.set_active(_Driver())
    launch.programs, configs.capability = lambda *_: 132, lambda _: (9, 0)
    try:
        yield
    finally:
        launch.programs, configs.capability = kept
        with suppress(RuntimeError):  # no GPU: there is no driver to go back to
            driver.reset_active()
