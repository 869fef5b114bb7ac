"""LAVIS's BLIP models: `load_model_and_preprocess`, models that take dictionaries of samples, processors, Grad-CAM.

Parameters have LAVIS's names, which are the released ones. Losses leave padding out of label smoothing, as LAVIS's do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from data.text import pre_caption, pre_question
from data.transforms import test_transform, train_transform
from inference.explain import recorded
from models.architecture import settings_of
from models.blip import BLIP_Base, BLIP_Decoder
from models.blip_classification import BLIP_Classification
from models.blip_itm import BLIP_ITM
from models.blip_nlvr import BLIP_NLVR
from models.blip_pretrain import BLIP_Pretrain
from models.blip_retrieval import BLIP_Retrieval
from models.blip_vqa import BLIP_VQA, MAX_QUESTION_TOKENS
from models.generation import GenerationConfig
from models.momentum import INITIAL_TEMPERATURE
from models.pretrained import load_pretrained
from models.tokenizer import tokenize
from utils import UserError

Samples = dict[str, Any]
Processors = dict[str, Callable]
RAMP_EPOCHS = 2  # epochs over which the momentum model's share of the targets grows


class Output(dict):
    """Results by key and by attribute; attributes that are absent are None."""

    __getattr__ = dict.get


class Lavis:
    """What LAVIS's models have in common."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def predict(self, samples: Samples) -> Output:
        """Classify samples: "predictions", logits (batch, classes), and "targets"."""
        return self(samples, is_train=False)


class BlipCaption(Lavis, BLIP_Decoder):
    """The captioner."""

    def forward(self, samples: Samples) -> Output:
        """Return the loss of texts that begin with the prompt."""
        loss = super().forward(samples["image"], samples["text_input"])
        return Output(loss=loss, loss_lm=loss)

    def generate(
        self,
        samples: Samples,
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        num_captions: int = 1,
    ) -> list[str]:
        """Caption images, each `num_captions` times; the captions of an image are adjacent."""
        image = samples["image"].repeat_interleave(num_captions, dim=0)
        return super().generate(
            image, use_nucleus_sampling, num_beams, max_length, min_length, top_p, repetition_penalty
        )


class BlipVQA(Lavis, BLIP_VQA):
    """The VQA model."""

    def forward(self, samples: Samples) -> Output:
        """Return the loss of the weighted answers."""
        names = ("image", "text_input", "answer", "n_answers", "weight")
        return Output(loss=super().forward(*(samples[name] for name in names)))

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Samples,
        num_beams: int = 3,
        inference_method: str = "rank",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        **_: Any,
    ) -> list[str]:
        """Answer questions, by ranking `answer_list` or by generation; `prompt` has a place {} for the question."""
        image, questions = samples["image"], samples["text_input"]
        questions = [questions] if isinstance(questions, str) else questions
        questions = [prompt.format(text) for text in questions] if prompt else questions
        text = tokenize(self.tokenizer, questions, "enc", MAX_QUESTION_TOKENS, image.device)
        states = self.question_states(image, text)
        if inference_method == "generate":
            return self.generate_answers(states, config=GenerationConfig(max_len, min_len, num_beams))[0]
        if inference_method != "rank" or not answer_list:
            raise UserError(f"inference_method is {inference_method!r}; expected 'generate', or 'rank' and answer_list")
        answers = tokenize(self.tokenizer, answer_list, "dec", device=image.device)
        best = self.rank_answer(states, text.attention_mask, *answers, num_ans_candidates)
        return [answer_list[i] for i in best.tolist()]


class BlipITM(Lavis, BLIP_ITM):
    """The matching model; its matching head reads [ENC]."""

    def forward(self, samples: Samples, match_head: str = "itm") -> torch.Tensor:
        """Return logits of no match and match (batch, 2), or for "itc" cosines (images, texts)."""
        return super().forward(samples["image"], samples["text_input"], match_head)


