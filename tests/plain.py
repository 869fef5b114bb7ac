"""The released algorithms done plainly, on the weights of our models: what the fast ones must equal.

Each text reads its own copy of the image, projected anew in every layer for every candidate, negative and loss; all
texts are padded to one length; attention is spelt out; loops go pair by pair. The benchmarks compare with this too.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from models.losses import IGNORED

MATCH_TOKENS = 35
PRETRAIN_TOKENS = 30
FAR = -10000.0  # added to the scores of what may not be seen


# The transformers.


def attend(heads, hidden, states, bias, dropout):
    """Attention of texts (rows, length, width) to states of their own (rows, states, width)."""
    query = heads.split(heads.query(hidden))
    key, value = heads.split(heads.key(states)), heads.split(heads.value(states))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    probs = F.dropout((scores + bias).softmax(dim=-1), dropout)
    return (probs @ value).transpose(1, 2).flatten(2)


def text_states(text, ids, mask, states=None, states_mask=None, causal=False):
    """Hidden states of texts (rows, length); `states` (rows, n, width) are each text's own image or question."""
    length = ids.shape[1]
    bias = (1.0 - mask[:, None, None, :].float()) * FAR
    if causal:
        bias = bias + torch.full((length, length), FAR, device=ids.device).triu(1)
    other = 0.0 if states_mask is None else (1.0 - states_mask[:, None, None, :].float()) * FAR
    dropout = text.config.attention_probs_dropout_prob if text.training else 0.0
    hidden = text.embeddings(ids, torch.arange(length, device=ids.device))
    for layer in text.encoder.layer:
        own, cross = layer.attention, layer.crossattention
        hidden = own.output(attend(own.self, hidden, hidden, bias, dropout), hidden)
        if states is not None:
            hidden = cross.output(attend(cross.self, hidden, states, other, dropout), hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return hidden


@contextmanager
def plain_attention(vit):
    """Let the ViT spell its attention out, as timm did then."""
    fused = [block.attn.fused_attn for block in vit.blocks]
    for block in vit.blocks:
        block.attn.fused_attn = False
    yield
    for block, value in zip(vit.blocks, fused, strict=True):
        block.attn.fused_attn = value


def image_tokens(vit, image):
    """Tokens of images (batch, 1 + patches, width)."""
    with plain_attention(vit):
        return vit(image)


def tokens_of(model, texts, length, first):
    """Token ids and mask of texts, all padded to one length."""
    encoded = model.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    encoded.input_ids[:, 0] = first
    device = next(model.parameters()).device
    return encoded.input_ids.to(device), encoded.attention_mask.to(device)


def smoothed_loss(logits, labels, smooth_padding, smoothing=0.1):
    """Each position's loss (rows, length): likelihood where labelled; smoothing there, or everywhere."""
    logp = logits.float().log_softmax(dim=-1)
    labelled = (labels != IGNORED).float()
    likelihood = -logp.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1) * labelled
    smooth = -logp.mean(dim=-1) * (1.0 if smooth_padding else labelled)
    return (1 - smoothing) * likelihood, smoothing * smooth


def mean_loss(logits, labels, smooth_padding):
    """Mean language-modelling loss."""
    likelihood, smooth = smoothed_loss(logits, labels, smooth_padding)
    labelled = (labels != IGNORED).sum()
    return likelihood.sum() / labelled + smooth.sum() / (labels.numel() if smooth_padding else labelled)


# Captioning.


def caption_loss(model, image, captions):
    """The captioner's loss."""
    text = model.tokenizer(captions, padding="longest", truncation=True, max_length=40, return_tensors="pt")
    ids, mask = text.input_ids.to(image.device), text.attention_mask.to(image.device)
    ids[:, 0] = model.tokenizer.bos_token_id
    labels = ids.masked_fill(ids == model.tokenizer.pad_token_id, IGNORED)
    labels[:, : model.prompt_length] = IGNORED
    states = image_tokens(model.visual_encoder, image)
    hidden = text_states(model.text_decoder.bert, ids, mask, states, causal=True)
    return mean_loss(model.text_decoder.logits(hidden)[:, :-1], labels[:, 1:], model.smooth_padding)


