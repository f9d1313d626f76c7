"""The ring's loop under ``torch.compile``: one graph break for all its messages.

Marking it imports Dynamo, which takes a second of processor time. So this module is imported only while code is being
traced, not on every rank that starts.
"""

import torch

from multicard.attention import rotation

around = torch.compiler.disable(rotation.around, reason="point to point")
