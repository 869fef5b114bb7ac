"""The rows of the table."""

from functools import partial

from benchmarks.case import Row
from benchmarks.inference_rows import answer_ranking, captioning, image_encoder, reranking, retrieval_evaluation
from benchmarks.training_rows import captioning_step, pretraining_step

NO_GOAL = (0.0, 0.0)  # of a row that this kind of processor does not have
_masked, _padded = (partial(answer_ranking, smooth_padding=padding) for padding in (False, True))
ROWS = {
    "captioning": Row("captioning 2 images, beam 3, 20 tokens", captioning, ((1.6, 1.9), (2.75, 3.2)), 1.3, 5),
    "image_encoder": Row("image encoder, 4 images", image_encoder, ((1.0, 1.0), (1.0, 1.0)), 1.3, 5),
    "reranking": Row("re-ranking one image against 32 texts", reranking, ((6, 7), (11, 13)), 1.3),
    "retrieval": Row(
        "retrieval evaluation, a hundredth of 500 x 2,500, k 64, small", retrieval_evaluation, ((10, 11), (12, 16)), 1.4
    ),
    "vqa": Row("VQA ranking without the ViT", _masked, ((6.5, 8), (12, 16)), 1.8),
    "vqa_padding": Row("the same, smooth_padding", _padded, ((1.8, 2.1), (3.1, 3.4)), 1.25),
    "pretraining": Row("pretraining step, 8 pairs", pretraining_step, ((1.9, 2.1), (2.9, 3.5)), 1.35),
    "captioning_step": Row("captioning step, 4 images", captioning_step, ((1.1, 1.2), (1.7, 2.1)), 1.3),
    "captioning_bf16": Row("captioning in bfloat16", partial(captioning, amp=True), (NO_GOAL, (2, 3)), 1.8, 5, True),
    "pretraining_bf16": Row(
        "pretraining step in bfloat16", partial(pretraining_step, amp=True), (NO_GOAL, (2, 2.5)), 1.8, amp=True
    ),
}
