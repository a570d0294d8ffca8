"""Search a folder of your own images by words.

    python examples/search_folder.py ~/Pictures "red fruit" "a clock"

The shipped weights read emoji, not photographs. For photographs give weights of your own: --pretrained logs/mine.
"""

import argparse
from pathlib import Path

import florence_fast as ff
from florence_fast.evaluate import index_images, search
from florence_fast.evaluate.contact_sheet import contact_sheets


def main() -> None:
    """Print the best images of each query, and write them to one HTML page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("queries", nargs="+")
    parser.add_argument("--model", default="florence_nano")
    parser.add_argument("--pretrained", default="artists", help="a tag, a folder of a run, or a file")
    parser.add_argument("--index", type=Path, help="keep the features here: the next search encodes new images only")
    parser.add_argument("--page", type=Path, default=Path("found.html"))
    args = parser.parse_args()

    model = ff.create_model(args.model, pretrained=args.pretrained)
    tokenizer = ff.get_tokenizer(args.model)
    index = index_images(model, args.folder, file=args.index)

    found = [(query, search(model, tokenizer, index, query, top=8)) for query in args.queries]
    for query, hits in found:
        print(query)
        for hit in hits:
            print(f"  {hit.score:.3f} {hit.path}")
    args.page.write_text(contact_sheets(found, args.folder), encoding="utf-8")
    print(f"open {args.page}")


if __name__ == "__main__":
    main()
