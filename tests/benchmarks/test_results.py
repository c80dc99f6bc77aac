"""Results as data, as tables and as plots."""

from __future__ import annotations

from pathlib import Path

import pytest

from biasloss_ext.benchmarks import noise, plots, results, table
from biasloss_ext.benchmarks.results import Entry
from biasloss_ext.errors import UserError
from tests.benchmarks.made_up_runs import TIMES, run


def test_survives_a_file(tmp_path: Path) -> None:
    before = run(TIMES)
    before.groups[0].entries.append(Entry("missing", "peer", "unavailable", "no such package"))
    path = tmp_path / "folder" / "results.json"
    before.save(path)
    after = results.load(path)
    assert after.device == before.device
    assert after.groups[0].entries[-1] == before.groups[0].entries[-1]
    for old, new in zip(before.groups, after.groups, strict=True):
        assert (old.name, old.bytes, old.ceiling) == (new.name, new.bytes, new.ceiling)
        assert new.entries[0].median() == pytest.approx(old.entries[0].median(), rel=1e-5)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "groups": [{}]}'])
def test_other_files_are_told_apart(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        results.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        results.load(tmp_path / "nowhere.json")


def test_best_peer_is_the_fastest_that_computes_the_same() -> None:
    group = run(TIMES).groups[0]
    peer = group.best_peer()
    assert peer is not None
    assert peer.name == "compiled"  # the floor is faster, but no peer
    assert group.best_peer("gpu") is None
    peer.status = "failed"
    other = group.best_peer()
    assert other is not None
    assert other.name == "eager"


def test_share_of_the_ceiling() -> None:
    found = run({"ours": 1e-3}, noise=1e-9)
    group = found.groups[0]
    assert group.ours is not None
    shares = {}
    for ceiling, one_set in (("read", False), ("read", True), ("copy", False), ("matmul", False)):
        group.ceiling, group.one_set = ceiling, one_set
        shares[ceiling, one_set] = found.share(group, group.ours)
    # 1 MB or 1 MFLOP in 1 ms against 20, 40 and 10 GB/s and 1 TFLOP/s
    assert shares == pytest.approx(
        {("read", False): 0.05, ("read", True): 0.025, ("copy", False): 0.1, ("matmul", False): 1e-3}, rel=1e-3
    )
    group.dtype = "float16"
    assert found.share(group, group.ours) is None  # its ceiling was not measured


def test_summary_shows_ratio_and_what_is_missing() -> None:
    found = run(TIMES, noise=1e-9)
    found.groups[1].entries[0].status, found.groups[1].entries[0].reason = "failed", "RuntimeError: broken"
    rows = table.summary(found).rows
    assert rows[0] == ("op 0 float32", "1 ms", "1.5 ms, compiled", "1.5x ±0%", "5% of read")
    assert rows[1] == ("op 1 float32", "missing", "1.5 ms, compiled", "", "")
    assert table.missing(found).rows == [("op", "ours", "failed", "RuntimeError: broken")]
    text = table.details(found.groups[1]).markdown()
    assert "| ours | failed: RuntimeError: broken |" in text
    assert "| eager | 2 ms | 2 ms to 2 ms |" in text


def test_comparison_lists_the_largest_change_first() -> None:
    after = run(TIMES, noise=1e-3, seed=1, planted={(0, "ours"): 1.2, (1, "ours"): 0.5})
    rows = table.comparison(noise.changes(run(TIMES, noise=1e-3), after)).rows
    assert [row[0] for row in rows] == ["op 1 float32", "op 0 float32", "22 others"]
    assert [row[4] for row in rows] == ["faster", "slower", "same"]


def test_units() -> None:
    assert [table.duration(s) for s in (2.5, 3.14159e-3, 7e-6)] == ["2.5 s", "3.14 ms", "7 us"]
    assert [table.size(b) for b in (12, 3.2e3, 2.5e6, 1e9)] == ["12 B", "3.2 kB", "2.5 MB", "1 GB"]


def test_draws_what_there_is_data_for(tmp_path: Path) -> None:
    written = plots.draw(run(TIMES), tmp_path)
    assert {path.name for path in written} == {"ratios-op.png", "memory-op.png", "scaling-op.png", "roofline.png"}
    assert all(path.stat().st_size > 1000 for path in written)
    nobody = run(TIMES)
    for group in nobody.groups:
        for entry in group.entries:
            entry.status = "failed"
    assert plots.draw(nobody, tmp_path / "other") == []
