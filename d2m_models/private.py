"""Every name that torch and diffusers do not promise, behind one door each.

A door looks for its name when it is used. Where a name is gone there is another way, or an error
that says what is missing; tests/models/test_models_private.py takes each of them away.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------- torch


def is_hooked(module: nn.Module) -> bool:
    """Whether something hangs on the module's forward; True where that cannot be seen, for then
    the module itself is called, which is always right."""
    return bool(
        "forward" in module.__dict__
        or getattr(module, "_forward_pre_hooks", True)
        or getattr(module, "_forward_hooks", True)
    )


def is_bare(module: nn.Module) -> bool:
    """True if calling the module surely does nothing but run its class's forward."""
    anywhere = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
    return not (
        is_hooked(module)
        or getattr(module, "_backward_pre_hooks", True)
        or getattr(module, "_backward_hooks", True)
        or getattr(module, "_compiled_call_impl", module) is not None
        or anywhere is None
        or anywhere()
    )


def fake_kinds() -> tuple[type, ...]:
    """Classes of tensors that have shapes and no data, beside those of the meta device."""
    try:
        from torch._subclasses import FakeTensor
    except ImportError:
        return ()
    return (FakeTensor,)


def fake_mode() -> AbstractContextManager:
    """New tensors have shapes and no data inside."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise RuntimeError(
            f"torch {torch.__version__} has no FakeTensorMode where it was; activations cannot be "
            "counted without running the model"
        ) from None
    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, also where they have no data."""
    storage = tensor.untyped_storage()
    return getattr(storage, "_cdata", id(storage))


def many_graphs() -> AbstractContextManager:
    """Up to 64 compiled graphs of a function inside; torch's own limit of 8 where it is fixed."""
    try:
        import torch._dynamo

        return torch._dynamo.config.patch(recompile_limit=64)
    except (ImportError, AttributeError):
        return nullcontext()


def foreach(name: str, tensors: list[Tensor], *arguments: Any) -> None:
    """`tensor.NAME(...)` of many tensors in few launches, or one after another.

    An argument that is a list has one entry a tensor.
    """
    together = getattr(torch, f"_foreach_{name}", None)
    if together is not None:
        together(tensors, *arguments)
        return
    for i, tensor in enumerate(tensors):
        getattr(tensor, name)(*(a[i] if isinstance(a, list) else a for a in arguments))


# --------------------------------------------------------------------------------- diffusers


def register_blocks(*classes: type) -> bool:
    """Tells diffusers' caches what our blocks return; without that they refuse the model."""
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:
        return False
    places = {"return_hidden_states_index": 1, "return_encoder_hidden_states_index": 0}
    for kind in classes:
        TransformerBlockRegistry.register(kind, TransformerBlockMetadata(**places))
    return True


def token_group(model: nn.Module) -> Any:
    """The process group over which context parallelism splits the tokens, or None."""
    config = _parallel_config(model)
    config = getattr(config, "context_parallel_config", None)
    if config is None:
        return None
    mesh = getattr(config, "_flattened_mesh", None)
    if mesh is None:
        raise _hidden("the context-parallel mesh")
    return mesh.get_group()


def attention_options(processor: Any) -> dict[str, Any]:
    """Keywords of `dispatch_attention_fn` that an attention processor was given."""
    backend = getattr(processor, "_attention_backend", None)  # None: the default back-end
    return {"backend": backend, "parallel_config": _parallel_config(processor)}


def checkpoint(model: nn.Module, *arguments: Any) -> Any:
    """Runs a block as `enable_gradient_checkpointing` was told to."""
    run = getattr(model, "_gradient_checkpointing_func", None)
    run = run or partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    return run(*arguments)


def _parallel_config(owner: Any) -> Any:
    """How diffusers divides the owner; an error if that is hidden from a process among others."""
    if hasattr(owner, "_parallel_config"):
        return owner._parallel_config
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise _hidden("the parallel configuration")
    return None


def _hidden(what: str) -> RuntimeError:
    from diffusers import __version__

    return RuntimeError(
        f"diffusers {__version__} does not keep {what} where dense2moe looks for it; blocks could "
        "be routed differently on every rank: take diffusers 0.41 or 0.42, or one process"
    )