class BlipFeatureExtractor(Lavis, BLIP_Base):
    """Features of images and texts, and their projections, of unit length for every token."""

    def __init__(self, embed_dim: int = 256, **settings: Any):
        super().__init__(**settings)
        self.vision_proj = nn.Linear(self.visual_encoder.embed_dim, embed_dim)
        self.text_proj = nn.Linear(self.text_encoder.config.hidden_size, embed_dim)
        self.temp = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))

    @torch.no_grad()
    def extract_features(self, samples: Samples, mode: str = "multimodal") -> Output:
        """Return `image_embeds` and `image_embeds_proj`, `text_embeds` and `text_embeds_proj`, or for "multimodal"
        `image_embeds` and `multimodal_embeds`; samples need what the mode reads.
        """
        image, text = samples.get("image"), samples.get("text_input")
        if mode == "text":
            embeds = self.text_encoder(*tokenize(self.tokenizer, text, device=self.device))
            return Output(text_embeds=embeds, text_embeds_proj=F.normalize(self.text_proj(embeds), dim=-1))
        image_embeds = self(image, text, "image")
        if mode == "image":
            projected = F.normalize(self.vision_proj(image_embeds), dim=-1)
            return Output(image_embeds=image_embeds, image_embeds_proj=projected)
        return Output(image_embeds=image_embeds, multimodal_embeds=self(image, text, mode))


class Classifier(Lavis):
    """Loss and predictions of a classifier."""

    def forward(self, samples: Samples, is_train: bool = True) -> Output:
        """Return the loss and the logits, or predictions and targets."""
        targets, logits = samples["label"], self.logits(samples)
        if not is_train:
            return Output(predictions=logits, targets=targets)
        return Output(loss=F.cross_entropy(logits, targets), logits=logits)


class BlipNLVR(Classifier, BLIP_NLVR):
    """The NLVR2 model."""

    def logits(self, samples: Samples) -> torch.Tensor:
        """Judge statements about "image0" and "image1"."""
        images = torch.cat((samples["image0"], samples["image1"]))
        return BLIP_NLVR.forward(self, images, samples["text_input"], samples["label"], train=False)


class BlipClassification(Classifier, BLIP_Classification):
    """The classifier of an image and a text; without momentum distillation."""

    def logits(self, samples: Samples) -> torch.Tensor:
        """Classify pairs."""
        return BLIP_Classification.forward(self, samples["image"], samples["text_input"], train=False)


class Contrastive(Lavis):
    """Training by contrast with momentum targets, whose share grows over two epochs."""

    max_alpha = 0.4

    def forward(self, samples: Samples) -> Output:
        """Return the losses; "image_id", which retrieval reads, is equal for pairs of one image."""
        done = samples["epoch"] + samples["iters"] / samples["num_iters_per_epoch"]
        alpha = self.max_alpha * min(1.0, done / RAMP_EPOCHS)
        own = (samples["image_id"],) if isinstance(self, BLIP_Retrieval) else ()
        losses = super().forward(samples["image"], samples["text_input"], alpha, *own)
        return Output(loss=sum(losses), **dict(zip(("loss_itc", "loss_itm", "loss_lm"), losses, strict=False)))


class BlipRetrieval(Contrastive, BLIP_Retrieval):
    """The retrieval model in training."""


class BlipPretrain(Contrastive, BLIP_Pretrain):
    """The pretraining model."""


# Loading.

ADDRESS = "https://storage.googleapis.com/sfr-vision-language-research/"
UNPADDED = {"smooth_padding": False}
MODELS = {  # class, task of its checkpoints, further settings, side of its images, processor of its texts
    "blip_caption": (BlipCaption, "caption", UNPADDED, 384, "blip_caption"),
    "blip_vqa": (BlipVQA, "vqa", UNPADDED, 480, "blip_question"),
    "blip_feature_extractor": (BlipFeatureExtractor, "features", {}, 224, "blip_caption"),
    "blip_image_text_matching": (BlipITM, "itm", {"first_token": "enc"}, 384, "blip_caption"),
    "blip_retrieval": (BlipRetrieval, "retrieval", {}, 384, "blip_caption"),
    "blip_nlvr": (BlipNLVR, "nlvr", {}, 384, "blip_caption"),
    "blip_classification": (BlipClassification, "classification", {"first_token": "cls"}, 384, "blip_caption"),
    "blip_pretrain": (BlipPretrain, "pretrain", UNPADDED, 224, "blip_caption"),
}
ZOO = {
    ("blip_caption", "base_coco"): "LAVIS/models/BLIP/blip_coco_caption_base.pth",
    ("blip_caption", "large_coco"): "BLIP/models/model_large_caption.pth",
    ("blip_vqa", "vqav2"): "BLIP/models/model_base_vqa_capfilt_large.pth",
    ("blip_vqa", "okvqa"): "LAVIS/models/BLIP/blip_okvqa.pth",
    ("blip_vqa", "aokvqa"): "LAVIS/models/BLIP/blip_aokvqa.pth",
    ("blip_feature_extractor", "base"): "BLIP/models/model_base_capfilt_large.pth",
    ("blip_image_text_matching", "base"): "BLIP/models/model_base_retrieval_coco.pth",
    ("blip_image_text_matching", "large"): "BLIP/models/model_large_retrieval_coco.pth",
    ("blip_retrieval", "coco"): "LAVIS/models/BLIP/blip_coco_retrieval.pth",
    ("blip_retrieval", "flickr"): "LAVIS/models/BLIP/blip_flickr_retrieval.pth",
    ("blip_nlvr", "nlvr"): "BLIP/models/model_base_nlvr.pth",
    ("blip_classification", "base"): "BLIP/models/model_base_capfilt_large.pth",
    ("blip_pretrain", "base"): "BLIP/models/model_base_capfilt_large.pth",
}


