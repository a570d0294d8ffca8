"""``florence-fast export``: a model as a file that runs without this package."""

from pathlib import Path
from typing import Annotated

import typer

from florence_fast.cli.usage import WrongUsage, one_of, refusals_as_wrong_usage


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
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--pretrained", help="Weights: a tag, a folder or a file; 'none' for random ones.", show_default="its first"
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=4, help="Side of the pictures.", show_default="the model's")
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
    from florence_fast.models import create_model, get_model_config, list_pretrained
    from florence_fast.models.factory import LOCAL_DIR

    with refusals_as_wrong_usage():
        if Path(model).exists():
            model = f"{LOCAL_DIR}{model}"
        if pretrained is None and not model.startswith(LOCAL_DIR):
            get_model_config(model)
            tags = [tag for name, tag in list_pretrained() if name == model]
            if not tags:
                raise WrongUsage(f"{model} comes without weights: give --pretrained a file, or 'none' for random ones")
            pretrained = tags[0]
        net = create_model(model, None if pretrained == "none" else pretrained)
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
