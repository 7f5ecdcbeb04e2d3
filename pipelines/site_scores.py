"""Score whole sites, such as those of a simulation's truth.tsv, rule by rule: the mean prediction over each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from genossm import metrics
from genossm.errors import DataError, FileError
from genossm.progress import say
from genossm.targets import bases_per_bin

REQUIRED = ("chrom", "start", "end", "open", "rule")
REGION = ("region_start", "region_end")
RULE_COLUMNS = (
    "rule",
    "sites",
    "open",
    "closed",
    "positive_rate",
    "predicted_open",
    "predicted_closed",
    "auroc",
    "auprc",
)


def read_sites(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table of sites with known answers, tab-separated with a header line; may be compressed.

    It needs the columns chrom, start, end (0-based half-open), open (1 or 0) and rule; region_start and region_end,
    where they are there, say which stretch is scored instead of the site itself. Other columns stay, as text.

    Returns:
        One row per site; positions int64, `open` bool, `region_start` and `region_end` always there.

    Raises:
        FileError: there is no such file, or it cannot be read.
        DataError: a column is missing, or a value is none of what its column may hold.
    """
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read the sites {path} ({error}); give a tab-separated table") from error
    except ValueError as error:  # pandas' parser
        raise DataError(f"{path} is no table of sites ({error}); give a tab-separated table") from error
    lacking = [name for name in REQUIRED if name not in table.columns]
    if lacking or len(set(REGION) & set(table.columns)) == 1:
        raise DataError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; a table of sites needs "
            f"{', '.join(REQUIRED)}, and {' and '.join(REGION)} both or neither"
        )
    given = tuple(name for name in REGION if name in table.columns)
    for name in ("start", "end", *given):
        wrong = ~table[name].str.fullmatch(r"\d{1,18}")
        if wrong.any():
            raise DataError(
                f"{path}: {name} holds {table[name][wrong].iloc[0]!r}; positions are whole numbers from 0"
            )
        table[name] = table[name].astype(np.int64)
    wrong = ~table["open"].isin(["0", "1"])
    if wrong.any():
        raise DataError(f"{path}: open holds {table['open'][wrong].iloc[0]!r}; allowed are 1 and 0")
    table["open"] = table["open"] == "1"
    if not given:
        table["region_start"], table["region_end"] = table["start"], table["end"]
    empty = table[table["region_end"] <= table["region_start"]]
    if len(empty):
        row = empty.iloc[0]
        raise DataError(
            f"{path}: a site of {row['chrom']} covers no base ({row['region_start']} to {row['region_end']}); "
            "ends lie behind starts"
        )
    return table


