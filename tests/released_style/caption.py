"""A captioning script in the style of the released ones: own loop, tuples, schedules and result files."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

import utils
from data import create_dataset, create_loader, create_sampler
from data.utils import coco_caption_eval, save_result
from models.blip import blip_decoder

parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--output_dir")
parser.add_argument("--device", default="cuda")
parser.add_argument("--dist_url", default="env://")
parser.add_argument("--distributed", default=True, type=bool)
args = parser.parse_args()
config = json.loads(Path(args.config).read_text(encoding="utf-8"))

utils.init_distributed_mode(args)
device = torch.device(args.device)
torch.manual_seed(utils.get_rank())
datasets = create_dataset("caption_coco", config)
samplers = [None, None, None]
if args.distributed:
    samplers = create_sampler(datasets, [True, False, False], utils.get_world_size(), utils.get_rank())
train_loader, val_loader, _ = create_loader(
    datasets, samplers, [config["batch_size"]] * 3, [0] * 3, [True, False, False], [None] * 3
)
model = blip_decoder(
    pretrained=config["pretrained"], med_config=config["med_config"], image_size=config["image_size"],
    vit=config["vit"], prompt=config["prompt"],
)  # fmt: skip
model = alone = model.to(device)
if args.distributed:
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[args.gpu])
    alone = model.module
optimizer = torch.optim.AdamW(model.parameters(), lr=config["init_lr"], weight_decay=config["weight_decay"])

for epoch in range(config["max_epoch"]):
    if args.distributed:
        train_loader.sampler.set_epoch(epoch)
    utils.cosine_lr_schedule(optimizer, epoch, config["max_epoch"], config["init_lr"], config["min_lr"])
    model.train()
    meters = utils.MetricLogger(delimiter="  ")
    meters.add_meter("loss", utils.SmoothedValue(window_size=1, fmt="{value:.4f}"))
    for image, caption, _ in meters.log_every(train_loader, 2, f"epoch [{epoch}]"):
        loss = model(image.to(device), caption)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        meters.update(loss=loss.item())
    meters.synchronize_between_processes()
    print("averaged:", meters.global_avg())
    dist.barrier()

model.eval()
rows = []
for image, image_id in val_loader:
    captions = alone.generate(image.to(device), sample=False, num_beams=3, max_length=12, min_length=5)
    rows += [{"image_id": i.item(), "caption": text} for text, i in zip(captions, image_id, strict=True)]
file = save_result(rows, args.output_dir, "val", remove_duplicate="image_id")
if utils.is_main_process():
    scores = coco_caption_eval(config["coco_gt_root"], file, "val").eval
    print("scores:", json.dumps({"loss": meters.loss.global_avg, "CIDEr": scores["CIDEr"]}))
