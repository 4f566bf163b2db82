"""Judge models: CLIP, detectors, question answering, loaded from a local folder or the hub.

A judge is "FOLDER", "hub/name" or "hub/name@revision"; `Judges.used` says which one scored. What
transformers preprocesses is preprocessed by transformers' own processor of that judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.evaluate.generate import image_path
from distill.evaluate.prompts import Prompt


@dataclass(frozen=True)
class Item:
    """An image to judge; other: the teacher's folder, whose image has the same key."""

    key: str
    prompt: Prompt
    folder: Path
    other: Path | None = None

    def open(self, folder: Path | None = None) -> Any:
        """The image as a PIL image in RGB."""
        from PIL import Image

        return Image.open(image_path(folder or self.folder, self.key)).convert("RGB")

    def broken(self) -> Path | None:
        """The path of its image, or the teacher's, that cannot be read."""
        from PIL import Image

        for folder in filter(None, (self.folder, self.other)):
            path = image_path(folder, self.key)
            try:
                with Image.open(path) as image:
                    image.verify()
            except (OSError, SyntaxError, ValueError):
                return path
        return None


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass
class Judges:
    """The judges of one metric.

    metric: its name. names: role -> judge, the published default unless the user gave another;
    None: none, the role is left out. used: role -> what was loaded.
    """

    metric: str
    names: dict[str, str | None]
    device: torch.device = torch.device("cpu")
    used: dict[str, dict[str, Any]] = field(default_factory=dict)

    def open(self, role: str, make: Callable[[str], Any]) -> Any:
        """make(judge of this role), or None where there is none; errors say what to do.

        Raises:
            UserError: it cannot be loaded.
        """
        name = self.names.get(role)
        if name is None:
            return None
        try:
            judge = make(name)
        except UserError:
            raise
        except ModuleNotFoundError as err:
            raise UserError(
                f"{self.metric}: the package {err.name!r} is missing; pip install "
                "'dense2moe[evaluate]' brings it"
            ) from err
        except Exception as err:  # transformers, safetensors and the hub's client raise many kinds
            reason = " ".join(str(err).split())[:200]
            raise UserError(
                f"{self.metric}: cannot load the judge {name!r} ({type(err).__name__}: {reason}); "
                f"let the hub be reached, or say --judge {self.metric}.{role}=FOLDER"
            ) from err
        model = getattr(judge, "model", None)
        self.used[role] = {
            "judge": name,
            **(identity(model) if isinstance(model, nn.Module) else {}),
        }
        return judge

    def need(self, role: str, make: Callable[[str], Any]) -> Any:
        """`open` of a role without which there is no score."""
        judge = self.open(role, make)
        if judge is None:
            raise UserError(f"{self.metric}: give the judge with --judge {self.metric}.{role}=NAME")
        return judge

    def clip(self, name: str) -> Clip | OpenClip:
        kind = OpenClip if name.startswith("open_clip:") else Clip
        return kind(name.removeprefix("open_clip:"), self.device)

    def detector(self, name: str) -> Detector:
        return Detector(name, self.device)

    def chat(self, name: str) -> Chat:
        return Chat(name, self.device)

    def answers(self, name: str) -> Blip | Chat:
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(**place(name)).model_type
        return (Blip if kind == "blip" else Chat)(name, self.device)


def place(name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for "NAME" or "NAME@REVISION"."""
    repository, _, revision = name.partition("@")
    return {"pretrained_model_name_or_path": repository, "revision": revision or "main"}


def identity(model: nn.Module) -> dict[str, Any]:
    """The hub's revision, if it came from there, and a hash of the weights (the first 64 values of
    every tensor), which tells judges in local folders apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:64].double().cpu().numpy().tobytes())
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return {"revision": revision, "weights": digest.hexdigest()[:12]}


def pooled(output: Any) -> Tensor:
    """Features of transformers 4 (a tensor) and 5 (an output with a pooler)."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if found is None else found


class Clip:
    """transformers' CLIP and its like, or an image model alone (DINOv2) for `images`."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(**place(name)).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(**place(name))
        has_text = hasattr(self.model, "get_text_features")
        self.tokenizer = AutoTokenizer.from_pretrained(**place(name)) if has_text else None
        self.device = device

    @torch.no_grad()
    def images(self, images: Sequence[Any]) -> Tensor:
        """Features [n, d] on the CPU, not normalised."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        run = getattr(self.model, "get_image_features", self.model)
        return pooled(run(**inputs)).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding="max_length", truncation=True,
                                max_length=length, return_tensors="pt").to(self.device)  # fmt: skip
        return pooled(self.model.get_text_features(**inputs)).float().cpu()


class OpenClip:
    """open_clip's models: "ViT-B-32/openai", "hf-hub:NAME" or "local-dir:FOLDER"."""

    def __init__(self, name: str, device: torch.device):
        import open_clip

        arch, pretrained = name, None
        if not name.startswith(("hf-hub:", "local-dir:")):
            arch, _, pretrained = name.partition("/")
        self.model, self.transform = open_clip.create_model_from_pretrained(arch, pretrained)
        self.model.eval().to(device)
        self.tokenizer, self.device = open_clip.get_tokenizer(arch), device

    @torch.no_grad()
    def images(self, images: Sequence[Any]) -> Tensor:
        pixels = torch.stack([self.transform(image) for image in images])
        return self.model.encode_image(pixels.to(self.device)).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float().cpu()


