"""`d2m prepare --ray`: decoding and encoding in the actors of a Ray cluster, the result the same.

The driver alone decides and writes. Readers (a CPU each) decode the source's items in units; the
driver learns what a shard's limits depend on, sizes and captions, in the source's order, while the
pixels stay in the object store; encoders (a GPU each) take batches composed as in a single process.
So neither the number of actors nor a second try changes a byte, and a driver that dies goes on
after the last shard its manifest names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from distill.data.folder import Sample
from distill.errors import UserError
from distill.prepare.buckets import resolutions
from distill.prepare.captions import open_captions
from distill.prepare.decode import Decoded, decode, numbered
from distill.prepare.run import Encoders, Settings, Sizes

UNIT = 8  # items a reader decodes at a time
AHEAD = 2  # calls that wait at an actor, so that it never waits for the driver
# An actor that dies, by itself or with its machine, starts anew and its calls are made again.
AGAIN = {"max_restarts": -1, "max_task_retries": -1}


class Reader:
    """Decodes runs of a source's items; going forward it opens the source once."""

    def __init__(self, source: str, reading: dict[str, Any], settings: Settings):
        from PIL import Image

        Image.init()
        self.captions = open_captions(source, **reading)
        self.buckets = resolutions(settings.size, settings.max_aspect)
        self.most, self.at = settings.max_upscale, None

    def decode(self, start: int) -> tuple[Any, ...]:
        """(what is known of up to UNIT items from number `start` on, the pixels of each)."""
        if self.at is None or start < self.at:
            self.items, self.at = numbered(self.captions, start), start
        found = islice(self.items, start - self.at, start - self.at + UNIT)
        self.at = start + UNIT
        done = [decode(item, number, self.buckets, self.most) for number, item in found]
        pixels = [d.pixels for d in done] + [None] * (UNIT - len(done))
        return [replace(d, pixels=None) for d in done], *pixels


class Encoder:
    """`Encoders` in an actor."""

    def __init__(self, model: str, settings: Settings, device: str, threads: int):
        import torch

        if device == "cpu":  # how a product is rounded may depend on their number
            torch.set_num_threads(threads)
        self.encoders = Encoders(model, settings, device)

    def about(self) -> tuple[dict[str, Any], int]:
        return self.encoders.about, self.encoders.text_rows

    def empty(self) -> dict[str, Any]:
        return self.encoders.empty()

    def encode(self, images: list[Decoded], *pixels: Any) -> list[Sample]:
        pairs = zip(images, pixels, strict=True)
        return self.encoders.encode([replace(d, pixels=p) for d, p in pairs])


def _get(ref: Any) -> Any:
    """A call's result; what it raised is raised here as it was there."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as err:
        raise err.cause from err
    except ray.exceptions.RayError as err:
        raise UserError(
            f"the Ray cluster gave up ({' '.join(str(err).split())[:500]}); finished shards are "
            "kept, the same command goes on"
        ) from err


class Pool:
    """Actors of one kind; a call goes to one that has fewest waiting."""

    def __init__(self, actors: list[Any]):
        self.actors, self.free, self.busy = actors, deque(actors * AHEAD), {}

    def call(self, method: str, *args: Any, returns: int = 1) -> Any:
        import ray

        if not self.free:
            for ref in ray.wait(list(self.busy), num_returns=1, fetch_local=False)[0]:
                self.free.append(self.busy.pop(ref))
        actor = self.free.popleft()
        refs = getattr(actor, method).options(num_returns=returns).remote(*args)
        self.busy[refs if returns == 1 else refs[0]] = actor
        return refs


class RemoteEncoders(Sizes):
    """`Encoders` whose work is done by a pool of actors."""

    def __init__(self, pool: Pool, settings: Settings):
        self.pool = pool
        super().__init__(settings, *_get(pool.actors[0].about.remote()))

    def empty(self) -> dict[str, Any]:
        return _get(self.pool.actors[0].empty.remote())

    def submit(self, images: list[Decoded]) -> Callable[[], list[Sample]]:
        plain = [replace(d, pixels=None) for d in images]
        return partial(_get, self.pool.call("encode", plain, *(d.pixels for d in images)))


def _decoded(pool: Pool, start: int) -> Iterator[Decoded]:
    """Items from number `start` on in their order; `pixels` are references into the store."""
    waiting: deque[Any] = deque()
    while True:
        while len(waiting) < len(pool.actors) * AHEAD:
            waiting.append(pool.call("decode", start, returns=UNIT + 1))
            start += UNIT
        first, *pixels = waiting.popleft()
        found = _get(first)
        for d, ref in zip(found, pixels, strict=False):
            yield replace(d, pixels=ref)
        if len(found) < UNIT:
            return


@contextmanager
def cluster(
    address: str,
    source: str,
    reading: dict[str, Any],
    model: str,
    settings: Settings,
    device: str,
    workers: int,
) -> Iterator[tuple[RemoteEncoders, Callable[[int], Iterator[Decoded]]]]:
    """(encoders, number of the first item -> decoded items) on a Ray cluster.

    Args:
        address: of its head, or "auto": RAY_ADDRESS, this machine's, or one that is started here.
        device: "cuda" takes every GPU of the cluster, else half of the CPUs encode.
        workers: readers, as far as there are CPUs.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray: pip install 'dense2moe[ray]'") from None
    import torch

    ours, actors = not ray.is_initialized(), []
    if ours:
        try:
            ray.init(address=None if address == "auto" else address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as err:
            raise UserError(f"cannot join the Ray cluster {address}: {err}") from err
    try:
        have, cuda = ray.cluster_resources(), device.startswith("cuda")
        cpus = int(have.get("CPU", 1))
        count = int(have.get("GPU", 0)) if cuda else max(cpus // 2, 1)
        if not count:
            raise UserError(
                "--device is cuda and the Ray cluster has no GPU; expected --device cpu"
            )
        need = {"num_gpus": 1, "num_cpus": 0} if cuda else {"num_cpus": 1}
        encoder = ray.remote(**AGAIN, **need)(Encoder)
        threads = torch.get_num_threads()
        actors += [encoder.remote(model, settings, device, threads) for _ in range(count)]
        reader = ray.remote(**AGAIN, num_cpus=1)(Reader)
        most = max(cpus if cuda else cpus - count, 1)
        actors += [reader.remote(source, reading, settings) for _ in range(min(workers, most) or 1)]
        encoders, readers = Pool(actors[:count]), Pool(actors[count:])
        yield RemoteEncoders(encoders, settings), partial(_decoded, readers)
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()
