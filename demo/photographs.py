"""A captioning set of the photographs in scikit-image and scikit-learn, as an example of own data.

    python -m demo.photographs --output output/photographs
    python train_caption.py --config output/photographs/caption.yaml --output_dir output/photographs/run

A data set needs the files written here: annotations, ground truth, and a config with their paths.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from files import write_json
from utils import UserError, run_command

CAPTIONS = {
    "skimage/astronaut.png": ["a smiling astronaut in an orange suit", "a woman in a space suit before a flag"],
    "skimage/camera.png": ["a man with a camera on a tripod", "a photographer on a lawn in black and white"],
    "skimage/chelsea.png": ["the face of a ginger cat", "a tabby cat looks at the camera"],
    "skimage/coffee.png": ["a cup of coffee on a saucer", "a spoon beside an espresso on a wooden table"],
    "skimage/rocket.jpg": ["a rocket on its launch pad at night", "a white rocket between two lit towers"],
    "skimage/motorcycle_left.png": ["a motorcycle parked in a garage", "a red motorcycle on a concrete floor"],
    "skimage/coins.png": ["rows of old coins", "greek coins on a dark ground"],
    "skimage/hubble_deep_field.jpg": ["galaxies in the night sky", "a telescope's view of deep space"],
    "skimage/moon.png": ["the surface of the moon", "craters on the moon in grey"],
    "skimage/horse.png": ["the silhouette of a horse", "a black horse on white ground"],
    "sklearn/china.jpg": ["a chinese temple with a large roof", "a pavilion behind trees in summer"],
    "sklearn/flower.jpg": ["a red flower with a yellow middle", "a dahlia in full bloom"],
}
CONFIG = """# Captioning of bundled photographs: an example of own data
# Command:  python train_caption.py --config {folder}/caption.yaml --output_dir {folder}/run

image_root: {folder}/images
train_file: {folder}/train.json
val_file: {folder}/val.json
test_file: {folder}/val.json
val_gt: {folder}/val_gt.json
test_gt: {folder}/val_gt.json
pretrained: ''
vit: base
image_size: 384
batch_size: 2
max_epoch: 1
num_workers: 2
"""


def write_photographs(folder: Path) -> Path:
    """Write images, annotations, ground truth and config; return the config's path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    train, val, truth = [], [], {"images": [], "annotations": []}
    for name, captions in CAPTIONS.items():
        image_id = Path(name).stem
        file = f"{image_id}.jpg"
        Image.open(bundled(name)).convert("RGB").save(folder / "images" / file, quality=92)
        train += [{"image": file, "image_id": image_id, "caption": caption} for caption in captions]
        val.append({"image": file, "image_id": image_id, "caption": captions})
        truth["images"].append({"id": image_id})
        for number, caption in enumerate(captions):
            truth["annotations"].append({"id": f"{image_id}-{number}", "image_id": image_id, "caption": caption})
    for file, content in (("train.json", train), ("val.json", val), ("val_gt.json", truth)):
        write_json(folder / file, content)
    config = folder / "caption.yaml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def bundled(name: str) -> Path:
    """Return the path of a photograph inside its package; raises UserError if one of the two packages is absent."""
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError:
        raise UserError("the photographs need two packages; pip install scikit-image scikit-learn") from None
    package, file = name.split("/")
    if package == "skimage":
        return Path(skimage.data.__file__).parent / file
    return Path(sklearn.datasets.__file__).parent / "images" / file


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/photographs", help="folder to write")
    config = write_photographs(Path(parser.parse_args().output))
    print(f"wrote {len(CAPTIONS)} photographs; train with: python train_caption.py --config {config}")


if __name__ == "__main__":
    sys.exit(run_command(main))
