"""ktr.py with rewards that differ (the short clips are noise, and all answers wrong), so that every
step moves the weights; their checksum after each step goes to $WATCH/weights.RANK, where asked."""

import hashlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import ktr  # noqa: E402
from run import training  # noqa: E402
from run.arguments import parse  # noqa: E402
from run.distributed import exit_process  # noqa: E402


class Watched(training.ShardedAdamW):
    def step(self, *arguments, **more):
        super().step(*arguments, **more)
        if folder := os.environ.get("WATCH"):
            weights = self.flat.view(torch.uint8).cpu().numpy().tobytes()
            with open(f"{folder}/weights.{self.rank}", "a") as file:
                file.write(hashlib.sha256(weights).hexdigest() + "\n")


training.ShardedAdamW = Watched
ktr.accuracy_reward = lambda text, *_: sum(text.encode()) % 97 / 97
ktr.main(parse())
exit_process()