def load_model(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | None = None,
    **settings: Any,
) -> nn.Module:
    """Load a model by its name and type in LAVIS, in eval mode with `is_eval`; UserError for unknown ones.

    The sizes are those of `checkpoint`, a path, URL or `hf:owner/name` instead of the zoo's weights. `settings` are
    further arguments of the model, such as `num_classes`.
    """
    if (name, model_type) not in ZOO:
        known = ", ".join(f"{name} {kind}" for name, kind in ZOO)
        raise UserError(f"model {name} {model_type} is not known; expected one of {known}")
    kind, task, options, image_size, _ = MODELS[name]
    source = checkpoint or ADDRESS + ZOO[name, model_type]
    found, config = settings_of(source)
    if not checkpoint:
        found["image_size"] = image_size
    if name not in ("blip_feature_extractor", "blip_image_text_matching", "blip_retrieval", "blip_pretrain"):
        found.pop("embed_dim", None)
    if name == "blip_caption" and "prompt" in config:
        found["prompt"] = config["prompt"]
    model = load_pretrained(kind(**found | options | settings), source, task)
    return model.to(device).train(not is_eval)


def load_model_and_preprocess(
    name: str, model_type: str, is_eval: bool = False, device: str | torch.device = "cpu", **settings: Any
) -> tuple[nn.Module, Processors, Processors]:
    """Return a model, and its processors of images and of texts, each {"train", "eval"}; arguments as `load_model`."""
    model = load_model(name, model_type, is_eval, device, **settings)
    image_size = model.visual_encoder.patch_embed.img_size[0]
    text = MODELS[name][4]
    prompt = {"prompt": model.prompt} if name == "blip_caption" else {}
    images = {split: load_processor(f"blip_image_{split}", image_size=image_size) for split in ("train", "eval")}
    return model, images, {"train": load_processor(text, **prompt), "eval": load_processor(text)}


PROCESSORS: dict[str, Callable[..., Callable]] = {
    "blip_image_train": lambda image_size=384, min_scale=0.5: train_transform(image_size, min_scale),
    "blip_image_eval": lambda image_size=384: test_transform(image_size),
    "blip_caption": lambda prompt="", max_words=50: lambda text: prompt + pre_caption(text, max_words),
    "blip_question": lambda max_words=50: partial(pre_question, max_ques_words=max_words),
}


def load_processor(name: str, **settings: Any) -> Callable:
    """Return a processor by its name in LAVIS; `settings` are its settings there, such as `image_size`."""
    if name not in PROCESSORS:
        raise UserError(f"processor {name!r} is not known; expected one of {', '.join(PROCESSORS)}")
    return PROCESSORS[name](**settings)


def compute_gradcam(
    model: BlipITM, visual_input: torch.Tensor, text_input: Sequence[str], tokenized_text: Any, block_num: int = 6
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Explain matches by attention, of layer `block_num`, times its positive gradient, averaged over heads.

    Returns:
        For each image maps (2 + length - 1, grid, grid): of [ENC], the mean over the words, and one for each token
        after [ENC]; and the logits (batch, 2).
    """
    with torch.enable_grad(), recorded(model.text_encoder, block_num) as recording:
        logits = model({"image": visual_input, "text_input": text_input})
    attention = recording[0]
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention)
    mask = tokenized_text.attention_mask.to(attention.device)
    maps = (attention * gradient.clamp_min(0)).detach()[..., 1:].mean(dim=1) * mask[..., None]
    side = round(maps.shape[-1] ** 0.5)
    maps = maps.unflatten(-1, (side, side)).cpu()
    lengths = (mask.sum(dim=1) - 2).tolist()
    means = [rows[1 : 1 + length].sum(dim=0, keepdim=True) / length for rows, length in zip(maps, lengths, strict=True)]
    return [torch.cat((rows[:1], mean, rows[1:])) for rows, mean in zip(maps, means, strict=True)], logits
