"""ktr.py, with the weights' checksum after each step written to $WATCH/weights.RANK."""

import hashlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import ktr  # noqa: E402
from run.distributed import leave  # noqa: E402
from run.options import parse  # noqa: E402


class Watched(ktr.ShardedAdamW):
    def step(self, *arguments, **more):
        super().step(*arguments, **more)
        weights = self.flat.view(torch.uint8).cpu().numpy().tobytes()
        with open(f"{os.environ['WATCH']}/weights.{self.rank}", "a") as file:
            file.write(hashlib.sha256(weights).hexdigest() + "\n")


ktr.ShardedAdamW = Watched
ktr.main(parse())
leave()
