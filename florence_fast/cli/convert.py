"""``florence-fast convert``: a checkpoint from one project's names to another's."""

from pathlib import Path
from typing import Annotated

import typer

from florence_fast.cli.outputs import check_out_file, check_out_folder
from florence_fast.cli.usage import one_of, refusals_as_wrong_usage

# as in florence_fast.compat.convert, which needs torch and is imported when it is used; a test compares them
SOURCES = ("auto", "open_clip", "unicl", "hugging_face", "torchvision", "timm", "microsoft")
TARGETS = ("florence_fast", "hugging_face", "timm", "microsoft", "torchvision")


def command(
    source: Annotated[Path, typer.Argument(help="A .safetensors or .pth file, or a folder with model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="A .safetensors or .pth file, or a folder; what is there is replaced.")],
    layout: Annotated[
        str, typer.Option("--from", callback=one_of(*SOURCES), help=f"Whose names it has: {', '.join(SOURCES)}.")
    ] = "auto",
    to: Annotated[
        str, typer.Option("--to", callback=one_of(*TARGETS), help=f"Whose names to write: {', '.join(TARGETS)}.")
    ] = "florence_fast",
    model: Annotated[
        str | None, typer.Option("--model", help="A model that the result must fit.", show_default="from the shapes")
    ] = None,
    window_size: Annotated[
        int | None, typer.Option("--window-size", min=1, help="Another window: bias tables are interpolated.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=4, help="Side of the images that the model is for.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option("--context-length", min=1, help="Another length of text: positions are fitted.")
    ] = None,
    warm_start_coswin: Annotated[
        bool, typer.Option("--warm-start-coswin", help="Turn a plain Swin into a CoSwin to train on.")
    ] = False,
) -> None:
    """Convert a checkpoint to our names, or back.

    Reads Swin and UniCL of Microsoft, Swin of timm, torchvision and Hugging Face, and CLIP's text tower of Hugging
    Face and open_clip; writes ours, or a plain Swin for the others. A file with pickled code is never run: it is
    refused. What is missing, left out or interpolated is listed.
    """
    from florence_fast.compat.convert import PICKLED, convert

    is_file = out.suffix in (".safetensors", *PICKLED)
    (check_out_file if is_file else check_out_folder)("OUT", out)
    with refusals_as_wrong_usage():
        done = convert(
            source,
            out,
            layout=layout,
            to=to,
            model=model,
            window_size=window_size,
            image_size=image_size,
            context_length=context_length,
            warm_start_coswin=warm_start_coswin,
        )
    print(done)
