"""What editors know of the public names; `make lint` checks this file with basedpyright, nothing runs it."""

from typing import assert_type

import florence_fast as ff
from florence_fast.compat.accelerate import Report
from florence_fast.models import FeatureExtractor, Florence, ImageTower
from florence_fast.ranges import annotated

assert_type(ff.create_model("florence_nano"), Florence)
assert_type(ff.create_model("unicl_swin_tiny", pretrained="weights.pth"), Florence)
assert_type(ff.create_model("coswin_tiny", num_classes=10), ImageTower)
assert_type(ff.create_model("coswin_tiny", features_only=True), FeatureExtractor)
assert_type(ff.accelerate(ff.create_model("swin_tiny")), Report)
assert_type(ff.list_models(), list[str])


@annotated("doubled")
def doubled(number: int) -> int:
    """A function whose signature must come through the decorator."""
    return 2 * number


assert_type(doubled(1), int)
doubled("1")  # pyright: ignore[reportArgumentType]
