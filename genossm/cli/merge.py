"""`genossm merge`: the files of a prediction whose shards are complete."""

from __future__ import annotations

from pathlib import Path

import click

from genossm.cli.console import show


@click.command("merge", short_help="Write the files of a prediction that was made in shards.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option(
    "--reference",
    "references",
    multiple=True,
    metavar="[TRACK=]FILE.bw",
    help="Print the correlation with this bigWig per chromosome; may be given often.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that write tracks. Default: the cores there are, at most 8.",
)
def command(folder: Path, references: tuple[str, ...], jobs: int | None) -> None:
    """Prove that every bin of the prediction in DIR is there exactly once, write its files, and remove the parts.

    DIR is the folder that `genossm predict --shard i/n` wrote to for every i. Where parts are missing or damaged the
    message names them and the commands that make them, and nothing is written. Needs neither model nor genome. A killed
    command goes on with the tracks that it had not written when it is run again.
    """
    from genossm.cli.predict import prediction_text
    from genossm.pipelines.correlate import correlate
    from genossm.pipelines.merge import merge

    result = merge(folder, jobs=jobs)
    found = correlate(result.folder, references) if references else None
    data = {"out": result.folder, "files": result.files, **result.summary}
    show(
        data if found is None else data | {"reference": found.rows},
        prediction_text(result) + ("" if found is None else f"\n{found.text()}"),
    )
