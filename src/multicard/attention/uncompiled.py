"""The ring's loop as ``torch.compile`` takes it: one graph break, for all of its messages.

Marking it imports Dynamo, which takes a second of processor time. So only code that is being traced imports this
module, and not every rank that starts.
"""

import torch

from multicard.attention import rotation

around = torch.compiler.disable(rotation.around, reason="point to point")
