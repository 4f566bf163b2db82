"""FLUX with Mixture-of-Experts feed-forwards and Mixture-of-Blocks depth, for diffusers.

Shapes: B samples, I image tokens, X text tokens, D width, A AdaLN input.
"""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

# ModelMixin is not used below, but must be in this namespace: pipelines of before, which name this
# module, are loaded only if it has ModelMixin.
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.utils import apply_lora_scale
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from d2m_models import private
from d2m_models.blocks import (
    BlockContext,
    FluxMoESingleTransformerBlock,
    FluxMoETransformerBlock,
    add_residual,
    narrow_adaln,
)
from d2m_models.config import KINDS, FluxMoEConfig
from d2m_models.lora import DenseLoRAMixin, keep_state_in_dense_order
from d2m_models.mob import MixtureOfBlocks, check_cache
from d2m_models.output import FluxMoEAux, FluxMoEOutput
from d2m_models.topk import set_top_k

# constructor arguments that the dense class has too, but for the depth
DENSE_ARGUMENTS = (
    "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope",
)  # fmt: skip

logger = logging.getLogger(__name__)

# what AutoModel(..., trust_remote_code=True) runs where nothing is imported yet. Not called
# d2m_models.py: with that file beside it, diffusers would take the class of a saved pipeline from
# there alone, and ask for trust_remote_code in a process that has imported d2m_models.
CLASS_FILE = "flux_moe.py"
CLASS_CODE = (
    "# pip install dense2moe brings the class; this file says where it is\n"
    "from d2m_models import FluxMoETransformer2DModel\n"
)

private.register_blocks(FluxMoETransformerBlock, FluxMoESingleTransformerBlock)