# Matching and retrieval.


def match_logits(model, states, ids, mask):
    """Match logits of images' tokens (rows, n, width) and texts (rows, length), row by row."""
    return model.itm_head(text_states(model.text_encoder, ids, mask, states)[:, 0])[:, 1]


def image_scores(model, states, feat, text_ids, text_mask, text_feat, k):
    """One image's row of image-to-text scores."""
    similarity, best = (feat @ text_feat.T).topk(k)
    logits = match_logits(model, states.expand(k, -1, -1), text_ids[best], text_mask[best])
    row = torch.full((len(text_ids),), -100.0, device=feat.device)
    return row.scatter(0, best, logits + similarity)


def text_scores(model, text_ids, text_mask, feat, states, image_feat, k):
    """One text's row of text-to-image scores."""
    similarity, best = (feat @ image_feat.T).topk(k)
    logits = match_logits(model, states[best], text_ids.expand(k, -1), text_mask.expand(k, -1))
    row = torch.full((len(states),), -100.0, device=feat.device)
    return row.scatter(0, best, logits + similarity)


@torch.no_grad()
def encode_collection(model, images, texts):
    """Tokens and features of all images and texts."""
    ids, mask = tokens_of(model, texts, MATCH_TOKENS, model.tokenizer.cls_token_id)
    text_feat = F.normalize(model.text_proj(text_states(model.text_encoder, ids, mask)[:, 0]), dim=-1)
    states = image_tokens(model.visual_encoder, images)
    image_feat = F.normalize(model.vision_proj(states[:, 0]), dim=-1)
    ids = ids.clone()
    ids[:, 0] = model.tokenizer.enc_token_id
    return states, image_feat, ids, mask, text_feat


@torch.no_grad()
def retrieval_scores(model, images, texts, k):
    """Both score matrices."""
    states, image_feat, ids, mask, text_feat = encode_collection(model, images, texts)
    to_texts = [
        image_scores(model, states[i : i + 1], image_feat[i], ids, mask, text_feat, k) for i in range(len(images))
    ]
    to_images = [
        text_scores(model, ids[t : t + 1], mask[t : t + 1], text_feat[t], states, image_feat, k)
        for t in range(len(texts))
    ]
    return torch.stack(to_texts), torch.stack(to_images)


# VQA.


@torch.no_grad()
def rank_answers(model, question_states, question_mask, answer_ids, answer_mask, k):
    """Best candidate of each question, and the losses (questions, k) of the candidates looked at."""
    batch, decoder = len(question_states), model.text_decoder
    start = answer_ids[:1, :1].expand(batch, 1)
    hidden = text_states(decoder.bert, start, torch.ones_like(start), question_states, question_mask, causal=True)
    first = decoder.logits(hidden)[:, 0].softmax(dim=1).index_select(1, answer_ids[:, 1])
    best = first.topk(k, dim=1).indices
    ids, mask = answer_ids[best].flatten(0, 1), answer_mask[best].flatten(0, 1)
    states, states_mask = (x.repeat_interleave(k, dim=0) for x in (question_states, question_mask))
    logits = decoder.logits(text_states(decoder.bert, ids, mask, states, states_mask, causal=True))
    labels = ids.masked_fill(ids == model.tokenizer.pad_token_id, IGNORED)
    likelihood, smooth = smoothed_loss(logits[:, :-1], labels[:, 1:], model.smooth_padding)
    losses = (likelihood + smooth).sum(dim=1).view(batch, k)
    return best.gather(1, losses.argmin(dim=1, keepdim=True)).squeeze(1), losses


# Pretraining.


