"""Beyond the 80/20 rule (Wang et al. 2025, arXiv 2506.01939): DAPO on the 20% of tokens with the
highest entropy.

    J = 1 / sum_i |o_i|  sum_t [H_t is in the top 20%] min(rho A, clip(rho) A)
The paper ranks a batch's tokens, this a group's; the divisor counts all tokens, as in dapo.py.
"""

OPTIONS = ("--signals entropy --ratio 0.2 --normalize tokens --clip_high 0.28 --filter accuracy "
           "--mask_cut --beta 0")
