"""A checkpoint whose tower and decoder weights are rounded to few bits after training (torchao), for the ablations.

    pip install torchao
    python benchmarks/round_weights.py --bits 4 runs/teacher runs/teacher-int4
    bitvla eval runs/teacher-int4 --full-precision --env metaworld --suite mt10 --episodes 50

The same layers are rounded that a ternary policy packs. Weights are symmetric integers in groups of 32 columns;
activations stay float32, so this is the mildest form of so many bits.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from bitvla.convert.training import open_start
from bitvla.model.checkpoint import load_network

GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True, help="of a weight")
    parser.add_argument("checkpoint", type=Path, help="full-precision training checkpoint")
    parser.add_argument("out", type=Path, help="folder of the rounded checkpoint")
    arguments = parser.parse_args()
    start = open_start(arguments.checkpoint)
    if start.config.precision != "full":
        parser.error(f"{arguments.checkpoint} is not a full-precision checkpoint")
    network, _ = load_network(start)
    weight = getattr(torch, f"int{arguments.bits}")
    config = IntxWeightOnlyConfig(weight_dtype=weight, granularity=PerGroup(GROUP))
    for layers in (network.vision_tower.vision_model.encoder, network.language_model.model.layers):
        quantize_(layers, config)
    weights = load_file(arguments.checkpoint / "model.safetensors")
    rounded = {name: tensor.dequantize() for name, tensor in network.state_dict().items() if ".layers." in name}
    changed = sum(not torch.equal(weights[name], tensor) for name, tensor in rounded.items())
    shutil.copytree(arguments.checkpoint, arguments.out, ignore=shutil.ignore_patterns("training_state*", "metrics*"))
    save_file({**weights, **{n: t.contiguous() for n, t in rounded.items()}}, arguments.out / "model.safetensors")
    print(f"{changed} weight matrices rounded to int{arguments.bits} in groups of {GROUP}: {arguments.out}")


if __name__ == "__main__":
    main()
