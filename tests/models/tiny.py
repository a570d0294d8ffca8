"""The smallest models that still have a shifted block, a merge and an odd width."""

from florence_fast.models import FlorenceConfig, ImageConfig, TextConfig

COSWIN = ImageConfig("coswin", 8, (2, 2), (1, 2), img_size=32, window_size=4)
SWIN = ImageConfig("swin", 8, (2, 2), (1, 2), img_size=32, window_size=4)
TEXT = TextConfig(16, heads=2, layers=2, vocab_size=64, context_length=12)
FLORENCE = FlorenceConfig(COSWIN, TEXT, embed_dim=12)