def _promised(folder: Path) -> set[str]:
    """Tensors that a local folder's index names and no shard holds. diffusers goes by the index: a
    buffer it does not find stays as it was made."""
    absent = set()
    for index in folder.glob("diffusion_pytorch_model.safetensors.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent |= shards.keys()
        for file in set(shards.values()):
            with safe_open(folder / file, framework="pt") as shard:
                absent -= set(shard.keys())
    return absent


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def refuse_missing(path: Any, model: nn.Module, info: dict[str, Any]) -> None:
    """Raises where a model that diffusers loaded has tensors that were not in the files."""
    missing = set(info.get("missing_keys") or ()) | _promised(Path(path))
    if not getattr(model, "hf_device_map", None):  # what its index promises, but no shard holds
        missing |= {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    missing = sorted(missing)
    if missing:
        unknown = sorted(info.get("unexpected_keys") or ())
        raise ValueError(
            f"{path} lacks {len(missing)} tensors: {', '.join(missing[:3])}"
            + (f"; it has unknown ones: {', '.join(unknown[:3])}" if unknown else "")
            + "; it is incomplete or damaged: download or save it again"
        )


UNTRAINED = (
    "is converted, but not distilled: its routers choose at random, so its images are of no use "
    "yet (d2m distill trains; set_top_k(model, 'dense') runs all experts)"
)


def warn_of_state(path: Any, model: nn.Module) -> None:
    """Says once of a model from `path` that it was converted and not distilled, if so."""
    if (model.config.get("origin") or {}).get("state") == "converted":
        _warn_once(f"{path} {UNTRAINED}")


class FluxMoETransformer2DModel(DenseLoRAMixin, FluxTransformer2DModel):
    """`FluxTransformer2DModel` whose FFNs may be MoE layers and whose blocks may form MoB groups.

    Made by `convert_flux` or `from_pretrained`; the names of all dense parameters are kept.

    Args:
        patch_size ... axes_dims_rope: as `FluxTransformer2DModel`.
        moe, dense_double_blocks, dense_single_blocks, mob, adaln_dim: the fields of
            `FluxMoEConfig`, as plain dicts, lists and numbers.
        ff_dims: {FFN name: neurons} where a dense FFN does not have 4 D of them (pruned models).
        origin: what the model was made of and how: "state" ("converted" or "distilled"), "base"
            (the dense pipeline), and more; see `d2m_models.inspection.card`. Computes nothing.
    """

    _no_split_modules = ["FluxMoETransformerBlock", "FluxMoESingleTransformerBlock"]
    _repeated_blocks = ["FluxMoETransformerBlock", "FluxMoESingleTransformerBlock"]
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "router"]
    _keep_in_fp32_modules = ["router", "mob_routers"]
    # FLUX's plan cuts w1 and w2 across the boundaries of experts.
    _tp_plan = None

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        moe: dict[str, Any] | None = None,
        dense_double_blocks: tuple[int, ...] = (),
        dense_single_blocks: tuple[int, ...] = (),
        mob: dict[str, Any] | None = None,
        adaln_dim: int | None = None,
        ff_dims: dict[str, int] | None = None,
        origin: dict[str, Any] | None = None,
    ):
        structure = FluxMoEConfig(**{f.name: self.config[f.name] for f in fields(FluxMoEConfig)})
        # FLUX's own embedders and output head, without its blocks; the depth is registered again.
        own = {name: self.config[name] for name in DENSE_ARGUMENTS}
        super().__init__(num_layers=0, num_single_layers=0, **own)
        self.register_to_config(num_layers=num_layers, num_single_layers=num_single_layers)
        self.d2m_config = structure
        dim, widths = self.inner_dim, dict(ff_dims or {})
        shape = (dim, num_attention_heads, attention_head_dim)
        self.transformer_blocks = nn.ModuleList(
            FluxMoETransformerBlock(
                *shape,
                moe=None if i in structure.dense_double_blocks else structure.moe,
                adaln_dim=adaln_dim,
                ff_dim=widths.pop(f"transformer_blocks.{i}.ff", None),
                ff_context_dim=widths.pop(f"transformer_blocks.{i}.ff_context", None),
            )
            for i in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            FluxMoESingleTransformerBlock(
                *shape,
                moe=None if i in structure.dense_single_blocks else structure.moe,
                adaln_dim=adaln_dim,
                mlp_dim=widths.pop(f"single_transformer_blocks.{i}", None),
            )
            for i in range(num_single_layers)
        )
        if widths:
            raise ValueError(f"ff_dims names FFNs that the model does not have: {sorted(widths)}")
        if adaln_dim is not None:
            self.adaln_down = nn.Linear(dim, adaln_dim)
            narrow_adaln(self.norm_out, adaln_dim)
        if structure.mob is not None:
            mob = structure.mob
            self.mob_routers = nn.ModuleDict()
            for groups in (f"{kind}_groups" for kind in KINDS):
                self.mob_routers[groups] = nn.ModuleList(
                    MixtureOfBlocks(dim, len(group), mob.active, mob.alpha, mob.select)
                    for group in getattr(mob, groups)
                )
        keep_state_in_dense_order(self)

    def set_top_k(self, top_k) -> None:
        """See `d2m_models.set_top_k`."""
        set_top_k(self, top_k)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor = None,
        pooled_projections: Tensor = None,
        timestep: Tensor = None,
        img_ids: Tensor = None,
        txt_ids: Tensor = None,
        guidance: Tensor = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
        output_aux: bool = False,
    ) -> FluxMoEOutput | tuple:
        """FLUX's forward: hidden_states [B, I, channels] -> sample of that shape.

        Args:
            hidden_states ... controlnet_blocks_repeat: as `FluxTransformer2DModel.forward`; also
                `joint_attention_kwargs={"token_mask": [B, X] bool}` keeps padding out of routing.
            output_aux: also return block features, expert routing and block routing
                (`FluxMoEAux`), as `.aux` or as the second element of the tuple.
        """
        if output_aux and self.is_cache_enabled:
            raise ValueError("output_aux=True needs every block to run; call disable_cache() first")
        if output_aux and private.token_group(self) is not None:
            raise ValueError("output_aux=True does not work under context parallelism")
        x = self.x_embedder(hidden_states)
        times = [t.to(x.dtype) * 1000 for t in (timestep, guidance) if t is not None]
        temb = self.time_text_embed(*times, pooled_projections)
        condition = temb
        if self.d2m_config.adaln_dim is not None:
            condition = self.adaln_down(F.silu(temb))
        c = self.context_embedder(encoder_hidden_states)
        ids = [i[0] if i.ndim == 3 else i for i in (txt_ids, img_ids)]  # 3-D ids: older callers
        rotary = self.pos_embed(torch.cat(ids, dim=0))

        attention_kwargs = dict(joint_attention_kwargs or {})
        token_mask = self._own_tokens(attention_kwargs.pop("token_mask", None))
        if "ip_adapter_image_embeds" in attention_kwargs:
            embeds = attention_kwargs.pop("ip_adapter_image_embeds")
            attention_kwargs["ip_hidden_states"] = self.encoder_hid_proj(embeds)
        context = BlockContext(condition, rotary, attention_kwargs, token_mask)

        aux = FluxMoEAux() if output_aux else None
        counts = len(self.transformer_blocks), len(self.single_transformer_blocks)
        after = partial(add_residual, counts[0], controlnet_blocks_repeat, controlnet_block_samples)
        x, c = self._run_blocks("double", x, c, temb, context, after, aux)
        after = partial(add_residual, counts[1], False, controlnet_single_block_samples)
        x, c = self._run_blocks("single", x, c, temb, context, after, aux)

        sample = self.proj_out(self.norm_out(x, condition))
        if not return_dict:
            return (sample, aux) if output_aux else (sample,)
        return FluxMoEOutput(sample=sample, aux=aux)

    def _run_blocks(self, kind, x, c, temb, context, after, aux):
        """All blocks of one kind in order; a group's first block stands for the whole group."""
        name = KINDS[kind]
        blocks = getattr(self, name)
        mob = self.d2m_config.mob
        groups = getattr(mob, f"{kind}_groups") if mob is not None else ()
        starts = {group[0]: g for g, group in enumerate(groups)}
        index = 0
        while index < len(blocks):
            if index not in starts:
                x, c = self._run_block(f"{name}.{index}", x, c, context, aux)
                if aux is not None:
                    aux.features[f"{name}.{index}"] = (x, c)
                x = after(index, x)
                index += 1
                continue
            g = starts[index]
            x, c, routing = self.mob_routers[f"{kind}_groups"][g](
                x,
                c,
                temb,
                run=partial(self._run_place, name, index, context, x.shape[0], aux),
                after=lambda place, x, first=index: after(first + place, x),
                group=private.token_group(self),
                touch=partial(self._touch_place, name, index, context)
                if isinstance(blocks[index], FSDPModule)
                else None,
            )
            if aux is not None:
                aux.features[f"mob.{kind}.{g}"] = (x, c)
                aux.mob[f"mob.{kind}.{g}"] = routing
            index += len(groups[g])
        return x, c

    def _run_place(self, name, first, context, batch, aux, place, x, c, rows):
        part = context if rows is None else context.take(rows, batch)
        return self._run_block(f"{name}.{first + place}", x, c, part, aux)

    def _touch_place(self, name, first, context, place, x, c):
        """Zero, by way of the block: it runs on one image and one text token of one sample."""
        part = context.take(torch.zeros(1, dtype=torch.int64, device=x.device), x.shape[0])
        x, c = self._run_block(
            f"{name}.{first + place}", x[:1, :1], c[:1, :1], part.shorten(), None
        )
        return 0 * (x.sum() + c.sum()).nan_to_num(0.0, 0.0, 0.0)

    def _run_block(self, name, x, c, context, aux):
        kind, index = name.split(".")
        block = getattr(self, kind)[int(index)]
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            saved: dict[str, Any] = {}
            own = (context.condition, context.rotary, context.attention_kwargs, context.token_mask)
            out = private.checkpoint(self, block, x, c, *own, saved, aux is not None)
        else:
            out = block(
                hidden_states=x,
                encoder_hidden_states=c,
                temb=context.condition,
                image_rotary_emb=context.rotary,
                joint_attention_kwargs=context.attention_kwargs,
                token_mask=context.token_mask,
                return_routing=aux is not None,
            )
        if aux is not None:
            for key, routing in out[2].items():
                aux.routing[f"{name}.{key}" if key else name] = routing
        return out[1], out[0]

    def _own_tokens(self, mask: Tensor | None) -> Tensor | None:
        """This rank's part of a mask [B, X] under context parallelism, as the text is split."""
        group = private.token_group(self)
        if mask is None or group is None:
            return mask
        return mask.chunk(group.size(), dim=1)[group.rank()]

    def enable_cache(self, config) -> None:
        """As diffusers'; under MoB only caches that act on the model's ends are allowed."""
        check_cache(self, config)
        super().enable_cache(config)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """As diffusers', with the file and the entry by which its AutoModel finds this class."""
        entry = f"{Path(CLASS_FILE).stem}.{type(self).__name__}"
        self.register_to_config(auto_map={"AutoModel": entry})
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, CLASS_FILE).write_text(CLASS_CODE, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        return super().extract_init_dict(
            {k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs
        )

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """As diffusers', but a checkpoint that lacks tensors is refused, not filled at random; of a
        dense model, and of one that was converted and not distilled, it is said what it is."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        refuse_missing(Path(path, kwargs.get("subfolder") or ""), model, info)
        if "moe" in model.config.get("_use_default_values", ()):
            _warn_once(
                f"{path} holds a dense FLUX, and what was loaded is dense as well: "
                "d2m_models.convert_flux makes a Mixture of Experts of it (d2m convert, on disk)"
            )
        else:
            warn_of_state(path, model)
        return (model, info) if wanted else model

    @classmethod
    def from_single_file(cls, *args, **kwargs):
        raise ValueError(
            "d2m_models.checkpoints.single_file.load_single_file reads single files, of dense and "
            "of converted models; d2m convert and d2m export take them as well"
        )


# What a saved pipeline's model_index.json names. diffusers takes classes only from modules that are
# imported already: this one, unlike d2m_models.flux, is so after `import d2m_models`.
FluxMoETransformer2DModel.__module__ = "d2m_models"
