"""Calls that repeat: their launches are worked out once and then only given the new tensors.

An eager call of the layer costs the host more in tiles, bundles, descriptors and the JIT's own look
at every argument than short sequences cost the GPU. None of that depends on anything but sizes,
strides, alignments and settings: a plan keeps the compiled kernels and where in their arguments
each tensor stands.
"""

import os
from operator import itemgetter

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.launch import TICKET_BYTES, recorder, tickets
from d2m_kernels.backends.triton.pieces import INTERPRET, precision

MOST = 256  # plans kept; then all are forgotten
_plans: dict = {}


def planned(function, tensors, settings: tuple):
    """function(), which reads `tensors` (or None) and `settings` alone and returns tuples of new
    tensors, from a plan once it was called twice with alike ones.

    All that `function` does on the device must be launches of `launch` and a call of `tickets`.
    """
    if INTERPRET or os.environ.get("D2M_TRITON_PLANS") == "0":
        return function()
    first, pointers, numbers = tensors[0], [t if t is None else t.data_ptr() for t in tensors], {}
    key = (
        settings, os.environ.get(configs.ENV), precision(first.dtype), first.device,
        *[t if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
        *[p if p is None else (p % 16, numbers.setdefault(p, len(numbers))) for p in pointers],
    )  # fmt: skip
    plan = _plans.get(key)
    if isinstance(plan, Plan):
        return plan.run(tensors)
    if plan is False:
        return function()
    if plan is None:
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[key] = "seen once"
        return function()
    recorder.launches = launches = []
    try:
        results = function()
    finally:
        recorder.launches = None
    try:
        _plans[key] = Plan(tensors, launches, results)
    except Unplannable:
        _plans[key] = False
    return results


class Unplannable(Exception):
    """A tensor of a launch is neither given, nor new, nor a ticket, or has no address."""


class Plan:
    """The launches of a call, with numbers of a table in place of their arguments.

    The table starts with constants and the tensors given; `steps` append what is made from them:
    new tensors, tickets, descriptors and bundles.
    """

    def __init__(self, tensors, launches, results):
        everything = [*(arguments for *_, arguments in launches), *results]
        leaves = [x for items in everything for member in items for x in _leaves(member)]
        plain = [x for x in leaves if not isinstance(x, torch.Tensor)]
        if not all(x.data_ptr() for x in (*tensors, *leaves) if isinstance(x, torch.Tensor)):
            raise Unplannable("an empty tensor, or a meta tensor, has no address")
        self.constants = list({(type(x), x): x for x in plain}.values())
        self._numbers = {(type(x), x): i for i, x in enumerate(self.constants)}
        self._given, self._end = {}, len(self.constants)
        for t in tensors:
            if t is not None:  # of tensors at one address, which the key knows, the first
                self._given.setdefault(t.data_ptr(), self._end)
            self._end += 1
        self._new, self.steps, self._kept = {}, [], everything
        self.launches = [(c, grid, self._getter(a)) for c, grid, a in launches]
        self.results = [self._getter(r) for r in results]
        del self._numbers, self._given, self._new, self._kept

    def run(self, tensors):
        table = [*self.constants, *tensors]
        for step, *how in self.steps:
            step(table, *how)
        for compiled, grid, getter in self.launches:
            compiled[grid](*getter(table))
        return [getter(table) for getter in self.results]

    def _getter(self, items):
        """Of two or more items, by their numbers."""
        return itemgetter(*[self._number(x) for x in items])

    def _number(self, x) -> int:
        if isinstance(x, torch.Tensor):
            return self._tensor(x)
        if isinstance(x, TensorDescriptor):
            return self._step(_describe, dict(vars(x)), self._tensor(x.base))
        if _holds_tensors(x):
            return self._step(_bundle, type(x)._make, self._getter(x))
        return self._numbers[type(x), x]

    def _tensor(self, t) -> int:
        pointer = t.data_ptr()
        if pointer in self._given:  # kernels do not ask for the shape of what they are given
            return self._given[pointer]
        if pointer not in self._new:
            storage = t.untyped_storage()
            rows, rest = divmod(storage.nbytes(), TICKET_BYTES)
            if storage.nbytes() == t.numel() * t.element_size() and t.is_contiguous():
                self._new[pointer] = self._step(_allocate, t.shape, t.dtype, t.device)
            elif t.dtype == torch.int32 and not rest and t.numel() * 4 == TICKET_BYTES:
                first = self._step(_draw, rows, t.device)
                self._end += rows - 1
                for row in range(rows):
                    self._new[storage.data_ptr() + row * TICKET_BYTES] = first + row
            else:
                raise Unplannable("a view of a new tensor")
        return self._new[pointer]

    def _step(self, *step) -> int:
        self.steps.append(step)
        self._end += 1
        return self._end - 1


def _holds_tensors(x) -> bool:
    members = (torch.Tensor, TensorDescriptor)
    return isinstance(x, tuple) and any(isinstance(m, members) for m in x)


def _leaves(x):
    if isinstance(x, TensorDescriptor):
        yield x.base
    elif _holds_tensors(x):
        for member in x:
            yield from _leaves(member)
    else:
        yield x


def _allocate(table, shape, dtype, device):
    table.append(torch.empty(shape, dtype=dtype, device=device))


def _draw(table, rows, device):
    table.extend(tickets(device, rows))


def _describe(table, fields, base):
    described = object.__new__(TensorDescriptor)  # checked when the plan was made
    described.__dict__.update(fields)
    described.base = table[base]
    table.append(described)


def _bundle(table, make, getter):
    table.append(make(getter(table)))
