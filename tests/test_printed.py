"""The tests' own eye for paths: it sees those that are not there."""

from pathlib import Path

from tests.printed import missing_links, missing_paths, paths_in


def test_paths_are_found_in_what_programs_print() -> None:
    text = ("report       /tmp/a b/reports/report.html\nwrote reports/compare.html, models/promoted.\n"
            "see docs/tutorial.md; http://127.0.0.1:5000/#/models/x; https://example.org/models/x; 3/4 of the rows; "
            "and/or; --data DIR/models/x; "
            "scratch/workspaces/team,kl_goal=0.5 has metrics/*.json: ../my-model")
    assert paths_in(text) == ["/tmp/a", "reports/compare.html", "models/promoted", "docs/tutorial.md",
                              "scratch/workspaces/team,kl_goal=0.5", "../my-model"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "a.html").write_text("<a href='sub/b.html'><a href='https://x.org/y'><img src='c.png'>")
    (tmp_path / "reports" / "sub").mkdir()
    (tmp_path / "reports" / "sub" / "b.html").write_text('<a href="../a.html"><a href="gone.html?x=1">')
    assert missing_paths("reports/a.html, reports/none.html", tmp_path) == ["reports/none.html"]
    assert missing_links(tmp_path / "reports" / "a.html") == ["a.html: c.png", "sub/b.html: gone.html"]
