"""DAPO (Yu et al. 2025, arXiv 2503.14476): upper clip 0.28, the batch's tokens share one divisor,
groups all right or all wrong are left out of the loss, as are cut completions; no KL.

Left out: such groups are dropped, not replaced by others; completions near the limit earn no less.
With one update a rollout the clip never binds: see --updates.
"""

OPTIONS = "--signals all --normalize tokens --clip_high 0.28 --filter accuracy --mask_cut --beta 0"
