"""Blackened patches in place of the hidden video, for any rule:

    visual_black    each patch of 14 x 14 pixels is black with probability 0.6
`--rule lab/rules/pgpo.py lab/rules/black.py --signals visual_black`, say.
Source: PAPO (arXiv 2507.06448), random_patch_blackening; VPPO has 0.5 (visual_half_black, vppo.py).
Differs: a clip's patches are the same in all its frames (common.py), and one draw serves the group.
"""

from attribution import COUNTERFACTUALS
from lab.rules.common import blacken

OPTIONS = "--signals visual_black temporal entropy"
COUNTERFACTUALS["visual_black"] = blacken
