"""Stage 8: train and test by clip, with each tag's share in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.stage import Outcome, Row
from maple_trl.data.splits import balanced, clips_for_test


def assign_splits(tables: Mapping[str, Sequence[Row]], config: CurationConfig) -> dict[str, Outcome]:
    """
    Give every row its `split`.

    Args:
        tables: the rows of `questions` and of `captions`; a clip has the same split in both.

    Returns:
        an outcome for each table; what the balance of the test split leaves out is dropped by name.
    """
    rows = [(kind, row) for kind, table in tables.items() for row in table]
    test = clips_for_test(
        [row["clip"] for _, row in rows],
        [(kind, row["tag"]) for kind, row in rows],
        config.splits.test_share,
        config.seed,
    )
    outcomes = {}
    for kind, table in tables.items():
        outcome = outcomes[kind] = Outcome()
        of_test = [row for row in table if row["clip"] in test]
        stays = balanced([row["id"] for row in of_test], [row["tag"] for row in of_test], config.seed)
        left_out = {row["id"] for row, kept in zip(of_test, stays, strict=True) if not kept}
        for row in table:
            if row["id"] in left_out and config.splits.balance_test:
                outcome.drop(row["id"], "balance", f"the test split has fewer {kind} of another tag")
            else:
                outcome.rows.append({**row, "split": "test" if row["clip"] in test else "train"})
    return outcomes