def region_means(
    values: npt.NDArray[np.float32],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    *,
    bin_bp: int,
    length_bp: int,
) -> npt.NDArray[np.float64]:
    """Mean over the bases of each region [start, end), every base having the value of its bin.

    Args:
        values: (bins, tracks) of a whole chromosome; bases of NaN bins are left out of the mean.
        starts, ends: (regions,), inside the chromosome.
        bin_bp, length_bp: base pairs of a bin and of the chromosome.

    Returns:
        float64 (regions, tracks); NaN where no base of a region has a value.
    """
    sizes = bases_per_bin(length_bp, bin_bp)[:, None]
    present = ~np.isnan(values)
    columns = np.concatenate([np.where(present, values, 0.0), present], axis=1, dtype=np.float64)
    nothing = np.zeros((1, columns.shape[1]))
    before = np.concatenate([nothing, np.cumsum(columns * sizes, axis=0)])  # whole bins to the left
    own = np.concatenate([columns, nothing])

    def up_to(places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        bins, within = np.divmod(places, bin_bp)
        sums: npt.NDArray[np.float64] = before[bins] + own[bins] * within[:, None]
        return sums

    total, bases = np.split(up_to(ends) - up_to(starts), 2, axis=1)
    return np.divide(total, bases, out=np.full_like(total, np.nan), where=bases > 0.5)


def rule_scores(sites: pd.DataFrame) -> pd.DataFrame:
    """One row per rule: how many sites are open, what they are predicted to be, and how well that ranks them.

    Args:
        sites: the columns `rule`, `open` (bool) and `predicted` (0 to 1).

    Returns:
        The columns rule, sites, open, closed, positive_rate (the AUPRC of a random ranking), predicted_open and
        predicted_closed (means), auroc and auprc (both NaN unless some sites are open and some closed).
    """
    rows = []
    for rule, own in sites.groupby("rule", sort=True):
        is_open, predicted = own["open"].to_numpy(bool), own["predicted"].to_numpy(np.float64)
        both = is_open.any() and not is_open.all()
        rows.append(
            {
                "rule": rule,
                "sites": is_open.size,
                "open": int(is_open.sum()),
                "closed": int((~is_open).sum()),
                "positive_rate": metrics.positive_rate(is_open),
                "predicted_open": predicted[is_open].mean() if is_open.any() else np.nan,
                "predicted_closed": predicted[~is_open].mean() if not is_open.all() else np.nan,
                "auroc": metrics.auroc(is_open, predicted),
                "auprc": metrics.auprc(is_open, predicted) if both else np.nan,
            }
        )
    return pd.DataFrame(rows, columns=list(RULE_COLUMNS))


class SiteScores:
    """Collects the predictions at the sites of some chromosomes, then scores them.

    Args:
        path: the table of sites, see `read_sites`.
        lengths: the chromosomes to score and their lengths in bp; sites of other chromosomes are left out.
        tracks: names of the peaks tracks to score.

    Raises:
        DataError: there is no peaks track, no site on these chromosomes, or a site runs past its chromosome's end.
        FileError: the table cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], lengths: Mapping[str, int], tracks: Sequence[str]
    ) -> None:
        self.path = Path(path)
        self.tracks = tuple(tracks)
        if not self.tracks:
            raise DataError("sites are scored by peaks tracks, and there is none; leave the sites out")
        every = read_sites(path)
        self.sites = every[every["chrom"].isin(list(lengths))].reset_index(drop=True)
        if self.sites.empty:
            raise DataError(
                f"{path} has no site on {', '.join(lengths)}; its sites are on "
                f"{', '.join(every['chrom'].unique()[:5]) or 'no chromosome'}"
            )
        outside = self.sites[self.sites["region_end"] > self.sites["chrom"].map(dict(lengths))]
        if len(outside):
            row = outside.iloc[0]
            raise DataError(
                f"{path}: {row['chrom']}:{row['region_start']}-{row['region_end']} runs past the end of "
                f"{row['chrom']} ({lengths[row['chrom']]:,} bp); the sites belong to another assembly"
            )
        self._lengths = dict(lengths)
        self._predicted = np.full((len(self.sites), len(self.tracks)), np.nan)

    def add(self, chrom: str, values: npt.NDArray[np.float32], bin_bp: int) -> None:
        """Take the predictions (bins, tracks) of a whole chromosome, a column for each of `tracks`."""
        here = (self.sites["chrom"] == chrom).to_numpy()
        starts, ends = (self.sites.loc[here, name].to_numpy() for name in REGION)
        self._predicted[here] = region_means(
            values, starts, ends, bin_bp=bin_bp, length_bp=self._lengths[chrom]
        )

    def table(self) -> pd.DataFrame:
        """A row per track and rule: `track`, then the columns of `rule_scores`."""
        scored = ~np.isnan(self._predicted).any(axis=1)
        if not scored.all():
            say(f"note: {(~scored).sum()} of {scored.size} sites left out: nothing is predicted in runs of N")
        tables = []
        for index, track in enumerate(self.tracks):
            scores = rule_scores(self.sites[scored].assign(predicted=self._predicted[scored, index]))
            scores.insert(0, "track", track)
            tables.append(scores)
        return pd.concat(tables, ignore_index=True)


def sites_sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a file of sites, which tells whether stored scores are of the same sites.

    Raises:
        FileError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(
            f"cannot read the sites {path} ({error.strerror}); give a tab-separated table"
        ) from error
