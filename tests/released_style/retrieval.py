"""The plain two-stage retrieval of the released scripts, by calls of the model's parts."""

import torch
import torch.nn.functional as F

from models.med import BertModel


@torch.no_grad()
def score_matrices(model, loader, k_test, device):
    """Scores of images and texts, and of texts and images."""
    text = model.tokenizer(
        loader.dataset.text, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    ).to(device)
    output = model.text_encoder(text.input_ids, attention_mask=text.attention_mask, mode="text")
    text_feats = F.normalize(model.text_proj(output.last_hidden_state[:, 0, :]))
    ids = text.input_ids.clone()
    ids[:, 0] = model.tokenizer.enc_token_id

    image_embeds = torch.cat([model.visual_encoder(image.to(device)) for image, _ in loader])
    image_feats = F.normalize(model.vision_proj(image_embeds[:, 0, :]), dim=-1)
    sims = image_feats @ text_feats.t()

    def match(chosen_images, chosen_texts):
        states = image_embeds[chosen_images]
        output = model.text_encoder(
            ids[chosen_texts],
            attention_mask=text.attention_mask[chosen_texts],
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long, device=device),
            return_dict=True,
        )
        return model.itm_head(output.last_hidden_state[:, 0, :])[:, 1]

    i2t, t2i = torch.full(sims.shape, -100.0), torch.full(sims.t().shape, -100.0)
    for i, row in enumerate(sims):
        values, texts = row.topk(k_test)
        i2t[i, texts] = match([i] * k_test, texts) + values
    for i, row in enumerate(sims.t()):
        values, images = row.topk(k_test)
        t2i[i, images] = match(images, [i] * k_test) + values
    return i2t.numpy(), t2i.numpy()


def text_states(config, weights, ids):
    """What an encoder built from a BertConfig makes of texts."""
    encoder = BertModel(config=config, add_pooling_layer=False).eval()
    encoder.load_state_dict(weights)
    return encoder(ids, return_dict=True, mode="text").last_hidden_state
