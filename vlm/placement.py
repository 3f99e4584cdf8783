"""Image runs in the text stream: the batch that decoder families read, and how tokens are placed.

A row of a batch is one stream of places. A place holds a text id, or IMAGE where an image token
stands. IMAGE is no id of any vocabulary, so text that happens to spell an image mark can never be
taken for an image.

A row is one example, padded to the longest of the batch; or, packed, the only row holds all
examples end to end, and none of them sees another.

Shapes: B row, S example, T place, V view, P packed image tokens, N target, D decoder width.
"""

from __future__ import annotations