def draw_one_by_one(weights):
    """Draw an index a row."""
    return torch.stack([torch.multinomial(row, 1).squeeze() for row in weights])


def pretraining_losses(model, image, captions, alpha, draw=draw_one_by_one):
    """Return the ITC, ITM and LM losses of pairs; update the momentum encoders and the queues."""
    with torch.no_grad():
        model.temp.clamp_(0.001, 0.5)
    tokenizer, batch = model.tokenizer, len(image)
    ids, mask = tokens_of(model, captions, PRETRAIN_TOKENS, tokenizer.cls_token_id)
    states = image_tokens(model.visual_encoder, image)
    image_feat = F.normalize(model.vision_proj(states[:, 0]), dim=-1)
    text_feat = F.normalize(model.text_proj(text_states(model.text_encoder, ids, mask)[:, 0]), dim=-1)
    with torch.no_grad():
        move_momentum_encoders(model)
        image_m = F.normalize(model.vision_proj_m(image_tokens(model.visual_encoder_m, image)[:, 0]), dim=-1)
        text_m = F.normalize(model.text_proj_m(text_states(model.text_encoder_m, ids, mask)[:, 0]), dim=-1)
        images = torch.cat((image_m.T, model.image_queue.clone()), dim=1)
        texts = torch.cat((text_m.T, model.text_queue.clone()), dim=1)
        hard = torch.eye(batch, images.shape[1], device=image.device)
        soft_i2t = alpha * (image_m @ texts / model.temp).softmax(dim=1) + (1 - alpha) * hard
        soft_t2i = alpha * (text_m @ images / model.temp).softmax(dim=1) + (1 - alpha) * hard
    i2t, t2i = image_feat @ texts / model.temp, text_feat @ images / model.temp
    loss_itc = -(i2t.log_softmax(1) * soft_i2t).sum(1).mean() / 2 - (t2i.log_softmax(1) * soft_t2i).sum(1).mean() / 2
    enqueue(model, image_m, text_m)

    ids = ids.clone()
    ids[:, 0] = tokenizer.enc_token_id
    with torch.no_grad():
        weights_i2t = (i2t[:, :batch].softmax(dim=1) + 1e-4).fill_diagonal_(0)
        weights_t2i = (t2i[:, :batch].softmax(dim=1) + 1e-4).fill_diagonal_(0)
        other_image, other_text = draw(weights_t2i), draw(weights_i2t)
    positive = text_states(model.text_encoder, ids, mask, states)[:, 0]
    negative = text_states(
        model.text_encoder,
        torch.cat((ids, ids[other_text])),
        torch.cat((mask, mask[other_text])),
        torch.cat((states[other_image], states)),
    )[:, 0]
    labels = torch.tensor([1] * batch + [0] * 2 * batch, device=image.device)
    loss_itm = F.cross_entropy(model.itm_head(torch.cat((positive, negative))), labels)

    ids = ids.clone()
    ids[:, 0] = tokenizer.bos_token_id
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)
    hidden = text_states(model.text_decoder.bert, ids, mask, states, causal=True)
    logits = model.text_decoder.logits(hidden)[:, :-1]
    return loss_itc, loss_itm, mean_loss(logits, labels[:, 1:], model.smooth_padding)


def move_momentum_encoders(model):
    """Move the momentum encoders, parameter by parameter."""
    for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
        pairs = zip(getattr(model, name).parameters(), getattr(model, name + "_m").parameters(), strict=True)
        for parameter, momentum in pairs:
            momentum.data = momentum.data * model.momentum + parameter.data * (1 - model.momentum)


def enqueue(model, image_feat, text_feat):
    """Write features over the queues' oldest."""
    start, batch = int(model.queue_ptr), len(image_feat)
    model.image_queue[:, start : start + batch] = image_feat.T
    model.text_queue[:, start : start + batch] = text_feat.T
    model.queue_ptr[0] = (start + batch) % model.queue_size
