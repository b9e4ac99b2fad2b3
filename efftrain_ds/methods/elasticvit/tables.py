"""Tables of sub-networks by level, made before training: drawing one that has the right cost is then a look-up.

Few sub-networks that are drawn at random belong to a level (a few in ten thousand at some), too few to draw and reject
in every step. A table holds different sub-networks of one level, all as large as the level's smallest sub-network in
every dimension, as rows of codes beside their MACs and the identity of the space.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ...core.rng import numpy_rng
from ...models.elastic import Space
from .levels import Levels, SmallestSubnets, macs_text

logger = logging.getLogger(__name__)

SCHEMA = 2
CHUNK = 65536
"""Sub-networks that are drawn and priced at a time. Part of what a seed means: another value gives other tables."""
DRAWS = 400_000_000
HOPELESS = 0.1
"""Share of the draws after which a level without a single sub-network is given up."""
PATIENCE = 10
"""A level has no more sub-networks if none came up in so many times the draws that led to the last new one."""
ROWS = 5000
_META = {"schema", "space", "level", "window", "formula", "seed", "lower", "drawn", "rows"}
_REMEDY = "give another folder, or remove the file, so that it is made anew"


@dataclass(frozen=True, eq=False)
class Table:
    """Different sub-networks of one level.

    Attributes:
        space: they belong to.
        level: lower end of the level in MACs.
        window: width of the level in MACs.
        formula: how MACs were counted.
        lower: contained in all of them, or None.
        seed: of the draws.
        codes: [n, D] int8 (`Space.codes`).
        macs: [n] int64.
        drawn: sub-networks that were drawn to find them.
        rows: how many were asked for; fewer codes mean that no more were found.
    """

    space: Space[Any]
    level: int
    window: int
    formula: str
    lower: Any
    seed: int
    codes: np.ndarray
    macs: np.ndarray
    drawn: int
    rows: int

    def __len__(self) -> int:
        return len(self.codes)

    def draw(self, rng: np.random.Generator) -> Any:
        """One sub-network, uniformly among the rows."""
        return self.space.config(self.draw_codes(rng, 1)[0])

    def draw_codes(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Codes [n, D] of sub-networks, uniformly among the rows, with repeats."""
        return self.codes[rng.integers(len(self.codes), size=n)]

    def narrowed(self, window: int) -> Table:
        """The rows within a smaller window.

        Raises:
            ConfigError: a larger one, or no row is left.
        """
        if window > self.window:
            raise ConfigError(
                f"table of level {macs_text(self.level)}: its window is {macs_text(self.window)} MACs; "
                f"{macs_text(window)} is asked for, so that it must be made anew"
            )
        keep = self.macs <= self.level + window
        if not keep.any():
            raise ConfigError(f"table of level {macs_text(self.level)}: no row within {macs_text(window)} MACs")
        return replace(self, window=window, codes=self.codes[keep], macs=self.macs[keep])

    def first(self, rows: int) -> Table:
        """At most so many rows: what a table made for fewer rows holds."""
        return replace(self, codes=self.codes[:rows], macs=self.macs[:rows], rows=min(rows, self.rows))

    def save(self, path: Path | str) -> None:
        """Write a ``.npz`` file, whole or not at all. It holds no pickled objects.

        Raises:
            OSError: the file cannot be written.
        """
        path = Path(path)
        meta = {
            "schema": SCHEMA,
            "space": self.space.hash,
            "level": self.level,
            "window": self.window,
            "formula": self.formula,
            "seed": self.seed,
            "lower": None if self.lower is None else self.lower.to_dict(),
            "drawn": self.drawn,
            "rows": self.rows,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, codes=self.codes, macs=self.macs, meta=np.array(json.dumps(meta)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def build_tables(
    space: Space[Any],
    levels: Levels,
    smallest: SmallestSubnets | None = None,
    *,
    rows: int = ROWS,
    seed: int = 0,
    draws: int = DRAWS,
    only: Sequence[int] | None = None,
) -> list[Table]:
    """Make the tables of the levels: draw, price, keep what falls into a level, until each table is full.

    A table depends on the seed, its level and its smallest sub-network only, not on what else is made. Levels with one
    smallest sub-network share the draws.

    Args:
        space: of the supernet.
        levels: of the run.
        smallest: least sub-network of each level; None for none.
        rows: different sub-networks for each level. A level that has fewer, or where they are not found within
            `draws`, gets a smaller table and a warning.
        seed: of the draws.
        draws: most sub-networks to draw for one level.
        only: indices of the levels to make tables of; None for all.

    Returns:
        One table a level, in the order of the levels (of `only`).

    Raises:
        ConfigError: a level that the space cannot fill, or where nothing was found.
    """
    if rows < 1:
        raise ConfigError(f"{rows} rows a table; at least 1 is needed")
    levels.check(space)
    wanted = range(len(levels)) if only is None else only
    groups: dict[Any, list[int]] = {}
    for index in wanted:
        groups.setdefault(None if smallest is None else smallest.of(index), []).append(index)
    found: dict[int, Table] = {}
    for lower, members in groups.items():
        for index, table in _fill(space, levels, members, lower, rows, seed, draws):
            found[index] = table
    return [found[index] for index in wanted]


def _fill(
    space: Space[Any], levels: Levels, members: list[int], lower: Any, rows: int, seed: int, draws: int
) -> list[tuple[int, Table]]:
    """Tables of the levels that share a smallest sub-network."""
    name = "" if lower is None else json.dumps(lower.to_dict(), sort_keys=True)
    rng = numpy_rng(seed, "subnet table", space.hash, name)
    kept: dict[int, dict[bytes, int]] = {index: {} for index in members}
    drawn, newest = dict.fromkeys(members, 0), dict.fromkeys(members, 0)
    open_levels, total = list(members), 0
    while open_levels and total < draws:
        codes = space.sample_codes(rng, CHUNK, lower)
        macs = space.macs_of(codes, levels.formula)
        total += CHUNK
        for index in list(open_levels):
            low, entries = levels.macs[index], kept[index]
            rows_here = np.flatnonzero((macs >= low) & (macs <= low + levels.window))
            for row in _first_of_each(codes, rows_here):
                size = len(entries)
                entries.setdefault(codes[row].tobytes(), int(macs[row]))
                if len(entries) > size:
                    newest[index] = total
                if len(entries) == rows:
                    break
            drawn[index] = total
            given_up = total > 4 * CHUNK + PATIENCE * newest[index] if entries else total >= HOPELESS * draws
            if len(entries) == rows or given_up:
                open_levels.remove(index)
    tables = []
    for index in members:
        level, entries = levels.macs[index], kept[index]
        if not entries:
            raise ConfigError(
                f"level {macs_text(level)} MACs: none of {drawn[index]:,} sub-networks drawn at random falls into its "
                f"window of {macs_text(levels.window)}; widen the window or move the level"
            )
        if len(entries) < rows:
            logger.warning(
                "level %s MACs: %d different sub-networks in %d draws, %d were asked for",
                *(macs_text(level), len(entries), drawn[index], rows),
            )
        codes = np.frombuffer(b"".join(entries), np.int8).reshape(len(entries), -1)
        prices = np.fromiter(entries.values(), np.int64, len(entries))
        table = Table(space, level, levels.window, levels.formula, lower, seed, codes, prices, drawn[index], rows)
        tables.append((index, table))
    return tables


def _first_of_each(codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of the rows that do not repeat an earlier one, ascending."""
    keys = np.ascontiguousarray(codes[rows]).view(np.dtype((np.void, codes.shape[1])))[:, 0]
    return rows[np.sort(np.unique(keys, return_index=True)[1])]


def build_table(
    space: Space[Any],
    level: int,
    *,
    window: int,
    lower: Any = None,
    formula: str = "exact",
    rows: int = ROWS,
    seed: int = 0,
    draws: int = DRAWS,
) -> Table:
    """Make the table of one level, the same as `build_tables` makes.

    Args:
        space: of the supernet.
        level: lower end in MACs.
        window: width in MACs.
        lower: contained in all rows.
        formula: how MACs are counted.
        rows: different sub-networks.
        seed: of the draws.
        draws: most sub-networks to draw.

    Raises:
        ConfigError: the space cannot fill the level, or nothing was found.
    """
    levels = Levels((level,), window, formula)
    levels.check(space)
    return _fill(space, levels, [0], lower, rows, seed, draws)[0][1]


def load_table(path: Path | str, space: Space[Any]) -> Table:
    """Read a table and check it against a space: identity, codes, MACs and window of every row.

    Raises:
        ConfigError: no such file or no table, of another space, empty, damaged, or below the smallest sub-network.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            codes, macs, meta = file["codes"], file["macs"], json.loads(str(file["meta"]))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no table of sub-networks: {error}; {_REMEDY}") from error
    if not isinstance(meta, dict) or set(meta) != _META or meta["schema"] != SCHEMA:
        raise ConfigError(f"{path} is no table of sub-networks of schema {SCHEMA}; {_REMEDY}")
    if meta["space"] != space.hash:
        raise ConfigError(
            f"{path} was made for the space {meta['space']}, this run has {space.hash} (other choices, or another "
            f"number of classes); {_REMEDY}"
        )
    level, window, formula = meta["level"], meta["window"], meta["formula"]
    Levels((level,), window, formula).check(space)
    lower = None if meta["lower"] is None else space.parse(meta["lower"], f"{path}: lower")
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.shape[1] != len(space.dimensions) or len(codes) != len(macs):
        raise ConfigError(f"{path}: codes {codes.dtype} {list(codes.shape)} for {len(macs)} rows; the file is damaged")
    if not len(codes):
        raise ConfigError(f"{path}: level {macs_text(level)} has no sub-networks")
    good = space.legal(codes)
    good[good] &= space.macs_of(codes[good], formula) == macs[good]
    good &= (macs >= level) & (macs <= level + window)
    if lower is not None:
        good &= space.at_least(codes, lower)
    if not good.all():
        raise ConfigError(
            f"{path}: row {int(np.argmin(good))} is no sub-network of level {macs_text(level)} of this space; the file "
            "is damaged"
        )
    return Table(
        *(space, level, window, formula, lower, meta["seed"], codes, macs.astype(np.int64), meta["drawn"]),
        meta["rows"],
    )


def table_path(folder: Path | str, level: int) -> Path:
    """Where a level's table lies in a folder of tables."""
    return Path(folder) / f"level_{level}.npz"


def save_tables(folder: Path | str, tables: Sequence[Table]) -> None:
    """Write one file a table into a folder."""
    for table in tables:
        table.save(table_path(folder, table.level))


def read_tables(
    folder: Path | str,
    space: Space[Any],
    levels: Levels,
    smallest: SmallestSubnets | None = None,
    *,
    rows: int | None = None,
    seed: int | None = None,
) -> dict[int, Table]:
    """Read the tables that a folder has, each as it would be made for these levels.

    Args:
        folder: of `save_tables`; it may be missing, or have the tables of some levels only.
        space: of the supernet.
        levels: of the run; wider tables are cut to their window.
        smallest: least sub-network of each level; None for none.
        rows: of each table, larger ones are cut; None for what is there.
        seed: of the draws; None for any.

    Returns:
        Tables by index of their level. Those of the other levels are not there.

    Raises:
        ConfigError: a table that does not fit (`load_table`), was counted by another formula, drawn with another seed,
            has another smallest sub-network, a narrower window or too few rows.
    """
    found = {}
    for index, level in enumerate(levels.macs):
        path = table_path(folder, level)
        if path.is_file():
            lower = None if smallest is None else smallest.of(index)
            try:
                found[index] = _fitting(load_table(path, space), level, levels, lower, rows, seed)
            except _OtherTable as error:
                raise ConfigError(f"{path} {error}; {_REMEDY}") from error
    return found


class _OtherTable(Exception):
    """In which way a table is not the one that is needed."""


def _fitting(table: Table, level: int, levels: Levels, lower: Any, rows: int | None, seed: int | None) -> Table:
    """What a run reads of a table.

    Raises:
        _OtherTable: it is made for something else.
    """
    if (table.level, table.formula) != (level, levels.formula):
        raise _OtherTable(
            f"was made for level {macs_text(table.level)} by the {table.formula} formula; needed: {macs_text(level)}, "
            f"{levels.formula}"
        )
    if table.lower != lower:
        raise _OtherTable(f"was made with another smallest sub-network for level {macs_text(level)}")
    if seed is not None and table.seed != seed:
        raise _OtherTable(f'was made with seed {table.seed}, this run has "seed": {seed}')
    if levels.window > table.window:
        raise _OtherTable(
            f"was made for a window of {macs_text(table.window)} MACs; {macs_text(levels.window)} is asked for"
        )
    complete = len(table) < table.rows  # no more were found
    table = table.narrowed(levels.window)
    if rows is None:
        return table
    if len(table) < rows and not complete:
        raise _OtherTable(f'has {len(table)} sub-networks of its level, this run has "rows": {rows}')
    return table.first(rows)
