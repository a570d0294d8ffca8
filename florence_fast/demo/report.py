"""``report.html``: a self-contained page about one run of the demo."""

import base64
import html
from pathlib import Path
from typing import Any

from florence_fast.files import write_text

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>florence_fast demo</title>
<style>
  :root {{ color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa); }}
  body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }}
  body {{ color: light-dark(#222, #ddd); background: light-dark(#fff, #181a1b); }}
  img {{ max-width: 100%; background: #fff; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; margin: 1rem 0; }}
  th, td {{ padding: .3rem 1rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }}
  th:first-child, td:first-child {{ text-align: left; }}
  .big {{ font-size: 1.35rem; }}
  .green {{ color: light-dark(#0f766e, #5eead4); }} .red {{ color: light-dark(#c2410c, #fdba74); }}
  footer {{ color: var(--soft); font-size: .85rem; margin-top: 3rem; overflow-wrap: anywhere; }}
</style>
<h1>Words learnt from six artists, read off a seventh</h1>
<p class="big">{model} ({parameters:.1f} M parameters) saw {images_seen:,} images in {seconds:.0f} seconds of training
({images_per_second:.0f} a second) and names <b>{top1:.1%}</b> of an unseen artist's {images:,} images at once, out of
{classes:,} names; the right name is among the first five for <b>{top5:.1%}</b>. Guessing would get {chance:.2%}.</p>
<div class="wide"><table>
<tr><th></th><th>first</th><th>among 5</th><th>among 10</th></tr>
{rows}
</table></div>
<p>Of 40 names, the right one comes first for <b>{white:.0%}</b> of the images on white and for <b>{others:.0%}</b> on
{kinds} that training does not draw. The weights that the package ships reach
{shipped_top1:.1%} of all names on white, and of 40 names {shipped_white:.0%} on white and {shipped_others:.0%} on those
grounds.</p>
{baseline}
<h2>How it went</h2>
<img alt="loss and accuracy against seconds" src="{curves}">
<h2>Words find images</h2>
<p>Above, two things as each of the six artists of training draws them, and as the seventh does. Below, the first eight
of all {images:,} images, down to the last right one. <span class="green">✓</span>: the words are the image's name or
one of its keywords in Unicode's list; <span class="red">✗</span>: they are not.</p>
<img alt="queries and the images found" src="{queries}">
<h2>Images are read</h2>
<p>Images chosen at random, each with the five nearest of {classes:,} names, the true one in bold. Names of one thing
differ between artists, so a neighbour is often right in spirit.</p>
<img alt="images and their nearest names" src="{readings}">
<footer>{command} · commit {commit} · florence_fast {version} · torch {torch}, {threads} threads, {device} · {date} ·
images: Twemoji, CC BY 4.0; names and keywords: Unicode CLDR.</footer>
</html>
"""

ROW = "<tr><td>{name}</td><td>{0:.1%}</td><td>{1:.1%}</td><td>{2:.1%}</td></tr>"


def write_report(path: Path, results: dict[str, Any], folder: Path) -> None:
    """Write the page from ``results`` and the three PNG files in ``folder``."""
    found, baseline, shipped = results["zero_shot"], results["clip_baseline"], results["shipped"]
    page = PAGE.format(
        model=results["model"],
        parameters=results["parameters"] / 1e6,
        images_seen=results["images_seen"],
        seconds=results["seconds"],
        images_per_second=results["images_per_second"],
        **found,
        chance=1 / found["classes"],
        white=results["grounds"]["white"],
        others=results["grounds"]["mean"],
        kinds=list_grounds(results["grounds"]),
        shipped_top1=shipped["zero_shot"]["top1"],
        shipped_white=shipped["grounds"]["white"],
        shipped_others=shipped["grounds"]["mean"],
        rows=table_rows(results, "UniCL" if results["loss"] == "unicl" else "CLIP"),
        baseline=baseline_note(baseline),
        **{name: image_uri(folder / f"{name}.png") for name in ("curves", "queries", "readings")},
        command=html.escape(results["command"]),
        commit=results["commit"] or "unknown",
        version=results["version"],
        torch=results["torch"],
        threads=results["threads"],
        device=html.escape(results["device"]),
        date=results["date"],
    )
    write_text(path, page)


def table_rows(results: dict[str, Any], loss: str) -> str:
    """The rows of one run's figures."""
    found, recalls = results["zero_shot"], results["retrieval"]
    rows = {
        f"The right name of an image ({loss})": [found["top1"], found["top5"], found["top10"]],
        f"The text of an image ({loss})": recalls["image_to_text"].values(),
        f"The image of a text ({loss})": recalls["text_to_image"].values(),
    }
    return "\n".join(ROW.format(*shares, name=name) for name, shares in rows.items())


def list_grounds(grounds: dict[str, float]) -> str:
    """The names of the grounds other than white: 'blue, stripes and dots'."""
    names = [name for name in grounds if name not in ("white", "mean")]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def baseline_note(baseline: dict[str, Any] | None) -> str:
    """What the recorded run with CLIP's loss reached, or that there is no record beside this installation."""
    if baseline is None:
        return "<p>The recorded run with CLIP's loss lies in the repository and is not part of this installation.</p>"
    found = baseline["zero_shot"]
    return (
        f"<p>For comparison, CLIP's loss (only an image's own text is right), recorded with recipe "
        f"{html.escape(baseline['recipe'])} at commit {html.escape(str(baseline['commit']))}: "
        f"top-1 {found['top1']:.1%}, top-5 {found['top5']:.1%} of {found['classes']:,} names after "
        f"{baseline['steps']} steps.</p>"
    )


def image_uri(path: Path) -> str:
    """A PNG file as an address that an ``<img>`` can hold."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
