"""``florence-fast export``: write a model as a file that runs without this package."""

from pathlib import Path
from typing import Annotated

import typer

from florence_fast.cli.outputs import check_out_file
from florence_fast.cli.usage import Pretrained, one_of, refusals_as_wrong_usage, weights_of


def command(
    model: Annotated[str, typer.Argument(help="Name of a model, or a folder or file of ours.")],
    out: Annotated[Path, typer.Argument(help="The file, which ends in .onnx or in .pt2.")],
    format: Annotated[
        str,
        typer.Option(
            "--format", callback=one_of("onnx", "torch-export", "aoti"), help="onnx, torch-export or aoti (compiled)."
        ),
    ] = "onnx",
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            callback=lambda word: word and one_of("image", "text", "both")(word),
            help="image, text or both.",
            show_default="all there is",
        ),
    ] = None,
    pretrained: Pretrained = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=4, help="Side of the images.", show_default="the model's")
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic/--static", help="Take batches of every size.")] = True,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Take images of every size from 4 pixels on, square or not.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="The one size of --static batches.")] = 1,
) -> None:
    """Write a model as ONNX or for AOTInductor.

    The file holds PyTorch's own operations alone. It is loaded again and compared with the model before it appears
    under its name, and the errors are printed.
    """
    from florence_fast.export import export
    from florence_fast.models import create_model

    check_out_file("OUT", out)
    model, pretrained = weights_of(model, pretrained)
    with refusals_as_wrong_usage():
        net = create_model(model, pretrained)
        done = export(
            net,
            out,
            format=format,
            part=part,
            image_size=image_size,
            dynamic=dynamic,
            dynamic_size=dynamic_size,
            batch_size=batch_size,
        )
    print(done)
