"""`d2m distill` and `d2m sample`: one student from teacher to saved model, and its samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from d2m_models.checkpoints.origin import base_pipeline
from d2m_models.config import KINDS, AnyMoEConfig, FluxMoEConfig
from d2m_models.conversion.flux import skeleton
from d2m_models.inspection.card import write_card
from d2m_models.presets import find_preset
from distill import files as ckpt
from distill.configs.sections import DistillConfig
from distill.configs.training import first_batch, settings
from distill.data.sources import data_fingerprint, open_source
from distill.errors import CheckpointError, ConfigError
from distill.families.flux import Flux
from distill.families.registry import family_of
from distill.loop.parallel import World, shard_model, start_world, stop_world
from distill.sampling import Previews
from distill.stages import VERSION, run_stage
from distill.students import group_blocks, make_student, measure
from distill.teacher import load_teacher, modulation_inputs


def student_structure(config: DistillConfig, teacher: nn.Module) -> Any:
    """The student's FluxMoEConfig, whose depth defaults to the teacher's; AnyMoEConfig for models
    of other families."""
    student = config.student
    if not isinstance(family_of(teacher), Flux):
        return _any_structure(config, teacher)
    depth = {"double": "num_layers", "single": "num_single_layers"}
    own = {depth[kind]: len(getattr(teacher, name)) for kind, name in KINDS.items()}
    try:
        if student.preset is not None:
            structure = find_preset(student.preset)
        else:
            structure = FluxMoEConfig.from_dict({**own, **(student.structure or {})})
    except (TypeError, ValueError) as err:
        key = "structure" if student.preset is None else "preset"
        raise ConfigError(f"student.{key}: {err}") from err
    ways = {"initialisation": "taylor", "routers": "random", "outputs": "dense"}
    for name, plain in ways.items():
        if structure.moe is None and getattr(student, name) != plain:
            raise ConfigError(
                f"student.{name} is {getattr(student, name)!r}, but the student's structure "
                f"has no key 'moe'; expected {plain!r}"
            )
    return structure


def _any_structure(config: DistillConfig, teacher: nn.Module) -> AnyMoEConfig:
    name, student = type(teacher).__name__, config.student
    plain = {"preset": None, "initialisation": ("taylor", "random"), "routers": "random",
             "outputs": "dense"}  # fmt: skip
    for key, can in plain.items():
        if (value := getattr(student, key)) != can and value not in (can or ()):
            raise ConfigError(f"student.{key} is {value!r}; expected {can} for a {name}")
    if any(stage.train.preview_every for stage in config.stages):
        raise ConfigError("train.preview_every draws with FLUX.1 alone; expected null")
    try:
        return AnyMoEConfig.from_dict(student.structure or {})
    except (TypeError, ValueError) as err:
        raise ConfigError(f"student.structure: {err}") from err


def distill(
    config: DistillConfig, device: str = "cpu", progress: bool = True, accept_changed: bool = False
) -> Path:
    """Run the configured stages and save the student; returns its folder, OUT/model.

    OUT/<stage>/ holds each stage's checkpoints and log; a run that was stopped goes on from there.
    Settings that differ from those OUT was begun with are an error unless `accept_changed`. Under
    torchrun all processes call this.
    """
    world = start_world(config.parallel, device)
    try:
        return _distill(config, world, progress, accept_changed)
    finally:
        stop_world(world)


def _distill(config: DistillConfig, world: World, progress: bool, accept_changed: bool) -> Path:
    out, device = ckpt.make_folder(config.out), world.device
    started = {"settings": settings(config), "device": device.type}
    if (data := data_fingerprint(config.data)) is not None:
        started["data"] = data
    _claim(out, started, accept_changed, write=world.main)
    target = out / "model"
    world.barrier()
    if target.exists():
        return target
    teacher = world.first(
        lambda: load_teacher(config.teacher, config.data, config.seed, str(device), progress)
    )
    structure = student_structure(config, teacher)
    if world.size > 1 and isinstance(structure, AnyMoEConfig):
        raise ConfigError(
            f"a {type(teacher).__name__} is distilled by one process; this is several"
        )
    source = open_source(config.data, teacher, str(device))
    model = start_student(config, structure, teacher, source, world)
    shard_model(teacher, world)
    parent = ckpt.fingerprint(VERSION, started["settings"])
    for number, stage in enumerate(config.stages):
        if stage.stage == "mob":
            if structure.mob is None:
                raise ConfigError("stages has 'mob', but the student's structure has no key 'mob'")
            model = group_blocks(model, structure.mob, config.seed, source)
        elif structure.moe is None:
            raise ConfigError(
                f"stages has {stage.stage!r}, but the student's structure has no key 'moe'"
            )
        folder, train = out / stage.stage, stage.train
        previews = Previews(source, folder / "previews", config.seed, world, config.data, train)
        parent = run_stage(
            model,
            teacher,
            source,
            stage,
            folder,
            seed=config.seed,
            first=first_batch([s.train for s in config.stages[:number]], train.batch_size),
            parent=parent,
            label=stage.stage,
            progress=progress,
            world=world,
            accept_changed=accept_changed,
            preview=previews,
        )
    if world.main:
        model.register_to_config(origin=origin_of(config))

        def write(folder: Path) -> None:
            model.cpu().save_pretrained(folder)
            if isinstance(structure, FluxMoEConfig):
                write_card(folder, out.name)

        ckpt.write_folder(target, write)
    world.barrier()
    return target


def origin_of(config: DistillConfig) -> dict[str, Any]:
    """What the saved model's configuration says of how it was made."""
    path, data, student = config.teacher.path, config.data, config.student
    stages = [
        {"stage": s.stage, "steps": s.train.steps, "batch_size": s.train.batch_size,
         "lr": s.train.lr}
        for s in config.stages
    ]  # fmt: skip
    found = {
        "state": "distilled", "base": None if path is None else base_pipeline(path),
        "preset": student.preset, "initialisation": student.initialisation,
        "routers": student.routers, "stages": stages,
        "data": data.name if data.folder is None else f"{data.name}: {Path(data.folder).name}",
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def start_student(
    config: DistillConfig, structure: Any, teacher: nn.Module, source: Any, world: World
) -> nn.Module:
    """The converted teacher: neurons ordered by eq. (6) or as configured, AdaLN fitted, fp32.

    With several ranks only rank 0 makes it, in host memory, and moves its teacher there: a GPU that
    is to hold a shard need not hold teacher and student whole. The others get a skeleton.
    """
    if not world.main:
        model = skeleton(teacher, replace(structure, mob=None))
    else:
        seed = config.seed
        how = measure(teacher, source, structure, config.student, seed)
        temb = None
        if structure.adaln_dim is not None:
            temb = modulation_inputs(teacher, source, config.student.calibration, seed)
        if world.size > 1:
            teacher.cpu()
            temb = None if temb is None else temb.cpu()
        model = make_student(teacher, structure, temb=temb, seed=seed, **how).float()
    world.barrier()
    return model


def _claim(
    out: Path, started: dict[str, Any], accept_changed: bool = False, write: bool = True
) -> None:
    """Compare with the settings.json that is there, on every rank; one writes it."""
    path = out / "settings.json"
    text = json.dumps(started, indent=2, sort_keys=True) + "\n"
    old = path.read_text(encoding="utf-8") if path.exists() else text
    if old != text and not accept_changed:
        changed = [
            f"{a.strip()!r} -> {b.strip()!r}"
            for a, b in zip(old.splitlines(), text.splitlines(), strict=False)
            if a != b
        ]
        raise CheckpointError(
            f"{out} holds a run with other settings ({'; '.join(changed[:3])}); choose another "
            "output folder, remove it, or go on with --accept-changed-config"
        )
    if write and (old != text or not path.exists()):
        ckpt.write_text(path, text)
