"""`d2m prepare`: images and captions to latent shards, resumable to the byte (see run.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from distill import files as ckpt
from distill.data.folder import damage, read_manifest
from distill.errors import UserError
from distill.prepare.buckets import resolutions
from distill.prepare.captions import open_captions
from distill.prepare.decode import Decoded, decode, in_order, numbered
from distill.prepare.item import Captions
from distill.prepare.run import Encoders, Run, Settings, bad_limit, commonest, read_bad, same


def prepare(
    source: str,
    out: Path | str,
    model: str,
    settings: Settings,
    *,
    device: str = "cpu",
    workers: int = 4,
    max_bad: str = "1%",
    progress: bool = True,
    ray: str | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Turn `source` into the folder `out` of latent shards, or go on with it; returns its manifest.

    Args:
        model: FLUX folder or hub name whose VAE (and text encoders) encode.
        workers: threads that decode; 0 decodes in the main thread. With `ray`, processes.
        max_bad: unreadable images that are skipped, see `bad_limit`.
        ray: a cluster that decodes and encodes, see `distill.prepare.ray`; the result is the same.
        reading: keyword arguments of `open_captions`.
    """
    buckets = resolutions(settings.size, settings.max_aspect)
    bad_limit(max_bad, 1)
    out = ckpt.make_folder(out)
    with ckpt.locked(out, "`d2m prepare`"):
        return _prepare(
            source, out, model, settings, buckets, device, workers, max_bad, progress, ray, reading
        )


def _prepare(
    source: str,
    out: Path,
    model: str,
    settings: Settings,
    buckets: list[tuple[int, int]],
    device: str,
    workers: int,
    max_bad: str,
    progress: bool,
    ray: str | None,
    reading: dict[str, Any],
) -> dict[str, Any]:
    captions = open_captions(source, **reading)
    part = "/".join(map(str, reading.get("part", (0, 1))))
    listing = {"kind": captions.kind, "fingerprint": captions.fingerprint, "part": part}
    if (out / "manifest.json").exists():
        old = read_manifest(out)
        same(old, {"settings": asdict(settings), "source": listing}, out)
        if old["complete"]:
            return _some(old, source, out)
    elif any(f for f in out.iterdir() if not f.name.startswith((".", "shard-", "empty.", "bad."))):
        raise UserError(f"{out} is not empty and holds no manifest.json; choose another folder")
    with ExitStack() as stack:
        if ray is None:
            encoders: Any = Encoders(model, settings, device)
            decode_from = partial(_decoded, captions, buckets, settings.max_upscale, workers)
        else:
            from distill.prepare.ray import cluster

            encoders, decode_from = stack.enter_context(
                cluster(ray, source, reading, model, settings, device, workers)
            )
        side = 2 * encoders.about["vae"]["factor"]
        if any(s % side for bucket in buckets for s in bucket):
            raise UserError(f"the VAE's factor is {side // 2}; expected at most 8")
        run = Run(out, settings, encoders, listing)
        if empty := encoders.empty():
            ckpt.save_plain(out / "empty.safetensors", empty)
        _fill(run, decode_from(run.next), captions.total, max_bad, progress)
    return _some(run.manifest, source, out)


def _some(manifest: dict[str, Any], source: str, out: Path) -> dict[str, Any]:
    """The manifest of a complete folder, if there are samples in it."""
    if not manifest["samples"]:
        why = [f"{e['count']} left out: {reason}" for reason, e in manifest["left_out"].items()]
        if bad := read_bad(out):
            why.append(f"{len(bad)} cannot be used (bad.jsonl), {commonest(bad)}")
        raise UserError(f"{source} gave no sample: {'; '.join(why) or 'it is empty'}")
    return manifest


def _decoded(
    captions: Captions, buckets: list[tuple[int, int]], most: float, workers: int, start: int
) -> Iterator[Decoded]:
    """The source's items from number `start` on, decoded in threads of this process."""
    from PIL import Image

    Image.init()  # its list of decoders, before threads use it
    return in_order(
        lambda pair: decode(pair[1], pair[0], buckets, most), numbered(captions, start), workers
    )


def _fill(
    run: Run, items: Iterator[Decoded], total: int | None, max_bad: str, progress: bool
) -> None:
    from tqdm import tqdm

    count = start = run.next
    with tqdm(total=total, initial=start, unit="img", disable=not progress, file=sys.stderr) as bar:
        for item in items:
            if item.error is not None:
                run.reject(item, max_bad)
            elif item.left_out is not None:
                run.note("left_out", item.left_out, item.key)
            else:
                run.add(item)
            count = item.number + 1
            bar.update()
            bar.set_postfix(shards=len(run.manifest["shards"]), bad=len(run.bad), refresh=False)
        run.close(count, complete=True)


def check(folder: Path | str, progress: bool = False) -> list[str]:
    """What is wrong in a prepared folder: files missing or of another size or SHA-256."""
    from tqdm import tqdm

    manifest = read_manifest(folder)
    shards = tqdm(manifest["shards"], "checking", unit="shard", disable=not progress)
    found = [damage(Path(folder), entry, ("file", "index")) for entry in shards]
    wrong = [text for text in found if text is not None]
    if not manifest["complete"]:
        wrong.append("it is not complete: run the same `d2m prepare` command again")
    return wrong