@dataclass(frozen=True)
class Detection:
    """label, score, box (x0, y0, x1, y1) in pixels, mask: bool [H, W] or None."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = None


class Detector:
    """Mask2Former, DETR and their like with the labels they know; OWL and Grounding DINO look for
    the names they are given."""

    def __init__(self, name: str, device: torch.device):
        import transformers

        kind = transformers.AutoConfig.from_pretrained(**place(name)).model_type
        self.masks = kind in ("mask2former", "maskformer", "oneformer")
        self.asks = kind.startswith(("owl", "grounding", "mm-grounding", "omdet"))
        auto = ("AutoModelForUniversalSegmentation" if self.masks else
                "AutoModelForZeroShotObjectDetection" if self.asks else
                "AutoModelForObjectDetection")  # fmt: skip
        reader = "AutoProcessor" if self.asks else "AutoImageProcessor"
        self.model = getattr(transformers, auto).from_pretrained(**place(name)).eval().to(device)
        self.processor = getattr(transformers, reader).from_pretrained(**place(name))
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Any, names: Sequence[str], threshold: float) -> list[Detection]:
        """What is seen with a score above the threshold, surest first."""
        size = [(image.height, image.width)]
        text = {"text": [list(names)]} if self.asks else {}
        inputs = self.processor(images=image, return_tensors="pt", **text).to(self.device)
        outputs = self.model(**inputs)
        if self.masks:
            found = self.processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=size, return_binary_maps=True
            )[0]
            labels = self.model.config.id2label
            seen = [
                _masked(labels[info["label_id"]], info["score"], found["segmentation"][i].bool())
                for i, info in enumerate(found["segments_info"])
            ]  # fmt: skip
        elif self.asks:
            post = self.processor.post_process_grounded_object_detection
            found = post(outputs, threshold=threshold, target_sizes=size, text_labels=[list(names)])
            seen = _boxes(found[0], found[0]["text_labels"])
        else:
            post = self.processor.post_process_object_detection
            found = post(outputs, threshold=threshold, target_sizes=size)[0]
            seen = _boxes(found, [self.model.config.id2label[int(i)] for i in found["labels"]])
        return sorted((d for d in seen if d.score > threshold), key=lambda d: -d.score)


def _masked(label: str, score: float, mask: Tensor) -> Detection:
    """The box around a mask, its far edge outside as COCO's."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return Detection(label, float(score), tuple(float(x) for x in box), mask.cpu().numpy())


def _boxes(found: Any, labels: Sequence[str]) -> list[Detection]:
    rows = zip(labels, found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    return [Detection(label, score, tuple(box)) for label, score, box in rows]


class Blip:
    """BLIP-VQA. A question starts with [ENC], the last of its vocabulary, as in BLIP's own code,
    and an answer with [DEC], its bos."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoProcessor, BlipForQuestionAnswering

        self.model = BlipForQuestionAnswering.from_pretrained(**place(name)).eval().to(device)
        self.processor = AutoProcessor.from_pretrained(**place(name))
        self.device = device

    def _inputs(self, image: Any, question: str) -> Any:
        inputs = self.processor(images=image, text=question, truncation=True, max_length=35,
                                return_tensors="pt").to(self.device)  # fmt: skip
        inputs["input_ids"][:, 0] = self.model.config.text_config.vocab_size - 1
        return inputs

    @torch.no_grad()
    def answer(self, image: Any, question: str) -> str:
        ids = self.model.generate(**self._inputs(image, question), max_new_tokens=10)
        return self.processor.decode(ids[0], skip_special_tokens=True).strip().lower()

    @torch.no_grad()
    def yes(self, image: Any, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the answer's first token."""
        inputs = self._inputs(image, question)
        seen = self.model.vision_model(inputs["pixel_values"]).last_hidden_state
        mask = inputs["attention_mask"]
        asked = self.model.text_encoder(inputs["input_ids"], attention_mask=mask,
                                        encoder_hidden_states=seen).last_hidden_state  # fmt: skip
        start = torch.full((1, 1), self.model.config.text_config.bos_token_id, device=self.device)
        logits = self.model.text_decoder(start, encoder_hidden_states=asked,
                                         encoder_attention_mask=mask).logits[0, 0]  # fmt: skip
        ids = self.processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
        return float(logits[ids].float().softmax(0)[0])


class Chat:
    """A vision-language model of transformers (Qwen2-VL, LLaVA, ...), by its chat template."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        self.model = load(**place(name), dtype="auto").eval().to(device)
        self.processor = AutoProcessor.from_pretrained(**place(name))
        self.device = device

    @torch.no_grad()
    def talk(self, image: Any, turns: Sequence[str], length: int = 512) -> str:
        """The reply to `turns`: questions and earlier replies in turn, the image before them."""
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": turn}]}
            for i, turn in enumerate(turns)
        ]
        messages[0]["content"].insert(0, {"type": "image"})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=[image], text=[text], return_tensors="pt").to(self.device)
        ids = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :],
                                     skip_special_tokens=True).strip()  # fmt: skip

    def answer(self, image: Any, question: str) -> str:
        reply = self.talk(image, [f"{question} Answer yes or no."], 8).lower()
        return "yes" if reply.startswith("yes") else reply

    def yes(self, image: Any, question: str) -> float:
        return float(self.answer(image, question) == "yes")
